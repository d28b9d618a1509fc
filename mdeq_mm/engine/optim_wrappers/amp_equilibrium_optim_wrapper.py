"""The same in mixed precision."""

import torch

from ...registry import OPTIM_WRAPPERS
from .failure_policy import FailurePolicy
from .mixed_precision import MixedPrecision


@OPTIM_WRAPPERS.register_module()
class AmpEquilibriumOptimWrapper(FailurePolicy, MixedPrecision):
    """``AmpOptimWrapper`` with a policy on failed solves.

    Takes what ``AmpOptimWrapper`` takes beside the arguments of
    :class:`FailurePolicy`, and their checkpoints are the same. On a CPU, which
    ``AmpOptimWrapper`` refuses, it computes in bfloat16.

    Gradients that overflow under a loss scale are the scaler's business: it leaves
    the step out and lowers the scale, and neither is a failure. At a scale of 1 or
    less nothing is left to lower, so that there they are. A step that is dropped
    does not change the scale.
    """

    def _loss_scale(self, device):
        # As a tensor: get_scale() would wait for the device.
        return self.loss_scaler.scale(torch.ones((), device=device))
