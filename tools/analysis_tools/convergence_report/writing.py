"""Figures as tables, for the terminal and in Markdown, and as JSON."""

import json
import math
from dataclasses import dataclass

from rich.table import Table


@dataclass
class Section:
    """One table.

    Attributes:
        title (str): Above it.
        header (list[str]): Names of the columns.
        rows (list[list[str]]): Their cells.
        notes (list[str]): Said below it, a sentence each.
    """

    title: str
    header: list
    rows: list
    notes: list

    def show(self, console):
        """Print it.

        Args:
            console (rich.console.Console): Where to.
        """
        # Title and caption of the table would be no wider than it is.
        console.print(self.title, style='bold', highlight=False)
        table = Table()
        for i, name in enumerate(self.header):
            table.add_column(name, justify='right' if i else 'left')
        for row in self.rows:
            table.add_row(*row)
        console.print(table)
        for note in self.notes:
            console.print(note, highlight=False)
        console.print()

    def markdown(self):
        """str: A heading, the table and the notes."""
        lines = [
            f'## {self.title}',
            '',
            f'| {" | ".join(self.header)} |',
            f'| --- |{" ---: |" * (len(self.header) - 1)}',
            *(f'| {" | ".join(row)} |' for row in self.rows),
        ]
        if self.notes:
            lines += ['', ' '.join(self.notes)]
        return '\n'.join(lines) + '\n'


def sections(figures):
    """The tables of some figures.

    Args:
        figures (dict): Of :meth:`Study.figures`.

    Returns:
        list[Section]: Those that there are figures for.
    """
    found = [_evaluation(figures), _by_limit(figures)]
    if figures['radius'] is not None:
        found.append(_radius(figures))
    if figures['starts'] is not None:
        found.append(_starts(figures))
    return found


def _evaluation(figures):
    solver, found = figures['solver'], figures['evaluation']
    residual, evaluations = found['residual'], found['evaluations']
    kind = dict(rel='relative', abs='absolute')[solver['norm']]
    shares = found['shares']
    said = []
    if shares['converged'] == 0:
        why = '' if solver['tol'] else ', as nothing does without a tolerance'
        said.append(f'No image converged{why}.')
    ends = [f'{percent(v)} {ending(k)}' for k, v in shares.items() if v]
    said.append(f'Of the images, {", ".join(ends)}.')
    said.append(f'{evaluations["mean"]:.1f} evaluations on average.')
    scores = figures['scores']
    said += [f'{k}: {scores["evaluation"][k]:.2f}.' for k in scores['shown']]
    return Section(
        f'{solver["type"]}, tolerance {solver["tol"]:g}, at most '
        f'{solver["max_steps"]} evaluations: {len(figures["images"])} images',
        ['share of images', *residual],
        [
            [f'{kind} residual of no more than', *map(small, residual.values())],
            ['evaluations of no more than', *(str(evaluations[k]) for k in residual)],
        ],
        said,
    )


def _by_limit(figures):
    trace, shown = figures['trace'], figures['scores']['shown']
    rows = []
    for metrics in figures['scores']['by_limit']:
        limit = metrics['limit']
        # All may have diverged before.
        at = min(limit, len(trace['50%'])) - 1
        rows.append([
            str(limit),
            *(small(trace[share][at]) for share in ('50%', '95%')),
            *(f'{metrics[name]:.2f}' for name in shown),
        ])  # fmt: skip
    return Section(
        'By the limit of evaluations, without a tolerance',
        ['evaluations', 'residual, median', 'residual, 95%', *shown],
        rows,
        [
            'Residuals are those of the last evaluation.',
            'Predictions are made of the state with the lowest residual so far; with '
            'one evaluation that is the start.',
        ],
    )


def _radius(figures):
    found = figures['radius']
    notes = []
    if found['not_converged']:
        notes.append(
            f'{found["not_converged"]} of them with a residual above {found["tol"]:g} '
            f'after {figures["solver"]["max_steps"]} evaluations, not at an '
            'equilibrium.'
        )
    return Section(
        'Spectral radius of the Jacobian, at the state with the lowest residual',
        ['images', 'median', 'largest', 'at least 1'],
        [[
            str(found['images']),
            f'{found["median"]:.3f}',
            f'{found["largest"]:.3f}',
            percent(found['at_least_one']),
        ]],
        notes,
    )  # fmt: skip


def _starts(figures):
    found, images = figures['starts'], len(figures['images'])
    count, limit = found['random_starts'], found['threshold']
    failed = [
        f'{found["zero_not_converged"]} of {images} solves from zero',
        f'{found["random_not_converged"]} of {images * count} from random numbers',
    ]
    notes = [
        f'Largest distance between two equilibria of an image, from zero and '
        f'{count} random start{"s" if count > 1 else ""}, in norms of z*.',
        f'Only starts that reached a relative residual of {found["tol"]:g} within '
        f'{found["max_steps"]} evaluations count; {" and ".join(failed)} did not.',
        f'A distance above {limit:g}, the larger of 10 tolerances and 1 %, speaks for '
        'different equilibria.',
    ]
    notes += _doubts(figures)
    if not found['judged']:
        notes.insert(0, 'No image has two starts that converged.')
    values = (found['median'], found['largest'])
    return Section(
        'Equilibria from different starts',
        ['images with two or more', 'median', 'largest', f'above {limit:g}'],
        [[
            f'{found["judged"]} of {images}',
            *('–' if v is None else small(v) for v in values),
            '–' if found['above'] is None else percent(found['above']),
        ]],
        notes,
    )  # fmt: skip


def _doubts(figures):
    """What to bear in mind where f contracts slowly."""
    starts, radius = figures['starts'], figures['radius']
    if radius is None or not starts['above']:
        return []
    # z - z* is (f(z) - z) / (1 - radius) along the slowest direction.
    left = max(1 - radius['median'], 0)
    if 2 * starts['tol'] <= starts['threshold'] * left:
        return []
    apart = f' {2 * starts["tol"] / left:.2g}' if left else ' anything'
    return [
        f'But with a spectral radius of {radius["median"]:.3f} (median) two states of '
        f'that residual may be{apart} apart on the way to the same equilibrium; a '
        'lower --tol with a higher --max-steps tells.'
    ]


def ending(status):
    """The name of a status as a verb."""
    return dict(max_steps='stopped at the limit').get(status, status)


def small(value):
    """A residual or distance as a text."""
    return f'{value:.1e}' if math.isfinite(value) and value else f'{value:g}'


def percent(share):
    """A share as a text that says 100 % of nothing less, and 0 % of nothing more."""
    inside = min(max(share, 0.001), 0.999)
    text = f'{share if share in (0, 1) else inside:.1%}'
    return text.replace('.0%', '%').replace('%', ' %')


def to_json(figures):
    """Figures as a text; what is not finite becomes null, which JSON lacks a name for.

    Args:
        figures (dict): Of :meth:`Study.figures`.
    """

    def finite(value):
        if isinstance(value, dict):
            return {k: finite(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [finite(v) for v in value]
        if isinstance(value, float) and not math.isfinite(value):
            return None
        return value

    return json.dumps(finite(figures), indent=2) + '\n'
