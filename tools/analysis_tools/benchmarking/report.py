"""Table, files and picture of a run."""

import json

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from rich.box import SIMPLE
from rich.table import Table

from .cases import REFERENCE
from .measure import PARTS

COLOURS = dict(mmpretrain='0.6', MDEQ='C0', torchdeq='C1')
TITLE = 'Seconds a batch, and in brackets the ratio to {}'
NOTES = """\
Times are medians of {rounds} interleaved round(s); a step is forward, backward, SGD.
Training evaluates f "forward + again in the backward pass" times and takes "products"
with its Jacobian; the residual is relative, the largest of the batch, after the
evaluations of inference. Kept is what autograd saves for the backward pass, the slope
between batches of 2 and 3; peak is the memory one step takes beyond the ready model."""


def summarise(results):
    """Add the ratios to the reference.

    Args:
        results (dict): Label to a dict with ``seconds``; changed in place.
    """
    reference = results[REFERENCE]['seconds']
    for result in results.values():
        result['ratios'] = {p: result['seconds'][p] / reference[p] for p in PARTS}


def _megabytes(value):
    return '–' if value is None else f'{value / 1e6:.1f}'


def _cells(result):
    times = [f'{result["seconds"][p]:.3g} ({result["ratios"][p]:.2f})' for p in PARTS]
    of_f = ['–'] * 4
    if result['forward'] is not None:
        of_f = [
            f'{result["forward"]} + {result["again"]}',
            str(result['products']),
            str(result['evaluations']),
            f'{result["residual"]:.0e}',
        ]
    return [
        *times,
        *of_f,
        _megabytes(result['kept']),
        _megabytes(result['peak']),
        f'{result["parameters"] / 1e6:.1f}',
        f'{result["flops"] / 1e9:.3g}',
    ]


COLUMNS = (
    *PARTS,
    'f in\ntraining',
    'products',
    'f in\ninference',
    'residual',
    'kept, MB\nan image',
    'peak,\nMB',
    'param.,\nM',
    'GFLOP\nan image',
)


def rich_table(run):
    """The results for a console.

    Args:
        run (dict): As written to ``results.json``.

    Returns:
        rich.table.Table: One row a case.
    """
    table = Table(
        title=TITLE.format(REFERENCE), title_style='', box=SIMPLE, padding=(0, 0, 0, 1)
    )
    table.add_column('model', min_width=24)
    for name in COLUMNS:
        table.add_column(name, justify='right', no_wrap=True)
    group = None
    for label, result in run['cases'].items():
        if group not in (None, result['group']):
            table.add_section()
        group = result['group']
        table.add_row(label, *_cells(result))
    return table


def notes(run):
    """list[str]: What stands below the table."""
    lines = [NOTES.format(rounds=run['rounds'])]
    for name, found in run['overhead'].items():
        if name == 'f':
            lines.append(
                f'One evaluation of f takes {found["seconds"] * 1e3:.3g} ms; the '
                'spectral radius of its Jacobian at the equilibrium is '
                f'{found["radius"]:.2f}.'
            )
        else:
            lines.append(
                f'{name}: the solve takes {found["overhead"]:.2f} times its '
                'evaluations of f.'
            )
    return lines + run['remarks']


def write(run, folder):
    """Write ``results.md``, ``results.json`` and ``results.png``.

    Args:
        run (dict): Everything that was found.
        folder (Path): Where to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f'| {k} | {" | ".join(_cells(r))} |' for k, r in run['cases'].items()]
    options = ', '.join(f'{k} {v}' for k, v in run['settings'].items())
    names = ' | '.join(COLUMNS).replace('\n', ' ')
    lines = [
        f'{TITLE.format(REFERENCE)}.',
        '',
        f'| model | {names} |',
        f'| --- |{" ---: |" * len(COLUMNS)}',
        *rows,
        '',
        *[f'{line}\n' for line in notes(run)],
        f'Settings: {options}.\n',
        *[f'- {name}: {value}' for name, value in run['machine'].items()],
    ]
    (folder / 'results.md').write_text('\n'.join(lines) + '\n')
    (folder / 'results.json').write_text(json.dumps(run, indent=2) + '\n')
    draw(run['cases'], folder / 'results.png')


def draw(cases, path):
    """Bars of step time, inference time and kept bytes."""
    labels = list(cases)
    panels = {
        f'training step / {REFERENCE}': [r['ratios']['step'] for r in cases.values()],
        f'inference / {REFERENCE}': [r['ratios']['inference'] for r in cases.values()],
        'kept for backward, MB an image': [r['kept'] / 1e6 for r in cases.values()],
    }
    colours = [COLOURS[r['group']] for r in cases.values()]
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(14, 1.4 + 0.33 * len(labels)),
        sharey=True,
        layout='constrained',
    )
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        bars = axis.barh(labels, values, color=colours)
        axis.axvline(
            values[labels.index(REFERENCE)], color='0.3', lw=0.8, ls='--', zorder=0
        )
        for text in axis.bar_label(bars, fmt='{:.3g}', padding=3, fontsize=8):
            # Numbers stay readable where the line passes.
            text.set_bbox(dict(facecolor='white', edgecolor='none', pad=0.5))
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.14, y=0.01)
        axis.spines[['top', 'right']].set_visible(False)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=110)
    plt.close(figure)
