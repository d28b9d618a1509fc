"""A module's forward pass as a pure function of its tensors."""

import copy

import torch
from torch import nn
from torch.nn.utils import parametrize

#: Norms over the batch, with or without running statistics, and random layers.
_IMPURE = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, nn.RReLU)


class FunctionalModule:
    """Separates what a module computes from the tensors it computes with.

    During a solve f must be one fixed function. Parametrised tensors, such as
    normalised weights, are therefore evaluated once, by :meth:`tensors`, with
    gradients as usual, and the results are handed to every evaluation of
    :meth:`__call__`. (``parametrize.cached()`` would not do: first read inside a
    solve, where gradients are off, it yields weights without gradient.)

    The forward pass runs on a skeleton of the module: a copy without
    parametrisations, on the meta device, so that it holds no memory.

    Args:
        module (nn.Module): The module. It must be free of state that changes
            from call to call, because a solve calls it many times.

    Raises:
        ValueError: If a submodule keeps running statistics, normalises over the
            batch or draws random numbers.
    """

    def __init__(self, module):
        for name, part in module.named_modules():
            if (
                isinstance(part, _IMPURE)
                or getattr(part, 'running_mean', None) is not None
            ):
                raise ValueError(
                    f'f contains {name or "itself"}={type(part).__name__}, which '
                    'changes from call to call or mixes samples, but f must be one '
                    'fixed function of each sample during a solve: use group norm, '
                    'and draw dropout masks outside'
                )
        skeleton = copy.deepcopy(module)
        for part in list(skeleton.modules()):
            if parametrize.is_parametrized(part):
                _plain(part)
        self._skeleton = skeleton.to('meta')
        self.names = tuple(
            name
            for group in (skeleton.named_parameters(), skeleton.named_buffers())
            for name, _ in group
        )

    def tensors(self, module):
        """Evaluate everything that the forward pass of ``module`` reads.

        Args:
            module (nn.Module): The module this was made from, or a copy of it.

        Returns:
            tuple[Tensor, ...]: In the order of ``names``, differentiable with
            respect to the module's parameters.
        """
        found = []
        for name in self.names:
            path, _, leaf = name.rpartition('.')
            found.append(getattr(module.get_submodule(path), leaf))
        return tuple(found)

    def __call__(self, tensors, *args):
        """Run the forward pass with given tensors in place of the module's own."""
        named = dict(zip(self.names, tensors, strict=True))
        return torch.func.functional_call(self._skeleton, named, args)


def _plain(part):
    """Replace parametrisations by parameters that hold their results.

    ``remove_parametrizations`` would change the class of the part, which a copy
    shares with its original.
    """
    values = {name: getattr(part, name).detach() for name in part.parametrizations}
    part.__class__ = parametrize.type_before_parametrizations(part)
    del part.parametrizations
    for name, value in values.items():
        part.register_parameter(name, nn.Parameter(value))
