import copy
import json
import math
import pickle

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from mdeq_mm.implicit import BroydenSolver, PicardSolver, Status
from mdeq_mm.models import MDEQ
from mdeq_mm.registry import MODELS
from tests.helpers import (
    ROOT,
    SHARED,
    build,
    cosine,
    load_tool,
    needs_shared,
    project_classifier,
    project_golden,
    relative,
)

TINY = dict(channels=(8, 8, 16), num_groups=4, expansion=2, downsample_times=1)
QUICK = dict(type='BroydenSolver', max_steps=4, tol=1e-3)
FAST = dict(solver=QUICK, gradient=dict(type='ImplicitGradient', solver=QUICK))

EVERY_SOLVER = [
    dict(type='PicardSolver', max_steps=80, tol=1e-11),
    dict(type='PicardSolver', damping=0.7, max_steps=80, tol=1e-11),
    dict(type='AndersonSolver', max_steps=50, tol=1e-11),
    dict(type='AndersonSolver', memory=3, mixing=0.8, max_steps=12, tol=0),
    dict(type='BroydenSolver', max_steps=50, tol=1e-11),
    dict(type='BroydenSolver', memory=4, norm='abs', max_steps=50, tol=1e-9),
]


def shown(solver):
    """Name of a case."""
    return '-'.join(map(str, solver.values()))


def tiny(**options):
    arch = TINY | options.pop('arch', {})
    return MDEQ(**(FAST | dict(arch=arch) | options))


def meta(cfg):
    """Build without memory for weights."""
    with torch.device('meta'):
        return build(cfg)


def config_of(name):
    return Config.fromfile(ROOT / 'configs' / f'{name}.py').model


class TestRegistry:
    @pytest.mark.parametrize('scope', ['mmengine', 'mmpretrain', 'mmseg'])
    def test_builds_under_every_scope(self, scope):
        if scope != 'mmengine':
            pytest.importorskip(scope)
        init_default_scope(scope)
        backbone = MODELS.build(dict(type='MDEQ', arch=TINY))
        assert isinstance(backbone, MDEQ)

    def test_docstring_example(self):
        backbone = MDEQ(arch='small').eval()
        with torch.no_grad():
            maps = backbone(torch.rand(1, 3, 64, 64))
        assert [tuple(m.shape) for m in maps] == [
            (1, 32, 16, 16),
            (1, 64, 8, 8),
            (1, 128, 4, 4),
            (1, 256, 2, 2),
        ]
        assert backbone.last_solution.steps.tolist() == [5]


class TestOfficialModels:
    @pytest.mark.parametrize(
        ('config', 'count'),
        [
            ('cifar10/mdeq-tiny_official_2xb64-50e_cifar10', 158_890),
            ('cifar10/mdeq-large_official_4xb32-220e_cifar10', 11_097_438),
            ('imagenet/mdeq-small_official_4xb32-100e_in1k', 16_808_936),
            ('imagenet/mdeq-large_official_4xb32-100e_in1k', 67_063_624),
            ('imagenet/mdeq-xl_official_8xb32-100e_in1k', 90_463_280),
        ],
    )
    def test_parameter_counts(self, config, count):
        model = meta(config_of(config))
        assert sum(p.numel() for p in model.parameters()) == count

    @needs_shared('reference', 'official_state_dict_keys.json')
    @pytest.mark.parametrize(
        ('name', 'config', 'task'),
        [
            (
                'imagenet/cls_mdeq_SMALL',
                'imagenet/mdeq-small_official_4xb32-100e_in1k',
                'cls',
            ),
            (
                'cifar/cls_mdeq_LARGE',
                'cifar10/mdeq-large_official_4xb32-220e_cifar10',
                'cls',
            ),
            (
                'cityscapes/seg_mdeq_SMALL',
                'imagenet/mdeq-small_official_4xb32-100e_in1k',
                'seg',
            ),
        ],
    )
    def test_every_official_name_and_shape_is_ours(self, name, config, task):
        file = SHARED / 'reference' / 'official_state_dict_keys.json'
        reference = json.loads(file.read_text())[name]['state_dict']
        official = {k: torch.empty(s, device='meta') for k, s in reference.items()}
        convert = load_tool('tools/model_converters/mdeq2mm.py').convert
        state, names, left = convert(official, task)
        assert left == []
        assert set(names) == set(official)
        cfg = config_of(config)
        if task == 'seg':
            mmseg = pytest.importorskip('mmseg.models')
            init_default_scope('mmseg')
            with torch.device('meta'):
                head = mmseg.FCNHead(
                    in_channels=(32, 64, 128, 256),
                    in_index=(0, 1, 2, 3),
                    input_transform='resize_concat',
                    channels=480,
                    kernel_size=1,
                    num_convs=1,
                    concat_input=False,
                    num_classes=19,
                    align_corners=True,
                    norm_cfg=dict(type='BN'),
                )
                model = nn.ModuleDict(
                    dict(
                        backbone=MDEQ(
                            **{k: v for k, v in cfg.backbone.items() if k != 'type'}
                        ),
                        decode_head=head,
                    )
                )
        else:
            model = meta(cfg)
        own = {
            k: tuple(v.shape)
            for k, v in model.state_dict().items()
            if not k.endswith('num_batches_tracked')
        }
        found = {
            k: tuple(v.shape)
            for k, v in state.items()
            if not k.endswith('num_batches_tracked')
        }
        assert found == own


