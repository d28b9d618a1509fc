r"""Export a model as ONNX or as a program of torch.export, check it and time it.

The equilibrium is sought with a fixed number of evaluations of f, by Anderson
acceleration or the plain (Picard) iteration, without control flow that depends on
data: one step, of which an ONNX file holds one copy, in a Loop of fixed length. Each
sample keeps its best iterate, as in PyTorch at a tolerance of 0. Models without
equilibrium are exported as they are.

Input: images (N, C, H, W), float32, as after the data preprocessor, or 0 to 255 with
--with-preprocessing. Outputs: scores (N, classes), the softmax, of a classifier;
logits (N, classes, H, W) of a segmentor, at the size of the images; with --residual
also residual (N,), by which a device knows whether a sample converged. N is open
unless --batch fixes it, H and W are fixed: several --size write a file each.

The file is then run beside PyTorch with the same evaluations; where an output differs
by more than 1e-4, it stays under a name that ends in .unverified.onnx
(or .pt2) and the exit status is 1.

Example:
    python tools/deployment/export.py CONFIG CHECKPOINT --out model.onnx --residual
    python tools/deployment/export.py CONFIG CHECKPOINT --out model.pt2 --steps 12
"""

import argparse
import json
import os.path as osp
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from mmengine.config import DictAction
from rich.console import Console
from rich.table import Table

sys.path.insert(0, osp.dirname(osp.dirname(osp.abspath(__file__))))
sys.path.insert(0, osp.dirname(osp.abspath(__file__)))
from common import check_checkpoint_path, fail, find_weights, read_config
from exporting.about import build_resnet50, metadata_of
from exporting.images import find_images, size_of
from exporting.running import File, agreement, differences, latencies, reference

from mdeq_mm.apis.inference import load_model
from mdeq_mm.deployment import (
    DeployableModel,
    save_program,
    to_onnx,
    trace,
    write_onnx,
)
from mdeq_mm.deployment.onnx_file import check_opset, require

# What tracing says of code that is not ours.
warnings.filterwarnings('ignore', module=r'torch\.|copyreg|onnxscript|onnx_ir')

