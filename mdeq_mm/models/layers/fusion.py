"""Fusion of branches across resolutions."""

from torch import nn
from torch.nn.functional import interpolate

from .residual import conv, group_norm


class _Up(nn.Module):
    """From a lower resolution: 1x1 convolution, norm, nearest upsampling."""

    def __init__(self, inside, outside, groups):
        super().__init__()
        self.conv = conv(1, inside, outside)
        self.norm = group_norm(groups, outside)

    def forward(self, x, size):
        return interpolate(self.norm(self.conv(x)), size=size, mode='nearest')


class _Down(nn.Sequential):
    """From a higher resolution: strided convolutions, all but the last with ReLU."""

    def __init__(self, inside, outside, halvings, groups):
        layers = []
        for count in range(1, halvings + 1):
            last = count == halvings
            to = outside if last else inside
            layers += [conv(3, inside, to, stride=2), group_norm(groups, to)]
            if not last:
                layers.append(nn.ReLU())
        super().__init__(*layers)

    def forward(self, x, size):
        return super().forward(x)


class MultiscaleFusion(nn.Module):
    """Every branch gets the sum of all branches, brought to its resolution.

    Args:
        channels (Sequence[int]): Channels of each branch, highest resolution
            first; each branch has half the resolution of the one before.
        groups (int): Groups of the norms.
    """

    def __init__(self, channels, groups):
        super().__init__()
        self.paths = nn.ModuleList()
        for i, to in enumerate(channels):
            row = nn.ModuleDict()
            for j, source in enumerate(channels):
                if j > i:
                    row[str(j)] = _Up(source, to, groups)
                elif j < i:
                    row[str(j)] = _Down(source, to, i - j, groups)
            self.paths.append(row)

    def forward(self, maps):
        """Fuse.

        Args:
            maps (list[Tensor]): (N, C_i, H_i, W_i).

        Returns:
            list[Tensor]: Of the same shapes.
        """
        fused = []
        for i, row in enumerate(self.paths):
            size = maps[i].shape[2:]
            total = maps[i]
            for j, path in row.items():
                total = total + path(maps[int(j)], size)
            fused.append(total)
        return fused
