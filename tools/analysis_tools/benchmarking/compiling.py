"""torch.compile, where it works."""

import torch


class CompiledFunction:
    """f of an EquilibriumLayer, compiled.

    Args:
        function (FunctionalModule): f.
    """

    def __init__(self, function):
        self.tensors = function.tensors
        self._call = torch.compile(lambda tensors, *args: function(tensors, *args))

    def __call__(self, tensors, *args):
        return self._call(tensors, *args)


def compile_subject(subject):
    """Compile f of an MDEQ, the backbone of another model, and try it.

    Args:
        subject (Subject): The model, changed in place where it works.

    Returns:
        str | None: Why it does not work.
    """
    layer, model = subject.layer, subject.model
    if layer is None:
        original = model.backbone.forward
        model.backbone.forward = torch.compile(original)
    else:
        # The layer hands a functional form of f to its equations.
        original = layer._function
        layer._function = CompiledFunction(original)
    try:
        subject.step()
        subject.infer()
    except Exception as error:
        if layer is None:
            model.backbone.forward = original
        else:
            layer._function = original
        subject.optimizer.zero_grad()
        reason = (str(error).strip().splitlines() or [''])[0]
        return f'{type(error).__name__}: {reason}'
    return None
