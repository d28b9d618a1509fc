"""A copy of the repository in which what the pages say is done, on tiny data."""

import contextlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import cv2
import numpy as np

from tests.docs.pages import ROOT, blocks, config_place, kind
from tests.docs.short_python import COUNTS, make_checkpoint
from tests.helpers import load_tool
from tests.short_trainings import write_data_sets
from tests.test_tools.test_camvid_converter import members
from tests.test_tools.test_cifar10_converter import python_members, write_archive

HERE = Path(__file__).parent
# What a checkout has; nothing that was made in one.
COPIED = (
    *('configs', 'docs', 'mdeq_mm', 'requirements', 'tests', 'tools', 'dev'),
    *('Makefile', 'README.md', 'CHANGELOG.md', 'CONTRIBUTING.md', 'CITATION.cff'),
    *('LICENSE', 'model-index.yml', 'pyproject.toml', 'setup.py'),
)
MADE = shutil.ignore_patterns('site', '*_cache', '.hypothesis', 'work_dirs')

DIGITS = 'configs/demo/mdeq_1xb64-30e_digits.py'
IN1K = 'configs/imagenet/mdeq-small_4xb32-100e_in1k.py'
CAMVID = 'fcn_mdeq_short_1xb4-1400it_camvid-180x240'
STREETS = 'configs/cityscapes/fcn_mdeq-small_4xb3-124k_cityscapes-512x1024.py'

# What stands for something of the reader's. The folders below {data} hold the tiny
# data sets.
PLACEHOLDERS = {
    'CONFIG': DIGITS,
    'CHECKPOINT': 'work_dirs/mdeq_1xb64-30e_digits/epoch_30.pth',
    'OTHER_CONFIG': 'configs/demo/hrnet_1xb64-30e_digits.py',
    'FRAMES': 'data/digit_scenes/images/test',
    'IMAGE': 'data/digit_scenes/images/test/0000.png',
    'GPUS': '2',
    'PARTITION': 'part',
    'JOB_NAME': 'job',
    'SRC': 'official.pth',
    'DST': 'work_dirs/converted.pth',
    'FILE': 'work_dirs/file.out',
    'DIR': 'work_dirs/dir',
    '[WORK_DIR]': 'work_dirs/job',
    '[arguments of train.py]': '--resume',
    '[arguments]': '--resume',
    '[data/cifar10]': 'data/cifar10',
    '[data/camvid]': 'data/camvid',
    '/path/to/archive': '{data}/cifar-10-python.tar.gz',
    '/path/to/cifar-10-python.tar.gz': '{data}/cifar-10-python.tar.gz',
    '/path/to/camvid.tar': '{data}/camvid.tar',
    '/path/to/scenes': '{data}/digit_scenes',
    '/path/to/mdeq_mm': '{root}',
    '/path/to/': '{data}/',
}
# Pages that mean other ones.
ON_PAGE = {
    'README.md': {
        'CONFIG': f'configs/camvid/{CAMVID}.py',
        'CHECKPOINT': f'work_dirs/{CAMVID}/iter_1400.pth',
        'OTHER_CONFIG': 'configs/camvid/fcn_hr18s_short_1xb4-1400it_camvid-180x240.py',
        'FRAMES': 'data/camvid/images/test',
        'IMAGE': 'data/camvid/images/test/0.jpg',
        '--shape 1024 2048': '--shape 64 128',
    },
    'docs/datasets.md': {'CONFIG': IN1K},
    'docs/distributed.md': {'CONFIG': 'configs/imagenet/{snippet}'},
    'configs/cityscapes/README.md': {
        'CHECKPOINT': f'work_dirs/{Path(STREETS).stem}/iter_124000.pth',
    },
    'configs/imagenet/README.md': {
        'CHECKPOINT': f'work_dirs/{Path(IN1K).stem}/epoch_100.pth',
    },
}
# Data sets that a page makes itself.
MADE_BY_PAGE = {
    'docs/datasets.md': ('imagenet', 'cifar10', 'camvid'),
    'docs/get_started.md': ('digits',),
    'docs/inference.md': ('digits', 'digit_scenes'),
    'docs/toolbox_helpers.md': ('digits', 'digit_scenes'),
    'configs/camvid/README.md': ('camvid',),
    'configs/cifar10/README.md': ('cifar10',),
}
# Modules as which a page tells its readers to save its first script.
MODULES = {'docs/extending.md': 'my_solvers'}
# Checkpoints that Python blocks load, and whose models they hold.
CHECKPOINTS = {
    'work_dirs/mine/epoch_30.pth': DIGITS,
}


def write_data(root):
    """Write data sets, and archives of data sets.

    Args:
        root (Path): Where to.

    Returns:
        Path: ``root``.
    """
    write_data_sets(root)
    # The pages name files of these two.
    for name in ('digits', 'digit_scenes'):
        shutil.rmtree(root / name)
    load_tool('tools/dataset_converters/digits.py').write_digits(root / 'digits')
    load_tool('tools/dataset_converters/digit_scenes.py').write_scenes(
        root / 'digit_scenes', COUNTS['dataset_converters/digit_scenes.py']
    )
    write_flowers(root / 'flowers')
    write_archives(root)
    return root


def write_flowers(root):
    """What docs/custom_data.md trains on."""
    for split in ('train', 'test'):
        for i, name in enumerate(('daisy', 'tulip')):
            folder = root / split / name
            folder.mkdir(parents=True)
            for j in range(2):
                image = np.full((72, 80, 3), 40 * (2 * i + j + 1), np.uint8)
                assert cv2.imwrite(str(folder / f'{j:03d}.jpg'), image)


