"""The stage that measures what every block shape costs."""

from __future__ import annotations

from collections.abc import Sequence

from puzzle import artifacts
from puzzle.progress import Progress
from puzzle.run import Planned, Run
from puzzle.stages.common import compute_of, forget_teacher
from puzzle.teacher import load_config
from puzzle.types import to_json


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
