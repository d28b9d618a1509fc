from .class_weighted_cross_entropy import ClassWeightedCrossEntropy

__all__ = ['ClassWeightedCrossEntropy']
