"""What the monitor logs, through a real Runner."""

import json

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mdeq_mm.engine import EquilibriumMonitorHook
from mdeq_mm.models import MDEQ


class _Model(BaseModel):
    def __init__(self, layers=1):
        super().__init__()
        for i in range(layers):
            backbone = MDEQ(
                arch=dict(channels=(8, 8), downsample_times=0),
                solver=dict(type='AndersonSolver', max_steps=6),
            )
            self.add_module(f'backbone{i}', backbone)
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, inputs, mode='tensor'):
        total = self.weight * inputs.mean()
        for backbone in self.children():
            if isinstance(backbone, MDEQ):
                total = total + backbone(inputs)[0].square().mean()
        return dict(loss=total)


def train(tmp_path, model, interval):
    data = [dict(inputs=torch.rand(3, 8, 8)) for _ in range(8)]
    runner = Runner(
        model,
        str(tmp_path),
        train_dataloader=DataLoader(data, batch_size=2),
        train_cfg=dict(by_epoch=False, max_iters=4),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.0)),
        custom_hooks=[dict(type='EquilibriumMonitorHook', interval=interval)],
        experiment_name=tmp_path.name,
        log_level='ERROR',
        default_hooks=dict(logger=dict(type='LoggerHook', interval=4)),
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


@pytest.mark.parametrize(
    ('interval', 'error'), [(0, ValueError), (-1, ValueError), (1.5, TypeError)]
)
def test_bad_interval(interval, error):
    with pytest.raises(error, match=r'EquilibriumMonitorHook\.interval'):
        EquilibriumMonitorHook(interval=interval)
