"""Injection everywhere, normalised outputs, and what tells the official model apart."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, relu

from mdeq_mm.models import MDEQ, MDEQFuseScales, MDEQPoolBranches
from tests.helpers import logged, official, relative

ARCH = dict(channels=(8, 16, 16), num_groups=8, expansion=2, downsample_times=1)
BATCH_NORM = dict(type='BN', affine=False)


def halved(x):
    """Mean of each 2x2 block; those at an odd edge have what is there."""
    height, width = x.shape[2:]
    whole = x.new_full(
        (*x.shape[:2], height + height % 2, width + width % 2), torch.nan
    )
    whole[:, :, :height, :width] = x
    blocks = whole.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return blocks.nanmean((3, 5))


class TestInjection:
    @pytest.mark.parametrize(
        'size', [(32, 32), (31, 31), (37, 22), (8, 61), (9, 9)], ids=str
    )
    def test_against_plain_pytorch(self, size):
        backbone = MDEQ(arch=ARCH).double()
        for module in backbone.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                nn.init.uniform_(module.weight, 0.5, 2)
                nn.init.normal_(module.bias)
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        backbone.eval()
        images = torch.randn(2, 3, *size).double()
        with torch.no_grad():
            found = backbone.inject(images)
            x = backbone.stem(images)
            assert len(found) == 3
            for i, layer in enumerate(backbone.injection):
                norm = layer.bn
                weight = layer.conv.weight[:, :, 0, 0]
                expected = torch.einsum('nchw,dc->ndhw', x, weight)
                shape = (1, -1, 1, 1)
                expected = expected - norm.running_mean.view(shape)
                expected = expected / (norm.running_var + 1e-5).sqrt().view(shape)
                expected = expected * norm.weight.view(shape) + norm.bias.view(shape)
                assert relative(found[i], expected) < 1e-12
                # No activation: half of the numbers are below zero.
                assert 0.1 < (found[i] < 0).double().mean() < 0.9
                x = halved(x)
            start = backbone._start(found[0])
            assert [m.shape for m in found] == [m.shape for m in start]
            assert [m.shape for m in backbone(images)] == [m.shape for m in start]

    def test_of_the_official_model(self):
        backbone = MDEQ(**official(dict(arch=ARCH))).double().eval()
        images = torch.randn(2, 3, 21, 30).double()
        with torch.no_grad():
            (found,) = backbone.inject(images)
            (layer,) = backbone.injection
            expected = relu(layer.bn(layer.conv(backbone.stem(images))))
        assert torch.equal(found, expected)

    def test_what_it_costs(self):
        """A 1x1 convolution and a norm for each branch but the first."""
        costs = [
            sum(p.numel() for p in MDEQ(**options).parameters())
            for options in (dict(arch='small'), official(dict(arch='small')))
        ]
        extra = costs[0] - costs[1]
        assert extra == (32 + 2) * (64 + 128 + 256)
        assert extra < 0.01 * costs[1]
        flops = MDEQ('small').get_flops((3, 224, 224), steps=5)
        less = MDEQ(**official(dict(arch='small'))).get_flops((3, 224, 224), steps=5)
        assert flops['function'] == less['function']
        assert flops['total'] < 1.01 * less['total']

    def test_every_branch_has_the_image_from_the_first_evaluation_on(self):
        """f(0, x), in which the official model's other branches see next to nothing."""
        images = torch.randn(4, 3, 16, 16).double()
        shares = {}
        for injection in ('all', 'first'):
            backbone = MDEQ(arch=ARCH | dict(injection=injection)).double().eval()
            backbone.init_weights()
            blocks = []
            backbone.equilibrium.f.branches[2][0].register_forward_hook(
                lambda module, inputs, out, blocks=blocks: blocks.append(out)
            )
            with torch.no_grad():
                injections = backbone.inject(images)
                backbone.equilibrium.f(backbone._start(injections[0]), *injections)
            (block,) = blocks
            shares[injection] = block.std(0).mean().item()
        assert shares['first'] == 0
        assert shares['all'] > 0.1

    def test_gradients_at_the_start_of_training(self):
        """Zeros meet a norm, whose gain there is 316, where the image is not."""
        found = {}
        for injection in ('all', 'first'):
            torch.manual_seed(0)
            backbone = MDEQ(
                arch=ARCH | dict(injection=injection),
                gradient=dict(type='UnrolledGradient', steps=4),
            )
            neck, head = MDEQPoolBranches((8, 16, 16)), nn.Linear(40, 10)
            model = nn.ModuleList([backbone, neck, head]).train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
            images, target = torch.randn(16, 3, 16, 16), torch.arange(16) % 10
            # In the first step the activation behind a norm of zeros passes nothing.
            for _ in range(2):
                optimizer.zero_grad()
                cross_entropy(head(neck(backbone(images))[0]), target).backward()
                optimizer.step()
            bias = backbone.equilibrium.f.branches[1][0].norm1.bias
            found[injection] = bias.grad.norm().item()
        assert found['first'] > 30
        assert found['all'] < 3


