"""The weights that come with the package reach what their metafile says."""

import os

import pytest
from mmengine.runner import Runner

import mdeq_mm
from mdeq_mm.apis.index import find_entry, metafiles, weights_path
from tests.helpers import load_tool

NAMES = mdeq_mm.list_models(pretrained=True)
METRICS = {'Top 1 Accuracy': 'accuracy/top1', 'mIoU': 'mIoU', 'aAcc': 'aAcc'}


@pytest.fixture(scope='module')
def roots(tmp_path_factory):
    """Folders of the digits and of the scenes, as the demo writes them."""
    root = tmp_path_factory.mktemp('data')
    digits, scenes = root / 'digits', root / 'digit_scenes'
    load_tool('tools/dataset_converters/digits.py').write_digits(digits)
    tool = load_tool('tools/dataset_converters/digit_scenes.py')
    tool.write_scenes(scenes, tool.COUNTS)
    return dict(digits=digits, scenes=scenes)


def stated(name):
    """Metrics of a model in its metafile, by their names in mmengine's logs."""
    models = {m['Name']: m for metafile in metafiles() for m in metafile['Models']}
    return {
        METRICS[key]: value
        for result in models[name]['Results']
        for key, value in result['Metrics'].items()
    }


def test_there_are_some():
    assert {'mdeq-digits', 'mdeq-digit-scenes'} <= set(NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_accuracy(name, roots, tmp_path):
    path = weights_path(find_entry(name).weights)
    assert os.path.getsize(path) <= 1_000_000
    cfg = mdeq_mm.get_config(name)
    cfg.work_dir = str(tmp_path)
    cfg.load_from = find_entry(name).weights
    cfg.test_dataloader.dataset.data_root = str(
        roots['scenes' if 'scenes' in name else 'digits']
    )
    cfg.test_dataloader.num_workers = 0
    cfg.test_dataloader.persistent_workers = False
    # Two runs within a second would share a log.
    cfg.experiment_name = name
    found = Runner.from_cfg(cfg).test()
    expected = stated(name)
    assert expected
    for key, value in expected.items():
        # One image of 599 is .17 %, and rounding may turn one around.
        assert found[key] == pytest.approx(value, abs=0.2)


def test_predicts_at_once(repo_root):
    """An image in a file, through mmpretrain's inferencer, with a class for a name."""
    pytest.importorskip('mmpretrain', reason='mmpretrain is not installed')
    from mmpretrain import ImageClassificationInferencer

    model = mdeq_mm.get_model('mdeq-digits', pretrained=True, device='cpu')
    inferencer = ImageClassificationInferencer(model)
    (result,) = inferencer(str(repo_root / 'docs' / 'images' / 'digit.png'))
    assert result['pred_class'] == '1' and result['pred_score'] > 0.5
