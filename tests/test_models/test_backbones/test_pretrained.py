"""Loading a backbone from a file: what fits is loaded, all else is refused."""

import re
import warnings
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
from mmengine.runner import CheckpointLoader, load_checkpoint

from mdeq_mm.models import MDEQ
from tests.helpers import load_tool, logged

ARCH = dict(channels=(8, 16), num_groups=4, expansion=2, downsample_times=1)


def make(**options):
    options = dict(arch=ARCH) | options
    return MDEQ(**options)


@pytest.fixture
def state():
    torch.manual_seed(7)
    source = make()
    source.init_weights()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(torch.randn_like(parameter))
    return source.state_dict()


@pytest.fixture
def save(tmp_path):
    def write(content, name='weights.pth'):
        path = tmp_path / name
        torch.save(content, path)
        return str(path)

    return write


def load(path, **options):
    cfg = dict(type='Pretrained', checkpoint=path)
    prefix = options.pop('prefix', None)
    if prefix is not None:
        cfg['prefix'] = prefix
    backbone = make(init_cfg=cfg, **options)
    backbone.init_weights()
    return backbone


def assert_loaded(backbone, state):
    own = backbone.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[key], value) for key, value in state.items())


class TestWhatFits:
    def test_state_dict(self, state, save):
        assert_loaded(load(save(state)), state)

    @pytest.mark.parametrize('key', ['state_dict', 'model'])
    def test_wrapped(self, state, save, key):
        assert_loaded(load(save({key: state, 'meta': dict(epoch=3)})), state)

    def test_parallel_wrappers(self, state, save):
        path = save({f'module.{k}': v for k, v in state.items()})
        assert_loaded(load(path), state)

    @pytest.mark.parametrize('prefix', ['backbone', 'backbone.'])
    def test_prefix(self, state, save, prefix):
        whole = {f'backbone.{k}': v for k, v in state.items()}
        path = save(dict(state_dict=whole | {'head.fc.weight': torch.ones(2)}))
        assert_loaded(load(path, prefix=prefix), state)

    def test_prefix_and_parallel_wrapper(self, state, save):
        whole = {f'module.backbone.{k}': v for k, v in state.items()}
        path = save(whole | {'module.head.fc.weight': torch.ones(2)})
        assert_loaded(load(path, prefix='backbone'), state)

    def test_pretrained(self, state, save):
        with pytest.warns(DeprecationWarning, match="init_cfg=dict.type='Pretrained'"):
            backbone = make(pretrained=save(state))
        backbone.init_weights()
        assert_loaded(backbone, state)

    def test_in_double_precision(self, state, save):
        path = save({k: v.double() for k, v in state.items()})
        found = load(path).state_dict()
        for key, value in state.items():
            assert found[key].dtype == value.dtype
            torch.testing.assert_close(found[key], value)

    def test_batch_counters_may_be_missing(self, state, save):
        state = {
            k: v for k, v in state.items() if not k.endswith('num_batches_tracked')
        }
        own = load(save(state)).state_dict()
        assert all(torch.equal(own[key], value) for key, value in state.items())

    def test_what_was_left_is_told(self, state, save):
        with logged() as texts:
            load(save(state | {f'old.{i}': torch.ones(1) for i in range(20)}))
        text = '\n'.join(texts)
        assert f'loaded {len(state)} of {len(state)} entries' in text
        parts = dict(re.findall(r'([\w.]+) \((\d+)\)', text))
        assert sum(map(int, parts.values())) == len(state) + 20
        assert parts['old'] == '20' and 'left in the file, not loaded: old' in text
        assert {'stem.0', 'injection.0', 'equilibrium.f', 'out_norms.1'} < set(parts)

    def test_weights_survive_the_initialisation_of_a_parent(self, state, save):
        from mmengine.model import BaseModule

        class Parent(BaseModule):
            def __init__(self, path):
                super().__init__(dict(type='Constant', layer='Conv2d', val=0.5))
                self.backbone = make(init_cfg=dict(type='Pretrained', checkpoint=path))
                self.head = torch.nn.Conv2d(8, 2, 1)

        parent = Parent(save(state))
        parent.init_weights()
        assert_loaded(parent.backbone, state)
        assert parent.head.weight.eq(0.5).all()

    def test_without_warnings(self, state, save):
        path = save(state)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            load(path)


