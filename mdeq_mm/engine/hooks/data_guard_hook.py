"""Looks at the data before training starts."""

import time

from mmengine.dist import all_gather_object, get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import nn

from ...registry import HOOKS
from ...utils.data_checks import check_dataset, leaves


@HOOKS.register_module()
class DataGuardHook(Hook):
    """Refuses data that would end a training half way.

    Before training, or testing, begins: data sets have to have samples, label maps
    have to exist, to be of the size of their images, and to hold labels of the
    classes alone, of which the segmentation heads need an output each. The message
    names the file or the field.

    Each process reads a share of the files. A label map of 2048x1024 pixels takes 13 ms
    of a core, so that the 3,475 of Cityscapes' training and validation sets take about
    25 s on 2 cores, from a disk that keeps up.

    Args:
        decode (bool): Whether to read all labels. Otherwise only the sizes of
            label maps are looked at, in a hundredth of the time.
        workers (int, optional): Threads. Default: one a core, 8 at most.
    """

    priority = 'VERY_HIGH'

    def __init__(self, decode=True, workers=None):
        self.decode = decode
        self.workers = workers

    def before_train(self, runner):
        loaders = dict(train_dataloader=runner.train_dataloader)
        if runner.val_loop is not None:
            loaders['val_dataloader'] = runner.val_dataloader
        self._check(runner, loaders)

    def before_test(self, runner):
        self._check(runner, dict(test_dataloader=runner.test_dataloader))

    def _check(self, runner, loaders):
        begin, checked, error = time.monotonic(), 0, None
        try:
            checked = self._check_share(runner.model, loaders)
        except (OSError, ValueError) as caught:
            error = caught
        # All end together, and none waits for another that is gone.
        outcomes = all_gather_object((checked, error and str(error)))
        if error is not None:
            raise error
        for _, said in outcomes:
            if said is not None:
                raise ValueError(said)
        total = sum(count for count, _ in outcomes)
        if total:
            runner.logger.info(
                f'Checked {total} label maps in {time.monotonic() - begin:.1f} s.'
            )

    def _check_share(self, model, loaders):
        """Check this process's share; return its number of label maps."""
        heads = dict(_heads(model))
        ignored = None
        if heads:
            ignored = set.intersection(
                *({getattr(head, 'ignore_index', 255)} for head in heads.values())
            )
        _check_windows(model)
        classifier = dict(_heads(model, ('head',)))
        checked = 0
        for field, loader in loaders.items():
            name = f'{field}.dataset'
            _check_outputs(heads, loader.dataset, name, segments=True)
            _check_outputs(classifier, loader.dataset, name, segments=False)
            checked += check_dataset(
                loader.dataset,
                name,
                self.decode,
                self.workers,
                ignored,
                share=(get_rank(), get_world_size()),
            )
        return checked


def _unwrapped(model):
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def _check_windows(model):
    """Refuse sliding windows without a size, which only an evaluation would."""
    test_cfg = getattr(_unwrapped(model), 'test_cfg', None) or {}
    lacking = [key for key in ('crop_size', 'stride') if key not in test_cfg]
    if test_cfg.get('mode') == 'slide' and lacking:
        raise ValueError(
            f"model.test_cfg.mode='slide' lacks {' and '.join(lacking)}: give "
            'model.test_cfg.crop_size and stride as (height, width), or set '
            "mode='whole'"
        )


def _heads(model, fields=('decode_head', 'auxiliary_head')):
    """Heads of a model, those of the segmentation, by how a config names them."""
    model = _unwrapped(model)
    for field in fields:
        head = getattr(model, field, None)
        if isinstance(head, nn.ModuleList):
            yield from ((f'model.{field}[{i}]', part) for i, part in enumerate(head))
        elif head is not None:
            yield f'model.{field}', head


def _check_outputs(heads, dataset, name, segments):
    """Refuse heads with fewer outputs than a data set of their task has classes."""
    for path, part in leaves(dataset, name):
        classes = getattr(part, 'metainfo', {}).get('classes')
        if not classes or hasattr(part, 'seg_map_suffix') != segments:
            continue
        for field, head in heads.items():
            outputs = getattr(head, 'num_classes', None)
            if outputs and len(classes) > outputs:
                raise ValueError(
                    f'{path} has {len(classes)} classes and {field}.num_classes='
                    f'{outputs}: set num_classes of '
                    + ('the decode and auxiliary heads' if segments else 'the head')
                    + f' to {len(classes)}'
                )
