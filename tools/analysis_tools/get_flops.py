"""Count the parameters and floating-point operations of a model, part by part.

Takes any config of mmpretrain or mmseg. For an MDEQ it tells apart the stem (with the
injection), one evaluation of f, all evaluations of a solve, and what follows the
backbone. Nothing is computed: the model runs on tensors without content, so that it
takes seconds on any machine, and a solve is counted at its limit of evaluations.

Convolutions and matrix products are counted, a multiplication and an addition as two;
norms and activations are not.

Examples:
    python tools/analysis_tools/get_flops.py configs/demo/mdeq_1xb64-30e_digits.py
    python tools/analysis_tools/get_flops.py CONFIG --shape 1024 2048 --steps 10
"""

import argparse
import json
import os.path as osp
import sys
import warnings
from pathlib import Path

import torch
from mmengine.logging import MMLogger
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, osp.dirname(osp.dirname(osp.abspath(__file__))))
sys.path.insert(1, osp.join(sys.path[0], 'analysis_tools'))
from common import fail, iter_datasets, read_config
from contentless import without_content
from options import add_config_options

from mdeq_mm.apis.inference import load_model
from mdeq_mm.registry import name_of


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--shape',
        type=int,
        nargs='+',
        metavar=('HEIGHT', 'WIDTH'),
        help='size of the image; one number for a square (default: the crop size of '
        'the training)',
    )
    parser.add_argument(
        '--steps',
        type=int,
        help='evaluations of f (default: the limit of the evaluation solver)',
    )
    parser.add_argument('--json', metavar='FILE', help='write the figures there too')
    add_config_options(parser)
    args = parser.parse_args(argv)
    if args.shape is not None:
        if len(args.shape) > 2:
            parser.error(f'--shape has {len(args.shape)} numbers; give HEIGHT WIDTH')
        if min(args.shape) < 1:
            parser.error(f'--shape has {min(args.shape)}; it has to be at least 1')
    if args.steps is not None and args.steps < 1:
        parser.error(f'--steps is {args.steps}; it has to be at least 1')
    return args


def training_size(cfg):
    """Height and width of the images of the training, as its pipeline says.

    Args:
        cfg (Config): Of mmpretrain or mmseg.

    Returns:
        tuple[int, int] | None: None where the pipeline does not set the size.
    """
    sizes = []
    for _, dataset in iter_datasets(cfg, ['train_dataloader']):
        for step in dataset.get('pipeline', []):
            kind = name_of(step['type'])
            if not kind.endswith(('Crop', 'Resize')):
                continue
            size = step.get('crop_size', step.get('scale'))
            if isinstance(size, int):
                sizes.append((size, size))
            elif size is not None and kind.endswith('Crop'):
                sizes.append(tuple(size))
            elif size is not None and kind == 'Resize':
                # A width and a height, or only their limits.
                if not step.get('keep_ratio'):
                    sizes.append(tuple(size)[::-1])
    return sizes[-1] if sizes else None


def image_channels(model):
    """Channels of the images that a model takes, from its first convolution."""
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            return module.in_channels
    return 3


def parameters_of(module):
    return sum(p.numel() for p in module.parameters())


def operations_of(model, size):
    """Operations of an inference of one image.

    Args:
        model (nn.Module): In evaluation mode.
        size (Sequence[int]): Channels, height and width.

    Returns:
        dict[str, int]: Of each part of the model by its name, and of all, ``''``.
    """
    found = {}
    fake, answers = without_content()
    with fake, answers, torch.no_grad(), FlopCounterMode(display=False) as counter:

        def counting(name, forward):
            def counted(*args, **kwargs):
                before = counter.get_total_flops()
                out = forward(*args, **kwargs)
                found[name] += counter.get_total_flops() - before
                return out

            return counted

        parts = dict(model.named_children())
        for name, part in parts.items():
            found[name] = 0
            # Not a hook: mmseg calls its heads' forward themselves.
            part.forward = counting(name, part.forward)
        try:
            model(torch.zeros(1, *size), mode='tensor')
        finally:
            for part in parts.values():
                del part.forward
    return found | {'': counter.get_total_flops()}


def parts_of(model, size, steps=None):
    """What the parts of a model cost.

    Args:
        model (nn.Module): In evaluation mode, on the CPU.
        size (Sequence[int]): Channels, height and width of an image.
        steps (int, optional): Evaluations of f of an MDEQ. Default: the limit of the
            evaluation solver.

    Returns:
        dict[str, tuple[int | None, int]]: Parameters and operations by the name of a
        part; ``whole`` is the last.
    """
    backbone = getattr(model, 'backbone', None)
    layer = getattr(backbone, 'equilibrium', None)
    if layer is not None:
        steps = steps or layer.eval_solver.max_steps
        # Each costs the same.
        layer.eval_solver.max_steps = 1
    found = operations_of(model, size)
    whole = found.pop('')
    parts = {}
    for name, module in model.named_children():
        if module is not backbone or layer is None:
            count = parameters_of(module)
            # What has neither, such as the preprocessor, is no news. Auxiliary heads
            # have parameters alone.
            if count or found[name]:
                parts[name] = count, found[name]
            continue
        fake, answers = without_content()
        with fake, answers:
            flops = backbone.get_flops(tuple(size), steps)
        inside = parameters_of(layer)
        parts['stem and injection'] = parameters_of(module) - inside, flops['stem']
        parts['one evaluation of f'] = inside, flops['function']
        parts[f'{steps} evaluations'] = None, flops['solve']
        whole += (steps - 1) * flops['function']
    parts['whole'] = parameters_of(model), whole
    return parts


def figure(value):
    """A number with three digits and its unit."""
    for unit, name in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
        if value >= unit:
            return f'{value / unit:#.3g}'.rstrip('.') + f' {name}'
    return str(value)


def table_of(parts, size):
    table = Table(
        title=f'{size[1]}×{size[2]} pixels, {size[0]} channel{"s" * (size[0] > 1)}'
    )
    table.add_column('part')
    for name in ('parameters', 'FLOP'):
        table.add_column(name, justify='right', no_wrap=True)
    for name, (count, flops) in parts.items():
        if name == 'whole':
            table.add_section()
        table.add_row(name, '' if count is None else f'{count:,}', figure(flops))
    return table


def main(argv=None) -> None:
    args = parse_args(argv)
    cfg = read_config(args.config, args.cfg_options)
    if not cfg.get('model'):
        fail(f'{args.config!r} has no model.')
    shape = args.shape or training_size(cfg)
    if shape is None:
        fail(
            f'the training pipeline of {args.config!r} sets no size: give it with '
            '--shape HEIGHT WIDTH.'
        )
    # What the toolboxes say while they build a model is not what was asked for.
    warnings.filterwarnings('ignore', module='mm')
    MMLogger.get_current_instance().setLevel('ERROR')
    try:
        model = load_model(cfg, device='cpu')
        layer = getattr(getattr(model, 'backbone', None), 'equilibrium', None)
        if args.steps and layer is None:
            fail(f'--steps is for models with an MDEQ, which {args.config!r} is not.')
        size = (image_channels(model), shape[0], shape[-1])
        parts = parts_of(model, size, args.steps)
    except (OSError, RuntimeError, ValueError) as error:
        fail(str(error))
    Console().print(table_of(parts, size))
    if args.json:
        figures = {k: dict(parameters=n, flops=m) for k, (n, m) in parts.items()}
        text = json.dumps(dict(size=size, parts=figures), indent=2)
        Path(args.json).write_text(text + '\n')
        print(args.json)


if __name__ == '__main__':
    main()