def write_archives(root):
    """As the tests of the converters do."""
    write_archive(root / 'cifar-10-python.tar.gz', python_members())
    with tarfile.open(root / 'camvid.tar', 'w') as archive:
        for name, data in members().items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


class Sandbox:
    """A copy of the repository, with a ``bin`` folder that stands in for programs.

    Args:
        root (Path): Where to; it must not exist.
        data (Path): What :func:`write_data` wrote.
        page (str): Whose blocks will be run. Its configs are saved at once.
    """

    def __init__(self, root, data, page):
        self.root, self.data, self.page = root, data, page
        root.mkdir(parents=True)
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, root / name, ignore=MADE)
            elif (ROOT / name).exists():
                shutil.copy2(ROOT / name, root / name)
        for name in ('data', 'work_dirs', '.venv/bin', 'shims'):
            (root / name).mkdir(parents=True)
        (root / '.venv/bin/activate').touch()
        for path in data.iterdir():
            if path.suffix in ('.tar', '.gz'):
                (root / path.name).symlink_to(path)
            else:
                (root / 'data' / path.name).symlink_to(path)
        self.snippet = ''
        for block in blocks(page):
            if block.language == 'python' and kind(block) == 'config':
                path = root / config_place(block)
                path.parent.mkdir(exist_ok=True)
                path.write_text(block.code)
                self.snippet = path.name
        self.environment = os.environ | dict(
            PATH=f'{root / "shims"}{os.pathsep}{os.environ["PATH"]}',
            PYTHONPATH=str(root),
            MPLBACKEND='Agg',
            CUDA_VISIBLE_DEVICES='-1',
            OMP_NUM_THREADS='1',
        )
        # Those of the make that runs the tests.
        for name in ('MAKEFLAGS', 'MAKEOVERRIDES', 'MFLAGS', 'STACK', 'ENV', 'PYTHON'):
            self.environment.pop(name, None)

    def _remove_what_is_made(self):
        for name in MADE_BY_PAGE.get(self.page, ()):
            (self.root / 'data' / name).unlink()

    def shim(self, name, text):
        path = self.root / 'shims' / name
        path.write_text(f'#!/usr/bin/env bash\n{text}\n')
        path.chmod(0o755)

    def fill(self, code):
        """Put something in the place of what stands for something of the reader's."""
        table = PLACEHOLDERS | ON_PAGE.get(self.page, {})
        for name in sorted(table, key=len, reverse=True):
            value = table[name].format(
                data=self.data, root=self.root, snippet=self.snippet
            )
            if re.fullmatch('[A-Z_]+', name):
                code = re.sub(rf'(?<![\w$./-]){name}(?![\w=])', value, code)
            else:
                code = code.replace(name, value)
        return code

    def run_for_real(self):
        """Let commands run, on short trainings and small data."""
        self._remove_what_is_made()
        python = shlex.quote(sys.executable)
        make = shutil.which('make')
        self.shim('python', f'exec {python} {HERE / "short_python.py"} "$@"')
        self.shim('pip', f'exec {python} {HERE / "dry_pip.py"} "$@"')
        self.shim('make', f'exec {make} -n "$@"')
        # A job of one task. Without GPUs, only what slurm would start is tried.
        self.shim('srun', 'while [[ $1 == -* ]]; do\n'
                  '    if [[ $1 == -p ]]; then shift; fi\n    shift\ndone\n'
                  'arguments=()\nfor argument; do\n'
                  '    [[ $argument == slurm ]] && argument=none\n'
                  '    arguments+=("$argument")\ndone\n'
                  'exec "${arguments[@]}"')  # fmt: skip

    def run_dry(self):
        """Let commands say what they are given, and nothing else."""
        self._remove_what_is_made()
        self.environment['SAID'] = str(self.root / 'said')
        for name in ('python', 'pip', 'make'):
            self.shim(
                name,
                # What follows -c says where something is.
                f'if [[ $1 == -c ]]; then exec {shlex.quote(sys.executable)} "$@"; fi\n'
                f'printf "%s\\0" {name} "$@" > "$SAID/$$"\n'
                # This serves as a config where a command asks for one.
                f'if [[ $1 == -m && $2 != torch.* ]]; then echo {DIGITS}; fi',
            )
        self.shim('srun', 'while [[ $1 != python ]]; do shift; done\nexec "$@"')

    def said(self, code):
        """What the programs of some commands are given, as lists of words."""
        folder = self.root / 'said'
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self.bash(code)
        return [path.read_text().split('\0')[:-1] for path in folder.iterdir()]

    def bash(self, code, timeout=600):
        """Run commands.

        Raises:
            AssertionError: If one fails, with the end of what it said.
        """
        return self._run(['bash', '-e', '-c', code], code, timeout)

    def script(self, code, name, timeout=600):
        """Run a Python script that is saved in the folder."""
        self.save(code, name)
        return self._run([str(self.root / 'shims/python'), name], code, timeout)

    def save(self, code, name):
        """Save a script, and make the checkpoints that it loads.

        Returns:
            bool: Whether all is there that it names in work folders.
        """
        (self.root / name).write_text(code)
        with contextlib.chdir(self.root):
            for path, config in CHECKPOINTS.items():
                if path in code:
                    make_checkpoint(path, config)
        named = re.findall(r"'(work_dirs/[\w./-]+)'", code)
        return all((self.root / name).exists() for name in named)

    def _run(self, command, code, timeout):
        process = subprocess.Popen(
            command,
            cwd=self.root,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            # So that nothing is left behind of a command that is ended.
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(timeout=timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        assert process.returncode == 0, f'{code}\n{said[-4000:]}'
        return said
