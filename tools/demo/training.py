"""Trainings of the demo: each in a process of its own, with its progress shown."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

REPO = Path(__file__).resolve().parents[2]
TRAIN_LINE = re.compile(r'Epoch\(train\)\s+\[(\d+)\]\[\s*(\d+)/(\d+)\].*loss: ')


@dataclass(frozen=True)
class Metric:
    """What is shown while a model trains.

    Attributes:
        key (str): Its name in mmengine's logs, in percent.
        name (str): What the user reads.
    """

    key: str
    name: str

    def find(self, line):
        """The epoch and the value in a line of the log, None where there is none."""
        found = re.search(
            rf'Epoch\(val\) +\[(\d+)\].*\b{re.escape(self.key)}: ([\d.]+)', line
        )
        return found and (int(found[1]), float(found[2]))


@dataclass(frozen=True)
class Training:
    """A model of the demo.

    Attributes:
        label (str): Its name in tables.
        config (Path): Its config, which counts epochs.
        work_dir (Path): Where it is trained.
        data_root (Path): Folder of its data set.
        metric (Metric): What is shown on the way.
    """

    label: str
    config: Path
    work_dir: Path
    data_root: Path
    metric: Metric

    @property
    def log(self):
        return self.work_dir / 'console.log'

    def run(self, console, options):
        """Train, or go on where an earlier run ended, showing the progress.

        Args:
            console (rich.console.Console): Where to show it.
            options (list[str]): ``--cfg-options`` of tools/train.py.

        Raises:
            SystemExit: If the training fails, after its last lines were printed.
        """
        command = [
            sys.executable,
            str(REPO / 'tools' / 'train.py'),
            str(self.config),
            '--work-dir',
            str(self.work_dir),
            '--data-root',
            str(self.data_root),
            '--resume',
            *(['--cfg-options', *options] if options else []),
        ]
        self.work_dir.mkdir(parents=True, exist_ok=True)
        config = self.config.relative_to(REPO)
        console.print(f'[bold]{self.label}[/]: {config}, log in {self.log}')
        with self.log.open('w') as file:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            last = self._follow(process.stdout, file, console, _epochs(self, options))
        if process.wait():
            console.print(''.join(last), highlight=False, markup=False)
            sys.exit(f'{self.label}: the training failed, see {self.log}')

    def _follow(self, lines, file, console, epochs):
        """Write lines to a file, show what they say, and return the last ones."""
        columns = (
            TextColumn('  {task.description}'),
            BarColumn(),
            TextColumn('{task.percentage:>3.0f} %'),
            TimeElapsedColumn(),
            TextColumn('{task.fields[note]}'),
        )
        # Without a terminal there is no bar, and notes become lines.
        plain = not console.is_terminal
        last = []
        with Progress(*columns, console=console, disable=plain) as progress:
            bar = progress.add_task('starting', total=None, note='')
            for line in lines:
                file.write(line)
                last = [*last[-29:], line]
                seen = TRAIN_LINE.search(line)
                if seen:
                    epoch, step, steps = (int(s) for s in seen.groups())
                    progress.update(
                        bar,
                        description=f'epoch {epoch:2d}',
                        completed=(epoch - 1) * steps + step,
                        total=steps * epochs,
                    )
                note = self._note(line)
                if note:
                    progress.update(bar, note=note[-1])
                    if plain:
                        console.print(f'  {": ".join(note)}')
        return last

    def _note(self, line):
        """What a line says that is worth showing: where it has to be told, and what."""
        value = self.metric.find(line)
        if value:
            return f'epoch {value[0]}', f'{self.metric.name} {value[1]:.1f} %'
        if 'Training unrolled' in line or 'Training at the equil' in line:
            return (line.split(' - ')[-1].strip(),)
        return None

    def read(self):
        """What the runs in the work dir logged, a later one winning over an earlier.

        Returns:
            tuple[float, list]: Seconds in training iterations; pairs of epoch and
            value of the metric in percent.
        """
        times, values = {}, {}
        for path in sorted(self.work_dir.glob('*/vis_data/scalars.json')):
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                if 'loss' in entry:
                    times[entry['step']] = entry['time']
                elif self.metric.key in entry:
                    values[entry['step']] = entry[self.metric.key]
        before, seconds = 0, 0.0
        for step in sorted(times):
            seconds += times[step] * (step - before)
            before = step
        return seconds, sorted(values.items())


def _epochs(training, options):
    given = [o for o in options if o.startswith('train_cfg.max_epochs=')]
    if given:
        return int(given[-1].split('=')[1])
    return Config.fromfile(training.config).train_cfg.max_epochs
