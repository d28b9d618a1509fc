"""Two processes, one of which has failed solves."""

import json
import os

import pytest
import torch
from mmengine.dist import get_rank
from mmengine.model import MMDistributedDataParallel
from torch import multiprocessing

from mdeq_mm.engine.optim_wrappers import EquilibriumFailure

from .conftest import adjoint_status, forward_status, image, training

# Three steps, of which the second has the fault: who made which of them.
TRAININGS = {
    'skip': (forward_status(), dict(policy='skip'), [0, 2]),
    'adjoint': (adjoint_status(), dict(policy='skip'), [0, 2]),
    'broken': (image(float('nan')), dict(policy='warn'), [0, 2]),
    'warn': (forward_status(), dict(policy='warn'), [0, 1, 2]),
    'stop': (forward_status(residual=9.0), dict(policy='stop'), [0]),
    'bare': (forward_status(), dict(policy='stop', report=False), [0]),
}


def only_in_the_second(fault):
    def inject(runner, data_batch):
        return fault(runner, data_batch) if get_rank() == 1 else None

    return inject


def train_process(rank, folder):
    """What each process does: one training after the other."""
    os.chdir(folder)
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2
    )
    found = {}
    for name, (fault, options, _) in TRAININGS.items():
        work = f'{folder}/{name}'
        runner, diary = training(work, only_in_the_second(fault), [1], **options)
        runner.model = MMDistributedDataParallel(runner.model)
        said = None
        try:
            runner.train()
        except EquilibriumFailure as error:
            said = str(error)
            # In all processes the files are there by now.
            assert options.get('report') is False or os.path.exists(
                f'{work}/stopped_iter_2.pth'
            )
        weights = torch.cat([p.detach().flatten() for p in runner.model.parameters()])
        found[name] = (diary.changed(), said, diary.counts, weights)
    torch.save(found, f'{folder}/{rank}.pth')
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    multiprocessing.spawn(train_process, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f'{rank}.pth') for rank in (0, 1))
    for name, (_, _, changed) in TRAININGS.items():
        (mine, said, counts, weights), theirs = first[name], second[name]
        assert mine == theirs[0] == changed, name
        assert said == theirs[1]
        assert (said is None) == (name not in ('stop', 'bare'))
        assert counts == theirs[2]
        assert len(counts) == (3 if said is None else 2 if name == 'stop' else 1)
        assert weights.isfinite().all()
        assert torch.equal(weights, theirs[3])
    assert (
        '(1 of 4 samples in the forward solve of the worst process,'
        in (first['stop'][1])
    )
    report = json.loads((tmp_path / 'stop' / 'failure_report.json').read_text())
    mine, theirs = report['processes']
    assert (mine['rank'], theirs['rank']) == (0, 1)
    failed = [p['batches'][0]['solves'][0]['failed'] for p in (mine, theirs)]
    assert [any(f) for f in failed] == [False, True]
    assert theirs['batches'][0]['solves'][0]['residual'][0] == 9.0
