"""What the monitor logs, through a real Runner."""

import json

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mdeq_mm.engine import EquilibriumMonitorHook
from mdeq_mm.engine.hooks.equilibrium_monitor_hook import _Solves
from mdeq_mm.implicit import spectral_radius
from mdeq_mm.models import MDEQ


class _Model(BaseModel):
    def __init__(self, layers=1, **options):
        super().__init__()
        for i in range(layers):
            solver = dict(type='AndersonSolver', max_steps=6)
            backbone = MDEQ(
                arch=dict(channels=(8, 8), downsample_times=0),
                solver=solver,
                gradient=dict(type='ImplicitGradient', solver=solver),
                out_norm_cfg=None,
                **options,
            )
            self.add_module(f'backbone{i}', backbone)
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, inputs, mode='tensor'):
        total = self.weight * inputs.mean()
        for backbone in self.children():
            if isinstance(backbone, MDEQ):
                total = total + backbone(inputs)[0].square().mean()
        return dict(loss=total)


def train(tmp_path, model, interval=1, hook=None, more=(), lr=0.0):
    data = [dict(inputs=torch.rand(3, 8, 8)) for _ in range(8)]
    runner = Runner(
        model,
        str(tmp_path),
        train_dataloader=DataLoader(data, batch_size=2),
        train_cfg=dict(by_epoch=False, max_iters=4),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=lr)),
        custom_hooks=[
            hook or dict(type='EquilibriumMonitorHook', interval=interval),
            *more,
        ],
        experiment_name=str(tmp_path).replace('/', '_'),
        log_level='ERROR',
        default_hooks=dict(logger=dict(type='LoggerHook', interval=4)),
        randomness=dict(seed=0),
        visualizer=dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')]),
    )
    runner.train()
    return runner


def scalars(runner, name):
    return runner.message_hub.get_scalar(f'train/{name}').data[0]


def test_logs_what_the_last_solutions_say(tmp_path):
    runner = train(tmp_path, _Model(), interval=1)
    solution = runner.model.backbone0.last_solution
    for name, s in (('eq', solution), ('adjoint', solution.adjoint)):
        assert len(scalars(runner, f'{name}_steps')) == 4
        assert scalars(runner, f'{name}_steps')[-1] == s.steps.float().mean()
        assert scalars(runner, f'{name}_residual')[-1] == s.residual.median()
        log10 = scalars(runner, f'{name}_residual_log10')[-1]
        assert log10 == pytest.approx(s.residual.median().log10().item())
        assert scalars(runner, f'{name}_converged')[-1] == s.converged.float().mean()


def test_reads_every_interval(tmp_path):
    runner = train(tmp_path, _Model(), interval=2)
    assert len(scalars(runner, 'eq_steps')) == 2


def test_several_layers_have_their_numbers(tmp_path):
    runner = train(tmp_path, _Model(layers=2), interval=1)
    assert len(scalars(runner, 'eq0_steps')) == len(scalars(runner, 'eq1_steps')) == 4


def test_is_silent_without_equilibrium_layers(tmp_path):
    runner = train(tmp_path, _Model(layers=0), interval=1)
    assert not [k for k in runner.message_hub.log_scalars if 'eq' in k]


def test_scalars_are_in_the_json_log(tmp_path):
    runner = train(tmp_path, _Model(), interval=1)
    (path,) = tmp_path.glob('*/vis_data/scalars.json')
    line = json.loads(path.read_text().splitlines()[-1])
    assert line['eq_steps'] == pytest.approx(scalars(runner, 'eq_steps').mean())
    assert line['adjoint_residual'] > 0


def test_quantiles_and_shares(tmp_path):
    runner = train(tmp_path, _Model(), interval=4)
    solution = runner.model.backbone0.last_solution
    # Two samples: the higher one is the percentile.
    found = scalars(runner, 'eq_residual_p95')[-1]
    assert found == pytest.approx(solution.residual.max().item())
    log10 = scalars(runner, 'eq_residual_p95_log10')[-1]
    assert log10 == pytest.approx(solution.residual.max().log10().item())
    for name, share in solution.shares().items():
        assert scalars(runner, f'eq_{name}')[-1] == pytest.approx(share)
    assert sum(solution.shares().values()) == 1


def test_spectral_radius_at_its_interval(tmp_path):
    hook = dict(type='EquilibriumMonitorHook', radius_interval=2, radius_iterations=30)
    seen = []

    class See(Hook):
        """Estimates it with the weights that the forward pass had."""

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            with torch.no_grad():
                layer = runner.model.backbone0.equilibrium
                backbone = runner.model.backbone0
                images = runner.model.data_preprocessor(data_batch)['inputs'][:1]
                injections = backbone.inject(images)
                start = backbone._start(injections[0])
                equation = layer.equation(start, *injections)
                z = layer.last_solution.value[:1]
            generator = torch.Generator().manual_seed(runner.iter)
            seen.append(spectral_radius(equation, z, 30, generator).item())

    # Batch norms in evaluation mode, so that one image can be looked at alone.
    model = _Model(norm_eval=True)
    runner = train(tmp_path, model, hook=hook, more=[See()])
    found = scalars(runner, 'eq_radius')
    assert len(seen) == 4
    assert found == pytest.approx([seen[1], seen[3]], rel=1e-4)