class TestOutputNorm:
    def raw(self, backbone, images):
        """Equilibrium, or f of it in training, without the norms of the outputs."""
        other = copy.deepcopy(backbone)
        other.out_norms = nn.ModuleDict()
        return other(images)

    def test_in_training_and_evaluation(self):
        backbone = MDEQ(arch=ARCH).double().train()
        images = torch.randn(4, 3, 18, 26).double()
        raw = self.raw(backbone, images)
        found = backbone(images)
        for i, (mine, maps) in enumerate(zip(found, raw, strict=True)):
            mean = maps.mean((0, 2, 3), keepdim=True)
            var = (maps - mean).square().mean((0, 2, 3), keepdim=True)
            assert relative(mine, (maps - mean) / (var + 1e-5).sqrt()) < 1e-11
            norm = backbone.out_norms[str(i)]
            assert relative(norm.running_mean, 0.1 * mean.flatten()) < 1e-11
        backbone.eval()
        with torch.no_grad():
            raw = self.raw(backbone, images)
            for i, (mine, maps) in enumerate(zip(backbone(images), raw, strict=True)):
                norm = backbone.out_norms[str(i)]
                mean = norm.running_mean.view(1, -1, 1, 1)
                var = norm.running_var.view(1, -1, 1, 1)
                assert relative(mine, (maps - mean) / (var + 1e-5).sqrt()) < 1e-11

    def test_none_returns_the_equilibrium(self):
        backbone = MDEQ(arch=ARCH, out_norm_cfg=None).double().eval()
        with torch.no_grad():
            maps = backbone(torch.randn(2, 3, 16, 16).double())
        packed = torch.cat([m.flatten(1) for m in maps], 1)
        assert torch.equal(packed, backbone.last_solution.value)
        assert len(backbone.out_norms) == 0

    def test_the_default_has_no_parameters(self):
        names = [name for name, _ in MDEQ(arch=ARCH).named_parameters()]
        assert not any(name.startswith('out_norms') for name in names)
        with_them = MDEQ(arch=ARCH, out_norm_cfg=dict(type='BN'), out_indices=(0, 2))
        found = {
            n: p.numel() for n, p in with_them.named_parameters() if 'out_norms' in n
        }
        assert found == {
            'out_norms.0.weight': 8,
            'out_norms.0.bias': 8,
            'out_norms.2.weight': 16,
            'out_norms.2.bias': 16,
        }

    @pytest.mark.parametrize(
        ('cfg', 'error', 'words'),
        [
            (dict(type='NN'), ValueError, ['out_norm_cfg', "'NN'", 'no norm of 8']),
            (dict(type='ReLU'), ValueError, ['out_norm_cfg', 'ReLU', 'no norm']),
            (dict(type='GN'), ValueError, ['out_norm_cfg', 'GN', 'no norm of 8']),
            (
                dict(type='GN', num_groups=3),
                ValueError,
                ['out_norm_cfg', 'no norm of 8', 'num_groups'],
            ),
            (dict(affine=False), TypeError, ['out_norm_cfg', "dict(type='BN')"]),
            ('BN', TypeError, ['out_norm_cfg', "'BN'", "dict(type='BN')"]),
            (True, TypeError, ['out_norm_cfg', 'True', "dict(type='BN')"]),
        ],
        ids=str,
    )
    def test_what_is_no_norm_is_refused(self, cfg, error, words):
        with pytest.raises(error) as found:
            MDEQ(arch=ARCH, out_norm_cfg=cfg)
        for word in words:
            assert word in str(found.value), (word, str(found.value))


