"""The search past additivity: refine against the additive MIP and the best of its k best, at equal evaluations.

    python benchmarks/bench_refine.py [--seeds 0 1 2] [--shares 0.45 0.35 0.25] [--gkd]

On BLD-trained libraries of the bundled teacher, in the work folder that bench_score_quality.py uses; at each budget:
the additive MIP's answer, what refine finds, and, at as many true evaluations on ``select``, the best by truth of the
MIP's k best answers (proven ones), those that differ from one another in a fifth of the sites and those that differ at
all. Figures are true KL on ``report``, paired over sequences with the MIP's; ``--gkd`` adds the same after equal GKD.
Another way to search is a line more in WAYS. Evaluations are kept in the run's folder: what was stopped goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo_runs import Results, distilled, make_library, problem_of, quality, student_of

from puzzle.progress import stage_progress
from puzzle.run import Run
from puzzle.search import mip
from puzzle.search.problem import Chosen, Measure, Problem
from puzzle.search.refine import Refined, Settings, refine
from puzzle.stages.truth import Truths, jobs

RESULTS = Path(__file__).parent / "results"
SHARES = (0.85, 0.65, 0.45, 0.35, 0.25)
SELECT_SEQUENCES, REPORT_SEQUENCES = 192, 384  # of 664 and 832 that there are


@dataclass(frozen=True)
class Task:
    """One budget of one library."""

    problem: Problem
    select: Measure
    evaluations: int

    def answers(self, count: int, min_difference: float) -> list[Chosen]:
        return [one.items for one in mip.solve([self.problem], {}, count, min_difference).solutions]

    def best_of(self, answers: Sequence[Chosen]) -> Chosen:
        values = self.select(answers)
        return min(zip(answers, values, strict=True), key=lambda pair: statistics.fmean(pair[1] or [math.inf]))[0]


def refined(task: Task) -> Refined:
    return refine(task.problem, lambda count: task.answers(count, 0.2), task.select, Settings(task.evaluations))


WAYS: dict[str, Callable[[Task], Chosen]] = {
    "additive": lambda task: task.answers(1, 0.2)[0],
    "refine": lambda task: refined(task).best.items,
    "k best, diverse": lambda task: task.best_of(task.answers(task.evaluations, 0.2)),
    "k best": lambda task: task.best_of(task.answers(task.evaluations, 0.0)),
}


def library(options: argparse.Namespace, seed: int) -> tuple[Run, Run]:
    """The run, as it chooses and as it reports."""
    settings = [
        f"seed={seed}",
        f"init.start={options.start}",
        f"distill.tokens={options.bld_tokens}",
        "kd.tokens=262144",
    ]
    run = make_library(options.work, *settings)
    config = options.work / f"{run.folder.name}.yaml"
    chooses, reports = (
        Run.open(config, [*settings, f"evaluate.sequences={count}"]) for count in (SELECT_SEQUENCES, REPORT_SEQUENCES)
    )
    return chooses, reports


def one_library(results: Results, options: argparse.Namespace, seed: int) -> None:
    chooses, reports = library(options, seed)
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(stage_progress("truth", 0, chooses.events))
        select = Truths(chooses, jobs(chooses, stack), progress).of("select", "kl")
        report = Truths(reports, jobs(reports, stack), progress).of("report", "kl")
        for share in options.shares:
            task = Task(problem_of(chooses, share), select, options.evaluations)
            for name, way in WAYS.items():
                if f"{options.start}/{seed}/{share}/{name}" in results.figures:
                    continue
                chosen = way(task)
                first = task.answers(1, 0.2)[0]
                on_select, on_report = (measure([chosen, first]) for measure in (select, report))
                figures = {
                    "sum": float(task.problem.objective_of(chosen)),
                    "select": statistics.fmean(on_select[0] or ()),
                    **against(*(one or () for one in on_report)),
                    "items": list(chosen),
                }
                results.once(f"{options.start}/{seed}/{share}/{name}", lambda figures=figures: figures)
    if options.gkd:
        after = functools.cache(lambda items: after_gkd(reports, items))  # ways often find the same one
        for share in options.shares:
            for name in WAYS:
                items = tuple(results.figures[f"{options.start}/{seed}/{share}/{name}"]["items"])
                results.once(f"{options.start}/{seed}/{share}/{name}/gkd", functools.partial(after, items))


def against(values: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """The true KL on report, and its excess over the additive MIP's, paired over sequences."""
    differences = [one - two for one, two in zip(values, other, strict=True)]
    return {
        "report": statistics.fmean(values),
        "excess": statistics.fmean(differences),
        "excess_se": statistics.stdev(differences) / math.sqrt(len(differences)),
    }


def after_gkd(run: Run, items: Sequence[str]) -> dict[str, float]:
    return quality(run, distilled(run, student_of(run, items)), "report", REPORT_SEQUENCES)


def print_table(results: Results, options: argparse.Namespace) -> None:
    """By budget the KL of every way, and what refine lowers it by; then the mean of that over the budgets."""
    for when, key in (("", "report"), ("/gkd", "kl")):
        gains: dict[str, list[float]] = {name: [] for name in WAYS}
        for share in options.shares:
            names = {name: [f"{options.start}/{seed}/{share}/{name}{when}" for seed in options.seeds] for name in WAYS}
            if not all(one in results.figures for of in names.values() for one in of):
                continue
            rows = {name: [results.figures[one][key] for one in of] for name, of in names.items()}
            lower = {
                name: statistics.fmean(1 - one / two for one, two in zip(rows["refine"], of, strict=True))
                for name, of in rows.items()
            }
            for name, gain in lower.items():
                gains[name].append(gain)
            shown = {
                name: f"{statistics.fmean(of):.4f} ({lower[name]:+.1%})" + f" {[round(one, 4) for one in of]}"
                for name, of in rows.items()
            }
            print(f"{options.start} {share:.0%}{when:<5}", shown)
        if any(gains.values()):
            means = {name: f"{statistics.fmean(of):.1%}" for name, of in gains.items()}
            print(f"refine lowers KL{when}, mean over budgets:", means)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES))
    parser.add_argument("--start", choices=["best", "paper"], default="best", help="of the variants before BLD")
    parser.add_argument("--evaluations", type=int, default=60)
    parser.add_argument("--bld-tokens", type=int, default=131072)
    parser.add_argument("--gkd", action="store_true")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bench-library")
    parser.add_argument("--output", type=Path, default=RESULTS / "refine.json")
    options = parser.parse_args()
    settings: dict[str, Any] = {name: getattr(options, name) for name in ("bld_tokens", "evaluations")}
    settings |= {"select_sequences": SELECT_SEQUENCES, "report_sequences": REPORT_SEQUENCES}
    results = Results(options.output, settings)
    for seed in options.seeds:
        one_library(results, options, seed)
    print_table(results, options)


if __name__ == "__main__":
    main()
