"""Residuals and statuses on drawn predictions."""

from functools import wraps

import cv2
import mmcv
import numpy as np
from mmengine.hooks import Hook

from ...registry import HOOKS

#: As small as can be read; height of a line in pixels.
FONT, SCALE, LINE = cv2.FONT_HERSHEY_SIMPLEX, 0.4, 15

#: How the visualizers of mmpretrain and mmseg are asked to draw a prediction.
_METHODS = ('visualize_cls', 'add_datasample')


@HOOKS.register_module()
class EquilibriumCaptionHook(Hook):
    """Writes below each drawn prediction how its equilibrium was found.

    That is the residual, the evaluations of f and the status, as the predictions of
    ImplicitImageClassifier, ImplicitEncoderDecoder and MultiTaskMDEQ tell them. What
    is drawn, and where it goes, is the business of the toolboxes' visualization
    hooks; predictions that tell nothing are drawn as they are.
    """

    def before_run(self, runner):
        # A run that raised had no end, and visualizers are shared.
        self.after_run(runner)
        visualizer = runner.visualizer
        for name in _METHODS:
            if hasattr(visualizer, name):
                setattr(visualizer, name, _captioned(visualizer, name))

    def after_run(self, runner):
        for name in _METHODS:
            # The methods of the class are found again.
            vars(runner.visualizer).pop(name, None)


def caption(image, text):
    """Add lines of text below an image.

    Args:
        image (np.ndarray): (H, W, 3), uint8.
        text (str): Its parts, between commas, have a line each where the image is
            narrow.

    Returns:
        np.ndarray: (H + h, W + w, 3), uint8, the text black on white; a picture that
        is narrower than a line gets white at its right.
    """

    def width(line):
        return cv2.getTextSize(line, FONT, SCALE, 1)[0][0] + 4

    lines = [text] if width(text) <= image.shape[1] else text.split(', ')
    missing = max(map(width, lines)) - image.shape[1]
    if missing > 0:
        image = np.pad(image, ((0, 0), (0, missing), (0, 0)), constant_values=255)
    for line in lines:
        strip = np.full((LINE, *image.shape[1:]), 255, np.uint8)
        cv2.putText(strip, line, (2, LINE - 4), FONT, SCALE, (0, 0, 0), 1, cv2.LINE_AA)
        image = np.concatenate([image, strip])
    return image


def _captioned(visualizer, name):
    draw = getattr(visualizer, name)

    @wraps(draw)
    def drawn(*args, **kwargs):
        text = _text([*args, *kwargs.values()])
        if text is None:
            return draw(*args, **kwargs)
        out_file, show = kwargs.pop('out_file', None), kwargs.pop('show', False)
        pictures = []
        # The visualizers hand their picture to add_image where they have no file.
        visualizer.add_image = lambda *found, **_: pictures.append(found)
        try:
            draw(*args, **kwargs)
        finally:
            del visualizer.add_image
        for title, picture, *step in pictures:
            picture = caption(np.ascontiguousarray(picture), text)
            if show:
                visualizer.show(picture, title, kwargs.get('wait_time', 0))
            if out_file is None:
                visualizer.add_image(title, picture, *(step or [kwargs.get('step', 0)]))
            else:
                mmcv.imwrite(picture[..., ::-1], out_file)

    return drawn


def _text(arguments):
    """What is said of the prediction among some arguments."""
    for sample in arguments:
        if getattr(sample, 'equilibrium_status', None) is not None:
            return (
                f'residual {sample.equilibrium_residual:.1e}, '
                f'{sample.equilibrium_steps} evaluations, '
                f'{sample.equilibrium_status.replace("_", " ")}'
            )
    return None
