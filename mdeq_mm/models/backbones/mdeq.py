"""The MDEQ backbone."""

import numbers
import warnings
from collections.abc import Sequence

import torch
from mmcv.cnn import ConvModule
from mmengine.model import BaseModule
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from ...implicit import EquilibriumLayer, StateSpec
from ...implicit.checks import check_flag, check_int, is_number
from ...implicit.state import has_channels_last
from ...registry import MODELS
from ...utils.checkpoint import check_no_more, check_state_dict, init_pretrained
from ..checks import check_init, check_norm
from ..layers import MultiscaleFunction, channel_mask
from .arch import build_arch
from .pretrained import adapt_channels, whence


@MODELS.register_module()
class MDEQ(BaseModule):
    """Multiscale deep equilibrium model (Bai, Koltun and Kolter 2020).

    A stem and an injection feed one multiscale function f, which is driven to its
    equilibrium z* = f(z*, x) at all resolutions at once. The backbone returns z*
    (in training f(z*), through which the gradient passes).

    Args:
        arch (str | dict): ``'cifar-tiny'``, ``'cifar-large'``, ``'small'``,
            ``'large'`` or ``'xl'``, or a dict of the fields of :class:`Arch`.
        in_channels (int): Channels of the image.
        out_indices (Sequence[int]): Branches that are returned, 0 being the
            highest resolution. Default: all.
        drop_rate (float, optional): Rate of the variational dropout in place of
            the arch's.
        solver (dict): Solver of the forward pass. ``max_steps`` counts evaluations
            of f; the official limit of 26 updates takes 27.
        eval_solver (dict, optional): Solver in evaluation. Default: ``solver``.
        gradient (dict): How gradients pass through the equilibrium.
        norm_cfg (dict): Norm of stem and injection.
        norm_eval (bool): Whether batch norms stay in evaluation mode in training.
        frozen_stages (int): What is frozen: -1 nothing, 0 the stem, 1 the
            injection too, 2 everything.
        with_cp (bool): Whether f is evaluated again in the backward pass instead
            of keeping its intermediate results.
        warm_start (bool): Whether solves in evaluation start from the equilibria of
            the call before, sample by sample, where the shapes are the same: for
            the frames of a video, or an image and its augmented versions.
        pretrained (str, optional): Checkpoint to start from; as
            ``init_cfg=dict(type='Pretrained', checkpoint=...)``.
        init_cfg (dict | list[dict], optional): Initialisation. With
            ``type='Pretrained'``, files that do not fit are an error, save that the
            first convolution is adapted to other channels of the images.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> from mdeq_mm.models import MDEQ
        >>> backbone = MDEQ(arch='small').eval()
        >>> with torch.no_grad():
        ...     maps = backbone(torch.rand(1, 3, 64, 64))
        >>> [tuple(m.shape) for m in maps]
        [(1, 32, 16, 16), (1, 64, 8, 8), (1, 128, 4, 4), (1, 256, 2, 2)]
        >>> backbone.last_solution.steps.tolist()
        [27]
    """

    def __init__(
        self,
        arch='small',
        in_channels=3,
        out_indices=None,
        drop_rate=None,
        solver=dict(type='BroydenSolver', max_steps=27, tol=1e-3),
        eval_solver=None,
        gradient=dict(
            type='ImplicitGradient',
            solver=dict(type='BroydenSolver', max_steps=28, tol=1e-3),
        ),
        norm_cfg=dict(type='BN'),
        norm_eval=False,
        frozen_stages=-1,
        with_cp=False,
        warm_start=False,
        pretrained=None,
        init_cfg=None,
    ):
        super().__init__(_init_cfg(pretrained, init_cfg))
        self.pretrained = pretrained
        if drop_rate is not None:
            if not is_number(drop_rate) or not 0 <= drop_rate < 1:
                raise ValueError(
                    f'drop_rate={drop_rate!r} is out of range: use 0 <= drop_rate < 1'
                )
            arch = vars(build_arch(arch)) | dict(dropout=drop_rate)
        self.arch = build_arch(arch)
        self.out_indices = _out_indices(out_indices, len(self.arch.channels))
        check_int('in_channels', in_channels, 1)
        flags = dict(norm_eval=norm_eval, with_cp=with_cp, warm_start=warm_start)
        for name, value in flags.items():
            check_flag(name, value)
        if type(frozen_stages) is not int or not -1 <= frozen_stages <= 2:
            raise ValueError(
                f'frozen_stages={frozen_stages!r} is out of range: use -1 (nothing), '
                '0 (stem), 1 (injection too) or 2 (everything)'
            )
        self.in_channels = in_channels
        self.norm_eval = norm_eval
        self.frozen_stages = frozen_stages
        self.warm_start = warm_start

        width = self.arch.channels[0]
        if norm_cfg is not None:
            check_norm(norm_cfg, width)
        self.stem = nn.Sequential()
        for i in range(max(2, self.arch.downsample_times)):
            self.stem.append(
                ConvModule(
                    width if i else in_channels,
                    width,
                    3,
                    stride=2 if i < self.arch.downsample_times else 1,
                    padding=1,
                    bias=False,
                    norm_cfg=norm_cfg,
                )
            )
        # In a Sequential, because a ConvModule that is a direct child initialises
        # itself, after init_cfg.
        self.injection = nn.Sequential()
        if self.arch.has_injection:
            self.injection.append(
                ConvModule(width, width, 1, bias=False, norm_cfg=norm_cfg)
            )
        f = MultiscaleFunction(
            self.arch.channels,
            self.arch.num_blocks,
            self.arch.num_groups,
            self.arch.expansion,
            self.arch.post_gn_affine,
            self.arch.weight_norm,
        )
        self.equilibrium = EquilibriumLayer(
            f, solver, gradient, eval_solver, recompute=with_cp
        )
        self.register_load_state_dict_pre_hook(adapt_channels)
        self.register_load_state_dict_pre_hook(check_state_dict)
        self.register_load_state_dict_pre_hook(check_no_more)
        self._freeze()

    @property
    def last_solution(self):
        """Solution | None: Of the last forward pass in this thread, detached."""
        return self.equilibrium.last_solution

    def init_weights(self):
        """Initialise, or load the checkpoint that ``init_cfg`` names."""
        try:
            loaded = init_pretrained(self)
        except (FileNotFoundError, RuntimeError, ValueError) as error:
            if self.pretrained is None:
                raise
            raise type(error)(f'{error}. {whence(self.pretrained)}') from error
        if not loaded:
            super().init_weights()

    def forward(self, x):
        """Find the equilibrium of a batch of images.

        Args:
            x (Tensor): (N, in_channels, H, W). Sides below
                ``2 ** (downsample_times + branches - 1)`` pixels leave maps of one
                pixel at the lowest resolutions.

        Returns:
            tuple[Tensor]: The branches of ``out_indices``, (N, C_i, H_i, W_i),
            highest resolution first; each side is that of the branch before,
            halved and rounded up.

        Raises:
            ValueError: If the images have no pixels, or norms would be of one number.
        """
        self._check_images(x)
        injection = self.injection(self.stem(x))
        start = self._start(injection)
        if self.warm_start and not self.training:
            start = self._continued(start)
        masks = ()
        if self.equilibrium.training and self.arch.dropout > 0:
            masks = [
                channel_mask(z, self.arch.dropout)
                for z, blocks in zip(start, self.arch.num_blocks, strict=True)
                for _ in range(blocks)
            ]
        maps = self.equilibrium(start, injection, *masks)
        # The state is float32 or wider; what follows is as wide as the images.
        return tuple(maps[i].to(x.dtype) for i in self.out_indices)

    def _check_images(self, x):
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f'images of shape {tuple(x.shape)} do not fit in_channels='
                f'{self.in_channels}: use (N, {self.in_channels}, height, width)'
            )
        if not x.is_floating_point():
            raise TypeError(
                f'images are of type {x.dtype}, and must be of a floating-point one: '
                'convert and scale them first'
            )
        size, least = x.shape[2:], self.arch.min_size
        # Where a group is one channel, the norm of one pixel would be left.
        single = self.arch.num_groups in self.arch.channels and max(size) <= least
        if min(size) < 1 or single:
            raise ValueError(
                f'images of {size[0]}x{size[1]} pixels are too small for '
                f'{len(self.arch.channels)} branches after '
                f'{self.arch.downsample_times} halvings: use '
                f'{f"more than {least}" if single else "at least 1"} a side, or fewer '
                'branches'
            )

    def _start(self, injection):
        """States of zeros for an injection, in its memory format."""
        n, _, height, width = injection.shape
        memory_format = torch.contiguous_format
        if has_channels_last(injection):
            memory_format = torch.channels_last
        start = []
        for channels in self.arch.channels:
            state = injection.new_zeros(n, channels, height, width)
            start.append(state.contiguous(memory_format=memory_format))
            height, width = -(-height // 2), -(-width // 2)
        return start

    def _continued(self, start):
        """The equilibria of the last call, where they fit, in place of zeros."""
        last, spec = self.last_solution, self.equilibrium.last_spec
        if last is None or len(last.value) != len(start[0]):
            return start
        # Shapes may differ though the size does not, as in a picture turned around.
        if spec is None or spec.shapes != StateSpec.of(start).shapes:
            return start
        if last.value.device != start[0].device:
            return start
        # A residual as large as the equilibrium itself, and zero is the better start.
        scale = 1
        if self.equilibrium.eval_solver.norm == 'abs':
            scale = torch.linalg.vector_norm(last.value, dim=1)
        sound = last.residual < scale
        value = torch.where(sound[:, None], last.value, torch.zeros_like(last.value))
        return [
            torch.empty_like(zero, dtype=value.dtype).copy_(m)
            for m, zero in zip(spec.unpack(value), start, strict=True)
        ]

    def get_flops(self, input_shape=None, steps=None):
        """Count floating-point operations for one image, in evaluation.

        A multiplication and an addition count as two. Convolutions are counted;
        norms and activations, which are under 2 % of it, are not.

        Args:
            input_shape (tuple[int, int, int], optional): Channels, height, width.
                Default: the model's channels, 224 pixels a side.
            steps (int, optional): Evaluations of f in the solve. Default: the
                limit of the evaluation solver.

        Returns:
            dict[str, int]: ``stem`` (with the injection), ``function`` (one
            evaluation of f), ``steps``, ``solve`` (all evaluations) and ``total``.
        """
        steps = self.equilibrium.eval_solver.max_steps if steps is None else steps
        weight = next(self.parameters())
        image = weight.new_zeros(1, *(input_shape or (self.in_channels, 224, 224)))
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                with FlopCounterMode(display=False) as counter:
                    injection = self.injection(self.stem(image))
                stem = counter.get_total_flops()
                start = self._start(injection)
                with FlopCounterMode(display=False) as counter:
                    self.equilibrium.f(start, injection)
                function = counter.get_total_flops()
        finally:
            self.train(training)
        return dict(
            stem=stem,
            function=function,
            steps=steps,
            solve=function * steps,
            total=stem + function * steps,
        )

    def train(self, mode=True):
        """Set training mode, keeping frozen parts and norms as configured."""
        super().train(mode)
        self._freeze()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _freeze(self):
        stages = (self.stem, self.injection, self.equilibrium)
        for stage in stages[: self.frozen_stages + 1]:
            stage.eval()
            for parameter in stage.parameters():
                parameter.requires_grad = False


def _init_cfg(pretrained, init_cfg):
    if pretrained is not None:
        if init_cfg is not None:
            raise ValueError(
                f'pretrained={pretrained!r} and init_cfg are both given: keep '
                f'init_cfg. {whence(pretrained)}'
            )
        if not isinstance(pretrained, str):
            raise TypeError(f'pretrained must be a path or URL, got {pretrained!r}')
        warnings.warn(
            'pretrained is deprecated: use '
            f"init_cfg=dict(type='Pretrained', checkpoint={pretrained!r})",
            DeprecationWarning,
            stacklevel=3,
        )
        return dict(type='Pretrained', checkpoint=pretrained)
    if init_cfg is not None:
        check_init(init_cfg)
        return init_cfg
    # Weight-normalised convolutions keep PyTorch's own initialisation, as in the
    # official model: writing to the normalised weight leaves what it is made of.
    return [
        dict(type='Normal', layer='Conv2d', std=0.01),
        dict(type='Constant', layer=['_BatchNorm', 'GroupNorm'], val=1, bias=0),
    ]


def _out_indices(out_indices, branches):
    if out_indices is None:
        return tuple(range(branches))
    if isinstance(out_indices, int):
        out_indices = (out_indices,)
    if not isinstance(out_indices, Sequence):
        raise TypeError(f'out_indices must be a list of integers, got {out_indices!r}')
    if not out_indices:
        raise ValueError(
            f'out_indices={out_indices!r} is empty: name at least one of the '
            f'{branches} branches'
        )
    for index in out_indices:
        integer = isinstance(index, numbers.Integral) and not isinstance(index, bool)
        if not integer or not 0 <= index < branches:
            raise ValueError(
                f'out_indices={tuple(out_indices)} holds {index!r}, but there are '
                f'{branches} branches: use 0 to {branches - 1}'
            )
    return tuple(out_indices)
