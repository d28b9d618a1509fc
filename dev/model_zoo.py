"""Count what the models of the metafiles cost, and write it down.

Counts parameters, floating-point operations and the bytes that training keeps for the
backward pass, of every model at the size that its metafile names as Input. Nothing is
computed: the models run on tensors without content, so each takes seconds, on any
machine and with the same result.

With --write the metafiles (configs/*/metafile.yml) get parameters and operations, and
docs/model_zoo.md its tables; --check ends with an error where they differ. --write
adds configs that no metafile has, on the pattern of the one with the most similar name:
look at what it wrote.

Example:
    python dev/model_zoo.py --check
    python dev/model_zoo.py 'mdeq-*in1k'
"""

import argparse
import difflib
import os.path as osp
import re
import sys
import warnings
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.fileio import load
from mmengine.logging import MMLogger
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, osp.join(osp.dirname(osp.dirname(osp.abspath(__file__))), 'tools'))
sys.path.insert(1, osp.join(sys.path[0], 'analysis_tools'))
sys.path.insert(2, osp.join(sys.path[0], 'misc'))
from common import fail
from contentless import without_content
from metafiles import set_field

from mdeq_mm.apis.inference import load_model
from mdeq_mm.registry import name_of

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / 'docs' / 'model_zoo.md'
BEGIN = '<!-- Written by dev/model_zoo.py -->'
END = '<!-- End of what is written by dev/model_zoo.py -->'

TITLES = dict(
    imagenet='ImageNet',
    cityscapes='Cityscapes',
    cifar10='CIFAR-10',
    camvid='CamVid',
    demo='Demo',
    multi_task='Joint training',
)
LENGTHS = dict(Epochs='max_epochs', Iterations='max_iters')
#: Collections, which begin like the types of their backbones.
COLLECTIONS = ('MDEQ', 'ResNet', 'HRNet')
METRICS = {'Top 1 Accuracy': 'top-1', 'aAcc': 'pixel accuracy'}


# What is counted


@dataclass
class Cost:
    """What a model costs an image.

    Attributes:
        parameters (int): Number of parameters, auxiliary heads included.
        flops (int): Operations of an inference; of an MDEQ at its limit.
        kept (int): Bytes that training keeps for the backward pass.
        function (int | None): Operations of one evaluation of f, of an MDEQ.
        limits (tuple | None): Most evaluations in training and in evaluation.
        unrolled (int | None): Bytes kept in the unrolled phase of the training.
    """

    parameters: int
    flops: int
    kept: int
    function: int | None = None
    limits: tuple | None = None
    unrolled: int | None = None

    @property
    def rest(self):
        """Operations of all but f; None for other models."""
        return self.function and self.flops - self.limits[1] * self.function


