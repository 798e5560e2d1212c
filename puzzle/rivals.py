"""What the search is set beside and needs a model for, as the pure lane sees it: made when asked for. Loads torch then.

Reads a run; evolution chooses on the split that the scores are from, as the search does; all is reported on another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace

from puzzle import artifacts, pipeline
from puzzle.config import score_of
from puzzle.profiling import memory
from puzzle.run import Run
from puzzle.search.compare import Compared
from puzzle.search.constraints import teacher_value, workloads
from puzzle.search.evolution import Step, evolve
from puzzle.search.metrics import METRICS, Setting
from puzzle.search.mip import best_of
from puzzle.search.problem import Chosen, Problem
from puzzle.types import GIB, ConfigError

SHARES = ((1 / 8, 4), (1 / 2, 2), (1.0, 1))  # of the sequences, and survivors: evolution's steps
ROUNDED_TO = ("fp8", "int4-g32")


def block_importance(run: Run) -> list[float]:
    """One number a layer, from its unit; computed first where that is missing."""
    pipeline.run_stage(run, "importance")
    return artifacts.read_unit(run.importance).read(list[float], "importance")


def evolutions(run: Run, problem: Problem, evaluations: int) -> dict[str, Callable[[], Chosen]]:
    """Two ways to choose: by evolution from the best uniform architecture, and from the search's; each with so many
    true evaluations on the sequences that the parts were scored on.
    """
    if run.context:
        raise ConfigError("evolution looks at changes to the teacher; leave out --on")
    metric = score_of(problem.objective_name)

    def find(start: Sequence[str] | None = None) -> Chosen:
        from puzzle.stages.rivals import true_scores

        with contextlib.ExitStack() as stack:
            stack.enter_context(artifacts.exclusive(run.folder))
            steps = [
                Step(stack.enter_context(true_scores(run, metric, share)), share, survivors)
                for share, survivors in SHARES
            ]
            return evolve(problem, steps, evaluations, run.config.seed, start)

    return {
        f"evolution, {evaluations} evaluations": find,
        "evolution from the MIP": lambda: find(best_of([problem])[1].chosen),
    }


def quantised_teachers(run: Run, problem: Problem) -> list[Compared]:
    """The teacher rounded to nearest, its true quality on ``report`` and what it takes; times are not known.

    ConfigError where the objective is neither KL nor CE.
    """
    if problem.objective_name not in ("kl_nats", "ce_delta_nats"):
        raise ConfigError(f"--quantised: measured are kl_nats and ce_delta_nats, not {problem.objective_name}")
    from puzzle.stages.rivals import quantised_quality

    found = []
    for dtype in ROUNDED_TO:
        of_layers = sum(memory.weight_bytes(spec, run.shape, dtype) for spec in run.keep_specs)
        gib = (of_layers + memory.rest_weight_bytes(run.shape, dtype)) / GIB
        seen = quantised_quality(run, dtype, "report")
        measured = seen.kl_nats if problem.objective_name == "kl_nats" else seen.ce_nats - seen.teacher_ce_nats
        name = f"teacher in {dtype}, {gib:.4g} GiB"
        found.append(Compared(name, totals=_totals(run, problem, dtype), measured=tuple(measured.tolist())))
    return found


def _totals(run: Run, problem: Problem, dtype: str) -> dict[str, float]:
    """What rests on no times, of the teacher with its weights in ``dtype``."""
    settings = {"": Setting(run.shape)}
    for workload in workloads(run.constraint_file, run.shape):
        size = round(problem.quantity(f"{workload.name}.batch_size").constant)
        settings[f"{workload.name}."] = Setting(run.shape, replace(workload, weights=dtype), size)
    return {
        f"{place}{name}": float(teacher_value(name, setting))
        for place, setting in settings.items()
        for name, metric in METRICS.items()
        if not metric.phases and (metric.workload == "none") == (not place)
    }
