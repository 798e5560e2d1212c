"""The stage that measures exactly what decides a search, where scores were estimated."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

from puzzle import artifacts, search
from puzzle.progress import Progress
from puzzle.run import Planned, Run
from puzzle.search import mip
from puzzle.stages.score import ScoreJob
from puzzle.tables import ScoreTable, read_scores

LEAST_CONTENDERS = 3  # architectures whose items are measured


def make_rescore(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    """Exact scores, in place of estimates, of what the best architectures are made of; again until none is left.

    Each is a unit of its own that does not depend on the constraint file; which of them decide is what is published.
    """
    (unit,) = missing
    by_id = {item.id: item for item in run.items}
    make_job = functools.cache(lambda: ScoreJob(run))
    table, used = run.read_scores(), set[str]()
    while wanted := _deciding(run, table):
        planned = {item_id: run.exact_unit(by_id[item_id]) for item_id in wanted}
        to_do = [name for name, one in planned.items() if not artifacts.is_current(one.path, one.inputs, "rescore")]
        for _, layer in itertools.groupby(sorted(to_do, key=_layer), _layer):
            items = {item_id: [by_id[item_id]] for item_id in layer}
            found = make_job().scores(items, {}, lambda _: None)
            for item_id in items:
                payload = make_job().payload(items[item_id], {item_id: found[item_id]})
                artifacts.publish_json(planned[item_id].path, planned[item_id].inputs, payload)
                progress.fraction(0.0, item_id)
        used |= planned.keys()
        table = table.replaced(read_scores(run.folder / "rescored", [f"{item_id}.json" for item_id in planned]))
    contents = {item_id: artifacts.read_unit(run.exact_unit(by_id[item_id]).path).content for item_id in sorted(used)}
    artifacts.publish_json(unit.path, unit.inputs, {"items": contents})
    progress.done(unit.path.stem)


def _layer(item_id: str) -> str:
    """What the names of items begin with."""
    return item_id[: len("L000")]


def _deciding(run: Run, table: ScoreTable) -> list[str]:
    """Items of the best architectures under the constraint file whose KL is an estimate."""
    conflicts = run.space.conflicts()
    problems = search.problems(run.shape, run.items, table, run.read_costs(), run.constraint_file, conflicts)
    wanted = run.constraint_file.solutions
    solutions = mip.solve(problems, {}, max(wanted.count, LEAST_CONTENDERS), wanted.min_difference).solutions
    chosen = {item_id for solution in solutions for item_id in solution.items if (item_id, "kl") in table.scores}
    return [item.id for item in run.items if item.id in chosen and table.score(item.id, "kl").method == "one-pass"]
