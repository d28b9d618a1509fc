"""Mixed precision on any device."""

import torch
from mmengine.device import get_device
from mmengine.optim import AmpOptimWrapper, OptimWrapper

_DTYPES = ('float16', 'bfloat16')


class MixedPrecision(AmpOptimWrapper):
    """``AmpOptimWrapper`` that takes a CPU too, where it computes in bfloat16.

    Args:
        loss_scale (float | str | dict): ``'dynamic'``, a fixed scale, or the
            arguments of ``torch.amp.GradScaler``.
        dtype (str | torch.dtype, optional): ``'float16'`` or ``'bfloat16'``. Default:
            float16 on a GPU, bfloat16 on a CPU, which has no other.
        use_fsdp (bool): Not supported.
        **kwargs: Of ``OptimWrapper``.

    Raises:
        TypeError: If ``loss_scale`` has the wrong type.
        ValueError: If ``dtype`` is not available, or ``use_fsdp`` is set.
    """

    def __init__(self, loss_scale='dynamic', dtype=None, use_fsdp=False, **kwargs):
        field = 'optim_wrapper'
        name = str(dtype).removeprefix('torch.')
        if dtype is not None and name not in _DTYPES:
            raise ValueError(
                f'{field}.dtype={dtype!r} is no reduced precision: use one of '
                f'{list(_DTYPES)}, or leave it out'
            )
        if use_fsdp:
            raise ValueError(
                f'{field}.use_fsdp={use_fsdp!r}: sharded models are not supported; an '
                'MDEQ has at most 90 million parameters, use '
                'MMDistributedDataParallel'
            )
        if isinstance(loss_scale, int) and not isinstance(loss_scale, bool):
            loss_scale = float(loss_scale)
        if loss_scale != 'dynamic' and not isinstance(loss_scale, float | dict):
            raise TypeError(
                f"{field}.loss_scale must be 'dynamic', a number, or a dict of "
                f'arguments of torch.amp.GradScaler, got {loss_scale!r}'
            )
        if get_device() != 'cpu':
            super().__init__(loss_scale=loss_scale, dtype=dtype, **kwargs)
            return
        if name == 'float16':
            raise ValueError(
                f'{field}.dtype={dtype!r} needs a GPU: on a CPU use '
                "'bfloat16', or leave it out"
            )
        # The constructor of the parent insists on an accelerator; its methods work
        # without.
        OptimWrapper.__init__(self, **kwargs)
        self.cast_dtype = torch.bfloat16
        options = dict(loss_scale) if isinstance(loss_scale, dict) else {}
        self._scale_update_param = None
        if isinstance(loss_scale, float):
            options['init_scale'] = self._scale_update_param = loss_scale
        self.loss_scaler = torch.amp.GradScaler('cpu', **options)
