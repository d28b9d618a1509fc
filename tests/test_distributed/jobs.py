"""What two processes do together: all in one start, which takes seconds."""

import os
import warnings

import torch
from mmengine.dist import get_rank
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch.utils.data import Dataset

from tests.helpers import load_tool
from tests.test_engine.test_hooks.conftest import COUNT, Images
from tests.test_engine.test_optim_wrappers.conftest import f_output, image, training

from .models import (
    GRADIENTS,
    batches,
    class_batch,
    class_samples,
    classifier,
    segment_batch,
    segmentor,
    train,
)

#: Trainings by name: model, arguments of its backbone, and what makes its batches.
TRAININGS = {
    f'{name}{", recomputed" * with_cp}': (
        classifier, dict(options, with_cp=with_cp), class_batch,
    )
    for name, options in GRADIENTS.items()
    for with_cp in (False, True)
    if not (with_cp and ',' in name)
} | {'segmentor': (segmentor, GRADIENTS['implicit'], segment_batch)}  # fmt: skip

#: Faults of a sample of the second process, under mmengine's own wrapper.
FAULTS = {'f': f_output, 'image': image(float('nan'))}


def ready(name, weights, part=slice(None)):
    """The model of a training, and part of each of its batches."""
    build, options, pack = TRAININGS[name]
    model = build(**options).double()
    model.backbone.load_state_dict(weights)
    # Recomputing differs by rounding alone from what is kept: a few steps tell.
    count = 4 if options.get('with_cp') else 10
    return model, [
        pack(images[part], labels[part]) for images, labels in batches(count)
    ]


def alone(name, weights):
    """The training in one process, on whole batches."""
    return train(*ready(name, weights))


def distributed(model):
    return MMDistributedDataParallel(
        model, broadcast_buffers=False, find_unused_parameters=False
    )


def together(name, weights):
    """The training in this process, on its half of each batch."""
    model, data = ready(name, weights, slice(2 * get_rank(), 2 * get_rank() + 2))
    return train(distributed(model), data)


def with_a_fault(name, folder):
    """Three iterations, of which the second has a fault in the second process."""

    def inject(runner, data_batch):
        return FAULTS[name](runner, data_batch) if get_rank() == 1 else None

    runner, diary = training(
        f'{folder}/fault_{name}', inject, [1], report=False, type='OptimWrapper'
    )
    runner.model = distributed(runner.model)
    runner.train()
    return diary.counts, diary.states[-1]


class Sizes(Hook):
    """Notes the sizes of the batches."""

    def before_train(self, runner):
        self.sizes = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.sizes.append(len(data_batch['inputs']))


class Few(Images):
    """Some of the images."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count


def runner_of_nine(folder, *hooks, count=9, batch_size=4, round_up=True):
    runner, diary = training(folder, hooks=hooks, report=False, type='OptimWrapper')
    runner._train_dataloader = dict(
        batch_size=batch_size,
        dataset=Few(count),
        sampler=dict(type='DefaultSampler', shuffle=False, round_up=round_up),
        collate_fn=dict(type='default_collate'),
    )
    return runner, diary


def uneven(folder):
    """Train on nine images in batches of four."""
    sizes = Sizes()
    runner, diary = runner_of_nine(f'{folder}/uneven', sizes)
    runner.model = distributed(runner.model)
    runner.train()
    return sizes.sizes, diary.states[-1]


#: Data of which the processes would make different numbers of steps, or not.
SPLITS = {
    'not rounded up': lambda rank: dict(round_up=False, batch_size=1),
    'not rounded up, as many batches': lambda rank: dict(round_up=False, batch_size=3),
    'different files': lambda rank: dict(count=9 - rank),
}


def refused(folder, name):
    """What the tools say to a way to split the data."""
    tools = load_tool('tools/common.py')
    runner, _ = runner_of_nine(f'{folder}/refused', **SPLITS[name](get_rank()))
    try:
        tools.build_loops(runner, ['train'])
    except SystemExit as stop:
        return stop.code
    return None


class Seen(BaseMetric):
    """Which samples were counted."""

    default_prefix = 'seen'

    def process(self, data_batch, data_samples):
        self.results += [sample['sample_idx'] for sample in data_samples]

    def compute_metrics(self, results):
        return {str(i): index for i, index in enumerate(results)}


class Labelled(Dataset):
    """Seven images with labels of one task."""

    def __init__(self, segment):
        self.images, self.labels = next(batches(1, 7, torch.float32, 16))
        self.segment = segment
        self.metainfo = dict(classes=('one', 'two', 'three'))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, label = self.images[index], self.labels[index]
        if self.segment:
            batch = segment_batch(image[None], label[None])
            # Each image has another number of pixels that do not count.
            batch['data_samples'][0].gt_sem_seg.data[..., : index + 1] = 255
            sample = batch['data_samples'][0]
        else:
            (sample,) = class_samples([label])
        sample.set_metainfo(dict(sample_idx=index))
        return dict(inputs=image, data_samples=sample)


def evaluate(folder, segment, weights, round_up=True):
    """The metrics of seven images, in this process or with the other one.

    Returns:
        dict[str, float]: Of accuracy or IoU, of the equilibria, and what was counted.
    """
    metrics = (
        dict(type='IoUMetric', iou_metrics=['mIoU', 'mDice'])
        if segment
        else dict(type='Accuracy', topk=(1, 2))
    )
    scope = 'mmseg' if segment else 'mmpretrain'
    model = (segmentor if segment else classifier)(
        gradient=dict(type='PhantomGradient')
    )
    model.backbone.load_state_dict(weights)
    init_default_scope(scope)
    runner = Runner(
        model=model,
        work_dir=f'{folder}/evaluation',
        test_dataloader=dict(
            batch_size=2,
            dataset=Labelled(segment),
            sampler=dict(type='DefaultSampler', shuffle=False, round_up=round_up),
            collate_fn=dict(type='default_collate'),
        ),
        test_cfg=dict(),
        test_evaluator=[metrics, dict(type='EquilibriumMetric'), Seen()],
        default_scope=scope,
        experiment_name=f'{folder}-evaluation-{next(COUNT)}',
    )
    if torch.distributed.is_initialized():
        runner.model = distributed(runner.model)
    return runner.test()


def process(rank, folder):
    """What each of the two processes does.

    Args:
        rank (int): Of the process.
        folder (str): With ``weights.pth``; gets ``<rank>.pth``.
    """
    os.chdir(folder)
    torch.set_num_threads(1)
    # Of the toolboxes; once for each model would bury what a failure says.
    warnings.simplefilter('ignore')
    weights = torch.load(f'{folder}/weights.pth')
    # One training alone each, so that both have as much to do.
    found = dict(alone={name: alone(name, weights) for name in [*TRAININGS][rank::2]})
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2
    )
    found['together'] = {name: together(name, weights) for name in TRAININGS}
    found['fault'] = {name: with_a_fault(name, folder) for name in FAULTS}
    found['uneven'] = uneven(folder)
    found['refused'] = {name: refused(folder, name) for name in SPLITS}
    found['evaluation'] = {
        (segment, round_up): evaluate(folder, segment, weights, round_up)
        for segment in (False, True)
        for round_up in (False, True)
    }
    torch.save(found, f'{folder}/{rank}.pth')
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
