"""ONNX files of models.

An exporter that unrolls the iteration traces and writes f once an evaluation, which
takes minutes, and so does loading the file. Here one step is exported by itself: it
becomes the body of a Loop, or a function that is called once an evaluation. Its nodes
and its weights are in the file once either way.
"""

import json
import math
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..implicit.checks import check_int
from .model import FixedStepMDEQ
from .tracing import example_images, trace

#: Of the step where it is a function.
DOMAIN, NAME = 'mdeq_mm', 'step'
#: The lowest opset that PyTorch's exporter writes.
LEAST_OPSET = 18
REQUIREMENTS = 'requirements/deployment.txt'


def require(*packages):
    """Import optional packages.

    Raises:
        ImportError: If one is not installed, with the command that does it.
    """
    for name in packages:
        try:
            __import__(name)
        except ImportError as error:
            raise ImportError(
                f'{name} is not installed, which ONNX files need: pip install -r '
                f'{REQUIREMENTS}'
            ) from error


def check_opset(opset):
    """Refuse an opset version that cannot be written.

    Raises:
        TypeError: If it is no integer.
        ValueError: If it is out of range.
    """
    import onnx

    check_int('opset', opset, 1)
    newest = onnx.defs.onnx_opset_version()
    if not LEAST_OPSET <= opset <= newest:
        raise ValueError(
            f'opset={opset} cannot be written: use {LEAST_OPSET} to {newest}, or leave '
            "it out for the exporter's own"
        )


def to_onnx(model, shape, batch=None, opset=None, metadata=None, unroll=False):
    """Export a model as ONNX.

    Args:
        model (DeployableModel): The model; on a CPU.
        shape (Sequence[int]): Channels, height and width of images.
        batch (int, optional): Fixed number of images. Default: any.
        opset (int, optional): Version of the operators. Default: the exporter's.
        metadata (dict, optional): For ``metadata_props``; what is no text becomes
            JSON.
        unroll (bool): Whether steps are calls of a function, one after the other, in
            place of a Loop: for what cannot run a Loop.

    Returns:
        onnx.ModelProto: With the input ``images`` and the outputs of
        ``model.output_names``. Batches are a dimension named ``batch`` unless fixed.

    Raises:
        ImportError: If onnx or onnxscript is not installed.
        TypeError: If ``opset`` is no integer.
        ValueError: If the opset cannot be written.
    """
    require('onnx', 'onnxscript')
    if opset is not None:
        check_opset(opset)
    outputs = model.output_names
    if model.solver is None:
        file = _write(trace(model, shape, batch), ['images'], outputs, opset)
    else:
        backbone = model.backbone
        with _one_call(backbone):
            program = trace(model, shape, batch)
        file = _write(program, ['images'], outputs, opset)
        with torch.no_grad():
            images = example_images(model, shape, batch)
            injections, state = backbone.begin(images)
        program = trace(_Step(backbone), inputs=(injections, state), batch=batch)
        inputs = [f'injection_{i}' for i in range(len(injections))]
        inputs += [f'state_{i}' for i in range(len(state))]
        outputs = [f'next_{i}' for i in range(len(state))]
        step = _write(program, inputs, outputs, opset)
        (_unroll if unroll else _loop)(file, step, model.solver.max_steps)
    found = {entry.domain: entry.version for entry in file.opset_import}['']
    if opset not in (None, found):
        raise ValueError(
            f'opset={opset} cannot be written for this model, which came out as opset '
            f'{found}: leave it out, or convert the file'
        )
    _strip(file)
    for key, value in (metadata or {}).items():
        text = value if isinstance(value, str) else json.dumps(value)
        file.metadata_props.add(key=key, value=text)
    return file


class _Step(nn.Module):
    """One step of an iteration."""

    def __init__(self, backbone: FixedStepMDEQ):
        super().__init__()
        self.backbone = backbone

    def forward(self, injections, state):
        return self.backbone.step(injections, state)


@contextmanager
def _one_call(backbone):
    """Let one call stand where the steps are."""

    def call(injections, state):
        return torch.onnx.ops.symbolic_multi_out(
            f'{DOMAIN}::{NAME}',
            (*injections, *state),
            dtypes=[t.dtype for t in state],
            shapes=[t.shape for t in state],
            version=1,
        )

    backbone.solve = call
    try:
        yield
    finally:
        del backbone.solve


def _write(program, inputs, outputs, opset):
    """The ONNX model of an exported program."""
    return torch.onnx.export(
        program,
        (),
        dynamo=True,
        verbose=False,
        external_data=False,
        input_names=list(inputs),
        output_names=list(outputs),
        opset_version=opset,
    ).model_proto


