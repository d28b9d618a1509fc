"""Conversion of official checkpoints, by the command line and as a function."""

import pytest
import torch
from mmengine.registry import init_default_scope
from torch.nn.functional import batch_norm, conv2d, interpolate

from mdeq_mm.models import MDEQ
from tests.helpers import (
    SHARED,
    equation_of,
    load_tool,
    logits_of,
    needs_shared,
    official_classifier,
    pack,
    relative,
)
from tests.helpers import official as as_official

needs_cls = needs_shared('golden', 'golden_cls.pt')
needs_seg = needs_shared('golden', 'golden_seg.pt')


@pytest.fixture(scope='module')
def tool():
    return load_tool('tools/model_converters/mdeq2mm.py')


def golden(task):
    return torch.load(SHARED / 'golden' / f'golden_{task}.pt', weights_only=True)


def official(branches=2, halvings=2, weight_norm=True):
    """A state dict under official names, of one channel each; values count up."""
    names = []
    index = 0
    for _ in range(max(2, halvings)):
        names += [f'downsample.{index}.weight', f'downsample.{index + 1}.weight']
        names += [f'downsample.{index + 1}.running_mean']
        index += 3
    names += ['stage0.0.weight', 'stage0.1.weight', 'stage0.1.bias']
    kinds = ['weight_g', 'weight_v'] if weight_norm else ['weight']
    for i in range(branches):
        block = f'fullstage.branches.{i}.blocks.0'
        names += [f'{block}.conv{k}.{kind}' for k in (1, 2) for kind in kinds]
        names += [f'{block}.gn{k}.{p}' for k in (1, 2, 3) for p in ('weight', 'bias')]
        for j in range(branches):
            path = f'fullstage.fuse_layers.{i}.{j}.net'
            if j > i:
                names += [f'{path}.conv.weight', f'{path}.gnorm.weight']
            for k in range(i - j):
                names += [f'{path}.{k}.conv.weight', f'{path}.{k}.gnorm.bias']
        names += [f'fullstage.post_fuse_layers.{i}.conv.{kind}' for kind in kinds]
        names += [f'fullstage.post_fuse_layers.{i}.gnorm.bias']
        names += [f'incre_modules.{i}.0.conv2.weight']
    names += ['downsamp_modules.0.0.bias', 'final_layer.1.weight', 'classifier.bias']
    return {name: torch.full((1,), float(k)) for k, name in enumerate(names)}


