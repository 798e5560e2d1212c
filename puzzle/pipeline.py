"""The stages in order, what each needs, and the loop that makes what is missing: ``run``, ``status``, ``validate``.

The only place where the pure lane and the torch lane meet: stages that compute with a model are looked up in
``puzzle.stages`` when, and only when, one of their units is missing. Searching never loads torch.
"""

from __future__ import annotations

import contextlib
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from puzzle import artifacts, plans, search, yamlfiles
from puzzle.plans import Planned
from puzzle.ranks import Ranks, noted, notes
from puzzle.run import Run
from puzzle.tables import read_truth
from puzzle.types import ConfigError, MissingMeasurementError, Solution, StaleUnitError, to_json
from puzzle.variants import variant_name

if TYPE_CHECKING:
    from puzzle.progress import Progress
    from puzzle.report.contents import Left


@dataclass(frozen=True)
class Stage:
    """``needs`` are the stages whose units it reads; ``shared``: ranks share its units, else rank 0 makes them."""

    name: str
    needs: tuple[str, ...]
    plan: Callable[[Run], list[Planned]]
    summary: str
    shared: bool = False


STAGES: tuple[Stage, ...] = (
    Stage("data", (), plans.plan_data, "tokenise the text into four disjoint splits"),
    Stage("init", ("data",), plans.plan_init, "make the variants' starting points from moments of calibration tokens"),
    Stage("distill", ("init",), plans.plan_distill, "train the library: block-wise local distillation", True),
    Stage("score", ("distill",), plans.plan_score, "score the variants, each alone in the teacher", True),
    Stage("profile", (), plans.plan_profile, "measure what every block shape costs on this device"),
    Stage("rescore", ("score", "profile"), plans.plan_rescore, "measure exactly what decides the search", True),
    Stage("search", ("score", "profile", "rescore"), plans.plan_search, "find the best architecture that fits"),
    Stage("refine", ("search", "distill"), plans.plan_refine, "evaluate contenders truly, learn, search again", True),
    Stage(
        "tournament", ("search", "refine", "distill"), plans.plan_tournament, "distil the best a little, keep one", True
    ),
    Stage("build", ("search", "refine", "tournament", "distill"), plans.plan_build, "put the student together"),
    Stage("kd", ("build", "prune"), plans.plan_kd, "distil the student globally", True),
    Stage("evaluate", ("kd",), plans.plan_evaluate, "compare teacher and student on the report split"),
    Stage("export", ("evaluate",), plans.plan_export, "write and verify checkpoints that others load"),
    Stage("report", ("export",), plans.plan_report, "write what was found as one page"),
)
IMPORTANCE = Stage(
    "importance",
    ("data",),
    plans.plan_importance,
    "measure what layers, heads and channels do to the residual stream",
    True,
)
PRUNE = Stage(
    "prune",
    ("importance", "tournament"),
    plans.plan_prune,
    "make every layer as narrow, and the model as shallow, as asked",
    True,
)
ON_REQUEST: tuple[Stage, ...] = (  # of a search; `puzzle run` leaves them out
    Stage("additivity", ("score",), plans.plan_additivity, "see how far sums of scores are from the truth", True),
    IMPORTANCE,
    Stage("generate-data", (), plans.plan_generate, "let the teacher write text to distil on", True),
    Stage("fit-costs", ("profile",), plans.plan_fit_costs, "measure whole models, and correct predicted times by them"),
)
TRUTH = Stage("truth", ("distill",), lambda _: [], "evaluate whole architectures", True)
BY_NAME = {stage.name: stage for stage in (*STAGES, *ON_REQUEST, PRUNE)}
PRUNING: tuple[Stage, ...] = (
    BY_NAME["data"],
    IMPORTANCE,
    replace(BY_NAME["tournament"], needs=("importance",)),
    PRUNE,
    *(BY_NAME[name] for name in ("kd", "evaluate", "export", "report")),
)
State = Literal["done", "stale", "missing"]


def stages_of(run: Run) -> tuple[Stage, ...]:
    """What `puzzle run` does, in order."""
    return STAGES if run.config.prune is None else PRUNING


def _all_of(run: Run) -> dict[str, Stage]:
    """Those that can be asked for, by name."""
    return {stage.name: stage for stage in (*stages_of(run), *(ON_REQUEST if run.config.prune is None else ()))}


def run_all(run: Run, redo: str | None = None, before: str | None = None) -> None:
    """Makes everything that is missing, in order, or only what comes ``before`` a stage; with ``redo``, that stage and
    all that rests on it anew."""
    with _working_on(run) as ranks:
        if redo is not None and ranks.first:
            _forget([unit for stage in _resting_on(run, redo) for unit in stage.plan(run)])
        ranks.wait(run.folder, "the run")
        for stage in stages_of(run):
            if stage.name == before:
                break
            _make(run, stage, ranks)


