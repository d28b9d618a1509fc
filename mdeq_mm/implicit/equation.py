"""f with everything fixed, as solvers and gradients are given it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Equation:
    """The map f(., x) of one solve, pure in the state and in its tensors.

    The autocast mode of the moment of construction belongs to what is fixed:
    backward passes, which run outside of the user's autocast context, evaluate
    the same function as the forward pass.

    Args:
        function (Callable): ``function(z, tensors) -> f(z)``, both (N, D).
        tensors (Sequence[Tensor]): All that f is differentiated by: weights,
            affine parameters, injection; also constants such as masks.
        per_sample (Sequence[bool], optional): For each tensor, whether its first
            dimension is the batch. Default: none of them.
        recompute (bool): Whether gradients evaluate f again in the backward pass
            instead of keeping its intermediate results.
    """

    def __init__(
        self,
        function: Callable[[Tensor, Sequence[Tensor]], Tensor],
        tensors: Sequence[Tensor] = (),
        per_sample: Sequence[bool] | None = None,
        recompute: bool = False,
    ):
        self.function = function
        self.tensors = tuple(tensors)
        self.per_sample = tuple(per_sample or [False] * len(self.tensors))
        if len(self.per_sample) != len(self.tensors):
            raise ValueError(
                f'per_sample has {len(self.per_sample)} entries for '
                f'{len(self.tensors)} tensors: give one for each'
            )
        self.recompute = recompute
        device = self.tensors[0].device.type if self.tensors else 'cpu'
        self._autocast = dict(
            device_type=device,
            enabled=torch.is_autocast_enabled(device),
            dtype=torch.get_autocast_dtype(device),
            # The cache would hand weights cast inside a solve, where gradients
            # are off, to the evaluation that needs them with gradients.
            cache_enabled=False,
        )

    def __call__(self, z: Tensor, tensors: Sequence[Tensor] | None = None):
        """Evaluate f.

        Args:
            z (Tensor): (N, D).
            tensors (Sequence[Tensor], optional): In place of ``self.tensors``.

        Returns:
            Tensor: (N, D), of z's type whatever f computes in.
        """
        with torch.autocast(**self._autocast):
            fz = self.function(z, self.tensors if tensors is None else tensors)
        return fz.to(z.dtype)

    def bind(self, tensors: Sequence[Tensor]):
        """The same equation with other tensors, in the same order."""
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.tensors = tuple(tensors)
        return new

    @property
    def half(self):
        """bool: Whether f runs in float16, whose range a scaled loss may leave."""
        cast = self._autocast['enabled'] and self._autocast['dtype'] == torch.float16
        return cast or any(t.dtype == torch.float16 for t in self.tensors)

    @property
    def precision(self):
        """torch.dtype | None: Coarsest type of f's numbers; None without tensors."""
        types = {t.dtype for t in self.tensors if t.is_floating_point()}
        if self._autocast['enabled'] and torch.float32 in types:
            # Double precision is left as it is.
            types.add(self._autocast['dtype'])
        return max(types, key=lambda kind: torch.finfo(kind).eps, default=None)

    def map_samples(self, change):
        """The same equation with ``change`` applied to each per-sample tensor.

        Args:
            change (Callable): From a tensor (N, ...) to the one in its place.
        """
        pairs = zip(self.tensors, self.per_sample, strict=True)
        return self.bind([change(t) if mine else t for t, mine in pairs])

    def take(self, index: Tensor):
        """The same equation for some of the samples.

        Args:
            index (Tensor): Indices of the samples, or a mask over them.
        """
        return self.map_samples(lambda t: t[index])

    def finite(self):
        """Which samples have finite inputs.

        Returns:
            Tensor | None: (N,) bool, or None where no tensor is per sample.
        """
        mine = [t for t, m in zip(self.tensors, self.per_sample, strict=True) if m]
        if not mine:
            return None
        finite = [t.detach().isfinite()[:, None].flatten(1).all(1) for t in mine]
        return torch.stack(finite).all(0)

    def healthy(self, mask: Tensor):
        """Those of the samples in a mask (N,) that have finite inputs too, (N,)."""
        finite = self.finite()
        return mask if finite is None else mask & finite

    def contained(self, healthy: Tensor):
        """The same equation with the inputs of unhealthy samples set to zero.

        The gradient of shared weights sums over the batch. A sample with a zero
        adjoint still contributes 0 * NaN to it if its inputs are not finite, so
        they have to go before f is evaluated.

        Args:
            healthy (Tensor): (N,) bool, the samples that stay as they are.
        """

        def blank(t):
            mask = healthy.view(-1, *[1] * (t.dim() - 1))
            return torch.where(mask, t, torch.zeros_like(t))

        return self.map_samples(blank)
