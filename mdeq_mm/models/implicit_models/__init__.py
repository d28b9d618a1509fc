from .classifier import ImplicitImageClassifier
from .equilibrium_report import EquilibriumReport
from .segmentor import ImplicitEncoderDecoder
from .tta import ImplicitClsTTAModel, ImplicitSegTTAModel

__all__ = [
    'EquilibriumReport',
    'ImplicitClsTTAModel',
    'ImplicitEncoderDecoder',
    'ImplicitImageClassifier',
    'ImplicitSegTTAModel',
]
