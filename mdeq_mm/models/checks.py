"""Checks of arguments that several models take."""

from mmcv.cnn import build_norm_layer


def check_norm(norm_cfg, channels, field='norm_cfg'):
    """Refuse a config from which no norm of so many channels can be built."""
    if not hasattr(norm_cfg, 'items') or 'type' not in norm_cfg:
        raise TypeError(
            f"{field} must be a dict with a type, such as dict(type='BN'), got "
            f'{norm_cfg!r}'
        )
    try:
        build_norm_layer(norm_cfg, channels)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f'{field}={norm_cfg!r} makes no norm of {channels} channels: '
            f'{" ".join(str(error).split()) or "an argument is missing"}'
        ) from error


def check_init(init_cfg):
    """Refuse an initialisation that is neither None, a dict nor a list of dicts."""
    if init_cfg is None:
        return
    for cfg in init_cfg if isinstance(init_cfg, list | tuple) else [init_cfg]:
        if not hasattr(cfg, 'items') or 'type' not in cfg:
            raise TypeError(
                'init_cfg must be a dict with a type, or a list of such dicts, got '
                f'{init_cfg!r}'
            )
