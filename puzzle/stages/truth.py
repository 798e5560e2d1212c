"""True scores of whole architectures: each assembled, run on the sequences of a split, and compared with the teacher.

Reads the library and one split; writes ``truth/SPLIT/NAME.json``, one unit an architecture, named by what it changes:
whoever asks for it, `puzzle additivity`, `refine` or `compare --true`, it is the same record.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from puzzle import artifacts
from puzzle.plans import Planned, Truth, truth_of
from puzzle.progress import Progress
from puzzle.ranks import Ranks, shares
from puzzle.run import Run
from puzzle.scoring.exact import Change
from puzzle.search.problem import Chosen, Measure
from puzzle.stages.score import ScoreJob
from puzzle.tables import read_truth

SPLITS = ("select", "report")  # that choose, and that are reported
JobOf = Callable[[str], ScoreJob]  # that of a split


def make_truth(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    """Evaluates the architectures that are missing, or this rank's share of them."""
    with contextlib.ExitStack() as stack:
        evaluate(run, cast("Sequence[Truth]", missing), jobs(run, stack), progress)


def jobs(run: Run, stack: contextlib.ExitStack) -> JobOf:
    """One job for each split, made when first asked for; ``stack`` ends them."""
    return functools.cache(lambda split: stack.enter_context(ScoreJob(run, split)))


def evaluate(run: Run, missing: Sequence[Truth], job_of: JobOf, progress: Progress) -> None:
    """This rank's share of ``missing``, those that begin at one layer together."""
    ranks = Ranks.current()
    by_name = {f"{unit.split}/{unit.path.stem}": unit for unit in missing}
    names = sorted(by_name, key=lambda name: (by_name[name].split, _first_layer(by_name[name]), name))
    costs = {name: float(1 + run.shape.num_layers - _first_layer(by_name[name])) for name in names}
    own = [by_name[name] for name in shares(costs, ranks.count, 1)[ranks.rank].pieces]
    for (split, _), group in itertools.groupby(own, lambda unit: (unit.split, _first_layer(unit))):
        units = {unit.path.stem: unit for unit in group}
        changes = [Change(name, unit.changes) for name, unit in units.items()]
        for name, values in job_of(split).exact(changes):
            items = [item.id for item in units[name].changes]
            payload = {"items": items, **job_of(split).whole(name, values)}
            artifacts.publish_json(units[name].path, units[name].inputs, payload)
            progress.done(name)


@dataclass(frozen=True)
class Truths:
    """Evaluates architectures and remembers them on disk: one that is there is never evaluated again.

    Records made from other inputs are made anew: what they rest on was, too, or its stage would have been refused.
    Rank 0 asks, at most ``most`` at a time; the others do their share (:meth:`serve`) until it is done (:meth:`end`).
    """

    run: Run
    job_of: JobOf
    progress: Progress
    most: int = 100

    def of(self, split: str, metric: str) -> Measure:
        """On a split, by a metric."""

        def measure(architectures: Sequence[Chosen]) -> list[Sequence[float] | None]:
            for start in range(0, len(architectures), self.most):
                self._told(split, architectures[start : start + self.most])
            units = [truth_of(self.run, items, split) for items in architectures]
            found = [read_truth(unit.path).get(metric) for unit in units]
            return [None if score is None else score.per_sequence for score in found]

        return measure

    def serve(self) -> None:
        while self._told("", ()):
            pass

    def end(self) -> None:
        self._told("", ())

    def _told(self, split: str, architectures: Sequence[Chosen]) -> bool:
        """Makes what rank 0 asks for, whatever this rank was given; False where that is nothing."""
        ranks, items = Ranks.current(), self.run.items
        chosen = [set(one) for one in architectures]
        marks = [item.id in one for one in chosen for item in items]
        marks += [False] * (self.most * len(items) - len(marks))
        first, *told = ranks.agreed(self.run.folder, "true evaluations", [split == SPLITS[0], *marks])
        parts = (told[start : start + len(items)] for start in range(0, len(told), len(items)))
        asked = [[item.id for item in itertools.compress(items, part)] for part in parts if any(part)]
        units = [truth_of(self.run, one, SPLITS[0] if first else SPLITS[1]) for one in asked]
        missing = {unit.path: unit for unit in units if not _is_current(unit)}
        ranks.wait(self.run.folder, "true evaluations")  # all have seen the same before anyone adds to it
        evaluate(self.run, list(missing.values()), self.job_of, self.progress)
        ranks.wait(self.run.folder, "true evaluations")
        return bool(asked)


def _is_current(unit: Planned) -> bool:
    return unit.path.exists() and not artifacts.changed_inputs(unit.path, unit.inputs)


def _first_layer(unit: Truth) -> int:
    """-1 where nothing is changed."""
    return min((site.layer for item in unit.changes for site in item.sites), default=-1)
