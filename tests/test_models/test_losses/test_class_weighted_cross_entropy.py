"""The class-weighted loss against PyTorch's."""

import pytest
import torch
from torch.nn import functional as F

from mdeq_mm.models import ClassWeightedCrossEntropy

WEIGHTS = [0.5, 2.0, 1.0, 0.25]


def batch(dtype=torch.float64):
    scores = torch.randn(2, 4, 5, 6, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 4, (2, 5, 6))
    labels[0, :2] = 255
    return scores, labels


@pytest.mark.parametrize('weights', [WEIGHTS, tuple(WEIGHTS), None])
def test_equals_pytorchs(weights):
    scores, labels = batch()
    found = ClassWeightedCrossEntropy(weights, loss_weight=0.4)(scores, labels)
    tensor = None if weights is None else torch.tensor(weights, dtype=scores.dtype)
    expected = 0.4 * F.cross_entropy(scores, labels, tensor, ignore_index=255)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, scores)[0] for loss in (found, expected))
    )


def test_pixel_weights_and_other_ignored_labels():
    scores, labels = batch()
    labels[labels == 255] = 3
    pixels = torch.rand(2, 5, 6, dtype=scores.dtype)
    found = ClassWeightedCrossEntropy(WEIGHTS)(scores, labels, pixels, ignore_index=3)
    weights = torch.tensor(WEIGHTS, dtype=scores.dtype)
    each = F.cross_entropy(scores, labels, weights, ignore_index=3, reduction='none')
    counts = torch.bincount(labels.flatten(), minlength=4)[:3]
    torch.testing.assert_close(
        found, (each * pixels).sum() / (counts.to(weights) @ weights[:3])
    )


def test_nothing_to_learn_from_is_no_loss():
    """PyTorch divides by zero here, and the training would be lost."""
    scores, labels = batch()
    loss = ClassWeightedCrossEntropy(WEIGHTS)(scores, torch.full_like(labels, 255))
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, scores)[0].any()


def test_half_precision_is_summed_in_single():
    scores, labels = batch(torch.bfloat16)
    found = ClassWeightedCrossEntropy(WEIGHTS)(scores, labels)
    weights = torch.tensor(WEIGHTS)
    expected = F.cross_entropy(scores.float(), labels, weights, ignore_index=255)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


def test_wrong_weights_are_refused():
    with pytest.raises(TypeError, match=r'class_weight must be a list'):
        ClassWeightedCrossEntropy('weights.txt')
    with pytest.raises(ValueError, match='has 3 numbers for 4 classes'):
        ClassWeightedCrossEntropy([1, 1, 1])(*batch())


def test_the_loss_of_each_pixel_for_samplers():
    score = torch.randn(2, 3, 4, 5).double()
    label = torch.randint(0, 3, (2, 4, 5))
    weights = [0.5, 1.0, 2.0]
    loss = ClassWeightedCrossEntropy(class_weight=weights, loss_weight=0.4)
    found = loss(score, label, reduction_override='none')
    expected = torch.nn.functional.cross_entropy(
        score, label, torch.tensor(weights).double(), reduction='none'
    )
    torch.testing.assert_close(found, 0.4 * expected)