class TestForward:
    @pytest.mark.parametrize('out_norm_cfg', [None, dict(type='BN', affine=False)])
    @pytest.mark.parametrize('out_indices', [(0, 1, 2), (2,), (0, 2), [1], 1])
    def test_out_indices(self, out_indices, out_norm_cfg):
        whole = tiny(out_norm_cfg=out_norm_cfg)
        images = torch.randn(2, 3, 16, 24)
        whole(images)
        backbone = tiny(out_indices=out_indices, out_norm_cfg=out_norm_cfg)
        # Weights of more branches' norms are welcome.
        backbone.load_state_dict(whole.state_dict())
        maps, every = backbone.eval()(images), whole.eval()(images)
        chosen = [out_indices] if isinstance(out_indices, int) else out_indices
        assert isinstance(maps, tuple)
        assert len(maps) == len(chosen)
        for found, i in zip(maps, chosen, strict=True):
            assert torch.equal(found, every[i])
        assert [tuple(m.shape) for m in every] == [
            (2, 8, 8, 12),
            (2, 8, 4, 6),
            (2, 16, 2, 3),
        ]

    @pytest.mark.parametrize('in_channels', [1, 4])
    def test_in_channels(self, in_channels):
        backbone = tiny(in_channels=in_channels)
        assert len(backbone(torch.randn(2, in_channels, 16, 16))) == 3

    def test_evaluation_is_deterministic(self):
        backbone = tiny(arch=dict(dropout=0.5)).eval()
        images = torch.randn(2, 3, 16, 16)
        first, second = backbone(images), backbone(images)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_training_gives_f_of_the_solution(self):
        backbone = tiny(out_norm_cfg=None).double().train()
        images = torch.randn(2, 3, 16, 16).double()
        captured = []
        backbone.equilibrium.register_forward_pre_hook(
            lambda module, inputs: captured.append(inputs)
        )
        maps = backbone(images)
        start, *injections = captured[0]
        assert all(m.eq(0).all() for m in start)
        assert len(injections) == 3
        equation = backbone.equilibrium.equation(start, *injections)
        expected = equation(backbone.last_solution.value)
        found = torch.cat([m.flatten(1) for m in maps], 1)
        assert relative(found, expected) < 1e-12
        maps = backbone.eval()(images)
        found = torch.cat([m.flatten(1) for m in maps], 1)
        assert relative(found, backbone.last_solution.value) < 1e-12

    @pytest.mark.parametrize('solver', EVERY_SOLVER, ids=shown)
    def test_predictions_do_not_depend_on_the_batch(self, solver):
        model = project_classifier(solver=solver)
        images = project_golden()['input'].double()
        hard = torch.cat([images, 100 * images[:1], images[:1] * torch.nan])
        with torch.no_grad():
            together = model.backbone(hard)
            steps = model.backbone.last_solution.steps
            for i in range(3):
                alone = model.backbone(images[i : i + 1])
                assert model.backbone.last_solution.steps.item() == steps[i].item()
                for a, b in zip(alone, together, strict=True):
                    assert relative(a, b[i : i + 1]) < 1e-9

    @pytest.mark.parametrize('solver', EVERY_SOLVER, ids=shown)
    def test_predictions_do_not_depend_on_the_batch_in_single_precision(self, solver):
        # No residual lies so near that rounding would decide about one step more.
        model = project_classifier(solver=solver | dict(tol=8e-5)).float()
        images = project_golden()['input']
        with torch.no_grad():
            together = model.backbone(images)
            steps = model.backbone.last_solution.steps.tolist()
            for i in range(3):
                alone = model.backbone(images[i : i + 1])
                assert model.backbone.last_solution.steps.item() == steps[i]
                for a, b in zip(alone, together, strict=True):
                    assert relative(a, b[i : i + 1]) < 1e-5

    def test_separate_solver_for_evaluation(self):
        solver = dict(type='PicardSolver', max_steps=7, tol=0)
        backbone = tiny(eval_solver=solver)
        images = torch.randn(2, 3, 16, 16)
        backbone(images)
        assert backbone.last_solution.steps.max() <= 4
        with torch.no_grad():
            backbone.eval()(images)
        assert backbone.last_solution.steps.tolist() == [7, 7]

    @pytest.mark.parametrize(
        ('arch', 'size', 'least'),
        [
            ('small', (0, 64), 1),
            # Where a group is one channel, a map of one pixel is a single number.
            (dict(channels=(4, 8), num_groups=4, downsample_times=1), (3, 4), 4),
        ],
    )
    def test_images_that_are_too_small_are_refused(self, arch, size, least):
        backbone = MDEQ(arch=arch)
        with pytest.raises(ValueError, match=f'{size[0]}x{size[1]} pixels .*{least}'):
            backbone(torch.zeros(1, 3, *size))

    @pytest.mark.parametrize(
        ('arch', 'least'),
        [('small', 32), ('cifar-tiny', 2), ('cifar-large', 8), (TINY, 8)],
    )
    def test_the_smallest_images(self, arch, least):
        backbone = MDEQ(arch=arch, **FAST).eval()
        with torch.no_grad():
            maps = backbone(torch.randn(1, 3, least, least))
        assert maps[-1].shape[2:] == (1, 1)
        assert all(m.isfinite().all() for m in maps)


