"""Running files, and the models that they were made of."""

import statistics
import time
from contextlib import contextmanager

import numpy as np
import torch
from torch.nn.functional import interpolate, softmax

from mdeq_mm.deployment import load_program


class File:
    """A file of a model that can be run.

    Args:
        path (Path): A .onnx or .pt2 file, whatever its name ends with.
        form (str): ``'onnx'`` or ``'torch'``.
        threads (int): Threads of a CPU.
        device (str): Where the exported program runs; ONNX Runtime runs on the CPU.
        batch (int, optional): Its fixed number of images.
    """

    def __init__(self, path, form, threads, device='cpu', batch=None):
        self.form, self.device, self.batch = form, device, batch
        begin = time.perf_counter()
        if form == 'onnx':
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
            self.session = onnxruntime.InferenceSession(
                str(path), options, providers=['CPUExecutionProvider']
            )
        else:
            torch.set_num_threads(threads)
            self.program, _ = load_program(path)
        #: What it takes to load it.
        self.seconds = time.perf_counter() - begin

    def __call__(self, images):
        """Run on as many images as it takes.

        Args:
            images (np.ndarray): (N, C, H, W).

        Returns:
            list[np.ndarray]: Its outputs.
        """
        if self.form == 'onnx':
            return self.session.run(None, {'images': images})
        with torch.no_grad():
            outputs = self.program(torch.from_numpy(images).to(self.device))
        return [output.cpu().numpy() for output in outputs]

    def run(self, images):
        """Run on any number of images, in batches where theirs is fixed."""
        if self.batch is None:
            return self(images)
        parts = []
        for begin in range(0, len(images), self.batch):
            # The last batch is filled up with its last image.
            rows = np.arange(begin, begin + self.batch).clip(max=len(images) - 1)
            parts.append(self(images[rows]))
        whole = [np.concatenate(part) for part in zip(*parts, strict=True)]
        return [part[: len(images)] for part in whole]


def latencies(files, shape, runs):
    """Milliseconds an image, or batch where it is fixed; files take turns.

    Args:
        files (dict[str, File]): By name.
        shape (Sequence[int]): Channels, height and width.
        runs (int): Timed ones, after one that is not.

    Returns:
        dict[str, float]: Medians.
    """
    generator = np.random.default_rng(0)
    found = {name: [] for name in files}
    for count in range(runs + 1):
        for name, file in files.items():
            images = generator.standard_normal((file.batch or 1, *shape))
            images = images.astype(np.float32)
            begin = time.perf_counter()
            file(images)
            if count:
                found[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(times) for name, times in found.items()}


@contextmanager
def _solving(backbone, solver):
    """A backbone with another solver, started from zero."""
    layer = getattr(backbone, 'equilibrium', None)
    if layer is None:
        yield
        return
    kept = layer.eval_solver, backbone.warm_start
    layer.eval_solver, backbone.warm_start = solver or kept[0], False
    try:
        yield
    finally:
        layer.eval_solver, backbone.warm_start = kept


@torch.no_grad()
def reference(model, images, solver=None):
    """What a model of mmpretrain or mmseg makes of images, by its own code.

    Args:
        model (nn.Module): In evaluation mode.
        images (Tensor): (N, C, H, W), normalised.
        solver (Solver, optional): In place of the model's own.

    Returns:
        dict[str, np.ndarray]: ``scores``, ``logits`` and ``residual``, those that
        there are.
    """
    with _solving(model.backbone, solver):
        found = model(images.to(next(model.parameters()).device), mode='tensor')
    head = getattr(model, 'decode_head', None)
    found = list(found) if isinstance(found, tuple) else [found]
    outputs = {}
    if getattr(model, 'head', None) is not None:
        outputs['scores'] = softmax(found.pop(0), dim=1)
    if head is not None:
        size, align = images.shape[2:], head.align_corners
        logits = interpolate(found.pop(0), size, mode='bilinear', align_corners=align)
        outputs['logits'] = logits
    solution = getattr(model.backbone, 'last_solution', None)
    if solution is not None:
        outputs['residual'] = solution.residual
        outputs['steps'] = solution.steps
    return {name: value.cpu().numpy() for name, value in outputs.items()}


def differences(found, expected):
    """Largest absolute differences by name, and how large the largest number is.

    Args:
        found (dict[str, np.ndarray]): Of the file.
        expected (dict[str, np.ndarray]): Of the model, of these names or more.

    Returns:
        dict[str, tuple[float, float]]: By name.
    """
    return {
        name: (
            float(np.abs(value - expected[name]).max()),
            float(np.abs(expected[name]).max()),
        )
        for name, value in found.items()
    }


def agreement(found, expected):
    """Share of equal labels, of images and of pixels, by the name of the output."""
    return {
        name: float((found[name].argmax(1) == expected[name].argmax(1)).mean())
        for name in ('scores', 'logits')
        if name in found
    }
