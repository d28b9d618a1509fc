"""What a look at data sets finds."""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple


class Problem(NamedTuple):
    """A sample that cannot be used.

    ``dataset`` is its data set as a config names it, ``index`` its place there (None
    for a file that the data set does not list), ``path`` the image, ``said`` a
    sentence that names the file at fault, and ``missing`` whether that is absent.
    """

    dataset: str
    index: int | None
    path: str
    said: str
    missing: bool = False

    @property
    def error(self):
        """Exception: To be raised for it."""
        return (FileNotFoundError if self.missing else ValueError)(self.said)


@dataclass
class Findings:
    """What :func:`examine` has found.

    Attributes:
        label_maps (int): Number of label maps that were looked at.
        images (int): Number of other samples whose images were.
        problems (list[Problem]): In the order of the samples.
        sizes (dict[str, int]): Number of samples of each data set.
        classes (dict[str, Counter]): How many samples of each label a data set
            has, or label maps with pixels of it.
        dark (list[str]): Images of 16 bits that become almost black.
    """

    label_maps: int = 0
    images: int = 0
    problems: list = field(default_factory=list)
    sizes: dict = field(default_factory=dict)
    classes: dict = field(default_factory=dict)
    dark: list = field(default_factory=list)

    @classmethod
    def merged(cls, several):
        """Those of all processes, or of all data loaders, as one.

        Args:
            several (Sequence[Findings]): All of them.

        Returns:
            Findings: Problems in the order in which one process would have found them.
        """
        merged = cls()
        for found in several:
            merged.label_maps += found.label_maps
            merged.images += found.images
            merged.problems += found.problems
            merged.dark += found.dark
            merged.sizes |= found.sizes
            for name, counts in found.classes.items():
                merged.classes[name] = merged.classes.get(name, Counter()) + counts
        order = {name: place for place, name in enumerate(merged.sizes)}
        merged.problems.sort(key=lambda p: (order[p.dataset], p.index or 0))
        return merged