def run_stage(run: Run, name: str, redo: bool = False) -> None:
    """Makes one stage's missing units; MissingMeasurementError where an earlier stage is not complete."""
    stage = _stage(run, name)
    with _working_on(run) as ranks:
        _check_needs(run, stage)
        if redo and ranks.first:
            _forget(stage.plan(run))
        ranks.wait(run.folder, name)
        _make(run, stage, ranks)


def report(run: Run) -> tuple[Left, ...]:
    """Writes the page of the run anew, from whatever is there; the stages that are not finished."""
    from puzzle.report import write_page
    from puzzle.report.contents import Left

    left = []
    for stage in stages_of(run)[:-1]:
        states = unit_states(run, stage)
        if missing_or_stale := [state for state in states if state != "done"]:
            stale = missing_or_stale.count("stale")
            left.append(Left(stage.name, len(missing_or_stale) - stale, stale, len(states)))
    if not left:
        run_stage(run, "report", redo=True)
        return ()
    with _working_on(run) as ranks:
        if ranks.first:
            write_page(run, left)
    return tuple(left)


def take_over_data(run: Run, earlier: Run) -> None:
    """The tokens of an earlier step of a chain, where the run's own would be the same."""
    (unit,), (theirs,) = plans.plan_data(run), plans.plan_data(earlier)
    with _working_on(run) as ranks:
        if ranks.first and not run.data.exists() and dict(unit.inputs) == dict(theirs.inputs):
            artifacts.publish_copy(theirs.path, unit.path)
        ranks.wait(run.folder, "data")


def true_values(
    run: Run, architectures: Sequence[Sequence[str]], split: str, metric: str
) -> list[tuple[float, ...] | None]:
    """Of whole architectures, per sequence of the split; evaluated where they were not; None: outputs not finite."""
    units = {unit.path: unit for unit in (plans.truth_of(run, one, split) for one in architectures)}
    with _working_on(run) as ranks:
        _check_needs(run, TRUTH)
        if ranks.first:
            _forget([unit for unit in units.values() if unit_state(unit) == "stale"])  # of no use to anyone
        ranks.wait(run.folder, TRUTH.name)
        _make(run, replace(TRUTH, plan=lambda _: list(units.values())), ranks)
    scores = [read_truth(plans.truth_of(run, one, split).path).get(metric) for one in architectures]
    return [None if score is None else score.per_sequence for score in scores]


def _stage(run: Run, name: str) -> Stage:
    """ConfigError where there is none of that name in a run of this kind."""
    if (stage := _all_of(run).get(name)) is not None:
        return stage
    if name not in BY_NAME:
        raise ConfigError(f"no stage is called {name}; stages: {', '.join(_all_of(run))}")
    kind = "search (it has no prune: in its config)" if run.config.prune is None else "pruning (prune: in its config)"
    raise ConfigError(f"{name} is no stage of this run, a {kind}; its stages: {', '.join(_all_of(run))}")


def _check_needs(run: Run, stage: Stage) -> None:
    for needed in (name for name in stage.needs if name in _all_of(run)):
        states = unit_states(run, BY_NAME[needed])
        if "stale" in states:
            raise StaleUnitError(
                f"{stage.name} needs {needed}, of which {states.count('stale')} units were made from other inputs; "
                f"run `puzzle {needed} RUN --redo`, or go back to the settings they were made with"
            )
        if "missing" in states:
            raise MissingMeasurementError(
                f"{stage.name} needs {states.count('missing')} more units of {needed}; run `puzzle {needed} RUN` first"
            )


@contextlib.contextmanager
def _working_on(run: Run) -> Iterator[Ranks]:
    """The run's folder for this process, or for the ranks that were launched together; tidied before and after."""
    ranks = Ranks.current()
    if not ranks.first:
        ranks.join()
        ranks.wait(run.folder, "the run")
        yield ranks
        return
    with artifacts.exclusive(run.folder):
        ranks.join()
        _name_the_dead(run)
        _prepare(run)
        ranks.wait(run.folder, "the run")
        yield ranks
        _tidy(run)


def _name_the_dead(run: Run) -> None:
    """Says which ranks left their work unfinished last time."""
    for note in notes(run.folder):
        event = {"time": time.time(), "stage": note.stage, "event": "died", "rank": note.rank}
        artifacts.append_event(run.events, event)
        print(f"puzzle: {note} died last time; what it left unfinished is taken up again", file=sys.stderr)
    artifacts.remove(run.folder / "ranks")


