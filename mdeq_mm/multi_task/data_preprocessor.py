"""Preprocessing of batches that hold images of two tasks."""

import torch
from mmengine.model import BaseDataPreprocessor

from ..registry import MODELS
from ..tasks import in_scope, require_toolboxes, serves, task_of


@MODELS.register_module()
class MultiTaskDataPreprocessor(BaseDataPreprocessor):
    """Hands each image of a batch to the data preprocessor of its task.

    Images of different tasks differ in size and normalisation, so each task makes
    a batch of its own. Images with both labels go through the one of ``seg``.

    Args:
        cls (dict): mmpretrain's data preprocessor.
        seg (dict): mmseg's data preprocessor.
        non_blocking (bool): Whether copies to the device may overlap.

    Raises:
        ImportError: If mmpretrain or mmseg is not installed.
    """

    def __init__(
        self,
        cls=dict(type='ClsDataPreprocessor'),
        seg=dict(type='SegDataPreProcessor', size_divisor=1),
        non_blocking=False,
    ):
        super().__init__(non_blocking)
        require_toolboxes(type(self).__name__)
        self.cls = MODELS.build(in_scope(cls, 'cls'))
        self.seg = MODELS.build(in_scope(seg, 'seg'))

    def forward(self, data, training=False):
        """Normalise and stack the images of each task.

        Args:
            data (dict): ``inputs``, a list of images (C, H, W), and
                ``data_samples``, as many data samples. Both may be lists of such
                lists, which pairs of samples collate to.
            training (bool): Whether to pad and augment as in training.

        Returns:
            dict: ``inputs``, a dict from task to images (N, C, H, W), and
            ``data_samples``, the list of all samples in their order, each marked
            with its ``task``.

        Raises:
            ValueError: If there are no data samples to tell the tasks by, or, in
                training, one for both tasks has no class.
        """
        images, samples = _flat(data['inputs']), _flat(data.get('data_samples'))
        if len(images) != len(samples):
            raise ValueError(
                f'a batch of {len(images)} images has {len(samples)} data samples: '
                'pipelines must end in PackInputs (mmpretrain) or PackSegInputs (mmseg)'
            )
        rows = {}
        for row, sample in enumerate(samples):
            task = task_of(sample)
            _label_as_tensor(sample)
            if training and task == 'both' and 'gt_label' not in sample:
                raise ValueError(
                    f'{sample.get("img_path", "an image")} is for both tasks and has '
                    "no gt_label: let its data set give one, and add 'gt_label' to "
                    'the meta_keys of PackSegInputs'
                )
            sample.set_metainfo(dict(task=task))
            rows.setdefault(task, []).append(row)

        inputs, done = {}, [None] * len(samples)
        for task in sorted(rows):
            preprocess = self.seg if serves(task, 'seg') else self.cls
            batch = preprocess(
                dict(
                    inputs=[images[r] for r in rows[task]],
                    data_samples=[samples[r] for r in rows[task]],
                ),
                training,
            )
            inputs[task] = batch['inputs']
            for row, sample in zip(rows[task], batch['data_samples'], strict=True):
                done[row] = sample.to(batch['inputs'].device)
        return dict(inputs=inputs, data_samples=done)


def _flat(items):
    flat = []
    for item in items if items is not None else ():
        flat += item if isinstance(item, list | tuple) else [item]
    return flat


def _label_as_tensor(sample):
    """Make the class of an image that mmseg packed as meta information a label."""
    label = sample.get('gt_label')
    if label is not None and not isinstance(label, torch.Tensor):
        del sample.gt_label
        sample.gt_label = torch.as_tensor(label).reshape(-1)
