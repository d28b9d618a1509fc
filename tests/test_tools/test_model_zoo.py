"""What the tools for the model zoo count, write and publish."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch

import mdeq_mm
from mdeq_mm.analysis.saved_bytes import saved_bytes_per_image
from tests.helpers import load_tool

pytest.importorskip('mmpretrain', reason='mmpretrain is not installed')

FAST = ['mdeq-digits', 'resnet-digits']


@pytest.fixture(scope='module')
def zoo():
    return load_tool('dev/model_zoo.py')


@pytest.fixture(scope='module')
def costs(zoo):
    """What the digits' models cost."""
    return {
        name: zoo.measure(mdeq_mm.get_config(name), (1, 32, 32))
        for name in ('mdeq-digits', 'resnet-digits')
    }


class TestMeasure:
    def test_of_an_mdeq(self, costs):
        cost = costs['mdeq-digits']
        assert cost.parameters == 95_986
        assert cost.limits == (5, 12)
        backbone = mdeq_mm.get_model('mdeq-digits', device='cpu').backbone
        flops = backbone.get_flops((1, 32, 32))
        assert cost.function == flops['function'] == 4_022_784
        # A matrix of 72 times 10: the neck has none.
        head = cost.rest - flops['stem']
        assert head == 2 * 720
        assert cost.flops == flops['total'] + head

    def test_of_another_model(self, costs):
        cost = costs['resnet-digits']
        assert cost.parameters == 99_748
        assert cost.function is cost.limits is cost.unrolled is cost.rest is None
        assert cost.flops > 0

    @pytest.mark.parametrize('name', ['mdeq-digits', 'resnet-digits'])
    def test_kept_bytes_are_those_of_a_real_training(self, costs, name):
        model = mdeq_mm.get_model(name, device='cpu').train()

        def forward(n):
            return model(torch.rand(n, 1, 32, 32), mode='tensor')

        # With all steps that the config allows.
        assert costs[name].kept == saved_bytes_per_image(forward, (2, 3))
        assert costs[name].unrolled is None

    def test_kept_bytes_of_an_unrolled_phase(self, zoo):
        cfg = mdeq_mm.get_config('mdeq-digits')
        cfg.default_hooks.warmup = dict(type='UnrollWarmupHook', unroll_steps=4)
        cost = zoo.measure(cfg, (1, 32, 32))
        model = mdeq_mm.get_model('mdeq-digits', device='cpu').train()
        model.backbone.equilibrium.unroll_steps = 4

        def forward(n):
            return model(torch.rand(n, 1, 32, 32), mode='tensor')

        unrolled = saved_bytes_per_image(forward, (2, 3))
        assert cost.unrolled == unrolled > cost.kept


METAFILE = """\
Models:
  - Name: a
    Config: configs/a.py
    Metadata:
      FLOPs: 0
      Parameters: 1

  - Name: ab
    Config: configs/ab.py
    Metadata:
      FLOPs: 2
      Parameters: 3
"""


class TestMetafiles:
    def test_a_number_of_one_model_is_replaced(self, zoo):
        found = zoo.set_field(METAFILE, 'ab', 'FLOPs', 77)
        assert found == METAFILE.replace('FLOPs: 2', 'FLOPs: 77')

    def test_weights_are_added_and_replaced(self, zoo):
        once = zoo.set_field(METAFILE, 'a', 'Weights', 'mdeq_mm://x.pth')
        line = '    Config: configs/a.py\n'
        added = f'{line}    Weights: mdeq_mm://x.pth\n'
        assert once == METAFILE.replace(line, added)
        twice = zoo.set_field(once, 'a', 'Weights', 'mdeq_mm://y.pth')
        assert twice == once.replace('x.pth', 'y.pth')

    def test_of_an_unknown_model(self, zoo):
        with pytest.raises(ValueError, match="no model is called 'b' in the metafile"):
            zoo.set_field(METAFILE, 'b', 'FLOPs', 1)


