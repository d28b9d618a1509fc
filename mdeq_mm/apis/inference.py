"""From a config and a checkpoint to a model, and from images to its input."""

from copy import deepcopy

import mmcv
import numpy as np
from mmengine.dataset import Compose, pseudo_collate
from mmengine.device import get_device
from mmengine.registry import init_default_scope

from ..checkpoints import check_state_dict, read_checkpoint, state_dict_of
from ..registry import MODELS, name_of
from ..tasks import in_scope


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
    return load_images(cfg, [path])


def load_images(cfg, images):
    """Run images through the test pipeline, without annotations.

    Args:
        cfg (Config): Of mmpretrain or mmseg.
        images (Sequence[str | np.ndarray]): Files, or images as OpenCV has them:
            uint8, (H, W, 3) in the order blue, green, red, or (H, W). They get the
            channels that ``color_type`` of the pipeline asks for.

    Returns:
        dict: A batch, for ``model.test_step``.
    """
    dataset = first_test_dataset(cfg)
    scope = dataset.get('_scope_') or cfg.get('default_scope', 'mmengine')
    init_default_scope(scope)
    steps = [s for s in dataset['pipeline'] if name_of(s['type']) != 'LoadAnnotations']
    readers = [s for s in steps if name_of(s['type']) == 'LoadImageFromFile']
    from_file = Compose(deepcopy(steps))
    from_array = Compose(deepcopy([s for s in steps if s not in readers]))
    return pseudo_collate(
        [
            from_array(_as_read(image, readers))
            if isinstance(image, np.ndarray)
            else from_file(dict(img_path=str(image)))
            for image in images
        ]
    )


def first_test_dataset(cfg):
    """Config of the innermost test data set, the first one where there are several.

    Args:
        cfg (Config): Of mmpretrain or mmseg, or of several tasks.

    Returns:
        ConfigDict | None: With its ``_scope_`` where it belongs to a task; None where
        there is no data set with a pipeline.
    """
    dataset = (cfg.get('test_dataloader') or {}).get('dataset')
    while dataset and 'pipeline' not in dataset:
        parts = dataset.get('datasets')
        if isinstance(parts, dict):
            task, part = next(iter(parts.items()))
            dataset = in_scope(part, task)
        else:
            dataset = dataset.get('dataset') or (parts[0] if parts else None)
    return dataset


def _as_read(image, readers):
    """What the step that reads files would make of one with these pixels."""
    kind, wide = 'unchanged', False
    for step in readers:
        kind = step.get('color_type', 'color')
        wide = step.get('to_float32', False)
    if kind.startswith('grayscale') and image.ndim == 3:
        image = mmcv.bgr2gray(image)
    elif kind.startswith('color') and image.ndim == 2:
        image = mmcv.gray2bgr(image)
    image = image.astype(np.float32) if wide else image
    size = image.shape[:2]
    return dict(img=image, img_path=None, img_shape=size, ori_shape=size)