class TestDropout:
    def masks_of(self, backbone, images):
        captured = []
        handle = backbone.equilibrium.register_forward_pre_hook(
            lambda module, inputs: captured.append(inputs[1 + backbone.arch.injected :])
        )
        maps = backbone(images)
        handle.remove()
        return captured[0], maps

    def test_masks_are_drawn_once_a_pass_for_each_block(self):
        backbone = tiny(arch=dict(dropout=0.5, num_blocks=(1, 2, 1)))
        images = torch.randn(3, 3, 16, 16)
        first, _ = self.masks_of(backbone, images)
        second, _ = self.masks_of(backbone, images)
        assert [tuple(m.shape) for m in first] == [
            (3, 8, 1, 1),
            (3, 8, 1, 1),
            (3, 8, 1, 1),
            (3, 16, 1, 1),
        ]
        assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert set(first[0].unique().tolist()) == {0.0, 2.0}

    def test_f_is_one_function_during_a_solve(self):
        """With masks drawn anew at each step nothing would converge."""
        model = project_classifier().train()
        backbone = model.backbone
        backbone.arch = copy.copy(backbone.arch)
        object.__setattr__(backbone.arch, 'dropout', 0.1)
        images = project_golden()['input'].double()
        masks, maps = self.masks_of(backbone, images)
        assert len(masks) == 3
        solution = backbone.last_solution
        assert solution.residual.max() < 1e-10
        injections = backbone.inject(images)
        start = backbone._start(injections[0])
        equation = backbone.equilibrium.equation(start, *injections, *masks)
        found = torch.cat([m.flatten(1) for m in maps], 1)
        assert relative(found, equation(solution.value)) < 1e-12
        without = backbone.equilibrium.equation(start, *injections)
        assert relative(found, without(solution.value)) > 1e-3

    def test_none_in_evaluation_or_at_rate_zero(self):
        images = torch.randn(2, 3, 16, 16)
        masks, _ = self.masks_of(tiny(arch=dict(dropout=0.5)).eval(), images)
        assert masks == ()
        masks, _ = self.masks_of(tiny(), images)
        assert masks == ()

    def test_drop_rate_replaces_that_of_the_arch(self):
        assert tiny(drop_rate=0.4).arch.dropout == 0.4
        assert tiny(arch=dict(dropout=0.5), drop_rate=0.0).arch.dropout == 0.0
        assert MDEQ('cifar-tiny').arch.dropout == 0.0
        assert MDEQ('cifar-tiny', drop_rate=0.25).arch.dropout == 0.25
        for rate in (1.0, -0.1, 'a'):
            with pytest.raises(ValueError, match=f'drop_rate={rate!r} is out of range'):
                tiny(drop_rate=rate)


