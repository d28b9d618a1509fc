"""From a name to a config, and to a model."""

from importlib.util import find_spec
from pathlib import Path

from mmengine.config import Config, ConfigDict

from ..registry import DATASETS
from ..tasks import PACKAGES, SCOPES
from .index import SCHEME, config_path, find_entry, list_models, weights_path
from .inference import load_model


def get_config(name, **options):
    """The config of a model.

    Args:
        name (str): Name of a model (:func:`list_models`), stem of its config file,
            or path of a config relative to the shipped ones, such as
            ``'imagenet/mdeq-small_4xb32-100e_in1k.py'``.
        **options: Merged into the config, as ``--cfg-options`` of the tools are:
            nested dicts, or dotted names in ``**{'model.backbone.with_cp': True}``.

    Returns:
        Config: Of mmengine.

    Raises:
        ValueError: If there is no such model.

    Example:
        >>> import mdeq_mm
        >>> cfg = mdeq_mm.get_config('mdeq-digits', train_cfg=dict(max_epochs=5))
        >>> cfg.model.backbone.arch.channels, cfg.train_cfg.max_epochs
        ((24, 24, 24), 5)
    """
    cfg = Config.fromfile(config_path(name))
    if options:
        cfg.merge_from_dict(options)
    return cfg


def get_model(name, pretrained=False, device=None, **kwargs):
    """A model, with random weights or trained ones.

    Args:
        name (str): As for :func:`get_config`.
        pretrained (bool | str): Whether to load the published weights, or a
            checkpoint: a file or URL. Default: random weights, as the layers come;
            ``model.init_weights()`` makes them what training starts from.
        device (str, optional): Default: an accelerator where there is one.
        **kwargs: Merged into ``model`` of the config, such as
            ``backbone=dict(with_cp=True)``.

    Returns:
        nn.Module: In evaluation mode. ``dataset_meta`` names the classes where
        checkpoint or data set do; ``cfg`` is the config. The inferencers of
        mmpretrain and mmseg's ``inference_model`` take it as it is.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ImportError: If the toolbox that the model belongs to is not installed.
        RuntimeError: If the checkpoint is of another architecture.
        ValueError: If there is no such model, no published weights of it, or the
            file is no checkpoint.

    Example:
        >>> import mdeq_mm
        >>> model = mdeq_mm.get_model('mdeq-small_4xb32-100e_in1k', device='cpu')
        >>> sum(p.numel() for p in model.parameters())
        16828264
    """
    checkpoint = _checkpoint(name, pretrained)
    cfg = get_config(name, **(dict(model=kwargs) if kwargs else {}))
    if 'model' not in cfg:
        raise ValueError(f'{cfg.filename} has no model: name a whole config')
    scope = cfg.get('default_scope')
    if scope in PACKAGES and find_spec(scope) is None:
        raise ImportError(
            f'{str(name)!r} is a model of {scope}, which is not installed: run "pip '
            f'install {PACKAGES[scope].split(" ")[0]}" (docs/installation.md has the '
            'sets of packages and their versions)'
        )
    model = load_model(cfg, checkpoint, device)
    model.dataset_meta = dataset_meta(cfg) | model.dataset_meta
    model.cfg = cfg
    # Under these names mmpretrain's inferencers look for them.
    model._config, model._dataset_meta = cfg, model.dataset_meta
    return model


def _checkpoint(name, pretrained):
    """The file or URL that ``pretrained`` means, or None."""
    if pretrained is None or pretrained is False:
        return None
    if pretrained is True:
        entry = find_entry(name)
        if entry.weights is None:
            some = list_models(pretrained=True)
            others = (
                f'there are some of {", ".join(some)}' if some else 'nor any others'
            )
            raise ValueError(
                f'no weights of {entry.name!r} are published, {others}: train it with '
                f'"python tools/train.py {entry.config}" and give the checkpoint, '
                "pretrained='work_dirs/...', or take pretrained=False"
            )
        pretrained = entry.weights
    if not isinstance(pretrained, str | Path):
        raise TypeError(
            f'pretrained={pretrained!r} must be True, False, or a path or URL of a '
            'checkpoint'
        )
    path = str(pretrained)
    return weights_path(path) if path.startswith(SCHEME) else path


def dataset_meta(cfg):
    """What the test set of a config says of its classes, without opening it.

    Args:
        cfg (Config): Of mmpretrain or mmseg.

    Returns:
        dict: Such as ``classes`` and ``palette``; empty where folders name the
        classes. Of a joint model that of the segmentation, with each task's under
        ``tasks``.
    """
    dataset = (cfg.get('test_dataloader') or {}).get('dataset')
    while dataset and 'dataset' in dataset:
        dataset = dataset.dataset
    if not dataset:
        return {}
    parts = dataset.get('datasets')
    if isinstance(parts, dict):
        # As of MultiTaskDataset.
        tasks = {task: _meta_of(part, SCOPES[task]) for task, part in parts.items()}
        return dict(tasks.get('seg') or {}, tasks=tasks)
    return _meta_of(dataset, cfg.get('default_scope'))


def _meta_of(dataset, scope):
    kind = dataset.get('type')
    if isinstance(kind, str):
        with DATASETS.switch_scope_and_registry(dataset.get('_scope_', scope)) as home:
            kind = home.get(kind)
    meta = dict(getattr(kind, 'METAINFO', {}))
    own = dataset.get('metainfo') or {}
    # Plain types, since models are copied and checkpoints written.
    return meta | (own.to_dict() if isinstance(own, ConfigDict) else dict(own))