class TestNames:
    def test_where_entries_go(self, tool):
        state, names, left = tool.convert(official(3), 'cls')
        assert left == []
        f = 'backbone.equilibrium.f'
        expected = {
            'downsample.0.weight': 'backbone.stem.0.conv.weight',
            'downsample.4.running_mean': 'backbone.stem.1.bn.running_mean',
            'stage0.0.weight': 'backbone.injection.0.conv.weight',
            'stage0.1.bias': 'backbone.injection.0.bn.bias',
            'fullstage.branches.2.blocks.0.conv1.weight_g': (
                f'{f}.branches.2.0.conv1.parametrizations.weight.original0'
            ),
            'fullstage.branches.2.blocks.0.conv2.weight_v': (
                f'{f}.branches.2.0.conv2.parametrizations.weight.original1'
            ),
            'fullstage.branches.0.blocks.0.gn3.bias': f'{f}.branches.0.0.norm3.bias',
            'fullstage.fuse_layers.0.2.net.conv.weight': (
                f'{f}.fusion.paths.0.2.conv.weight'
            ),
            'fullstage.fuse_layers.0.2.net.gnorm.weight': (
                f'{f}.fusion.paths.0.2.norm.weight'
            ),
            'fullstage.fuse_layers.2.0.net.1.conv.weight': (
                f'{f}.fusion.paths.2.0.3.weight'
            ),
            'fullstage.fuse_layers.2.0.net.1.gnorm.bias': (
                f'{f}.fusion.paths.2.0.4.bias'
            ),
            'fullstage.post_fuse_layers.1.conv.weight_g': (
                f'{f}.post_convs.1.parametrizations.weight.original0'
            ),
            'fullstage.post_fuse_layers.1.gnorm.bias': f'{f}.post_norms.1.bias',
            'incre_modules.1.0.conv2.weight': (
                'neck.0.bottlenecks.1.layers.1.conv.weight'
            ),
            'downsamp_modules.0.0.bias': 'neck.0.downsamples.0.conv.bias',
            'final_layer.1.weight': 'neck.0.final.bn.weight',
            'classifier.bias': 'head.fc.bias',
        }
        for theirs, ours in expected.items():
            assert names[theirs] == ours
            assert torch.equal(state[ours], official(3)[theirs])
        assert len(set(names.values())) == len(names) == len(state)

    @pytest.mark.parametrize('halvings', [0, 1, 2, 3])
    def test_stems_of_any_depth(self, tool, halvings):
        state, _, left = tool.convert(official(halvings=halvings), 'cls')
        assert left == []
        depth = max(2, halvings)
        assert f'backbone.stem.{depth - 1}.bn.weight' in state
        assert f'backbone.stem.{depth}.conv.weight' not in state

    def test_without_weight_normalisation(self, tool):
        state, _, left = tool.convert(official(weight_norm=False), 'cls')
        assert left == []
        assert 'backbone.equilibrium.f.branches.0.0.conv1.weight' in state

    def test_what_is_unknown_is_left(self, tool):
        more = {
            'optimizer.state': torch.ones(1),
            'fullstage.extra.weight': torch.ones(1),
        }
        state, names, left = tool.convert(official() | more, 'cls')
        assert left == ['optimizer.state', 'fullstage.extra.weight']
        assert not set(left) & set(names)
        assert len(state) == len(official())

    def test_the_source_is_left_alone(self, tool):
        source = official()
        before = dict(source)
        tool.convert(source, 'cls')
        assert source.keys() == before.keys()

    @pytest.mark.parametrize('task', ['cls', 'seg'])
    def test_other_models_are_refused(self, tool, task):
        with pytest.raises(ValueError, match=r"no weights of an official MDEQ.*'conv1"):
            tool.convert({'conv1.weight': torch.ones(1)}, task)
        with pytest.raises(ValueError, match='no weights of an official MDEQ'):
            tool.convert({}, task)

    def test_the_wrong_task_is_refused(self, tool):
        with pytest.raises(ValueError, match='no head for --task seg: try the other'):
            tool.convert(official(), 'seg')
        backbone = {
            k: v
            for k, v in official().items()
            if k.startswith(('downsample.', 'stage0', 'fullstage'))
        }
        seg = backbone | {
            f'last_layer.{name}': torch.ones(1)
            for name in ('0.weight', '0.bias', '1.weight', '1.running_mean', '3.weight')
        }
        with pytest.raises(ValueError, match='no head for --task cls: try the other'):
            tool.convert(seg, 'cls')


