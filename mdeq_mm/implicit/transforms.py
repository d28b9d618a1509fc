"""Transformations of torch.func and forward-mode differentiation."""

import torch
from torch.autograd import forward_ad


def transforming(tensors=()):
    """Whether ``torch.func`` is transforming what runs, or a tensor has a tangent.

    Autograd functions of our own, values that decide what is done next, and tensors
    that are written to do not take part in either.

    Args:
        tensors (Iterable[Tensor | None]): What may have tangents, or be a batch of
            gradients.
    """
    return torch._C._are_functorch_transforms_active() or any(
        torch._C._functorch.is_legacy_batchedtensor(t)
        or forward_ad.unpack_dual(t).tangent is not None
        for t in tensors
        if t is not None
    )
