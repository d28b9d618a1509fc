"""Products with a history whose rows belong to one sample each.

A history is (N, m, D) with small m and very large D. On a CPU ``torch.bmm`` takes a
slow path for inner products of such shapes, up to ten times slower than taking the
samples one by one; on a GPU one batched call is faster than N small ones.

Autocast is off here: it would round histories to half precision.
"""

import torch
from torch import Tensor


def project(history: Tensor, vector: Tensor):
    """Inner products with each row of a history: (N, m, D), (N, D) -> (N, m)."""
    device = history.device.type
    with torch.autocast(device, enabled=False):
        if device == 'cpu':
            return torch.stack(
                [h.mv(v) for h, v in zip(history, vector, strict=True)], dim=0
            )
        return torch.bmm(history, vector[:, :, None]).squeeze(2)


def combine(history: Tensor, weights: Tensor):
    """Weighted sums of the rows of a history: (N, m, D), (N, m) -> (N, D)."""
    with torch.autocast(history.device.type, enabled=False):
        return torch.bmm(weights[:, None, :], history).squeeze(1)


def combine_into(out: Tensor, first: Tensor, history: Tensor, weights: Tensor):
    """Write ``first + combine(history, weights)`` to ``out``, in one pass.

    Args:
        out (Tensor): (N, D); may be a row of another history.
        first (Tensor): (N, D).
        history (Tensor): (N, m, D).
        weights (Tensor): (N, m).
    """
    with torch.autocast(history.device.type, enabled=False):
        torch.baddbmm(first[:, None], weights[:, None], history, out=out[:, None])


def compact(history: Tensor, index: Tensor):
    """Some samples of a history (N, m, D), moved to its front: (n, m, D).

    In place, because a copy would double what is by far the most memory of a solve.

    Args:
        history (Tensor): (N, m, D); what it held is lost.
        index (Tensor): Indices of the samples, ascending.
    """
    for row, source in enumerate(index.tolist()):
        if row != source:
            history[row].copy_(history[source])
    return history[: len(index)]
