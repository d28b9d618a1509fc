"""One backbone with a classification and a segmentation head."""

import math
import numbers

import torch
from mmengine.config import ConfigDict
from mmengine.model import BaseModel, Sequential

from ..implicit.layer import recorded
from ..models.implicit_models import EquilibriumReport
from ..models.implicit_models.equilibrium_report import annotate
from ..registry import MODELS
from ..tasks import in_scope, require_toolboxes, serves, task_of


@MODELS.register_module()
class MultiTaskMDEQ(EquilibriumReport, BaseModel):
    """Classifier and segmentor on one backbone, trained on both tasks at once.

    Names in its checkpoints are those of mmpretrain's ``ImageClassifier``
    (``backbone``, ``neck``, ``head``) and mmseg's ``EncoderDecoder``
    (``backbone``, ``decode_head``), so that one task's model starts from them, or
    they from one task's, through ``load_from``.

    An image costs one solve, whichever heads its labels are for.

    Args:
        backbone (dict): The backbone, such as ``dict(type='MDEQ', ...)``.
        head (dict): mmpretrain's head. Its parts and those of the neck are looked
            up in mmpretrain, those of the segmentation heads in mmseg; no scope
            has to be written.
        decode_head (dict): mmseg's decode head.
        neck (dict | list[dict], optional): In front of ``head`` alone.
        auxiliary_head (dict | list[dict], optional): mmseg's auxiliary heads.
        loss_weights (dict[str, float]): Factors of the losses of ``cls`` and
            ``seg``.
        train_cfg (dict, optional): Of the segmentation heads.
        test_cfg (dict): Of the segmentation, ``mode='whole'`` or ``'slide'``.
        data_preprocessor (dict): :class:`MultiTaskDataPreprocessor`.
        init_cfg (dict | list[dict], optional): Initialisation.

    Raises:
        ImportError: If mmpretrain or mmseg is not installed.
        ValueError: If a loss weight is of an unknown task, or no number of 0 or
            more.
    """

    def __init__(
        self,
        backbone,
        head,
        decode_head,
        neck=None,
        auxiliary_head=None,
        loss_weights=dict(cls=1.0, seg=1.0),
        train_cfg=None,
        test_cfg=dict(mode='whole'),
        data_preprocessor=dict(type='MultiTaskDataPreprocessor'),
        init_cfg=None,
    ):
        super().__init__(data_preprocessor, init_cfg)
        require_toolboxes(type(self).__name__)
        self.loss_weights = dict(cls=1.0, seg=1.0) | dict(loss_weights)
        for task, weight in self.loss_weights.items():
            usable = isinstance(weight, numbers.Real) and 0 <= weight < math.inf
            if task not in ('cls', 'seg') or not usable:
                raise ValueError(
                    f'loss_weights[{task!r}]={weight!r} cannot be used: give numbers '
                    "of 0 or more for 'cls' and 'seg'"
                )
        segmentor = MODELS.build(
            in_scope(
                dict(
                    type='EncoderDecoder',
                    backbone=backbone,
                    decode_head=decode_head,
                    auxiliary_head=auxiliary_head,
                    train_cfg=train_cfg,
                    # mmseg reads the mode as an attribute.
                    test_cfg=ConfigDict(dict(mode='whole') | dict(test_cfg)),
                ),
                'seg',
            )
        )
        # Past nn.Module's registration: it lends its inference, and its parts are
        # registered here under their own names.
        self.__dict__['_segmentor'] = segmentor
        self.backbone = segmentor.backbone
        self.neck = _build_neck(neck)
        self.head = MODELS.build(in_scope(head, 'cls'))
        self.decode_head = segmentor.decode_head
        if segmentor.with_auxiliary_head:
            self.auxiliary_head = segmentor.auxiliary_head

    @property
    def segmentor(self):
        """EncoderDecoder: mmseg's model of the same parts, for its inference."""
        segmentor = self._segmentor
        # They may have been replaced here since.
        segmentor.backbone, segmentor.decode_head = self.backbone, self.decode_head
        return segmentor

    def forward(self, inputs, data_samples=None, mode='tensor'):
        """Run the model as the Runner does.

        Args:
            inputs (dict[str, Tensor] | Tensor): Images (N, C, H, W) of each task,
                as :class:`MultiTaskDataPreprocessor` returns them; or of all
                tasks at once, in the order of the data samples.
            data_samples (list[BaseDataElement], optional): Of all images, each
                marked with its ``task``. Images without any are predicted for
                both heads.
            mode (str): ``'loss'``, ``'predict'`` or ``'tensor'``.

        Returns:
            dict | list | tuple: Losses; the data samples with predictions, in
            their order; or, for a tensor, classification and segmentation logits.

        Raises:
            ValueError: If the mode is none of these, or there is nothing to compute
                losses with.
        """
        if mode == 'tensor':
            maps = self.backbone(inputs)
            return self.head(self._features(maps)), self.decode_head(maps)
        if mode not in ('loss', 'predict'):
            raise ValueError(
                f"mode={mode!r} is unknown: use 'loss', 'predict' or 'tensor'"
            )
        if data_samples is None:
            if mode == 'loss' or isinstance(inputs, dict):
                raise ValueError(
                    'data_samples=None has no labels and no tasks: pass the data '
                    'samples of the images'
                )
            data_samples = _unlabelled(inputs)
        tasks = [task_of(sample) for sample in data_samples]
        if not isinstance(inputs, dict):
            inputs = {
                task: inputs[[i for i, t in enumerate(tasks) if t == task]]
                for task in sorted(set(tasks))
            }
        groups = [
            (
                task,
                images,
                [s for s, t in zip(data_samples, tasks, strict=True) if t == task],
            )
            for task, images in inputs.items()
        ]
        if mode == 'loss':
            return self.loss(groups)
        for group in groups:
            with recorded(self.equilibrium_layers) as solutions:
                self._predict(*group)
            annotate(group[-1], solutions)
        return data_samples

    def loss(self, groups):
        """Losses of both heads.

        Args:
            groups (list[tuple]): Task, images (N, C, H, W), data samples.

        Returns:
            dict[str, Tensor]: ``cls.*``, ``decode.*`` and ``aux.*``. Where images
            with one label and images with both feed a head, its entries are means
            over all of them. With a :class:`JacobianScheduleHook` ``loss_jac`` too.
        """
        self.forget_losses()
        losses, counts = {}, {}
        for task, images, samples in groups:
            maps = self.backbone(images)
            for head, compute in (('cls', self._cls_loss), ('seg', self._seg_loss)):
                if not serves(task, head):
                    continue
                counts[head] = counts.get(head, 0) + len(samples)
                for key, value in compute(maps, samples).items():
                    if isinstance(value, list | tuple):
                        # As mmengine adds them up, and mmpretrain gives accuracies.
                        value = sum(v.mean() for v in value)
                    losses.setdefault((head, key), []).append((len(samples), value))
        out = {}
        for (head, key), parts in losses.items():
            total = sum(n * value for n, value in parts) / counts[head]
            out[key] = total * (self.loss_weights[head] if 'loss' in key else 1)
        return out | self.equilibrium_losses()

    def _features(self, maps):
        return maps if self.neck is None else self.neck(maps)

    def _cls_loss(self, maps, samples):
        losses = self.head.loss(self._features(maps), samples)
        return {f'cls.{k}': v for k, v in losses.items()}

    def _seg_loss(self, maps, samples):
        heads = {'decode': self.decode_head}
        auxiliary = getattr(self, 'auxiliary_head', None)
        if isinstance(auxiliary, torch.nn.ModuleList):
            heads |= {f'aux_{i}': head for i, head in enumerate(auxiliary)}
        elif auxiliary is not None:
            heads['aux'] = auxiliary
        train_cfg = self._segmentor.train_cfg
        return {
            f'{name}.{k}': v
            for name, head in heads.items()
            for k, v in head.loss(maps, samples, train_cfg).items()
        }

    def _predict(self, task, images, samples):
        """Write the predictions of one group into its data samples."""
        segmentor = self.segmentor
        if task == 'seg':
            segmentor.predict(images, samples)
            return
        maps = self.backbone(images)
        for sample, found in zip(
            samples, self.head.predict(self._features(maps)), strict=True
        ):
            sample.set_data(
                dict(pred_score=found.pred_score, pred_label=found.pred_label)
            )
        if task == 'cls':
            return
        if segmentor.test_cfg['mode'] == 'slide':
            segmentor.predict(images, samples)
            return
        metas = [sample.metainfo for sample in samples]
        logits = self.decode_head.predict(maps, metas, segmentor.test_cfg)
        segmentor.postprocess_result(logits, samples)


def _unlabelled(images):
    """Data samples of images (N, C, H, W) that nothing is known of."""
    from mmseg.structures import SegDataSample

    size = tuple(images.shape[2:])
    metas = dict(task='both', ori_shape=size, img_shape=size, pad_shape=size)
    return [SegDataSample(metainfo=metas) for _ in images]


def _build_neck(neck):
    if neck is None:
        return None
    if not isinstance(neck, list | tuple):
        return MODELS.build(in_scope(neck, 'cls'))
    return Sequential(*(MODELS.build(in_scope(part, 'cls')) for part in neck))
