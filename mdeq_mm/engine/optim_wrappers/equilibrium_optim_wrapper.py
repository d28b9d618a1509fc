"""Optimiser wrapper that looks at a step before it makes it."""

from mmengine.optim import OptimWrapper

from ...registry import OPTIM_WRAPPERS
from .failure_policy import FailurePolicy


@OPTIM_WRAPPERS.register_module()
class EquilibriumOptimWrapper(FailurePolicy, OptimWrapper):
    """``OptimWrapper`` with a policy on failed solves.

    Takes what ``OptimWrapper`` takes beside the arguments of :class:`FailurePolicy`,
    and their checkpoints are the same.

    Example:
        >>> optim_wrapper = dict(
        ...     type='EquilibriumOptimWrapper',
        ...     optimizer=dict(type='SGD', lr=0.01, momentum=0.9),
        ...     clip_grad=dict(max_norm=1.0),
        ...     policy='skip')
    """