SUFFIXES = dict(onnx='.onnx', torch='.pt2')
#: Largest difference of a number, and of the largest one, between file and PyTorch.
TOLERANCE, RELATIVE = 1e-4, 1e-2
PRECISIONS = dict(float32=torch.float32, float64=torch.float64)
#: Columns where the output goes to a file.
FILE_WIDTH = 120


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('config', help='config file of a classifier or segmentor, or the name of a '
        'model')  # fmt: skip
    add('checkpoint', nargs='?', help='checkpoint file (default: the published weights '
        'of a named model; random ones where there are none, for sizes and times)',
    )  # fmt: skip
    add('--out', required=True, metavar='FILE', help='what to write: .onnx or .pt2')
    add('--format', choices=list(SUFFIXES), help='onnx, or torch for torch.export '
        '(default: as FILE ends)')  # fmt: skip
    add('--size', nargs=2, type=int, action='append', metavar=('H', 'W'),
        help='of the images; several times for several files, FILE_HxW each '
        "(default: the test pipeline's)")  # fmt: skip
    add('--batch', type=int, metavar='N', help='fix the number of images (default: '
        'any number)')  # fmt: skip
    add('--opset', type=int, help="version of ONNX's operators (default: the "
        "exporter's)")  # fmt: skip
    add('--steps', type=int, metavar='K', help='evaluations of f (default: the '
        "config's limit in evaluation)")  # fmt: skip
    add('--solver', choices=['anderson', 'picard'], help="(default: the config's in "
        'evaluation; anderson in place of Broyden)')  # fmt: skip
    add('--precision', choices=list(PRECISIONS), default='float64', help='of '
        "Anderson's systems of 5 equations; float32 for devices without the other "
        '(default: %(default)s)')  # fmt: skip
    add('--unroll', action='store_true', help='write the steps one after the other, '
        'for what cannot run the Loop of ONNX; slow to load')  # fmt: skip
    add('--residual', action='store_true', help='make the residual an output')
    add('--with-preprocessing', action='store_true', help='take images of 0 to 255 and '
        'normalise them in the graph')  # fmt: skip
    add('--verify', metavar='IMAGES', help='folder of images to check with (default: '
        'the test set where it is there, else random numbers)')  # fmt: skip
    add('--images', type=int, default=4, help='how many of them (default: %(default)s)')
    add('--peer', default='resnet50', metavar='CONFIG', help='model to compare '
        "with, resnet50 is mmpretrain's, none is none (default: %(default)s)",
    )  # fmt: skip
    add('--runs', type=int, default=10, help='timed ones, 0 for none; the median '
        'counts (default: %(default)s)')  # fmt: skip
    add('--threads', type=int, default=1, help='of timed runs on a CPU (default: '
        '%(default)s)')  # fmt: skip
    add('--device', default='cpu', help='of PyTorch, and of a .pt2 file; ONNX files '
        'run on the CPU here (default: %(default)s)')  # fmt: skip
    add('--json', metavar='FILE', help='write the figures there too')
    add('--overwrite', action='store_true', help='replace files that are there')
    add('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE',
        help='override settings of the config')  # fmt: skip
    args = parser.parse_args(argv)
    for name, least in dict(batch=1, steps=1, images=1, runs=0, threads=1).items():
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f'--{name} is {value}; it has to be at least {least}')
    suffix = Path(args.out).suffix
    if args.format is None:
        found = [form for form, ending in SUFFIXES.items() if ending == suffix]
        if not found:
            parser.error(
                f'--out {args.out!r} ends in neither .onnx nor .pt2: give --format too'
            )
        (args.format,) = found
    elif suffix != SUFFIXES[args.format]:
        parser.error(
            f'--out {args.out!r} does not end in {SUFFIXES[args.format]}, as files of '
            f'--format {args.format} do'
        )
    if args.format == 'torch' and args.opset is not None:
        parser.error('--opset is of ONNX files: leave it out for a .pt2 file')
    if args.format == 'torch' and args.unroll:
        parser.error('--unroll is of ONNX files: the steps of a .pt2 file always are')
    return args


def targets(args, sizes):
    """The file of each size, none of which is there, unless it may be replaced."""
    out = Path(args.out)
    paths = {}
    for height, width in sizes:
        name = out.name
        if len(sizes) > 1:
            name = f'{out.stem}_{height}x{width}{out.suffix}'
        paths[height, width] = out.with_name(name)
    for path in paths.values():
        if path.exists() and not args.overwrite:
            fail(f'{path} is there already: give another --out, or --overwrite.')
    return paths


def export(args, deployable, shape, path, metadata):
    """Write the file of a model."""
    if args.format == 'onnx':
        file = to_onnx(deployable, shape, args.batch, args.opset, metadata, args.unroll)
        write_onnx(file, path)
    else:
        program = trace(deployable, shape, args.batch)
        save_program(program, path, metadata)


def open_file(args, path):
    return File(path, args.format, args.threads, args.device, args.batch)


def verify(args, cfg, model, deployable, shape):
    """What PyTorch makes of some images, to compare the file with.

    Returns:
        dict: ``images`` as the file takes them, ``words`` of what they are, and the
        outputs of the same evaluations (``fixed``) and of the config's own solver
        (``own``).
    """
    images, words = find_images(cfg, model, shape, args.images, args.verify)
    fixed = reference(model, images, deployable.solver)
    own = None if deployable.solver is None else reference(model, images)
    if deployable.mean is not None:
        images = images * deployable.std.cpu() + deployable.mean.cpu()
    return dict(images=images.numpy(), words=words, fixed=fixed, own=own)


