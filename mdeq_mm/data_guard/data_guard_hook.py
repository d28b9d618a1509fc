"""Looks at the data before training starts."""

import time
from collections import Counter
from pathlib import Path

import torch
from mmengine.dataset import InfiniteSampler
from mmengine.dist import (
    all_gather_object,
    get_rank,
    get_world_size,
    is_main_process,
)
from mmengine.hooks import Hook

from ..registry import HOOKS
from .classes import check_class_order
from .datasets import examine, leaves
from .findings import Findings
from .heads import check_outputs, check_windows, expected_labels
from .label_maps import Labels
from .processes import check_processes_agree
from .replacement import guard_samples, replace_samples, replaced_in
from .samples import SampleCheck

# Problems that a process gathers where the first one ends it.
_ENOUGH = 1000
# Seconds after which a line tells how far the look at the files is, and between lines.
_PATIENCE, _INTERVAL = 10, 30
_TRAINING = 'train_dataloader'


@HOOKS.register_module()
class DataGuardHook(Hook):
    """Refuses data that would end a training half way, or leaves them out.

    Before training, or testing, begins: data sets have to have samples, images have to
    be complete, labels to be those of classes that the model has an output for. Class
    names have to stand in the order of their folders. Label maps have to exist, to be
    of the size of their images, and to hold labels of the classes alone, of which the
    segmentation heads need an output each. The message names the file or the field.
    Classes without samples are warned of. While training, what goes wrong as a sample
    is loaded names its file, too.

    Each process reads a share of the files. A label map of 2048x1024 pixels takes 13 ms
    of a core, so that the 3,475 of Cityscapes' training and validation sets take about
    25 s on 2 cores, from a disk that keeps up. Of images without label maps the
    beginning and the end are read, in 0.02 ms of a core: half a minute for the
    1,281,167 of ImageNet's training set.

    Args:
        decode (bool): Whether to read all labels of label maps. Otherwise only their
            sizes are looked at, in a hundredth of the time.
        workers (int, optional): Threads. Default: one a core, 8 at most.
        images (bool | str): Whether to look at images without label maps;
            ``'whole'`` decodes them, which finds damage in their middle and takes 2
            to 3 ms of a core for an image of 400x300 pixels.
        on_error (str): What happens to training samples that cannot be used:
            ``'stop'`` ends the training, ``'skip'`` puts the next sound sample of the
            data set into the place of each, so that epochs keep their length. They
            are counted in a warning and listed in ``skipped_files.txt`` in the work
            folder, a path and a reason in a line. So are those of files that go bad
            while it trains. Validation and test sets are never left out of: their
            results would be others.
        max_share (float): Share of a data set, 0 to 1, beyond which ``'skip'`` stops,
            too.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If an option is none of these, or other data do not fit.
    """

    priority = 'VERY_HIGH'

    def __init__(self, decode=True, workers=None, images=True, on_error='stop',
                 max_share=0.1):  # fmt: skip
        for name, value, known in (
            ('images', images, (True, False, 'whole')),
            ('on_error', on_error, ('stop', 'skip')),
        ):
            if value not in known:
                raise ValueError(f'{name} must be one of {known}, got {value!r}')
        if not 0 <= max_share <= 1:
            raise ValueError(f'max_share must be between 0 and 1, got {max_share!r}')
        self.decode = decode
        self.workers = workers
        self.images = images
        self.on_error = on_error
        self.max_share = max_share
        self._lost = {}

    def before_train(self, runner):
        loaders = {_TRAINING: runner.train_dataloader}
        if runner.val_loop is not None:
            loaders['val_dataloader'] = runner.val_dataloader
        check_processes_agree(getattr(runner, 'train_loop', None), _TRAINING)
        found = self._check(runner, loaders)
        self._lost = {}
        self._samples = sum(
            size for name, size in found.sizes.items() if name.startswith(_TRAINING)
        )
        if self.on_error == 'skip':
            self._leave_out(runner, found.problems)
        self._guard(runner, loaders)
        _renew(getattr(runner, 'train_loop', None))

    def before_test(self, runner):
        loaders = dict(test_dataloader=runner.test_dataloader)
        self._check(runner, loaders)
        self._guard(runner, loaders)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        new = [(p, s) for p, s in replaced_in(data_batch) if p not in self._lost]
        if not new:
            return
        before = len(self._lost)
        self._lost.update(new)
        count = len(self._lost)
        _write(runner, 'skipped_files.txt', new, 'a')
        path, said = new[-1]
        if count > max(1, self.max_share * self._samples):
            raise ValueError(
                f'{count} of {self._samples} training samples have become unusable '
                f'since the training began, more than max_share={self.max_share} of '
                f'them; the last one is {path}: {said}'
            )
        # Once for each doubling: a disk that fails would fill the log.
        if count.bit_length() > before.bit_length():
            runner.logger.warning(
                f'{count} training samples of this process have become unusable since '
                f'the training began, and others take their places. The last one is '
                f'{path}: {said}. All are in {runner.work_dir}/skipped_files.txt.'
            )

    def _check(self, runner, loaders):
        """Check this process's share; return what all have found."""
        begin, mine, error = time.monotonic(), Findings(), None
        try:
            mine = self._check_share(runner, loaders)
        except (OSError, ValueError) as caught:
            error = caught
        # All end together, and none waits for another that is gone.
        outcomes = all_gather_object((mine, error and str(error)))
        if error is not None:
            raise error
        for _, said in outcomes:
            if said is not None:
                raise ValueError(said)
        found = Findings.merged([findings for findings, _ in outcomes])
        self._refuse(runner, found)
        if _TRAINING in loaders:
            _warn(runner, found, loaders[_TRAINING].dataset)
        counts = ((found.label_maps, 'label maps'), (found.images, 'images'))
        said = ' and '.join(f'{count:,} {what}' for count, what in counts if count)
        if said:
            runner.logger.info(f'Checked {said} in {time.monotonic() - begin:.1f} s.')
        return found

    def _check_share(self, runner, loaders):
        """Check this process's share.

        Returns:
            Findings: Of this process.
        """
        model = runner.model
        check_windows(model)
        found = []
        for field, loader in loaders.items():
            name = f'{field}.dataset'
            check_outputs(model, loader.dataset, name)
            check_class_order(loader.dataset, name)
            skip = self.on_error == 'skip' and field == _TRAINING
            findings = examine(
                loader.dataset,
                name,
                self.decode,
                self.images,
                self.workers,
                **expected_labels(model),
                share=(get_rank(), get_world_size()),
                most=(lambda n: self.max_share * n) if skip else (lambda n: _ENOUGH),
                progress=_Progress(runner.logger),
            )
            found.append(findings)
        return Findings.merged(found)

    def _refuse(self, runner, found):
        """End the training if there is what may not be left out."""
        skip = self.on_error == 'skip'
        ending = [
            problem
            for problem in found.problems
            if not (skip and problem.dataset.startswith(_TRAINING))
        ]
        if ending:
            first, said = ending[0], ending[0].said
            if len(ending) > 1:
                said += f'; and {len(ending) - 1} more'
                path = _write(runner, 'unfit_files.txt', _lines(ending), 'w')
                said += f', listed in {path}' if path else ''
            if skip:
                said += (
                    "; on_error='skip' leaves out training samples alone, because "
                    f'without this one the results on {first.dataset} would be others'
                )
            raise first._replace(said=said).error
        counts = Counter(problem.dataset for problem in found.problems)
        for name, count in counts.items():
            size = found.sizes[name]
            if count > self.max_share * size or count >= size:
                first = next(p for p in found.problems if p.dataset == name)
                raise ValueError(
                    f'{count} or more of the {size} samples of {name} cannot be used, '
                    f"and on_error='skip' leaves out max_share={self.max_share} of "
                    f'them at most; the first: {first.said}'
                )

    def _guard(self, runner, loaders):
        """Name the files that go bad from here on, or replace them."""
        for name, loader in loaders.items():
            skip = self.on_error == 'skip' and name == _TRAINING
            for path, part in leaves(loader.dataset, f'{name}.dataset'):
                check = SampleCheck(
                    part,
                    path,
                    self.decode,
                    self.images,
                    **expected_labels(runner.model),
                )
                if check.samples:
                    guard_samples(check, skip)

    def _leave_out(self, runner, problems):
        bad = {}
        for problem in problems:
            bad.setdefault(problem.dataset, set()).add(problem.index)
        for path, part in leaves(
            runner.train_dataloader.dataset, f'{_TRAINING}.dataset'
        ):
            unfit = bad.get(path, set()) - {None}
            if unfit or hasattr(getattr(part, 'get_data_info', None), 'original'):
                replace_samples(part, unfit)
        listed = Path(runner.work_dir, 'skipped_files.txt')
        if not problems:
            if is_main_process():
                # Of an earlier start, since when they were mended.
                listed.unlink(missing_ok=True)
            return
        _write(runner, listed.name, _lines(problems), 'w')
        some = '; '.join(problem.said for problem in problems[:3])
        more = ' ...' if len(problems) > 3 else ''
        runner.logger.warning(
            f'{len(problems)} of {self._samples:,} training samples cannot be used, '
            f'and the ones after them take their places: {some}{more}. All are in '
            f'{listed}.'
        )


