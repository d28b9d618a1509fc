"""Results and pictures of the classification of digits."""

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import torch
from evaluation import Trained
from matplotlib.ticker import MaxNLocator
from tables import Results

COLUMNS = {
    'parameters': '{:,.0f}',
    'test accuracy, %': '{:.2f}',
    'training time / ResNet': '{:.2f}',
    'kept for backward, kB an image': '{:.0f}',
    'evaluations of f, mean': '{:.1f}',
}

NOTE = (
    'The MDEQ evaluates f once more in the backward pass instead of keeping what it '
    'computed (with_cp=True); the others keep all.'
)


def report(trainings, out_dir):
    """Evaluate trained classifiers and draw pictures.

    Args:
        trainings (list[Training]): What was trained, an MDEQ and a ``'ResNet'`` among
            them.
        out_dir (Path): Where ``curves.png`` and ``predictions.png`` go.

    Returns:
        Results: The figures.
    """
    logged = {t.label: t.read() for t in trainings}
    rows, residuals, samples = {}, None, None
    for training in trainings:
        result = evaluate(training)
        rows[training.label] = [
            result['parameters'],
            result['accuracy'],
            logged[training.label][0] / logged['ResNet'][0],
            result['kept'] / 1e3,
            result['evaluations'],
        ]
        if result['trace'] is not None:
            residuals, samples = result['trace'], result['samples']
    curves = {label: curve for label, (_, curve) in logged.items()}
    _draw_curves(curves, residuals, out_dir / 'curves.png')
    _draw_predictions(samples, out_dir / 'predictions.png')
    title = 'Handwritten digits, 32x32 pixels, 30 epochs'
    return Results(title, COLUMNS, rows, NOTE)


def evaluate(training):
    """Figures of one trained classifier on the test set.

    Returns:
        dict: ``parameters``, ``accuracy`` in percent, bytes ``kept`` an image;
        for an MDEQ mean ``evaluations``, the ``trace`` of residuals (steps, N),
        else None; ``samples`` (image, label, prediction, confidence).
    """
    trained = Trained(training)
    layer = trained.layer
    if layer is not None:
        layer.trace = True
    steps, traces, samples = [], [], []
    for batch, predictions in trained.predict():
        for image, p in zip(batch['inputs'], predictions, strict=True):
            score, label = p.pred_score.max(0)
            samples.append((image[0], int(p.gt_label), int(label), float(score)))
        if layer is not None:
            steps.append(layer.last_solution.steps)
            traces.append(layer.last_solution.trace)
    correct = sum(truth == guess for _, truth, guess, _ in samples)
    return dict(
        parameters=trained.parameters,
        accuracy=100 * correct / len(samples),
        kept=trained.kept_bytes(32),
        evaluations=float(torch.cat(steps).float().mean()) if steps else None,
        trace=_join(traces) if traces else None,
        samples=samples,
    )


def _join(traces):
    """Traces of batches, of different lengths, as one (steps, N)."""
    longest = max(len(t) for t in traces)
    padded = [
        torch.nn.functional.pad(t, (0, 0, 0, longest - len(t)), value=float('nan'))
        for t in traces
    ]
    return torch.cat(padded, dim=1)


def _draw_curves(curves, residuals, path):
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout='constrained')
    for label, curve in curves.items():
        epochs, accuracy = zip(*curve, strict=True)
        left.plot(epochs, accuracy, marker='o', markersize=3, label=label)
    left.set(xlabel='epoch', ylabel='test accuracy, %', title='Accuracy')
    left.set_ylim(top=100.5)
    left.legend(loc='lower right')

    steps = torch.arange(1, len(residuals) + 1)
    # A sample that is done keeps the residual it ended with.
    kept = residuals.clone()
    for row in range(1, len(kept)):
        kept[row] = torch.where(kept[row].isnan(), kept[row - 1], kept[row])
    for q, style in ((0.95, '--'), (0.5, '-'), (0.05, ':')):
        right.semilogy(
            steps, kept.quantile(q, dim=1), style, color='C0', label=f'{q:.0%} quantile'
        )
    right.set(
        xlabel='evaluations of f',
        ylabel='relative residual',
        title='The solver of the MDEQ on the test images',
    )
    right.legend()
    for axis in (left, right):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def _draw_predictions(samples, path, rows=4, columns=10):
    """All errors first, then images from all over the test set."""
    wrong = [s for s in samples if s[1] != s[2]]
    right = [s for s in samples if s[1] == s[2]]
    room = max(rows * columns - len(wrong), 0)
    picked = wrong + right[:: max(1, len(right) // max(room, 1))]
    fig, axes = plt.subplots(
        rows, columns, figsize=(columns, rows * 1.35), layout='constrained'
    )
    fig.suptitle(
        f'MDEQ on test images: {len(wrong)} errors among {len(samples)}, shown first'
    )
    for axis in axes.flat:
        axis.axis('off')
    for axis, (image, truth, guess, score) in zip(axes.flat, picked, strict=False):
        axis.imshow(image, cmap='gray')
        text = f'{guess}  {score:.0%}'
        if guess != truth:
            text += f'\ntrue: {truth}'
        axis.set_title(text, fontsize=8, color='C3' if guess != truth else 'black')
    fig.savefig(path, dpi=120)
    plt.close(fig)