def kept_bytes(forward):
    """What :func:`~mdeq_mm.analysis.saved_bytes.saved_bytes` counts, by storages."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        # Held, so that no other one takes its place.
        storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = forward()
    del held
    return sum(storage.nbytes() for storage in storages.values())


def kept_per_image(model, size):
    """Bytes an image kept for the backward pass, from the slope over the batch."""

    def kept(n):
        return kept_bytes(lambda: model(torch.zeros(n, *size), mode='tensor'))

    fake, answers = without_content()
    model.train()
    with fake, answers:
        return kept(3) - kept(2)


def flops_of(model, size):
    """Operations of a whole inference of one image."""
    fake, answers = without_content()
    model.eval()
    with fake, answers, torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *size), mode='tensor')
    return counter.get_total_flops()


def measure(cfg, size):
    """Count what the model of a config costs.

    Args:
        cfg (Config): The config.
        size (Sequence[int]): Channels, height and width of an image.

    Returns:
        Cost: The counts.
    """
    model = load_model(cfg, device='cpu')
    parameters = sum(p.numel() for p in model.parameters())
    layer = getattr(model.backbone, 'equilibrium', None)
    if layer is None:
        flops, kept = flops_of(model, size), kept_per_image(model, size)
        return Cost(parameters, flops, kept)
    limits = (layer.solver.max_steps, layer.eval_solver.max_steps)
    # What is kept does not depend on the number of steps, and each costs the same.
    layer.solver.max_steps = layer.eval_solver.max_steps = 1
    fake, answers = without_content()
    with fake, answers:
        function = model.backbone.get_flops(tuple(size))['function']
    flops = flops_of(model, size) + (limits[1] - 1) * function
    kept, unrolled = kept_per_image(model, size), None
    warmup = cfg.get('default_hooks', {}).get('warmup')
    if warmup is not None:
        layer.unroll_steps = warmup.unroll_steps
        unrolled = kept_per_image(model, size)
    return Cost(parameters, flops, kept, function, limits, unrolled)


# Metafiles


def read_metafiles():
    """All models.

    Returns:
        dict[str, list[dict]]: By folder of configs, in the order of the index.
    """
    paths = load(ROOT / 'model-index.yml')['Import']
    return {Path(p).parent.name: load(ROOT / p)['Models'] for p in paths}


def missing_configs(families):
    """Configs that no metafile has.

    Returns:
        list[Path]: Sorted.
    """
    known = {model['Config'] for models in families.values() for model in models}
    return [
        path
        for family in families
        for path in sorted((ROOT / 'configs' / family).glob('*.py'))
        if path.relative_to(ROOT).as_posix() not in known
    ]


def new_entry(path, models):
    """Describe a config as the one with the most similar name is described.

    Args:
        path (Path): The config.
        models (list[dict]): Those of its metafile.

    Returns:
        str: The text for the metafile.
    """
    by_stem = {Path(model['Config']).stem: model for model in models}
    (like,) = difflib.get_close_matches(path.stem, by_stem, n=1, cutoff=0)
    pattern = by_stem[like]['Metadata']
    cfg = Config.fromfile(path)
    length = 'Epochs' if 'max_epochs' in cfg.train_cfg else 'Iterations'
    kind = name_of(cfg.model.backbone.type)
    tasks = pattern['Task'] if isinstance(pattern['Task'], list) else [pattern['Task']]
    fields = [
        '    Metadata:',
        *(['      Task:'] if len(tasks) > 1 else []),
        *(f'        - {t}' if len(tasks) > 1 else f'      Task: {t}' for t in tasks),
        f'      Training Data: {pattern["Training Data"]}',
        f'      {length}: {cfg.train_cfg[LENGTHS[length]]}',
        f'      Batch Size: {batch_size(cfg, path.stem)}',
        f'      Input: {pattern["Input"]}',
        '      FLOPs: 0',
        '      Parameters: 0',
    ]
    head = [
        f'  - Name: {path.stem}',
        f'    In Collection: {next(c for c in COLLECTIONS if kind.startswith(c))}',
        f'    Config: {path.relative_to(ROOT).as_posix()}',
    ]
    return '\n'.join([*head, *fields]) + '\n'


def batch_size(cfg, stem):
    """Images of a batch on all GPUs, whose number the name of a config tells."""
    gpus, images = map(int, re.search(r'_(\d+)xb(\d+)', stem).groups())
    dataset = cfg.train_dataloader.dataset
    while 'counts' not in dataset and 'dataset' in dataset:
        dataset = dataset.dataset
    # An item of joint training holds several images.
    return gpus * images * sum(dataset.get('counts', dict(all=1)).values())


def add_missing(families):
    """Append the configs that no metafile has; returns the metafiles anew."""
    for path in missing_configs(families):
        metafile = path.parent / 'metafile.yml'
        text = metafile.read_text(encoding='utf-8').rstrip('\n')
        entry = new_entry(path, families[path.parent.name])
        metafile.write_text(f'{text}\n\n{entry}', encoding='utf-8')
        print(f'{metafile.relative_to(ROOT)}: {path.stem} is added.')
    return read_metafiles()


def update_metafiles(costs):
    """The texts of the metafiles with what was counted.

    Args:
        costs (dict[str, Cost]): By name of a model.

    Returns:
        dict[Path, str]: By path.
    """
    texts = {}
    for family, models in read_metafiles().items():
        path = ROOT / 'configs' / family / 'metafile.yml'
        text = path.read_text(encoding='utf-8')
        for model in models:
            cost = costs.get(model['Name'])
            if cost is not None:
                text = set_field(text, model['Name'], 'FLOPs', cost.flops)
                text = set_field(text, model['Name'], 'Parameters', cost.parameters)
        texts[path] = text
    return texts


# The page


def figure(value, unit=1.0):
    """A number with three digits, or '–' for none."""
    if value is None:
        return '–'
    value = value / unit
    return f'{value:,.0f}' if value >= 100 else f'{value:#.3g}'.rstrip('.')


def results_of(model):
    """What the metafile says of the accuracy of a model, for a cell of the table."""
    said = [
        f'{METRICS.get(metric, metric)} {value:.2f}'
        for result in model.get('Results', [])
        for metric, value in result['Metrics'].items()
    ] or ['not trained']
    published = model['Metadata'].get('Published')
    if published:
        said.append(f'published: {published}')
    return '; '.join(said)


def row(model, cost):
    """A model's line of the table of costs."""
    name = f'[{model["Name"]}](../{model["Config"]})'
    limits = ' / '.join(map(str, cost.limits)) if cost.limits else '–'
    cells = [
        name,
        model['Metadata']['Input'].replace('x', '×'),
        f'{cost.parameters:,}',
        limits,
        figure(cost.function, 1e9),
        figure(cost.rest, 1e9),
        figure(cost.flops, 1e9),
        figure(cost.kept, 1e6),
        figure(cost.unrolled, 1e6),
        results_of(model),
    ]
    return f'| {" | ".join(cells)} |'


HEADER = """\
| model | image | parameters | limits of evaluations | *f*, GFLOP | all else, GFLOP \
| whole, GFLOP | kept, MB | unrolled, MB | results, % |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |"""


