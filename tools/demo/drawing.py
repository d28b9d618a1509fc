"""Predictions in words and as pictures."""

import math

import cv2
import matplotlib.pyplot as plt
import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from mmengine.structures import PixelData
from predicting import describe
from torch import nn

#: Pictures that are narrower are enlarged, so that what is written on them can be read.
WIDTH = 320
FONT = cv2.FONT_HERSHEY_SIMPLEX


class Painter:
    """Says and draws what a model predicts.

    Args:
        model (nn.Module): A classifier of mmpretrain or a segmentor of mmseg.
        cfg (Config): Its config.
        opacity (float): Of the labels of a segmentation, in (0, 1].
        named (bool): Whether a segmentation has the names of its classes on it.
    """

    def __init__(self, model: nn.Module, cfg: Config, opacity: float, named=True):
        self.named = named
        self.classes, palette = names_and_colours(model, cfg)
        self.visualizer = None
        if hasattr(model, 'decode_head'):
            from mmseg.visualization import SegLocalVisualizer

            self.visualizer = SegLocalVisualizer(alpha=opacity)
            self.visualizer.dataset_meta = dict(classes=self.classes, palette=palette)

    def words(self, sample) -> str:
        """The label of an image with its score, or the classes of most pixels."""
        if self.visualizer is None:
            labels = sample.pred_label.flatten().tolist()
            scores = sample.pred_score.flatten().tolist()
            return ', '.join(f'{self._name(i)} {100 * scores[i]:.1f} %' for i in labels)
        counts = np.bincount(_labels(sample).flatten())
        first = np.argsort(-counts, kind='stable')[:3]
        shares = 100 * counts / counts.sum()
        found = [f'{self._name(i)} {shares[i]:.0f} %' for i in first if counts[i]]
        return ', '.join(found)

    def picture(self, image: np.ndarray, sample) -> np.ndarray:
        """Draw a prediction.

        Pictures of images of one size have one size.

        Args:
            image (np.ndarray): (H, W, 3), uint8, BGR, as it was predicted.
            sample (BaseDataElement): The prediction.

        Returns:
            np.ndarray: Larger, with lines of text below; uint8, BGR.
        """
        factor = math.ceil(WIDTH / image.shape[1])
        image = _enlarged(image, factor)
        lines = [describe(sample)] if describe(sample) else []
        if self.visualizer is None:
            lines.insert(0, self.words(sample))
        else:
            image = self._paint(image, _enlarged(_labels(sample), factor))
        return captioned(image, lines)

    def _paint(self, image, labels):
        from mmseg.structures import SegDataSample

        labels = PixelData(data=torch.from_numpy(labels)[None])
        self.visualizer.add_datasample(
            '',
            image[..., ::-1],
            SegDataSample(pred_sem_seg=labels),
            draw_gt=False,
            with_labels=self.named,
        )
        return self.visualizer.get_image()[..., ::-1]

    def _name(self, label):
        return self.classes[label] if label < len(self.classes) else f'class {label}'


def _labels(sample):
    """(H, W), int."""
    return sample.pred_sem_seg.data.squeeze(0).cpu().numpy()


def _enlarged(pixels, factor):
    return pixels.repeat(factor, 0).repeat(factor, 1)


def names_and_colours(model: nn.Module, cfg: Config) -> tuple[list, list | None]:
    """Classes and palette: of the checkpoint, the config, or the type of the data set.

    Returns:
        tuple[list, list | None]: Names; and for segmentation colours, RGB.
    """
    dataset = cfg.test_dataloader.dataset
    init_default_scope(cfg.default_scope)
    kind = dataset.type
    kind = DATASETS.get(kind) if isinstance(kind, str) else kind
    sources = [
        getattr(model, 'dataset_meta', None),
        getattr(model, '_dataset_meta', None),
        dict(dataset.get('metainfo') or {}),
        dict(classes=dataset.get('classes')),
        getattr(kind, 'METAINFO', None),
    ]
    sources = [source for source in sources if source]
    segmentor = hasattr(model, 'decode_head')
    count = model.num_classes if segmentor else getattr(model.head, 'num_classes', None)

    def first(key):
        for source in sources:
            found = source.get(key)
            if isinstance(found, list | tuple) and len(found) == (count or len(found)):
                return list(found)
        return None

    classes = first('classes') or [f'class {i}' for i in range(count or 0)]
    if not segmentor:
        return classes, None
    colours = plt.get_cmap('tab20')(np.arange(count) % 20)[:, :3] * 255
    return classes, first('palette') or colours.round().astype(int).tolist()


def captioned(image: np.ndarray, lines: list[str]) -> np.ndarray:
    """Add lines of text below an image, black on white, cut to its width.

    Args:
        image (np.ndarray): (H, W, 3), uint8.
        lines (list[str]): A line each.

    Returns:
        np.ndarray: (H + h, W, 3), where h depends on W and the number of lines.
    """
    width = image.shape[1]
    scale = max(0.4, width / 1600)
    height = round(40 * scale)
    for text in lines:
        strip = np.full((height, width, 3), 255, np.uint8)
        line = text
        while cv2.getTextSize(line, FONT, scale, 1)[0][0] > width - 4:
            text = text[:-1]
            line = f'{text}...'
        origin = (2, height - round(12 * scale))
        cv2.putText(strip, line, origin, FONT, scale, (0, 0, 0), 1, cv2.LINE_AA)
        image = np.concatenate([image, strip])
    return np.ascontiguousarray(image)
