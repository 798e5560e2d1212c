"""The stages that fill the tables the search reads: scores and costs."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from puzzle import artifacts
from puzzle.progress import Progress
from puzzle.run import Planned, Run
from puzzle.scoring.exact import exact_scores
from puzzle.stages.common import compute_of, forget_teacher, item_weights, sequences_of, teacher_of
from puzzle.teacher import load_config
from puzzle.types import Item, Score, to_json
from puzzle.variants import has_weights, is_teacher


def make_score(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    wanted = {unit.path.stem: unit for unit in missing}
    pending = {name: _changed(items) for name, items in run.scored_together.items() if name in wanted}
    by_layer: dict[int, list[Item]] = {}
    for items in pending.values():
        for item in items:
            by_layer.setdefault(item.sites[0].layer, []).append(item)
    portion = {item: 1 / len(items) for items in pending.values() for item in items}  # of its unit
    found: dict[Item, list[Score]] = {}
    failed: dict[Item, str] = {}

    def publish_whole() -> None:
        for name in [name for name, items in pending.items() if all(one in found or one in failed for one in items)]:
            items = pending.pop(name)
            payload = {
                "scores": [to_json(score) for one in items for score in found.get(one, [])],
                "failed": [{"item_id": one.id, "reason": failed[one]} for one in items if one in failed],
            }
            artifacts.publish_json(wanted[name].path, wanted[name].inputs, payload)
            progress.done(name)

    publish_whole()  # where nothing but the teacher's own is on offer
    batches = sequences_of(run, "score", run.config.score.sequences)
    for item, values in exact_scores(teacher_of(run), by_layer, functools.partial(item_weights, run), batches):
        reason = _failure(run, item, values)
        if reason is None:
            found[item] = _scores(item, values, run.config.data.sequence_tokens)
        else:
            failed[item] = reason
        progress.fraction(portion[item])
        publish_whole()


def _changed(items: Sequence[Item]) -> list[Item]:
    return [item for item in items if not is_teacher(item)]


def _scores(item: Item, values: Mapping[str, Tensor], context_tokens: int) -> list[Score]:
    return [
        Score(item.id, "teacher", "teacher", metric, "score", tuple(column.tolist()), context_tokens)
        for metric, column in values.items()
    ]


def _failure(run: Run, item: Item, values: Mapping[str, Tensor]) -> str | None:
    """Why the item cannot be chosen, if so: its training failed, or its scores are no numbers."""
    if has_weights(item):
        reason = artifacts.read_unit(run.trained(run.unit_of(item))).payload.get("failed")
        if reason is not None:
            return str(reason)
    finite = all(torch.isfinite(column).all() for column in values.values())
    return None if finite else "its score is not finite"


def make_profile(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    from puzzle.profiling import measure

    device = str(compute_of(run).device)
    weights = run.config.profile.weights
    dtype: measure.Dtype = weights if weights != "auto" else "bf16" if device.startswith("cuda") else "fp32"
    forget_teacher()  # room for the largest points
    stack = measure.SiteStack.build(run.shape, load_config(run.teacher), run.specs, device, dtype, run.config.seed)
    points = {run.costs / f"{point.id}.json": point for point in run.grid_points}
    for unit in missing:
        costs = measure.measure_point(stack, points[unit.path], run.grid.repeats, run.config.seed)
        artifacts.publish_json(unit.path, unit.inputs, {"costs": [to_json(cost) for cost in costs]})
        progress.done(unit.path.stem)
