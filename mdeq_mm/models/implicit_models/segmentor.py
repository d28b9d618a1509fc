"""Segmentor that tells of its equilibrium."""

from ...implicit.layer import recorded
from ...registry import MODELS
from .equilibrium_report import EquilibriumReport, annotate
from .lazy import LazySubclass


@MODELS.register_module()
class ImplicitEncoderDecoder(EquilibriumReport, LazySubclass):
    """mmseg's ``EncoderDecoder`` with the equilibrium's own losses.

    Takes what ``EncoderDecoder`` takes, and loads its checkpoints. With a
    :class:`JacobianScheduleHook` the loss dict has ``loss_jac``; predictions carry
    ``equilibrium_residual`` (float), ``equilibrium_status`` (such as
    ``'converged'``) and ``equilibrium_steps`` (evaluations of f), under sliding
    windows the worst of them and the sum of the evaluations.

    Raises:
        ImportError: If mmseg is not installed.
    """

    _parent = 'mmseg.models.EncoderDecoder'

    def predict(self, inputs, data_samples=None):
        """Predict, as ``EncoderDecoder`` does, with the fields above."""
        with recorded(self.equilibrium_layers) as solutions:
            samples = super().predict(inputs, data_samples)
        return annotate(samples, solutions)
