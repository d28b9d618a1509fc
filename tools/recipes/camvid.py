"""CamVid: MDEQ and HRNet-W18s from scratch on one schedule.

The short schedule is for a CPU: images of 240x180 pixels, 1,400 iterations of 4 crops.
--full is 20,000 iterations of 8 crops of 480x360, for a GPU. Both keep the checkpoint
that is best on the validation set, and test that one. A recipe that was interrupted
goes on where it was when it is called again.

Example:
    python tools/recipes/camvid.py --archive camvid.tar
"""

from recipe import Metric, Recipe, Run, parse_args, pick, unpack

SHORT = [
    Run('MDEQ', 'camvid/fcn_mdeq_short_1xb4-1400it_camvid-180x240.py'),
    Run('HRNet-W18s', 'camvid/fcn_hr18s_short_1xb4-1400it_camvid-180x240.py'),
]
FULL = [
    Run('MDEQ', 'camvid/fcn_mdeq-small_1xb8-20k_camvid-360x480.py'),
    Run('HRNet-W18s', 'camvid/fcn_hr18s_1xb8-20k_camvid-360x480.py'),
]


def main(argv=None):
    args = parse_args(
        argv,
        __doc__,
        'work_dirs/recipes/camvid',
        'data/camvid',
        'archive of CamVid, as docs/datasets.md describes it',
    )
    runs = pick(FULL if args.full else SHORT, args.only)
    schedule = '20,000 iterations' if args.full else 'short schedule'
    recipe = Recipe(
        f'CamVid, {schedule}', runs, Metric('mIoU', 'mIoU, %'), args, test=True
    )
    unpack(recipe.console, args.archive, args.data_root, 'camvid.py', 'CamVid')
    recipe.run()


if __name__ == '__main__':
    main()
