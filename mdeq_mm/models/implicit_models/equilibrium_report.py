"""What a model tells of its equilibria: the Jacobian loss, and how solves ended."""

import torch

from ...implicit import Status
from ...implicit.checks import check_amount, check_int
from ...implicit.layer import equilibrium_layers


class EquilibriumReport:
    """Mixin of models whose losses and predictions speak of the equilibrium.

    The Jacobian loss joins the loss dict as ``loss_jac``, so that scaling of the
    loss, accumulation of gradients and distributed training apply to it as to all
    losses. Predictions carry ``equilibrium_residual``, ``equilibrium_status`` and
    ``equilibrium_steps``.
    """

    #: Factor of the Jacobian loss; 0 computes none.
    jacobian_weight = 0.0

    @property
    def equilibrium_layers(self):
        """list[EquilibriumLayer]: Of the model."""
        return equilibrium_layers(self)

    def set_jacobian(self, weight, probes=1, seed=None):
        """Set the Jacobian loss of the training steps from now on.

        Args:
            weight (float): Factor of the estimate of ||J_f||_F^2 / D; 0 computes
                none.
            probes (int): Random probes of the estimate.
            seed (int, optional): Of the probes.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If an argument is out of range.
        """
        check_amount('weight', weight)
        check_int('probes', probes, 1)
        self.jacobian_weight = float(weight)
        for layer in self.equilibrium_layers:
            layer.jacobian_probes = probes if weight else 0
            layer.jacobian_seed = seed

    def loss(self, *args, **kwargs):
        """Losses of the model, and those of :meth:`equilibrium_losses`."""
        self.forget_losses()
        losses = super().loss(*args, **kwargs)
        return losses | self.equilibrium_losses()

    def forget_losses(self):
        """Drop what passes left whose losses nobody asked for."""
        for layer in self.equilibrium_layers:
            layer.take_jacobian_loss()

    def equilibrium_losses(self):
        """Losses of the equilibria of the forward passes since the last call.

        Returns:
            dict[str, Tensor]: ``loss_jac``, and ``jacobian``, the estimate without
            its weight; empty where the Jacobian loss is off.
        """
        parts = [layer.take_jacobian_loss() for layer in self.equilibrium_layers]
        parts = [part for part in parts if part is not None]
        if not parts:
            return {}
        total = sum(parts)
        return dict(loss_jac=self.jacobian_weight * total, jacobian=total.detach())


def annotate(samples, solutions):
    """Write into predictions how their equilibria were found.

    Where an image took several solves, as under sliding windows, the worst residual
    and status count, and the sum of the evaluations.

    Args:
        samples (list[BaseDataElement]): Predictions, changed in place.
        solutions (list[Solution]): Of the solves that made them, each of all samples.

    Returns:
        list[BaseDataElement]: The same.
    """
    if not solutions:
        return samples
    residual = _reduced(solutions, 'residual', len(samples), torch.amax)
    status = _reduced(solutions, 'status', len(samples), torch.amax)
    steps = _reduced(solutions, 'steps', len(samples), torch.sum)
    for sample, r, s, n in zip(
        samples, residual.tolist(), status.tolist(), steps.tolist(), strict=True
    ):
        sample.set_field(r, 'equilibrium_residual', dtype=float)
        sample.set_field(Status(s).name.lower(), 'equilibrium_status', dtype=str)
        sample.set_field(n, 'equilibrium_steps', dtype=int)
    return samples


def _reduced(solutions, name, count, reduce):
    values = []
    for solution in solutions:
        value = getattr(solution, name)
        if len(value) % count:
            # Not sample by sample: what it was speaks for all of them.
            value = reduce(value, dim=0, keepdim=True).expand(count)
        # Parts of one image side by side, as where windows are a batch.
        values.append(reduce(value.view(-1, count), dim=0))
    return reduce(torch.stack(values), dim=0)