class TestCommand:
    @pytest.fixture
    def source(self, tmp_path):
        def write(content, name='official.pkl'):
            path = tmp_path / name
            torch.save(content, path)
            return str(path)

        return write

    @pytest.fixture
    def target(self, tmp_path):
        return tmp_path / 'new' / 'folder' / 'mdeq.pth'

    @pytest.mark.parametrize(
        'wrap',
        [
            lambda s: s,
            lambda s: dict(state_dict=s, epoch=3),
            lambda s: dict(model=s),
            lambda s: {f'module.{k}': v for k, v in s.items()},
            lambda s: dict(state_dict={f'module.{k}': v for k, v in s.items()}),
        ],
    )
    def test_writes_what_load_checkpoint_takes(self, tool, source, target, wrap):
        tool.main([source(wrap(official())), str(target), '--task', 'cls'])
        content = torch.load(target, weights_only=True)
        expected, _, _ = tool.convert(official(), 'cls')
        assert content['meta'] == dict(source='official MDEQ', task='cls')
        assert content['state_dict'].keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(content['state_dict'][key], value)
        assert list(target.parent.iterdir()) == [target]

    def test_reports_every_entry(self, tool, source, target, capsys):
        state = official() | {'extra.weight': torch.ones(1)}
        tool.main([source(state), str(target), '--task', 'cls'])
        lines = capsys.readouterr().out.splitlines()
        used = [line.split() for line in lines if line.startswith('used')]
        left = [line.split() for line in lines if line.startswith('left')]
        _, names, _ = tool.convert(official(), 'cls')
        assert [(u[1], u[3]) for u in used] == list(names.items())
        assert [entry[1] for entry in left] == ['extra.weight']
        assert f'{len(names)} entries used, 1 left' in lines[-1]
        # What they fit, and what a config of one's own has to set.
        for word in ('*_official_* configs', "injection='first'", 'out_norm_cfg=None'):
            assert word in lines[-1]

    def test_overwrites_only_if_told(self, tool, source, target):
        path = source(official())
        target.parent.mkdir(parents=True)
        target.write_text('precious')
        with pytest.raises(SystemExit, match=r'mdeq\.pth exists: .*--force'):
            tool.main([path, str(target), '--task', 'cls'])
        assert target.read_text() == 'precious'
        tool.main([path, str(target), '--task', 'cls', '--force'])
        assert 'state_dict' in torch.load(target, weights_only=True)

    @pytest.mark.parametrize('force', [[], ['--force']])
    def test_a_failure_leaves_the_target_alone(self, tool, source, target, force):
        """What is there stays there if the source turns out to be no good."""
        target.parent.mkdir(parents=True)
        target.write_text('precious')
        with pytest.raises(SystemExit):
            tool.main([source(dict(a=1)), str(target), '--task', 'cls', *force])
        assert target.read_text() == 'precious'

    def test_an_interrupted_write_leaves_the_target_alone(
        self, tool, source, target, monkeypatch
    ):
        path = source(official())
        target.parent.mkdir(parents=True)
        target.write_text('precious')

        def interrupted(content, file, *args, **kwargs):
            with open(file, 'wb') as f:
                f.write(b'half')
            raise KeyboardInterrupt

        monkeypatch.setattr(tool.torch, 'save', interrupted)
        with pytest.raises(KeyboardInterrupt):
            tool.main([path, str(target), '--task', 'cls', '--force'])
        assert target.read_text() == 'precious'

    def test_the_source_is_not_overwritten(self, tool, source):
        path = source(official())
        with pytest.raises(SystemExit, match='is the source'):
            tool.main([path, path, '--task', 'cls', '--force'])
        assert torch.load(path, weights_only=True).keys() == official().keys()

    @pytest.mark.parametrize(
        ('content', 'words'),
        [
            ([1, 2], 'not a dict'),
            ({1: torch.ones(1)}, 'entry 1'),
            (dict(a=torch.ones(1)), 'no weights of an official MDEQ'),
            (dict(), 'no weights of an official MDEQ'),
        ],
        ids=str,
    )
    def test_other_content_is_refused(self, tool, source, target, content, words):
        with pytest.raises(SystemExit) as error:
            tool.main([source(content), str(target), '--task', 'cls'])
        assert 'official.pkl' in str(error.value)
        assert words in str(error.value)
        assert not target.exists()

    def test_files_that_are_none(self, tool, tmp_path, target):
        garbage = tmp_path / 'garbage.pkl'
        garbage.write_bytes(b'\x00\x01 not a checkpoint' * 9)
        with pytest.raises(SystemExit, match=r'garbage\.pkl.*cannot be read'):
            tool.main([str(garbage), str(target), '--task', 'cls'])
        with pytest.raises(SystemExit, match=r'nothing\.pkl'):
            tool.main([str(tmp_path / 'nothing.pkl'), str(target), '--task', 'cls'])
        assert not target.exists()

    def test_the_wrong_task(self, tool, source, target):
        with pytest.raises(SystemExit, match='no head for --task seg'):
            tool.main([source(official()), str(target), '--task', 'seg'])
        assert not target.exists()

    @pytest.mark.parametrize('arguments', [[], ['a', 'b'], ['a', 'b', '--task', 'x']])
    def test_usage(self, tool, arguments, capsys):
        with pytest.raises(SystemExit):
            tool.main(arguments)
        assert 'usage' in capsys.readouterr().err


@pytest.fixture(scope='module')
def numbers():
    return golden('seg')


@needs_cls
def test_a_classifier_from_file(tool, tmp_path):
    """Official file to converted file to a model that gives the official logits."""
    numbers = golden('cls')
    source, target = tmp_path / 'official.pkl', tmp_path / 'mdeq.pth'
    torch.save(
        {f'module.{k}': v for k, v in numbers['official_state_dict'].items()}, source
    )
    tool.main([str(source), str(target), '--task', 'cls'])
    model, names = official_classifier()
    state = torch.load(target, weights_only=True)['state_dict']
    assert set(names.values()) == set(state)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(state)
    model.eval()
    with torch.no_grad():
        logits = logits_of(model, numbers['input'].double())
    assert relative(logits, numbers['eval']['logits']) < 1e-8


