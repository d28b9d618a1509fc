"""Tables and pictures of the digits demo."""

import contextlib
import io
import json
import logging

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import MaxNLocator
from mmengine.config import Config
from mmengine.runner import Runner, find_latest_checkpoint
from rich.table import Table

from mdeq_mm.utils.checkpoint import allow_runner_checkpoints
from mdeq_mm.utils.saved_bytes import saved_bytes_per_image

COLUMNS = (
    ('parameters', '{:,.0f}'),
    ('test accuracy, %', '{:.2f}'),
    ('training time / ResNet', '{:.2f}'),
    ('kept for backward, kB an image', '{:.0f}'),
    ('evaluations of f, mean', '{:.1f}'),
)

NOTE = (
    'The MDEQ evaluates f once more in the backward pass instead of keeping what it '
    'computed (with_cp=True); the others keep all.'
)


def report(runs, data_root, out_dir):
    """Evaluate trained models and write table and pictures.

    Args:
        runs (dict): Label to (config file, work dir, training seconds, curve of
            (epoch, accuracy) pairs). One label is ``'ResNet'``.
        data_root (Path): Folder of the digits.
        out_dir (Path): Where ``results.md``, ``results.json``, ``curves.png`` and
            ``predictions.png`` go.

    Returns:
        rich.table.Table: The results.
    """
    allow_runner_checkpoints()
    rows, residuals, samples = {}, None, None
    for label, (config, work_dir, seconds, _) in runs.items():
        result = evaluate(config, work_dir, data_root)
        rows[label] = [
            result['parameters'],
            result['accuracy'],
            seconds / runs['ResNet'][2],
            result['kept'] / 1e3,
            result['evaluations'],
        ]
        if result['trace'] is not None:
            residuals, samples = result['trace'], result['samples']
    out_dir.mkdir(parents=True, exist_ok=True)
    _write_tables(rows, out_dir)
    _draw_curves({k: r[3] for k, r in runs.items()}, residuals, out_dir / 'curves.png')
    _draw_predictions(samples, out_dir / 'predictions.png')
    return _rich_table(rows)


def evaluate(config, work_dir, data_root):
    """Figures of one trained model on the test set.

    Returns:
        dict: ``parameters``, ``accuracy`` in percent, bytes ``kept`` an image;
        for an MDEQ mean ``evaluations``, the ``trace`` of residuals (steps, N)
        and ``samples`` (image, label, prediction, confidence), else None.
    """
    cfg = Config.fromfile(config)
    cfg.work_dir = str(work_dir / 'evaluation')
    cfg.test_dataloader.dataset.data_root = str(data_root)
    cfg.load_from = find_latest_checkpoint(str(work_dir))
    cfg.log_level = logging.ERROR
    # mmengine prints where it loads from whatever the log level is.
    with contextlib.redirect_stdout(io.StringIO()):
        runner = Runner.from_cfg(cfg)
        runner.load_or_resume()
        loader = runner.test_dataloader
    model = runner.model
    device = next(model.parameters()).device

    model.eval()
    layer = getattr(model.backbone, 'equilibrium', None)
    if layer is not None:
        layer.trace = True
    steps, traces, samples = [], [], []
    for batch in loader:
        images = batch['inputs']
        with torch.no_grad():
            predictions = model.test_step(batch)
        for image, p in zip(images, predictions, strict=True):
            score, label = p.pred_score.max(0)
            samples.append((image[0], int(p.gt_label), int(label), float(score)))
        if layer is not None:
            steps.append(layer.last_solution.steps)
            traces.append(layer.last_solution.trace)
    size = (cfg.model.backbone.in_channels, 32, 32)
    # Last, because batch norms take in what passes through them in training.
    model.train()
    kept = saved_bytes_per_image(
        lambda n: model(torch.rand(n, *size, device=device), mode='tensor')
    )
    correct = sum(truth == guess for _, truth, guess, _ in samples)
    return dict(
        parameters=sum(p.numel() for p in model.parameters()),
        accuracy=100 * correct / len(samples),
        kept=kept,
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


def _cells(row):
    return [
        '–' if value is None else form.format(value)
        for value, (_, form) in zip(row, COLUMNS, strict=True)
    ]


def _rich_table(rows):
    table = Table(
        title='Handwritten digits, 32x32 pixels, 30 epochs',
        caption=NOTE,
        title_style='',
        caption_style='dim',
    )
    table.add_column('model')
    for name, _ in COLUMNS:
        table.add_column(name, justify='right')
    for label, row in rows.items():
        table.add_row(label, *_cells(row))
    return table


def _write_tables(rows, out_dir):
    names = [name for name, _ in COLUMNS]
    lines = [
        f'| model | {" | ".join(names)} |',
        f'| --- |{" ---: |" * len(names)}',
        *(f'| {label} | {" | ".join(_cells(row))} |' for label, row in rows.items()),
    ]
    (out_dir / 'results.md').write_text('\n'.join(lines) + f'\n\n{NOTE}\n')
    content = {k: dict(zip(names, row, strict=True)) for k, row in rows.items()}
    (out_dir / 'results.json').write_text(json.dumps(content, indent=2) + '\n')


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
