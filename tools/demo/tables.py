"""Results as a table in the terminal, in Markdown, and as numbers."""

from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table


@dataclass
class Results:
    """Figures of several models.

    Attributes:
        title (str): What was measured.
        columns (dict[str, str]): Name of each figure, to how it is written, as for
            ``str.format``.
        rows (dict[str, list]): Figures of each model by its label, None where there
            is none.
        note (str): Said below the table.
    """

    title: str
    columns: dict
    rows: dict
    note: str = ''

    def cells(self, label):
        """The figures of a model as texts."""
        return [
            '–' if value is None else form.format(value)
            for value, form in zip(self.rows[label], self.columns.values(), strict=True)
        ]

    def figures(self):
        """dict[str, dict]: The figures of each model by their names."""
        return {
            label: dict(zip(self.columns, row, strict=True))
            for label, row in self.rows.items()
        }

    def rich(self):
        """rich.table.Table: For the terminal."""
        # Without lines between the columns, which would not fit into 80 characters.
        table = Table(
            title=self.title,
            caption=self.note,
            title_style='',
            caption_style='dim',
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        table.add_column('model')
        for name in self.columns:
            longest = max(map(len, name.split()))
            table.add_column(name, justify='right', min_width=longest)
        for label in self.rows:
            table.add_row(label, *self.cells(label))
        return table

    def markdown(self):
        """str: A heading, the table and the note."""
        lines = [
            f'## {self.title}',
            '',
            f'| model | {" | ".join(self.columns)} |',
            f'| --- |{" ---: |" * len(self.columns)}',
            *(f'| {label} | {" | ".join(self.cells(label))} |' for label in self.rows),
        ]
        if self.note:
            lines += ['', self.note]
        return '\n'.join(lines) + '\n'
