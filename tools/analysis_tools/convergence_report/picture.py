"""The picture of a report."""

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from .writing import ending

# Of a histogram, at most.
BINS = 30


def draw(figures, title, path):
    """Draw residuals, scores and evaluations.

    Args:
        figures (dict): Of :meth:`Study.figures`.
        title (str): Above the picture.
        path (Path): Where to.
    """
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout='constrained')
    figure.suptitle(title)
    draw_trace(axes[0, 0], figures)
    draw_scores(axes[0, 1], figures)
    draw_residuals(axes[1, 0], figures)
    draw_evaluations(axes[1, 1], figures)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_trace(axis, figures):
    """Quantiles of the residual over evaluations."""
    lines = {k: _drawable(v) for k, v in figures['trace'].items()}
    steps = np.arange(1, len(lines['50%']) + 1)
    for low, high, alpha in (('5%', '95%', 0.2), ('25%', '75%', 0.3)):
        axis.fill_between(
            steps,
            lines[low],
            lines[high],
            color='C0',
            alpha=alpha,
            linewidth=0,
            label=f'{low[:-1]} to {high} of images',
        )
    axis.plot(steps, lines['50%'], color='C0', marker='.', label='median')
    # A logarithmic axis needs something to show.
    if np.isfinite([*lines.values()]).any():
        axis.set_yscale('log')
        _mark_tolerance(axis.axhline, figures)
    axis.set(
        xlabel='evaluations of f',
        ylabel='residual',
        title='Residual of each evaluation, without a tolerance',
    )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _finish(axis)


def draw_scores(axis, figures):
    """Scores over the limit of evaluations."""
    scores = figures['scores']
    limits = [metrics['limit'] for metrics in scores['by_limit']]
    for name in scores['shown']:
        values = [metrics[name] for metrics in scores['by_limit']]
        (line,) = axis.plot(limits, values, marker='o', label='without a tolerance')
        axis.axhline(
            scores['evaluation'][name],
            color=line.get_color(),
            linestyle='--',
            linewidth=1,
            label=f'tolerance {figures["solver"]["tol"]:g}',
        )
    axis.set(
        xlabel='limit of evaluations of f',
        ylabel=' and '.join(scores['shown']) or 'no figure in test_evaluator',
        title='Score by the limit of evaluations',
    )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _finish(axis)


def draw_residuals(axis, figures):
    """Histogram of the residuals."""
    residuals = np.array([image['residual'] for image in figures['images']])
    shown = residuals[np.isfinite(residuals) & (residuals > 0)]
    if len(shown):
        axis.set_xscale('log')
        # An edge where the tolerance is, so that no bar reaches over it.
        edge = figures['solver']['tol'] or shown.max()
        low, high = np.log10(shown.min() / edge), np.log10(shown.max() / edge)
        width = max((high - low) / min(BINS, 10 + len(shown) // 10), 0.01)
        first, last = np.floor(low / width), np.ceil(high / width)
        bins = edge * 10 ** (width * np.arange(first, max(last, first + 1) + 1))
        axis.hist(shown, bins, color='C0', edgecolor='white', linewidth=0.5)
        _mark_tolerance(axis.axvline, figures)
    left = len(residuals) - len(shown)
    axis.set(
        xlabel='residual' + (f' ({left} not shown: zero or infinite)' if left else ''),
        ylabel='images',
        title='Residual with the tolerance',
    )
    # Within one power of ten it is these that have labels.
    axis.tick_params(axis='x', which='minor', labelsize=7)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.margins(y=0.2)
    _finish(axis)


def draw_evaluations(axis, figures):
    """Histogram of the evaluations, by how the solves ended."""
    images = figures['images']
    kinds = [k for k, share in figures['evaluation']['shares'].items() if share]
    counts = [
        [i['evaluations'] for i in images if i['status'] == kind] for kind in kinds
    ]
    every = [i['evaluations'] for i in images]
    width = max(1, -(-(max(every) - min(every) + 1) // BINS))
    bins = np.arange(min(every), max(every) + width + 1, width) - 0.5
    names = [
        f'{ending(kind)} ({len(c)})' for kind, c in zip(kinds, counts, strict=True)
    ]
    axis.hist(counts, bins, stacked=True, label=names, edgecolor='white', linewidth=0.5)
    axis.set(
        xlabel='evaluations of f',
        ylabel='images',
        title='Evaluations with the tolerance',
    )
    axis.set_xlim(0.5, max(*every, figures['solver']['max_steps']) + 0.5)
    # Room for the legend.
    axis.margins(y=0.2)
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _finish(axis)


def _drawable(values):
    """Values for a logarithmic axis, with gaps where there is no place for them."""
    values = np.array(values)
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def _mark_tolerance(line, figures):
    tol = figures['solver']['tol']
    if tol:
        line(tol, color='0.3', linestyle='--', linewidth=1, label=f'tolerance {tol:g}')


def _finish(axis):
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=9)
