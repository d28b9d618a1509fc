"""What becomes of a training step whose solves failed."""

import logging
import math
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from mmengine.dist import all_reduce, get_world_size
from mmengine.logging import print_log
from torch import Tensor

from ...implicit import Status
from ...implicit.checks import check_amount, check_int
from .failure import EquilibriumFailure
from .solves import Buffers, Outcome, finite, recorded_solves

_POLICIES = ('warn', 'skip', 'stop')
_PARTS = ('loss', 'gradients', 'buffers', 'weights')


class FailurePolicy:
    """Mixin of optimiser wrappers: looks at a step before it is made.

    A sample has failed if a forward or backward solve of it DIVERGED, or left a
    residual above ``limit``. MAX_STEPS alone is normal. A step of gradient
    accumulation is judged as a whole, with all its batches. All processes decide
    alike, by one collective operation before the step, and the host waits for the
    device once.

    Under any policy a step is dropped if the loss, a gradient, a weight, or a buffer
    that was finite before, is not finite. To drop a step means: weights, state of
    the optimiser and buffers stay bit for bit what they were before the step,
    gradients are zeroed, and everything that counts goes on as always, which is
    iterations, schedules and averages of weights. ``train/skipped_steps`` is the
    number of dropped steps in the logs, from the first on. Models without an
    equilibrium layer have this protection too. Weights that are not finite end the
    training under any policy, since no later step can mend them.

    The history of dropped steps is part of checkpoints with :class:`ExactResumeHook`;
    without it a resumed training counts anew.

    Args:
        policy (str): What follows from failed samples. ``'warn'``: a warning.
            ``'skip'``: the step is dropped. ``'stop'``: the step is dropped and
            the training ends with :class:`EquilibriumFailure`;
            :class:`FailureReportHook` writes a report and a checkpoint before.
        limit (float, optional): Relative residual above which a sample has failed.
            Absolute residuals are divided by the norm of the solution. It does not
            apply while f is unrolled, nor to the backward pass of a
            :class:`PhantomGradient`, which solve no equation. Default: none.
        max_skips (int): ``'skip'`` stops once more than this many of the last
            ``window`` steps were dropped. ``'warn'`` does not.
        window (int): See above.
        warn_interval (int): Least number of iterations between two warnings of one
            kind.
        **kwargs: Of the wrapper.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.
    """

    #: Whether somebody looks at :attr:`failure` after each iteration and ends the
    #: training; otherwise the step itself does. Set by :class:`FailureReportHook`.
    watched = False

    def __init__(
        self,
        *args,
        policy='warn',
        limit=None,
        max_skips=20,
        window=1000,
        warn_interval=100,
        **kwargs,
    ):
        name = type(self).__name__
        if policy not in _POLICIES:
            raise ValueError(
                f'{name}.policy={policy!r} is unknown: use one of {list(_POLICIES)}'
            )
        if limit is not None:
            check_amount(f'{name}.limit', limit)
            if limit == 0:
                raise ValueError(
                    f'{name}.limit=0 fails every sample: use a number above 0, or None '
                    'for diverged samples alone'
                )
        check_int(f'{name}.max_skips', max_skips, 0)
        check_int(f'{name}.window', window, 1)
        check_int(f'{name}.warn_interval', warn_interval, 1)
        if max_skips >= window:
            raise ValueError(
                f'{name}.max_skips={max_skips} cannot be exceeded among {name}.window='
                f'{window} steps: use fewer, or a longer window'
            )
        super().__init__(*args, **kwargs)
        self.policy = policy
        self.limit = limit
        self.max_skips = max_skips
        self.warn_interval = warn_interval
        #: dict | None: What ended the training, for the report.
        self.failure = None
        #: int: Steps dropped so far.
        self.skipped = 0
        self._history = deque(maxlen=window)
        self._warned = {}
        self._solves, self._batches = [], []
        self._buffers, self._loss = None, None

    @property
    def accumulative_counts(self):
        """int: Batches of a step."""
        return self._accumulative_counts

    @contextmanager
    def optim_context(self, model):
        """The parent's context of a forward pass, whose solves are noted."""
        if self._buffers is None:
            self._buffers = Buffers(model)
        with super().optim_context(model), recorded_solves(model) as solves:
            yield
        self._solves += solves

    def scale_loss(self, loss):
        """The parent's; the loss as it was is for the report."""
        self._loss = loss.detach()
        return super().scale_loss(loss)

    def backward(self, loss, **kwargs):
        """The parent's; notes how forward and backward solves ended."""
        whole = loss.detach() if self._loss is None else self._loss
        super().backward(loss, **kwargs)
        outcomes = [o for solve in self._solves for o in solve.outcomes()]
        self._batches.append(_Batch(whole, outcomes))
        self._solves, self._loss = [], None

    def step(self, **kwargs):
        """Make the step, if it is sound.

        Args:
            **kwargs: Of the parent's ``step``.

        Raises:
            EquilibriumFailure: If the training is to end, and no
                :class:`FailureReportHook` is there to end it.
        """
        if self.failure is not None:
            self._end()
        verdict = self._judge()
        batches, self._batches = self._batches, []
        buffers, self._buffers = self._buffers, None
        drop = verdict.broken or (verdict.failed and self.policy != 'warn')
        self._history.append(bool(drop))
        if not drop:
            if verdict.failed:
                self._warn('solves', f'{verdict}.')
            super().step(**kwargs)
            return
        if buffers is not None:
            buffers.restore()
        self.zero_grad()
        self.skipped += 1
        self.message_hub.update_scalar('train/skipped_steps', self.skipped)
        # No later step can mend weights, and checkpoints of them would take the place
        # of good ones.
        if self.policy == 'stop' or 'weights' in verdict.broken:
            self._stop(verdict, batches, '')
        elif self.policy == 'skip' and sum(self._history) > self.max_skips:
            self._stop(
                verdict,
                batches,
                f'more than max_skips={self.max_skips} of the last '
                f'{len(self._history)} steps were dropped, this one for ',
            )
        else:
            self._warn(
                'drops',
                f'dropped the step ({sum(self._history)} of the last '
                f'{len(self._history)}) for {verdict}.',
            )

    def counts(self):
        """dict: What was dropped and warned of so far, for a checkpoint."""
        return dict(
            skipped=self.skipped, history=list(self._history), warned=dict(self._warned)
        )

    def restore_counts(self, counts):
        """Go on from what :meth:`counts` gave.

        Args:
            counts (dict): Of a checkpoint.
        """
        self.skipped = counts['skipped']
        self._history.clear()
        self._history.extend(counts['history'])
        self._warned = dict(counts['warned'])

    def _loss_scale(self, device):
        """Scale of the gradients that somebody lowers on overflow, or None."""
        return None

    def _judge(self):
        """What is to be said of the step, the same in all processes."""
        device = self._batches[-1].loss.device if self._batches else None
        weights = [p for group in self.optimizer.param_groups for p in group['params']]
        device = device or weights[0].device
        gradients = [p.grad for p in weights if p.grad is not None]
        overflow = ~finite(gradients, device).all()
        scale = self._loss_scale(device)
        if scale is not None:
            overflow = overflow & (scale <= 1)
        nothing = torch.zeros((), dtype=torch.bool, device=device)
        losses = [~batch.loss.isfinite().all() for batch in self._batches]
        broken = [
            torch.stack(losses).any() if losses else nothing,
            overflow,
            self._buffers.spoiled(device) if self._buffers is not None else nothing,
            ~finite([p.detach() for p in weights], device).all(),
        ]
        facts = [*broken, *self._solved(device)]
        facts = torch.stack([fact.to(device, torch.float32) for fact in facts])
        # Of the worst process, by the one collective operation of a step.
        all_reduce(facts, op='max')
        # The one time that the host waits for the device.
        facts = facts.tolist()
        parts, counts = facts[: len(_PARTS)], facts[len(_PARTS) :]
        broken = [name for name, bad in zip(_PARTS, parts, strict=True) if bad]
        return _Verdict(broken, *counts)

    def _solved(self, device):
        """What the solves add to the verdict.

        Returns:
            list[Tensor]: Scalars in the order of :class:`_Verdict`.
        """
        outcomes = [o for batch in self._batches for o in batch.outcomes]
        failed = [o.failed(self.limit) for o in outcomes]
        counts = []
        for kind in ('forward', 'adjoint'):
            found = [
                f.sum() for f, o in zip(failed, outcomes, strict=True) if o.kind == kind
            ]
            counts.append(sum(found, torch.zeros((), device=device)))
        total = sum(len(o.status) for o in outcomes if o.kind == 'forward')
        worst = torch.zeros((2, 1), device=device)
        for mask, outcome in zip(failed, outcomes, strict=True):
            # NaN has no place in a maximum.
            residual = outcome.residual.float()
            residual = torch.where(residual.isnan(), math.inf, residual)
            pair = torch.stack([residual, outcome.status.float()])
            pair = torch.where(mask, pair, torch.zeros_like(pair))
            worst = torch.maximum(worst, pair.amax(1, keepdim=True))
        return [
            *counts,
            torch.full((), float(total), device=device),
            *worst.flatten().unbind(),
        ]

    def _warn(self, kind, text):
        """Log a warning, unless there was one of its kind just now."""
        last = self._warned.get(kind, -math.inf)
        if self._inner_count - last >= self.warn_interval:
            self._warned[kind] = self._inner_count
            print_log(
                f'Iteration {self._inner_count}: {text}', 'current', logging.WARNING
            )

    def _stop(self, verdict, batches, why):
        self.failure = dict(
            iteration=self._inner_count,
            reason=f'{why}{verdict.reason}',
            advice=verdict.advice,
            policy=self.policy,
            limit=self.limit,
            damaged='weights' in verdict.broken,
            skipped_steps=self.skipped,
            batches=[batch.report(self.limit) for batch in batches],
        )
        if not self.watched:
            self._end()

    def _end(self):
        raise EquilibriumFailure(
            f'The training ends at iteration {self.failure["iteration"]}: '
            f'{self.failure["reason"]}. {self.failure["advice"]}. No report was '
            'written: add FailureReportHook to default_hooks for one.'
        )


