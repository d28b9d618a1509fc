"""Draw images of a data set with their labels, before and after the pipeline.

Takes any config of mmpretrain or mmseg, and draws with the toolbox's own visualizer:
a caption for the class of an image, an overlay for the labels of its pixels. The
images are taken evenly from the whole data set, and small ones are enlarged without
smoothing. What the data preprocessor does, such as normalising, comes afterwards and
is not seen.

Example:
    python tools/misc/browse_dataset.py CONFIG --output-dir pictures --number 20
"""

import argparse
import os.path as osp
import sys
import tempfile
from copy import deepcopy
from pathlib import Path

import mmcv
import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS, VISUALIZERS, init_default_scope
from mmengine.runner import set_random_seed
from mmengine.structures import PixelData
from rich.console import Console
from rich.progress import track

sys.path.insert(0, osp.dirname(osp.dirname(osp.abspath(__file__))))
from common import check_data_roots, fail, iter_datasets, read_config, set_data_root
from options import add_config_options

from mdeq_mm.registry import name_of
from mdeq_mm.tasks import SCOPES

#: Of what each toolbox draws with, where a config does not say.
VISUALIZER = dict(mmpretrain='UniversalVisualizer', mmseg='SegLocalVisualizer')
#: Pixels that the shorter side of a picture has at least.
LEAST = 256
GAP = 8


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--output-dir', required=True, metavar='DIR', help='where the pictures go'
    )
    parser.add_argument(
        '--phase',
        choices=['train', 'val', 'test'],
        default='train',
        help='whose data loader (default: %(default)s)',
    )
    parser.add_argument(
        '--number', type=int, default=10, help='pictures (default: %(default)s)'
    )
    parser.add_argument(
        '--mode',
        choices=['original', 'transformed', 'both'],
        default='both',
        help='as they are in their files, as the pipeline hands them on, or both side '
        'by side (default: %(default)s)',
    )
    parser.add_argument(
        '--seed', type=int, default=0, help='of random steps (default: %(default)s)'
    )
    parser.add_argument('--data-root', metavar='DIR', help='folder of the data set')
    add_config_options(parser)
    args = parser.parse_args(argv)
    if args.number < 1:
        parser.error(f'--number is {args.number}; it has to be at least 1')
    return args


def parts_of(cfg, field):
    """The data sets of a loader that are drawn each by itself.

    Args:
        cfg (Config): Of mmpretrain or mmseg.
        field (str): Such as ``'train_dataloader'``.

    Returns:
        dict[str, tuple[str, dict]]: Scope and config of each by its task, or by
        ``''`` where it is the only one.
    """
    dataset = cfg[field].dataset
    tasks = dataset.get('datasets')
    if not isinstance(tasks, dict):
        return {'': (cfg.get('default_scope', 'mmengine'), dataset)}
    return {task: (SCOPES[task], part) for task, part in tasks.items()}


def without_steps(dataset):
    """A config of a data set whose images stay as they are in their files."""
    dataset = deepcopy(dataset)
    loader = ConfigDict(loader=dict(dataset=dataset))
    for _, part in iter_datasets(loader, ['loader']):
        part['pipeline'] = [
            step
            for step in part.get('pipeline', [])
            if name_of(step['type']).startswith(('Load', 'Pack'))
        ]
    return dataset


def pixels_of(inputs):
    """An image as visualizers take it.

    Args:
        inputs (Tensor): What a pipeline hands on: (1 or 3, H, W), blue first.

    Returns:
        np.ndarray: uint8, (H, W, 3), red first.
    """
    if not isinstance(inputs, torch.Tensor) or inputs.ndim != 3:
        raise ValueError('the pipeline gives several images a sample, not one')
    if inputs.shape[0] not in (1, 3):
        raise ValueError(
            f'images of {inputs.shape[0]} channels cannot be drawn, only of 1 or 3'
        )
    image = inputs.permute(1, 2, 0).numpy()
    if image.dtype != np.uint8:
        low, high = float(image.min()), float(image.max())
        if low < 0 or high > 255 or high <= 1:
            # Normalised by the pipeline.
            image = (image - low) * (255 / max(high - low, 1e-12))
        image = image.round().astype(np.uint8)
    image = image if image.shape[2] == 3 else image.repeat(3, axis=2)
    return np.ascontiguousarray(image[..., ::-1])


def enlarged(array, factor):
    """Each pixel of an array (H, W, ...) as a square of ``factor`` pixels a side."""
    return array.repeat(factor, axis=0).repeat(factor, axis=1)