class _Progress:
    """Tells how far a look at many files is.

    Args:
        logger (Logger): Whom.
    """

    def __init__(self, logger):
        self.logger = logger
        self.begin = time.monotonic()
        self.next = _PATIENCE
        self.name = None

    def __call__(self, name, done, total):
        now = time.monotonic()
        if name != self.name:
            # The next data set.
            self.name, self.begin, self.next = name, now, _PATIENCE
        passed = now - self.begin
        if passed > self.next and 0 < done < total:
            self.next = passed + _INTERVAL
            self.logger.info(
                f'Looked at {done:,} of {total:,} files of {name} so far, about '
                f'{passed * (total - done) / done:.0f} s more.'
            )


def _warn(runner, found, dataset):
    """Tell of what is odd in training data and no reason to stop."""
    for name, part in leaves(dataset, f'{_TRAINING}.dataset'):
        if name not in found.classes:
            continue
        counts = found.classes[name]
        classes = getattr(part, 'metainfo', {}).get('classes') or ()
        lacking = [str(c) for label, c in enumerate(classes) if label not in counts]
        if lacking:
            what, hint = 'samples', ''
            if hasattr(part, 'seg_map_suffix'):
                what = 'pixels'
                hint = (
                    f' Labels are {Labels(part)}: masks of 0 and 255, such as other '
                    'programs write for two classes, have to be written as 0 and 1.'
                )
            runner.logger.warning(
                f'{name} has no {what} of {len(lacking)} of its {len(classes)} '
                f'classes: {", ".join(lacking[:5])}{", ..." if lacking[5:] else ""}.'
                f'{hint}'
            )
    if found.dark:
        runner.logger.warning(
            f'{len(found.dark)} or more images of 16 bits are almost black when they '
            f'are loaded with 8 bits, such as {found.dark[0]}: their values are below '
            '4096 of 65536. Multiply them by 16 and write the files anew.'
        )