def compare(file, names, expected):
    """The figures of a comparison; see :func:`verify`."""
    found = dict(zip(names, file.run(expected['images']), strict=True))
    off = differences(found, expected['fixed'])
    result = dict(
        images=expected['words'],
        difference={name: value for name, (value, _) in off.items()},
        largest={name: value for name, (_, value) in off.items()},
        same_labels=agreement(found, expected['fixed']),
        residual=None,
    )
    # Not NaN either.
    result['passed'] = all(
        value <= TOLERANCE and (name == 'residual' or value <= RELATIVE * largest)
        for name, (value, largest) in off.items()
    )
    if expected['own'] is not None:
        own, fixed = expected['own'], expected['fixed']
        result |= dict(
            residual=float(fixed['residual'].max()),
            same_labels_as_config=agreement(found, own),
            steps_of_config=float(own['steps'].mean()),
            residual_of_config=float(own['residual'].max()),
        )
    return result


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def figures(path, module, file):
    return dict(
        bytes=path.stat().st_size, parameters=parameters(module), loading_s=file.seconds
    )


def build_peer(args, cfg, model, channels):
    """The model to compare with and its name; None where there is none."""
    if args.peer == 'none':
        return None, None
    if args.peer != 'resnet50':
        peer = load_model(read_config(args.peer), None, args.device)
        return peer, Path(args.peer).stem
    head = getattr(model, 'head', None) or model.decode_head
    try:
        peer = build_resnet50(channels, head.num_classes)
    except ImportError:
        print('mmpretrain is not installed: there is no ResNet-50 to compare with.')
        return None, None
    return peer.to(args.device), 'ResNet-50'


def channels_of(model):
    """Channels of the images that a model takes."""
    found = getattr(model.backbone, 'in_channels', None)
    if isinstance(found, int):
        return found
    return next(p.shape[1] for p in model.parameters() if p.dim() == 4)


def table_of(result):
    """The figures of the files, with ratios to the peer."""
    table = Table(title=result['title'])
    table.add_column('model')
    for name in ('parameters, M', 'file, MB', 'loading, s', 'latency, ms'):
        table.add_column(name, justify='right')
    last = list(result['models'].values())[-1]
    several = len(result['models']) > 1

    def cell(row, key, scale, digits):
        value = row.get(key)
        if value is None:
            return '–'
        text = f'{value / scale:.{digits}f}'
        return f'{text} ({value / last[key]:.3g})' if several else text

    for name, row in result['models'].items():
        table.add_row(
            name,
            cell(row, 'parameters', 1e6, 2),
            cell(row, 'bytes', 1e6, 2),
            cell(row, 'loading_s', 1, 2),
            cell(row, 'latency_ms', 1, 1),
        )
    return table


def sentences(result):
    """What the comparison with PyTorch says, line by line."""
    check = result['check']
    for name, value in check['difference'].items():
        yield (
            f'{name}: differs from PyTorch with the same evaluations by {value:.1e} at '
            f'most, the largest number being {check["largest"][name]:.2g}'
        )
    if 'steps_of_config' in check:
        labels = ', '.join(
            f'{100 * share:.2f} % of the labels'
            + (' of pixels' if name == 'logits' else '')
            for name, share in check['same_labels_as_config'].items()
        )
        yield (
            f"the config's own solver takes {check['steps_of_config']:.1f} evaluations "
            f'(residual {check["residual_of_config"]:.1e}, here '
            f'{check["residual"]:.1e}) and gives {labels} alike'
        )
    yield f'compared on {check["images"]}'


