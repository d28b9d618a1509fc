"""The exception that ends a training."""


class EquilibriumFailure(RuntimeError):
    """A training was ended because of failed solves or non-finite numbers."""
