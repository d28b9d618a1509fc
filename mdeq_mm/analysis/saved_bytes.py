"""Memory that autograd keeps between a forward and a backward pass."""

from collections.abc import Callable

import torch


def saved_bytes(forward: Callable[[], object]):
    """Bytes that autograd keeps for the backward pass of a computation.

    Counts each storage once, parameters included. The count is exact and the same
    on every machine.

    Args:
        forward (Callable): Runs the forward pass. What it returns is held until
            the count is done, so that nothing is freed early.

    Returns:
        int: Bytes.
    """
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = forward()
    del held
    return sum(sizes.values())


def saved_bytes_per_image(forward: Callable[[int], object], batches=(4, 8)):
    """Bytes kept for backward an image: the slope between two batch sizes.

    What is kept once a batch, such as weights, falls out of the difference.

    Args:
        forward (Callable): Runs the forward pass of as many images as it is told.
        batches (tuple[int, int]): The two batch sizes.

    Returns:
        float: Bytes an image.
    """
    small, large = batches
    difference = saved_bytes(lambda: forward(large)) - saved_bytes(
        lambda: forward(small)
    )
    return difference / (large - small)
