"""Convert a checkpoint of the official MDEQ code to one of this package.

The result loads into an mmpretrain classifier (``--task cls``: backbone, neck of
``MDEQFuseScales`` and ``GlobalAveragePooling``, ``LinearClsHead``) or an mmseg
segmentor (``--task seg``: backbone, ``FCNHead``) of the ``*_official_*`` configs, whose
backbone has ``injection='first'`` in its ``arch`` and ``out_norm_cfg=None``.

Example:
    python tools/model_converters/mdeq2mm.py official.pkl mdeq.pth --task cls
"""

import argparse
import re
import sys
from pathlib import Path

import torch
from rich.console import Console

from mdeq_mm.checkpoints import read_checkpoint, state_dict_of

F = 'backbone.equilibrium.f'
NORMALISED = dict(
    weight_g='parametrizations.weight.original0',
    weight_v='parametrizations.weight.original1',
    weight='weight',
)

# Patterns over official names, and what makes our name of a match.
SHARED = [
    (r'stage0\.0\.(\w+)', lambda m: f'backbone.injection.0.conv.{m[1]}'),
    (r'stage0\.1\.(\w+)', lambda m: f'backbone.injection.0.bn.{m[1]}'),
    (
        r'fullstage\.branches\.(\d+)\.blocks\.(\d+)\.conv(\d)\.(weight(?:_[gv])?)',
        lambda m: f'{F}.branches.{m[1]}.{m[2]}.conv{m[3]}.{NORMALISED[m[4]]}',
    ),
    (
        r'fullstage\.branches\.(\d+)\.blocks\.(\d+)\.gn(\d)\.(\w+)',
        lambda m: f'{F}.branches.{m[1]}.{m[2]}.norm{m[3]}.{m[4]}',
    ),
    (
        r'fullstage\.fuse_layers\.(\d+)\.(\d+)\.net\.conv\.(\w+)',
        lambda m: f'{F}.fusion.paths.{m[1]}.{m[2]}.conv.{m[3]}',
    ),
    (
        r'fullstage\.fuse_layers\.(\d+)\.(\d+)\.net\.gnorm\.(\w+)',
        lambda m: f'{F}.fusion.paths.{m[1]}.{m[2]}.norm.{m[3]}',
    ),
    # Convolution, norm and activation: three layers of ours for one of theirs.
    (
        r'fullstage\.fuse_layers\.(\d+)\.(\d+)\.net\.(\d+)\.conv\.(\w+)',
        lambda m: f'{F}.fusion.paths.{m[1]}.{m[2]}.{3 * int(m[3])}.{m[4]}',
    ),
    (
        r'fullstage\.fuse_layers\.(\d+)\.(\d+)\.net\.(\d+)\.gnorm\.(\w+)',
        lambda m: f'{F}.fusion.paths.{m[1]}.{m[2]}.{3 * int(m[3]) + 1}.{m[4]}',
    ),
    (
        r'fullstage\.post_fuse_layers\.(\d+)\.conv\.(weight(?:_[gv])?)',
        lambda m: f'{F}.post_convs.{m[1]}.{NORMALISED[m[2]]}',
    ),
    (
        r'fullstage\.post_fuse_layers\.(\d+)\.gnorm\.(\w+)',
        lambda m: f'{F}.post_norms.{m[1]}.{m[2]}',
    ),
]
HEADS = dict(
    cls=[
        (
            r'incre_modules\.(\d+)\.0\.(conv|bn)(\d)\.(\w+)',
            lambda m: f'neck.0.bottlenecks.{m[1]}.layers.{int(m[3]) - 1}.{m[2]}.{m[4]}',
        ),
        (
            r'incre_modules\.(\d+)\.0\.downsample\.([01])\.(\w+)',
            lambda m: (
                f'neck.0.bottlenecks.{m[1]}.shortcut.{("conv", "bn")[int(m[2])]}.{m[3]}'
            ),
        ),
        (
            r'downsamp_modules\.(\d+)\.([01])\.(\w+)',
            lambda m: f'neck.0.downsamples.{m[1]}.{("conv", "bn")[int(m[2])]}.{m[3]}',
        ),
        (
            r'final_layer\.([01])\.(\w+)',
            lambda m: f'neck.0.final.{("conv", "bn")[int(m[1])]}.{m[2]}',
        ),
        (r'classifier\.(\w+)', lambda m: f'head.fc.{m[1]}'),
    ],
    seg=[
        (r'last_layer\.0\.weight', lambda m: 'decode_head.convs.0.conv.weight'),
        (r'last_layer\.1\.(\w+)', lambda m: f'decode_head.convs.0.bn.{m[1]}'),
        (r'last_layer\.3\.(\w+)', lambda m: f'decode_head.conv_seg.{m[1]}'),
    ],
)


