"""What a file says about itself, and the model it is compared with."""

from mmengine.config import ConfigDict
from mmengine.registry import MODELS, init_default_scope

import mdeq_mm
from mdeq_mm.apis.inference import first_test_dataset
from mdeq_mm.deployment.model import image_preprocessor, normalisation

from .images import dataset_class


def classes_of(cfg, model):
    """Names of the classes, or None where neither checkpoint nor config has them."""
    head = getattr(model, 'head', None) or model.decode_head
    settings = first_test_dataset(cfg) or {}
    sources = [model.dataset_meta, settings.get('metainfo') or {}]
    if 'type' in settings:
        sources.append(getattr(dataset_class(cfg), 'METAINFO', {}))
    for source in sources:
        classes = source.get('classes')
        if classes and len(classes) == getattr(head, 'num_classes', len(classes)):
            return list(classes)
    return None


def metadata_of(cfg, model, deployable, shape, config_name):
    """dict: For ``metadata_props`` of ONNX files and ``metadata.json`` of others."""
    mean, std = normalisation(model)
    rgb = getattr(image_preprocessor(model), 'to_rgb', None)
    if rgb is None:
        rgb = getattr(image_preprocessor(model), 'channel_conversion', False)
    orders = {1: 'grey', 3: 'RGB' if rgb else 'BGR'}
    own = deployable.mean is not None
    about = dict(
        producer=f'mdeq_mm {mdeq_mm.__version__}',
        config=config_name,
        outputs=list(deployable.output_names),
        input='float32, 0 to 255' if own else 'float32, (image - mean) / std',
        channel_order=orders.get(shape[0], 'as in training'),
        mean=None if mean is None else [round(v, 4) for v in mean.tolist()],
        std=None if std is None else [round(v, 4) for v in std.tolist()],
        classes=classes_of(cfg, model),
    )
    solver = deployable.solver
    if solver is not None:
        # A device that looks at the residual may take this for converged.
        tolerance = model.backbone.equilibrium.eval_solver.tol
        about |= dict(
            solver=type(solver).__name__.removesuffix('Solver').lower(),
            steps=solver.max_steps,
            residual_norm=solver.norm,
            tolerance=tolerance,
        )
    return {key: value for key, value in about.items() if value is not None}


def resnet50(channels, classes):
    """Config of mmpretrain's ResNet-50 as a classifier."""
    return ConfigDict(
        type='ImageClassifier',
        backbone=dict(
            type='ResNet',
            depth=50,
            in_channels=channels,
            num_stages=4,
            out_indices=(3,),
            style='pytorch',
        ),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=classes, in_channels=2048),
    )


def build_resnet50(channels, classes):
    """ResNet-50 with random weights, in evaluation mode.

    Raises:
        ImportError: If mmpretrain is not installed.
    """
    import mmpretrain.models  # noqa: F401

    init_default_scope('mmpretrain')
    return MODELS.build(resnet50(channels, classes)).eval()
