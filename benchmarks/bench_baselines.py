"""The MIP against every simpler way to choose, by true KL before any global distillation.

    python benchmarks/bench_baselines.py [--seeds 0 1 2] [--shares 0.85 0.65 0.45] [--evaluations 60]

On the BLD-trained libraries of bench_refine.py, under a limit on the parameters of the layers: what
``puzzle compare`` sets beside the search (two greedy algorithms, uniform, most parameters, random, the MIP by CE, whole
layers by Block Importance, evolution at as many true evaluations), the MIP on no-op variants alone (REFERENCE.md, claim
2), the same variants as the MIP's with random weights (claim 3), and layers left out by their loss, scattered or in one
run (claim 14). The quantised teacher has no parameters less: its KL and bytes are given once a seed. True KL is on
``report``, where nothing was chosen; differences to the MIP's are paired over its sequences.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_refine import REPORT_SEQUENCES, SHARES, against, library
from demo_runs import Results, problem_of, quality
from torch import Tensor

from puzzle import search
from puzzle.build import build_student
from puzzle.progress import stage_progress
from puzzle.rivals import block_importance, evolutions, quantised_teachers
from puzzle.run import Run
from puzzle.search.baselines import importance_depth, random_feasible
from puzzle.search.compare import Compared, compare
from puzzle.search.linear import minimise
from puzzle.search.problem import Chosen, Problem
from puzzle.stages.common import item_weights, teacher_of
from puzzle.stages.truth import Truths, jobs
from puzzle.types import Costs, InfeasibleError, Item

RESULTS = Path(__file__).parent / "results"
RANDOM_DRAWS = 5
INIT_STD = 0.02


def one_library(results: Results, options: argparse.Namespace, seed: int) -> None:
    _, run = library(options, seed)
    losses = {metric: run.read_scores().means(run.items, metric) for metric in ("kl", "ce_delta")}
    importance = block_importance(run)
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(stage_progress("truth", 0, run.events))
        measure = Truths(run, jobs(run, stack), progress).of("report", "kl")
        for share in options.shares:
            if f"{seed}/{share}/MIP" in results.figures and f"{seed}/{share}/random weights" in results.figures:
                continue
            problem = problem_of(run, share)
            more: dict[str, Callable[[], Chosen]] = {
                "MIP, no-op only": functools.partial(no_op_only, problem),
                "depth by loss, scattered": functools.partial(
                    importance_depth, problem, layer_losses(run, losses["kl"])
                ),
                "depth by loss, one run": functools.partial(best_run, run, problem, measure),
                **evolutions(run, problem, options.evaluations),
            }
            for draw in range(1, RANDOM_DRAWS):
                more[f"random {draw}"] = functools.partial(random_of, problem, 1000 * seed + draw)
            found = compare(problem, losses["ce_delta"], importance, 1000 * seed, measure, more)
            chosen = found[0].chosen
            for one in found:
                results.once(f"{seed}/{share}/{one.name}", functools.partial(figures, one, found[0]))
            results.once(f"{seed}/{share}/random weights", functools.partial(random_weights, run, chosen, seed))
    (asked,) = search.problems(run.shape, run.items, run.read_scores(), Costs(), run.constraint_file)
    for one in quantised_teachers(run, asked):
        values = one.measured
        results.once(
            f"{seed}/{one.name}", lambda values=values: {"report": statistics.fmean(values), "sequences": len(values)}
        )


def figures(one: Compared, first: Compared) -> dict[str, Any]:
    if not one.measured:
        return {"note": one.note or "not finite"}
    return {"sum": one.objective, **against(one.measured, first.measured), "items": list(one.chosen)}


def random_of(problem: Problem, seed: int) -> Chosen:
    return random_feasible(problem, seed, 1)[0]


def no_op_only(problem: Problem) -> Chosen:
    """The MIP where every part is the teacher's or left out."""
    kept = tuple(item for item in problem.items if all(spec.kind in ("keep", "skip") for spec in item.specs))
    small = replace(problem, items=kept)
    choice = minimise(small, small.objective, small.rows)
    if choice is None:
        raise InfeasibleError("nothing keeps all bounds")
    return small.in_order(choice.chosen)


def layer_losses(run: Run, scores: Mapping[str, float]) -> list[float]:
    """By layer, the sum of the scores of leaving out its two parts."""
    return [
        sum(scores[item.id] for item in run.items if _is_skip(item) and item.sites[0].layer == layer)
        for layer in range(run.shape.num_layers)
    ]


def _is_skip(item: Item) -> bool:
    return len(item.sites) == 1 and item.specs[0].kind == "skip"


def best_run(run: Run, problem: Problem, measure: Callable[[Sequence[Chosen]], Any]) -> Chosen:
    """The best by truth of all runs of consecutive layers that are just long enough. It is given the true values on the
    sequences that are reported: an advantage, which it does not live up to."""
    layers = range(run.shape.num_layers)
    for length in layers:
        runs = [range(first, first + length) for first in layers if first + length <= run.shape.num_layers]
        fits = [found for dropped in runs if not problem.violations(found := _without(run, problem, dropped))]
        if fits:
            values = measure(fits)
            return min(zip(fits, values, strict=True), key=lambda pair: statistics.fmean(pair[1] or [math.inf]))[0]
    raise InfeasibleError("no run of layers is long enough")


def _without(run: Run, problem: Problem, dropped: range) -> Chosen:
    wanted = [
        item.id
        for item in run.items
        if len(item.sites) == 1 and item.specs[0].kind == ("skip" if item.sites[0].layer in dropped else "keep")
    ]
    return problem.in_order(wanted)


def random_weights(run: Run, chosen: Chosen, seed: int) -> dict[str, float]:
    """The MIP's architecture with weights of its library's replaced by random ones of a usual start."""
    by_id = {item.id: item for item in run.items}
    generator = torch.Generator().manual_seed(seed)

    def weights(item: Item) -> Mapping[str, Tensor]:
        return {
            name: torch.randn(tensor.shape, generator=generator) * INIT_STD if tensor.dim() > 1 else tensor
            for name, tensor in item_weights(run, item).items()
        }

    student = build_student(teacher_of(run), [by_id[item_id] for item_id in chosen], weights)
    return {"report": quality(run, student, "report", REPORT_SEQUENCES)["kl"]}


def print_table(results: Results, options: argparse.Namespace) -> None:
    names = list(dict.fromkeys(name.split("/", 2)[2] for name in results.figures if name.count("/") == 2))
    for share in options.shares:
        for name in names:
            rows = [results.figures.get(f"{seed}/{share}/{name}", {}) for seed in options.seeds]
            cells = [f"{row['report']:.4f}" if "report" in row else "-" for row in rows]
            means = [row["report"] for row in rows if "report" in row]
            print(f"{share:.0%} {name:<28} {' '.join(cells)}  mean {statistics.fmean(means or [math.nan]):.4f}")
    for name, row in results.figures.items():
        if name.count("/") == 1:
            print(name, row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES))
    parser.add_argument("--start", choices=["best", "paper"], default="best", help="of the variants before BLD")
    parser.add_argument("--evaluations", type=int, default=60, help="true ones, of evolution")
    parser.add_argument("--bld-tokens", type=int, default=131072)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bench-library")
    parser.add_argument("--output", type=Path, default=RESULTS / "baselines.json")
    options = parser.parse_args()
    settings = {"start": options.start, "bld_tokens": options.bld_tokens, "evaluations": options.evaluations}
    results = Results(options.output, settings)
    for seed in options.seeds:
        one_library(results, options, seed)
    print_table(results, options)


if __name__ == "__main__":
    main()
