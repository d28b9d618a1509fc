"""Weight of the Jacobian loss over the course of a training."""

import random

from mmengine.dist import broadcast_object_list, get_rank
from mmengine.hooks import Hook

from ...implicit.checks import check_amount, check_flag, check_int, check_share
from ...implicit.layer import equilibrium_layers
from ...registry import HOOKS
from .layers import check_epochs, required_layers, unwrapped

#: Models that add the equilibrium's losses to their own.
CAPABLE = 'ImplicitImageClassifier, ImplicitEncoderDecoder or MultiTaskMDEQ'


@HOOKS.register_module()
class JacobianScheduleHook(Hook):
    """Regularises the Jacobian of f at the equilibrium (Bai et al. 2021).

    An MDEQ that is trained for long gets less and less contractive, until solvers no
    longer find its equilibrium. The loss ``loss_jac``, a Hutchinson estimate of
    ||J_f||_F^2 / D, keeps it so. The model computes it, one of type
    ImplicitImageClassifier, ImplicitEncoderDecoder or MultiTaskMDEQ.

    What applies follows from the seed of the training and the Runner's iteration,
    so that it is the same on all processes and after a resume; probes differ from
    process to process.

    Args:
        weight (float): Factor of the loss.
        frequency (float): Share of the iterations, drawn at random, that have the
            loss, in (0, 1]. The factor is the same in each.
        probes (int): Random probes of each estimate.
        warmup_weight (float, optional): Factor while training is unrolled. Default:
            ``weight``.
        increment (float): Added to ``weight`` every ``increment_every`` epochs (or
            iterations) after ``begin``.
        increment_every (int): See ``increment``.
        begin (int): First epoch (or iteration) with the loss.
        end (int, optional): First epoch (or iteration) without it. Default: never.
        by_epoch (bool): Whether these count epochs.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, the model cannot carry the loss,
            or epochs are counted that the training loop does not have.
    """

    # After the warm-up hook, which says whether the iteration is unrolled.
    priority = 'HIGH'

    def __init__(
        self,
        weight=1.0,
        frequency=1.0,
        probes=1,
        warmup_weight=None,
        increment=0.0,
        increment_every=1,
        begin=0,
        end=None,
        by_epoch=True,
    ):
        name = type(self).__name__
        check_amount(f'{name}.weight', weight)
        check_share(f'{name}.frequency', frequency)
        check_int(f'{name}.probes', probes, 1)
        if warmup_weight is not None:
            check_amount(f'{name}.warmup_weight', warmup_weight)
        check_amount(f'{name}.increment', increment)
        check_int(f'{name}.increment_every', increment_every, 1)
        check_int(f'{name}.begin', begin, 0)
        if end is not None:
            check_int(f'{name}.end', end, begin + 1)
        check_flag(f'{name}.by_epoch', by_epoch)
        self.weight = weight
        self.frequency = frequency
        self.probes = probes
        self.warmup_weight = weight if warmup_weight is None else warmup_weight
        self.increment = increment
        self.increment_every = increment_every
        self.begin = begin
        self.end = end
        self.by_epoch = by_epoch

    def before_train(self, runner):
        model = unwrapped(runner.model)
        if not hasattr(model, 'set_jacobian'):
            raise ValueError(
                f'JacobianScheduleHook is set, but model.type={type(model).__name__} '
                f'does not add the Jacobian loss to its losses: use {CAPABLE}'
            )
        required_layers(runner, self)
        check_epochs(runner, self)
        # Seeds may differ from process to process.
        seed = [runner.seed]
        broadcast_object_list(seed)
        (self._seed,) = seed

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        model = unwrapped(runner.model)
        weight = self.weight_at(
            runner.epoch if self.by_epoch else runner.iter,
            any(x.unroll_steps is not None for x in equilibrium_layers(model)),
        )
        # The same on all processes, which wait for each other in the backward pass.
        if self._random(runner, 'frequency').random() >= self.frequency:
            weight = 0
        seed = self._random(runner, 'probes', get_rank()).getrandbits(62)
        model.set_jacobian(weight, self.probes, seed)

    def after_train(self, runner):
        unwrapped(runner.model).set_jacobian(0)

    def _random(self, runner, *purpose):
        return random.Random(f'{self._seed} {runner.iter} {purpose}')

    def weight_at(self, time, unrolled):
        """Factor of the loss, where it is drawn.

        Args:
            time (int): Epoch, or iteration.
            unrolled (bool): Whether training is unrolled then.

        Returns:
            float: 0 before ``begin`` and from ``end`` on.
        """
        if time < self.begin or (self.end is not None and time >= self.end):
            return 0.0
        if unrolled:
            return self.warmup_weight
        rises = (time - self.begin) // self.increment_every
        return self.weight + self.increment * rises
