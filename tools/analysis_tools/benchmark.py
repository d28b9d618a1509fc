"""Compare MDEQ with ResNet, HRNet and torchdeq: time, memory, evaluations.

All models are whole classifiers on random images, measured in one run, each round
timing every case once, so that drift of the machine hits all alike. MDEQ under any
solver and gradient, and torchdeq driving the same f, use one set of contractive
weights, which is made first and kept in OUT. Compare ratios, not seconds.

torchdeq is left out where it is not installed: pip install -r
requirements/benchmark.txt. Nothing else should run on the machine meanwhile.

Writes OUT/results.md, OUT/results.json and OUT/results.png.

Example:
    python tools/analysis_tools/benchmark.py --threads 2
    python tools/analysis_tools/benchmark.py --cases phantom ResNet-50 --dtype bf16
"""

import argparse
import json
import os
import os.path as osp
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

sys.path.insert(0, osp.dirname(osp.dirname(osp.abspath(__file__))))
sys.path.insert(0, osp.dirname(osp.abspath(__file__)))
from benchmarking import cases as choices
from benchmarking import report
from benchmarking.compiling import compile_subject
from benchmarking.contractive import contractive_weights
from benchmarking.machine import facts
from benchmarking.measure import Subject
from benchmarking.overhead import solver_overhead
from benchmarking.progress import progress
from benchmarking.settings import Settings
from common import check_checkpoint_path, fail

from mdeq_mm.models.backbones.arch import build_arch

PEAK_SCRIPT = osp.join(osp.dirname(osp.abspath(__file__)), 'benchmarking', 'peak.py')
ROUNDS, QUICK_ROUNDS = 7, 3
#: Of the table where it goes into a file.
TABLE_WIDTH = 166


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--size', default='small', choices=choices.SIZES, help='arch of the MDEQ '
        '(default: %(default)s)')  # fmt: skip
    add('--batch', type=int, default=2, help='images a batch (default: %(default)s)')
    add('--image', type=int, default=224, metavar='PIXELS',
        help='side of the images (default: %(default)s)')  # fmt: skip
    add('--device', help='such as cpu or cuda:0 (default: a GPU where there is one)')
    add('--dtype', default='fp32', choices=['fp32', 'bf16'],
        help='bf16 is autocast (default: %(default)s)')  # fmt: skip
    add('--threads', type=int, default=torch.get_num_threads(),
        help='of PyTorch on the CPU (default here: %(default)s)')  # fmt: skip
    add('--channels-last', action='store_true', help='memory format of weights and '
        'images')  # fmt: skip
    add('--compile', action='store_true', help="compile f, and the others' backbones, "
        'where that works')  # fmt: skip
    add('--cases', nargs='+', default=[], metavar='PART',
        help=f'only cases whose label contains one of these, and {choices.REFERENCE}',
    )  # fmt: skip
    add('--tol', type=float, default=0.0, help='tolerance of the solvers in training; '
        '0 makes all evaluations (default: %(default)s)')  # fmt: skip
    add('--eval-tol', type=float, default=1e-2,
        help='relative tolerance in inference; official limits take --tol there too '
        '(default: %(default)s)')  # fmt: skip
    add('--weights', metavar='FILE', help='checkpoint of a trained MDEQ, in place of '
        'the contractive weights made here')  # fmt: skip
    add('--rounds', type=int, help=f'repetitions (default: {ROUNDS}, quick '
        f'{QUICK_ROUNDS})')  # fmt: skip
    add('--quick', action='store_true', help='fewer cases and rounds')
    add('--no-peak', action='store_true', help='do not measure peak memory')
    add('--out', default='work_dirs/benchmark', metavar='DIR',
        help='where results go (default: %(default)s)')  # fmt: skip
    return parser.parse_args(argv)


def settings_of(args) -> Settings:
    """Check the options and turn them into settings."""
    args.rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    for name in ('batch', 'threads', 'rounds'):
        if getattr(args, name) < 1:
            fail(f'--{name} is {getattr(args, name)}; it has to be at least 1.')
    for name in ('tol', 'eval_tol'):
        if not 0 <= getattr(args, name) < float('inf'):
            option = '--' + name.replace('_', '-')
            fail(f'{option} is {getattr(args, name)}; it has to be 0 or more.')
    least = max(build_arch(args.size).min_size, 32)
    if args.image < least:
        fail(
            f'--image is {args.image}; {args.size} and its peers need at least {least}.'
        )
    if args.batch == 1 and args.image < 64:
        fail(
            f'--batch 1 with --image {args.image} leaves batch norms of the peers a '
            'single number; use --batch 2 or larger images.'
        )
    device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        torch.zeros(1, device=device)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0].rstrip('.')
        fail(f'--device {device} cannot be used: {reason}.')
    return Settings(
        size=args.size,
        batch=args.batch,
        image=args.image,
        device=device,
        dtype=args.dtype,
        threads=args.threads,
        tol=args.tol,
        eval_tol=args.eval_tol,
        channels_last=args.channels_last,
        compile=args.compile,
        weights=args.weights or '',
    )