class TestPage:
    @pytest.mark.parametrize(
        'value, text',
        [(None, '–'), (0.000123456, '0.000123'), (12.0, '12.0'), (99.94, '99.9'),
         (100, '100'), (12345.6, '12,346')],
    )  # fmt: skip
    def test_figures(self, zoo, value, text):
        assert zoo.figure(value) == text

    def test_only_what_is_between_the_marks_is_written(self, zoo):
        page = f'before\n\n{zoo.BEGIN}\nold\n{zoo.END}\n\nafter\n'
        found = zoo.update_page(page, 'new')
        assert found == f'before\n\n{zoo.BEGIN}\n\nnew\n\n{zoo.END}\n\nafter\n'
        assert zoo.update_page(found, 'new') == found
        with pytest.raises(SystemExit, match='lacks the marks'):
            zoo.update_page('before', 'new')

    def test_what_was_not_trained_says_so(self, zoo):
        model = dict(Metadata={})
        assert zoo.results_of(model) == 'not trained'
        model['Metadata']['Published'] = '75 % (somebody)'
        assert zoo.results_of(model) == 'not trained; published: 75 % (somebody)'
        model['Results'] = [dict(Metrics={'Top 1 Accuracy': 99.0, 'mIoU': 87.123})]
        assert zoo.results_of(model).startswith('top-1 99.00; mIoU 87.12; published')

    def test_where_a_result_comes_from(self, zoo):
        model = dict(
            Name='a',
            Config='configs/a.py',
            Weights='mdeq_mm://configs/a-12345678.pth',
            Metadata={'Training Resources': '1 CPU core', 'Source': 'README.md'},
            Results=[dict(Metrics=dict(mIoU=1))],
        )
        assert zoo.details(model) == (
            '| a | mIoU 1.00 | `python tools/train.py configs/a.py` | 1 CPU core | – '
            '| [README.md](../README.md) | `a-12345678.pth` |'
        )
        model['Training log'] = 'configs/a.log'
        both = '| [log](../configs/a.log), [README.md](../README.md) |'
        assert both in zoo.details(model)


class TestTool:
    def test_metafiles_and_page_are_true(self, zoo, capsys):
        zoo.main([*FAST, '--check'])
        said = capsys.readouterr().out
        assert said == '2 models cost what metafiles and model_zoo.md say.\n'

    def test_what_is_not_true_is_named(self, zoo, monkeypatch):
        families = zoo.read_metafiles()
        (model,) = (m for m in families['demo'] if m['Name'] == 'resnet-digits')
        model['Metadata']['Parameters'] -= 1
        model['Metadata']['Input'] = '1x64x64'
        monkeypatch.setattr(zoo, 'read_metafiles', lambda: families)
        with pytest.raises(SystemExit) as error:
            zoo.main(['resnet-digits', '--check'])
        text = str(error.value)
        assert 'Parameters is 99747 in the metafile and 99748 in truth' in text
        assert 'FLOPs is' in text
        assert 'another line in model_zoo.md: run dev/model_zoo.py' in text

    def test_prints_lines_of_the_table(self, zoo, capsys):
        zoo.main(['resnet-dig*'])
        line = capsys.readouterr().out.strip()
        assert line in zoo.PAGE.read_text().splitlines()
        assert line.count('|') == zoo.HEADER.splitlines()[0].count('|')

    def test_writes_what_it_counted(self, zoo, monkeypatch, tmp_path):
        (tmp_path / 'model-index.yml').write_text(
            'Import: [configs/cifar10/metafile.yml, configs/demo/metafile.yml]'
        )
        shutil.copytree(zoo.ROOT / 'configs', tmp_path / 'configs')
        cifar10 = tmp_path / 'configs' / 'cifar10'
        shutil.copy(
            cifar10 / 'mdeq-tiny_2xb64-50e_cifar10.py',
            cifar10 / 'mdeq-tiny-new_4xb64-50e_cifar10.py',
        )
        monkeypatch.setattr(zoo, 'ROOT', tmp_path)
        monkeypatch.setattr(
            zoo, 'measure', lambda cfg, size: zoo.Cost(123456, 10**9, size[1])
        )
        page = tmp_path / 'docs' / 'page.md'
        page.parent.mkdir()
        page.write_text(f'{zoo.BEGIN}\n{zoo.END}\n')
        monkeypatch.setattr(zoo, 'PAGE', page)
        with pytest.raises(SystemExit, match=r'no metafile has .*mdeq-tiny-new'):
            zoo.main(['--check'])
        zoo.main(['--write'])
        (new,) = (m for m in zoo.read_metafiles()['cifar10'] if 'tiny-new' in m['Name'])
        assert new['In Collection'] == 'MDEQ'
        assert new['Config'] == 'configs/cifar10/mdeq-tiny-new_4xb64-50e_cifar10.py'
        assert new['Metadata'] == {
            'Task': 'Image Classification',
            'Training Data': 'CIFAR-10',
            'Epochs': 50,
            'Batch Size': 256,
            'Input': '3x32x32',
            'FLOPs': 10**9,
            'Parameters': 123456,
        }
        for models in zoo.read_metafiles().values():
            for model in models:
                assert model['Metadata']['Parameters'] == 123456
                assert model['Metadata']['FLOPs'] == 10**9
                assert (
                    f'| [{model["Name"]}](../{model["Config"]}) |' in page.read_text()
                )
        zoo.main(['--check'])

    @pytest.mark.parametrize(
        'arguments', [['nothing-*'], ['mdeq-digits', '--write'], ['--write', '--check']]
    )
    def test_refuses(self, zoo, arguments):
        with pytest.raises(SystemExit):
            zoo.main(arguments)

    @pytest.mark.slow
    @pytest.mark.timeout(1200)
    def test_all_metafiles_and_the_whole_page_are_true(self, zoo):
        zoo.main(['--check'])