def work(args, cfg, model, peer, size, path):
    """Export, compare and time a model at one size of images.

    Args:
        args (Namespace): The options.
        cfg (Config): Of the model.
        model (nn.Module): In evaluation mode.
        peer (tuple): Model and name, None where there is none.
        size (tuple[int, int]): Height and width.
        path (Path): The file.

    Returns:
        dict: What was found, for JSON.
    """
    shape = (channels_of(model), *size)
    deployable = DeployableModel(
        model,
        args.steps,
        args.solver,
        args.residual,
        args.with_preprocessing,
        PRECISIONS[args.precision],
    )
    # The model refuses images that are too small, before minutes of work.
    expected = verify(args, cfg, model, deployable, shape)
    metadata = metadata_of(cfg, model, deployable, shape, Path(args.config).name)
    # The suffix stays last: torch.export warns of others.
    draft = path.with_name(f'{path.stem}.unverified{path.suffix}')
    export(args, deployable, shape, draft, metadata)
    file = open_file(args, draft)
    check = compare(file, deployable.output_names, expected)
    if check['passed']:
        draft.replace(path)
    label = Path(args.config).stem
    batch = args.batch or 1
    runner = 'ONNX Runtime' if args.format == 'onnx' else 'torch.export'
    result = dict(
        title=f'{size[0]}x{size[1]} pixels, batch {batch}, {runner}, '
        f'{args.threads} thread' + ('s' if args.threads > 1 else ''),
        file=str(path if check['passed'] else draft),
        check=check,
        metadata=metadata,
        models={},
    )
    result['models'][label] = figures(Path(result['file']), deployable, file)
    if not check['passed']:
        return result
    files = {label: file}
    with tempfile.TemporaryDirectory() as folder:
        if peer[0] is not None:
            other = Path(folder, f'peer{path.suffix}')
            module = DeployableModel(peer[0])
            export(args, module, shape, other, {})
            files[peer[1]] = open_file(args, other)
            result['models'][peer[1]] = figures(other, module, files[peer[1]])
        if args.runs:
            for name, value in latencies(files, shape, args.runs).items():
                result['models'][name]['latency_ms'] = value
        files.clear()
    return result


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.checkpoint is not None:
        check_checkpoint_path(args.checkpoint)
    cfg = read_config(args.config, args.cfg_options)
    sizes = [tuple(size) for size in args.size or [size_of(cfg)] if size]
    if not sizes:
        fail(f'the test pipeline of {args.config!r} leaves the size of images open: '
             'give --size H W.')  # fmt: skip
    if min(min(size) for size in sizes) < 1:
        fail(f'--size {min(sizes)} cannot be: both have to be at least 1.')
    paths = targets(args, sizes)
    if args.verify is not None and not osp.isdir(args.verify):
        fail(f'the folder {args.verify!r} of --verify does not exist.')
    console = Console()
    if not console.is_terminal:
        console = Console(width=FILE_WIDTH)

    def say(line):
        console.print(line, highlight=False, markup=False)

    results = []
    try:
        if args.format == 'onnx':
            require('onnx', 'onnxscript', 'onnxruntime')
            if args.opset is not None:
                check_opset(args.opset)
        torch.manual_seed(0)
        checkpoint = find_weights(args.config, args.checkpoint)
        model = load_model(cfg, checkpoint, args.device)
        if checkpoint is None:
            say('No checkpoint was given: the weights are random.')
        tell(model, args, say)
        peer = build_peer(args, cfg, model, channels_of(model))
        for size, path in paths.items():
            result = work(args, cfg, model, peer, size, path)
            results.append(result)
            console.print(table_of(result))
            for line in sentences(result):
                say(line)
            say(result['file'])
            if not result['check']['passed']:
                fail(
                    f'{result["file"]} differs from PyTorch by more than '
                    f'{TOLERANCE:g}, see above. Where the residual is large, f does '
                    'not contract, and rounding grows from step to step: use fewer '
                    '--steps, or a model that was trained to converge.'
                )
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        fail(str(error))
    finally:
        if args.json and results:
            Path(args.json).parent.mkdir(parents=True, exist_ok=True)
            Path(args.json).write_text(json.dumps(results, indent=2) + '\n')


def tell(model, args, say):
    """What the exported model is not."""
    layer = getattr(model.backbone, 'equilibrium', None)
    if layer is not None and args.solver is None:
        name = type(layer.eval_solver).__name__
        if name not in ('AndersonSolver', 'PicardSolver'):
            say(f'{name} is replaced by Anderson acceleration, which needs less memory '
                'and whose equilibrium is the same.')  # fmt: skip
    if (getattr(model, 'test_cfg', None) or {}).get('mode') == 'slide':
        say('The file segments an image as a whole: cut windows outside of it.')


if __name__ == '__main__':
    main()
