"""Models as one function of a batch of images, without anything that export lacks."""

import torch
from torch import nn
from torch.nn.functional import interpolate, softmax

from ..implicit import StateSpec
from ..implicit.functional import frozen
from ..implicit.iteration import FixedIteration, fixed_solver
from ..implicit.layer import equilibrium_layers
from ..models.backbones.mdeq import MDEQ


class FixedStepMDEQ(nn.Module):
    """An MDEQ in evaluation that makes a fixed number of evaluations of f.

    What it returns is what the backbone returns with the same solver at ``tol=0``,
    started from zero. Weights are normalised once, here.

    Args:
        backbone (MDEQ): Its stem, injection and output norms are shared.
        solver (AndersonSolver | PicardSolver): See :func:`fixed_solver`.
        precision (torch.dtype): Of Anderson's small systems.
    """

    def __init__(self, backbone, solver, precision=torch.float64):
        super().__init__()
        self.arch, self.out_indices = backbone.arch, backbone.out_indices
        self.stem, self.injection = backbone.stem, backbone.injection
        self.out_norms = backbone.out_norms
        self.f = frozen(backbone.equilibrium.f)
        self.iteration = FixedIteration(solver, precision)
        self.eval()

    # What the backbone does around its solve, with the parts shared above.
    inject, outputs = MDEQ.inject, MDEQ.outputs

    def forward(self, images):
        """Find the equilibrium of images (N, C, H, W).

        Returns:
            tuple[tuple[Tensor, ...], Tensor]: The maps of the backbone, and the
            residual of each sample, (N,).
        """
        injections, state = self.begin(images)
        _, z, residual, *_ = self.solve(injections, state)
        z = torch.where(residual.isfinite()[:, None], z, torch.nan)
        return self.outputs(self.spec(injections).unpack(z)), residual

    def begin(self, images):
        """What the steps start from.

        Args:
            images (Tensor): (N, C, H, W).

        Returns:
            tuple[tuple[Tensor, ...], tuple[Tensor, ...]]: The injections, and the
            state before the first step.
        """
        injections = tuple(self.inject(images))
        # len() would fix the batch in a graph.
        batch, dim = injections[0].shape[0], self.spec(injections).dim
        return injections, self.iteration.begin(injections[0].new_zeros(batch, dim))

    def solve(self, injections, state):
        """All steps."""
        for _ in range(self.iteration.solver.max_steps):
            state = self.step(injections, state)
        return state

    def step(self, injections, state):
        """One evaluation of f, and what :class:`FixedIteration` makes of it."""
        spec = self.spec(injections)
        fz = spec.pack(self.f(spec.unpack(state[0]), *injections))
        return self.iteration.step(state, fz)

    def spec(self, injections):
        """StateSpec: How the maps lie in a state."""
        shapes, (height, width) = [], injections[0].shape[2:]
        for channels in self.arch.channels:
            shapes.append((channels, height, width))
            height, width = -(-height // 2), -(-width // 2)
        return StateSpec(tuple(shapes))


class DeployableModel(nn.Module):
    """A classifier or segmentor as a function of images, and nothing else.

    Outputs, in the order of ``output_names``: ``scores`` (N, classes), the softmax
    of a classifier's logits; ``logits`` (N, classes, H, W) of a segmentor at the
    size of the images, segmented as a whole; ``residual`` (N,) of the equilibrium.
    A ``MultiTaskMDEQ`` has scores and logits.

    Args:
        model (nn.Module): mmpretrain's ``ImageClassifier``, mmseg's
            ``EncoderDecoder``, their implicit subclasses, or ``MultiTaskMDEQ``; in
            evaluation mode. Its parts are shared.
        steps (int, optional): Evaluations of f. Default: the limit of the
            evaluation solver. Without a meaning for models without equilibrium.
        solver (str, optional): ``'anderson'`` or ``'picard'``; see
            :func:`fixed_solver`.
        residual (bool): Whether the residual is an output.
        preprocessing (bool): Whether images of 0 to 255 are given and normalised
            here, in place of normalised ones.
        precision (torch.dtype): Of Anderson's small systems.

    Attributes:
        solver (Solver | None): Whose iteration is in the graph.

    Raises:
        TypeError: If ``steps`` is no integer.
        ValueError: If the model is in training mode or of another kind, or has
            nothing to give that is asked for.
    """

    def __init__(
        self,
        model,
        steps=None,
        solver=None,
        residual=False,
        preprocessing=False,
        precision=torch.float64,
    ):
        super().__init__()
        if model.training:
            raise ValueError('the model is in training mode: call model.eval() first')
        self.backbone, self.solver = model.backbone, None
        layers = equilibrium_layers(model)
        if isinstance(self.backbone, MDEQ) and len(layers) == 1:
            eval_solver = self.backbone.equilibrium.eval_solver
            self.solver = fixed_solver(eval_solver, steps, solver)
            self.backbone = FixedStepMDEQ(self.backbone, self.solver, precision)
        elif layers:
            raise ValueError(
                f'{type(model).__name__} has {len(layers)} equilibrium layers in a '
                f'backbone of type {type(self.backbone).__name__}: only a backbone of '
                'type MDEQ can be exported'
            )
        elif residual:
            raise ValueError(
                f'backbone.type={type(self.backbone).__name__} has no equilibrium, and '
                'so no residual: leave it out'
            )
        self.residual = residual
        self._take_heads(model)
        mean = std = None
        if preprocessing:
            mean, std = normalisation(model)
            if mean is None:
                raise ValueError(
                    f'{type(model.data_preprocessor).__name__} has no mean and std, '
                    'and normalises nothing: export without preprocessing'
                )
            mean, std = (t.reshape(1, -1, 1, 1) for t in (mean, std))
        self.register_buffer('mean', mean, persistent=False)
        self.register_buffer('std', std, persistent=False)
        self.eval()

    def _take_heads(self, model):
        self.head = getattr(model, 'head', None)
        self.decode_head = getattr(model, 'decode_head', None)
        neck = getattr(model, 'neck', None)
        self.neck = nn.Identity() if neck is None else neck
        # A segmentor's neck feeds its only head, that of several tasks the classifier.
        self.neck_for_all = self.head is None
        if self.head is None and self.decode_head is None:
            raise ValueError(
                f'{type(model).__name__} has neither head nor decode_head: give a '
                'classifier of mmpretrain or a segmentor of mmseg'
            )
        if isinstance(self.decode_head, nn.ModuleList):
            raise ValueError(
                f'{type(model).__name__} has several decode heads in a row, which '
                'cannot be exported: use an EncoderDecoder'
            )
        if 'MultiLabel' in type(self.head).__name__:
            raise ValueError(
                f'head.type={type(self.head).__name__} has several labels an image, '
                'whose scores are no softmax: use a head of one label'
            )

    @property
    def output_names(self):
        """tuple[str, ...]: Of what :meth:`forward` returns."""
        names = dict(
            scores=self.head is not None,
            logits=self.decode_head is not None,
            residual=self.residual,
        )
        return tuple(name for name, there in names.items() if there)

    def forward(self, images):
        """Run the model.

        Args:
            images (Tensor): (N, C, H, W), normalised, or of 0 to 255 where
                preprocessing is part of it.

        Returns:
            tuple[Tensor, ...]: As ``output_names`` says.
        """
        if self.mean is not None:
            images = (images - self.mean) / self.std
        maps, residual = self.backbone(images), None
        if self.solver is not None:
            maps, residual = maps
        outputs = []
        if self.head is not None:
            outputs.append(softmax(self.head(self.neck(maps)), dim=1))
        if self.decode_head is not None:
            features = self.neck(maps) if self.neck_for_all else maps
            logits = interpolate(
                self.decode_head(features),
                images.shape[2:],
                mode='bilinear',
                align_corners=self.decode_head.align_corners,
            )
            outputs.append(logits)
        if self.residual:
            outputs.append(residual)
        return tuple(outputs)


def normalisation(model):
    """Mean and standard deviation of the images that a model takes.

    Args:
        model (nn.Module): Of mmpretrain or mmseg, or a ``MultiTaskMDEQ``.

    Returns:
        tuple[Tensor | None, Tensor | None]: One number a channel each; None where
        images are not normalised.
    """
    preprocessor = image_preprocessor(model)
    mean, std = (getattr(preprocessor, name, None) for name in ('mean', 'std'))
    if mean is None or std is None:
        return None, None
    return mean.flatten(), std.flatten()


def image_preprocessor(model):
    """The data preprocessor of images; that of the classes where there are two."""
    preprocessor = model.data_preprocessor
    return getattr(preprocessor, 'cls', preprocessor)
