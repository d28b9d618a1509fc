"""Several feature maps as one flat state."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .transforms import transforming


@dataclass(frozen=True)
class StateSpec:
    """Shapes of the maps that one flat state (N, D) consists of.

    Attributes:
        shapes (tuple[tuple[int, ...], ...]): Shape of each map without its batch
            dimension, in the order in which they lie in the state.
        channels_last (bool): Whether maps (N, C, H, W) lie in it with their channels
            last, as :data:`torch.channels_last` has them.
    """

    shapes: tuple[tuple[int, ...], ...]
    channels_last: bool = False

    @classmethod
    def of(cls, maps: Sequence[Tensor], channels_last=False):
        """The spec of given maps, each (N, ...)."""
        return cls(tuple(tuple(m.shape[1:]) for m in maps), channels_last)

    @property
    def sizes(self):
        """tuple[int, ...]: Number of entries of each map, for one sample."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def dim(self):
        """int: D, the length of one sample's state."""
        return sum(self.sizes)

    def zeros(self, batch, **options):
        """A state of zeros, (batch, D)."""
        return torch.zeros(batch, self.dim, **options)

    def pack(self, maps: Sequence[Tensor], dtype=None):
        """Copy maps into one new flat state.

        Args:
            maps (Sequence[Tensor]): Maps ``(N, *shape)``, in the order of ``shapes``.
            dtype (torch.dtype, optional): Type of the state; that of the maps
                where not given.

        Returns:
            Tensor: (N, D).

        Raises:
            ValueError: If the maps have other shapes than the spec.
        """
        found = tuple(tuple(m.shape[1:]) for m in maps)
        if found != self.shapes:
            raise ValueError(
                f'maps of shapes {found} do not fit the state, which has '
                f'{self.shapes}: f must return maps of the shapes it is given'
            )
        if self.channels_last:
            maps = [m.movedim(1, -1) if m.dim() == 4 else m for m in maps]
        flat = torch.cat([m.flatten(1) for m in maps], dim=1)
        return flat if dtype is None else flat.to(dtype)

    def unpack(self, flat: Tensor):
        """Views of a flat state as maps.

        Args:
            flat (Tensor): (N, D).

        Returns:
            list[Tensor]: Maps ``(N, *shape)`` that share the memory of ``flat``.
        """
        parts = zip(flat.split(self.sizes, dim=1), self.shapes, strict=True)
        if not self.channels_last:
            return [part.unflatten(1, shape) for part, shape in parts]
        return [
            part.unflatten(1, (*shape[1:], shape[0])).movedim(-1, 1)
            if len(shape) == 3
            else part.unflatten(1, shape)
            for part, shape in parts
        ]


def has_channels_last(t: Tensor):
    """Whether a tensor (N, C, H, W) lies in memory with its channels last."""
    if t.dim() != 4 or transforming() or t.is_contiguous():
        return False
    return t.is_contiguous(memory_format=torch.channels_last)
