"""Predict images: their labels and scores, or a picture of their segmentation.

Prints a line an image: what is predicted, and how its equilibrium was found (residual,
evaluations of f, how the solve ended). Pictures go to OUT_DIR/<image>.png; those of a
classifier are drawn only where --out-dir is given.

Examples:
    python tools/demo/image_demo.py digits/ CONFIG CHECKPOINT --max-steps 8
    python tools/demo/image_demo.py street.png CONFIG CHECKPOINT --out-dir pictures
"""

import argparse
import itertools
import os.path as osp
import sys
from collections.abc import Iterator
from pathlib import Path

import mmcv
import numpy as np
from mmengine.config import Config
from rich.console import Console
from rich.progress import Progress

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

OUT_DIR = 'work_dirs/image_demo'


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('images', help='image file, or a folder of them')
    add_arguments(parser)
    parser.add_argument(
        '--out-dir',
        type=Path,
        help=f'where the pictures go (default for segmentation: {OUT_DIR})',
    )
    parser.add_argument(
        '--batch-size',
        type=int,
        default=1,
        help='images that are predicted at once, if of one size (default: %(default)s)',
    )
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        parser.error(f'--batch-size is {args.batch_size}; it has to be at least 1')
    check_arguments(parser, args)
    return args


def find_images(path: str) -> list[Path]:
    """The image itself, or those of a folder in natural order."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        fail(f'the image or folder {str(path)!r} does not exist.')
    paths = [p for group in sequences(path).values() for p in group]
    if not paths:
        fail(f'the folder {str(path)!r} has no images ({", ".join(IMAGES)}).')
    return paths


def picture_paths(paths: list[Path], out_dir: Path) -> list[Path]:
    """A file for each picture, none of which is an image or another's."""
    stems = [path.stem for path in paths]
    found = [
        out_dir / f'{p.stem if stems.count(p.stem) == 1 else p.name}.png' for p in paths
    ]
    own = {path.resolve() for path in paths}
    for path in found:
        if path.resolve() in own:
            fail(
                f'the picture would replace the image {str(path)!r}: give another '
                'folder with --out-dir.'
            )
    return found


def read_image(path: Path) -> np.ndarray:
    """Read an image, (H, W, 3), uint8, BGR."""
    image = mmcv.imread(str(path))
    if image is None:
        fail(f'the image {str(path)!r} cannot be read: it is damaged, or no image.')
    return image


def batches(cfg: Config, paths: list[Path], size: int) -> Iterator[tuple]:
    """Yield images (BGR) and their batch for the model, all of one size.

    At most ``size`` at once, fewer where the next image has another size after the
    pipeline: padded to that of its neighbours it would be predicted differently.
    """
    for begin in range(0, len(paths), size):
        part = paths[begin : begin + size]
        images = [read_image(path) for path in part]
        batch = load_images(cfg, part)
        for _, run in itertools.groupby(
            range(len(part)), key=lambda i: batch['inputs'][i].shape
        ):
            run = list(run)
            picked = {k: [values[i] for i in run] for k, values in batch.items()}
            yield [images[i] for i in run], picked


def main(argv=None) -> None:
    args = parse_args(argv)
    paths = find_images(args.images)
    cfg = read_model_config(args)
    if args.out_dir is None and cfg.default_scope == 'mmseg':
        args.out_dir = Path(OUT_DIR)
    pictures = picture_paths(paths, args.out_dir) if args.out_dir else None
    console = Console(soft_wrap=True, highlight=False)
    try:
        if pictures:
            args.out_dir.mkdir(parents=True, exist_ok=True)
        model = build_model(args, cfg)
        painter = Painter(model, cfg, args.opacity)
        done = 0
        with Progress(
            console=console, transient=True, disable=not console.is_terminal
        ) as progress:
            task = progress.add_task('images', total=len(paths))
            for images, batch in batches(cfg, paths, args.batch_size):
                for image, sample in zip(images, predict(model, batch), strict=True):
                    told = [painter.words(sample), describe(sample)]
                    told = '; '.join(filter(None, told))
                    console.print(f'{paths[done]}: {told}', markup=False)
                    if pictures:
                        picture = painter.picture(image, sample)
                        mmcv.imwrite(picture, str(pictures[done]))
                    done += 1
                progress.advance(task, len(images))
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        fail(str(error))
    if pictures:
        shown = pictures[0] if done == 1 else f'{done} pictures in {args.out_dir}'
        console.print(f'{shown}', markup=False)


if __name__ == '__main__':
    main()