def _tidy(run: Run) -> None:
    """Removes what crashes left half-written, and checkpoints of students that are finished, and of rivals."""
    artifacts.sweep(run.folder)
    if run.data.exists():
        artifacts.remove(run.folder / "shards")
    for final in run.folder.glob("students/*/final"):
        artifacts.remove(final.parent / "kd")
        artifacts.remove(final.parent / "tournament")


def _prepare(run: Run) -> None:
    _tidy(run)
    if (run.folder / "env.json").exists():
        return
    names = ("puzzle-nas", "torch", "transformers", "ortools", "numpy", "safetensors")
    versions = {"python": platform.python_version(), **{name: _version(name) for name in names}}
    environment = json.dumps(
        {"versions": versions, "machine": platform.machine(), "system": platform.platform()}, indent=1
    )
    artifacts.write_text(run.folder / "env.json", environment + "\n")


def _record_config(run: Run) -> None:
    """Written when something is about to be made with it, so it never claims settings that made nothing."""
    text = yamlfiles.dump(run.config)
    path = run.folder / "config.yaml"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        artifacts.write_text(path, text)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _resting_on(run: Run, name: str) -> list[Stage]:
    """The stage and all that need it, directly or not, in order."""
    affected = {_stage(run, name).name}
    for stage in stages_of(run):
        if affected.intersection(stage.needs):
            affected.add(stage.name)
    return [stage for stage in _all_of(run).values() if stage.name in affected]


def _forget(units: Sequence[Planned]) -> None:
    """Removes the units, the latest stage's first: what is left never rests on what is gone."""
    for unit in reversed(units):
        artifacts.remove(unit.path)


def _make(run: Run, stage: Stage, ranks: Ranks) -> None:
    """Makes what is missing of the stage: this rank's share, or rank 0 all of it; ends when all ranks have."""
    planned = stage.plan(run)
    current = [artifacts.is_current(unit.path, unit.inputs, stage.name) and not unit.outgrown for unit in planned]
    missing = [unit for unit, done in zip(planned, current, strict=True) if not done]
    ranks.wait(run.folder, stage.name)  # all have seen the same before anyone adds to it
    if not stage.shared or ranks.count == 1:
        with ranks.work_of_first(run.folder, stage.name):
            if missing and ranks.first:
                _make_missing(run, stage, missing)
    elif missing:
        with noted(run.folder, ranks, stage.name, len(missing)):
            _make_missing(run, stage, missing)
            ranks.wait(run.folder, stage.name)
    ranks.wait(run.folder, stage.name)


def _make_missing(run: Run, stage: Stage, missing: Sequence[Planned]) -> None:
    if stage.name != "data" and run.data.exists():
        run.check_sequence_counts()
    if Ranks.current().first:
        _record_config(run)
    from puzzle.progress import stage_progress

    with stage_progress(stage.name, len(missing), run.events) as progress:
        _maker(stage.name)(run, missing, progress)


def _maker(name: str) -> Callable[[Run, Sequence[Planned], Progress], None]:
    if name == "search":
        return _make_solution
    if name == "report":
        from puzzle.report import make_report

        return make_report
    from puzzle.stages import MAKERS

    return MAKERS[name]


def _make_solution(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    (unit,) = missing
    progress.total(run.constraint_file.solutions.count, 0)
    solutions = solve(run, unit.inputs, lambda: progress.fraction(1, "different solutions"))
    publish_solutions(run, unit, solutions)
    progress.done(unit.path.name)


def publish_solutions(run: Run, unit: Planned, solutions: Sequence[Solution], **more: object) -> None:
    """The unit of a search: its solutions, the first one's architecture by variant names, and ``more`` payload."""
    best = set(solutions[0].items)

    def write(aside: Path) -> Mapping[str, object]:
        chosen = [item for item in run.items if item.id in best]
        architecture = {str(site): variant_name(spec) for item in chosen for site, spec in item.at.items()}
        (aside / "architecture.json").write_text(json.dumps(architecture, indent=1) + "\n", encoding="utf-8")
        found = {"solutions": [to_json(solution) for solution in solutions]}
        (aside / "solution.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return {**found, **more}

    artifacts.publish_folder(unit.path, unit.inputs, write)


def solve(run: Run, inputs: Mapping[str, str], on_solution: Callable[[], None] = lambda: None) -> tuple[Solution, ...]:
    """The search on the run's tables, without writing anything."""
    conflicts = run.space.conflicts()
    tables = run.read_scores(), run.read_costs()
    return search.search(run.shape, run.items, *tables, run.constraint_file, inputs, conflicts, on_solution)


def unit_states(run: Run, stage: Stage) -> list[State]:
    """The state of each unit of a stage."""
    return [unit_state(unit) for unit in stage.plan(run)]


def unit_state(unit: Planned) -> State:
    if not unit.path.exists():
        return "missing"
    return "stale" if artifacts.changed_inputs(unit.path, unit.inputs) else "done"
