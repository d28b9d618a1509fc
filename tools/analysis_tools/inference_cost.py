r"""Measure what the inference of an image costs: time, memory, evaluations of f.

Each model is built in a process of its own, so that the peak memory is its own, and
the processes take turns, so that what else the machine does meets all alike. Images
are random numbers and segmented as a whole, whatever the config's test mode. Weights
are random too, unless a config is given as CONFIG=CHECKPOINT; then the solver runs to
its limit of evaluations, which is the most that an image can cost.

Ratios are to the model that is named last.

Example:
    python tools/analysis_tools/inference_cost.py \
        configs/cityscapes/fcn_mdeq-small_4xb3-124k_cityscapes-512x1024.py \
        configs/cityscapes/fcn_hr48_4xb3-124k_cityscapes-512x1024.py --shape 1024 2048
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.device import get_device
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / 'demo'))
from common import check_checkpoint_path, fail, merge_options, read_config
from options import add_config_options
from tables import Results

from mdeq_mm.apis.inference import load_model
from mdeq_mm.registry import name_of

COLUMNS = {
    'parameters, M': '{:.1f}',
    'evaluations': '{:g}',
    'time, s': '{:.3f}',
    'relative time': '{:.2f}',
    's an evaluation': '{:.4f}',
    'before, MB': '{:,.0f}',
    'peak, MB': '{:,.0f}',
    'relative peak': '{:.2f}',
}
# Columns of the terminal, where the output goes to a file.
FILE_WIDTH = 180


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'configs', nargs='+', metavar='CONFIG[=CHECKPOINT]', help='configs of models'
    )
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        default=[224, 224],
        metavar=('H', 'W'),
        help='height and width of the images (default: 224 224)',
    )
    parser.add_argument(
        '--batch', type=int, default=1, help='images at once (default: %(default)s)'
    )
    parser.add_argument(
        '--repeat',
        type=int,
        default=5,
        help='timed runs, after one that is not; the median counts (default: '
        '%(default)s)',
    )
    parser.add_argument(
        '--threads', type=int, help="threads of a CPU (default: PyTorch's choice)"
    )
    parser.add_argument(
        '--device', help='such as cpu or cuda:0 (default: a GPU if any)'
    )
    parser.add_argument('--json', metavar='FILE', help='write the figures to a file')
    parser.add_argument(
        '--markdown', action='store_true', help='print the table as Markdown too'
    )
    add_config_options(
        parser,
        'override settings of the configs; those of model.backbone go to MDEQ '
        'backbones alone',
    )
    args = parser.parse_args(argv)
    for name in ('batch', 'repeat', 'threads'):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f'--{name} is {value}; it has to be at least 1')
    if min(args.shape) < 1:
        parser.error('--shape is {} {}; both have to be at least 1'.format(*args.shape))
    return args


def prepare(path, options):
    """Read a config and make its model segment images as a whole.

    Args:
        path (str): The config file.
        options (dict, optional): To merge into it.

    Returns:
        Config: With ``default_scope`` and ``model``.
    """
    cfg = read_config(path)
    if cfg.get('default_scope') not in ('mmpretrain', 'mmseg') or 'model' not in cfg:
        fail(
            f'{path!r} has no model to measure: it needs model and default_scope='
            "'mmpretrain' or 'mmseg'."
        )
    of_backbone = 'model.backbone'
    if name_of(cfg.model.get('backbone', {}).get('type')) != 'MDEQ':
        options = {
            key: value
            for key, value in (options or {}).items()
            if not f'{key}.'.startswith(f'{of_backbone}.')
        }
    merge_options(cfg, options)
    if 'decode_head' in cfg.model:
        cfg.model.test_cfg = dict(mode='whole')
    return cfg


# In the process of a model


class Measured:
    """A model and a batch of random images.

    Args:
        cfg (Config): Made by :func:`prepare`.
        checkpoint (str, optional): Default: random weights.
        shape (Sequence[int]): Height and width of images.
        batch (int): Number of images.
        device (str): Where to.
    """

    def __init__(self, cfg, checkpoint, shape, batch, device):
        self.device = torch.device(device)
        self.model = load_model(cfg, checkpoint, device)
        generator = torch.Generator().manual_seed(0)
        size = (cfg.model.backbone.get('in_channels', 3), *shape)
        self.images = [
            torch.randint(256, size, dtype=torch.uint8, generator=generator)
            for _ in range(batch)
        ]
        meta = dict(ori_shape=tuple(shape), img_shape=tuple(shape))
        if 'decode_head' in cfg.model:
            from mmseg.structures import SegDataSample as DataSample
        else:
            from mmpretrain.structures import DataSample
        self.samples = [DataSample(metainfo=dict(meta)) for _ in range(batch)]

    @property
    def on_gpu(self):
        return self.device.type == 'cuda'

    def describe(self):
        """dict: What holds before the first image."""
        parameters = sum(p.numel() for p in self.model.parameters())
        if self.on_gpu:
            memory = torch.cuda.memory_allocated(self.device)
        else:
            memory = process_memory()[0]
        return dict(parameters=parameters, before=memory)

    def run(self):
        """dict: Seconds of one inference, evaluations of f, and peak memory."""
        data = dict(
            inputs=list(self.images), data_samples=[s.clone() for s in self.samples]
        )
        self._wait()
        begin = time.perf_counter()
        with torch.no_grad():
            self.model.test_step(data)
        self._wait()
        seconds = time.perf_counter() - begin
        solution = getattr(self.model.backbone, 'last_solution', None)
        peak = process_memory()[1]
        if self.on_gpu:
            peak = torch.cuda.max_memory_allocated(self.device)
        return dict(
            seconds=seconds,
            evaluations=solution and solution.steps.double().mean().item(),
            peak=peak,
        )

    def _wait(self):
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


def process_memory():
    """Resident memory of this process, now and at its peak, in bytes."""
    try:
        status = Path('/proc/self/status').read_text()
    except OSError:
        # What this gives is in bytes on a Mac, and has no value for now.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak, peak
    # ru_maxrss would be that of the process that started this one, if it is larger.
    lines = dict(line.split(':', 1) for line in status.splitlines() if ':' in line)
    return tuple(1024 * int(lines[key].split()[0]) for key in ('VmRSS', 'VmHWM'))


def serve(job):
    """Measure one model, a line on stdin a run; results are lines on stdout."""
    # Nothing else may write to stdout.
    out = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)

    def answer(result):
        print(json.dumps(result), file=out, flush=True)

    if job['threads']:
        torch.set_num_threads(job['threads'])
    try:
        cfg = Config.fromstring(job['config'], '.py')
        measured = Measured(
            cfg, job['checkpoint'], job['shape'], job['batch'], job['device']
        )
        answer(measured.describe())
        for _ in sys.stdin:
            answer(measured.run())
    except (AssertionError, ImportError, OSError, RuntimeError, ValueError) as error:
        answer(dict(error=' '.join(str(error).split()) or type(error).__name__))


# In the process that was started


class Worker:
    """The process of a model."""

    def __init__(self, label, job):
        self.label = label
        # What a pipe that nobody reads holds is limited.
        self.errors = tempfile.TemporaryFile('w+')
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), '--serve', json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.found = self._read()

    def run(self):
        """What one inference took; see :meth:`Measured.run`."""
        self.process.stdin.write('\n')
        self.process.stdin.flush()
        return self._read()

    def _read(self):
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            sys.stderr.write(self.errors.read())
            code = self.process.wait()
            reason = 'failed' if code > 0 else 'was killed (is memory short?)'
            fail(f'the process of {self.label} {reason}, exit status {code}.')
        result = json.loads(line)
        if 'error' in result:
            fail(f'{self.label}: {result["error"]}')
        return result

    def close(self):
        self.process.kill()
        self.process.communicate()
        self.errors.close()


def name_models(models):
    """A label for each (config, checkpoint), by which they can be told apart."""
    stems = [Path(config).stem for config, _ in models]
    labels = []
    for stem, (_, checkpoint) in zip(stems, models, strict=True):
        if stems.count(stem) > 1:
            stem += f' ({Path(checkpoint).name if checkpoint else "random"})'
        if stem in labels:
            fail(f'{stem!r} is named twice.')
        labels.append(stem)
    return labels


def measure(jobs, repeat):
    """Run models in turns, each in its own process.

    Args:
        jobs (dict[str, dict]): By label, what :func:`serve` is given.
        repeat (int): Timed runs of each.

    Returns:
        dict[str, dict]: By label ``parameters``, ``before`` (bytes), ``seconds``
        (a list), ``evaluations`` (None without a solver) and ``peak`` (bytes).
    """
    workers = []
    try:
        for label, job in jobs.items():
            workers.append(Worker(label, job))
            first = workers[-1].run()
            print(f'{label}: first run {first["seconds"]:.2f} s', file=sys.stderr)
        runs = [[worker.run() for worker in workers] for _ in range(repeat)]
        return {
            worker.label: dict(
                worker.found,
                seconds=[run['seconds'] for run in mine],
                evaluations=mine[-1]['evaluations'],
                peak=mine[-1]['peak'],
            )
            for worker, mine in zip(workers, zip(*runs, strict=True), strict=True)
        }
    finally:
        for worker in workers:
            worker.close()


def tabulate(measured, title, note):
    """Results: A row a model, ratios to the last."""
    seconds = {k: statistics.median(m['seconds']) for k, m in measured.items()}
    last = list(measured)[-1]
    rows = {}
    for label, model in measured.items():
        count = model['evaluations']
        rows[label] = [
            model['parameters'] / 1e6,
            count,
            seconds[label],
            seconds[label] / seconds[last],
            seconds[label] / count if count else None,
            model['before'] / 1e6,
            model['peak'] / 1e6,
            model['peak'] / measured[last]['peak'],
        ]
    return Results(title, COLUMNS, rows, note)


def device_name(device, threads):
    if torch.device(device).type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'CPU ({platform.machine()}), {threads} threads'


def main(argv=None) -> None:
    args = parse_args(argv)
    models = [tuple(text.split('=', 1)) for text in args.configs]
    models = [model if len(model) == 2 else (*model, None) for model in models]
    labels = name_models(models)
    device = args.device or get_device()
    jobs = {}
    for label, (config, checkpoint) in zip(labels, models, strict=True):
        if checkpoint is not None:
            check_checkpoint_path(checkpoint)
        cfg = prepare(config, args.cfg_options)
        jobs[label] = dict(
            config=cfg.pretty_text,
            checkpoint=checkpoint,
            shape=args.shape,
            batch=args.batch,
            device=device,
            threads=args.threads,
        )
    threads = args.threads or torch.get_num_threads()
    measured = measure(jobs, args.repeat)
    kind = 'images' if args.batch > 1 else 'image'
    runs = f'median of {args.repeat} runs' if args.repeat > 1 else 'one run'
    results = tabulate(
        measured,
        f'Inference of {args.batch} {kind} of {args.shape[0]}x{args.shape[1]} pixels',
        f'{device_name(device, threads)}; {runs}; memory is that '
        + ('of tensors on the GPU' if device.startswith('cuda') else 'of the process')
        + f', before the first image and at most; ratios to {labels[-1]}',
    )
    Console(width=None if sys.stdout.isatty() else FILE_WIDTH).print(results.rich())
    if args.markdown:
        print(results.markdown(), end='')
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        about = dict(
            shape=args.shape,
            batch=args.batch,
            device=device_name(device, threads),
            torch=torch.__version__,
        )
        content = about | dict(figures=results.figures(), measured=measured)
        Path(args.json).write_text(json.dumps(content, indent=2) + '\n')


if __name__ == '__main__':
    if sys.argv[1:2] == ['--serve']:
        serve(json.loads(sys.argv[2]))
    else:
        main()
