"""Cross-entropy with class weights, as PyTorch averages it."""

import torch
from torch import nn
from torch.nn import functional as F

from ...registry import MODELS


@MODELS.register_module()
class ClassWeightedCrossEntropy(nn.Module):
    """Cross-entropy of the pixels, averaged over the weights of their classes.

    ``torch.nn.functional.cross_entropy`` for mmseg's decode heads. mmseg's own
    ``CrossEntropyLoss`` ends in an IndexError where class weights and ignored
    pixels meet: 1.2.2 always, 1.4.2 with ``avg_non_ignore=True``.

    Args:
        class_weight (Sequence[float], optional): Weight of each class. Default: 1.
        loss_weight (float): Weight of this loss among others.
        loss_name (str): Its name in the log; has to start with ``loss_``.

    Raises:
        TypeError: If ``class_weight`` is no list of numbers.
        ValueError: If there are not as many weights as classes, in the first step.
    """

    def __init__(self, class_weight=None, loss_weight=1.0, loss_name='loss_ce'):
        super().__init__()
        if class_weight is not None and not isinstance(class_weight, list | tuple):
            raise TypeError(
                'class_weight must be a list of numbers, one for each class, or None, '
                f'got {class_weight!r}'
            )
        self.class_weight = class_weight
        self.loss_weight = loss_weight
        self.loss_name = loss_name

    def forward(
        self,
        cls_score,
        label,
        weight=None,
        ignore_index=255,
        reduction_override=None,
    ):
        """Loss of a batch.

        Args:
            cls_score (Tensor): (N, C, H, W).
            label (Tensor): (N, H, W), int64.
            weight (Tensor, optional): (N, H, W), of the pixels; from a sampler.
            ignore_index (int): Label of pixels that do not count.
            reduction_override (str, optional): ``'none'`` returns the loss of each
                pixel, which mmseg's samplers choose by.

        Returns:
            Tensor: A number; 0 where no pixel counts.
        """
        classes = cls_score.shape[1]
        if self.class_weight is not None and len(self.class_weight) != classes:
            raise ValueError(
                f'class_weight has {len(self.class_weight)} numbers for {classes} '
                'classes: give one for each class, or None'
            )
        # Half precision is too coarse for a sum over a million pixels.
        score = cls_score.to(torch.promote_types(cls_score.dtype, torch.float32))
        of_class = score.new_tensor(self.class_weight or [1.0] * classes)
        loss = F.cross_entropy(
            score, label, of_class, ignore_index=ignore_index, reduction='none'
        )
        counts = label != ignore_index
        mass = of_class[label.where(counts, 0)] * counts
        if weight is not None:
            loss = loss * weight
        if reduction_override == 'none':
            return self.loss_weight * loss
        tiny = torch.finfo(score.dtype).tiny
        return self.loss_weight * loss.sum() / mass.sum().clamp_min(tiny)