def _lines(problems):
    return [(problem.path, problem.said) for problem in problems]


def _write(runner, name, lines, mode):
    """Write paths and reasons into the work folder; return the path, if it could be.

    What is found in the beginning all processes know, and the main one writes it;
    what is found later each appends.
    """
    path = Path(runner.work_dir, name)
    if mode == 'w' and not is_main_process():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Names of files may be of any bytes.
        with open(path, mode, encoding='utf-8', errors='surrogateescape') as file:
            file.write(''.join(f'{image}\t{said}\n' for image, said in lines))
    except OSError as error:
        runner.logger.warning(f'{path} could not be written: {error}.')
        return None
    return path


def _renew(loop):
    """Let workers that have begun already know what stands in for bad samples.

    An iteration-based loop makes its iterator when it is built, and the workers of
    that have copies of the data set.
    """
    loader = getattr(loop, 'dataloader', None)
    if not getattr(loader, 'num_workers', 0):
        return
    iterator = getattr(loop, 'dataloader_iterator', None)
    # Of persistent workers; it has no public name.
    if getattr(loader, '_iterator', None) is not None:
        loader._iterator = None
    if iterator is None:
        return
    loop.dataloader_iterator = None
    sampler = loader.sampler
    if type(sampler) is InfiniteSampler:
        # It goes on where it was left, and those workers have taken from it.
        sampler.__init__(sampler.dataset, sampler.shuffle, sampler.seed)
    with torch.random.fork_rng(devices=[]):
        loop.dataloader_iterator = type(iterator)(loader)
