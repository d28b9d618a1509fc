from ..build import register
from .base import Gradient, build_gradient
from .implicit import ImplicitGradient
from .phantom import PhantomGradient
from .reversible import ReversibleGradient
from .shared_inverse import SharedInverseGradient
from .unrolled import UnrolledGradient

__all__ = [
    'Gradient',
    'ImplicitGradient',
    'PhantomGradient',
    'ReversibleGradient',
    'SharedInverseGradient',
    'UnrolledGradient',
    'build_gradient',
]

register(
    'gradient',
    ImplicitGradient,
    PhantomGradient,
    ReversibleGradient,
    SharedInverseGradient,
    UnrolledGradient,
)
