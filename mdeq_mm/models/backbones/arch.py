"""Settings of f, stem and injection: the five official sizes and custom ones."""

from dataclasses import dataclass, fields

from ...implicit.checks import check_flag, check_int, is_number


@dataclass(frozen=True)
class Arch:
    """Architecture of an MDEQ backbone.

    Attributes:
        channels (tuple[int, ...]): Channels of each branch, highest resolution
            first; at least two branches.
        num_blocks (tuple[int, ...], optional): Residual blocks of each branch.
            Default: one each.
        num_groups (int): Groups of the group norms; even, because the norms after
            the fusion have half as many.
        expansion (int): Factor of the channels inside the residual blocks.
        dropout (float): Rate of the variational dropout, in [0, 1).
        injection (str): Branches that the image enters: ``'all'``, or ``'first'``
            as in the official model, where the others start from zeros alone, which
            their norms are singular at.
        downsample_times (int): How many times the stem halves the resolution.
        post_gn_affine (bool): Whether the norms after the fusion are affine.
        weight_norm (bool): Whether convolutions of f are weight-normalised.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If a field is out of its range, or fields do not fit together.
    """

    channels: tuple
    num_blocks: tuple | None = None
    num_groups: int = 8
    expansion: int = 5
    dropout: float = 0.0
    injection: str = 'all'
    downsample_times: int = 2
    post_gn_affine: bool = True
    weight_norm: bool = True

    def __post_init__(self):
        blocks = self.num_blocks
        if isinstance(self.channels, list | tuple) and blocks is None:
            blocks = [1] * len(self.channels)
        for name, value in (('channels', self.channels), ('num_blocks', blocks)):
            object.__setattr__(self, name, _integers(f'arch.{name}', value))
        check_int('arch.num_groups', self.num_groups, 2)
        check_int('arch.expansion', self.expansion, 1)
        check_int('arch.downsample_times', self.downsample_times, 0)
        for name in ('post_gn_affine', 'weight_norm'):
            check_flag(f'arch.{name}', getattr(self, name))
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(
                f'arch.dropout={self.dropout!r} is out of range: use 0 <= dropout < 1'
            )
        if self.injection not in ('all', 'first'):
            raise ValueError(
                f"arch.injection={self.injection!r} is unknown: use 'all' (the image "
                "enters every branch) or 'first' (the official model)"
            )
        if len(self.channels) < 2:
            raise ValueError(
                f'arch.channels={list(self.channels)} has {len(self.channels)} branch: '
                'give at least two, one for each resolution'
            )
        if len(self.num_blocks) != len(self.channels):
            raise ValueError(
                f'arch.num_blocks={list(self.num_blocks)} has {len(self.num_blocks)} '
                f'entries for the {len(self.channels)} branches of '
                f'arch.channels={list(self.channels)}: give one for each branch'
            )
        if self.num_groups % 2:
            raise ValueError(
                f'arch.num_groups={self.num_groups} must be even, because the norms '
                'after the fusion have half as many groups'
            )
        for c in self.channels:
            if c % self.num_groups:
                raise ValueError(
                    f'arch.channels={list(self.channels)} holds {c}, which is not '
                    f'divisible by arch.num_groups={self.num_groups}: use multiples '
                    'of it, or other groups'
                )

    @property
    def min_size(self):
        """int: Smallest side of an image, in pixels."""
        return 2 ** (self.downsample_times + len(self.channels) - 1)

    @property
    def injected(self):
        """int: Number of branches that the image enters."""
        return len(self.channels) if self.injection == 'all' else 1

    @property
    def has_injection(self):
        """bool: Whether 1x1 convolutions stand between stem and f."""
        official = self.downsample_times > 0 or len(self.channels) > 2
        return self.injection == 'all' or official


#: The sizes of Bai et al. 2020. The official models are these with
#: ``injection='first'``, and on CIFAR-10 with dropout.
PRESETS = {
    'cifar-tiny': dict(channels=(24, 24), downsample_times=0, post_gn_affine=False),
    'cifar-large': dict(
        channels=(32, 64, 128, 256), downsample_times=0, post_gn_affine=False
    ),
    'small': dict(channels=(32, 64, 128, 256)),
    'large': dict(channels=(80, 160, 320, 640)),
    'xl': dict(channels=(88, 176, 352, 704), expansion=6),
}


def build_arch(arch):
    """Arch from the name of a preset or a dict of the fields of :class:`Arch`.

    Args:
        arch (str | dict | Arch): A dict may name the ``preset`` that it changes.

    Raises:
        TypeError: If ``arch`` is neither, or has unknown fields.
        ValueError: If the name is unknown, or a field is out of its range.
    """
    if isinstance(arch, Arch):
        return arch
    if isinstance(arch, str):
        arch = dict(preset=arch)
    if not hasattr(arch, 'items'):
        raise TypeError(
            f'arch must be the name of a preset ({", ".join(PRESETS)}) or a dict, '
            f'got {arch!r}'
        )
    arch = dict(arch)
    preset = arch.pop('preset', None)
    if preset is not None:
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ValueError(
                f'arch={preset!r} is unknown: use one of {", ".join(PRESETS)}, or a '
                'dict of their fields'
            )
        arch = PRESETS[preset] | arch
    known = [f.name for f in fields(Arch)]
    unknown = sorted(map(str, set(arch) - set(known)))
    if unknown:
        raise TypeError(
            f'arch has no field {", ".join(unknown)}: its fields are '
            f'{", ".join(known)}, and preset, the size that it changes'
        )
    if 'channels' not in arch:
        raise TypeError("arch lacks 'channels', the channels of each branch")
    return Arch(**arch)


def _integers(field, values):
    if not isinstance(values, list | tuple):
        raise TypeError(
            f'{field} must be a list of integers, one a branch, got {values!r}'
        )
    for i, value in enumerate(values):
        check_int(f'{field}[{i}]', value, 1)
    return tuple(int(v) for v in values)