class TestNorms:
    @pytest.mark.parametrize(
        ('norm_cfg', 'kind'),
        [
            (dict(type='BN'), nn.BatchNorm2d),
            (dict(type='SyncBN'), nn.SyncBatchNorm),
            (dict(type='GN', num_groups=4), nn.GroupNorm),
        ],
    )
    def test_of_stem_and_injection(self, norm_cfg, kind):
        backbone = tiny(norm_cfg=norm_cfg)
        parts = [*backbone.stem, *backbone.injection]
        assert all(isinstance(part.norm, kind) for part in parts)
        inside = [m for m in backbone.equilibrium.modules() if hasattr(m, 'eps')]
        assert inside
        assert all(isinstance(m, nn.GroupNorm) for m in inside)
        if kind is not nn.SyncBatchNorm:
            assert backbone(torch.randn(2, 3, 16, 16))[0].isfinite().all()

    def test_norm_eval(self):
        backbone = tiny(norm_eval=True).train()
        assert backbone.training
        assert backbone.equilibrium.training
        before = {k: v.clone() for k, v in backbone.state_dict().items()}
        backbone(torch.randn(4, 3, 16, 16))
        after = backbone.state_dict()
        assert all(torch.equal(after[k], v) for k, v in before.items())
        assert all(p.requires_grad for p in backbone.parameters())

    def test_norms_learn_their_statistics_otherwise(self):
        backbone = tiny().train()
        backbone(3 + torch.randn(4, 3, 16, 16))
        assert backbone.stem[0].bn.running_mean.ne(0).any()
        assert backbone.stem[0].bn.num_batches_tracked == 1


class TestFrozenStages:
    @pytest.mark.parametrize('stages', [-1, 0, 1, 2])
    def test_what_is_frozen(self, stages):
        backbone = tiny(frozen_stages=stages, arch=dict(dropout=0.5))
        for _ in range(2):
            backbone.eval().train()
            parts = [
                (0, backbone.stem),
                (1, backbone.injection),
                (2, backbone.equilibrium),
                (2, backbone.out_norms),
            ]
            for i, part in parts:
                frozen = i <= stages
                assert all(p.requires_grad != frozen for p in part.parameters())
                assert all(m.training != frozen for m in part.modules())

    @pytest.mark.parametrize('stages', [0, 1, 2])
    def test_a_training_step_leaves_frozen_parts_alone(self, stages):
        backbone = tiny(frozen_stages=stages).train()
        head = nn.Conv2d(8, 2, 1)
        optimizer = torch.optim.SGD(
            [
                p
                for p in [*backbone.parameters(), *head.parameters()]
                if p.requires_grad
            ],
            lr=0.1,
        )
        before = copy.deepcopy(backbone.state_dict())
        head(backbone(torch.randn(4, 3, 16, 16))[0]).square().sum().backward()
        optimizer.step()
        changed = {
            key.split('.')[0]
            for key, value in backbone.state_dict().items()
            if not torch.equal(value, before[key])
        }
        expected = [
            {'injection', 'equilibrium', 'out_norms'},
            {'equilibrium', 'out_norms'},
        ]
        assert changed == [*expected, set()][stages]

    @pytest.mark.parametrize(('injection', 'layers'), [('first', 0), ('all', 2)])
    def test_frozen_with_and_without_injection(self, injection, layers):
        arch = dict(
            channels=(8, 8), num_groups=4, downsample_times=0, injection=injection
        )
        backbone = MDEQ(arch=arch, frozen_stages=1, **FAST).train()
        assert len(backbone.injection) == layers
        assert not any(p.requires_grad for p in backbone.injection.parameters())
        backbone(torch.randn(2, 3, 8, 8))[0].sum().backward()
        assert all(p.grad is None for p in backbone.stem.parameters())

    @pytest.mark.parametrize('stages', [-2, 3, '1', None, 0.5])
    def test_others_are_refused(self, stages):
        with pytest.raises(ValueError, match=f'frozen_stages={stages!r} is out of'):
            tiny(frozen_stages=stages)