def details(model):
    """A model's line of the table of trainings."""
    meta = model['Metadata']
    command = meta.get('Command', f'python tools/train.py {model["Config"]}')
    sources = dict(log=model.get('Training log'))
    if 'Source' in meta:
        sources[meta['Source']] = meta['Source']
    weights = model.get('Weights')
    cells = [
        model['Name'],
        results_of(model),
        f'`{command}`' + (f' ({meta["Remark"]})' if 'Remark' in meta else ''),
        meta.get('Training Resources', '–'),
        str(meta.get('Training Time', '–')),
        ', '.join(f'[{name}](../{path})' for name, path in sources.items() if path),
        f'`{Path(weights).name}`' if weights else '–',
    ]
    return f'| {" | ".join(cells)} |'


DETAILS = """\
| model | results, % | trained with | hardware | time | from | weights |
| --- | --- | --- | --- | --- | --- | --- |"""


def tables(families, costs):
    """All tables as Markdown.

    Args:
        families (dict[str, list[dict]]): Models of each folder.
        costs (dict[str, Cost]): By name.
    """
    parts = []
    for family, models in families.items():
        parts.append(f'## {TITLES.get(family, family)}')
        lines = [row(model, costs[model['Name']]) for model in models]
        parts.append('\n'.join([HEADER, *lines]))
        trained = [details(model) for model in models if model.get('Results')]
        if trained:
            parts.append('\n'.join([DETAILS, *trained]))
    return '\n\n'.join(parts)


def update_page(text, written):
    """Put the tables into the page, between their marks."""
    before, found, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        fail(f'{PAGE.name} lacks the marks {BEGIN!r} and {END!r}.')
    return f'{before}{BEGIN}\n\n{written}\n\n{END}{after}'


# The tool


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'patterns',
        nargs='*',
        metavar='PATTERN',
        help='names of models, with * and ? (default: all)',
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument(
        '--write', action='store_true', help='write into metafiles and the page'
    )
    action.add_argument(
        '--check', action='store_true', help='fail where they say something else'
    )
    args = parser.parse_args(argv)
    if args.write and args.patterns:
        parser.error('--write takes no PATTERN: the page needs all models')
    return args


def choose(families, patterns):
    """The models whose names match, by folder."""
    for pattern in patterns:
        if not any(fnmatch(m['Name'], pattern) for ms in families.values() for m in ms):
            fail(f'no model is called {pattern!r}.')
    return {
        family: chosen
        for family, models in families.items()
        if (chosen := [m for m in models if _matches(m['Name'], patterns)])
    }


def _matches(name, patterns):
    return not patterns or any(fnmatch(name, p) for p in patterns)


def differences(families, costs, whole):
    """Where metafiles and page say something else than was counted.

    Returns:
        list[str]: One text each.
    """
    found = []
    for models in families.values():
        for model in models:
            cost, meta = costs[model['Name']], model['Metadata']
            for field in ('Parameters', 'FLOPs'):
                counted = getattr(cost, field.lower())
                if meta[field] != counted:
                    found.append(
                        f'{model["Name"]}: {field} is {meta[field]} in the metafile '
                        f'and {counted} in truth'
                    )
    page = PAGE.read_text(encoding='utf-8')
    if whole and update_page(page, tables(families, costs)) != page:
        found.append(f'{PAGE.relative_to(ROOT)} has other tables')
    for models in families.values():
        for model in models:
            if row(model, costs[model['Name']]) not in page.splitlines():
                found.append(f'{model["Name"]}: another line in {PAGE.name}')
    return found


def main(argv=None) -> None:
    args = parse_args(argv)
    warnings.filterwarnings('ignore', module='mm')
    families = add_missing(read_metafiles()) if args.write else read_metafiles()
    if args.check and (missing := missing_configs(families)):
        names = ', '.join(path.stem for path in missing)
        fail(f'no metafile has {names}: run dev/model_zoo.py --write.')
    families = choose(families, args.patterns)
    costs = {}
    MMLogger.get_current_instance().setLevel('ERROR')
    for models in families.values():
        for model in models:
            cfg = Config.fromfile(ROOT / model['Config'])
            size = [int(side) for side in model['Metadata']['Input'].split('x')]
            costs[model['Name']] = measure(cfg, size)
            if not args.check and not args.write:
                print(row(model, costs[model['Name']]), flush=True)
    if args.check:
        found = differences(families, costs, whole=not args.patterns)
        if found:
            fail('; '.join(found) + ': run dev/model_zoo.py --write.')
        print(f'{len(costs)} models cost what metafiles and {PAGE.name} say.')
    elif args.write:
        texts = update_metafiles(costs)
        for path, text in texts.items():
            path.write_text(text, encoding='utf-8')
        page = PAGE.read_text(encoding='utf-8')
        PAGE.write_text(
            update_page(page, tables(read_metafiles(), costs)), encoding='utf-8'
        )
        print(f'{len(texts)} metafiles and {PAGE.relative_to(ROOT)} are written.')


if __name__ == '__main__':
    main()
