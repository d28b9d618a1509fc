"""Models by name: from a checkout, under mmpretrain's functions, and from a wheel."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import load_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader

import mdeq_mm
from mdeq_mm import __main__ as command
from mdeq_mm.apis import hub, index, loading
from mdeq_mm.checkpoints import read_checkpoint
from tests.helpers import load_tool

SMALL = 'mdeq-small_4xb32-100e_in1k'
DIGITS = 'mdeq_1xb64-30e_digits'
ADDRESS = f'mdeq_mm://configs/demo/checkpoints/{DIGITS}-00000000.pth'

without_mmpretrain = pytest.mark.skipif(
    loading.find_spec('mmpretrain') is None, reason='mmpretrain is not installed'
)
without_mmseg = pytest.mark.skipif(
    loading.find_spec('mmseg') is None, reason='mmseg is not installed'
)


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """Nothing depends on the folder that one is in."""
    folder = tmp_path / 'elsewhere'
    folder.mkdir()
    monkeypatch.chdir(folder)


def number_of_parameters(model):
    return sum(p.numel() for p in model.parameters())


class TestNames:
    @pytest.mark.parametrize(
        'name',
        [
            'mdeq-digits',
            'MDEQ-Digits',
            DIGITS,
            f'demo/{DIGITS}.py',
            f'configs/demo/{DIGITS}.py',
            Path('demo', f'{DIGITS}.py'),
        ],
        ids=str,
    )
    def test_all_ways_lead_to_one_config(self, repo_root, name):
        expected = repo_root / 'configs' / 'demo' / f'{DIGITS}.py'
        assert mdeq_mm.config_path(name) == str(expected)
        assert mdeq_mm.get_config(name).filename == str(expected)

    @pytest.mark.parametrize('name', ['mine.py', './mine.py'])
    def test_of_a_file_of_ones_own(self, name):
        Path('mine.py').write_text("_base_ = []\nmodel = dict(type='MDEQ')\n")
        assert mdeq_mm.config_path(name) == str(Path('mine.py').resolve())

    def test_of_parts_to_build_on(self, repo_root):
        found = mdeq_mm.config_path('_base_/models/mdeq_small.py')
        assert found == str(repo_root / 'configs/_base_/models/mdeq_small.py')
        with pytest.raises(ValueError, match='has no model: name a whole config'):
            mdeq_mm.get_model('_base_/default_runtime.py')

    @pytest.mark.parametrize(
        'wrong, right',
        [
            ('mdeq-digit', "'mdeq-digit-scenes' or 'mdeq-digits'"),
            ('mdeq-smal_4xb32-100e_in1k', repr(SMALL)),
            ('imagenet/mdeq-small_8xb32-100e_in1k.py', f'configs/imagenet/{SMALL}.py'),
        ],
    )
    def test_close_ones_are_named(self, wrong, right):
        with pytest.raises(ValueError) as error:
            mdeq_mm.get_model(wrong)
        assert str(error.value).startswith(f'{wrong!r} is no model of mdeq_mm: did you')
        assert right in str(error.value)

    @pytest.mark.parametrize('wrong', ['', 'xyzzy'])
    def test_without_close_ones(self, wrong):
        with pytest.raises(ValueError, match=r'mdeq_mm: mdeq_mm\.list_models\(\) ret'):
            mdeq_mm.get_config(wrong)

    def test_of_another_type(self):
        with pytest.raises(TypeError, match='name=3 is of type int: give the name'):
            mdeq_mm.get_model(3)

    def test_outside_of_a_checkout_and_a_wheel(self, monkeypatch, tmp_path):
        monkeypatch.setattr(index, '__file__', str(tmp_path / 'a' / 'zoo' / 'index.py'))
        with pytest.raises(FileNotFoundError, match=r'model-index\.yml is neither in'):
            index.zoo_root()


class TestList:
    def test_every_model_once(self, repo_root):
        paths = {p for p in repo_root.glob('configs/*/*.py') if '_base_' not in str(p)}
        names = mdeq_mm.list_models()
        assert len(names) == len(paths)
        assert {Path(mdeq_mm.config_path(n)) for n in names} == paths
        assert names == sorted(names)

    def test_pattern(self):
        expected = ['mdeq-xl_8xb32-100e_in1k', 'mdeq-xl_official_8xb32-100e_in1k']
        assert mdeq_mm.list_models('mdeq-xl') == expected
        assert mdeq_mm.list_models('MDEQ-?l_official*in1k') == expected[1:]
        # By the config's name too.
        assert mdeq_mm.list_models(DIGITS) == ['mdeq-digits']

    def test_task(self):
        assert mdeq_mm.list_models('*digit', task='semantic segmentation') == [
            'hrnet-digit-scenes',
            'mdeq-digit-scenes',
            'mdeq-joint_1xb16-12e_digits',
        ]
        with pytest.raises(ValueError, match="unknown: use 'Image Classification' or"):
            mdeq_mm.list_models(task='detection')

    def test_pretrained(self):
        found = mdeq_mm.list_models(pretrained=True)
        assert found == sorted(n for n, e in index.entries().items() if e.weights)


class TestGetConfig:
    def test_options_are_merged(self):
        cfg = mdeq_mm.get_config(
            'mdeq-digits',
            train_cfg=dict(max_epochs=5),
            **{'model.backbone.with_cp': False},
        )
        assert cfg.train_cfg == dict(by_epoch=True, max_epochs=5, val_interval=3)
        assert cfg.model.backbone.with_cp is False
        assert cfg.model.backbone.arch.channels == (24, 24, 24)
        assert mdeq_mm.get_config('mdeq-digits').model.backbone.with_cp is True

    def test_one_file_with_all_of_it(self):
        mdeq_mm.get_config('mdeq-digits').dump('whole.py')
        assert '_base_' not in Path('whole.py').read_text()
        whole = Config.fromfile('whole.py').to_dict()
        assert whole == mdeq_mm.get_config('mdeq-digits').to_dict()

    def test_as_the_base_of_ones_own(self):
        Path('mine.py').write_text(
            "_base_ = [__import__('mdeq_mm').config_path('mdeq-digits')]\n"
            'model = dict(backbone=dict(with_cp=False))\n'
            'test_evaluator = [{{_base_.val_evaluator}}]\n'
        )
        found = Config.fromfile('mine.py').to_dict()
        expected = mdeq_mm.get_config('mdeq-digits').to_dict()
        expected['model']['backbone']['with_cp'] = False
        expected['test_evaluator'] = [expected['val_evaluator']]
        assert found == expected


@pytest.fixture
def published(monkeypatch, tmp_path, repo_root):
    """A zoo with weights of mdeq-digits in half precision, and what they are."""
    root = tmp_path / 'zoo'
    shutil.copytree(repo_root / 'configs', root / 'configs')
    shutil.copy(repo_root / index.INDEX, root)
    metafile = root / 'configs' / 'demo' / 'metafile.yml'
    set_field = load_tool('tools/misc/metafiles.py').set_field
    text = set_field(metafile.read_text(), 'mdeq-digits', 'Weights', ADDRESS)
    metafile.write_text(text)
    monkeypatch.setattr(index, 'zoo_root', lambda: root)
    monkeypatch.setattr(hub, 'zoo_root', lambda: root)
    for function in (index.metafiles, index.entries):
        function.cache_clear()

    pytest.importorskip('mmpretrain')
    model = mdeq_mm.get_model('mdeq-digits', device='cpu')
    model.init_weights()
    state = {
        k: v.half() if v.is_floating_point() else v
        for k, v in model.state_dict().items()
    }
    path = root / ADDRESS.removeprefix(index.SCHEME)
    path.parent.mkdir(exist_ok=True)
    meta = dict(dataset_meta=dict(classes=[f'digit {i}' for i in range(10)]))
    torch.save(dict(state_dict=state, meta=meta), path)
    yield state
    for function in (index.metafiles, index.entries):
        function.cache_clear()


def assert_widened(model, state, prefix=''):
    found = {prefix + k: v for k, v in model.state_dict().items()}
    assert found
    for key, value in found.items():
        wide = torch.float32 if value.is_floating_point() else torch.int64
        assert value.dtype is wide, key
        assert torch.equal(value, state[key].to(wide)), key


@without_mmpretrain
class TestGetModel:
    def test_random_weights(self):
        model = mdeq_mm.get_model(SMALL, device='cpu')
        assert number_of_parameters(model) == 16_828_264
        assert not model.training
        assert len(model.dataset_meta['classes']) == 1000
        assert model.cfg.filename == mdeq_mm.config_path(SMALL)

    def test_arguments_are_merged_into_the_model(self):
        model = mdeq_mm.get_model(
            'mdeq-digits',
            device='cpu',
            backbone=dict(with_cp=False),
            head=dict(num_classes=7),
        )
        assert not model.backbone.equilibrium.recompute
        assert model.head.fc.weight.shape == (7, 72)
        # 73 weights a class less.
        assert number_of_parameters(model) == 95_986 - 3 * 73

    def test_published_weights(self, published):
        model = mdeq_mm.get_model('mdeq-digits', pretrained=True, device='cpu')
        assert_widened(model, published)
        assert model.dataset_meta['classes'][3] == 'digit 3'
        assert mdeq_mm.list_models(pretrained=True).count('mdeq-digits') == 1

    def test_weights_from_elsewhere(self, published):
        for source in (ADDRESS, index.weights_path(ADDRESS)):
            model = mdeq_mm.get_model('mdeq-digits', source, 'cpu')
            assert_widened(model, published)

    def test_of_another_architecture(self, published):
        with pytest.raises(RuntimeError, match=r'00000000\.pth: head.fc.weight has sh'):
            mdeq_mm.get_model('mdeq-digits', True, 'cpu', head=dict(num_classes=7))

    def test_unpublished_weights(self, published):
        with pytest.raises(ValueError) as error:
            mdeq_mm.get_model(SMALL, pretrained=True)
        text = str(error.value)
        assert text.startswith(f'no weights of {SMALL!r} are published, there are ')
        assert 'mdeq-digits' in text
        assert f'"python tools/train.py configs/imagenet/{SMALL}.py"' in text

    @pytest.mark.parametrize('pretrained', [1, b'x', ['a.pth']])
    def test_pretrained_of_another_type(self, pretrained):
        with pytest.raises(TypeError, match='must be True, False, or a path or URL'):
            mdeq_mm.get_model('mdeq-digits', pretrained=pretrained)

    def test_files_that_are_not_there(self):
        with pytest.raises(FileNotFoundError, match=r'none\.pth does not exist'):
            mdeq_mm.get_model('mdeq-digits', pretrained='none.pth')

    @pytest.mark.parametrize(
        'scope, name, package',
        [
            ('mmpretrain', 'mdeq-digits', 'onedl-mmpretrain'),
            ('mmseg', 'hrnet-digit-scenes', 'onedl-mmsegmentation'),
        ],
    )
    def test_without_the_toolbox(self, monkeypatch, scope, name, package):
        find_spec = loading.find_spec
        monkeypatch.setattr(
            loading, 'find_spec', lambda n: None if n == scope else find_spec(n)
        )
        with pytest.raises(ImportError) as error:
            mdeq_mm.get_model(name)
        assert f"'{name}' is a model of {scope}, which is not" in str(error.value)
        assert f'"pip install {package}"' in str(error.value)


@without_mmseg
class TestSegmentors:
    def test_classes_of_the_config(self):
        model = mdeq_mm.get_model('mdeq-digit-scenes', device='cpu')
        assert number_of_parameters(model) == 173_907
        assert model.dataset_meta['classes'] == ('ground', *'0123456789')
        assert type(model.dataset_meta) is dict
        assert model.dataset_meta['palette'][1] == [31, 119, 180]

    def test_classes_of_the_data_set(self):
        meta = loading.dataset_meta(
            mdeq_mm.get_config('fcn_hr18s_4xb3-124k_cityscapes-512x1024')
        )
        assert meta['classes'][:2] == ('road', 'sidewalk')
        assert len(meta['palette']) == 19

    @without_mmpretrain
    def test_classes_of_two_tasks(self):
        meta = loading.dataset_meta(
            mdeq_mm.get_config('mdeq-small_fcn_4xb3-124k_in1k-cityscapes-512x1024')
        )
        assert meta['classes'][0] == 'road'
        assert len(meta['tasks']['cls']['classes']) == 1000
        assert meta['tasks']['seg']['classes'] == meta['classes']

    def test_mmseg_takes_the_model(self):
        from mmseg.apis import inference_model

        model = mdeq_mm.get_model('mdeq-digit-scenes', device='cpu')
        image = torch.arange(64 * 64, dtype=torch.uint8).view(64, 64, 1).numpy()
        model.cfg.test_pipeline[0] = dict(type='LoadImageFromNDArray')
        labels = inference_model(model, image).pred_sem_seg.data
        assert labels.shape == (1, 64, 64)
        assert labels.max() <= 10


class TestAddresses:
    def test_everyone_who_loads_takes_them(self, published):
        path = index.weights_path(ADDRESS)
        expected = torch.load(path, weights_only=True)
        for read in (
            lambda: CheckpointLoader.load_checkpoint(ADDRESS, 'cpu'),
            lambda: read_checkpoint(ADDRESS),
        ):
            found = read()
            assert found['meta'] == expected['meta']
            assert found['state_dict'].keys() == published.keys()
        # As load_from and the toolboxes' inferencers do.
        model = mdeq_mm.get_model('mdeq-digits', device='cpu')
        load_checkpoint(model, ADDRESS, map_location='cpu', strict=True)
        assert_widened(model, published)

    def test_as_init_cfg(self, published):
        init_cfg = dict(type='Pretrained', checkpoint=ADDRESS, prefix='backbone.')
        model = mdeq_mm.get_model(
            'mdeq-digits', device='cpu', backbone=dict(init_cfg=init_cfg)
        )
        model.init_weights()
        assert_widened(model.backbone, published, 'backbone.')

    def test_as_init_cfg_of_other_backbones(self, published):
        """mmengine's own way, which MDEQ does not go."""
        init_cfg = dict(type='Pretrained', checkpoint=ADDRESS, prefix='head.')
        model = mdeq_mm.get_model(
            'mdeq-digits', device='cpu', head=dict(init_cfg=init_cfg)
        )
        model.init_weights()
        assert_widened(model.head, published, 'head.')

    def test_of_a_file_that_is_not_there(self, published):
        with pytest.raises(FileNotFoundError, match=r'checkpoints/x\.pth does not'):
            read_checkpoint('mdeq_mm://configs/demo/checkpoints/x.pth')

    @pytest.mark.parametrize(
        'address', ['mdeq_mm://../../secret.pth', 'mdeq_mm:///etc/x.pth', 'a.pth']
    )
    def test_that_lead_elsewhere(self, address):
        with pytest.raises(ValueError, match='is no address of weights of mdeq_mm'):
            index.weights_path(address)