class TestWhatDoesNot:
    def refused(self, path, error, *words, **options):
        with pytest.raises(error) as found:
            load(path, **options)
        for word in words:
            assert word in str(found.value), (word, str(found.value))

    def test_other_widths(self, state, save):
        self.refused(
            save(state),
            RuntimeError,
            'weights.pth',
            'stem.0.conv.weight',
            '(8, 3, 3, 3)',
            '(16, 3, 3, 3)',
            'arch',
            arch=ARCH | dict(channels=(16, 16)),
        )

    def test_other_expansion(self, state, save):
        self.refused(
            save(state),
            RuntimeError,
            'equilibrium.f.branches.0.0.conv1',
            'arch',
            arch=ARCH | dict(expansion=3),
        )

    def test_more_branches(self, state, save):
        self.refused(
            save(state),
            RuntimeError,
            'lacks',
            'another architecture',
            arch=ARCH | dict(channels=(8, 16, 16)),
        )

    def test_fewer_branches(self, save):
        """All that the backbone has is there and fits, but it is another model."""
        large = make(arch=ARCH | dict(channels=(8, 16, 16)))
        self.refused(save(large.state_dict()), RuntimeError, 'another architecture')

    def test_another_model(self, save):
        other = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)).state_dict()
        self.refused(save(other), RuntimeError, 'weights.pth', 'lacks', 'mdeq2mm')

    def test_another_prefix(self, state, save):
        path = save({f'backbone.{k}': v for k, v in state.items()})
        self.refused(path, RuntimeError, 'lacks', 'prefix')
        self.refused(path, RuntimeError, 'lacks', 'prefix', prefix='encoder')

    def test_one_entry_missing(self, state, save):
        key = 'equilibrium.f.post_norms.1.bias'
        del state[key]
        self.refused(save(state), RuntimeError, 'lacks 1 of', key)

    @pytest.mark.parametrize('value', [torch.nan, torch.inf])
    def test_weights_that_are_not_finite(self, state, save, value):
        key = 'injection.0.conv.weight'
        state[key][0, 0] = value
        self.refused(save(state), ValueError, 'weights.pth', key, 'non-finite')

    def test_missing_file(self, tmp_path):
        path = str(tmp_path / 'nothing.pth')
        self.refused(path, FileNotFoundError, 'nothing.pth')

    def test_a_folder(self, tmp_path):
        with pytest.raises((OSError, ValueError), match=tmp_path.name):
            load(str(tmp_path))

    @pytest.mark.parametrize('keep', [0, 10, 1000, -100])
    def test_truncated_file(self, state, save, tmp_path, keep):
        whole = (tmp_path / save(state)).read_bytes()
        path = tmp_path / 'cut.pth'
        path.write_bytes(whole[:keep])
        self.refused(str(path), ValueError, 'cut.pth', 'damaged')

    def test_garbage(self, tmp_path):
        path = tmp_path / 'text.pth'
        path.write_text('this is no checkpoint\n' * 100)
        self.refused(str(path), ValueError, 'text.pth', 'cannot be read')

    @pytest.mark.parametrize('content', [[1, 2], torch.ones(3), None, 'weights', 3])
    def test_no_dict(self, save, content):
        self.refused(save(content), ValueError, 'weights.pth', 'not a dict')

    @pytest.mark.parametrize(
        'content', [{}, {1: torch.ones(2)}, {'a': 1}, {'state_dict': {}}], ids=str
    )
    def test_no_state_dict(self, save, content):
        self.refused(save(content), (RuntimeError, ValueError), 'weights.pth')

    @pytest.mark.filterwarnings('ignore:Detected pickle protocol')
    @pytest.mark.parametrize('protocol', [0, 2, 5])
    def test_code_in_a_file_is_not_run(self, state, tmp_path, protocol):
        import pickle

        mark = tmp_path / 'ran'
        path = tmp_path / 'evil.pth'

        class Evil:
            def __reduce__(self):
                return open, (str(mark), 'w')

        # As torch writes it, and as a bare pickle.
        torch.save(dict(state_dict=state, extra=Evil()), path)
        self.refused(str(path), ValueError, 'evil.pth', 'code')
        path.write_bytes(pickle.dumps(dict(extra=Evil()), protocol=protocol))
        self.refused(str(path), ValueError, 'evil.pth')
        assert not mark.exists()

    def test_nothing_is_changed_by_a_file_that_does_not_fit(self, state, save):
        key = 'equilibrium.f.post_norms.1.bias'
        del state[key]
        backbone = make(init_cfg=dict(type='Pretrained', checkpoint=save(state)))
        before = {k: v.clone() for k, v in backbone.state_dict().items()}
        with pytest.raises(RuntimeError):
            backbone.init_weights()
        assert_loaded(backbone, before)


