import math

import pytest

from mdeq_mm.models import MDEQ
from mdeq_mm.models.backbones.arch import PRESETS, build_arch


def test_presets():
    assert set(PRESETS) == {'cifar-tiny', 'cifar-large', 'small', 'large', 'xl'}
    small = build_arch('small')
    assert small.channels == (32, 64, 128, 256)
    assert small.num_blocks == (1, 1, 1, 1)
    assert (small.num_groups, small.expansion, small.dropout) == (8, 5, 0.0)
    assert small.post_gn_affine
    assert small.weight_norm
    tiny = build_arch('cifar-tiny')
    assert (tiny.channels, tiny.dropout, tiny.post_gn_affine) == ((24, 24), 0.0, False)
    large = build_arch('cifar-large')
    assert (large.dropout, large.downsample_times) == (0.0, 0)
    assert build_arch('large').channels == (80, 160, 320, 640)
    assert build_arch('xl').expansion == 6


@pytest.mark.parametrize(
    ('arch', 'least'),
    [('small', 32), ('xl', 32), ('cifar-tiny', 2), ('cifar-large', 8)],
)
def test_smallest_image(arch, least):
    assert build_arch(arch).min_size == least


@pytest.mark.parametrize(
    ('halvings', 'branches', 'injection'),
    [(0, 2, False), (0, 3, True), (1, 2, True), (2, 2, True), (2, 4, True)],
)
def test_when_there_is_an_injection(halvings, branches, injection):
    arch = dict(channels=[8] * branches, downsample_times=halvings)
    every, first = build_arch(arch), build_arch(arch | dict(injection='first'))
    assert every.has_injection and every.injected == branches
    assert first.has_injection is injection and first.injected == 1


def test_a_dict_may_name_the_preset_that_it_changes():
    arch = build_arch(dict(preset='small', injection='first', num_groups=4))
    assert (arch.injection, arch.num_groups) == ('first', 4)
    assert arch.channels == (32, 64, 128, 256) and arch.expansion == 5
    assert build_arch(dict(preset='xl')) == build_arch('xl')
    assert build_arch(arch) is arch


def test_dict_has_defaults():
    arch = build_arch(dict(channels=[16, 8]))
    assert arch.channels == (16, 8)
    assert arch.num_blocks == (1, 1)
    assert arch.num_groups == 8


GOOD = dict(channels=(8, 16))


@pytest.mark.parametrize(
    ('arch', 'error', 'words'),
    [
        ('medium', ValueError, ["arch='medium'", 'cifar-tiny', 'small', 'xl']),
        ('', ValueError, ["arch=''"]),
        (None, TypeError, ['None', 'dict']),
        (4, TypeError, ['arch', '4']),
        (dict(), TypeError, ["lacks 'channels'"]),
        (dict(preset='tall'), ValueError, ["arch='tall'", 'cifar-tiny', 'small']),
        (dict(preset=3), ValueError, ['arch=3', 'cifar-tiny']),
        (dict(preset=['xl']), ValueError, ["arch=['xl']", 'cifar-tiny']),
        (dict(preset='xl', width=3), TypeError, ['no field width', 'preset']),
        (
            GOOD | dict(injection='last'),
            ValueError,
            ["arch.injection='last'", "'all'", "'first'"],
        ),
        (GOOD | dict(injection=None), ValueError, ['arch.injection=None', "'all'"]),
        (GOOD | dict(injection=['all']), ValueError, ["arch.injection=['all']"]),
        (GOOD | dict(width=3), TypeError, ['no field width', 'channels', 'expansion']),
        (dict(channels=8), TypeError, ['arch.channels', '8', 'list']),
        (dict(channels='88'), TypeError, ['arch.channels', "'88'"]),
        (dict(channels=[8]), ValueError, ['arch.channels=[8]', 'at least two']),
        (dict(channels=[]), ValueError, ['arch.channels=[]', 'at least two']),
        (dict(channels=[8, 12]), ValueError, ['[8, 12]', '12', 'num_groups=8']),
        (dict(channels=[8, 0]), ValueError, ['arch.channels[1]=0', '1 or more']),
        (dict(channels=[8, -8]), ValueError, ['arch.channels[1]=-8']),
        (dict(channels=[8, 8.0]), TypeError, ['arch.channels[1]', '8.0']),
        (dict(channels=[8, '8']), TypeError, ['arch.channels[1]', "'8'"]),
        (GOOD | dict(num_blocks=[1]), ValueError, ['num_blocks=[1]', '[8, 16]']),
        (GOOD | dict(num_blocks=[1, 1, 1]), ValueError, ['num_blocks=[1, 1, 1]']),
        (GOOD | dict(num_blocks=[1, 0]), ValueError, ['arch.num_blocks[1]=0']),
        (GOOD | dict(num_blocks=2), TypeError, ['arch.num_blocks', '2']),
        (GOOD | dict(num_groups=0), ValueError, ['arch.num_groups=0', '2 or more']),
        (GOOD | dict(num_groups=1), ValueError, ['arch.num_groups=1', '2 or more']),
        (
            dict(channels=[9, 9], num_groups=3),
            ValueError,
            ['arch.num_groups=3', 'even'],
        ),
        (GOOD | dict(num_groups=16), ValueError, ['8', 'divisible', 'num_groups=16']),
        (GOOD | dict(expansion=0), ValueError, ['arch.expansion=0']),
        (GOOD | dict(expansion=1.5), TypeError, ['arch.expansion', '1.5']),
        (GOOD | dict(dropout=1), ValueError, ['arch.dropout=1', '< 1']),
        (GOOD | dict(dropout=-0.1), ValueError, ['arch.dropout=-0.1', '0 <=']),
        (GOOD | dict(dropout=math.nan), ValueError, ['arch.dropout=nan']),
        (GOOD | dict(dropout='no'), ValueError, ["arch.dropout='no'"]),
        (GOOD | dict(downsample_times=-1), ValueError, ['arch.downsample_times=-1']),
        (GOOD | dict(downsample_times=True), TypeError, ['arch.downsample_times']),
        (GOOD | dict(post_gn_affine=1), TypeError, ['arch.post_gn_affine', '1']),
        (GOOD | dict(weight_norm='yes'), TypeError, ['arch.weight_norm', "'yes'"]),
    ],
    ids=str,
)
def test_bad_input_is_refused(arch, error, words):
    with pytest.raises(error) as found:
        MDEQ(arch=arch)
    for word in words:
        assert word in str(found.value), (word, str(found.value))