class TestArguments:
    @pytest.mark.parametrize(
        ('options', 'error', 'words'),
        [
            (dict(out_indices=(0, 3)), ValueError, ['(0, 3)', '3 branches', '0 to 2']),
            (dict(out_indices=(-1,)), ValueError, ['out_indices', '-1']),
            (dict(out_indices=5), ValueError, ['out_indices', '5']),
            (dict(out_indices=(0.0,)), ValueError, ['out_indices', '0.0']),
            (dict(out_indices='01'), ValueError, ['out_indices', "'0'"]),
            (dict(solver=dict(type='Newton')), ValueError, ["solver.type='Newton'"]),
            (
                dict(solver=dict(type='PicardSolver', max_steps=0)),
                ValueError,
                ['max_steps=0', '1 or more'],
            ),
            (
                dict(solver=dict(type='PicardSolver', tol=-0.5)),
                ValueError,
                ['tol=-0.5', 'at least 0'],
            ),
            (dict(solver='BroydenSolver'), TypeError, ['solver', "'BroydenSolver'"]),
            (
                dict(eval_solver=dict(type='X')),
                ValueError,
                ["eval_solver.type='X'", 'BroydenSolver'],
            ),
            (
                dict(gradient=dict(type='Adjoint')),
                ValueError,
                ["gradient.type='Adjoint'", 'PhantomGradient'],
            ),
            (
                dict(gradient=dict(type='ImplicitGradient', solver=dict(type='N'))),
                ValueError,
                ["gradient.solver.type='N'"],
            ),
            (
                dict(gradient=dict(type='PhantomGradient', terms=3)),
                TypeError,
                ['gradient (PhantomGradient)', 'terms', 'steps'],
            ),
            (
                dict(
                    gradient=dict(
                        type='ImplicitGradient',
                        solver=dict(type='BroydenSolver', norm='abs'),
                    )
                ),
                ValueError,
                ["gradient.solver.norm='abs'", "'rel'"],
            ),
        ],
        ids=str,
    )
    def test_bad_ones_are_refused(self, options, error, words):
        with pytest.raises(error) as found:
            tiny(**options)
        for word in words:
            assert word in str(found.value), (word, str(found.value))

    def test_unknown_ones_are_refused(self):
        with pytest.raises(TypeError, match='depth'):
            tiny(depth=3)


