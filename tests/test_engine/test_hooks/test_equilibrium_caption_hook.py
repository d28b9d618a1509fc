"""Residuals and statuses below drawn predictions."""

import cv2
import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.structures import PixelData

from mdeq_mm.engine import EquilibriumCaptionHook
from mdeq_mm.engine.hooks.equilibrium_caption_hook import caption

IMAGE = np.full((40, 200, 3), 120, np.uint8)


class Runner:
    def __init__(self, visualizer):
        self.visualizer = visualizer


def told(sample, status='max_steps'):
    sample.set_field(1.5e-3, 'equilibrium_residual')
    sample.set_field(8, 'equilibrium_steps')
    sample.set_field(status, 'equilibrium_status')
    return sample


@pytest.fixture(params=['cls', 'seg'])
def case(request, tmp_path):
    """A visualizer of a toolbox, how it is asked to draw, and a data sample."""
    backends = [dict(type='LocalVisBackend')]
    name = f'{request.param}-{tmp_path.name}'
    if request.param == 'cls':
        pytest.importorskip('mmpretrain', reason='mmpretrain is not installed')
        from mmpretrain.structures import DataSample
        from mmpretrain.visualization import UniversalVisualizer

        visualizer = UniversalVisualizer.get_instance(
            name, vis_backends=backends, save_dir=str(tmp_path)
        )
        sample = DataSample().set_gt_label(1).set_pred_label(1)

        def draw(sample, **options):
            visualizer.visualize_cls(IMAGE, sample, name='shown', **options)
    else:
        pytest.importorskip('mmseg', reason='mmseg is not installed')
        from mmseg.structures import SegDataSample
        from mmseg.visualization import SegLocalVisualizer

        visualizer = SegLocalVisualizer.get_instance(
            name, vis_backends=backends, save_dir=str(tmp_path)
        )
        visualizer.dataset_meta = dict(
            classes=('a', 'b'), palette=[[0, 0, 0], [200, 0, 0]]
        )
        labels = torch.zeros(1, 40, 200).long()
        sample = SegDataSample(pred_sem_seg=PixelData(data=labels))

        def draw(sample, **options):
            visualizer.add_datasample(
                'shown', IMAGE, sample, draw_gt=False, **options
            )  # fmt: skip

    return visualizer, draw, sample


def drawn(folder):
    (path,) = folder.glob('vis_data/vis_image/*.png')
    return path.name, cv2.imread(str(path))


def test_a_line_below_the_picture(case, tmp_path):
    visualizer, draw, sample = case
    draw(sample, step=3)
    name, plain = drawn(tmp_path)
    hook = EquilibriumCaptionHook()
    hook.before_run(Runner(visualizer))
    draw(told(sample), step=3)
    again, found = drawn(tmp_path)
    assert again == name and '3' in name
    height = plain.shape[0]
    assert found.shape[0] > height
    np.testing.assert_array_equal(found[:height, : plain.shape[1]], plain)
    strip = found[height:]
    assert 0.01 < (strip < 128).mean() < 0.5

    hook.after_run(Runner(visualizer))
    draw(sample, step=3)
    np.testing.assert_array_equal(drawn(tmp_path)[1], plain)


def test_files_have_it_too(case, tmp_path):
    visualizer, draw, sample = case
    EquilibriumCaptionHook().before_run(Runner(visualizer))
    path = tmp_path / 'one.png'
    draw(told(sample), out_file=str(path))
    found = cv2.imread(str(path))
    assert found.shape[0] > 40
    assert not list(tmp_path.glob('vis_data/vis_image/*.png'))


def test_predictions_that_tell_nothing_stay_as_they_are(case, tmp_path):
    visualizer, draw, sample = case
    draw(sample)
    _, plain = drawn(tmp_path)
    EquilibriumCaptionHook().before_run(Runner(visualizer))
    draw(sample)
    np.testing.assert_array_equal(drawn(tmp_path)[1], plain)


def test_visualizers_of_other_kinds_are_left_alone():
    class Other:
        pass

    other = Other()
    EquilibriumCaptionHook().before_run(Runner(other))
    assert vars(other) == {}
    EquilibriumCaptionHook().after_run(Runner(other))


@pytest.mark.parametrize(('width', 'lines'), [(8, 3), (40, 3), (200, 3), (400, 1)])
def test_the_text_can_be_read_whatever_the_image(width, lines):
    image = np.full((10, width, 3), 7, np.uint8)
    found = caption(image, 'residual 1.5e-03, 8 evaluations, max steps')
    assert found.shape[0] == 10 + 15 * lines and found.shape[1] >= width
    np.testing.assert_array_equal(found[:10, :width], image)
    # White at the right edge, and to the right of a narrow image: nothing is cut off.
    assert (found[10:, -1] == 255).all() and (found[:10, width:] == 255).all()
    for line in np.split(found[10:], lines):
        assert (line < 128).any(2).sum() > 50


def test_it_is_a_hook():
    assert issubclass(EquilibriumCaptionHook, Hook)


def test_a_run_that_raised_is_followed_by_another(case, tmp_path):
    """With the same visualizer, which the first could not give back."""
    visualizer, draw, sample = case
    draw(sample)
    _, plain = drawn(tmp_path)
    EquilibriumCaptionHook().before_run(Runner(visualizer))
    hook = EquilibriumCaptionHook()
    hook.before_run(Runner(visualizer))
    draw(told(sample))
    height = drawn(tmp_path)[1].shape[0]
    single = EquilibriumCaptionHook()
    hook.after_run(Runner(visualizer))
    single.before_run(Runner(visualizer))
    draw(sample)
    assert height == drawn(tmp_path)[1].shape[0] > plain.shape[0]
    single.after_run(Runner(visualizer))
    draw(sample)
    np.testing.assert_array_equal(drawn(tmp_path)[1], plain)
