"""Trainings that end the same whether or not they were killed on the way."""

import bisect

from mmengine.dist import barrier, broadcast_object_list, get_rank, is_main_process
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop

from ..checkpoints.saving import (
    ATOMIC,
    WHOLE,
    KeepUntilWritten,
    mend_pointer,
    point_to,
    remove_partial,
)
from ..engine.hooks.failure_report_hook import every_wrapper, policy_wrappers
from ..implicit.layer import equilibrium_layers
from ..registry import HOOKS
from .repeatable import (
    EndlessBatches,
    RepeatableBatches,
    repeatable,
    seed_everything,
)
from .stacks import advances_by_loading

#: Of what a checkpoint holds for this hook, and of what the message hub keeps.
_STATE = 'exact_resume'


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Makes a resumed training end with the very weights of one without a break.

    On one machine, set of packages and number of threads and processes, on a CPU
    bit for bit; on a GPU as far as its kernels repeat themselves.

    - Randomness follows from the seed, the iteration and the rank, and that of the
      augmentation from the seed, the epoch and the index of the sample, however many
      workers load it.
    - Data go on after the last sample that was trained on, within an epoch too.
    - A validation that was due and did not take place is made up for, because
      schedules may follow its results.
    - Warm starts begin anew with each checkpoint, and with each validation.
    - ``CheckpointHook`` writes checkpoints beside their place and renames them, and
      removes old ones when the new one is there. A training that is resumed from a
      work folder takes the newest checkpoint that is whole.

    Not covered: the counters of ``EarlyStoppingHook``, and gradients that were
    accumulated but not applied when a checkpoint was written (a warning says so).

    Raises:
        FileNotFoundError: If no checkpoint of the work folder to resume from is
            whole.
        TypeError: If the training loop is neither EpochBasedTrainLoop nor
            IterBasedTrainLoop.
    """

    # The last to be asked: CheckpointHook has set up its files by then, and nothing
    # draws random numbers between this hook and the model.
    priority = 'LOWEST'

    def __init__(self):
        self._restored = None
        self._training = False
        # Epoch, and iteration at its begin.
        self._begin = None, 0

    def before_run(self, runner):
        """Make sure that a resume finds a whole checkpoint."""
        if not runner.cfg.get('resume') or runner.cfg.get('load_from'):
            return
        _, said = mend_pointer(runner.work_dir)
        if said is not None:
            runner.logger.warning(f'{said}: resuming from there.')

    def after_load_checkpoint(self, runner, checkpoint):
        self._restored = checkpoint.get(_STATE)

    def before_save_checkpoint(self, runner, checkpoint):
        if not self._training:
            return
        meta, done = checkpoint['meta'], checkpoint['meta']['iter']
        wrappers = policy_wrappers(runner.optim_wrapper)
        checkpoint[_STATE] = dict(
            seed=self._seed,
            sampler_seed=self._sampler_seed,
            iteration=done,
            batches=len(runner.train_dataloader),
            within=done - self._begin[1] if meta['epoch'] == self._begin[0] else 0,
            failures=[wrapper.counts() for wrapper in wrappers],
        )
        # Those of the best results are not to be resumed from.
        if 'optimizer' not in checkpoint or done >= runner.max_iters:
            return
        for wrapper in every_wrapper(runner.optim_wrapper):
            # The wrappers of mmengine have no public name for it.
            batches = getattr(wrapper, '_accumulative_counts', 1)
            if done % batches:
                runner.logger.warning(
                    f'The checkpoint of iteration {done} lacks the gradients of '
                    f'{done % batches} accumulated batches: make the interval of '
                    f'CheckpointHook a multiple of optim_wrapper.accumulative_counts='
                    f'{batches} for an exact resume.'
                )
                return

    def before_train(self, runner):
        loop = runner.train_loop
        if not isinstance(loop, EpochBasedTrainLoop | IterBasedTrainLoop):
            raise TypeError(
                f'ExactResumeHook does not know train_cfg.type={type(loop).__name__}: '
                'use EpochBasedTrainLoop or IterBasedTrainLoop, or remove the hook'
            )
        self._restore(runner)
        self._repeat_data(runner, loop)
        self._keep_files_whole(runner)
        self._training = True
        self._saved = runner.message_hub.runtime_info.get('last_ckpt')
        if self._resumed and self._missed_validation(runner, loop):
            runner.logger.info(
                'The validation that was due at the checkpoint is made up for.'
            )
            runner.val_loop.run()

    def _restore(self, runner):
        state = self._restored
        self._resumed = bool(
            runner.iter > 0 and state and state['iteration'] == runner.iter
        )
        seeds = [runner.seed, None]
        if self._resumed:
            seeds = [state['seed'], state['sampler_seed']]
            wrappers = policy_wrappers(runner.optim_wrapper)
            for wrapper, counts in zip(wrappers, state['failures'], strict=False):
                wrapper.restore_counts(counts)
        elif runner.iter > 0:
            runner.logger.warning(
                'The checkpoint was written without ExactResumeHook: from here on '
                'the training repeats itself, but not what an unbroken one would '
                'have done.'
            )
        # Seeds may differ from process to process.
        broadcast_object_list(seeds)
        self._seed, self._sampler_seed = seeds

    def _repeat_data(self, runner, loop):
        loader = repeatable(loop.dataloader, self._seed, self._sampler_seed)
        batches = loader.batch_sampler
        self._sampler_seed = getattr(batches.sampler, 'seed', None)
        loop.dataloader = loader
        if isinstance(loop, IterBasedTrainLoop):
            loop.dataloader_iterator = EndlessBatches(
                loader, loop.iter, advances_by_loading(loop.dataloader_iterator)
            )
        else:
            batches.skip = self._seen_within(runner, len(loader))
            self._begin = loop.epoch, loop.iter - batches.skip

    def _seen_within(self, runner, length):
        """Batches of the epoch that the training had seen when it was saved."""
        if not self._resumed:
            return 0
        within, before = self._restored['within'], self._restored['batches']
        if within and before != length:
            runner.logger.warning(
                f'An epoch has {length} batches now and had {before} when the '
                f'checkpoint was written, within one: the epoch begins anew.'
            )
            return 0
        return within

    def _keep_files_whole(self, runner):
        self._backends = []
        for hook in runner.hooks:
            if not isinstance(hook, CheckpointHook):
                continue
            if type(hook.file_backend) is LocalBackend and not hook.file_client_args:
                hook.backend_args = dict(backend=ATOMIC)
                if is_main_process():
                    remove_partial(hook.out_dir)
            hook.file_backend = KeepUntilWritten(hook.file_backend)
            self._backends.append(hook.file_backend)
        barrier()

    def _missed_validation(self, runner, loop):
        """Whether the loop would have validated before it went on from here."""
        done = loop.epoch if isinstance(loop, EpochBasedTrainLoop) else loop.iter
        if runner.val_loop is None:
            return False
        if self._restored['within']:
            # In the middle of the next epoch.
            return False
        if runner.message_hub.runtime_info.get(_STATE) == loop.iter:
            return False
        interval = loop.dynamic_intervals[
            bisect.bisect(loop.dynamic_milestones, done + 1) - 1
        ]
        last = runner.max_epochs
        if isinstance(loop, IterBasedTrainLoop):
            last = runner.max_iters
        return done >= loop.val_begin and (done % interval == 0 or done == last)

    def before_train_epoch(self, runner):
        loop = runner.train_loop
        if isinstance(loop, EpochBasedTrainLoop):
            if not isinstance(loop.dataloader.batch_sampler, RepeatableBatches):
                # Another hook has put a loader of its own there.
                loader = repeatable(loop.dataloader, self._seed, self._sampler_seed)
                loader.batch_sampler.skip = loop.iter - self._begin[1]
                if self._begin[0] != loop.epoch:
                    loader.batch_sampler.skip = 0
                loop.dataloader = loader
            batches = loop.dataloader.batch_sampler
            batches.epoch = loop.epoch
            self._begin = loop.epoch, loop.iter - batches.skip
        # What samplers and workers draw when they begin.
        seed_everything(self._seed, 'epoch', runner.epoch, get_rank())

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        seed_everything(self._seed, 'iteration', runner.iter, get_rank())

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self._tidy_up(runner)

    def after_train_epoch(self, runner):
        self._tidy_up(runner)

    def before_val_epoch(self, runner):
        if not self._training:
            return
        seed_everything(self._seed, 'validation', runner.iter, get_rank())
        for layer in equilibrium_layers(runner.model):
            layer.forget()
        # A checkpoint that is written between here and the next step has it behind it.
        runner.message_hub.update_info(_STATE, runner.iter)

    def after_val_epoch(self, runner, metrics=None):
        if self._training:
            self._tidy_up(runner)

    def after_train(self, runner):
        self._tidy_up(runner)
        self._training = False

    def _tidy_up(self, runner):
        """After a checkpoint: remove what it replaces, and drop warm starts."""
        last = runner.message_hub.runtime_info.get('last_ckpt')
        if last is not self._saved and is_main_process():
            point_to(runner.work_dir, last, WHOLE)
        written = {last}
        for key, value in runner.message_hub.runtime_info.items():
            if key.startswith('best_ckpt'):
                written.add(value)
        for backend in self._backends:
            backend.flush(keep=written)
        # Each save makes a text of its own, also where it is the same.
        if last is not self._saved:
            self._saved = last
            for layer in equilibrium_layers(runner.model):
                layer.forget()
