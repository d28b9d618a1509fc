"""What a training leaves behind that was ended by failed solves."""

import json
from collections import deque
from pathlib import Path

from mmengine.dist import all_gather_object, barrier, get_rank, is_main_process
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict
from mmengine.structures import BaseDataElement

from ...checkpoints.saving import ATOMIC
from ...registry import HOOKS
from ..optim_wrappers import EquilibriumFailure, FailurePolicy


@HOOKS.register_module()
class FailureReportHook(Hook):
    """Ends a training when its optimiser wrapper says so, with a report.

    For :class:`EquilibriumOptimWrapper` and its twin in mixed precision; others are
    left alone. The work folder gets ``stopped_iter_N.pth``, a checkpoint from before
    the dropped step that a training can resume from (none where weights are not
    finite: earlier ones stay as they are), and ``failure_report.json``:
    ``iteration`` and ``epoch`` as the log counts them, ``reason``, ``advice``,
    ``checkpoint``, and for each of the ``processes`` the ``batches`` of the step,
    with ``loss``, ``solves`` (status, residual, evaluations of f and whether it
    failed, of each sample) and ``samples``, the meta information of the images,
    among it their paths.

    Raises:
        EquilibriumFailure: In all processes, after the files are written.
    """

    #: After schedules and averages have advanced, before CheckpointHook saves.
    priority = 80

    def before_train(self, runner):
        self._wrappers = policy_wrappers(runner.optim_wrapper)
        for wrapper in self._wrappers:
            wrapper.watched = True
        # Of the batches of a step that gradients are accumulated over.
        counts = [wrapper.accumulative_counts for wrapper in self._wrappers]
        self._samples = deque(maxlen=max(counts, default=1))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self._samples.append(list(_metainfo(data_batch)))
        for wrapper in self._wrappers:
            if wrapper.failure is not None:
                self._end(runner, wrapper.failure)

    def _end(self, runner, failure):
        folder = Path(runner.work_dir)
        report = folder / 'failure_report.json'
        batches = failure.pop('batches')
        # The last step of a training may have fewer batches than the others.
        samples = list(self._samples)[-len(batches) :]
        for batch, found in zip(batches, samples, strict=False):
            batch['samples'] = found
        processes = all_gather_object(dict(rank=get_rank(), batches=batches))
        iteration = runner.iter + 1
        checkpoint = folder / f'stopped_iter_{iteration}.pth'
        failure |= dict(iteration=iteration, epoch=runner.epoch + 1)
        if failure['damaged']:
            checkpoint = None
        failure |= dict(checkpoint=checkpoint and str(checkpoint), processes=processes)
        message = (
            f'The training ends at iteration {iteration}: {failure["reason"]}. '
            f'{failure["advice"]}. See {report}'
        )
        if checkpoint is not None:
            message += f', and {checkpoint} for the state before this step'
        message += '.'
        if is_main_process():
            message += _write(runner, report, failure, checkpoint)
            runner.logger.error(message)
        # Launchers kill all processes once one has ended.
        barrier()
        raise EquilibriumFailure(message)


def _write(runner, report, failure, checkpoint):
    """Write both files, and return what is to be said of those that failed.

    It must not raise: the other processes wait, and the reason has to be told.
    """
    said = ''
    try:
        report.write_text(json.dumps(failure, indent=2, default=str))
    except (OSError, TypeError, ValueError) as error:
        said += f' The report could not be written: {error}.'
    if checkpoint is None:
        return said
    try:
        runner.save_checkpoint(
            str(checkpoint.parent),
            checkpoint.name,
            by_epoch=False,
            backend_args=dict(backend=ATOMIC),
        )
    except (OSError, RuntimeError) as error:
        said += f' The checkpoint could not be written: {error}.'
    return said


def every_wrapper(wrapper):
    """The optimiser wrappers of a runner, be it one or several, as a list."""
    several = isinstance(wrapper, OptimWrapperDict)
    return list(wrapper.values()) if several else [wrapper]


def policy_wrappers(wrapper):
    """Those of :func:`every_wrapper` that have a policy on failed solves."""
    return [w for w in every_wrapper(wrapper) if isinstance(w, FailurePolicy)]


def _metainfo(batch):
    """Meta information of all samples of a batch, whatever it is nested in."""
    if isinstance(batch, BaseDataElement):
        yield dict(batch.metainfo)
    elif isinstance(batch, dict):
        for part in batch.values():
            yield from _metainfo(part)
    elif isinstance(batch, list | tuple):
        for part in batch:
            yield from _metainfo(part)
