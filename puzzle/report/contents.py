"""What the page of a run tells, gathered from whatever units there are. Pure.

Reads a run; what a part of the page needs and is not there is told in that part's place: an :class:`Absent` with the
command that makes it. Computes records that charts.py draws and page.py sets; writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from puzzle import artifacts, plans, training_log, yamlfiles
from puzzle.basis import DEFAULT_SPACE
from puzzle.pruning import change, pruned_shape
from puzzle.report.layers import Layer, layers_of_run
from puzzle.report.library import library_frame
from puzzle.report.searched import Absent, Search, searched
from puzzle.report.summary import Summary
from puzzle.report.table import Table
from puzzle.report.tournament import standings
from puzzle.search.compare import Compared
from puzzle.search.problem import solved
from puzzle.types import InfeasibleError, MissingMeasurementError

if TYPE_CHECKING:
    from puzzle.run import Run

Found = TypeVar("Found")


@dataclass(frozen=True)
class Left:
    """A stage that is not finished: how many of its units are not there, or rest on what is no longer so."""

    stage: str
    missing: int
    stale: int
    units: int


@dataclass(frozen=True)
class Trained:
    """One variant's local losses before and after BLD, over layers: geometric means, and the least and most after."""

    part: str
    variant: str
    start: float
    end: float
    least: float
    most: float
    num_layers: int


@dataclass(frozen=True)
class Comparison:
    """What other ways to choose come to, the search's own first; ``objective``: by which score."""

    objective: str
    found: tuple[Compared, ...]


@dataclass(frozen=True)
class Recipe:
    """``files``: name and text of what to save, by which the config knows them.

    ``constraints``: the name of the constraint file, if there is one.
    """

    constraints: str
    files: tuple[tuple[str, str], ...]
    versions: tuple[tuple[str, str], ...]
    seconds: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Contents:
    """The page. None: a run of this kind has no such part."""

    title: str
    subtitle: str
    left: tuple[Left, ...]
    summary: Summary | Absent
    layers: tuple[Layer, ...] | Absent
    search: Search | Absent | None
    trained: tuple[Trained, ...] | Absent | None
    steps: tuple[Mapping[str, Any], ...] | Absent
    compared: Comparison | Absent | None
    standings: Table | None
    exports: tuple[str, ...]
    recipe: Recipe

    @classmethod
    def of(cls, run: Run, left: Sequence[Left] = ()) -> Contents:
        searches = run.config.prune is None
        return cls(
            title=run.teacher_name,
            subtitle=_subtitle(run),
            left=tuple(left),
            summary=_told(lambda: _summary(run)),
            layers=_told(lambda: _layers(run)),
            search=_told(lambda: _search(run)) if searches else None,
            trained=_told(lambda: _trained(run)) if searches else None,
            steps=_told(lambda: _steps(run)),
            compared=_told(lambda: _compared(run)) if searches else None,
            standings=standings(run),
            exports=_exports(run),
            recipe=_recipe(run),
        )


def _told(gather: Callable[[], Found]) -> Found | Absent:
    try:
        return gather()
    except (MissingMeasurementError, InfeasibleError) as error:
        return Absent(str(error))


def _need(stage: str, *units: plans.Planned) -> None:
    if not all(unit.path.exists() for unit in units):
        raise MissingMeasurementError(f"not there yet; run `puzzle {stage} RUN`")
    if any(artifacts.changed_inputs(unit.path, unit.inputs) for unit in units):
        raise MissingMeasurementError(f"what is there was made from other inputs; run `puzzle {stage} RUN --redo`")


def _subtitle(run: Run) -> str:
    if run.config.prune is not None:
        known = run.settled
        return f"pruned: {change(run.shape, pruned_shape(run.pruning, run.shape))}" if known else "to be pruned"
    return f"compressed within {run.limits_name}"


def _summary(run: Run) -> Summary:
    _need("evaluate", *plans.plan_evaluate(run))
    return Summary.of(run)


def _layers(run: Run) -> tuple[Layer, ...]:
    if run.config.prune is not None:
        _need("importance", *plans.plan_importance(run))
        _need("tournament", *plans.plan_tournament(run))
    elif not run.solution.exists():
        raise MissingMeasurementError("no architecture was chosen yet; run `puzzle search RUN`")
    return layers_of_run(run)


def _steps(run: Run) -> tuple[Mapping[str, Any], ...]:
    steps = training_log.read_log(run.student / training_log.NAME)
    if not steps:
        raise MissingMeasurementError("no step was logged yet; run `puzzle kd RUN`")
    return tuple(steps)


def _compared(run: Run) -> Comparison:
    if not run.comparison.exists():
        raise MissingMeasurementError("nothing was compared yet; run `puzzle compare RUN --true`, then this report")
    return artifacts.read_unit(run.comparison).read(Comparison)


def _trained(run: Run) -> tuple[Trained, ...]:
    frame = library_frame(run).astype({"loss_start": float, "loss_end": float})
    frame = frame[(frame.loss_start > 0) & (frame.loss_end > 0)]
    frame = frame.assign(part=[site.split(".")[1] if "." in site else "layer" for site in frame.site])
    return tuple(
        Trained(
            str(part),
            str(variant),
            float(np.exp(np.log(of.loss_start).mean())),
            float(np.exp(np.log(of.loss_end).mean())),
            float(of.loss_end.min()),
            float(of.loss_end.max()),
            len(of),
        )
        for (part, variant), of in frame.groupby(["part", "variant"], sort=False)
    )


def _exports(run: Run) -> tuple[str, ...]:
    """One line of each check of each checkpoint that is there."""
    folders = sorted(path for path in (run.student / "export").glob("*") if (path / artifacts.MARKER).exists())
    return tuple(
        f"{folder.name}: {verdict['line']}"
        for folder in folders
        for verdict in artifacts.read_unit(folder).read(list[dict[str, Any]], "verification")
    )


def _recipe(run: Run) -> Recipe:
    inputs = {} if run.constraints is None else {"constraints": run.constraints}
    if run.config.prune is None:
        inputs["space"] = yamlfiles.locate("space", run.config.space or DEFAULT_SPACE)
        inputs["grid"] = yamlfiles.locate("grid", run.config.profile.grid)
    files = [(f"{key}: {path.name}", path.read_text(encoding="utf-8")) for key, path in inputs.items()]
    constraints = "" if run.constraints is None else run.constraints.name
    known = artifacts.read_json(run.folder / "env.json") if (run.folder / "env.json").exists() else {}
    versions = {**known.get("versions", {}), "system": known.get("system", "")}
    seconds: dict[str, float] = {}
    for event in artifacts.read_events(run.events):
        if event["event"] == "finished" and event["stage"] != "report":
            seconds[event["stage"]] = seconds.get(event["stage"], 0.0) + event["seconds"]
    pairs = tuple((name, str(text)) for name, text in versions.items() if text)
    saved = {name: path.name for name, path in inputs.items()}
    profile = run.config.profile.model_copy(update={"grid": saved.pop("grid", run.config.profile.grid)})
    config = ("config.yaml", yamlfiles.dump(run.config.model_copy(update={**saved, "profile": profile})))
    return Recipe(constraints, (config, *files), pairs, tuple(seconds.items()))


# --- the search -------------------------------------------------------------------------------------------------


def _search(run: Run) -> Search:
    _need("score", *plans.plan_score(run))
    _need("profile", *plans.plan_profile(run))
    problems = run.problems()
    solution = run.solutions()[0] if run.solution.exists() else None
    return searched(solved(problems, solution) if solution else problems[0], run.shape, solution)
