"""Image classifier that tells of its equilibrium."""

from ...implicit.layer import recorded
from ...registry import MODELS
from .equilibrium_report import EquilibriumReport, annotate
from .lazy import LazySubclass


@MODELS.register_module()
class ImplicitImageClassifier(EquilibriumReport, LazySubclass):
    """mmpretrain's ``ImageClassifier`` with the equilibrium's own losses.

    Takes what ``ImageClassifier`` takes, and loads its checkpoints. With a
    :class:`JacobianScheduleHook` the loss dict has ``loss_jac``; predictions carry
    ``equilibrium_residual`` (float), ``equilibrium_status`` (such as
    ``'converged'``) and ``equilibrium_steps`` (evaluations of f).

    Raises:
        ImportError: If mmpretrain is not installed.
    """

    _parent = 'mmpretrain.models.ImageClassifier'

    def predict(self, inputs, data_samples=None, **kwargs):
        """Predict, as ``ImageClassifier`` does, with the fields above."""
        with recorded(self.equilibrium_layers) as solutions:
            samples = super().predict(inputs, data_samples, **kwargs)
        return annotate(samples, solutions)
