r"""Draw what in an image speaks for a class, at each resolution of the equilibrium.

Class activation maps of a classifier or a segmentation model, by the library grad-cam:
by default of every branch of the backbone, so that one sees what each resolution of an
MDEQ contributes. Each map is scaled by itself. For segmentation the map speaks for
all pixels that are predicted as the class; they are outlined.

Layers in front of the equilibrium can be looked at too: the gradient passes through it
as the config's gradient says. Layers inside f cannot: f is evaluated many times.

Needs: python -m pip install --no-deps -r requirements/visualization.txt

Examples:
    python tools/analysis_tools/vis_cam.py 3.png CONFIG CHECKPOINT
    python tools/analysis_tools/vis_cam.py street.png CONFIG CHECKPOINT \
        --category Pedestrian --target-layers backbone.injection.0 backbone
"""

import argparse
import difflib
import importlib
import math
import os.path as osp
import sys
from pathlib import Path

import mmcv
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

sys.path.insert(0, osp.dirname(osp.dirname(osp.abspath(__file__))))
from common import check_checkpoint_path, fail, find_weights, read_config
from options import add_model_options

from mdeq_mm.apis.inference import load_image, load_model
from mdeq_mm.implicit import EquilibriumLayer

METHODS = (
    'GradCAM',
    'GradCAMPlusPlus',
    'HiResCAM',
    'LayerCAM',
    'XGradCAM',
    'EigenGradCAM',
    'EigenCAM',
)
OUT_DIR = 'work_dirs/vis_cam'
#: Inches of a picture's shorter side, and most pictures in a row.
SIDE, COLUMNS = 2.4, 6


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('image', help='image file')
    parser.add_argument('config', help='config file, or the name of a model')
    parser.add_argument(
        'checkpoint',
        nargs='?',
        help='checkpoint file (default: the weights of a named model)',
    )
    parser.add_argument(
        '--category',
        metavar='CLASS',
        help='name or number of a class (default: the predicted one, for segmentation '
        'that of most pixels)',
    )
    parser.add_argument(
        '--target-layers',
        nargs='+',
        metavar='NAME',
        default=['backbone'],
        help='modules of the model whose maps are drawn, such as backbone.stem, '
        'backbone.injection.0 or neck.0.final (default: backbone)',
    )
    parser.add_argument(
        '--method',
        choices=METHODS,
        default='GradCAM',
        help='of grad-cam (default: %(default)s)',
    )
    parser.add_argument(
        '--out-file', metavar='FILE', help=f'picture (default: {OUT_DIR}/<image>.png)'
    )
    add_model_options(parser)
    return parser.parse_args(argv)


def load_library():
    """The package of grad-cam."""
    try:
        return importlib.import_module('pytorch_grad_cam')
    except ImportError as error:
        fail(
            f'grad-cam cannot be imported ({error}): run "python -m pip install '
            '--no-deps -r requirements/visualization.txt" and "python -m pip install '
            '-r requirements/demo.txt".'
        )


def find_layers(model, names):
    """Modules of a model by their names.

    Args:
        model (nn.Module): The model.
        names (Sequence[str]): As ``named_modules`` has them.

    Returns:
        dict[str, nn.Module]: In the order of ``names``.

    Raises:
        ValueError: If there is no such module, or it lies inside f.
    """
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules or not name:
            close = difflib.get_close_matches(name, modules, n=3, cutoff=0.4)
            said = f'did you mean {" or ".join(close)}?' if close else 'use backbone'
            raise ValueError(f'the model has no layer {name!r}: {said}')
        for outer, module in modules.items():
            if isinstance(module, EquilibriumLayer) and name.startswith(f'{outer}.'):
                raise ValueError(
                    f'the layer {name!r} lies inside f, which is evaluated many times: '
                    'use backbone for the equilibrium, or backbone.injection.0 for '
                    'what it is given'
                )
    return {name: modules[name] for name in names}