@pytest.fixture
def model_hub(monkeypatch):
    """mmpretrain's list of models, taken back afterwards."""
    pytest.importorskip('mmpretrain')
    from mmpretrain.apis import ModelHub

    # Without ours, which other tests may have registered.
    ours = mdeq_mm.list_models()
    theirs = {k: v for k, v in ModelHub._models_dict.items() if k not in ours}
    monkeypatch.setattr(ModelHub, '_models_dict', theirs)
    return ModelHub


class TestRegisterModels:
    def test_mmpretrain_knows_the_names_afterwards(self, model_hub):
        import mmpretrain

        assert not model_hub.has('mdeq-digits')
        mdeq_mm.register_models()
        mdeq_mm.register_models()
        ours = mdeq_mm.list_models(task='image classification')
        assert set(ours) <= set(mmpretrain.list_models())
        assert set(mmpretrain.list_models('mdeq')) <= set(ours)
        model = mmpretrain.get_model('mdeq-digits')
        assert number_of_parameters(model) == 95_986
        assert model_hub.get('mdeq-digits').config.filename == mdeq_mm.config_path(
            'mdeq-digits'
        )

    def test_mmpretrain_builds_joint_models(self, model_hub):
        import mmpretrain

        pytest.importorskip('mmseg')
        mdeq_mm.register_models()
        model = mmpretrain.get_model('mdeq-joint_1xb16-12e_digits')
        assert number_of_parameters(model) == 175_069

    def test_inferencers_load_published_weights(self, model_hub, published):
        from mmpretrain import ImageClassificationInferencer

        mdeq_mm.register_models()
        by_name = ImageClassificationInferencer('mdeq-digits', pretrained=True)
        assert_widened(by_name.model, published)
        ours = mdeq_mm.get_model('mdeq-digits', pretrained=True, device='cpu')
        by_model = ImageClassificationInferencer(ours)
        for inferencer in (by_name, by_model):
            inferencer.pipeline.transforms.insert(0, first_channel)
        image = torch.arange(32 * 32 * 3).view(32, 32, 3).to(torch.uint8).numpy()
        (found,), (same,) = by_name(image), by_model(image)
        assert found['pred_class'] == f'digit {found["pred_label"]}'
        assert found['pred_class'] == same['pred_class']
        assert found['pred_scores'] == pytest.approx(same['pred_scores'])

    def test_names_that_are_taken(self, model_hub):
        model_hub._models_dict['mdeq-digits'] = object()
        with pytest.raises(ValueError, match='knows other models called mdeq-digits: '):
            mdeq_mm.register_models()
        assert not model_hub.has(SMALL)

    def test_without_mmpretrain(self, monkeypatch):
        monkeypatch.setattr(hub, 'find_spec', lambda name: None)
        with pytest.raises(ImportError, match='pip install onedl-mmpretrain'):
            mdeq_mm.register_models()


