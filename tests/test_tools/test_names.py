"""Tools take the names of models in place of their config files."""

import pytest

from tests.helpers import load_tool

DIGITS = 'configs/demo/mdeq_1xb64-30e_digits.py'


@pytest.fixture(scope='module')
def common():
    return load_tool('tools/common.py')


def test_a_name_is_its_config(common, repo_root):
    named = common.read_config('mdeq-digits')
    assert named.filename == str(repo_root / DIGITS)
    assert named.model == common.read_config(str(repo_root / DIGITS)).model
    options = {'model.backbone.with_cp': False}
    assert common.read_config('mdeq-digits', options).model.backbone.with_cp is False


@pytest.mark.parametrize(
    ('name', 'meant'),
    [
        (DIGITS.replace('digits', 'digit'), DIGITS),
        ('mdeq-digit', 'mdeq-digits'),
        ('MDEQ-Small', 'mdeq-small_4xb32-100e_in1k'),
    ],
)
def test_what_may_have_been_meant(common, name, meant):
    with pytest.raises(SystemExit) as ended:
        common.read_config(name)
    said = str(ended.value)
    assert f'the config {name!r} does not exist. Did you mean ' in said
    assert meant in said


def test_nothing_alike(common):
    with pytest.raises(SystemExit, match=r"the config 'zzz' does not exist\.$"):
        common.read_config('zzz')


def test_a_key_of_no_effect(common):
    with pytest.raises(SystemExit, match=r"'train_cgf' is no key .*'train_cfg'\?$"):
        common.read_config('mdeq-digits', {'train_cgf.max_epochs': 1})
    # What looks like nothing that is known may be a config's own.
    assert common.read_config('mdeq-digits', {'my_own': 1}).my_own == 1


def test_a_dict_in_place_of_a_name(common, repo_root, tmp_path):
    """mmengine's own sentence, without a traceback."""
    path = tmp_path / 'config.py'
    base = repo_root / 'configs/imagenet/mdeq-small_4xb32-100e_in1k.py'
    path.write_text(
        f'_base_ = {str(base)!r}\n'
        'model = dict(backbone=dict(arch=dict(channels=(8, 16, 32))))\n'
    )
    with pytest.raises(SystemExit, match=r'cannot be read: .*_delete_=True'):
        common.read_config(str(path))


def test_weights_of_a_name(common, repo_root):
    weights = common.find_weights('mdeq-digits', None)
    assert weights.startswith('mdeq_mm://configs/demo/checkpoints/mdeq_1xb64-30e_')
    assert common.find_weights('mdeq-digits', 'mine.pth') == 'mine.pth'
    assert common.find_weights(str(repo_root / DIGITS), None) is None
    assert common.find_weights('mdeq-small_4xb32-100e_in1k', None) is None


def test_published_weights_are_not_replaced_by_chance(tmp_path, repo_root):
    tool = load_tool('tools/misc/publish_model.py')
    metafile = repo_root / 'configs' / 'demo' / 'metafile.yml'
    before = metafile.read_text()
    with pytest.raises(SystemExit) as ended:
        tool.main(['mdeq-digits', str(tmp_path / 'epoch_2.pth')])
    said = str(ended.value)
    assert "'mdeq-digits' has weights, mdeq_mm://" in said and '--replace' in said
    assert metafile.read_text() == before