class TestFlops:
    @pytest.mark.parametrize('size', [(16, 24), (17, 13)])
    def test_against_a_count_by_hand(self, size):
        arch = dict(channels=(8, 16), num_groups=4, expansion=3, downsample_times=1)
        backbone = MDEQ(arch=arch, **FAST)

        def conv(kernel, inside, outside, height, width):
            return 2 * kernel * kernel * inside * outside * height * width

        h0, w0 = ((s + 1) // 2 for s in size)
        h1, w1 = (h0 + 1) // 2, (w0 + 1) // 2
        stem = conv(3, 3, 8, h0, w0) + conv(3, 8, 8, h0, w0)
        stem += conv(1, 8, 8, h0, w0) + conv(1, 8, 16, h1, w1)
        function = (
            conv(3, 8, 24, h0, w0)
            + conv(3, 24, 8, h0, w0)
            + conv(3, 16, 48, h1, w1)
            + conv(3, 48, 16, h1, w1)
            + conv(1, 16, 8, h1, w1)
            + conv(3, 8, 16, h1, w1)
            + conv(1, 8, 8, h0, w0)
            + conv(1, 16, 16, h1, w1)
        )
        found = backbone.get_flops((3, *size))
        assert found == dict(
            stem=stem,
            function=function,
            steps=4,
            solve=4 * function,
            total=stem + 4 * function,
        )

    def test_steps(self):
        backbone = tiny(eval_solver=dict(type='PicardSolver', max_steps=9))
        few, nine = (
            backbone.get_flops((3, 16, 16), steps=2),
            backbone.get_flops((3, 16, 16)),
        )
        assert (few['steps'], nine['steps']) == (2, 9)
        assert few['solve'] * 9 == nine['solve'] * 2
        assert backbone.get_flops((3, 16, 16), steps=0)['solve'] == 0

    def test_of_the_small_model(self):
        # 2.5 GFLOP at 224x224 pixels, as measured for the official model.
        assert MDEQ('small').get_flops()['function'] == 2_521_243_648
        grey = MDEQ('small', in_channels=1).get_flops()
        assert grey['function'] == 2_521_243_648

    def test_leaves_the_backbone_alone(self):
        backbone = tiny().train()
        before = copy.deepcopy(backbone.state_dict())
        backbone.get_flops((3, 16, 16))
        assert backbone.training
        assert backbone.last_solution is None
        after = backbone.state_dict()
        assert all(torch.equal(after[k], v) for k, v in before.items())


def test_dropout_of_a_frozen_function_is_off():
    x = torch.randn(2, 3, 32, 32)
    frozen = tiny(frozen_stages=2, arch=dict(dropout=0.5)).train()
    assert torch.equal(frozen(x)[0], frozen(x)[0])


def test_printing_shows_solver_and_gradient():
    shown = repr(tiny(eval_solver=dict(type='PicardSolver', max_steps=9)))
    assert 'gradient=ImplicitGradient' in shown
    assert 'eval_solver=PicardSolver(max_steps=9' in shown


class TestInitialisation:
    @pytest.mark.parametrize('official', [False, True])
    def test_statistics(self, official):
        backbone = MDEQ('cifar-large')
        if official:
            cfg = config_of('cifar10/mdeq-large_official_4xb32-220e_cifar10').backbone
            backbone = build(cfg)
        torch.manual_seed(1)
        backbone.init_weights()
        seen = set()
        for name, module in backbone.named_modules():
            if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)) and module.affine:
                assert module.weight.eq(1).all(), name
                assert module.bias.eq(0).all(), name
            elif isinstance(module, nn.Conv2d) and module.weight.numel() > 800:
                weight = module.weight.detach()
                # PyTorch's own: uniform with a standard deviation of
                # 1 / sqrt(3 fan_in).
                expected = (3 * weight[0].numel()) ** -0.5
                if parametrize.is_parametrized(module):
                    g = module.parametrizations.weight.original0
                    v = module.parametrizations.weight.original1
                    norm = v.flatten(1).norm(dim=1)
                    torch.testing.assert_close(g.flatten(), norm)
                elif official or name.startswith('equilibrium.'):
                    expected = 0.01
                assert weight.std().item() == pytest.approx(expected, rel=0.1), name
                seen.add(name)
                assert abs(weight.mean().item()) < expected / 10, name
        assert {'stem.0.conv', 'injection.0.conv'} <= seen
        assert ('injection.3.conv' in seen) != official

    def test_of_the_constructor_is_the_same(self):
        """Without init_weights(), as plain PyTorch code would use it."""
        backbone = MDEQ('cifar-large')
        weight = backbone.equilibrium.f.fusion.paths[1]['0'][0].weight
        assert weight.std().item() == pytest.approx(0.01, rel=0.02)
        before = {k: v.clone() for k, v in backbone.state_dict().items()}
        backbone.init_weights()
        after = backbone.state_dict()
        assert all(torch.equal(after[k], v) for k, v in before.items())

    def test_seeds(self):
        states = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            backbone = tiny()
            backbone.init_weights()
            states.append(backbone.stem[0].conv.weight.clone())
        assert torch.equal(states[0], states[1])
        assert not torch.equal(states[0], states[2])

    def test_own_init_cfg(self):
        backbone = tiny(init_cfg=dict(type='Constant', layer='Conv2d', val=0.5))
        backbone.init_weights()
        assert backbone.stem[0].conv.weight.eq(0.5).all()