@needs_cls
def test_a_backbone_starts_from_the_file(tool, tmp_path):
    numbers = golden('cls')
    source, target = tmp_path / 'official.pkl', tmp_path / 'mdeq.pth'
    torch.save(numbers['official_state_dict'], source)
    tool.main([str(source), str(target), '--task', 'cls'])
    config = numbers['config']
    arch = dict(channels=config['num_channels'], num_groups=config['num_groups'])
    init = dict(type='Pretrained', checkpoint=str(target), prefix='backbone.')
    # A backbone with the defaults says what to set.
    words = r"injection='first'.* and out_norm_cfg=None"
    with pytest.raises(RuntimeError, match=words):
        MDEQ(arch=arch, init_cfg=init).init_weights()
    backbone = MDEQ(**as_official(dict(arch=arch)), init_cfg=init)
    backbone.init_weights()
    backbone = backbone.double().eval()
    equation, _ = equation_of(backbone, numbers['input'].double())
    found = equation(pack(numbers['eval']['f_input']))
    assert relative(found, pack(numbers['eval']['f_output'])) < 1e-12


class TestSegmentation:
    pytestmark = needs_seg

    @pytest.fixture
    def converted(self, tool, numbers):
        state, names, left = tool.convert(numbers['official_state_dict'], 'seg')
        assert left == []
        assert set(names) == set(numbers['official_state_dict'])
        return state

    def head(self, channels, classes):
        mmseg = pytest.importorskip('mmseg.models', reason='mmseg is not installed')
        init_default_scope('mmseg')
        return mmseg.FCNHead(
            in_channels=channels,
            in_index=list(range(len(channels))),
            input_transform='resize_concat',
            channels=sum(channels),
            kernel_size=1,
            num_convs=1,
            concat_input=False,
            dropout_ratio=0,
            num_classes=classes,
            norm_cfg=dict(type='BN'),
            align_corners=True,
        )

    def reference(self, state, maps, training):
        """The official head, from its description."""
        size = maps[0].shape[2:]
        x = torch.cat(
            [
                interpolate(m, size=size, mode='bilinear', align_corners=True)
                for m in maps
            ],
            dim=1,
        )
        x = conv2d(x, state['last_layer.0.weight'], state['last_layer.0.bias'])
        x = batch_norm(
            x,
            state['last_layer.1.running_mean'].clone(),
            state['last_layer.1.running_var'].clone(),
            state['last_layer.1.weight'],
            state['last_layer.1.bias'],
            training,
        ).relu()
        return conv2d(x, state['last_layer.3.weight'], state['last_layer.3.bias'])

    @pytest.mark.parametrize('training', [False, True])
    def test_the_bias_in_front_of_the_norm_is_folded(
        self, numbers, converted, training
    ):
        state = {k: v.double() for k, v in numbers['official_state_dict'].items()}
        channels = numbers['config']['num_channels']
        classes = len(state['last_layer.3.bias'])
        head = self.head(channels, classes).train(training)
        own = {
            k.removeprefix('decode_head.'): v
            for k, v in converted.items()
            if k.startswith('decode_head.')
        }
        head.load_state_dict(own)
        head = head.double()
        assert state['last_layer.0.bias'].abs().max() > 1e-4
        maps = [m.double() for m in numbers['eval']['equilibrium']]
        expected = self.reference(state, maps, training)
        if not training:
            assert relative(expected, numbers['eval']['logits']) < 1e-8
        # The folded mean was rounded to single precision.
        assert relative(head(maps), expected) < 1e-6

    def test_a_bias_without_its_norm_is_refused(self, tool, numbers):
        state = dict(numbers['official_state_dict'])
        del state['last_layer.1.running_mean']
        with pytest.raises(ValueError, match=r'last_layer\.1\.running_mean'):
            tool.convert(state, 'seg')

    def test_the_whole_model(self, tool, numbers, converted):
        channels = numbers['config']['num_channels']
        exact = dict(type='BroydenSolver', max_steps=60, tol=1e-11)
        arch = dict(channels=channels, num_groups=numbers['config']['num_groups'])
        backbone = MDEQ(**as_official(dict(arch=arch)), solver=exact)
        model = torch.nn.ModuleDict(
            dict(backbone=backbone, decode_head=self.head(channels, 19))
        )
        model.load_state_dict(converted)
        model = model.double().eval()
        with torch.no_grad():
            maps = model['backbone'](numbers['input'].double())
            logits = model['decode_head'](maps)
        assert backbone.last_solution.converged.all()
        for found, expected in zip(maps, numbers['eval']['equilibrium'], strict=True):
            assert relative(found, expected) < 1e-8
        assert relative(logits, numbers['eval']['logits']) < 1e-6