def outputs_of(model, inputs, layers):
    """Logits of a model, and what some layers give.

    Args:
        model (nn.Module): In evaluation mode.
        inputs (Tensor): (1, C, H, W), normalised.
        layers (dict[str, nn.Module]): By name.

    Returns:
        tuple[Tensor, dict]: Logits (1, K) or (1, K, h, w), and outputs by name.

    Raises:
        ValueError: If the model has several results, or a layer gives no maps.
    """
    found = {}

    def keep(name):
        return lambda module, args, output: found.__setitem__(name, output)

    handles = [m.register_forward_hook(keep(k)) for k, m in layers.items()]
    try:
        with torch.no_grad():
            logits = model(inputs, mode='tensor')
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(logits, torch.Tensor):
        raise ValueError(
            f'the model gives {len(logits)} results: use one of a single task'
        )
    for name in layers:
        maps = _as_list(found.get(name))
        if not maps or any(getattr(m, 'ndim', 0) != 4 for m in maps):
            raise ValueError(
                f'the layer {name!r} gives no maps (N, C, H, W) when the model '
                'predicts: use another one, such as backbone'
            )
    return logits, found


def _as_list(output):
    return list(output) if isinstance(output, list | tuple) else [output]


def find_category(logits, classes, wanted=None):
    """The class to speak for, and the pixels that are predicted as it.

    Args:
        logits (Tensor): (1, K) or (1, K, h, w).
        classes (Sequence[str]): Names, as far as they are known.
        wanted (str, optional): A name or a number. Default: the predicted class.

    Returns:
        tuple[int, Tensor | None]: Its number, and a mask (h, w) for segmentation.

    Raises:
        ValueError: If there is no such class, or no pixel of it.
    """
    labels = logits[0].argmax(0)
    if wanted is None:
        category = int(labels.flatten().mode().values)
    elif wanted in classes:
        category = list(classes).index(wanted)
    elif wanted.isdecimal() and int(wanted) < logits.shape[1]:
        category = int(wanted)
    else:
        said = ', '.join(classes[:20]) + ', …' * (len(classes) > 20)
        raise ValueError(
            f'--category {wanted!r} is no class: use a number below {logits.shape[1]}'
            + (f', or one of {said}' if classes else '')
        )
    if logits.ndim == 2:
        return category, None
    mask = labels == category
    if not mask.any():
        others = [name_of(int(i), classes) for i in labels.unique()]
        raise ValueError(
            f'no pixel is predicted as {name_of(category, classes)}, only as '
            f'{", ".join(others)}: give one of these with --category'
        )
    return category, mask


def name_of(category, classes):
    return str(classes[category]) if category < len(classes) else f'class {category}'


def cams_of(cam_class, model, inputs, layer, output, target):
    """Class activation maps of each map that a layer gives.

    The layer is not evaluated again: with what it gave, the maps of an equilibrium
    take no second solve. Each takes a run by itself, because grad-cam counts on
    gradients that come in the order of the layers, and those of branches do not.

    Args:
        cam_class (type): Of grad-cam.
        model (nn.Module): In evaluation mode.
        inputs (Tensor): (1, C, H, W), normalised.
        layer (nn.Module): One of the model's.
        output (Tensor | Sequence[Tensor]): What it gave.
        target (Callable): From the logits of an image (K, ...) to a number.

    Returns:
        list[np.ndarray]: (H, W) each, from 0 to 1.
    """
    found = []
    maps = _as_list(output)
    for index, chosen in enumerate(maps):
        tap = nn.Identity()

        def forward(*args, index=index, chosen=chosen, tap=tap, **kwargs):
            given = [*maps]
            given[index] = tap(chosen.detach().requires_grad_())
            return type(output)(given) if output is not chosen else given[0]

        layer.forward = forward
        try:
            cam = cam_class(model, [tap])
            found.append(cam(inputs, [target])[0])
            cam.activations_and_grads.release()
        finally:
            del layer.forward
    return found