class TestPrecision:
    def test_autocast(self):
        model = project_classifier(
            solver=dict(type='AndersonSolver', max_steps=60, tol=1e-3),
            gradient=dict(
                type='ImplicitGradient',
                solver=dict(type='AndersonSolver', max_steps=60, tol=1e-3),
            ),
        ).float()
        backbone = model.backbone.train()
        # Statistics of the norms as they are, so that only the precision differs.
        for module in backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        images = project_golden()['input']
        grads, outs = [], []
        for enabled in (False, True):
            backbone.zero_grad()
            with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
                maps = backbone(images)
            assert all(m.dtype == torch.float32 for m in maps)
            assert backbone.last_solution.value.dtype == torch.float32
            status = backbone.last_solution.status
            assert status.le(Status.STALLED).all()
            sum(m.square().mean() + m[:, 0].mean() for m in maps).backward()
            outs.append(maps)
            grads.append([p.grad.clone() for p in backbone.parameters()])
        assert relative(outs[1], outs[0]) < 0.05
        assert all(g.isfinite().all() for g in grads[1])
        assert cosine(grads[1], grads[0]) > 0.99

    @pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize('training', [True, False])
    def test_whole_model(self, dtype, training):
        model = project_classifier(
            solver=dict(type='AndersonSolver', max_steps=20, tol=1e-2)
        ).to(dtype)
        model.train(training)
        images = project_golden()['input'].to(dtype)
        logits = model.head(model.extract_feat(images))
        assert logits.dtype == dtype
        assert logits.isfinite().all()
        logits.square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad.dtype == dtype
            assert parameter.grad.isfinite().all(), name
        if not training:
            assert relative(logits, project_golden()['logits']) < 0.2


class TestCompanions:
    """What toolboxes do to a backbone."""

    def test_copy_after_a_training_step(self):
        backbone = tiny(out_norm_cfg=None).double()
        images = torch.randn(2, 3, 16, 16).double()
        backbone(images)[0].sum().backward()
        other = copy.deepcopy(backbone)
        assert other.last_solution is not backbone.last_solution
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                # Directions of weight normalisation have no value of zero.
                if not name.endswith('original1'):
                    parameter.zero_()
            assert other.eval()(images)[0].eq(0).all()
            assert backbone.eval()(images)[0].ne(0).any()

    def test_moving_average(self):
        from mmengine.model import ExponentialMovingAverage

        backbone = tiny()
        averaged = ExponentialMovingAverage(backbone, momentum=0.5)
        images = torch.randn(2, 3, 16, 16)
        before = backbone.stem[0].conv.weight.clone()
        averaged.update_parameters(backbone)
        backbone(images)[0].square().sum().backward()
        with torch.no_grad():
            for parameter in backbone.parameters():
                parameter.add_(1)
        averaged.update_parameters(backbone)
        found = averaged.module.stem[0].conv.weight
        torch.testing.assert_close(found, before + 0.5)
        with torch.no_grad():
            assert averaged.eval()(images)[0].isfinite().all()

    @pytest.mark.parametrize('weight_norm', [True, False])
    def test_pickle(self, weight_norm):
        backbone = tiny(arch=dict(weight_norm=weight_norm)).eval()
        images = torch.randn(2, 3, 16, 16)
        with torch.no_grad():
            expected = backbone(images)
            again = pickle.loads(pickle.dumps(backbone))
            found = again(images)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert torch.equal(again.last_solution.steps, backbone.last_solution.steps)

    @pytest.mark.parametrize('reentrant', [False, True])
    def test_checkpointing_around_it(self, reentrant):
        backbone = tiny(norm_eval=True).double()
        images = torch.randn(2, 3, 16, 16).double().requires_grad_()
        parameters = [*backbone.parameters(), images]
        expected = torch.autograd.grad(
            sum(m.square().sum() for m in backbone(images)), parameters
        )
        maps = checkpoint(backbone, images, use_reentrant=reentrant)
        sum(m.square().sum() for m in maps).backward()
        for parameter, reference in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.grad, reference)

    def test_gradients_reach_the_image(self):
        backbone = tiny().eval()
        images = torch.randn(2, 3, 16, 16).requires_grad_()
        found = backbone(images)[2]
        # The plain sum of what a group norm returns does not depend on anything.
        (found * torch.randn_like(found)).sum().backward()
        assert images.grad.abs().sum() > 1

    def test_state_dict_round_trip(self):
        backbone, other = tiny(), tiny()
        other.load_state_dict(backbone.state_dict())
        images = torch.randn(2, 3, 16, 16)
        with torch.no_grad():
            for a, b in zip(backbone.eval()(images), other.eval()(images), strict=True):
                assert torch.equal(a, b)

    def test_solver_may_be_changed_afterwards(self):
        backbone = tiny().eval()
        backbone.equilibrium.eval_solver = PicardSolver(3, tol=0)
        backbone(torch.randn(2, 3, 16, 16))
        assert backbone.last_solution.steps.tolist() == [3, 3]
        assert isinstance(backbone.equilibrium.solver, BroydenSolver)


