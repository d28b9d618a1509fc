"""The metafiles: what they say is true, and everyone who reads them can."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.fileio import load

from mdeq_mm.apis.index import SCHEME

ROOT = Path(__file__).resolve().parents[1]
INDEX = ROOT / 'model-index.yml'
METAFILES = {path: load(ROOT / path) for path in load(INDEX)['Import']}
MODELS = [model for metafile in METAFILES.values() for model in metafile['Models']]
CONFIGS = sorted(p for p in ROOT.glob('configs/*/*.py') if p.parent.name != '_base_')

#: What the logs call the metrics.
LOGGED = {'Top 1 Accuracy': 'accuracy/top1', 'mIoU': 'mIoU', 'aAcc': 'aAcc'}

TASKS = ('Image Classification', 'Semantic Segmentation')
METRICS = {'Top 1 Accuracy', 'Top 5 Accuracy', 'mIoU', 'aAcc'}

each = pytest.mark.parametrize('model', MODELS, ids=lambda m: m['Name'])


def listed(value):
    return value if isinstance(value, list) else [value]


def test_every_config_is_there_once():
    found = Counter(model['Config'] for model in MODELS)
    assert set(found.values()) == {1}
    assert set(found) == {p.relative_to(ROOT).as_posix() for p in CONFIGS}
    for path, metafile in METAFILES.items():
        folders = {str(Path(m['Config']).parent) for m in metafile['Models']}
        assert folders == {str(Path(path).parent)}


def test_names_are_unique_and_those_of_the_configs():
    names = [model['Name'] for model in MODELS]
    stems = [Path(model['Config']).stem for model in MODELS]
    # mmpretrain and mim look names up in lower case.
    assert [n.lower() for n in names] == names
    short = {s: n for s, n in zip(stems, names, strict=True) if n != s}
    assert short == {
        'mdeq_1xb64-30e_digits': 'mdeq-digits',
        'resnet_1xb64-30e_digits': 'resnet-digits',
        'hrnet_1xb64-30e_digits': 'hrnet-digits',
        'mdeq_1xb16-12e_digit-scenes-64x64': 'mdeq-digit-scenes',
        'hrnet_1xb16-12e_digit-scenes-64x64': 'hrnet-digit-scenes',
    }
    assert len({*names, *stems}) == len(names) + len(short)


def test_collections_of_one_name_are_alike():
    seen = {}
    for metafile in METAFILES.values():
        for collection in metafile['Collections']:
            assert seen.setdefault(collection['Name'], collection) == collection
            assert (ROOT / collection['README']).is_file()
        known = {c['Name'] for c in metafile['Collections']}
        assert {m['In Collection'] for m in metafile['Models']} == known


@each
def test_the_schedule_is_that_of_the_config(model):
    cfg = Config.fromfile(ROOT / model['Config'])
    meta, loop = model['Metadata'], cfg.train_cfg
    if 'max_epochs' in loop:
        assert meta['Epochs'] == loop.max_epochs
    else:
        assert meta['Iterations'] == loop.max_iters
    gpus, images = map(int, re.search(r'_(\d+)xb(\d+)', model['Config']).groups())
    assert cfg.train_dataloader.batch_size == images
    # Items of joint training hold several images.
    dataset = cfg.train_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    of_an_item = sum(dataset.get('counts', dict(cls=1)).values())
    assert meta['Batch Size'] == gpus * images * of_an_item
    assert cfg.model.backbone.type.startswith(model['In Collection'])
    tasks = listed(meta['Task'])
    assert set(tasks) <= set(TASKS)
    heads = [
        task
        for task, head in zip(TASKS, ('head', 'decode_head'), strict=True)
        if head in cfg.model
    ]
    assert tasks == heads


def crops(node):
    """Sizes of the crops in a pipeline, wherever they stand in a config."""
    if isinstance(node, list | tuple):
        return [size for part in node for size in crops(part)]
    if not isinstance(node, dict):
        return []
    if node.get('type') in ('RandomCrop', 'RandomResizedCrop'):
        return [node.get('crop_size', node.get('scale'))]
    return crops(list(node.values()))


@each
def test_input_is_the_size_of_a_crop(model):
    cfg = Config.fromfile(ROOT / model['Config'])
    channels, *sides = map(int, model['Metadata']['Input'].split('x'))
    assert channels == cfg.model.backbone.get('in_channels', 3)
    if model['Metadata']['Training Data'].endswith('igit scenes'):
        # They are not cropped.
        assert sides == [64, 64]
    elif found := crops(cfg.train_dataloader.dataset.to_dict()):
        # Of joint training the larger one.
        sizes = [(s, s) if isinstance(s, int) else tuple(s) for s in found]
        assert tuple(sides) == max(sizes)
    else:
        assert model['Metadata']['Training Data'] == 'CIFAR-10'
        assert sides == [32, 32]


@each
def test_results_say_where_they_come_from(model):
    meta = model['Metadata']
    for result in model.get('Results', []):
        assert result['Task'] in listed(meta['Task'])
        assert result['Dataset'].lower() in meta['Training Data'].lower()
        assert result['Metrics'].keys() <= METRICS
        assert all(0 < v <= 100 for v in result['Metrics'].values())
    if 'Results' in model:
        assert meta['Training Resources']
        # A log, or the page that has the measurement.
        assert (ROOT / model.get('Training log', meta.get('Source', '?'))).is_file()


@pytest.mark.parametrize(
    'model', [m for m in MODELS if 'Training log' in m], ids=lambda m: m['Name']
)
def test_results_are_the_last_of_the_log(model):
    lines = (ROOT / model['Training log']).read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    meta = model['Metadata']
    if 'Epochs' in meta:
        assert max(e['epoch'] for e in entries if 'loss' in e) == meta['Epochs']
    else:
        assert max(e['iter'] for e in entries if 'loss' in e) == meta['Iterations']
    for result in model['Results']:
        for metric, value in result['Metrics'].items():
            key = LOGGED[metric]
            # The test of what was best on the validation images, if there is one.
            test = [e[f'test/{key}'] for e in entries if f'test/{key}' in e]
            found = test or [e[key] for e in entries if key in e]
            assert f'{found[-1]:.2f}' == f'{value:.2f}', metric


@pytest.mark.parametrize(
    'model', [m for m in MODELS if 'Results' in m], ids=lambda m: m['Name']
)
def test_results_are_those_of_the_page(model):
    meta = model['Metadata']
    if 'Source' not in meta:
        pytest.skip('its results are those of its log')
    page = (ROOT / meta['Source']).read_text()
    for result in model['Results']:
        for value in result['Metrics'].values():
            # With as many zeros as the page writes.
            text = re.escape(f'{value:.2f}'.rstrip('0'))
            assert re.search(rf'(?<![\d.]){text}0*(?!\d)', page), value


@each
def test_weights_are_there_and_whole(model):
    if 'Weights' not in model:
        return
    assert model['Results'], 'weights of unknown quality'
    path = ROOT / model['Weights'].removeprefix(SCHEME)
    assert model['Weights'].startswith(SCHEME)
    content = path.read_bytes()
    assert len(content) < 1_000_000
    digest = hashlib.sha256(content).hexdigest()
    assert path.name == f'{Path(model["Config"]).stem}-{digest[:8]}.pth'
    meta = torch.load(path, weights_only=True)['meta']
    assert meta['dataset_meta']['classes']


class TestReaders:
    def test_model_index(self):
        """What mmpretrain and mim read it with."""
        modelindex = pytest.importorskip('modelindex.load_model_index')
        index = modelindex.load(str(INDEX))
        assert not index.check_errors
        assert [m.name for m in index.models] == [m['Name'] for m in MODELS]
        for found, model in zip(index.models, MODELS, strict=True):
            assert not found.check_errors
            assert found.in_collection in {c.name for c in index.collections}
            parameters = model['Metadata']['Parameters']
            assert found.metadata.data['Parameters'] == parameters
            results = found.results or []
            assert [r.metrics for r in results] == [
                r['Metrics'] for r in model.get('Results', [])
            ]

    def test_mmengine(self, monkeypatch, tmp_path):
        """Its hub reads packages of a fixed list; here ours is one of them."""
        from mmengine import hub
        from mmengine.config import utils

        (tmp_path / '.mim').symlink_to(ROOT)
        monkeypatch.setitem(utils.MODULE2PACKAGE, 'mdeq_mm', 'mdeq_mm')
        home = 'mmengine.hub.hub.'
        monkeypatch.setattr(home + 'install_package', lambda name: None)
        monkeypatch.setattr(home + 'get_installed_path', lambda name: str(tmp_path))
        cfg = hub.get_config('mdeq_mm::demo/mdeq_1xb64-30e_digits.py')
        assert cfg.model.backbone.arch.channels == (24, 24, 24)
        for model in MODELS:
            if 'Weights' in model:
                name = model['Config'].removeprefix('configs/')
                cfg = hub.get_config(f'mdeq_mm::{name}', pretrained=True)
                assert cfg.model_path == model['Weights']

    def test_no_name_is_one_of_mmpretrains(self):
        mmpretrain = pytest.importorskip('mmpretrain')
        folder = Path(mmpretrain.__file__).parent / '.mim'
        if not folder.is_dir():
            pytest.skip('mmpretrain is installed without its metafiles')
        theirs = set()
        for path in load(folder / 'model-index.yml')['Import']:
            theirs |= set(re.findall(r'Name: (\S+)', (folder / path).read_text()))
        assert len(theirs) > 300
        assert not theirs & {m['Name'] for m in MODELS}
