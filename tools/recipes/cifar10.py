"""CIFAR-10: MDEQ-tiny, MDEQ-large and ResNet-18 on one schedule.

The short schedule is for a CPU, 400 iterations of 64 images, which is half an epoch,
and says little of where the models end. --full is MDEQ-large's published schedule, 220
epochs with crops and flips, for a GPU. A recipe that was interrupted goes on where it
was when it is called again.

Example:
    python tools/recipes/cifar10.py --archive cifar-10-python.tar.gz --amp
"""

from recipe import Metric, Recipe, Run, parse_args, pick, unpack

SHORT = [
    Run('MDEQ-tiny', 'cifar10/mdeq-tiny_short_1xb64_cifar10.py'),
    Run('MDEQ-large', 'cifar10/mdeq-large_short_1xb64_cifar10.py'),
    Run('ResNet-18', 'cifar10/resnet18_short_1xb64_cifar10.py'),
]
# One device takes the batch of the four that the configs are written for.
WHOLE_BATCH = ['train_dataloader.batch_size=128']
FULL = [
    Run('MDEQ-tiny', 'cifar10/mdeq-tiny_4xb32-220e_cifar10.py', WHOLE_BATCH),
    Run('MDEQ-large', 'cifar10/mdeq-large_4xb32-220e_cifar10.py', WHOLE_BATCH),
    Run('ResNet-18', 'cifar10/resnet18_4xb32-220e_cifar10.py', WHOLE_BATCH),
]


def main(argv=None):
    args = parse_args(
        argv,
        __doc__,
        'work_dirs/recipes/cifar10',
        'data/cifar10',
        'archive of CIFAR-10, as docs/datasets.md names them',
    )
    runs = pick(FULL if args.full else SHORT, args.only)
    schedule = '220 epochs' if args.full else 'short schedule (half an epoch)'
    recipe = Recipe(
        f'CIFAR-10, {schedule}',
        runs,
        Metric('accuracy/top1', 'accuracy, %'),
        args,
    )
    unpack(recipe.console, args.archive, args.data_root, 'cifar10.py', 'CIFAR-10')
    recipe.run()


if __name__ == '__main__':
    main()
