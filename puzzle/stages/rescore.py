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
from puzzle.tables import Failure, ScoreTable, read_scores
from puzzle.types import to_json

LEAST_CONTENDERS = 3  # architectures whose items are measured


def make_rescore(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    """Exact scores, in place of estimates, of what the best architectures are made of; again until none is left.

    What was measured so for another constraint file is not measured again.
    """
    (unit,) = missing
    job, by_id = ScoreJob(run), {item.id: item for item in run.items}
    table = run.read_scores().replaced(_measured_before(run, unit))
    wanted = _deciding(run, table)
    while wanted:
        layers = itertools.groupby(wanted, lambda item_id: by_id[item_id].sites[0].layer)
        groups = {str(layer): [by_id[item_id] for item_id in of] for layer, of in layers}
        for name, items in groups.items():
            found = job.records(items, job.scores({name: items}, lambda _: None))
            table = table.replaced(ScoreTable.of(*found))
            progress.fraction(0.0, f"{len(wanted)} items")
        wanted = _deciding(run, table)
    exact = [score for score in table.scores.values() if score.method == "exact"]
    failed = [Failure(item_id, reason) for item_id, reason in table.failed.items()]
    payload = {"scores": [to_json(score) for score in exact], "failed": [to_json(failure) for failure in failed]}
    artifacts.publish_json(unit.path, unit.inputs, payload)
    progress.done(unit.path.stem)


def _deciding(run: Run, table: ScoreTable) -> list[str]:
    """Items of the best architectures under the constraint file whose KL is an estimate, by layers."""
    problems = search.problems(run.shape, run.items, table, run.read_costs(), run.constraint_file)
    wanted = run.constraint_file.solutions
    solutions = mip.solve(problems, {}, max(wanted.count, LEAST_CONTENDERS), wanted.min_difference).solutions
    chosen = {item_id for solution in solutions for item_id in solution.items if (item_id, "kl") in table.scores}
    return [item.id for item in run.items if item.id in chosen and table.score(item.id, "kl").method == "one-pass"]


def _measured_before(run: Run, unit: Planned) -> ScoreTable:
    """What rests on the same scores, but another constraint file."""
    others = [path for path in sorted(unit.path.parent.glob("*.json")) if not path.name.startswith(".")]
    same = [path.name for path in others if artifacts.read_unit(path).inputs["scores"] == unit.inputs["scores"]]
    return functools.reduce(
        ScoreTable.replaced, (read_scores(unit.path.parent, [name]) for name in same), ScoreTable.of(())
    )
