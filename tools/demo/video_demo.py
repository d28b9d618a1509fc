"""Predict the frames of a video, each solve warm from the frame before.

INPUT is a video file or a folder of frames, OUT a video file (.avi, .mkv, .mov, .mp4)
or a folder: the frames under the colours of their segmentation, or above the label that
a classifier gives them, and how their equilibria were found. In a folder a new sequence
begins, from zero, where the name before the last number changes, or the image size.

Prints frames, evaluations of f a frame, the median residual, and the frames a second
that are predicted, without drawing and writing; with --cold those of solves from zero.

Example:
    python tools/demo/video_demo.py in.mp4 CONFIG CHECKPOINT --out out.mp4 --tol 1e-2
"""

import argparse
import math
import os
import os.path as osp
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import mmcv
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

sys.path.insert(0, osp.dirname(osp.abspath(__file__)))
sys.path.insert(0, osp.dirname(osp.dirname(osp.abspath(__file__))))
from analysis_tools.warm_start import IMAGES, sequences
from common import fail
from drawing import Painter
from predicting import (
    add_arguments,
    build_model,
    check_arguments,
    describe,
    predict,
    read_model_config,
)

from mdeq_mm.apis.inference import load_images
from mdeq_mm.models import MDEQ

#: Codecs that OpenCV's packages come with.
CODECS = {'.avi': 'MJPG', '.mkv': 'MJPG', '.mov': 'mp4v', '.mp4': 'mp4v'}
FPS = 15.0


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('input', type=Path, help='video file, or a folder of frames')
    add_arguments(parser)
    parser.add_argument(
        '--out', type=Path, required=True, help='video file, or a folder for frames'
    )
    parser.add_argument(
        '--overwrite',
        action='store_true',
        help='replace the video, or frames of the same names, that are there',
    )
    parser.add_argument(
        '--cold', action='store_true', help='start each solve from zero'
    )
    parser.add_argument('--limit', type=int, help='frames at most (default: all)')
    parser.add_argument(
        '--fps',
        type=float,
        help=f"of the video written (default: the input's; {FPS:g} of a folder)",
    )
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        parser.error(f'--limit is {args.limit}; it has to be at least 1')
    if args.fps is not None and not 0 < args.fps < math.inf:
        parser.error(f'--fps is {args.fps}; it has to be above 0')
    if args.out.suffix.lower() not in ('', *CODECS) and not args.out.is_dir():
        parser.error(
            f'--out {str(args.out)!r} is no folder, and no video of a known kind '
            f'({", ".join(CODECS)})'
        )
    check_arguments(parser, args)
    return args


@dataclass
class Frame:
    """A frame of a video.

    Attributes:
        name (str): Of its picture, without a suffix.
        image (np.ndarray): (H, W, 3), uint8, BGR.
        source (Path | np.ndarray): What the test pipeline is given.
        first (bool): Whether nothing goes before it in its sequence.
    """

    name: str
    image: np.ndarray
    source: Path | np.ndarray
    first: bool


class Folder:
    """Frames from the images of a folder."""

    fps = FPS

    def __init__(self, path: Path, limit: int | None):
        self.groups = sequences(path, limit)
        if not self.groups:
            fail(f'the folder {str(path)!r} has no images ({", ".join(IMAGES)}).')
        self.count = sum(map(len, self.groups.values()))

    def __iter__(self) -> Iterator[Frame]:
        stems = [path.stem for paths in self.groups.values() for path in paths]
        for paths in self.groups.values():
            for path in paths:
                image = mmcv.imread(str(path))
                if image is None:
                    fail(f'the image {str(path)!r} cannot be read.')
                name = path.stem if stems.count(path.stem) == 1 else path.name
                yield Frame(name, image, path, path is paths[0])


class Video:
    """Frames from a video file."""

    def __init__(self, path: Path, limit: int | None):
        self.path, self.limit = path, limit
        self.capture = None
        # OpenCV takes an image for the first one of a numbered sequence.
        if path.suffix.lower() not in IMAGES:
            self.capture = cv2.VideoCapture(str(path))
        if self.capture is None or not self.capture.isOpened():
            fail(
                f'the video {str(path)!r} cannot be opened: it is damaged, no video, '
                'or of a codec that OpenCV does not know; a folder of frames does too.'
            )
        fps = self.capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 0 < fps < 1000 else FPS
        # Some files do not tell.
        count = int(self.capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.count = min(count, limit or count) if count > 0 else limit

    def __iter__(self) -> Iterator[Frame]:
        number = 0
        while number != self.limit:
            read, image = self.capture.read()
            if not read:
                break
            yield Frame(f'{number:06d}', image, image, number == 0)
            number += 1
        if number == 0:
            fail(f'the video {str(self.path)!r} has no frame that can be read.')


class FolderWriter:
    """Pictures as files in a folder."""

    def __init__(self, path: Path):
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, picture: np.ndarray) -> None:
        mmcv.imwrite(picture, str(self.path / f'{name}.png'))

    def close(self, keep: bool) -> None:
        pass


