"""A constraint file with ``{values: [...]}`` as several files: one search for each value, or combination of values.

Reads a :class:`~puzzle.config.ConstraintFile`; computes files that hold one value each, exactly as if the user had
written it there, so that a solution found for a list is the one that a file with this value alone finds.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from puzzle.config import ConstraintFile, ValuesFile
from puzzle.types import ConfigError

MOST_SEARCHES = 1000


@dataclass(frozen=True)
class Pick:
    """One of the searches: ``values`` by key, as written, and the file with them in place."""

    number: int
    values: tuple[tuple[str, float | str], ...]
    file: ConstraintFile

    def __str__(self) -> str:
        return ", ".join(
            f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in self.values
        )


def picks(file: ConstraintFile) -> tuple[Pick, ...]:
    """Every combination of the file's lists of values, numbered from 1, the last list's value moving fastest.

    A file without any is the only one. ConfigError for more of them than anybody can mean.
    """
    lists = {key: entry.values for key, entry in file.constraints.items() if isinstance(entry, ValuesFile)}
    if (count := math.prod(map(len, lists.values()))) > MOST_SEARCHES:
        raise ConfigError(
            f"constraints: the lists of values of {', '.join(lists)} are {count:,} searches; at most {MOST_SEARCHES:,}"
        )
    found = []
    for number, values in enumerate(itertools.product(*lists.values()), start=1):
        chosen = dict(zip(lists, values, strict=True))
        one = file.model_copy(update={"constraints": {**file.constraints, **chosen}})
        found.append(Pick(number, tuple(chosen.items()), one))
    return tuple(found)
