"""Changes to the text of metafiles, whose comments and order stay."""

import re


def set_field(text, name, field, value):
    """Set a field of a model in the text of a metafile, or add it.

    Args:
        text (str): Of the metafile.
        name (str): Of the model.
        field (str): ``'FLOPs'`` or ``'Parameters'``, which are there, or
            ``'Weights'``.
        value: What it is to be.

    Returns:
        str: The new text.
    """
    blocks = re.split(r'(?m)^(?=  - Name: )', text)
    for number, block in enumerate(blocks):
        if not block.startswith(f'  - Name: {name}\n'):
            continue
        line = re.compile(rf'(?m)^( +{field}: ).*$')
        if line.search(block):
            block = line.sub(lambda found: f'{found[1]}{value}', block)
        else:
            config = re.compile(r'(?m)^(    )(Config: .*\n)')
            block = config.sub(rf'\1\2\1{field}: {value}\n', block)
        blocks[number] = block
        return ''.join(blocks)
    raise ValueError(f'no model is called {name!r} in the metafile')
