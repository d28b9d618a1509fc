"""What hooks on equilibrium layers have in common."""

from mmengine.model import is_model_wrapper
from mmengine.runner import IterBasedTrainLoop
from torch.distributed.fsdp import FullyShardedDataParallel

from ...implicit.checks import check_int
from ...implicit.layer import equilibrium_layers


def unwrapped(model):
    """The model itself, out of the wrapper of distributed training."""
    return model.module if is_model_wrapper(model) else model


def required_layers(runner, hook):
    """The equilibrium layers, without which a hook has nothing to do.

    Args:
        runner (Runner): Of the training.
        hook (Hook): That needs them.

    Raises:
        TypeError: If the model is sharded over the processes.
        ValueError: If there are none.
    """
    if any(isinstance(m, FullyShardedDataParallel) for m in runner.model.modules()):
        raise TypeError(
            f'model_wrapper_cfg.type={type(runner.model).__name__} shards the weights, '
            'of which an equilibrium layer needs all at every evaluation of f: use '
            'MMDistributedDataParallel; an MDEQ has at most 90 million parameters'
        )
    layers = equilibrium_layers(runner.model)
    if not layers:
        raise ValueError(
            f'{type(hook).__name__} is set, but the model has no equilibrium layer: '
            "remove the hook, or use a backbone of type='MDEQ'"
        )
    return layers


def check_time(field, value):
    """Refuse a time that is neither a count of 0 or more nor a share of 0 to 1.

    Args:
        field (str): Name of the field, for messages.
        value (int | float): A float is a share of the training run.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is out of range.
    """
    if not isinstance(value, float):
        check_int(field, value, 0)
    elif not 0 <= value <= 1:
        raise ValueError(
            f'{field}={value} is out of range: a float is a share of the training '
            'run, use 0.0 to 1.0, or an integer for iterations or epochs'
        )


def resolve_time(value, runner, by_epoch):
    """A time in iterations or epochs, right for any length of the training run.

    Args:
        value (int | float): As :func:`check_time` takes it.
        runner (Runner): Of the training run.
        by_epoch (bool): Whether epochs are counted.
    """
    if not isinstance(value, float):
        return value
    return round(value * (runner.max_epochs if by_epoch else runner.max_iters))


def check_epochs(runner, hook):
    """Refuse a hook that counts epochs where the training loop does not.

    Args:
        runner (Runner): Of the training.
        hook (Hook): With ``by_epoch``.

    Raises:
        ValueError: With what to set instead.
    """
    if hook.by_epoch and isinstance(runner.train_loop, IterBasedTrainLoop):
        raise ValueError(
            f'{type(hook).__name__}.by_epoch=True has no meaning under '
            'train_cfg.by_epoch=False, which counts no epochs: give iterations, '
            'with by_epoch=False'
        )
