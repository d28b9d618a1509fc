"""The MDEQ backbone."""

import logging
import numbers
import warnings
from collections.abc import Sequence

import torch
from mmcv.cnn import ConvModule, build_norm_layer
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import nn
from torch.nn.functional import avg_pool2d
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from ...checkpoints import check_no_more, check_state_dict, init_pretrained
from ...implicit import EquilibriumLayer, StateSpec
from ...implicit.checks import check_flag, check_int, is_number
from ...implicit.state import has_channels_last
from ...implicit.transforms import transforming
from ...registry import MODELS
from ..checks import check_init, check_norm
from ..layers import MultiscaleFunction, channel_mask
from .arch import build_arch
from .pretrained import adapt_channels, whence


@MODELS.register_module()
class MDEQ(BaseModule):
    """Multiscale deep equilibrium model (Bai, Koltun and Kolter 2020).

    A stem and an injection feed one multiscale function f, which is driven to its
    equilibrium z* = f(z*, x) at all resolutions at once. The backbone returns z*
    (in training f(z*), through which the gradient passes), normalised over the batch.

    The official models are ``arch=dict(preset=..., injection='first')``,
    ``out_norm_cfg=None``, another initialisation, Broyden's method and the implicit
    gradient: the ``*_official_*`` configs have all of it.

    Args:
        arch (str | dict): ``'cifar-tiny'``, ``'cifar-large'``, ``'small'``,
            ``'large'`` or ``'xl'``, or a dict of the fields of :class:`Arch`, which
            may name the ``preset`` that it changes.
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
        out_norm_cfg (dict, optional): Norm of each map that is returned. None returns
            the raw equilibria, as the official model does: group norms end f, so
            that a head which pools them sees next to no difference between images.
            The default has no parameters of its own, which a head that reads only
            some of the maps would leave without gradient.
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
        [5]
    """

    def __init__(
        self,
        arch='small',
        in_channels=3,
        out_indices=None,
        drop_rate=None,
        solver=dict(type='AndersonSolver', max_steps=5, tol=1e-3, memory=5),
        eval_solver=None,
        gradient=dict(type='PhantomGradient', steps=3, unroll=True),
        norm_cfg=dict(type='BN'),
        out_norm_cfg=dict(type='BN', affine=False),
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
            official = self.arch.injection == 'first'
            for channels in self.arch.channels[: self.arch.injected]:
                self.injection.append(
                    ConvModule(
                        width,
                        channels,
                        1,
                        bias=False,
                        norm_cfg=norm_cfg,
                        act_cfg=dict(type='ReLU') if official else None,
                    )
                )
        for module in [*self.stem.modules(), *self.injection.modules()]:
            if isinstance(module, nn.Conv2d):
                # PyTorch's own, in place of ConvModule's.
                module.reset_parameters()
        f = MultiscaleFunction(
            self.arch.channels,
            self.arch.num_blocks,
            self.arch.num_groups,
            self.arch.expansion,
            self.arch.post_gn_affine,
            self.arch.weight_norm,
            self.arch.injected,
        )
        self.equilibrium = EquilibriumLayer(
            f, solver, gradient, eval_solver, recompute=with_cp
        )
        self.out_norms = nn.ModuleDict()
        if out_norm_cfg is not None:
            for i in self.out_indices:
                channels = self.arch.channels[i]
                check_norm(out_norm_cfg, channels, 'out_norm_cfg')
                self.out_norms[str(i)] = build_norm_layer(out_norm_cfg, channels)[1]
        self.register_load_state_dict_pre_hook(_check_variant)
        self.register_load_state_dict_pre_hook(adapt_channels)
        self.register_load_state_dict_pre_hook(check_state_dict)
        self.register_load_state_dict_pre_hook(check_no_more)
        # Whether what follows raw equilibria was looked at.
        self._watched = bool(self.out_norms)
        self._freeze()

    @property
    def last_solution(self):
        """Solution | None: Of the last forward pass in this thread, detached."""
        return self.equilibrium.last_solution

    def init_weights(self):
        """Initialise, or load the checkpoint that ``init_cfg`` names."""
        try:
            loaded = init_pretrained(self)
        except (OSError, RuntimeError, ValueError) as error:
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
        injections = self.inject(x)
        start = self._start(injections[0])
        # The last solution is no function of the images that are transformed.
        if self.warm_start and not self.training and not transforming((x,)):
            start = self._continued(start)
        masks = ()
        if self.equilibrium.training and self.arch.dropout > 0:
            masks = [
                channel_mask(z, self.arch.dropout)
                for z, blocks in zip(start, self.arch.num_blocks, strict=True)
                for _ in range(blocks)
            ]
        maps = self.equilibrium(start, *injections, *masks)
        # The state is float32 or wider; what follows is as wide as the images.
        maps = self.outputs([m.to(x.dtype) for m in maps])
        if self.training and not self._watched:
            self._watched = True
            _watch(maps)
        return maps

    def inject(self, images):
        """What f is given of images: stem and injection.

        Args:
            images (Tensor): (N, in_channels, H, W).

        Returns:
            list[Tensor]: The injection of each branch that the image enters,
            (N, C_i, H_i, W_i).
        """
        x = self.stem(images)
        if self.arch.injection == 'first':
            return [self.injection(x)]
        injections = [self.injection[0](x)]
        for layer in self.injection[1:]:
            # Sizes as those of the strided convolutions in f, rounded up.
            x = avg_pool2d(x, 2, ceil_mode=True)
            injections.append(layer(x))
        return injections

    def outputs(self, maps):
        """What the backbone returns of an equilibrium.

        Args:
            maps (Sequence[Tensor]): All branches, (N, C_i, H_i, W_i).

        Returns:
            tuple[Tensor]: Those of ``out_indices``, normalised.
        """
        if not self.out_norms:
            return tuple(maps[i] for i in self.out_indices)
        return tuple(self.out_norms[str(i)](maps[i]) for i in self.out_indices)

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
                    injections = self.inject(image)
                stem = counter.get_total_flops()
                start = self._start(injections[0])
                with FlopCounterMode(display=False) as counter:
                    self.equilibrium.f(start, *injections)
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
        stages = [(self.stem,), (self.injection,), (self.equilibrium, self.out_norms)]
        for stage in sum(stages[: self.frozen_stages + 1], ()):
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
    check_init(init_cfg)
    return init_cfg


@torch.compiler.disable
def _watch(maps):
    """Warn once where raw equilibria are pooled into a layer without a batch norm.

    Such a training run stays at chance for many epochs, and nothing else in its log
    says why. Pooling is seen by its gradient, which is the same at all pixels, and a
    norm over the batch by the sum of that over the images, which is zero.
    """

    def look(grad):
        same = grad == grad[..., :1, :1]
        left = grad.sum(0).abs().amax() > 1e-3 * grad.abs().sum(0).amax()
        if same.all() and left:
            print_log(
                'The raw equilibria of MDEQ are pooled into a layer without a norm '
                'over the batch, and hardly any difference between images is left: '
                "set out_norm_cfg=dict(type='BN', affine=False) of the backbone, and "
                "neck=dict(type='MDEQPoolBranches', in_channels=...) in place of "
                'GlobalAveragePooling.',
                logger='current',
                level=logging.WARNING,
            )

    last = maps[-1]
    if last.requires_grad and len(last) > 1 and last[0, 0].numel() > 1:
        last.register_hook(look)


def _check_variant(module, state_dict, prefix, *args):
    """Pre-hook for ``load_state_dict``: names the settings that weights belong to.

    Official models, converted or of configs named so, have another injection and no
    output norms; so had all models of version 0.1.
    """
    if not any(key.startswith(f'{prefix}equilibrium.') for key in state_dict):
        return

    def has(part):
        return any(key.startswith(prefix + part) for key in state_dict)

    wrong = []
    injection = 'all' if has('injection.1.') else 'first'
    if injection != module.arch.injection:
        wrong.append(f"arch=dict(..., injection='{injection}')")
    # Norms without weights or statistics leave no trace.
    own = bool(module.out_norms.state_dict())
    if has('out_norms.') != own:
        norm = "dict(type='BN', affine=False)" if has('out_norms.') else None
        wrong.append(f'out_norm_cfg={norm}')
    if wrong:
        raise RuntimeError(
            'the checkpoint is of an MDEQ with another injection or output norm: set '
            f'{" and ".join(wrong)} of the backbone; checkpoints of the official code '
            'and of version 0.1 fit the *_official_* configs'
        )
    # Of branches that are not returned here.
    others = set(range(len(module.arch.channels))) - set(module.out_indices)
    others = tuple(f'{prefix}out_norms.{i}.' for i in others)
    for key in [key for key in state_dict if key.startswith(others)]:
        del state_dict[key]


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
