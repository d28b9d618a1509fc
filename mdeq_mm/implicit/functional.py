"""A module's forward pass as a pure function of its tensors."""

import torch
from torch import Tensor, nn

from .views import attributes_of, hand_back, view_of

#: Norms over the batch, and random layers.
_NORMS = nn.modules.batchnorm._BatchNorm
_RANDOM = (nn.modules.dropout._DropoutNd, nn.RReLU)


def check_pure(module):
    """Refuse a module that is not one fixed function of each sample.

    Args:
        module (nn.Module): f.

    Raises:
        ValueError: If a submodule keeps running statistics, normalises over the
            batch or draws random numbers. In evaluation mode, random layers and
            norms with statistics are fixed.
    """
    for name, part in module.named_modules():
        tracked = getattr(part, 'running_mean', None) is not None
        changes = part.training and (tracked or isinstance(part, _RANDOM))
        if changes or (isinstance(part, _NORMS) and not tracked):
            raise ValueError(
                f'f contains {name or "itself"}={type(part).__name__}, which '
                'changes from call to call or mixes samples, but f must be one '
                'fixed function of each sample during a solve: use group norm, '
                'and draw dropout masks outside'
            )


class FunctionalModule:
    """A module as it is now, apart from the tensors that it computes with.

    During a solve f must be one fixed function. Parametrised tensors, such as
    normalised weights, are therefore evaluated once, here, with gradients as usual,
    and the results are handed to every evaluation. (``parametrize.cached()`` would
    not do: first read inside a solve, where gradients are off, it yields weights
    without gradient.)

    Evaluations run on a view of the module (see :func:`view_of`), so that several
    threads may use one module, each with a ``FunctionalModule`` of its own.

    Args:
        module (nn.Module): The module. It must be free of state that changes
            from call to call, because a solve calls it many times.

    Attributes:
        names (tuple[str, ...]): Of the tensors, in the module.
        tensors (tuple[Tensor, ...]): All that the forward pass reads,
            differentiable with respect to the module's parameters.

    Raises:
        ValueError: See :func:`check_pure`.
    """

    def __init__(self, module):
        check_pure(module)
        self._view, views = view_of(module)
        self._slots, names, found = [], [], {}
        for prefix, part in self._view.named_modules():
            # Plain attributes too: pruned weights, and parameters of replicas.
            for where in (part._parameters, part._buffers, vars(part)):
                for name, tensor in where.items():
                    if not isinstance(tensor, Tensor):
                        continue
                    if id(tensor) not in found:
                        found[id(tensor)] = len(found), tensor
                        names.append(f'{prefix}.{name}' if prefix else name)
                    self._slots.append((part, where, name, found[id(tensor)][0]))
        self.names = tuple(names)
        self.tensors = tuple(tensor for _, tensor in found.values())
        # Who evaluates keeps the tensors.
        for _, where, name, _ in self._slots:
            where[name] = None
        self._before, self._written = attributes_of(views), []

    def __call__(self, tensors, *args):
        """Run the forward pass with given tensors in place of the module's own."""
        for _, where, name, index in self._slots:
            where[name] = tensors[index]
        try:
            return self._view(*args)
        finally:
            self._written = []
            for part, where, name, index in self._slots:
                if where is vars(part) and where[name] is not tensors[index]:
                    self._written.append((where, name, where[name]))
                where[name] = None

    def hand_back(self):
        """Set in the module what the last forward pass has set on its parts."""
        for where, name, value in self._written:
            where[name] = value
        hand_back(self._before)


@torch.no_grad()
def frozen(module):
    """A module with its parametrised tensors as plain ones, none of them trainable.

    Args:
        module (nn.Module): Stays as it is.

    Returns:
        nn.Module: A view of it that computes the same.
    """
    function = FunctionalModule(module)
    for part, where, name, index in function._slots:
        tensor = function.tensors[index].detach()
        if where is part._parameters:
            tensor = nn.Parameter(tensor, requires_grad=False)
        elif where is vars(part):
            del where[name]
            where = part._buffers
        where[name] = tensor
    return function._view
