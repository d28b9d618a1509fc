"""The fusion of scales in the official classification head."""

import numbers
from collections import OrderedDict
from itertools import pairwise

import torch
from mmcv.cnn import ConvModule, build_norm_layer
from mmengine.model import BaseModule
from torch import nn

from ...checkpoints import check_no_more, check_state_dict, init_pretrained
from ...implicit.checks import check_flag
from ...registry import MODELS
from ..checks import check_init, check_norm
from ..layers.recompute import recompute


class _Bottleneck(nn.Module):
    """Bottleneck whose inner norms have no affine parameters."""

    def __init__(self, inside, width, expansion, norm_cfg):
        super().__init__()
        outside = width * expansion
        plain = norm_cfg | dict(affine=False)

        def layer(a, b, kernel, norm, act):
            return ConvModule(
                a,
                b,
                kernel,
                padding=kernel // 2,
                bias=False,
                norm_cfg=norm,
                act_cfg=act,
            )

        relu = dict(type='ReLU')
        self.layers = nn.Sequential(
            layer(inside, width, 1, plain, relu),
            layer(width, width, 3, plain, relu),
            layer(width, outside, 1, plain, None),
        )
        self.shortcut = (
            nn.Identity()
            if inside == outside
            else layer(inside, outside, 1, norm_cfg, None)
        )

    def forward(self, x):
        return (self.layers(x) + self.shortcut(x)).relu()


def _check_state_dict(module, state_dict, prefix, *args):
    """Refuse a neck of other widths; a checkpoint without a neck is welcome."""
    if any(key.startswith(prefix) for key in state_dict):
        check_state_dict(module, state_dict, prefix)
        check_no_more(module, state_dict, prefix)


def _biased(inside, outside, kernel, stride, norm_cfg):
    """Convolution with a bias, norm, ReLU.

    The bias has no effect in front of a batch norm, but official checkpoints have
    it; ``ConvModule`` would warn about it.
    """
    layers = OrderedDict(
        conv=nn.Conv2d(inside, outside, kernel, stride, padding=kernel // 2),
        bn=build_norm_layer(norm_cfg, outside)[1],
        act=nn.ReLU(),
    )
    return nn.Sequential(layers)


@MODELS.register_module()
class MDEQFuseScales(BaseModule):
    """From the branches of an MDEQ to one map: the official head's fusion.

    A bottleneck widens each branch; from the highest resolution down, the sum so
    far is halved by a strided convolution and added to the next branch; a 1x1
    convolution ends it. Followed by ``GlobalAveragePooling`` and
    ``LinearClsHead`` it is the official classification head.

    Args:
        in_channels (Sequence[int]): Channels of each branch.
        head_channels (Sequence[int]): Width of each bottleneck.
        out_channels (int): Channels of the output.
        expansion (int): Factor from the width of a bottleneck to its output.
        norm_cfg (dict): Norm; batch norm in the official model.
        with_cp (bool): Whether training evaluates the neck again in the backward
            pass instead of keeping its intermediate results.
        init_cfg (dict | list[dict], optional): Initialisation. Default: the
            official one, but for biases of zero: they stand in front of norms.
            With ``type='Pretrained'``, files that do not fit are an error.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the lists are of unequal length, or a number is below 1.
    """

    def __init__(
        self,
        in_channels,
        head_channels,
        out_channels,
        expansion=4,
        norm_cfg=dict(type='BN'),
        with_cp=False,
        init_cfg=[
            dict(type='Normal', layer='Conv2d', std=0.01),
            dict(type='Constant', layer='_BatchNorm', val=1, bias=0),
        ],
    ):
        check_init(init_cfg)
        super().__init__(init_cfg)
        fields = dict(in_channels=in_channels, head_channels=head_channels)
        for name, value in fields.items():
            if not isinstance(value, list | tuple):
                raise TypeError(
                    f'{name} must be a list, one integer a branch, got {value!r}'
                )
        if len(in_channels) != len(head_channels):
            raise ValueError(
                f'in_channels={list(in_channels)} and head_channels='
                f'{list(head_channels)} are of unequal length: give one of each for '
                'every branch'
            )
        if not in_channels:
            raise ValueError('in_channels=[] is empty: give one integer a branch')
        fields |= dict(out_channels=[out_channels], expansion=[expansion])
        for name, values in fields.items():
            for value in values:
                integer = isinstance(value, numbers.Integral) and value is not True
                if not integer or value < 1:
                    raise ValueError(
                        f'{name} holds {value!r}: use integers of 1 or more'
                    )
        check_flag('with_cp', with_cp)
        for channels in (*head_channels, out_channels):
            check_norm(norm_cfg, channels)
        self.with_cp = with_cp
        widths = [h * expansion for h in head_channels]
        self.bottlenecks = nn.ModuleList(
            _Bottleneck(c, h, expansion, norm_cfg)
            for c, h in zip(in_channels, head_channels, strict=True)
        )
        self.downsamples = nn.ModuleList(
            _biased(a, b, 3, 2, norm_cfg) for a, b in pairwise(widths)
        )
        self.final = _biased(widths[-1], out_channels, 1, 1, norm_cfg)
        self.register_load_state_dict_pre_hook(_check_state_dict)

    def init_weights(self):
        """Initialise, or load the checkpoint that ``init_cfg`` names."""
        if not init_pretrained(self):
            super().init_weights()

    def forward(self, inputs):
        """Fuse the branches.

        Args:
            inputs (tuple[Tensor]): (N, C_i, H_i, W_i), each side half of the one
                before, rounded up.

        Returns:
            tuple[Tensor]: One map, (N, out_channels, H, W) at the lowest
            resolution.

        Raises:
            ValueError: If the number of maps is not that of ``in_channels``.
        """
        if len(inputs) != len(self.bottlenecks):
            raise ValueError(
                f'MDEQFuseScales got {len(inputs)} maps for {len(self.bottlenecks)} '
                'in_channels: give in_channels and head_channels an entry for each '
                'branch that the backbone returns, or set its out_indices to as many'
            )
        if self.with_cp and self.training and torch.is_grad_enabled():
            return (recompute(self, self._fuse, *inputs),)
        return (self._fuse(*inputs),)

    def _fuse(self, *inputs):
        total = self.bottlenecks[0](inputs[0])
        for x, bottleneck, downsample in zip(
            inputs[1:], self.bottlenecks[1:], self.downsamples, strict=True
        ):
            total = bottleneck(x) + downsample(total)
        return self.final(total)