def peak_memory(cases, settings):
    """Peak bytes of one step of each case, in processes of their own.

    Returns:
        dict[str, int]: By label.
    """
    options = dict(settings=asdict(settings), labels=[c.label for c in cases])
    found, said = {}, tempfile.TemporaryFile('w+')
    process = subprocess.Popen(
        [sys.executable, PEAK_SCRIPT, json.dumps(options)],
        stdout=subprocess.PIPE,
        stderr=said,
        text=True,
        env=os.environ | dict(PYTHONWARNINGS='ignore'),
    )
    with process, said:
        for _ in progress(cases, 'Measuring peak memory'):
            line = process.stdout.readline()
            if not line:
                break
            answer = json.loads(line)
            found[answer['label']] = answer['peak']
        if process.wait():
            said.seek(0)
            reason = said.read().strip()
            fail(f'peak memory could not be measured ({reason}); use --no-peak.')
    return found


def measure_all(cases, settings, rounds, remarks):
    """Build, count and time all cases.

    Args:
        cases (list[Case]): The cases.
        settings (Settings): Of the run.
        rounds (int): How often everything is timed.
        remarks (list[str]): What does not work is added here.

    Returns:
        dict[str, dict]: By label what was found.
    """
    subjects, results = [], {}
    for case in progress(cases, 'Building and counting'):
        try:
            subject = Subject(case, settings)
            # Before the counts, because the first batch may be unlike the others.
            subject.step()
            results[case.label] = dict(group=case.group) | subject.counts()
        except RuntimeError as error:
            # Too little memory, or an operation that the device or type lacks.
            reason = str(error).strip().splitlines()[0]
            if case.label == choices.REFERENCE:
                fail(f'{case.label} does not run with these options: {reason}')
            remarks.append(f'{case.label} does not run and is left out: {reason}')
            continue
        if settings.compile and (reason := compile_subject(subject)):
            remarks.append(f'{case.label} runs uncompiled: {reason}')
        subjects.append(subject)
    for count in progress(range(rounds + 1), 'Timing'):
        for subject in subjects:
            subject.time_once()
            if count == 0:  # That was to warm up.
                subject.seconds = {part: [] for part in subject.seconds}
    for subject in subjects:
        results[subject.case.label]['seconds'] = subject.medians()
    return results


def main(argv=None) -> None:
    args = parse_args(argv)
    settings = settings_of(args)
    torch.set_num_threads(settings.threads)
    console, out, remarks = Console(), Path(args.out), []
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH)
    machine = facts(settings)
    try:
        cases = choices.choose_cases(args.cases, args.quick)
    except ValueError as error:
        fail(f'--cases {error}.')
    if not choices.HAS_TORCHDEQ:
        remarks.append(
            'torchdeq is not installed and left out: pip install -r '
            'requirements/benchmark.txt'
        )
    if args.weights:
        check_checkpoint_path(args.weights)
    try:
        weights = args.weights or contractive_weights(settings.size, out)
        settings = Settings(**asdict(settings) | dict(weights=str(weights)))
        choices.load_backbone(
            choices.build_classifier(choices.mdeq_config(settings.size)).backbone,
            settings.weights,
        )
    except (OSError, RuntimeError, ValueError) as error:
        fail(f'the weights cannot be used: {error}')

    peaks = {} if args.no_peak else peak_memory(cases, settings)
    results = measure_all(cases, settings, args.rounds, remarks)
    for label, result in results.items():
        result['peak'] = peaks.get(label)
    report.summarise(results)
    run = dict(
        cases=results,
        overhead=solver_overhead(settings, args.rounds),
        rounds=args.rounds,
        remarks=remarks,
        settings=asdict(settings),
        machine=machine,
    )
    report.write(run, out)
    console.print(report.rich_table(run))
    for line in report.notes(run):
        console.print(line, highlight=False, markup=False)
    for name in ('results.md', 'results.json', 'results.png'):
        print(out / name)


if __name__ == '__main__':
    main()
