"""What recipes share: trainings one after the other, their tests, tables and curves."""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from mmengine.runner import find_latest_checkpoint
from rich.console import Console
from rich.markdown import Markdown

from mdeq_mm.checkpoints import read_checkpoint

REPO = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Metric:
    """The figure that a recipe is about.

    Attributes:
        key (str): Its name in mmengine's logs, in percent.
        name (str): What the reader sees, in percent too.
    """

    key: str
    name: str


@dataclass(frozen=True)
class Run:
    """One training of a recipe.

    Attributes:
        label (str): Name of the model in tables.
        config (str): Below configs/.
        options (list[str]): ``--cfg-options`` of this training.
    """

    label: str
    config: str
    options: list = field(default_factory=list)


def parse_args(argv, description, work_dir, data_root, archive):
    """Arguments that every recipe takes.

    Args:
        argv (list[str], optional): Command line.
        description (str): Docstring of the recipe.
        work_dir (str): Default of ``--work-dir``.
        data_root (str): Default of ``--data-root``.
        archive (str): What the archive of the data set is called.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--archive', help=f'{archive}, unpacked first if the data folder is not there'
    )
    parser.add_argument(
        '--data-root', default=data_root, help='data folder (default: %(default)s)'
    )
    parser.add_argument(
        '--work-dir',
        default=work_dir,
        type=Path,
        help='results, and one folder for each training; those of --full go to its '
        'folder full/ (default: %(default)s)',
    )
    parser.add_argument(
        '--full',
        action='store_true',
        help='the whole schedule, for GPUs (default: the short one, for a CPU)',
    )
    parser.add_argument(
        '--amp', action='store_true', help='train with automatic mixed precision'
    )
    parser.add_argument(
        '--only', nargs='+', metavar='MODEL', help='some of the models (default: all)'
    )
    parser.add_argument(
        '--seed', type=int, default=0, help='random seed (default: %(default)s)'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        default=[],
        metavar='KEY=VALUE',
        help='passed on to tools/train.py and tools/test.py',
    )
    args = parser.parse_args(argv)
    if args.full:
        # A short training is not to be gone on with.
        args.work_dir /= 'full'
    return args


def pick(runs, only):
    """The runs that were asked for.

    Raises:
        SystemExit: If there is no model of such a name.
    """
    labels = {run.label: run for run in runs}
    unknown = sorted(set(only or ()) - labels.keys())
    if unknown:
        sys.exit(f'--only: there is no {", ".join(unknown)}; use {", ".join(labels)}')
    return [run for run in runs if not only or run.label in only]


class Recipe:
    """Trains models one after the other, tests and compares them.

    What was finished is not done again, and what was interrupted goes on from its
    last checkpoint.

    Args:
        title (str): Of the table.
        runs (list[Run]): What to train.
        metric (Metric): What is compared.
        args (argparse.Namespace): Of :func:`parse_args`.
        test (bool): Whether there is a test set beside the one that is looked at
            during training.
    """

    def __init__(self, title, runs, metric, args, test=False):
        self.title = title
        self.runs = runs
        self.metric = metric
        self.args = args
        self.test = test
        self.console = Console(soft_wrap=True)

    def run(self):
        """Train, test, and write tables, figures and curves."""
        results = self._known()
        for run in self.runs:
            if not self._finished(run, results):
                self._train(run)
            result = self._result(run)
            # Read anew: another call may have trained other models meanwhile.
            results = self._known() | {run.label: result}
            self._write(results)
        self.console.print(Markdown(self._table(results)))
        for name in ('results.md', 'results.json', 'curves.png'):
            self.console.print(f'{self.args.work_dir / name}', highlight=False)

    def _known(self):
        """Results of models that an earlier call trained."""
        path = self.args.work_dir / 'results.json'
        return json.loads(path.read_text()) if path.is_file() else {}

    def _finished(self, run, results):
        """Whether the same command led to a result that is still there."""
        known = results.get(run.label, {})
        return (
            known.get('command') == self._command(run)
            and (self._folder(run) / known['checkpoint']).is_file()
        )

    def _command(self, run):
        return f'python {" ".join(self._train_command(run))}'

    def _folder(self, run):
        return self.args.work_dir / run.label.lower()

    def _options(self, run):
        seed = f'randomness.seed={self.args.seed}'
        return [seed, *run.options, *self.args.cfg_options]

    def _train_command(self, run):
        amp = ['--amp'] if self.args.amp else []
        return self._tool('train', run, [], self._folder(run), ['--resume', *amp])

    def _test_command(self, run, checkpoint):
        return self._tool('test', run, [str(checkpoint)], self._folder(run) / 'test')

    def _tool(self, name, run, files, work_dir, flags=()):
        """A call of tools/train.py or tools/test.py, as one would type it."""
        return [
            f'tools/{name}.py',
            f'configs/{run.config}',
            *files,
            '--work-dir',
            str(work_dir),
            '--data-root',
            str(self.args.data_root),
            *flags,
            '--cfg-options',
            *self._options(run),
        ]

    def _train(self, run):
        command = self._train_command(run)
        # Its own output is the progress: the losses, and the time that is left.
        self.console.rule(f'{run.label}: python {" ".join(command[:2])}')
        self._call(run, command)

    def _call(self, run, command):
        tool, config, *rest = command
        # Folders are the caller's, wherever that is; the files are the project's.
        done = subprocess.run([sys.executable, REPO / tool, REPO / config, *rest])
        if done.returncode:
            sys.exit(
                f'{run.label}: "python {" ".join(command)}" failed; after the cause is '
                'mended, the same recipe goes on from the last checkpoint'
            )

    def _result(self, run):
        folder = self._folder(run)
        steps, curve = read_log(folder, self.metric.key)
        checkpoint = self._checkpoint(folder)
        tested = self._tested(run, checkpoint) if self.test else {}
        value = tested[self.metric.key] if self.test else curve[-1][1]
        weights = read_checkpoint(str(checkpoint))['state_dict']
        buffers = ('running_mean', 'running_var', 'num_batches_tracked')
        return {
            'config': run.config,
            'parameters': sum(
                w.numel() for k, w in weights.items() if not k.endswith(buffers)
            ),
            f'test {self.metric.name}': value,
            'seconds': sum(seconds for _, seconds, _ in steps),
            'iterations': steps[-1][0] if steps else 0,
            'checkpoint': checkpoint.name,
            'log': self._write_log(run, checkpoint, tested),
            'command': self._command(run),
            'losses': [(step, loss) for step, _, loss in steps],
            'curve': curve,
        }

    def _write_log(self, run, checkpoint, tested):
        """Put what the runs of a training logged into one file, with the test."""
        path = self.args.work_dir / f'{run.label.lower()}.json'
        text = ''.join(p.read_text() for p in scalars(self._folder(run)))
        if tested:
            line = {f'test/{key}': value for key, value in tested.items()}
            line['step'] = int(checkpoint.stem.rpartition('_')[2])
            text += f'{json.dumps(line)}\n'
        path.write_text(text)
        return str(path)

    def _checkpoint(self, folder):
        best = sorted(folder.glob('best_*.pth'))
        return best[-1] if best else Path(find_latest_checkpoint(str(folder)))

    def _tested(self, run, checkpoint):
        # The result is kept with the name of what was tested.
        known = self._folder(run) / 'test' / f'{checkpoint.stem}.json'
        if not known.is_file():
            before = set(known.parent.glob('*/*.json'))
            self._call(run, self._test_command(run, checkpoint))
            (found,) = set(known.parent.glob('*/*.json')) - before
            known.write_text(found.read_text())
        return json.loads(known.read_text())

    def _table(self, results):
        name = f'test {self.metric.name}'
        lines = [
            f'| model | parameters, M | {name} | iterations | minutes |',
            '| --- | ---: | ---: | ---: | ---: |',
        ]
        for label, r in results.items():
            lines.append(
                f'| {label} | {r["parameters"] / 1e6:.2f} | {r[name]:.1f} '
                f'| {r["iterations"]:,} | {r["seconds"] / 60:.0f} |'
            )
        return '\n'.join([f'## {self.title}', '', *lines, ''])

    def _write(self, results):
        folder = self.args.work_dir
        commands = ''.join(f'{r["command"]}\n' for r in results.values())
        text = f'{self._table(results)}\n```bash\n{commands}```\n'
        (folder / 'results.md').write_text(text)
        (folder / 'results.json').write_text(json.dumps(results, indent=2) + '\n')
        self._draw(results, folder / 'curves.png')

    def _draw(self, results, path):
        fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout='constrained')
        for label, result in results.items():
            left.plot(*zip(*result['losses'], strict=True), label=label, linewidth=1)
            if result['curve']:
                right.plot(*zip(*result['curve'], strict=True), 'o-', label=label)
        left.set(xlabel='iteration', ylabel='loss', title='Training')
        left.set_yscale('log')
        images = 'validation' if self.test else 'test'
        right.set(
            xlabel='evaluated after',
            ylabel=f'{images} {self.metric.name}',
            title='Evaluation',
        )
        right.set_ylim(bottom=0)
        for axis in (left, right):
            axis.grid(alpha=0.3)
            axis.legend()
        fig.savefig(path, dpi=120)
        plt.close(fig)


def scalars(folder):
    """The files of what the runs in a work dir logged, the oldest first."""
    return sorted(folder.glob('*/vis_data/scalars.json'))


def read_log(folder, key):
    """What the runs in a work dir logged, a later one winning over an earlier.

    Returns:
        tuple[list, list]: Of each logged iteration its number, the seconds of training
        since the one before, and the loss; pairs of what a training counts and the
        metric.
    """
    logged, values = {}, {}
    for path in scalars(folder):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            if 'loss' in entry:
                step = entry.get('iter', entry['step'])
                logged[step] = (entry['time'], entry['loss'])
            elif key in entry:
                # Where nothing but iterations is counted, mmpretrain logs epoch 0.
                values[entry['step'] or max(logged, default=0)] = entry[key]
    before, steps = 0, []
    for step in sorted(logged):
        time, loss = logged[step]
        steps.append((step, time * (step - before), loss))
        before = step
    return steps, sorted(values.items())


def unpack(console, archive, data_root, write, name):
    """Unpack a data set where its folder is not there yet.

    Args:
        console (Console): Where to say so.
        archive (str | None): Of the data set.
        data_root (str): Where it goes.
        write (str): Converter that does it, below tools/dataset_converters/.
        name (str): Of the data set.

    Raises:
        SystemExit: If there is neither folder nor archive.
    """
    if Path(data_root).is_dir():
        return
    if archive is None:
        sys.exit(
            f'{data_root} is not there: give the archive of {name} as --archive, or '
            'its folder as --data-root (docs/datasets.md)'
        )
    console.print(f'Unpacking {archive}')
    script = REPO / 'tools' / 'dataset_converters' / write
    if subprocess.run([sys.executable, str(script), archive, data_root]).returncode:
        sys.exit(f'{name} could not be unpacked')