class VideoWriter:
    """Pictures as a video, which takes its place once it is whole."""

    def __init__(self, path: Path, fps: float):
        self.path, self.fps = path, fps
        self.part = path.with_name(f'{path.stem}.partial{path.suffix}')
        self.writer = self.size = None
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, picture: np.ndarray) -> None:
        size = picture.shape[1::-1]
        if self.writer is None:
            codec = cv2.VideoWriter_fourcc(*CODECS[self.path.suffix.lower()])
            self.writer = cv2.VideoWriter(str(self.part), codec, self.fps, size)
            self.size = size
            if not self.writer.isOpened():
                raise OSError(
                    f'the video {str(self.path)!r} cannot be written: take another '
                    f'kind ({", ".join(CODECS)}), or a folder'
                )
        if size != self.size:
            raise ValueError(
                f'the frame {name!r} makes a picture of {size[0]}x{size[1]} pixels and '
                f'those before are of {self.size[0]}x{self.size[1]}, which one video '
                'cannot hold: give a folder as --out'
            )
        self.writer.write(picture)

    def close(self, keep: bool) -> None:
        if self.writer is not None:
            self.writer.release()
        if keep and self.writer is not None:
            os.replace(self.part, self.path)
        else:
            self.part.unlink(missing_ok=True)


def check_out(args: argparse.Namespace) -> bool:
    """Refuse to lose anything that is there.

    Returns:
        bool: Whether a folder is to be written.
    """
    out, given = args.out, args.input
    if out.exists() and given.exists() and out.resolve() == given.resolve():
        fail(f'--out {str(out)!r} is the input itself: give another place.')
    folder = out.is_dir() or out.suffix == ''
    if folder and out.exists() and not out.is_dir():
        fail(f'--out {str(out)!r} is a file: give a folder, or a name with a suffix.')
    there = any(out.iterdir()) if out.is_dir() else out.exists()
    if there and not args.overwrite:
        what = 'is a folder with something in it' if folder else 'exists'
        fail(f'--out {str(out)!r} {what}: give another place, or --overwrite.')
    return folder


def predict_all(model, cfg, frames, painter, writer, progress) -> dict:
    """Predict, draw and write all frames, one by one.

    Returns:
        dict: Lists with an entry a frame: ``seconds``, and ``steps`` and ``residual``
        where the model has an equilibrium.
    """
    found = dict(seconds=[], steps=[], residual=[])
    backbones = [m for m in model.modules() if isinstance(m, MDEQ)]
    task = progress.add_task('frames', total=frames.count, told='')
    try:
        for frame in frames:
            if frame.first:
                for backbone in backbones:
                    backbone.equilibrium.forget()
            begin = time.perf_counter()
            (sample,) = predict(model, load_images(cfg, [frame.source]))
            # Words ask for the labels, and so wait for a GPU.
            painter.words(sample)
            found['seconds'].append(time.perf_counter() - begin)
            if describe(sample):
                found['steps'].append(sample.equilibrium_steps)
                found['residual'].append(sample.equilibrium_residual)
            writer.write(frame.name, painter.picture(frame.image, sample))
            told = (
                f'{np.mean(found["steps"]):.1f} evaluations' if found['steps'] else ''
            )
            progress.update(task, advance=1, told=told)
    except KeyboardInterrupt:
        # What is done is kept, and can be watched.
        if not found['seconds']:
            raise
        progress.console.print('Interrupted.')
    return found


def summary(found: dict, cold: bool) -> str:
    """The figures of a run in one line."""
    count = len(found['seconds'])
    parts = [f'{count} frame{"s" * (count != 1)}']
    if found['steps']:
        start = 'from zero' if cold else 'warm'
        parts.append(f'{start}: {np.mean(found["steps"]):.1f} evaluations a frame')
        parts.append(f'median residual {np.median(found["residual"]):.1e}')
    parts.append(f'{count / sum(found["seconds"]):.1f} frames a second')
    return ', '.join(parts)


def main(argv=None) -> None:
    args = parse_args(argv)
    if not args.input.exists():
        fail(f'the video or folder {str(args.input)!r} does not exist.')
    folder = check_out(args)
    frames = (Folder if args.input.is_dir() else Video)(args.input, args.limit)
    cfg = read_model_config(args)
    console = Console(soft_wrap=True, highlight=False)
    columns = (
        TextColumn('{task.description}'),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn('{task.fields[told]}'),
    )
    progress = Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    )
    try:
        model = build_model(args, cfg)
        for module in model.modules():
            if isinstance(module, MDEQ):
                module.warm_start = not args.cold
        painter = Painter(model, cfg, args.opacity, named=False)
        writer = (
            FolderWriter(args.out)
            if folder
            else VideoWriter(args.out, args.fps or frames.fps)
        )
        whole = False
        try:
            with progress:
                found = predict_all(model, cfg, frames, painter, writer, progress)
            whole = True
        finally:
            writer.close(whole)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        fail(str(error))
    console.print(summary(found, args.cold), markup=False)
    console.print(str(args.out), markup=False)


if __name__ == '__main__':
    main()
