"""The residual block of one branch of f."""

from mmcv.cnn import build_conv_layer, build_norm_layer
from torch import nn
from torch.nn.functional import relu
from torch.nn.utils.parametrizations import weight_norm as normalise

from ...implicit.pickling import let_pickle


def group_norm(groups, channels, affine=True):
    """Group norm with the settings of the official model."""
    cfg = dict(type='GN', num_groups=groups, eps=1e-5)
    norm = build_norm_layer(cfg, channels)[1]
    return norm if affine else nn.GroupNorm(groups, channels, norm.eps, affine=False)


def conv(kernel, inside, outside, stride=1, weight_norm=False):
    """Convolution without bias that keeps the size, or halves it, rounding up.

    Args:
        kernel (int): Size of the kernel, odd.
        inside (int): Channels in.
        outside (int): Channels out.
        stride (int): Stride.
        weight_norm (bool): Whether the weight is normalised (Salimans and Kingma
            2016), one norm an output channel.
    """
    layer = build_conv_layer(
        None, inside, outside, kernel, stride, padding=kernel // 2, bias=False
    )
    if weight_norm:
        normalise(layer, dim=0)
        let_pickle(layer)
        return layer
    # As in the official model: norms follow, so that the size matters to the optimiser
    # alone.
    nn.init.normal_(layer.weight, std=0.01)
    return layer


class ResidualBlock(nn.Module):
    """Residual block with injection.

        h = relu(norm1(conv1(z)))
        h = mask * conv2(h) + injection
        out = norm3(relu(norm2(h) + z))

    Args:
        channels (int): Channels of the branch.
        expansion (int): Factor of the channels between the convolutions.
        groups (int): Groups of the norms.
        weight_norm (bool): Whether the convolutions are weight-normalised.
    """

    def __init__(self, channels, expansion, groups, weight_norm=True):
        super().__init__()
        wide = channels * expansion
        self.conv1 = conv(3, channels, wide, weight_norm=weight_norm)
        self.norm1 = group_norm(groups, wide)
        self.conv2 = conv(3, wide, channels, weight_norm=weight_norm)
        self.norm2 = group_norm(groups, channels)
        self.norm3 = group_norm(groups, channels)

    def forward(self, z, injection=None, mask=None):
        """Evaluate the block.

        Args:
            z (Tensor): (N, C, H, W).
            injection (Tensor, optional): (N, C, H, W); zero where not given.
            mask (Tensor, optional): (N, C, 1, 1), dropout; none where not given.

        Returns:
            Tensor: (N, C, H, W).
        """
        h = self.conv2(relu(self.norm1(self.conv1(z))))
        if mask is not None:
            h = h * mask
        if injection is not None:
            h = h + injection
        return self.norm3(relu(self.norm2(h) + z))