def first_channel(results):
    """Of an image that was loaded in colour, as inferencers do."""
    results['img'] = results['img'][..., :1]
    return results


class TestCommand:
    def test_path(self, capsys):
        command.main(['path', 'mdeq-digits'])
        assert capsys.readouterr().out == f'{mdeq_mm.config_path("mdeq-digits")}\n'

    def test_list(self, capsys):
        command.main(['list', 'mdeq-xl*_in1k', '--task', 'image classification'])
        assert capsys.readouterr().out.split() == mdeq_mm.list_models('mdeq-xl*_in1k')

    def test_error(self):
        with pytest.raises(SystemExit, match="error: 'mdeq' is no model of mdeq_mm"):
            command.main(['path', 'mdeq'])


INSTALLED = f"""
import json, sys
import mdeq_mm
light = 'modelindex' not in sys.modules
model = mdeq_mm.get_model('{SMALL}', device='cpu')
digits = mdeq_mm.get_model('mdeq-digits', pretrained=True, device='cpu')
cfg = mdeq_mm.get_config('configs/demo/{DIGITS}.py')
print(json.dumps(dict(
    package=mdeq_mm.__file__, light=light, names=mdeq_mm.list_models(),
    parameters=sum(p.numel() for p in model.parameters()),
    config=cfg.filename,
    classes=list(digits.dataset_meta['classes']))))
"""


