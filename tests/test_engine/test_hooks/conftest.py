"""A Runner on a handful of random images, small enough for many short trainings."""

from functools import partial
from itertools import count

import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from mdeq_mm.checkpoints.reading import allowed_types
from mdeq_mm.models import MDEQ

COUNT = count()
SOLVER = dict(type='AndersonSolver', max_steps=6, tol=1e-3)


class Images(Dataset):
    """Eight images of two classes."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        image = torch.randn(3, 8, 8, generator=generator) + index % 2
        return dict(inputs=image, target=torch.tensor(index % 2))


class Classifier(BaseModel):
    def __init__(self):
        super().__init__()
        arch = dict(channels=(4, 8), num_groups=4, expansion=1, downsample_times=1)
        gradient = dict(type='ImplicitGradient', solver=SOLVER)
        self.backbone = MDEQ(arch=arch, solver=SOLVER, gradient=gradient)
        self.head = nn.Linear(8, 2)

    def forward(self, inputs, target, mode='tensor'):
        logits = self.head(self.backbone(inputs)[1].mean((2, 3)))
        if mode == 'loss':
            return dict(loss=nn.functional.cross_entropy(logits, target))
        return list(logits)


class Nothing(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return dict(count=len(results))


class Watch(Hook):
    """Notes what the backbone did: iteration or epoch, and how it iterated."""

    priority = 'VERY_LOW'

    def __init__(self):
        self.train, self.val, self.test = [], [], []

    def look(self, runner):
        layer = runner.model.backbone.equilibrium
        return layer.unroll_steps, layer.last_solution.steps.max().item()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.train.append((runner.iter, self.look(runner)))

    def after_val_epoch(self, runner, metrics=None):
        self.val.append((runner.iter, self.look(runner)))

    def after_test_epoch(self, runner, metrics=None):
        self.test.append(self.look(runner))


def runner_in(folder, hooks=(), train_cfg=None, model=None, **options):
    """A Runner with a Watch as its last custom hook.

    Two iterations are an epoch; in loops over iterations eight, since mmengine
    waits for seconds at the end of each.
    """
    train_cfg = train_cfg or dict(by_epoch=True, max_epochs=3, val_interval=1)
    loader = dict(
        batch_size=4 if train_cfg['by_epoch'] else 1,
        dataset=Images(),
        sampler=dict(type='DefaultSampler', shuffle=False),
        collate_fn=dict(type='default_collate'),
    )
    return Runner(
        model=model or Classifier(),
        work_dir=str(folder),
        train_dataloader=loader,
        val_dataloader=loader,
        test_dataloader=loader,
        train_cfg=train_cfg,
        val_cfg=dict(),
        test_cfg=dict(),
        val_evaluator=[Nothing()],
        test_evaluator=[Nothing()],
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        custom_hooks=[*hooks, Watch()],
        # Two of one name cannot be made.
        experiment_name=f'{folder}-{next(COUNT)}',
        **options,
    )


@pytest.fixture
def make_runner(tmp_path):
    return partial(runner_in, tmp_path)


@pytest.fixture
def resumable():
    """Let checkpoints of a Runner load, which the original mmengine cannot."""
    with torch.serialization.safe_globals(allowed_types()):
        yield


def watched(runner):
    return next(h for h in runner.hooks if isinstance(h, Watch))
