"""Evaluating a module again in the backward pass instead of keeping its results."""

from contextlib import contextmanager, nullcontext

from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


@contextmanager
def _statistics_kept(module):
    """Let batch norms update copies of their running statistics.

    They are updated in the forward pass, and would be once more in the second.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    kept = [dict(norm._buffers) for norm in norms]
    for norm, buffers in zip(norms, kept, strict=True):
        for name, value in buffers.items():
            norm._buffers[name] = None if value is None else value.clone()
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)


def recompute(module, function, *inputs):
    """Run a function of a module, keeping its inputs alone for the backward pass.

    Random numbers are drawn anew as they were, mixed precision is as it was, and
    batch norms update their statistics once.

    Args:
        module (nn.Module): Whose batch norms ``function`` runs.
        function (Callable): Called with ``inputs``.
        *inputs (Tensor): What it is differentiated by, beside parameters.

    Returns:
        Tensor: What ``function`` returns.
    """
    return checkpoint(
        function,
        *inputs,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _statistics_kept(module)),
    )
