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
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from demo_runs import Results, make_library, measure, problem_of, quality, solved, student_of

from puzzle.run import Run
from puzzle.search import baselines

RESULTS = Path(__file__).parent / "results" / "students.json"
SELECT_SEQUENCES, NUM_RANDOM = 32, 20
ARMS = ("mip", "uniform", "random", "mip, paper's start")


def best_on_select(run: Run, candidates: Sequence[Sequence[str]]) -> Sequence[str]:
    return min(candidates, key=lambda chosen: quality(run, student_of(run, chosen), "select", SELECT_SEQUENCES)["kl"])


def choices(seed: int, options: argparse.Namespace) -> dict[str, Callable[[], tuple[Run, Sequence[str]]]]:
    """How each arm comes to its architecture."""
    tokens = (f"seed={seed}", f"distill.tokens={options.bld_tokens}", f"kd.tokens={options.kd_tokens}")
    ours = functools.cache(lambda: make_library(options.work, *tokens))
    paper = functools.cache(lambda: make_library(options.work, *tokens, "init.start=paper"))

    def uniform() -> tuple[Run, Sequence[str]]:
        return ours(), best_on_select(ours(), baselines.feasible_uniform(problem_of(ours(), options.share)))

    def random() -> tuple[Run, Sequence[str]]:
        candidates = baselines.random_feasible(problem_of(ours(), options.share), seed, NUM_RANDOM)
        return ours(), best_on_select(ours(), candidates)

    return {
        "mip": lambda: (ours(), solved(ours(), options.share)),
        "uniform": uniform,
        "random": random,
        "mip, paper's start": lambda: (paper(), solved(paper(), options.share)),
    }


def table(results: dict[str, Any], seeds: int) -> str:
    lines = [f"{'arm':<22}{'KL before':>20}{'CE gap before':>20}{'KL after':>20}{'CE gap after':>20}"]
    for arm in ARMS:
        cells = ""
        for when in ("before", "after"):
            for figure in ("kl", "ce_gap"):
                values = [results[f"{arm}/{seed}"][when][figure] for seed in range(seeds)]
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
    results = Results(options.output, {name: getattr(options, name) for name in ("share", "bld_tokens", "kd_tokens")})
    for seed in range(options.seeds):
        for arm, choose in choices(seed, options).items():
            results.once(f"{arm}/{seed}", lambda choose=choose: measure(*choose(), options.share))
    print(table(results.figures, options.seeds))


if __name__ == "__main__":
    main()