def test_watching_changes_nothing_of_the_training(tmp_path):
    weights = []
    for name, interval in (('a', 1), ('b', 0)):
        torch.manual_seed(0)
        model = _Model(drop_rate=0.3)
        hook = dict(type='EquilibriumMonitorHook', interval=1, radius_interval=interval)
        train(tmp_path / name, model, hook=hook, lr=0.1)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_all_solves_of_an_iteration_count(tmp_path):
    class Twice(_Model):
        def forward(self, inputs, mode='tensor'):
            super().forward(inputs)
            self.first = self.backbone0.last_solution
            return super().forward(inputs * 3)

    runner = train(tmp_path, Twice(), interval=4)
    solutions = [runner.model.first, runner.model.backbone0.last_solution]
    expected = torch.cat([s.residual for s in solutions]).max().item()
    assert scalars(runner, 'eq_residual_p95')[-1] == pytest.approx(expected)


class TestPicture:
    def pictures(self, make_runner, **options):
        hook = dict(type='EquilibriumMonitorHook', **options)
        runner = make_runner([hook])
        shown = []
        runner.visualizer.add_image = lambda *args, **kw: shown.append(args)
        runner.train()
        return runner, shown

    def test_one_a_validation(self, make_runner):
        runner, shown = self.pictures(make_runner)
        assert [(name, step) for name, _, step in shown] == [
            ('eq_residual', 2), ('eq_residual', 4), ('eq_residual', 6)
        ]  # fmt: skip
        picture = shown[-1][1]
        assert picture.dtype == np.uint8 and picture.shape[2] == 3
        # Lines and text on white.
        assert 0.01 < (picture < 200).any(2).mean() < 0.5
        assert runner.model.backbone.equilibrium.trace is False

    def test_none_if_told(self, make_runner):
        assert self.pictures(make_runner, plot_samples=0)[1] == []

    def test_it_is_among_the_files(self, make_runner, tmp_path):
        make_runner([dict(type='EquilibriumMonitorHook')]).train()
        assert len(list(tmp_path.glob('*/vis_data/vis_image/eq_residual_*.png'))) == 3


class TestLeavesTheLayersAsTheyWere:
    def state(self, runner):
        layer = runner.model.backbone.equilibrium
        return layer.trace, layer.inspect, len(layer._forward_hooks)

    @pytest.mark.parametrize('stage', ['train', 'val'])
    def test_after_an_exception(self, make_runner, stage):
        class Break(Hook):
            def before_val_iter(self, runner, batch_idx, data_batch=None):
                if stage == 'val':
                    raise KeyboardInterrupt

        hook = dict(type='EquilibriumMonitorHook', interval=1, radius_interval=1)
        runner = make_runner([hook, Break()])
        before = self.state(runner)
        if stage == 'train':
            runner.model.train_step = lambda *args, **kwargs: 1 / 0
        with pytest.raises((KeyboardInterrupt, ZeroDivisionError)):
            runner.train()
        # The next stage, whatever it is, sets right what was broken off.
        monitor = next(h for h in runner.hooks if isinstance(h, EquilibriumMonitorHook))
        monitor.before_val(runner)
        monitor.after_val_epoch(runner)
        assert self.state(runner) == before == (False, None, 0)

    def test_what_is_left_keeps_little(self, make_runner):
        runner = make_runner([])
        layer = runner.model.backbone.equilibrium
        recorder = _Solves('eq', layer)
        runner.model.train()
        for _ in range(40):
            runner.model.backbone(torch.zeros(1, 3, 8, 8))
        assert len(recorder.solutions) <= 16

    def test_after_a_training(self, make_runner):
        runner = make_runner([dict(type='EquilibriumMonitorHook', interval=1)])
        runner.train()
        assert self.state(runner) == (False, None, 0)


@pytest.mark.parametrize('field', ['interval', 'radius_iterations'])
@pytest.mark.parametrize('value', [0, -1])
def test_numbers_that_are_too_small(field, value):
    with pytest.raises(ValueError, match=rf'EquilibriumMonitorHook\.{field}={value}'):
        EquilibriumMonitorHook(**{field: value})


@pytest.mark.parametrize(
    ('interval', 'error'), [(0, ValueError), (-1, ValueError), (1.5, TypeError)]
)
def test_bad_interval(interval, error):
    with pytest.raises(error, match=r'EquilibriumMonitorHook\.interval'):
        EquilibriumMonitorHook(interval=interval)
