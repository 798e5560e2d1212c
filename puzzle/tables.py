"""Scores and costs as tables: many single-file units, written side by side by several ranks, read together.

Reads ``scores/*.json`` (payload ``{"scores": [Score …], "failed": [{"item_id", "reason"} …]}``) and ``costs/*.json``
(payload ``{"costs": [Cost …], "gaps": [Gap …]}``); every record is checked as it is read. Computes tidy frames.
Writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from puzzle import artifacts
from puzzle.types import (
    CorruptFileError,
    Cost,
    Costs,
    Gap,
    Item,
    MissingMeasurementError,
    Score,
    mean_and_error,
)
from puzzle.variants import is_teacher

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped,unused-ignore]

CONTEXT = "context"  # the item id of what the model itself comes to that changes are made to
OF_BASE = ("kl", "ce_delta")  # what is known of a base that widths made
COMMANDS = {"scores": "puzzle score RUN", "costs": "puzzle profile RUN"}


@dataclass(frozen=True)
class Failure:
    """An item that could not be scored, e.g. because its training diverged."""

    item_id: str
    reason: str


@dataclass(frozen=True)
class ScoreTable:
    """Scores by (item, metric), and why items have none.

    ``base``: by metric, the score of the model itself that changes are made to; empty where it is the teacher.
    """

    scores: Mapping[tuple[str, str], Score] = field(repr=False)
    failed: Mapping[str, str] = field(default_factory=dict)
    base: Mapping[str, Score] = field(default_factory=dict)

    @classmethod
    def of(cls, scores: Iterable[Score], failed: Iterable[Failure] = (), base: Iterable[Score] = ()) -> ScoreTable:
        """The table of these records. CorruptFileError where one item has two scores of the same metric."""
        by_key: dict[tuple[str, str], Score] = {}
        for score in scores:
            if (key := (score.item_id, score.metric)) in by_key:
                raise CorruptFileError(f"{score.item_id} has two {score.metric} scores; delete one of them")
            by_key[key] = score
        return cls(
            by_key, {failure.item_id: failure.reason for failure in failed}, {score.metric: score for score in base}
        )

    def score(self, item_id: str, metric: str) -> Score:
        """MissingMeasurementError if the item was not scored by this metric."""
        found = self.scores.get((item_id, metric))
        if found is None:
            raise MissingMeasurementError(f"no {metric} score for {item_id}; run `{COMMANDS['scores']}`")
        return found

    def replaced(self, other: ScoreTable) -> ScoreTable:
        """This table with the scores that ``other`` has in place of its own."""
        kept = {key: score for key, score in self.scores.items() if key[0] not in other.failed}
        return replace(self, scores={**kept, **other.scores}, failed={**self.failed, **other.failed})

    def means(self, items: Iterable[Item], metric: str) -> dict[str, float]:
        """By item, its score. One listed as failed has none; one that nobody scored is missing.

        The teacher's own blocks cost nothing, unless they take the place of something in a context.
        """
        found: dict[str, float] = {}
        for item in items:
            if (item.id, metric) in self.scores:
                found[item.id] = self.scores[item.id, metric].mean
            elif is_teacher(item):
                found[item.id] = 0.0
            elif item.id not in self.failed:
                self.score(item.id, metric)  # says what is missing
        return found

    def standard_error(self, item_ids: Iterable[str], metric: str) -> float | None:
        """Of the sum of these items' scores, from the spread over the sequences that all of them met.

        None where that is not known: fewer than two sequences, or none scored.
        """
        scored = ((item_id, metric) for item_id in item_ids)
        chosen = [self.scores[key].per_sequence for key in scored if key in self.scores]
        chosen += [self.base[metric].per_sequence] if self.base else []
        sums = [math.fsum(values) for values in zip(*chosen, strict=False)]
        return None if len(sums) < 2 else mean_and_error(sums)[1]


def read_scores(folder: Path, names: Collection[str] | None = None) -> ScoreTable:
    """All scores in ``folder``, or in the files of these ``names``; MissingMeasurementError for none at all.

    CorruptFileError for anything but finite, complete records.
    """
    scores: list[Score] = []
    failed: list[Failure] = []
    base: list[Score] = []
    seen: dict[tuple[str, str], Path] = {}
    for unit in _units(folder, "scores", names):
        for score in unit.read(list[Score], "scores"):
            if (first := seen.setdefault((score.item_id, score.metric), unit.path)) != unit.path:
                raise CorruptFileError(
                    f"{unit.path}: {score.item_id} ({score.metric}) is in {first} too; delete one of the two"
                )
            scores.append(score)
        failed += unit.read(list[Failure], "failed") if "failed" in unit.payload else []
        found = unit.read(list[Score], "base") if "base" in unit.payload else []
        base = max(base, found, key=lambda one: len(one[0].per_sequence) if one else 0)  # the one on most sequences
    return ScoreTable.of(scores, failed, base)


def read_truth(path: Path) -> dict[str, Score]:
    """The true scores of a whole architecture by metric; none where its outputs are not finite."""
    return {score.metric: score for score in artifacts.read_unit(path).read(list[Score], "scores")}


def read_costs(folder: Path, names: Collection[str] | None = None) -> Costs:
    """All costs in ``folder``, or those in the files of these ``names``; files in the order of their names."""
    units = list(_units(folder, "costs", names))
    return Costs(
        tuple(cost for unit in units for cost in unit.read(list[Cost], "costs")),
        tuple(gap for unit in units if "gaps" in unit.payload for gap in unit.read(list[Gap], "gaps")),
    )


def scores_frame(scores: ScoreTable | Iterable[Score]) -> pd.DataFrame:
    """One row per score: mean and standard error in place of the values per sequence."""
    import pandas as pd

    records = scores.scores.values() if isinstance(scores, ScoreTable) else scores
    named = [name for name in Score.__dataclass_fields__ if name != "per_sequence"]
    rows = [
        [*(getattr(one, name) for name in named), one.mean, one.standard_error, len(one.per_sequence)]
        for one in records
    ]
    return pd.DataFrame(rows, columns=[*named, "mean", "standard_error", "num_sequences"])


def costs_frame(costs: Costs) -> pd.DataFrame:
    """One row per cost, one column per field."""
    import pandas as pd

    return pd.DataFrame([asdict(cost) for cost in costs.rows], columns=list(Cost.__dataclass_fields__))


def _units(folder: Path, kind: str, names: Collection[str] | None) -> Iterator[artifacts.Unit]:
    # names with a leading dot are units that a crash left aside half-written
    files = sorted(path for path in folder.glob("*.json") if not path.name.startswith("."))
    if not files:
        raise MissingMeasurementError(f"{folder}: no {kind} there; run `{COMMANDS[kind]}`")
    return (artifacts.read_unit(path) for path in files if names is None or path.name in names)
