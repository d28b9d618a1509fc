"""Damped fixed-point iteration."""

from ..checks import check_share
from .base import Solver


class PicardSolver(Solver):
    """Damped fixed-point iteration, z <- (1 - d) z + d f(z).

    Converges where f is contractive, at the rate of its contraction. It keeps no
    history.

    Args:
        damping (float): d in (0, 1]; 1 is the plain iteration. Smaller values
            converge on maps whose Jacobian has large negative eigenvalues.
        **kwargs: Arguments of :class:`Solver`.
    """

    def __init__(
        self,
        max_steps=30,
        tol=1e-3,
        norm='rel',
        damping=1.0,
        drop_finished=None,
        check_every=1,
    ):
        super().__init__(max_steps, tol, norm, drop_finished, check_every)
        check_share('damping', damping)
        self.damping = float(damping)

    def step(self, state, z, fz):
        return fz if self.damping == 1 else z.lerp(fz, self.damping)
