from .backbones import MDEQ
from .implicit_models import (
    ImplicitClsTTAModel,
    ImplicitEncoderDecoder,
    ImplicitImageClassifier,
    ImplicitSegTTAModel,
)
from .losses import ClassWeightedCrossEntropy
from .necks import MDEQFuseScales, MDEQPoolBranches

__all__ = [
    'MDEQ',
    'ClassWeightedCrossEntropy',
    'ImplicitClsTTAModel',
    'ImplicitEncoderDecoder',
    'ImplicitImageClassifier',
    'ImplicitSegTTAModel',
    'MDEQFuseScales',
    'MDEQPoolBranches',
]
