"""What the heads of a model expect of the labels of data sets."""

from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import nn

from .datasets import leaves

# Of the segmentation, and of the classification.
_SEGMENTATION, _CLASSIFICATION = ('decode_head', 'auxiliary_head'), ('head',)


def expected_labels(model):
    """What labels a model takes.

    Args:
        model (nn.Module): The model, wrapped or not.

    Returns:
        dict: ``ignored`` and ``outputs``, as :func:`examine` takes them.
    """
    ignored = None
    heads = [head for _, head in _heads(model, _SEGMENTATION)]
    if heads:
        ignored = set.intersection(
            *({getattr(head, 'ignore_index', 255)} for head in heads)
        )
    heads = [head for _, head in _heads(model, _CLASSIFICATION)]
    counts = [getattr(head, 'num_classes', None) for head in heads]
    outputs = min((c for c in counts if isinstance(c, int)), default=None)
    return dict(ignored=ignored, outputs=outputs)


def _unwrapped(model):
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def check_windows(model):
    """Refuse sliding windows without a size, which only an evaluation would.

    Args:
        model (nn.Module): The model, wrapped or not.

    Raises:
        ValueError: If ``test_cfg`` lacks ``crop_size`` or ``stride``.
    """
    test_cfg = getattr(_unwrapped(model), 'test_cfg', None) or {}
    lacking = [key for key in ('crop_size', 'stride') if key not in test_cfg]
    if test_cfg.get('mode') == 'slide' and lacking:
        raise ValueError(
            f"model.test_cfg.mode='slide' lacks {' and '.join(lacking)}: give "
            'model.test_cfg.crop_size and stride as (height, width), or set '
            "mode='whole'"
        )


def _heads(model, fields):
    """Heads of a model, by how a config names them."""
    model = _unwrapped(model)
    for field in fields:
        head = getattr(model, field, None)
        if isinstance(head, nn.ModuleList):
            yield from ((f'model.{field}[{i}]', part) for i, part in enumerate(head))
        elif head is not None:
            yield f'model.{field}', head


def check_outputs(model, dataset, name):
    """Refuse heads of segmentation with fewer outputs than a data set has classes.

    The labels of whole images are looked at one by one, because a data set may have
    names for more classes than samples, as a part of ImageNet does.

    Args:
        model (nn.Module): The model, wrapped or not.
        dataset (Dataset): The data set; wrappers are looked into.
        name (str): How the config names it.

    Raises:
        ValueError: If ``num_classes`` of a head is too small.
    """
    for path, part in leaves(dataset, name):
        classes = getattr(part, 'metainfo', {}).get('classes')
        if not classes or not hasattr(part, 'seg_map_suffix'):
            continue
        for field, head in _heads(model, _SEGMENTATION):
            outputs = getattr(head, 'num_classes', None)
            if outputs and len(classes) > outputs:
                raise ValueError(
                    f'{path} has {len(classes)} classes and {field}.num_classes='
                    f'{outputs}: set num_classes of the decode and auxiliary heads to '
                    f'{len(classes)}'
                )
