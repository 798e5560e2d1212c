"""The stage that measures exactly what decides a search, where scores were estimated."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence

from puzzle import artifacts, plans, search
from puzzle.plans import Planned
from puzzle.progress import Progress
from puzzle.ranks import Ranks, shares
from puzzle.run import Run
from puzzle.search import mip
from puzzle.stages.score import ScoreJob
from puzzle.tables import ScoreTable, read_scores
from puzzle.types import InfeasibleError, Item, OutOfTimeError

LEAST_CONTENDERS = 3  # architectures whose items are measured


def make_rescore(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    """Exact scores, in place of estimates, of what the best architectures are made of; again until none is left.

    Each is a unit of its own that does not depend on the constraint file; which of them decide is what rank 0 publishes
    in the end. Ranks share what a search asks for, and what it asks for is what rank 0 found.
    """
    (unit,) = missing
    ranks = Ranks.current()
    table, used = run.read_scores(), dict[str, Planned]()
    with contextlib.ExitStack() as stack:
        make_job = functools.cache(lambda: stack.enter_context(ScoreJob(run)))
        while wanted := _agreed(run, ranks, _deciding(run, table)):
            planned = {item.id: plans.exact_unit(run, item) for item in wanted}
            to_do = [item for item in wanted if not _is_there(planned[item.id])]
            _measure(run, _own(run, ranks, _agreed(run, ranks, to_do)), make_job, progress)
            ranks.wait(run.folder, "rescore")
            used |= planned
            table = table.replaced(read_scores(run.folder / "rescored", [f"{item_id}.json" for item_id in planned]))
    if ranks.first:
        contents = {item_id: artifacts.read_unit(used[item_id].path).content for item_id in sorted(used)}
        artifacts.publish_json(unit.path, unit.inputs, {"items": contents})
        progress.done(unit.path.stem)


def _measure(run: Run, items: Sequence[Item], make_job: Callable[[], ScoreJob], progress: Progress) -> None:
    """Publishes the items' exact scores, layer by layer."""
    for _, group in itertools.groupby(items, lambda item: item.layers[0]):
        here = {item.id: [item] for item in group}
        found = make_job().scores(here, {}, lambda _: None)
        for item_id, items_of in here.items():
            planned = plans.exact_unit(run, items_of[0])
            payload = make_job().payload(items_of, {item_id: found[item_id]})
            artifacts.publish_json(planned.path, planned.inputs, payload)
            progress.fraction(0.0, item_id)


def _agreed(run: Run, ranks: Ranks, items: Sequence[Item]) -> list[Item]:
    """What rank 0 found, in the order of the layers: solvers and folders may differ from machine to machine."""
    chosen = {item.id for item in items}
    marks = ranks.agreed(run.folder, "rescore", [item.id in chosen for item in run.items])
    return sorted(itertools.compress(run.items, marks), key=lambda item: item.layers[0])


def _own(run: Run, ranks: Ranks, items: Sequence[Item]) -> list[Item]:
    """This rank's share; an item costs the layers that it goes through."""
    costs = {item.id: float(run.shape.num_layers - item.layers[0]) for item in items}
    pieces = set(shares(costs, ranks.count, 1)[ranks.rank].pieces)
    return [item for item in items if item.id in pieces]


def _is_there(planned: Planned) -> bool:
    return artifacts.is_current(planned.path, planned.inputs, "rescore")


def _deciding(run: Run, table: ScoreTable) -> list[Item]:
    """Items of the best architectures under the constraint file whose KL is an estimate; none where nothing can meet
    it, which is for the search to say."""
    wanted = run.constraint_file.solutions
    count, effort = max(wanted.count, LEAST_CONTENDERS), search.effort_of(run.constraint_file)
    try:
        solutions = mip.solve(run.problems(table), {}, count, wanted.min_difference, effort).solutions
    except (InfeasibleError, OutOfTimeError):
        return []
    chosen = {item_id for solution in solutions for item_id in solution.items if (item_id, "kl") in table.scores}
    return [item for item in run.items if item.id in chosen and table.score(item.id, "kl").method == "one-pass"]
