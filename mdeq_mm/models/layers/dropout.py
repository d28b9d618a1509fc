"""Variational dropout."""

from torch import Tensor


def channel_mask(like: Tensor, rate: float, generator=None):
    """Draw a dropout mask that is fixed for a whole solve (Gal and Ghahramani 2016).

    One Bernoulli number a sample and channel, the same at all pixels and all
    evaluations of f, scaled by 1 / (1 - rate).

    Args:
        like (Tensor): (N, C, H, W), for batch, channels, device and type.
        rate (float): Share of channels set to zero, in [0, 1).
        generator (torch.Generator, optional): Source of randomness.

    Returns:
        Tensor: (N, C, 1, 1).
    """
    mask = like.new_empty(*like.shape[:2], 1, 1)
    return mask.bernoulli_(1 - rate, generator=generator).div_(1 - rate)
