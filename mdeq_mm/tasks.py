"""The two tasks of joint training, and the toolbox that each belongs to."""

from importlib.util import find_spec

#: What a sample is labelled for, and the scope of that task's own parts. Images
#: with both labels go through mmseg's pipelines, which can carry a class along.
SCOPES = dict(cls='mmpretrain', seg='mmseg', both='mmseg')

#: Ground truth of each task in a data sample.
LABELS = dict(cls='gt_label', seg='gt_sem_seg')

#: Packages that provide each toolbox.
PACKAGES = dict(
    mmpretrain='onedl-mmpretrain (or mmpretrain)',
    mmseg='onedl-mmsegmentation (or mmsegmentation)',
)


def require_toolboxes(name):
    """Say which package to install where one of the toolboxes is missing.

    Args:
        name (str): What needs them.

    Raises:
        ImportError: If mmpretrain or mmseg cannot be found.
    """
    for module, package in PACKAGES.items():
        if find_spec(module) is None:
            raise ImportError(
                f'{name} joins parts of mmpretrain and mmseg, and {module} is not '
                f'installed: run "pip install {package.split(" ")[0]}" (docs/'
                'installation.md has the sets of packages and their versions)'
            )


def in_scope(cfg, task):
    """A config whose own and nested types are looked up in the task's toolbox.

    Args:
        cfg (dict): ``dict(type=..., ...)``.
        task (str): A key of :data:`SCOPES`.
    """
    return {'_scope_': SCOPES[task], **cfg}


def task_of(sample):
    """The task of a data sample: the one it was marked with, or that its labels tell.

    Args:
        sample (BaseDataElement | dict): Of mmpretrain or mmseg.

    Returns:
        str: A key of :data:`SCOPES`. A sample without any label is for both.
    """
    if sample.get('task') is not None:
        return sample.get('task')
    labelled = [task for task, label in LABELS.items() if label in sample]
    return labelled[0] if len(labelled) == 1 else 'both'


def serves(task, head):
    """Whether samples of ``task`` go to a head, ``'cls'`` or ``'seg'``."""
    return task in (head, 'both')