@pytest.mark.parametrize(
    'gradient',
    [
        dict(type='ImplicitGradient', solver=dict(type='AndersonSolver', tol=1e-4)),
        dict(type='PhantomGradient', steps=3),
        dict(type='UnrolledGradient', steps=4),
    ],
    ids=lambda g: g['type'],
)
def test_a_small_model_learns(gradient):
    """A few steps of training reduce the loss and keep every number finite."""
    solver = dict(type='AndersonSolver', max_steps=15, tol=1e-3)
    model = project_classifier(solver=solver, gradient=gradient).float().train()
    torch.manual_seed(0)
    images, target = torch.randn(16, 3, 14, 11), torch.arange(16) % 4
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        logits = model.head(model.extract_feat(images))
        loss = nn.functional.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize(
    'gradient',
    [
        dict(type='ImplicitGradient'),
        dict(type='PhantomGradient', steps=3),
        dict(type='PhantomGradient', steps=3, unroll=True),
        dict(type='UnrolledGradient', steps=4),
    ],
    ids=str,
)
def test_a_broken_image_harms_no_other(gradient, with_cp):
    """Features and the gradients of f, with batch norms that do not mix images."""
    model = project_classifier(gradient=gradient, with_cp=with_cp)
    backbone = model.backbone
    backbone.norm_eval = True
    backbone.train()
    images = project_golden()['input'].double()
    results = []
    for batch in (images, torch.cat([images[:1], images[:1] * torch.nan, images[1:]])):
        backbone.zero_grad()
        maps = backbone(batch)
        assert all(m.isfinite().all() for m in maps)
        sum(m.square().sum() + m[:, 0].sum() for m in maps).backward()
        grads = [p.grad.clone() for p in backbone.equilibrium.parameters()]
        results.append((maps, grads))
    assert backbone.last_solution.status[1] == Status.DIVERGED
    (maps, grads), (mixed_maps, mixed_grads) = results
    for a, b in zip(maps, mixed_maps, strict=True):
        assert relative(b[[0, 2, 3]], a) < 1e-9
    assert relative(mixed_grads, grads) < 1e-9


@pytest.mark.parametrize('warm', [False, True])
def test_channels_last_through_the_whole_solve(warm):
    """The state keeps the format, and f is given maps in it; numbers are the same."""
    model = project_classifier(warm_start=warm)
    images = project_golden()['input'].double()
    with torch.no_grad():
        expected = model.backbone(images)
        model.to(memory_format=torch.channels_last)
        formats = []
        layer = model.backbone.equilibrium
        layer.last_solution = None

        def watch(f, inputs):
            maps, *others = inputs
            formats.extend(
                m.is_contiguous() for m in (*maps, *others) if m.shape[1] > 1
            )

        layer.f.register_forward_pre_hook(watch)
        for _ in range(2):
            found = model.backbone(images.to(memory_format=torch.channels_last))
    assert formats and not any(formats)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('grad', [False, True])
def test_a_broken_image_gives_nan_in_evaluation(grad):
    """As of any other backbone; the images beside it keep their features."""
    backbone = project_classifier().backbone.eval()
    images = project_golden()['input'].double()
    with torch.set_grad_enabled(grad):
        expected = backbone(images)
        images = torch.cat([images[:1], images[:1] * torch.nan, images[1:]])
        found = backbone(images)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine[1].isnan().all()
        assert relative(mine[[0, 2, 3]], theirs) < 1e-9
    assert backbone.last_solution.value.isfinite().all()


@pytest.mark.parametrize('size', [(9, 200), (20, 20), (1, 40), (5, 3)])
def test_images_thinner_than_the_coarsest_pixel(size):
    """Their coarsest maps have one pixel a side, and nothing else is special."""
    arch = dict(channels=(8, 16, 16, 32), num_groups=4, expansion=1)
    backbone = MDEQ(arch).double()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    for mode in (True, False):
        maps = backbone.train(mode)(images)
        height, width = (math.ceil(side / 4) for side in size)
        for m in maps:
            assert m.shape[2:] == (height, width)
            assert m.isfinite().all()
            height, width = -(-height // 2), -(-width // 2)
    with torch.no_grad():
        alone = backbone(images[:1])
    for m, one in zip(maps, alone, strict=True):
        assert relative(one, m[:1]) < 1e-9
