"""Peak memory of one training step of each case, each in a process of its own.

Called by tools/analysis_tools/benchmark.py with settings and labels in JSON; prints
one line of JSON a case. A process that has computed nothing yet imports everything
once and forks for each case, which is faster than a start for each.
"""

import json
import os
import resource
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarking.cases import choose_cases
from benchmarking.measure import Subject
from benchmarking.settings import Settings

STATUS, CLEAR = Path('/proc/self/status'), Path('/proc/self/clear_refs')


def _kilobytes(name):
    for line in STATUS.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise LookupError(name)


def resident():
    """Bytes of memory this process has now, as the start of a measurement."""
    try:
        CLEAR.write_text('5')  # The peak from now on.
        return _kilobytes('VmRSS') * 1024
    except (OSError, LookupError):
        return _most()


def peak():
    """Bytes of memory this process had at most since :func:`resident`."""
    try:
        return _kilobytes('VmHWM') * 1024
    except (OSError, LookupError):
        return _most()


def _most():
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == 'darwin' else most * 1024


def measure(case, settings):
    """Peak bytes of one training step beyond what the ready model takes."""
    torch.set_num_threads(settings.threads)
    subject = Subject(case, settings)
    if settings.on_gpu:
        torch.cuda.synchronize(settings.device)
        before = torch.cuda.memory_allocated(settings.device)
        torch.cuda.reset_peak_memory_stats(settings.device)
        subject.step()
        return torch.cuda.max_memory_allocated(settings.device) - before
    before = resident()
    subject.step()
    return peak() - before


def main():
    options = json.loads(sys.argv[1])
    settings = Settings(**options['settings'])
    cases = {case.label: case for case in choose_cases()}
    for label in options['labels']:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            try:
                found = measure(cases[label], settings)
            except RuntimeError:
                found = None  # The caller meets the same error and tells it.
            except BaseException as error:
                print(f'{label}: {error}', file=sys.stderr, flush=True)
                os._exit(1)
            print(json.dumps(dict(label=label, peak=found)), flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(f'{label} failed')


if __name__ == '__main__':
    main()
