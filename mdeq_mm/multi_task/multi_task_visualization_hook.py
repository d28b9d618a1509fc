"""Drawing of predictions where images belong to two tasks."""

import os.path as osp

import mmcv
import numpy as np
from mmengine.fileio import get
from mmengine.hooks import Hook
from mmengine.visualization import Visualizer

from ..registry import HOOKS

# Side of images, in pixels, below which text on them cannot be read.
_LEAST = 160


@HOOKS.register_module()
class MultiTaskSegVisualizationHook(Hook):
    """mmseg's ``SegVisualizationHook``, which also takes images with a class.

    Images with a predicted label map are drawn as mmseg draws them; on those without,
    the predicted class and its score are written, and below them the true class where
    it is another. It needs mmseg's ``SegLocalVisualizer``.

    Args:
        draw (bool): Whether to draw.
        interval (int): In validation, one image is drawn every so many batches; in
            tests, all are.
        show (bool): Whether to open a window.
        wait_time (float): Seconds that a window stays open.
        backend_args (dict, optional): Of mmengine's file backend, for the images.
    """

    def __init__(
        self, draw=False, interval=50, show=False, wait_time=0.0, backend_args=None
    ):
        self.draw = draw
        self.interval = interval
        self.show = show
        self.wait_time = wait_time
        self.backend_args = backend_args
        self._tested = 0

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        """Draw the first image of a batch."""
        step = runner.iter + batch_idx
        if self.draw and step % self.interval == 0:
            self._draw(runner.visualizer, outputs[0], 'val', step)

    def after_test_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        """Draw the images of a batch."""
        if not self.draw:
            return
        for sample in outputs:
            self._tested += 1
            self._draw(runner.visualizer, sample, 'test', self._tested)

    def _draw(self, visualizer, sample, stage, step):
        content = get(sample.img_path, backend_args=self.backend_args)
        image = mmcv.imfrombytes(content, channel_order='rgb')
        name = f'{stage}_{osp.basename(sample.img_path)}'
        if 'pred_sem_seg' in sample:
            visualizer.add_datasample(
                name,
                image,
                data_sample=sample,
                show=self.show,
                wait_time=self.wait_time,
                step=step,
            )
            return
        tasks = visualizer.dataset_meta.get('tasks', {})
        image = _with_class(image, sample, tasks.get('cls', {}).get('classes'))
        if self.show:
            visualizer.show(image, win_name=name, wait_time=self.wait_time)
        visualizer.add_image(name, image, step)


def _with_class(image, sample, classes):
    """An image (H, W, 3) on which a sample's class is written."""

    def name(label):
        return classes[label] if classes else str(label)

    found = sample.pred_label.flatten()[0].item()
    text = f'{name(found)}: {sample.pred_score.flatten()[found].item():.2f}'
    labels = sample.get('gt_label')
    if labels is not None and found not in labels.tolist():
        text += '\nnot ' + ', '.join(name(label) for label in labels.tolist())

    scale = _LEAST / min(image.shape[:2])
    if scale > 1:
        image = mmcv.imrescale(image, scale)
    canvas = Visualizer(image=np.ascontiguousarray(image))
    canvas.draw_texts(
        text,
        np.array([4.0, 4.0]),
        font_sizes=12,
        colors='white',
        bboxes=dict(facecolor='black', alpha=0.6, pad=2, edgecolor='none'),
    )
    return canvas.get_image()
