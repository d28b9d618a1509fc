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
    def has_injection(self):
        """bool: Whether a 1x1 convolution stands between stem and f."""
        return self.downsample_times > 0 or len(self.channels) > 2


#: Bai et al. 2020, with the settings of the authors' configuration files.
PRESETS = {
    'cifar-tiny': dict(
        channels=(24, 24), dropout=0.25, downsample_times=0, post_gn_affine=False
    ),
    'cifar-large': dict(
        channels=(32, 64, 128, 256),
        dropout=0.3,
        downsample_times=0,
        post_gn_affine=False,
    ),
    'small': dict(channels=(32, 64, 128, 256)),
    'large': dict(channels=(80, 160, 320, 640)),
    'xl': dict(channels=(88, 176, 352, 704), expansion=6),
}


def build_arch(arch):
    """Arch from the name of a preset or a dict of the fields of :class:`Arch`.

    Raises:
        TypeError: If ``arch`` is neither, or has unknown fields.
        ValueError: If the name is unknown, or a field is out of its range.
    """
    if isinstance(arch, str):
        if arch not in PRESETS:
            raise ValueError(
                f'arch={arch!r} is unknown: use one of {", ".join(PRESETS)}, or a '
                'dict of their fields'
            )
        return Arch(**PRESETS[arch])
    if not hasattr(arch, 'items'):
        raise TypeError(
            f'arch must be the name of a preset ({", ".join(PRESETS)}) or a dict, '
            f'got {arch!r}'
        )
    known = [f.name for f in fields(Arch)]
    unknown = sorted(map(str, set(arch) - set(known)))
    if unknown:
        raise TypeError(
            f'arch has no field {", ".join(unknown)}: its fields are {", ".join(known)}'
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