@dataclass
class _Batch:
    """What is kept of a batch until its step.

    Attributes:
        loss (Tensor): Before any scaling.
        outcomes (list[Outcome]): Of its solves.
    """

    loss: Tensor
    outcomes: list[Outcome]

    def report(self, limit):
        """dict: For a JSON file."""
        return dict(
            loss=number(self.loss),
            solves=[
                dict(
                    kind=o.kind,
                    status=[Status(s).name.lower() for s in o.status.tolist()],
                    residual=[number(r) for r in o.residual],
                    steps=o.steps.tolist(),
                    failed=o.failed(limit).tolist(),
                )
                for o in self.outcomes
            ],
        )


@dataclass
class _Verdict:
    """What is to be said of a step; numbers are those of the worst process.

    Attributes:
        broken (list[str]): What is not finite.
        forward (float): Failed samples of the forward solves.
        adjoint (float): Those of the backward solves.
        samples (float): Samples of the forward solves.
        residual (float): The worst of the failed samples.
        status (float): The worst of the failed samples.
    """

    broken: list
    forward: float
    adjoint: float
    samples: float
    residual: float
    status: float

    @property
    def failed(self):
        """bool: Whether any sample failed."""
        return bool(self.forward or self.adjoint)

    @property
    def reason(self):
        """str: Without a full stop."""
        said = []
        if self.broken:
            *first, last = self.broken
            names = f'{", ".join(first)} and {last}' if first else last
            said.append(f'non-finite {names}')
        solves = [
            f'{count:.0f} of {self.samples:.0f} samples in the {name} solve'
            for name, count in (('forward', self.forward), ('backward', self.adjoint))
            if count
        ]
        if solves:
            where = ' of the worst process' if get_world_size() > 1 else ''
            said.append(
                f'failed solves ({" and ".join(solves)}{where}, worst residual '
                f'{self.residual:.1e})'
            )
        return ', and '.join(said)

    @property
    def advice(self):
        """str: What to try, without the last full stop."""
        if 'weights' in self.broken:
            advice = 'The weights are damaged: go back to an earlier checkpoint.'
        elif not self.failed:
            advice = (
                'Check images and labels, lower the learning rate, or clip gradients '
                'with clip_grad.'
            )
        elif self.status == Status.CONVERGED:
            advice = (
                "The limit is below the solver's tolerance: raise limit or lower tol."
            )
        else:
            advice = Status(int(self.status)).advice
        return advice.removesuffix('.')

    def __str__(self):
        return f'{self.reason}. {self.advice}'


def number(value):
    """A number as JSON can hold it: NaN and infinities as words."""
    value = float(value)
    return value if math.isfinite(value) else str(value)