def pixels_of(image):
    """An image (1 or 3, H, W), blue first, as (H, W, 3) from 0 to 1, red first."""
    image = image.cpu().numpy().astype(np.float32).transpose(1, 2, 0)
    low, high = image.min(), image.max()
    if low < 0 or high > 255 or high <= 1:
        # Normalised by the pipeline.
        image = (image - low) * (255 / max(high - low, 1e-12))
    image = image if image.shape[2] == 3 else image[..., :1].repeat(3, axis=2)
    return np.ascontiguousarray(image[..., ::-1]) / 255


def figure_of(panels, title, mask=None):
    """A figure of pictures by their captions; the pixels of a mask are outlined."""
    height, width = next(iter(panels.values())).shape[:2]
    columns = min(len(panels), COLUMNS)
    rows = math.ceil(len(panels) / columns)
    scale = SIDE / min(height, width)
    figure = Figure((columns * width * scale, rows * (height * scale + 0.3) + 0.4))
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    for axis, (caption, picture) in zip(axes, panels.items(), strict=False):
        axis.imshow(picture, interpolation='nearest')
        axis.set_title(caption, fontsize=9)
        if mask is not None and not mask.all():
            axis.contour(mask, [0.5], colors='white', linewidths=1)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    return figure


def draw(library, args, cfg):
    """Find the maps of an image and put them into a figure.

    Args:
        library (module): grad-cam.
        args (argparse.Namespace): Of the command line.
        cfg (Config): Of mmpretrain or mmseg.

    Returns:
        Figure: The image, and each map over it.
    """
    model = load_model(cfg, args.checkpoint, args.device)
    layers = find_layers(model, args.target_layers)
    # Gradients begin at the layer that is looked at.
    model.requires_grad_(False)
    batch = load_image(cfg, args.image)
    image = pixels_of(batch['inputs'][0])
    inputs = model.data_preprocessor(batch, False)['inputs']
    logits, outputs = outputs_of(model, inputs, layers)
    classes = list(model.dataset_meta.get('classes') or [])
    category, mask = find_category(logits, classes, args.category)

    def target(output):
        score = output[category]
        return score if mask is None else (score * mask).sum()

    # Batches are padded below and on the right.
    height, width = image.shape[:2]
    panels = {'image': image}
    cams = []
    for name, layer in layers.items():
        parts = _as_list(outputs[name])
        found = cams_of(
            getattr(library, args.method), model, inputs, layer, outputs[name], target
        )
        for i, (part, cam) in enumerate(zip(parts, found, strict=True)):
            cams.append(cam[:height, :width])
            caption = f'{name}[{i}]' if len(parts) > 1 else name
            caption += f', {part.shape[2]}×{part.shape[3]}'
            panels[caption] = overlay(library, image, cams[-1])
    if len(cams) > 1:
        panels['mean'] = overlay(library, image, np.mean(cams, axis=0))
    title = f'{args.method} for {name_of(category, classes)}'
    if mask is None:
        title += f' (probability {100 * logits.softmax(1)[0, category]:.0f} %)'
    else:
        mask = mmcv.imresize(
            mask.cpu().numpy().astype(np.uint8),
            inputs.shape[:1:-1],
            interpolation='nearest',
        )[:height, :width]
    return figure_of(panels, title, mask)


def overlay(library, image, cam):
    draw = library.utils.image.show_cam_on_image
    return draw(image, cam.astype(np.float32), use_rgb=True)


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.checkpoint is not None:
        check_checkpoint_path(args.checkpoint)
    if not osp.isfile(args.image):
        fail(f'the image {args.image!r} does not exist.')
    cfg = read_config(args.config, args.cfg_options)
    if not cfg.get('test_dataloader'):
        fail(f'{args.config!r} has no test_dataloader, whose pipeline the image takes.')
    args.checkpoint = find_weights(args.config, args.checkpoint)
    if args.checkpoint is None:
        fail('a checkpoint is needed: random weights look at nothing.')
    library = load_library()
    try:
        figure = draw(library, args, cfg)
    except (OSError, RuntimeError, ValueError) as error:
        fail(str(error))
    path = Path(args.out_file or f'{OUT_DIR}/{Path(args.image).stem}.png')
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(path)


if __name__ == '__main__':
    main()