class TestArguments:
    def test_both_ways_at_once(self):
        with pytest.raises(ValueError, match=r"pretrained='a.pth' and init_cfg"):
            make(pretrained='a.pth', init_cfg=dict(type='Pretrained', checkpoint='b'))

    @pytest.mark.parametrize('pretrained', [True, 3, dict(checkpoint='a')])
    def test_what_is_no_path(self, pretrained):
        with pytest.raises(TypeError, match='pretrained must be a path or URL'):
            make(pretrained=pretrained)

    def test_without_a_checkpoint(self):
        backbone = make(init_cfg=dict(type='Pretrained'))
        with pytest.raises((KeyError, ValueError), match='checkpoint'):
            backbone.init_weights()

    def test_in_a_list(self, state, save):
        """A list of initialisations, as OpenMMLab's modules take it."""
        cfg = [dict(type='Pretrained', checkpoint=save(state))]
        backbone = make(init_cfg=cfg)
        backbone.init_weights()
        assert_loaded(backbone, state)


class TestLoadingByTheToolboxes:
    """mmengine loads leniently; a backbone that fits in part is refused even so."""

    def test_whole(self, state, save):
        backbone = make()
        load_checkpoint(backbone, save(state), strict=False)
        assert_loaded(backbone, state)

    def test_in_part(self, state, save):
        del state['stem.0.conv.weight']
        with pytest.raises(RuntimeError, match=r'lacks.*stem\.0\.conv\.weight'):
            load_checkpoint(make(), save(state), strict=False)

    def test_of_other_shapes(self, state, save):
        with pytest.raises(
            RuntimeError, match='set its channels to those of the checkpoint'
        ):
            load_checkpoint(make(arch=ARCH | dict(channels=(4, 8))), save(state))

    def test_within_a_larger_model(self, state, save):
        model = torch.nn.ModuleDict(dict(backbone=make(), head=torch.nn.Linear(2, 2)))
        whole = {f'backbone.{k}': v for k, v in state.items()}
        load_checkpoint(model, save(whole), strict=False)
        assert_loaded(model['backbone'], state)
        del whole['backbone.injection.0.conv.weight']
        with pytest.raises(RuntimeError, match=r'backbone\.injection\.0\.conv\.weight'):
            load_checkpoint(model, save(whole), strict=False)


