"""Progress of what takes a while."""

from rich.console import Console
from rich.progress import track


def progress(items, text):
    """Go through items with a bar, or with one line where there is no terminal.

    Args:
        items (Sequence): Anything with a length.
        text (str): What is being done.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        print(f'{text} ...', flush=True)
        return iter(items)
    return track(items, text, console=console, transient=True)
