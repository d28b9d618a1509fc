"""Tracing models with torch.export."""

import json
from pathlib import Path

import torch
from torch.utils._pytree import tree_map


def example_images(model, shape, batch=None):
    """Random images (N, C, H, W) of the type and device of a model."""
    weight = next(model.parameters())
    # A batch of one would be taken for a number that never changes.
    return torch.randn(batch or 2, *shape, dtype=weight.dtype, device=weight.device)


def trace(model, shape=None, batch=None, inputs=None):
    """Trace a module.

    Args:
        model (nn.Module): In evaluation mode.
        shape (Sequence[int], optional): Channels, height and width of its images.
        batch (int, optional): Fixed number of samples. Default: any.
        inputs (tuple, optional): In place of random images; tensors whose first
            dimension is the batch, or tuples of them.

    Returns:
        torch.export.ExportedProgram: Of the module in evaluation.
    """
    if inputs is None:
        inputs = (example_images(model, shape, batch),)
    # Of one tensor given twice, the graph would know but one.
    inputs = tree_map(torch.clone, inputs)
    dimensions = None
    if batch is None:
        first = {0: torch.export.Dim('batch', min=1)}
        dimensions = tree_map(lambda _: first, inputs)
    with torch.no_grad():
        return torch.export.export(model, inputs, dynamic_shapes=dimensions)


def save_program(program, path, metadata=None):
    """Write an exported program, with metadata as ``metadata.json``, to a .pt2 file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    extra = {'metadata.json': json.dumps(metadata or {}, indent=2)}
    torch.export.save(program, str(path), extra_files=extra)


def load_program(path):
    """Read what :func:`save_program` wrote.

    Returns:
        tuple[Callable, dict]: The model, from images to a tuple of outputs, and the
        metadata.
    """
    extra = {'metadata.json': ''}
    program = torch.export.load(str(path), extra_files=extra)
    return program.module(), json.loads(extra['metadata.json'])
