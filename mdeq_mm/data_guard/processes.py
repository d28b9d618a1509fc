"""Whether the processes of a training have as much to do."""

from mmengine.dist import all_gather_object
from mmengine.runner import EpochBasedTrainLoop


def check_processes_agree(loop, field):
    """Refuse data that would let processes wait for one another for ever.

    Each takes part in the mean of all gradients, so each has to make as many steps.
    For all processes at once.

    Args:
        loop (BaseLoop): Loop over the data.
        field (str): How the config names its loader.

    Raises:
        ValueError: If the processes have different numbers of samples or batches.
    """
    loader = getattr(loop, 'dataloader', None)
    if not hasattr(getattr(loader, 'dataset', None), '__len__'):
        return
    found = all_gather_object((len(loader.dataset), len(loader)))
    samples, batches = (sorted(set(numbers)) for numbers in zip(*found, strict=True))
    if len(samples) > 1:
        raise ValueError(
            f'the processes find different numbers of samples in {field}.dataset, '
            f'{samples[0]} to {samples[-1]}: give every machine the same files'
        )
    # Loops over iterations begin anew where their data end.
    if isinstance(loop, EpochBasedTrainLoop) and len(batches) > 1:
        raise ValueError(
            f'the processes have {batches[0]} to {batches[-1]} batches an epoch, and '
            'the one with more would wait for the others for ever: set '
            f'{field}.sampler.round_up=True'
        )
