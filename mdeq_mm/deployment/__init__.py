"""Models as files that run without this package: ONNX and torch.export."""

from ..implicit.iteration import FixedIteration, fixed_solver
from .model import DeployableModel, FixedStepMDEQ
from .onnx_file import to_onnx, write_onnx
from .tracing import load_program, save_program, trace

__all__ = [
    'DeployableModel',
    'FixedIteration',
    'FixedStepMDEQ',
    'fixed_solver',
    'load_program',
    'save_program',
    'to_onnx',
    'trace',
    'write_onnx',
]
