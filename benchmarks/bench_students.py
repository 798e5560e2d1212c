"""The MIP's student against simpler ones of the same size, at equal GKD tokens: is the search worth it?

On the bundled teacher at 65 % of its layer bytes, for each seed: the MIP's student; the best uniform one (the same
variant at every layer) and the best of 20 random feasible ones, both chosen by true KL on ``select``; and the MIP's on
a library that began at the paper's starting points. KL and CE gap on ``report``, before and after GKD. Every figure is
written to ``benchmarks/results/students.json`` as it is found, and a run that was stopped goes on from there.

    python benchmarks/bench_students.py [--seeds 3] [--share 0.65] [--bld-tokens N] [--kd-tokens N]
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from environment import environment

from puzzle import kd, pipeline, search, stages
from puzzle.blocks import library
from puzzle.build import build_student
from puzzle.config import ConstraintFile
from puzzle.evaluate import evaluate
from puzzle.modeling import PuzzleForCausalLM
from puzzle.run import Run
from puzzle.schedule import num_steps
from puzzle.search import baselines, mip
from puzzle.search.problem import Problem
from puzzle.tables import read_scores
from puzzle.types import Item
from puzzle.variants import params, rest_params

RESULTS = Path(__file__).parent / "results" / "students.json"
CONFIG = """
run: {folder}
constraints: half-memory
seed: {seed}
init: {{start: {start}}}
distill: {{tokens: {bld_tokens}}}
kd: {{tokens: {kd_tokens}}}
"""
SELECT_SEQUENCES, REPORT_SEQUENCES, NUM_RANDOM = 32, 128, 20
ARMS = ("mip", "uniform", "random", "mip, paper's start")


def make_library(work: Path, seed: int, start: str, options: argparse.Namespace) -> Run:
    """A run up to its scores."""
    folder = work / f"{start}-{seed}-{options.bld_tokens}"
    config = work / f"{folder.name}.yaml"
    values = {"folder": folder, "seed": seed, "start": start}
    config.write_text(CONFIG.format(**values, bld_tokens=options.bld_tokens, kd_tokens=options.kd_tokens))
    run = Run.open(config)
    for stage in ("data", "importance", "init", "distill", "score"):
        pipeline.run_stage(run, stage)
    return run


def problem_of(run: Run, share: float) -> Problem:
    """Minimise the sum of KL scores at ``share`` of the teacher's layer parameters (all of one dtype, so bytes too)."""
    layers = sum(params(item.specs[0], run.shape) for item in run.items if item.specs[0].kind == "keep")
    limit = int(rest_params(run.shape) + share * layers)
    file = ConstraintFile.model_validate({"constraints": {"params": {"max": limit}}})
    (problem,) = search.problems(run.shape, run.items, read_scores(run.scores), (), file)
    return problem


def student_of(run: Run, chosen: Sequence[str]) -> PuzzleForCausalLM:
    by_id = {item.id: item for item in run.items}
    items: list[Item] = [by_id[item_id] for item_id in chosen]
    return build_student(stages.teacher_of(run), items, lambda item: library.read_weights(run.trained(item)))


def quality(run: Run, student: PuzzleForCausalLM, split: str, sequences: int) -> dict[str, float]:
    """KL and CE gap in nats per token, with standard errors over sequences."""
    batches = stages.sequences_of(run, split, sequences)
    found = evaluate(student, stages.teacher_of(run), batches, 1.0)
    return {
        "kl": found.kl_nats.mean,
        "kl_se": found.kl_nats.standard_error,
        "ce_gap": found.ce_gap_nats.mean,
        "ce_gap_se": found.ce_gap_nats.standard_error,
    }


def best_on_select(run: Run, candidates: Sequence[Sequence[str]]) -> Sequence[str]:
    return min(candidates, key=lambda chosen: quality(run, student_of(run, chosen), "select", SELECT_SEQUENCES)["kl"])


def distilled(run: Run, student: PuzzleForCausalLM) -> PuzzleForCausalLM:
    settings, compute, tokens = run.config.kd, stages.compute_of(run), stages.tokens_of(run)
    job = kd.Distillation(student, stages.teacher_of(run), settings, compute)
    steps = num_steps(settings.tokens, settings.batch_size, run.config.data.sequence_tokens)
    batches = functools.partial(tokens.batch, run.config.seed, batch_size=settings.batch_size)
    job.run(batches, steps, steps, lambda _: None)
    return job.finish()


def choices(work: Path, seed: int, options: argparse.Namespace) -> dict[str, Callable[[], tuple[Run, Sequence[str]]]]:
    """How each arm comes to its architecture."""
    ours = functools.cache(lambda: make_library(work, seed, "closed-form", options))
    paper = functools.cache(lambda: make_library(work, seed, "paper", options))

    def solved(run: Run) -> Sequence[str]:
        return mip.solve([problem_of(run, options.share)], {}).solutions[0].items

    return {
        "mip": lambda: (ours(), solved(ours())),
        "uniform": lambda: (
            ours(),
            best_on_select(ours(), baselines.feasible_uniform(problem_of(ours(), options.share))),
        ),
        "random": lambda: (
            ours(),
            best_on_select(ours(), baselines.random_feasible(problem_of(ours(), options.share), seed, NUM_RANDOM)),
        ),
        "mip, paper's start": lambda: (paper(), solved(paper())),
    }


def measure(run: Run, chosen: Sequence[str], share: float) -> dict[str, object]:
    problem = problem_of(run, share)
    student = student_of(run, chosen)
    before = quality(run, student, "report", REPORT_SEQUENCES)
    after = quality(run, distilled(run, student), "report", REPORT_SEQUENCES)
    return {
        "params": sum(parameter.numel() for parameter in student.parameters()),
        "sum_of_scores": float(problem.objective_of(chosen)),
        "before": before,
        "after": after,
        "items": list(chosen),
    }


def table(results: dict[str, dict[str, object]], seeds: int) -> str:
    lines = [f"{'arm':<22}{'KL before':>20}{'CE gap before':>20}{'KL after':>20}{'CE gap after':>20}"]
    for arm in ARMS:
        cells = ""
        for when in ("before", "after"):
            for figure in ("kl", "ce_gap"):
                values = [results[f"{arm}/{seed}"][when][figure] for seed in range(seeds)]  # type: ignore[index]
                spread = statistics.stdev(values) if seeds > 1 else float("nan")
                cells += f"{statistics.mean(values):>11.4f} ± {spread:.4f}"
        lines.append(f"{arm:<22}{cells}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.65)
    parser.add_argument("--bld-tokens", type=int, default=32768)
    parser.add_argument("--kd-tokens", type=int, default=262144)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bench-students")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(options, name) for name in ("share", "bld_tokens", "kd_tokens")}
    found = json.loads(options.output.read_text()) if options.output.exists() else {}
    results = found.get("results", {}) if found.get("settings") == settings else {}
    for seed in range(options.seeds):
        for arm, choose in choices(options.work, seed, options).items():
            if (key := f"{arm}/{seed}") not in results:
                results[key] = measure(*choose(), options.share)
                print(key, results[key]["before"], results[key]["after"], flush=True)  # type: ignore[index]
                document = {"settings": settings, "environment": environment(), "results": results}
                options.output.write_text(json.dumps(document, indent=1) + "\n")
    print(table(results, options.seeds))


if __name__ == "__main__":
    main()