class TestOtherChannels:
    """A checkpoint of colour images into a model of other ones."""

    @pytest.mark.parametrize('channels', [1, 2, 4, 6])
    def test_the_first_convolution_is_adapted(self, state, save, channels):
        path = save(state)
        with logged() as texts:
            backbone = load(path, in_channels=channels)
        assert any(f'adapted to in_channels={channels}' in text for text in texts)
        key = 'stem.0.conv.weight'
        own = backbone.state_dict()
        found, expected = own.pop(key), state[key]
        assert all(torch.equal(value, state[name]) for name, value in own.items())
        if channels == 1:
            assert torch.equal(found, expected.sum(1, keepdim=True))
        else:
            assert torch.equal(found[:, 0], expected[:, 0] * (3 / channels))
        if channels in (1, 6):
            # Grey images get what they got as colour ones.
            torch.testing.assert_close(found.sum(1), expected.sum(1))

    def test_as_load_from_does(self, state, save):
        model = torch.nn.ModuleDict(dict(backbone=make(in_channels=4)))
        path = save({f'backbone.{key}': value for key, value in state.items()})
        load_checkpoint(model, path)
        own = model.backbone.state_dict()
        key = 'injection.0.conv.weight'
        assert torch.equal(own[key], state[key])
        assert own['stem.0.conv.weight'].shape[1] == 4
        # The file's own are left as they were.
        assert state['stem.0.conv.weight'].shape[1] == 3

    def test_as_the_tools_start_from_it(self, state, save):
        common = load_tool('tools/common.py')
        model = torch.nn.ModuleDict(dict(backbone=make(in_channels=4)))
        state = {f'backbone.{key}': value for key, value in state.items()}
        runner = SimpleNamespace(model=model)
        common.check_checkpoint_sound(runner, save(state))
        del state['backbone.injection.0.conv.weight']
        with pytest.raises(SystemExit):
            common.check_checkpoint_sound(runner, save(state))

    def test_a_type_as_it_is_written_into_files(self, state, save):
        """Of a config in Python, dumped: loaded as by its name, with its checks."""
        init_cfg = dict(type='mmengine.model.PretrainedInit', checkpoint=save(state))
        model = make(in_channels=4, init_cfg=init_cfg)
        with logged() as texts:
            model.init_weights()
        assert any('loaded' in text for text in texts)
        assert torch.equal(
            model.state_dict()['injection.0.conv.weight'],
            state['injection.0.conv.weight'],
        )

    def test_other_shapes_stay_an_error(self, state, save):
        state['stem.0.conv.weight'] = state['stem.0.conv.weight'][:4]
        with pytest.raises(RuntimeError, match=r'stem\.0\.conv\.weight has shape'):
            load(save(state), in_channels=4)


class TestInheritedPretrained:
    """The weights of another backbone, which a base config brings."""

    def refusal(self, pretrained, error):
        with pytest.warns(DeprecationWarning):
            backbone = make(pretrained=pretrained)
        with pytest.raises(error) as found:
            backbone.init_weights()
        message = str(found.value)
        assert f'pretrained={pretrained!r}' in message
        assert 'write model=dict(pretrained=None)' in message
        return message

    def test_that_is_of_another_backbone(self, save):
        path = save(dict(conv1=torch.ones(2)))
        assert 'lacks' in self.refusal(path, RuntimeError)

    def test_that_is_not_there(self, tmp_path):
        message = self.refusal(str(tmp_path / 'no.pth'), FileNotFoundError)
        assert 'does not exist' in message

    def test_that_is_a_folder(self, tmp_path):
        message = self.refusal(str(tmp_path), IsADirectoryError)
        assert 'is a folder' in message

    def test_that_needs_a_package(self, monkeypatch):
        def fail(*args, **kwargs):
            raise ImportError('Please install petrel_client')

        monkeypatch.setattr(CheckpointLoader, 'load_checkpoint', fail)
        message = self.refusal('s3://bucket/a.pth', ValueError)
        assert 'a package for such addresses is missing' in message
        assert 'damaged' not in message

    @pytest.mark.parametrize(
        'error', [URLError('no route'), ConnectionResetError('reset'), TimeoutError()]
    )
    @pytest.mark.parametrize(
        'address', ['open-mmlab://msra/hrnetv2_w18', 'https://example.com/a.pth']
    )
    def test_that_cannot_be_downloaded(self, monkeypatch, error, address):
        def fail(*args, **kwargs):
            raise error

        monkeypatch.setattr(CheckpointLoader, 'load_checkpoint', fail)
        monkeypatch.setattr('mmengine.runner.checkpoint.load_from_http', fail)
        message = self.refusal(address, ValueError)
        assert 'could not be downloaded' in message
        assert 'damaged' not in message

    def test_beside_init_cfg(self):
        with pytest.raises(ValueError, match=r'model=dict\(pretrained=None\)'):
            make(pretrained='a.pth', init_cfg=dict(type='Normal', layer='Conv2d'))
