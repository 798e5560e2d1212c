"""What the benchmarks on the bundled teacher share: libraries, architectures under a share of it, students, figures.

A work folder keeps every library, and a result file every figure, so that a benchmark that was stopped goes on.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from environment import environment

from puzzle import artifacts, kd, pipeline, search
from puzzle.build import build_student
from puzzle.config import ConstraintFile
from puzzle.evaluate import evaluate
from puzzle.modeling import PuzzleForCausalLM
from puzzle.run import Run
from puzzle.schedule import num_steps
from puzzle.search import mip
from puzzle.search.problem import Problem
from puzzle.stages.common import compute_of, item_weights, sequences_of, teacher_of, tokens_of
from puzzle.tables import ScoreTable
from puzzle.types import Costs
from puzzle.variants import params, rest_params

CONFIG = "run: {folder}\nconstraints: half-memory\n"
LIBRARY_STAGES = ("data", "init", "distill", "score")
REPORT_SEQUENCES = 128


def make_library(work: Path, *settings: str, until: str = "score") -> Run:
    """A run of the bundled teacher up to its scores, with ``settings`` (``a.b=value``), in a folder named by them."""
    folder = work / artifacts.fingerprint(sorted(settings))
    config = work / f"{folder.name}.yaml"
    work.mkdir(parents=True, exist_ok=True)
    config.write_text(CONFIG.format(folder=folder))
    run = Run.open(config, settings)
    for stage in LIBRARY_STAGES[: LIBRARY_STAGES.index(until) + 1]:
        pipeline.run_stage(run, stage)
    return run


def problem_of(run: Run, share: float, scores: ScoreTable | None = None) -> Problem:
    """Minimise the sum of KL scores at ``share`` of the teacher's layer parameters (all of one dtype, so bytes too)."""
    layers = sum(params(spec, run.shape) for spec in run.keep_specs)
    return problem_under(run, {"params": {"max": int(rest_params(run.shape) + share * layers)}}, scores)


def problem_under(
    run: Run, limits: Mapping[str, Any], scores: ScoreTable | None = None, costs: Costs | None = None
) -> Problem:
    """Minimise the sum of KL scores under ``limits``, at the workload of the run's constraint file."""
    file = ConstraintFile.model_validate({"workloads": run.constraint_file.workloads, "constraints": limits})
    (problem,) = search.problems(run.shape, run.items, scores or run.read_scores(), costs or Costs(), file)
    return problem


def solved(run: Run, share: float) -> Sequence[str]:
    """The MIP's architecture."""
    return mip.solve([problem_of(run, share)], {}).solutions[0].items


def student_of(run: Run, chosen: Sequence[str]) -> PuzzleForCausalLM:
    by_id = {item.id: item for item in run.items}
    items = [by_id[item_id] for item_id in chosen]
    return build_student(teacher_of(run), items, functools.partial(item_weights, run))


def quality(run: Run, student: PuzzleForCausalLM, split: str, sequences: int) -> dict[str, float]:
    """KL and CE gap in nats per token, with standard errors over sequences."""
    found = evaluate(student, teacher_of(run), sequences_of(run, split, sequences), 1.0)
    return {
        "kl": found.kl_nats.mean,
        "kl_se": found.kl_nats.standard_error,
        "ce_gap": found.ce_gap_nats.mean,
        "ce_gap_se": found.ce_gap_nats.standard_error,
    }


def distilled(run: Run, student: PuzzleForCausalLM) -> PuzzleForCausalLM:
    """On the run's text."""
    settings, compute, tokens = run.config.kd, compute_of(run), tokens_of(run)
    job = kd.Distillation(student, teacher_of(run.distilling), settings, compute)
    steps = num_steps(settings.tokens, settings.batch_size, run.config.data.sequence_tokens)
    batches = functools.partial(tokens.batch, run.config.seed, batch_size=settings.batch_size)
    job.run(batches, steps, steps, lambda _: None)
    return job.finish()


def measure(run: Run, chosen: Sequence[str], share: float) -> dict[str, Any]:
    """The student of ``chosen`` before and after GKD, on sequences nothing was chosen on."""
    student = student_of(run, chosen)
    before = quality(run, student, "report", REPORT_SEQUENCES)
    return {
        "params": sum(parameter.numel() for parameter in student.parameters()),
        "sum_of_scores": float(problem_of(run, share).objective_of(chosen)),
        "before": before,
        "after": quality(run, distilled(run, student), "report", REPORT_SEQUENCES),
        "items": list(chosen),
    }


class Results:
    """A result file: settings, environment, and figures by name, written as they are found."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path, self._settings = path, dict(settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.figures = self._on_disk()

    def _on_disk(self) -> dict[str, Any]:
        found = json.loads(self._path.read_text()) if self._path.exists() else {}
        return found.get("results", {}) if found.get("settings") == self._settings else {}

    def once(self, name: str, find: Callable[[], Any]) -> Any:
        """The figure called ``name``, found now if it was not before."""
        if name not in self.figures:
            self.figures[name] = find()
            self.figures = self._on_disk() | self.figures  # another process may have added to it
            print(name, {key: value for key, value in self.figures[name].items() if key != "items"}, flush=True)
            document = {"settings": self._settings, "environment": environment(), "results": self.figures}
            artifacts.write_text(self._path, json.dumps(document, indent=1) + "\n")
        return self.figures[name]
