"""Runs a script as ``python`` does, but trainings are short.

The current folder is a copy of the repository (``sandbox.py``). Trainings take two
iterations, and name their last checkpoint as the whole training would. What a page
takes for granted, such as a checkpoint of a training that another page has, is made
with random weights; only names that a training of some config would give are.
"""

import os
import re
import runpy
import socket
import sys
from pathlib import Path
from types import ModuleType

from tests.docs import dry_pip

# Fewer samples a class or a split than the tools insist on, for those that count.
COUNTS = {
    'dataset_converters/camvid.py': dict(train=3, val=1, test=2),
    'dataset_converters/cifar10.py': dict(train=2, test=1),
    'dataset_converters/digit_scenes.py': dict(train=4, test=2),
}
# Lines of tools that would do too much, as regular expressions, and what is done.
SHORTER = {
    name: ('^COUNTS = .+$', f'COUNTS = {counts}') for name, counts in COUNTS.items()
}
# The tables of the demo alone.
SHORTER['misc/model_zoo.py'] = (
    r"load\(ROOT / 'model-index.yml'\)\['Import'\]",
    "['configs/demo/metafile.yml']",
)
# Options that spare the tools most of their work.
FEWER = {
    'analysis_tools/benchmark.py': (
        *('--size', 'cifar-tiny', '--image', '32', '--rounds', '1', '--no-peak'),
        *('--cases', 'reversible'),
        *('--weights', 'work_dirs/mdeq-tiny_2xb64-50e_cifar10/epoch_50.pth'),
    ),
    'deployment/export.py': ('--runs', '1'),
}
# What a training of some config writes.
CHECKPOINT = re.compile(r'work_dirs/(?P<stem>[\w-]+)/(?P<last>(?:epoch|iter)_\d+\.pth)')


def main(arguments):
    """Do what ``python`` would do with some arguments."""
    # Processes that are started by the name of this one take the same way.
    real, sys.executable = sys.executable, str(Path.cwd() / 'shims' / 'python')
    given = list(arguments)
    while given[:1] == ['-u']:
        del given[0]
    if given[:1] == ['-m']:
        run_module(given[1], given[2:])
    elif given and not given[0].startswith('-'):
        run_script(Path(given[0]), given[1:])
    else:
        os.execv(real, [real, *arguments])


def run_module(name, arguments):
    if name == 'pip':
        dry_pip.check(arguments)
        return
    if name == 'torch.distributed.run':
        arguments = one_process(arguments)
    else:
        patch_runner()
    sys.path[0] = os.getcwd()
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name='__main__', alter_sys=True)


def run_script(script, arguments):
    source = script.read_text()
    name = f'{script.parent.name}/{script.name}'
    arguments = [*arguments, *FEWER.get(name, ())]
    if name in SHORTER:
        source, found = re.subn(*SHORTER[name], source, flags=re.MULTILINE)
        assert found == 1, f'{script} has no {SHORTER[name][0]}'
    if name not in COUNTS:
        patch_runner()
        for argument in arguments:
            make_checkpoint(argument.rpartition('=')[2])
    sys.argv = [str(script), *arguments]
    sys.path[0] = str(script.resolve().parent)
    module = sys.modules['__main__'] = ModuleType('__main__')
    module.__file__ = str(script)
    exec(compile(source, str(script), 'exec'), vars(module))


def one_process(arguments):
    """Arguments of torchrun for one process on this machine."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    mine = dict(nnodes=1, node_rank=0, master_addr='127.0.0.1', nproc_per_node=1)
    mine = [
        f'--{name}={value}' for name, value in (mine | dict(master_port=port)).items()
    ]
    names = {option.partition('=')[0] for option in mine}
    return mine + [a for a in arguments if a.partition('=')[0] not in names]


def patch_runner():
    """Let every Runner shorten its config, when options are merged into it."""
    from mmengine.hooks import Hook
    from mmengine.runner import Runner
    from yapf.yapflib import yapf_api

    from tests.short_trainings import LOADERS, shorten

    # Printing a config would take longer than training.
    yapf_api.FormatCode = lambda text, **style: (text, True)
    build = Runner.from_cfg.__func__

    class Rename(Hook):
        """Names the last checkpoint as that of the whole training."""

        priority = 'LOWEST'

        def __init__(self, name):
            self.name = name

        def after_train(self, runner):
            unit = self.name.partition('_')[0]
            short = Path(runner.work_dir, f'{unit}_{getattr(runner, unit)}.pth')
            whole = short.with_name(self.name)
            if short != whole:
                whole.unlink(missing_ok=True)
                os.link(short, whole)

    def from_cfg(cls, cfg):
        name = last_checkpoint(cfg)
        shorten(cfg)
        for loader in LOADERS:
            limit(cfg.get(loader))
        # So that there is something in the logs.
        for hook in ('logger', 'monitor'):
            if hook in cfg.get('default_hooks', {}):
                cfg.default_hooks[hook].interval = 1
        for path in pretrained(cfg.model):
            make_checkpoint(path)
        runner = build(cls, cfg)
        if name is not None:
            runner.register_hook(Rename(name))
        return runner

    Runner.from_cfg = classmethod(from_cfg)


def last_checkpoint(cfg):
    """The name of what a training writes last."""
    from tests.short_trainings import counts_epochs

    if cfg.get('train_cfg') is None:
        return None
    if counts_epochs(cfg):
        return f'epoch_{cfg.train_cfg.max_epochs}.pth'
    return f'iter_{cfg.train_cfg.max_iters}.pth'


def limit(node):
    """Leave four samples of each data set."""
    if isinstance(node, list | tuple):
        for part in node:
            limit(part)
    elif isinstance(node, dict):
        if 'data_root' in node and 'type' in node:
            node['indices'] = 4
        for part in list(node.values()):
            limit(part)


def pretrained(node):
    """Files that parts of a model start from."""
    if isinstance(node, list | tuple):
        for part in node:
            yield from pretrained(part)
    elif isinstance(node, dict):
        if node.get('type') == 'Pretrained':
            yield str(node['checkpoint'])
        for part in node.values():
            yield from pretrained(part)


def make_checkpoint(path, config=None):
    """Write random weights to where a training would write its last ones.

    Args:
        path (str): Left alone if it exists, or if no training is called like it.
        config (str, optional): Default: found by the name of the work folder.
    """
    found = CHECKPOINT.fullmatch(path)
    if os.path.exists(path) or not (found or config):
        return
    import torch
    from mmengine.config import Config

    from mdeq_mm.apis.inference import load_model

    if config is None:
        configs = list(Path('configs').glob(f'*/{found["stem"]}.py'))
        if not configs:
            return
        (config,) = configs
        cfg = Config.fromfile(config)
        if last_checkpoint(cfg) != found['last']:
            sys.exit(f'{config} ends with {last_checkpoint(cfg)}, not with {path}')
    cfg = Config.fromfile(config)
    model = load_model(cfg, device='cpu')
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(state_dict=model.state_dict(), meta=dict(epoch=1, iter=2)), path)


if __name__ == '__main__':
    # By this name, so that a script has __main__ for itself.
    from tests.docs import short_python

    short_python.main(sys.argv[1:])
