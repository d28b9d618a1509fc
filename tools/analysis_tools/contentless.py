"""Models on tensors without content, whose costs are counted without computing."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


class _AllIsWell(TorchDispatchMode):
    """Answers what code asks of numbers that are not there: they are 1, or true.

    So every sample is finite, and none converges before the limit.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return True
        return func(*args, **(kwargs or {}))


def without_content():
    """Context in which tensors have shapes alone; parameters stay as they are."""
    return FakeTensorMode(allow_non_fake_inputs=True), _AllIsWell()
