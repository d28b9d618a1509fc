from .base import Gradient, build_gradient
from .implicit import ImplicitGradient
from .phantom import PhantomGradient
from .unrolled import UnrolledGradient

__all__ = [
    'Gradient',
    'ImplicitGradient',
    'PhantomGradient',
    'UnrolledGradient',
    'build_gradient',
]
