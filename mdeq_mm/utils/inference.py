"""From a config and a checkpoint to a model, and from a file to its input."""

from copy import deepcopy

from mmengine.dataset import Compose, pseudo_collate
from mmengine.device import get_device
from mmengine.registry import init_default_scope

from ..registry import MODELS
from .checkpoint import check_state_dict, read_checkpoint, state_dict_of


def load_model(cfg, checkpoint=None, device=None):
    """Build the model of a config with the weights of a checkpoint.

    No code of the file is run, and a checkpoint that does not fill the model is an
    error.

    Args:
        cfg (Config): Of mmpretrain or mmseg.
        checkpoint (str, optional): File or URL. Default: random weights, whatever
            ``init_cfg`` says.
        device (str, optional): Default: an accelerator where there is one.

    Returns:
        nn.Module: In evaluation mode, with ``dataset_meta`` (a dict) as attribute.

    Raises:
        FileNotFoundError: If there is no such file.
        RuntimeError: If the checkpoint is of another architecture.
        ValueError: If the file is no checkpoint.
    """
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    model_cfg = deepcopy(cfg.model)
    if cfg.get('data_preprocessor') is not None:
        model_cfg.setdefault('data_preprocessor', deepcopy(cfg.data_preprocessor))
    content = {} if checkpoint is None else read_checkpoint(str(checkpoint))
    model = MODELS.build(model_cfg)
    if checkpoint is not None:
        try:
            state = state_dict_of(content)
            check_state_dict(model, state, '')
        except (RuntimeError, ValueError) as error:
            raise type(error)(f'{checkpoint}: {error}') from error
        model.load_state_dict(state, strict=False)
    model.dataset_meta = content.get('meta', {}).get('dataset_meta') or {}
    return model.to(device or get_device()).eval()


def load_image(cfg, path):
    """Run an image file through the test pipeline, without its annotations.

    Args:
        cfg (Config): Of mmpretrain or mmseg.
        path (str): The file.

    Returns:
        dict: A batch of one, for ``model.test_step``.
    """
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    dataset = cfg.test_dataloader.dataset
    while 'pipeline' not in dataset:
        dataset = dataset.dataset if 'dataset' in dataset else dataset.datasets[0]
    steps = [step for step in dataset.pipeline if not _is_annotations(step['type'])]
    return pseudo_collate([Compose(deepcopy(steps))(dict(img_path=str(path)))])


def _is_annotations(kind):
    name = kind if isinstance(kind, str) else kind.__name__
    return name.split('.')[-1] == 'LoadAnnotations'
