"""Weights of other models than a backbone was made for."""

import logging

import torch
from mmengine.logging import print_log


def whence(pretrained):
    """Where ``pretrained`` is set, and what to write if it is not meant.

    Args:
        pretrained (str): Its value.
    """
    return (
        f'pretrained={pretrained!r} is set in model.backbone, or in model, from which '
        'the toolbox hands it on: where a base config brings it for another backbone, '
        'write model=dict(pretrained=None)'
    )


def adapt_channels(module, state_dict, prefix, *args):
    """Pre-hook for ``load_state_dict``: fit the stem to images of other channels.

    Filters are repeated over the channels and scaled by the ratio of their numbers, so
    that activations keep their size; those for one channel are the sums of all.

    Args:
        module (MDEQ): The backbone that loads.
        state_dict (dict): What it loads from; gets the adapted filters.
        prefix (str): Of the module's names in ``state_dict``.
        *args: What else PyTorch hands to such hooks.
    """
    key, own = f'{prefix}stem.0.conv.weight', module.stem[0].conv.weight
    weight = state_dict.get(key)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        return
    if weight.shape[:1] + weight.shape[2:] != own.shape[:1] + own.shape[2:]:
        return
    found, wanted = weight.shape[1], own.shape[1]
    if found in (0, wanted):
        return
    if wanted == 1:
        weight = weight.sum(1, keepdim=True)
    else:
        weight = weight[:, torch.arange(wanted) % found] * (found / wanted)
    state_dict[key] = weight
    print_log(
        f'{key} has filters for {found} channels in the checkpoint, which are adapted '
        f'to in_channels={wanted}.',
        logger='current',
        level=logging.WARNING,
    )