def convert(official, task):
    """Rename the entries of an official state dict.

    Args:
        official (dict[str, Tensor]): State dict under the official names, without
            ``module.`` prefixes.
        task (str): ``'cls'`` or ``'seg'``.

    Returns:
        tuple[dict, dict, list]: Our state dict; official name to our name; the
        official names that were left.

    Raises:
        ValueError: If there is nothing of an MDEQ in it, or not of this task.
    """
    names, left = {}, []
    rules = _stem_rules(official) + SHARED + HEADS[task]
    for name in official:
        for pattern, make in rules:
            match = re.fullmatch(pattern, name)
            if match:
                names[name] = make(match)
                break
        else:
            left.append(name)
    if not any(ours.startswith(F) for ours in names.values()):
        raise ValueError(
            'the checkpoint holds no weights of an official MDEQ (names that start '
            f'with fullstage.); its first names are {list(official)[:3]}'
        )
    if not any(not ours.startswith('backbone.') for ours in names.values()):
        raise ValueError(
            f'the checkpoint holds no head for --task {task}: try the other task'
        )
    state = {ours: official[name] for name, ours in names.items()}
    # mmseg's convolution has no bias in front of its norm: subtracting it from the
    # running mean is the same in evaluation, and training cancels it.
    bias = official.get('last_layer.0.bias')
    if task == 'seg' and bias is not None:
        mean = 'decode_head.convs.0.bn.running_mean'
        if mean not in state:
            raise ValueError(
                'the checkpoint has last_layer.0.bias, but lacks '
                'last_layer.1.running_mean, which it belongs to: take all of it'
            )
        # In double precision, which a difference of floats needs to be exact.
        state[mean] = state[mean].double() - bias.double()
        names['last_layer.0.bias'] = mean
        left.remove('last_layer.0.bias')
    return state, names, left


def _stem_rules(official):
    """Layers of the stem by their order: their numbers count activations too."""
    layers = list(
        dict.fromkeys(
            n.rsplit('.', 1)[0] for n in official if n.startswith('downsample.')
        )
    )
    return [
        (
            re.escape(layer) + r'\.(\w+)',
            lambda m, i=i: f'backbone.stem.{i // 2}.{("conv", "bn")[i % 2]}.{m[1]}',
        )
        for i, layer in enumerate(layers)
    ]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n\n')[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument('src', help='official checkpoint')
    parser.add_argument('dst', help='where to write the converted one')
    parser.add_argument('--task', choices=sorted(HEADS), required=True)
    parser.add_argument('--force', action='store_true', help='overwrite DST')
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    console = Console(soft_wrap=True)
    dst = Path(args.dst)
    if dst.exists() and Path(args.src).exists() and dst.samefile(args.src):
        sys.exit(f'{dst} is the source, which is kept: choose another name')
    if dst.exists() and not args.force:
        sys.exit(f'{dst} exists: choose another name, or overwrite it with --force')
    try:
        official = state_dict_of(read_checkpoint(args.src))
        state, names, left = convert(official, args.task)
    except (OSError, ValueError) as error:
        sys.exit(f'{args.src}: {error}')
    for name, ours in names.items():
        console.print(f'used  {name} -> {ours}', highlight=False)
    for name in left:
        console.print(f'[yellow]left[/]  {name}', highlight=False)
    dst.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and moved, so that an interruption spares what is there.
    part = dst.with_name(f'{dst.name}.part')
    meta = dict(source='official MDEQ', task=args.task)
    torch.save(dict(meta=meta, state_dict=state), part)
    part.replace(dst)
    console.print(
        f'{len(names)} entries used, {len(left)} left; written to {dst}, for the '
        "*_official_* configs (arch=dict(..., injection='first'), out_norm_cfg=None)",
        highlight=False,
        markup=False,
    )


if __name__ == '__main__':
    main()
