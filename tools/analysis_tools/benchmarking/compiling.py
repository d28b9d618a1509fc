"""torch.compile, where it works."""


def compile_subject(subject):
    """Compile f of an MDEQ, the backbone of another model, and try it.

    Args:
        subject (Subject): The model, changed in place where it works.

    Returns:
        str | None: Why it does not work.
    """
    layer, model = subject.layer, subject.model
    module = model.backbone if layer is None else layer.f
    module.compile()
    try:
        subject.step()
        subject.infer()
    except Exception as error:
        module._compiled_call_impl = None
        subject.optimizer.zero_grad()
        reason = (str(error).strip().splitlines() or [''])[0]
        return f'{type(error).__name__}: {reason}'
    return None
