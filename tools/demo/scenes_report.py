"""Results and picture of the segmentation of scenes."""

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import torch
from evaluation import Trained
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from tables import Results

from mdeq_mm.apis.anytime import predict_by_evaluation

COLUMNS = {
    'parameters': '{:,.0f}',
    'mIoU, %': '{:.2f}',
    'pixel accuracy, %': '{:.2f}',
    'training time / HRNet': '{:.2f}',
    'kept for backward, kB an image': '{:.0f}',
    'evaluations of f, mean': '{:.1f}',
}

NOTE = (
    'What the MDEQ keeps is the three evaluations of f that its gradient goes through.'
)

# After how many evaluations of f predictions are shown, beside those after all.
SHOWN = (1, 2, 4)


def report(trainings, out_dir):
    """Evaluate trained segmentors and draw a picture.

    Args:
        trainings (list[Training]): What was trained, an MDEQ and an ``'HRNet'`` among
            them.
        out_dir (Path): Where ``segmentation.png`` goes.

    Returns:
        Results: The figures.
    """
    seconds = {t.label: t.read()[0] for t in trainings}
    rows = {}
    for training in trainings:
        trained = Trained(training)
        scores, evaluations = evaluate(trained)
        if trained.layer is not None:
            draw(trained, out_dir / 'segmentation.png')
        rows[training.label] = [
            trained.parameters,
            float(scores['mIoU']),
            float(scores['aAcc']),
            seconds[training.label] / seconds['HRNet'],
            trained.kept_bytes(64) / 1e3,
            evaluations,
        ]
    epochs = trained.cfg.train_cfg.max_epochs
    title = f'Segmentation of scenes of digits, 64x64 pixels, {epochs} epochs'
    return Results(title, COLUMNS, rows, NOTE)


def evaluate(trained):
    """Metrics on the test set, and mean evaluations of f, None where there is no f."""
    steps = []
    for batch, predictions in trained.predict():
        trained.evaluator.process(
            data_samples=[p.to_dict() for p in predictions], data_batch=batch
        )
        if trained.layer is not None:
            steps.append(trained.layer.last_solution.steps)
    scores = trained.evaluator.evaluate(len(trained.loader.dataset))
    return scores, float(torch.cat(steps).float().mean()) if steps else None


def draw(trained, path, rows=5):
    """Test scenes, and what is predicted of them on the way to the equilibrium."""
    images, truths, snapshots = [], [], []
    for batch in trained.loader:
        images += [image[0] for image in batch['inputs']]
        truths += [s.gt_sem_seg.data[0] for s in batch['data_samples']]
        snapshots += predict_by_evaluation(trained.model, batch)
    classes = trained.loader.dataset.metainfo['classes']
    colors = ListedColormap(
        torch.tensor(trained.loader.dataset.metainfo['palette']).numpy() / 255
    )

    fig, axes = plt.subplots(
        rows, 3 + len(SHOWN), figsize=(9.5, 1.85 * rows + 0.9), layout='constrained'
    )
    fig.suptitle(
        'MDEQ on test scenes, by evaluations of f (mIoU: of the whole test set)'
    )
    titles = ['image', 'truth']
    for count in (*SHOWN, None):
        after = [_after(shots, count).labels for shots in snapshots]
        score = 100 * mean_iou(after, truths, len(classes))
        when = 'after all' if count is None else f'after {count}'
        titles.append(f'{when}\nmIoU {score:.1f} %')
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    shown = range(0, len(images), max(1, len(images) // rows))
    for row, i in zip(axes, shown, strict=False):
        row[0].imshow(images[i], cmap='gray', vmin=0, vmax=255)
        shots = [_after(snapshots[i], count) for count in (*SHOWN, None)]
        for axis, labels in zip(
            row[1:], [truths[i], *(s.labels for s in shots)], strict=True
        ):
            axis.imshow(
                labels,
                cmap=colors,
                vmin=-0.5,
                vmax=colors.N - 0.5,
                interpolation='none',
            )
        for axis, shot in zip(row[2:], shots, strict=True):
            axis.set_xlabel(f'residual {shot.residual:.1g}', fontsize=8)
        row[-1].set_xlabel(
            f'{shots[-1].evaluations} evaluations\nresidual {shots[-1].residual:.1g}',
            fontsize=8,
        )
    fig.legend(
        handles=[Patch(color=colors(i), label=classes[i]) for i in range(len(classes))],
        loc='outside lower center',
        ncols=len(classes),
        fontsize=8,
        handlelength=1,
        columnspacing=1,
    )
    fig.savefig(path, dpi=120)
    plt.close(fig)


def _after(snapshots, count):
    """The snapshot after so many evaluations, the last where there were fewer."""
    return snapshots[-1 if count is None else min(count, len(snapshots)) - 1]


def mean_iou(predictions, truths, classes):
    """Mean over the classes of intersection over union, of lists of label maps."""
    pairs = torch.stack(truths).long() * classes + torch.stack(predictions).cpu()
    counts = torch.bincount(pairs.flatten(), minlength=classes**2)
    counts = counts.view(classes, classes).double()
    both = counts.diag()
    either = counts.sum(0) + counts.sum(1) - both
    return float((both / either)[either > 0].mean())
