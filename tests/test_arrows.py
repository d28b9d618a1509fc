"""Imports go one way: tools, rooms, engine and models, registry, mathematics."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest

from tests.helpers import ROOT

#: Rooms of the package from the bottom up. A room imports from lower levels, and from
#: those of its own without circles.
LEVELS = (
    {'implicit'},
    {'compat', 'registry', 'tasks', 'version'},
    {'checkpoints'},
    {'engine', 'models'},
    {'analysis', 'apis', 'data_guard', 'deployment', 'multi_task', 'resume'},
    {'__init__', '__main__'},
)
LEVEL = {room: i for i, rooms in enumerate(LEVELS) for room in rooms}


def imported(path):
    """Dotted names that a file imports, relative ones resolved."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = '.'.join((*start, *filter(None, [node.module])))
            yield from (f'{module}.{alias.name}' for alias in node.names)


def room_of(name):
    """The room of a dotted name of the package."""
    first = (name.split('.') + [''])[1]
    return first if first in LEVEL else '__init__'


def arrows():
    """Pairs of rooms, of which the first imports from the second."""
    found = {}
    for path in sorted((ROOT / 'mdeq_mm').rglob('*.py')):
        parts = path.relative_to(ROOT / 'mdeq_mm').with_suffix('').parts
        for name in imported(path):
            if name.partition('.')[0] == 'mdeq_mm' and room_of(name) != parts[0]:
                found.setdefault((parts[0], room_of(name)), []).append(str(path))
    return found


def test_every_room_has_a_level():
    folders = (ROOT / 'mdeq_mm').iterdir()
    rooms = {
        p.stem for p in folders if p.suffix == '.py' or (p / '__init__.py').is_file()
    }
    assert rooms == set(LEVEL)


def test_arrows_point_one_way():
    found = arrows()
    wrong = {
        pair: files for pair, files in found.items() if LEVEL[pair[0]] < LEVEL[pair[1]]
    }
    assert not wrong
    graph = {}
    for above, below in found:
        graph.setdefault(above, set()).add(below)
    assert graph['registry'] == {'implicit'}
    # Raises where there is a circle.
    TopologicalSorter(graph).prepare()


def test_no_circles_among_modules():
    """Of tools too, whose modules are found through sys.path by their names."""
    files = {
        '.'.join(p.relative_to(ROOT).with_suffix('').parts): p
        for folder in ('mdeq_mm', 'tools', 'dev')
        for p in (ROOT / folder).rglob('*.py')
    }
    packages = {n.removesuffix('.__init__') for n in files if n.endswith('.__init__')}
    short = {}
    for name in files:
        if name.startswith(('tools.', 'dev.')):
            parts = name.split('.')
            for i in range(1, len(parts)):
                short['.'.join(parts[i:])] = name
    graph = {}
    for name, path in files.items():
        for target in imported(path):
            for candidate in (target, target.rpartition('.')[0]):
                module = candidate if candidate in files else short.get(candidate)
                # Packages import what they export.
                if module and module != name and candidate not in packages:
                    graph.setdefault(name, set()).add(module)
                    break
    assert len(graph) > 100
    TopologicalSorter(graph).prepare()


def test_the_package_imports_no_tools():
    for path in (ROOT / 'mdeq_mm').rglob('*.py'):
        assert not any(
            name.split('.')[0] in ('dev', 'tools', 'tests') for name in imported(path)
        )


def test_the_mathematics_need_torch_alone():
    """Lifted out of the package, it imports, solves and differentiates."""
    code = """
        import sys
        for name in ('mmengine', 'mmcv', 'mmpretrain', 'mmseg', 'mdeq_mm'):
            sys.modules[name] = None
        import implicit, torch
        from torch import nn
        torch.manual_seed(0)

        class F(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(4, 4).double()

            def forward(self, z, x):
                return [torch.tanh(self.linear(z[0]) / 3 + x)]

        f = F()
        layer = implicit.EquilibriumLayer(
            f,
            solver=dict(type='AndersonSolver', max_steps=50, tol=1e-13),
            gradient=dict(
                type='ImplicitGradient',
                solver=dict(type='BroydenSolver', max_steps=50, tol=1e-13),
            ),
        )
        x = torch.randn(3, 4, dtype=torch.float64)
        (z,) = layer([torch.zeros_like(x)], x)
        z.square().sum().backward()
        found = f.linear.weight.grad.clone()
        assert (z - f([z], x)[0]).abs().max() < 1e-12
        # The same by differentiating a long iteration.
        f.zero_grad()
        z = torch.zeros_like(x)
        for _ in range(100):
            (z,) = f([z], x)
        z.square().sum().backward()
        assert (found - f.linear.weight.grad).abs().max() < 1e-11
    """
    run = subprocess.run(
        [sys.executable, '-c', '\n'.join(line[8:] for line in code.splitlines())],
        cwd=ROOT / 'mdeq_mm',
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize('name', ['SOLVERS', 'GRADIENTS'])
def test_the_registries_hold_what_the_mathematics_export(name):
    from mdeq_mm import implicit, registry

    held = getattr(registry, name).module_dict
    kind = dict(SOLVERS='Solver', GRADIENTS='Gradient')[name]
    exported = {n for n in implicit.__all__ if n.endswith(kind) and n != kind}
    assert exported <= set(held)
    assert all(held[n] is getattr(implicit, n) for n in exported)
