"""What a segmentor predicts after each evaluation of f."""

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Snapshot:
    """A prediction on the way to the equilibrium.

    Attributes:
        evaluations (int): Evaluations of f so far, k.
        residual (float): Of the k-th evaluation, at the state it started from:
            relative, unless the solver was told otherwise.
        labels (Tensor): (H, W), int64, predicted from f(z_{k-1}), the outcome of
            the k-th evaluation.
    """

    evaluations: int
    residual: float
    labels: Tensor


@torch.no_grad()
def predict_by_evaluation(model, batch):
    """Segment images as a whole, and look at all states on the way.

    The last snapshot is not exactly the model's prediction, which is made of z*,
    the state with the lowest residual, instead of f at the last state.

    Args:
        model (EncoderDecoder): A segmentor of mmseg with an MDEQ backbone, in
            evaluation mode.
        batch (dict): As for ``model.test_step``.

    Returns:
        list[list[Snapshot]]: Of each image, in the order of the evaluations.

    Raises:
        ValueError: If the model is no segmentor, its backbone has no equilibrium, or
            it is in training mode.
    """
    if not hasattr(model, 'decode_head'):
        raise ValueError(
            f'{type(model).__name__} has no decode_head: give the config of a '
            'segmentation model'
        )
    layer = getattr(model.backbone, 'equilibrium', None)
    if layer is None:
        raise ValueError(
            f'backbone.type={type(model.backbone).__name__} has no solver to watch: '
            "give a config whose backbone is of type='MDEQ'"
        )
    if layer.training:
        raise ValueError('the model is in training mode: call model.eval() first')
    data = model.data_preprocessor(deepcopy(batch), False)
    images, samples = data['inputs'], data['data_samples']
    found = [[] for _ in samples]

    def look(rows, maps, residual):
        maps = model.backbone.outputs([m.to(images.dtype) for m in maps])
        if model.with_neck:
            maps = model.neck(maps)
        mine = [deepcopy(samples[row]) for row in rows.tolist()]
        metas = [sample.metainfo for sample in mine]
        logits = model.decode_head.predict(maps, metas, model.test_cfg)
        done = model.postprocess_result(logits, mine)
        for row, sample, value in zip(
            rows.tolist(), done, residual.tolist(), strict=True
        ):
            labels = sample.pred_sem_seg.data.squeeze(0).cpu()
            found[row].append(Snapshot(len(found[row]) + 1, value, labels))

    previous, layer.observe = layer.observe, look
    try:
        model.backbone(images)
    finally:
        layer.observe = previous
    # On a GPU samples that are done stay in the batch.
    steps = layer.last_solution.steps.tolist()
    return [one[:count] for one, count in zip(found, steps, strict=True)]
