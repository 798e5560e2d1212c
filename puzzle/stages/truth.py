"""True scores of whole architectures: each assembled, run on the sequences of a split, and compared with the teacher.

Reads the library and one split; writes ``truth/SPLIT/NAME.json``, one unit an architecture, named by what it changes:
whoever asks for it, `puzzle additivity`, `refine` or `compare --true`, it is the same record.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import cast

from puzzle import artifacts
from puzzle.plans import Planned, Truth
from puzzle.progress import Progress
from puzzle.ranks import Ranks, shares
from puzzle.run import Run
from puzzle.scoring.exact import Change
from puzzle.stages.score import ScoreJob

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


def _first_layer(unit: Truth) -> int:
    """-1 where nothing is changed."""
    return min((site.layer for item in unit.changes for site in item.sites), default=-1)
