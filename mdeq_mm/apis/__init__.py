"""The models that come with the package: their configs, weights, and names."""

from .hub import register_models
from .index import config_path, list_models, weights_path
from .loading import get_config, get_model
from .solver_settings import set_solver

__all__ = [
    'config_path',
    'get_config',
    'get_model',
    'list_models',
    'register_models',
    'set_solver',
    'weights_path',
]