def _loop(file, step, steps):
    """Put a Loop where the call stands.

    Args:
        file (onnx.ModelProto): With one call, changed in place.
        step (onnx.ModelProto): One step as a model of its own.
        steps (int): How many.
    """
    from onnx import TensorProto, compose, helper, numpy_helper

    # Names in a body must be none of those around it.
    graph = compose.add_prefix_graph(step.graph, f'{NAME}.')
    call = _call_of(file)
    # What stays the same at every step, then the state.
    fixed = len(call.input) - len(call.output)
    injections, states = graph.input[:fixed], graph.input[fixed:]
    count, go, still = (f'{NAME}.{name}' for name in ('count', 'go', 'still'))
    body = helper.make_graph(
        [
            helper.make_node('Identity', [go], [still]),
            *(
                helper.make_node('Identity', [outer], [inner.name])
                for outer, inner in zip(call.input[:fixed], injections, strict=True)
            ),
            *graph.node,
        ],
        NAME,
        [
            helper.make_tensor_value_info(count, TensorProto.INT64, []),
            helper.make_tensor_value_info(go, TensorProto.BOOL, []),
            *states,
        ],
        [helper.make_tensor_value_info(still, TensorProto.BOOL, []), *graph.output],
        # Weights from around a body would be no constants to what optimises it.
        graph.initializer,
    )
    limit = numpy_helper.from_array(np.array(steps), f'{NAME}.steps')
    file.graph.initializer.append(limit)
    inputs = [limit.name, '', *call.input[fixed:]]
    _replace(file, [helper.make_node('Loop', inputs, call.output, body=body)])
    kept = [entry for entry in file.opset_import if entry.domain != DOMAIN]
    del file.opset_import[:]
    file.opset_import.extend(kept)


def _unroll(file, step, steps):
    """Put calls of a function where the one call stands; see :func:`_loop`."""
    from onnx import TensorProto, helper

    graph = step.graph
    weights, constants = [], []
    for tensor in graph.initializer:
        # A function holds no weights: it is called with them. Shapes, factors and the
        # like are its own.
        own = tensor.data_type != TensorProto.FLOAT or math.prod(tensor.dims) == 1
        (constants if own else weights).append(tensor)
    constants = [helper.make_node('Constant', [], [t.name], value=t) for t in constants]
    file.functions.append(
        helper.make_function(
            DOMAIN,
            NAME,
            [v.name for v in graph.input] + [t.name for t in weights],
            [v.name for v in graph.output],
            [*constants, *graph.node],
            step.opset_import,
        )
    )
    for tensor in weights:
        tensor.name = f'{NAME}.{tensor.name}'
    file.graph.initializer.extend(weights)
    call = _call_of(file)
    fixed = len(call.input) - len(call.output)
    injections, state = list(call.input[:fixed]), call.input[fixed:]
    calls = []
    for i in range(1, steps + 1):
        found = [f'{NAME}.{i}.{k}' for k in range(len(state))]
        found = list(call.output) if i == steps else found
        inputs = [*injections, *state, *(t.name for t in weights)]
        calls.append(helper.make_node(NAME, inputs, found, domain=DOMAIN))
        state = found
    _replace(file, calls)


def _call_of(file):
    (call,) = (node for node in file.graph.node if node.domain == DOMAIN)
    return call


def _replace(file, nodes):
    """Put nodes in the place of the call, which keeps the order of computation."""
    around = list(file.graph.node)
    place = around.index(_call_of(file))
    del file.graph.node[:]
    file.graph.node.extend([*around[:place], *nodes, *around[place + 1 :]])


def _strip(file):
    """Remove what the exporter notes about its source: a third of a file, and paths."""
    graphs = [file.graph]
    for node in file.graph.node:
        graphs += [entry.g for entry in node.attribute if entry.HasField('g')]
    for part in (*graphs, *file.functions):
        for one in (part, *part.node):
            one.ClearField('metadata_props')
            one.ClearField('doc_string')
    for graph in graphs:
        graph.ClearField('value_info')
        for entry in (*graph.input, *graph.output, *graph.initializer):
            entry.ClearField('metadata_props')
        for entry in (*graph.input, *graph.output):
            for dim in entry.type.tensor_type.shape.dim:
                if dim.dim_param:
                    # There is no other; the exporter numbers it.
                    dim.dim_param = 'batch'
    file.ClearField('metadata_props')


def write_onnx(file, path):
    """Check a model and write it to a file."""
    import onnx

    onnx.checker.check_model(file)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    onnx.save(file, str(path))