@pytest.fixture(scope='module')
def publishing():
    return load_tool('tools/misc/publish_model.py')


@pytest.fixture
def root(repo_root, tmp_path):
    """A copy of what publishing changes."""
    root = tmp_path / 'root'
    shutil.copytree(
        repo_root / 'configs' / 'demo',
        root / 'configs' / 'demo',
        ignore=shutil.ignore_patterns('checkpoints'),
    )
    return root


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """The checkpoint of a training, with more in it than is published."""
    model = mdeq_mm.get_model('mdeq-digits', device='cpu')
    model.init_weights()
    path = tmp_path_factory.mktemp('trained') / 'epoch_30.pth'
    classes = tuple('0123456789')
    torch.save(
        dict(
            state_dict=model.state_dict(),
            optimizer=dict(state=torch.zeros(300_000)),
            meta=dict(epoch=30, cfg='x', dataset_meta=dict(classes=classes)),
        ),
        path,
    )
    return path


class TestPublish:
    def test_weights_and_classes_alone(self, publishing, root, trained):
        path = publishing.publish('mdeq-digits', trained, root=root)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        assert path.parent == root / 'configs' / 'demo' / 'checkpoints'
        assert path.name == f'mdeq_1xb64-30e_digits-{digest}.pth'
        found = torch.load(path, weights_only=True)
        assert found['meta'] == dict(
            dataset_meta=dict(classes=list('0123456789')),
            model='mdeq-digits',
            mdeq_mm_version=mdeq_mm.__version__,
        )
        assert found.keys() == {'state_dict', 'meta'}
        expected = torch.load(trained, weights_only=True)['state_dict']
        assert found['state_dict'].keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(found['state_dict'][key], value)

    def test_the_metafile_names_them(self, publishing, root, trained):
        metafile = root / 'configs' / 'demo' / 'metafile.yml'
        before = metafile.read_text().splitlines()
        path = publishing.publish('mdeq-digits', trained, root=root)
        line = f'    Weights: mdeq_mm://configs/demo/checkpoints/{path.name}'
        after = metafile.read_text().splitlines()
        assert after.count(line) == 1
        kept = [x for x in before if 'Weights: ' not in x]
        assert [x for x in after if 'Weights: ' not in x] == kept
        config = after.index('    Config: configs/demo/mdeq_1xb64-30e_digits.py')
        assert after.index(line) - config in (1, -1)

    def test_the_same_weights_give_the_same_file(self, publishing, root, trained):
        first = publishing.publish('mdeq-digits', trained, root=root)
        written = first.read_bytes()
        assert publishing.publish('mdeq-digits', trained, root=root) == first
        assert first.read_bytes() == written

    def test_half_precision(self, publishing, root, trained):
        whole = publishing.publish('mdeq-digits', trained, root=root)
        half = publishing.publish('mdeq-digits', trained, half=True, root=root)
        assert half.stat().st_size < 0.62 * whole.stat().st_size
        exact = torch.load(trained, weights_only=True)['state_dict']
        model = mdeq_mm.get_model('mdeq-digits', half, 'cpu')
        for key, value in model.state_dict().items():
            assert value.dtype == exact[key].dtype
            if '.running_' in key or not value.is_floating_point():
                assert torch.equal(value, exact[key])
            else:
                assert torch.equal(value, exact[key].half().float())

    def test_what_half_precision_cannot_hold(self, publishing):
        with pytest.raises(ValueError, match='a holds non-finite numbers'):
            publishing.halved(dict(a=torch.tensor([1e6])))

    def test_larger_than_a_repository_should_hold(self, publishing, root, trained):
        with pytest.raises(
            ValueError, match=r'more than the 100,000 .*; --half halves'
        ):
            publishing.publish('mdeq-digits', trained, root=root, limit=100_000)
        assert not (root / 'configs' / 'demo' / 'checkpoints').exists()

    def test_of_another_model(self, publishing, root, trained):
        metafile = (root / 'configs' / 'demo' / 'metafile.yml').read_text()
        with pytest.raises(RuntimeError, match='the checkpoint lacks'):
            publishing.publish('resnet-digits', trained, root=root)
        assert not list(root.rglob('*.pth'))
        assert (root / 'configs' / 'demo' / 'metafile.yml').read_text() == metafile

    def test_plain_types(self, publishing):
        import numpy as np
        from mmengine.config import ConfigDict

        found = publishing.plain(
            ConfigDict(a=(1, np.float64(2.5)), b=np.arange(2), c=None, d={3: Path('x')})
        )
        assert found == dict(a=[1, 2.5], b=[0, 1], c=None, d={'3': 'x'})
        assert type(found) is type(found['d']) is dict
        assert [type(v) for v in found['a']] == [int, float]

    def test_says_what_it_did(self, publishing, root, trained, monkeypatch, capsys):
        monkeypatch.setattr(publishing, 'zoo_root', lambda: root)
        publishing.main(['mdeq-digits', str(trained), '--replace'])
        whole, note = capsys.readouterr().out.splitlines()
        assert whole.endswith(' bytes) is published.')
        assert note.startswith('Results in its metafile are not looked at')
        publishing.main(['mdeq-digits', str(trained), '--half', '--replace'])
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 3
        assert lines[2] == f'{whole.split(" (")[0]} was published before and can be ' \
            'removed.'  # fmt: skip

    def test_elsewhere(self, publishing, trained, tmp_path, capsys, repo_root):
        """A model of one's own, by its config file; nothing else is written."""
        base = repo_root / 'configs' / 'demo' / 'mdeq_1xb64-30e_digits.py'
        metafile = base.with_name('metafile.yml').read_text()
        config = tmp_path / 'my_config.py'
        config.write_text(f'_base_ = {str(base)!r}\n')
        target = tmp_path / 'mine.pth'
        publishing.main([str(config), str(trained), '--out', str(target)])
        (path,) = tmp_path.glob('mine-*.pth')
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        assert path.name == f'mine-{digest}.pth'
        assert str(path) in capsys.readouterr().out
        found = torch.load(path, weights_only=True)
        expected = torch.load(trained, weights_only=True)['state_dict']
        assert found['meta']['dataset_meta'] == dict(classes=list('0123456789'))
        for key, value in expected.items():
            assert torch.equal(found['state_dict'][key], value)
        assert base.with_name('metafile.yml').read_text() == metafile

    @pytest.mark.parametrize(
        'name, source, message',
        [
            ('mdeq-digit', None, 'did you mean'),
            ('mdeq-digits', 'none.pth', 'does not exist'),
        ],
    )
    def test_errors_are_sentences(self, publishing, trained, name, source, message):
        with pytest.raises(SystemExit, match=rf'error: .*{message}.*[^.]\.$'):
            publishing.main([name, source or str(trained), '--replace'])
