"""What differs between the two sets of packages that provide mmengine."""


def advances_by_loading(iterator):
    """Whether an iteration-based loop loads data only to get past it on a resume.

    The loop of the original mmengine takes every batch that was trained on once
    more; OneDL's asks its iterator to skip them.

    Args:
        iterator: ``dataloader_iterator`` of the loop.

    Returns:
        bool: True for the original mmengine.
    """
    return not hasattr(iterator, 'skip_iter')