@without_mmpretrain
@pytest.mark.slow
def test_a_wheel_brings_all_of_it(repo_root, tmp_path):
    copy, target = tmp_path / 'checkout', tmp_path / 'installed'
    ignore = shutil.ignore_patterns('__pycache__', '.*_cache', '.mim')
    for name in ('mdeq_mm', 'configs', 'tools', 'requirements'):
        shutil.copytree(repo_root / name, copy / name, ignore=ignore)
    for name in ('setup.py', 'pyproject.toml', 'MANIFEST.in', 'LICENSE', 'README.md',
                 'model-index.yml'):  # fmt: skip
        shutil.copy(repo_root / name, copy)
    # Weights of mdeq-digits, in the copy alone.
    model = mdeq_mm.get_model('mdeq-digits', device='cpu')
    model.init_weights()
    meta = dict(dataset_meta=dict(classes=list('0123456789')))
    source = tmp_path / 'epoch_30.pth'
    torch.save(dict(state_dict=model.state_dict(), meta=meta), source)
    publish = load_tool('tools/misc/publish_model.py').publish
    weights = publish('mdeq-digits', source, root=copy)
    stale = copy / 'build' / 'lib' / 'mdeq_mm' / '.mim' / 'configs' / 'old.pth'
    stale.parent.mkdir(parents=True)
    stale.touch()

    def run(*command, **options):
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, **options
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    pip = (sys.executable, '-m', 'pip', '--disable-pip-version-check')
    run(*pip, 'wheel', str(copy), '--no-deps', '--no-build-isolation', '-w', tmp_path)
    (wheel,) = tmp_path.glob('*.whl')
    run(*pip, 'install', '--no-deps', '--no-index', '--target', target, wheel)
    shipped = target / 'mdeq_mm' / '.mim'
    assert (shipped / weights.relative_to(copy)).read_bytes() == weights.read_bytes()
    assert (shipped / 'tools' / 'train.py').is_file()
    assert not (shipped / 'configs' / 'old.pth').exists()

    env = os.environ | dict(PYTHONPATH=str(target), PYTHONWARNINGS='ignore')
    printed = run(sys.executable, '-c', INSTALLED, cwd=tmp_path, env=env)
    found = json.loads(printed.splitlines()[-1])
    assert found['package'] == str(target / 'mdeq_mm' / '__init__.py')
    assert found['light']
    assert found['names'] == mdeq_mm.list_models()
    assert found['parameters'] == 16_828_264
    assert found['classes'] == list('0123456789')
    assert found['config'] == str(shipped / 'configs' / 'demo' / f'{DIGITS}.py')
    path = run(
        sys.executable, '-m', 'mdeq_mm', 'path', 'mdeq-digits',
        cwd=tmp_path, env=env,
    )  # fmt: skip
    assert path.splitlines()[-1] == found['config']
