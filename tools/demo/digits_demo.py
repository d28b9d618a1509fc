"""Train MDEQs and their peers on handwritten digits and compare them.

Writes the digits of scikit-learn to a folder, and scenes composed of them to another;
trains an MDEQ, a ResNet and an HRNet to classify the digits, and an MDEQ and an HRNet
to segment the scenes, each task with one schedule, through tools/train.py; reports
accuracy, time, memory and evaluations of f as tables and as pictures. Trainings that
were finished or interrupted before are taken up again.
"""

import argparse
import json
import os
import sys
import time
import warnings
from pathlib import Path

from rich.console import Console

sys.path.append(str(Path(__file__).resolve().parents[1] / 'dataset_converters'))

from digit_scenes import COUNTS, write_scenes
from digits import write_digits
from training import REPO, Metric, Training

# OneDL's mmcv comes without compiled operators and says so; no model uses them.
warnings.filterwarnings('ignore', 'Fail to import ``MultiScaleDeformableAttention``')

ACCURACY = Metric('accuracy/top1', 'test accuracy')
MIOU = Metric('mIoU', 'test mIoU')
TITLES = dict(
    digits='Classification of digits', scenes='Segmentation of scenes of digits'
)


def trainings(args):
    """What is trained.

    Returns:
        dict[str, list[Training]]: For digits and for scenes.
    """

    def training(label, config, data_root, metric, prefix=''):
        folder = args.work_dir / f'{prefix}{label.lower()}'
        config = REPO / 'configs' / 'demo' / f'{label.lower()}_{config}.py'
        return Training(label, config, folder, data_root, metric)

    return dict(
        digits=[
            training(label, '1xb64-30e_digits', args.data_root, ACCURACY)
            for label in ('MDEQ', 'ResNet', 'HRNet')
        ],
        scenes=[
            training(
                label, '1xb16-12e_digit-scenes-64x64', args.scenes_root, MIOU, 'scenes_'
            )
            for label in ('MDEQ', 'HRNet')
        ],
    )


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n\n')[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument('--work-dir', default='work_dirs/demo', type=Path)
    parser.add_argument('--data-root', default='data/digits', type=Path)
    parser.add_argument('--scenes-root', default='data/digit_scenes', type=Path)
    parser.add_argument(
        '--num-scenes',
        nargs=2,
        type=int,
        metavar=('TRAIN', 'TEST'),
        default=list(COUNTS.values()),
        help='scenes to compose',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        default=[],
        help='passed on to tools/train.py, for shorter trainings',
    )
    return parser.parse_args(argv)


def write_data(console, args):
    """Write what is not there yet, and say what there is."""
    counts = dict(zip(COUNTS, args.num_scenes, strict=True))
    try:
        digits = write_digits(args.data_root)
        scenes = write_scenes(args.scenes_root, counts)
    except FileExistsError as error:
        sys.exit(str(error))
    for content, root, written in (
        ('1,797 handwritten digits', args.data_root, digits),
        (f'{sum(counts.values()):,} scenes of digits', args.scenes_root, scenes),
    ):
        state = 'written' if written else 'already there'
        console.print(f'{content} in {root} ({state})')


def write_results(tables, out_dir):
    """Write tables as Markdown and as numbers."""
    content = {name: table.figures() for name, table in tables.items()}
    (out_dir / 'results.json').write_text(json.dumps(content, indent=2) + '\n')
    text = '\n'.join(table.markdown() for table in tables.values())
    (out_dir / 'results.md').write_text(text)


def limit_threads(console):
    """Leave busy cores to what runs there, in this process and those that it starts.

    Threads of one operation wait for the slowest: with more of them than idle cores,
    the demo takes several times as long. ``OMP_NUM_THREADS`` is left as it is.
    """
    cores = os.cpu_count() or 1
    free = max(1, round(cores - os.getloadavg()[0]))
    if free < cores and 'OMP_NUM_THREADS' not in os.environ:
        os.environ['OMP_NUM_THREADS'] = str(free)
        console.print(
            f'Other programs are running: the demo uses {free} of {cores} cores and '
            'takes longer. OMP_NUM_THREADS=N sets another number.'
        )


def main(argv=None):
    args = parse_args(argv)
    console = Console(soft_wrap=True)
    begin = time.monotonic()
    console.print(
        'About 12 minutes on one CPU core, less on two. If it is stopped, the same '
        'command goes on where it was.'
    )
    limit_threads(console)
    write_data(console, args)
    tasks = trainings(args)
    for task, models in tasks.items():
        console.print(f'\n{TITLES[task]}')
        for model in models:
            model.run(console, args.cfg_options)

    import digits_report
    import scenes_report

    measuring = 'Measuring accuracy, time and memory of the trained models'
    console.print(f'\n{measuring}')
    with console.status(measuring):
        tables = dict(
            digits=digits_report.report(tasks['digits'], args.work_dir),
            scenes=scenes_report.report(tasks['scenes'], args.work_dir),
        )
        write_results(tables, args.work_dir)
    for table in tables.values():
        console.print()
        console.print(table.rich())
    pictures = ('curves.png', 'predictions.png', 'segmentation.png')
    for name in ('results.md', 'results.json', *pictures):
        console.print(f'{args.work_dir / name}', highlight=False)
    console.print(f'{time.monotonic() - begin:.0f} s in all')


if __name__ == '__main__':
    main()