def draw(visualizer, item, path):
    """Draw an item of a data set into a file.

    Args:
        visualizer (Visualizer): Of mmpretrain or mmseg.
        item (dict): ``inputs`` and ``data_samples``.
        path (str): The file.
    """
    image, sample = pixels_of(item['inputs']), item['data_samples']
    factor = -(-LEAST // min(image.shape[:2]))
    image = enlarged(image, factor)
    if hasattr(visualizer, 'visualize_cls'):
        visualizer.visualize_cls(image, sample, draw_pred=False, out_file=path)
        return
    sample = sample.clone()
    if 'gt_sem_seg' in sample:
        labels = sample.gt_sem_seg.data.numpy().squeeze(0)
        # Images are resized and labels are not, where predictions are compared at
        # full size.
        if labels.shape != tuple(item['inputs'].shape[1:]):
            image = mmcv.imresize(image, labels.shape[::-1])
            factor = 1
        labels = torch.from_numpy(enlarged(labels, factor))
        del sample.gt_sem_seg
        sample.gt_sem_seg = PixelData(data=labels[None])
    visualizer.add_datasample(
        '', image, sample, draw_pred=False, show=False, out_file=path
    )


def side_by_side(paths):
    """Pictures from left to right, on white."""
    images = [mmcv.imread(path) for path in paths]
    height = max(image.shape[0] for image in images)
    width = sum(image.shape[1] + GAP for image in images) - GAP
    out = np.full((height, width, 3), 255, np.uint8)
    left = 0
    for image in images:
        out[: image.shape[0], left : left + image.shape[1]] = image
        left += image.shape[1] + GAP
    return out


def build_visualizer(scope, cfg, metainfo):
    """A visualizer that knows the classes of a data set."""
    arguments = dict(cfg, vis_backends=None)
    with VISUALIZERS.switch_scope_and_registry(scope) as registry:
        # Not built by the registry, which keeps one of each name for ever.
        cls = registry.get(arguments.pop('type'))
    arguments.pop('name', None)
    visualizer = cls(**arguments)
    visualizer.dataset_meta = dict(metainfo)
    return visualizer


def browse(scope, cfg, visualizer, mode, number, folder, prefix=''):
    """Draw images of a data set.

    Args:
        scope (str): Of the toolbox.
        cfg (dict): Of the data set.
        visualizer (dict): Config of the visualizer.
        mode (str): ``'original'``, ``'transformed'`` or ``'both'``.
        number (int): Most of the pictures.
        folder (Path): Where they go.
        prefix (str): What their names begin with.

    Returns:
        int: Number of pictures.
    """
    kinds = dict(original=without_steps(cfg), transformed=cfg)
    chosen = list(kinds) if mode == 'both' else [mode]
    init_default_scope(scope)
    datasets = [DATASETS.build(deepcopy(kinds[kind])) for kind in chosen]
    painter = build_visualizer(scope, visualizer, datasets[0].metainfo)
    length = len(datasets[0])
    if length == 0:
        raise ValueError(f'the data set has no images in {cfg.get("data_root")!r}')
    indices = np.linspace(0, length - 1, min(number, length)).round().astype(int)
    with tempfile.TemporaryDirectory() as temporary:
        paths = [osp.join(temporary, f'{kind}.png') for kind in chosen]
        for index in track(indices, 'Drawing', console=Console(stderr=True)):
            for dataset, path in zip(datasets, paths, strict=True):
                item = dataset[int(index)]
                draw(painter, item, path)
            # Data sets of arrays have no files.
            stem = Path(item['data_samples'].get('img_path') or '').stem
            name = '_'.join(filter(None, (prefix, f'{index:06d}', stem)))
            mmcv.imwrite(side_by_side(paths), str(folder / f'{name}.png'))
    return len(indices)


def main(argv=None) -> None:
    args = parse_args(argv)
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        fail(f'--output-dir {args.output_dir!r} is a file; name a folder.')
    cfg = read_config(args.config, args.cfg_options)
    field = f'{args.phase}_dataloader'
    if not cfg.get(field):
        fail(f'{args.config!r} has no {field}; choose another --phase.')
    if args.data_root is not None:
        set_data_root(cfg, args.data_root)
    # The toolboxes warn where the data sets of joint training change the scope.
    MMLogger.get_current_instance().setLevel('ERROR')
    default = cfg.get('default_scope', 'mmengine')
    init_default_scope(default)
    check_data_roots(cfg, [field])
    drawn = 0
    for task, (scope, part) in parts_of(cfg, field).items():
        if scope not in VISUALIZER:
            fail(f'default_scope={scope!r} is not one of {", ".join(VISUALIZER)}.')
        visualizer = cfg.get('visualizer') if scope == default else None
        visualizer = dict(visualizer or dict(type=VISUALIZER[scope]))
        if scope == 'mmseg':
            # At mmseg's own 0.8 little is seen of the image.
            visualizer.setdefault('alpha', 0.5)
        if part.get('pipeline') and 'dataset' in part and args.mode != 'transformed':
            fail(
                f'{field}.dataset.type={part.type!r} has a pipeline that mixes images, '
                'of which no single one is the original: use --mode transformed.'
            )
        set_random_seed(args.seed)
        try:
            drawn += browse(
                scope, part, visualizer, args.mode, args.number, folder, task
            )
        except (OSError, RuntimeError, ValueError) as error:
            fail(f'{field} cannot be drawn: {error}')
    print(f'Pictures of {drawn} images are in {folder}')


if __name__ == '__main__':
    main()
