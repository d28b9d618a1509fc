"""Pooled branches, normalised over the batch."""

import torch
from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm

from ...implicit.checks import check_int
from ...registry import MODELS
from ..checks import check_init, check_norm


@MODELS.register_module()
class MDEQPoolBranches(BaseModule):
    """Global average of every branch, concatenated and normalised over the batch.

    The norms at the end of f take out most of what an average over pixels reads: what
    is left are small differences between images, which a norm over the batch brings
    back to unit variance. It stands behind an MDEQ, or behind
    :class:`MDEQFuseScales`, in front of ``LinearClsHead``.

    Args:
        in_channels (int | Sequence[int]): Channels of each map.
        norm_cfg (dict): Norm of the pooled features, over the batch.
        init_cfg (dict | list[dict], optional): Initialisation.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is below 1, or ``norm_cfg`` makes no norm.

    Example:
        >>> import torch
        >>> from mdeq_mm.models import MDEQPoolBranches
        >>> neck = MDEQPoolBranches((8, 16))
        >>> (features,) = neck((torch.rand(4, 8, 6, 6), torch.rand(4, 16, 3, 3)))
        >>> features.shape
        torch.Size([4, 24])
    """

    def __init__(self, in_channels, norm_cfg=dict(type='BN1d'), init_cfg=None):
        check_init(init_cfg)
        super().__init__(init_cfg)
        if not isinstance(in_channels, list | tuple):
            in_channels = [in_channels]
        if not in_channels:
            raise ValueError(
                f'in_channels={in_channels!r} is empty: give one integer a map'
            )
        for channels in in_channels:
            check_int('in_channels', channels, 1)
        self.in_channels = tuple(in_channels)
        check_norm(norm_cfg, sum(in_channels))
        self.norm = build_norm_layer(norm_cfg, sum(in_channels))[1]

    def forward(self, inputs):
        """Pool the branches.

        Args:
            inputs (tuple[Tensor]): Maps (N, C_i, H_i, W_i).

        Returns:
            tuple[Tensor]: One entry, (N, sum of C_i).

        Raises:
            ValueError: If the maps are not those of ``in_channels``.
        """
        found = tuple(x.shape[1] for x in inputs)
        if found != self.in_channels:
            raise ValueError(
                f'MDEQPoolBranches got maps of {found} channels for in_channels='
                f'{self.in_channels}: set in_channels to those that the backbone '
                'returns, or its out_indices'
            )
        x = torch.cat([x.mean((2, 3)) for x in inputs], dim=1)
        norm = self.norm
        # The number of images comes last: a look at it fixes it in exported graphs.
        if norm.training and isinstance(norm, _BatchNorm) and x.shape[0] == 1:
            # The last batch of an epoch may be of one image, which has no variance.
            mean, var = norm.running_mean, norm.running_var
            return (batch_norm(x, mean, var, norm.weight, norm.bias, eps=norm.eps),)
        return (norm(x),)
