"""Facts about the machine that figures belong to."""

import os
import platform
import shlex
import sys
from pathlib import Path

import torch

from mdeq_mm.compat import installed_versions


def facts(settings):
    """Machine and software of a run.

    Args:
        settings (Settings): Of the run.

    Returns:
        dict[str, object]: Name to value.
    """
    found = dict(cpu=cpu_name(), cores=os.cpu_count(), threads=settings.threads)
    if settings.on_gpu:
        found['gpu'] = torch.cuda.get_device_name(settings.device)
    if hasattr(os, 'getloadavg'):
        # Above the number of cores, others were at work beside the benchmark.
        found['load before'] = round(os.getloadavg()[0], 1)
    found |= dict(python=platform.python_version()) | installed_versions()
    return found | dict(command=shlex.join(['python', *sys.argv]))


def cpu_name():
    """str: As the system calls it."""
    info = Path('/proc/cpuinfo')
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    return platform.processor() or platform.machine()