class TestWeightsOfTheOtherVariant:
    """Refused with what to set, in both directions; their own are loaded."""

    OFFICIAL = dict(arch=ARCH | dict(injection='first'), out_norm_cfg=None)
    MIXED = dict(arch=ARCH | dict(injection='first'))

    def refused(self, into, state):
        backbone = MDEQ(**into)
        before = {k: v.clone() for k, v in backbone.state_dict().items()}
        with pytest.raises(RuntimeError) as found:
            backbone.load_state_dict(state, strict=False)
        after = backbone.state_dict()
        assert all(torch.equal(after[k], v) for k, v in before.items())
        return str(found.value)

    def test_official_ones_into_the_defaults(self):
        said = self.refused(dict(arch=ARCH), MDEQ(**self.OFFICIAL).state_dict())
        assert "set arch=dict(..., injection='first') and out_norm_cfg=None of" in said
        assert '*_official_* configs' in said

    def test_the_defaults_into_an_official_one(self):
        said = self.refused(self.OFFICIAL, MDEQ(arch=ARCH).state_dict())
        assert "set arch=dict(..., injection='all') and out_norm_cfg=dict(" in said
        assert "dict(type='BN', affine=False) of the backbone" in said

    def test_one_of_both(self):
        state = MDEQ(**self.MIXED).state_dict()
        said = self.refused(self.OFFICIAL, state)
        assert "set out_norm_cfg=dict(type='BN', affine=False) of" in said
        said = self.refused(dict(arch=ARCH), state)
        assert "set arch=dict(..., injection='first') of the backbone" in said

    def test_within_a_model(self):
        model = nn.ModuleDict(dict(backbone=MDEQ(arch=ARCH)))
        state = nn.ModuleDict(dict(backbone=MDEQ(**self.OFFICIAL))).state_dict()
        with pytest.raises(RuntimeError, match=r"injection='first'.*out_norm_cfg=None"):
            model.load_state_dict(state)

    @pytest.mark.parametrize(
        'options',
        [
            dict(arch=ARCH),
            OFFICIAL,
            MIXED,
            dict(arch=ARCH, out_norm_cfg=None),
            dict(arch=ARCH, out_norm_cfg=dict(type='BN')),
            # Norms without numbers of their own.
            dict(arch=ARCH, out_norm_cfg=dict(type='GN', num_groups=4, affine=False)),
            dict(arch=ARCH, out_norm_cfg=dict(type='IN')),
            # Neither has an injection layer of its own.
            dict(arch=dict(channels=(8, 8), downsample_times=0, injection='first')),
        ],
        ids=str,
    )
    def test_their_own_are_loaded(self, options):
        source = MDEQ(**options)
        with torch.no_grad():
            for value in source.state_dict().values():
                if value.is_floating_point():
                    value.add_(0.1 * torch.rand_like(value))
        state, other = source.state_dict(), MDEQ(**options)
        other.load_state_dict(state)
        assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items())
        images = torch.randn(2, 3, 16, 16)
        with torch.no_grad():
            for a, b in zip(source.eval()(images), other.eval()(images), strict=True):
                assert torch.equal(a, b)

    def test_into_a_backbone_that_returns_fewer_maps(self):
        """As a classifier's weights into a segmentor; the file stays as it is."""
        source = MDEQ(arch=ARCH).train()
        source(torch.randn(4, 3, 16, 16))
        state = source.state_dict()
        names = list(state)
        other = MDEQ(arch=ARCH, out_indices=(2,))
        result = other.load_state_dict(state)
        assert not result.missing_keys and not result.unexpected_keys
        assert list(state) == names
        norm = other.out_norms['2']
        assert torch.equal(norm.running_mean, state['out_norms.2.running_mean'])
        assert norm.running_mean.abs().sum() > 0


class TestPooledRawEquilibria:
    """A training run that would stay at chance says why, once."""

    def warnings_of(self, read, training=True, passes=2, **options):
        """Lines in the log of some steps of a classifier.

        Args:
            read (Callable): Takes the maps, returns a loss.
            training (bool): Mode of the backbone.
            passes (int): Forward and backward passes.
            **options: Of the backbone.
        """
        backbone = MDEQ(arch=ARCH, **options).train(training)
        with logged() as texts:
            for _ in range(passes):
                read(backbone(torch.randn(4, 3, 16, 16))).backward()
        return [text for text in texts if 'raw equilibria' in text]

    @staticmethod
    def linear(features):
        layer = nn.Linear(features.shape[1], 3)
        return cross_entropy(layer(features), torch.arange(len(features)) % 3)

    def pooled(self, maps):
        return self.linear(torch.cat([m.mean((2, 3)) for m in maps], 1))

    def test_once_where_a_linear_layer_reads_them(self):
        (text,) = self.warnings_of(self.pooled, out_norm_cfg=None)
        assert "set out_norm_cfg=dict(type='BN', affine=False) of the backbone" in text
        assert "neck=dict(type='MDEQPoolBranches', in_channels=...)" in text

    def test_of_the_last_map_alone_as_mmpretrain_reads_it(self):
        found = self.warnings_of(
            lambda maps: self.linear(maps[-1].mean((2, 3))), out_norm_cfg=None
        )
        assert len(found) == 1

    def test_not_with_norms_on_the_outputs(self):
        assert self.warnings_of(self.pooled) == []
        assert self.warnings_of(self.pooled, out_norm_cfg=dict(type='BN')) == []

    @pytest.mark.parametrize(
        'make',
        [
            lambda: MDEQPoolBranches((8, 16, 16)),
            lambda: MDEQFuseScales((8, 16, 16), (2, 4, 4), 16),
        ],
        ids=['MDEQPoolBranches', 'MDEQFuseScales'],
    )
    def test_not_in_front_of_the_necks(self, make):
        neck = make()

        def read(maps):
            (x,) = neck(maps)
            return self.linear(x if x.dim() == 2 else x.mean((2, 3)))

        assert self.warnings_of(read, out_norm_cfg=None) == []

    def test_not_where_pixels_are_read(self):
        conv = nn.Conv2d(16, 3, 1)

        def read(maps):
            labels = torch.randint(3, (4, *maps[-1].shape[2:]))
            return cross_entropy(conv(maps[-1]), labels)

        assert self.warnings_of(read, out_norm_cfg=None) == []

    def test_not_in_evaluation(self):
        assert self.warnings_of(self.pooled, training=False, out_norm_cfg=None) == []

    def test_it_changes_no_gradient(self):
        grads = []
        for watched in (False, True):
            torch.manual_seed(0)
            backbone = MDEQ(arch=ARCH, out_norm_cfg=None).train()
            backbone._watched = watched
            self.pooled(backbone(torch.randn(4, 3, 16, 16))).backward()
            grads.append([p.grad for p in backbone.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
