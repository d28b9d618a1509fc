"""Train an MDEQ, a ResNet and an HRNet on handwritten digits and compare them.

Writes the digits of scikit-learn to a folder, trains the three models through
tools/train.py with one schedule, and reports parameters, test accuracy, training
time, memory kept for the backward pass and evaluations of f, as a table and as
pictures. Trainings that were finished or interrupted before are taken up again.
"""

import argparse
import json
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

REPO = Path(__file__).resolve().parents[2]
MODELS = dict(MDEQ='mdeq', ResNet='resnet', HRNet='hrnet')
TRAIN_LINE = re.compile(r'Epoch\(train\)\s+\[(\d+)\]\[\s*(\d+)/(\d+)\].*loss: ')
TEST_LINE = re.compile(r'Epoch\(val\) \[(\d+)\].*accuracy/top1: ([\d.]+)')

sys.path.insert(0, str(REPO / 'tools' / 'dataset_converters'))
# OneDL's mmcv comes without compiled operators and says so; no model uses them.
warnings.filterwarnings('ignore', 'Fail to import ``MultiScaleDeformableAttention``')


def config_of(name):
    return REPO / 'configs' / 'demo' / f'{name}_1xb64-30e_digits.py'


def train(console, label, name, work_dir, data_root, options):
    """Train one model in a process of its own, showing its progress.

    Raises:
        SystemExit: If the training fails, after its last lines were printed.
    """
    command = [
        sys.executable,
        str(REPO / 'tools' / 'train.py'),
        str(config_of(name)),
        '--work-dir',
        str(work_dir),
        '--data-root',
        str(data_root),
        '--resume',
        *options,
    ]
    work_dir.mkdir(parents=True, exist_ok=True)
    log = work_dir / 'console.log'
    config = config_of(name).relative_to(REPO)
    console.print(f'[bold]{label}[/]: {config}, log in {log}')
    columns = (
        TextColumn('  {task.description}'),
        BarColumn(),
        TextColumn('{task.percentage:>3.0f} %'),
        TimeElapsedColumn(),
        TextColumn('{task.fields[note]}'),
    )
    show_lines = not console.is_terminal
    note = ''
    with (
        Progress(*columns, console=console, disable=show_lines) as progress,
        log.open('w') as file,
    ):
        bar = progress.add_task('starting', total=None, note=note)
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        lines = []
        for line in process.stdout:
            file.write(line)
            lines = [*lines[-29:], line]
            seen = TRAIN_LINE.search(line)
            if seen:
                epoch, step, steps = (int(s) for s in seen.groups())
                progress.update(
                    bar,
                    description=f'epoch {epoch:2d}',
                    completed=(epoch - 1) * steps + step,
                    total=steps * _epochs(name, options),
                )
            seen = TEST_LINE.search(line)
            if seen:
                note = f'test accuracy {float(seen[2]):.1f} %'
                if show_lines:
                    console.print(f'  epoch {seen[1]}: {note}')
            elif 'Training unrolled' in line or 'Training at the equil' in line:
                note = line.split(' - ')[-1].strip()
                if show_lines:
                    console.print(f'  {note}')
            progress.update(bar, note=note)
    if process.wait():
        console.print(''.join(lines), highlight=False, markup=False)
        sys.exit(f'{label}: the training failed, see {log}')


def _epochs(name, options):
    from mmengine.config import Config

    given = [o for o in options if o.startswith('train_cfg.max_epochs=')]
    if given:
        return int(given[-1].split('=')[1])
    return Config.fromfile(config_of(name)).train_cfg.max_epochs


def read_scalars(work_dir):
    """What the runs in a work dir logged, a later run winning over an earlier one.

    Returns:
        tuple[float, list]: Seconds in training iterations; pairs of epoch and
        test accuracy in percent.
    """
    times, accuracy = {}, {}
    for path in sorted(work_dir.glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            if 'loss' in entry:
                times[entry['step']] = entry['time']
            elif 'accuracy/top1' in entry:
                accuracy[entry['step']] = entry['accuracy/top1']
    before, seconds = 0, 0.0
    for step in sorted(times):
        seconds += times[step] * (step - before)
        before = step
    return seconds, sorted(accuracy.items())


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n\n')[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument('--work-dir', default='work_dirs/demo', type=Path)
    parser.add_argument('--data-root', default='data/digits', type=Path)
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        default=[],
        help='passed on to tools/train.py, for shorter trainings',
    )
    args = parser.parse_args(argv)
    console = Console(soft_wrap=True)
    begin = time.monotonic()

    from digits import write_digits

    try:
        written = write_digits(args.data_root)
    except FileExistsError as error:
        sys.exit(str(error))
    state = 'written' if written else 'already there'
    console.print(f'1,797 handwritten digits in {args.data_root} ({state})')
    options = ['--cfg-options', *args.cfg_options] if args.cfg_options else []
    runs = {}
    for label, name in MODELS.items():
        work_dir = args.work_dir / name
        train(console, label, name, work_dir, args.data_root, options)
        runs[label] = work_dir

    from digits_report import report

    with console.status('evaluating the three models'):
        table = report(
            {k: (config_of(MODELS[k]), d, *read_scalars(d)) for k, d in runs.items()},
            args.data_root,
            args.work_dir,
        )
    console.print(table)
    for name in ('results.md', 'results.json', 'curves.png', 'predictions.png'):
        console.print(f'{args.work_dir / name}', highlight=False)
    console.print(f'{time.monotonic() - begin:.0f} s in all')


if __name__ == '__main__':
    main()
