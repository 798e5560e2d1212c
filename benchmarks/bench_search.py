"""How fast the search is, and against what: solvers on equal instances, the incumbent's call, the front, a slider.

    python benchmarks/bench_search.py [solvers front slider large] [--incumbent PYTHON] [--seeds 5]

Instances are those of search_instances.py. Writes ``benchmarks/results/search_speed.json``: seconds of wall clock and,
because that is noisy on a shared machine, of CPU time of the process and its children.

* ``solvers``: one search under three bounds at 80 layers x 54 blocks, sites and blocks, at gaps of 1e-9 and 1e-3: this
  project's own path, HiGHS, SCIP and CP-SAT on the whole programme through MathOpt, ``scipy.optimize.milp``, and with
  ``--incumbent`` (see incumbent_search.py) the call that ``nvidia-modelopt`` makes. Building the model is part of it.
  The answer is checked against the bounds in exact arithmetic, and its objective summed exactly.
* ``front``: the complete front of quality against parameters, and against latency, at that size.
* ``slider``: one of the bounds moved by 0.5 % at a time, down and up again, each solve starting from the last answer.
* ``large``: 126 layers x 500 blocks, at most 60 seconds each: what was found, and how far from the optimum at most.
"""

from __future__ import annotations

import argparse
import datetime
import json
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from environment import environment
from ortools.math_opt.python import mathopt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array
from search_instances import SIZES, instance

from puzzle.search import programme
from puzzle.search.linear import Effort, minimise, programme_of
from puzzle.search.pareto import front
from puzzle.search.problem import Problem
from puzzle.search.programme import Programme

RESULTS = Path(__file__).parent / "results" / "search_speed.json"
MODES = ("solvers", "front", "slider", "large")
GAPS = (1e-9, 1e-3)
LIMIT_S = 60.0  # of the large size; of one solve among solvers COMPARED_S
COMPARED_S = 30.0
PAPER_SIZES = ("80x54-sites", "80x54-blocks")


@dataclass(frozen=True)
class Run:
    """``objective`` None: nothing found in time. ``broken``: bounds that the answer breaks, exactly judged."""

    wall_s: float
    cpu_s: float
    objective: float | None
    broken: int = 0


def timed(solve: Callable[[], tuple[str, ...] | None], problem: Problem) -> Run:
    begin, cpu = time.perf_counter(), cpu_seconds()
    chosen = solve()
    wall_s, cpu_s = time.perf_counter() - begin, cpu_seconds() - cpu
    if chosen is None:
        return Run(wall_s, cpu_s, None)
    return Run(wall_s, cpu_s, float(problem.objective_of(chosen)), len(problem.violations(chosen)))


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def ours(problem: Problem, gap: float) -> tuple[str, ...] | None:
    choice = minimise(problem, problem.objective, problem.rows, effort=Effort(gap, COMPARED_S))
    return None if choice is None else choice.chosen


def whole(solver: str) -> Callable[[Problem, float], tuple[str, ...] | None]:
    """A solver on the whole programme, as this project makes it."""

    def solve(problem: Problem, gap: float) -> tuple[str, ...] | None:
        made = made_of(problem)
        model = programme._model(made, integer=True)
        parameters = mathopt.SolveParameters(
            random_seed=0,
            relative_gap_tolerance=gap,
            absolute_gap_tolerance=0.0,
            time_limit=datetime.timedelta(seconds=COMPARED_S),
            threads=None if solver == "HIGHS" else 1,
        )
        with programme._quiet():
            result = mathopt.solve(model, mathopt.SolverType[solver], params=parameters)
        if not result.has_primal_feasible_solution():
            return None
        found = result.variable_values(sorted(model.variables(), key=lambda variable: variable.id))
        return chosen_of(problem, np.array(found))

    return solve


def scipy_milp(problem: Problem, gap: float) -> tuple[str, ...] | None:
    made = made_of(problem)
    shape = (len(made.lower), len(made.objective))
    matrix = csr_array((made.value, (made.row, made.column)), shape=shape)
    found = milp(
        made.objective,
        integrality=np.ones(shape[1]),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(matrix, made.lower, made.upper),
        options={"mip_rel_gap": gap, "time_limit": COMPARED_S},
    )
    return None if found.x is None else chosen_of(problem, found.x)


def made_of(problem: Problem) -> Programme:
    made = programme_of(problem, problem.objective, [(row, Fraction(0)) for row in problem.rows])
    assert made is not None
    return made


def chosen_of(problem: Problem, x: np.ndarray[Any, Any]) -> tuple[str, ...]:
    return tuple(problem.items[column].id for column in np.flatnonzero(x > 0.5))


def incumbent(python: str) -> Callable[[Problem, float], Run]:
    """Their call in their own environment; seconds are those of the call, without starting Python and reading."""

    def solve(problem: Problem, gap: float) -> Run:
        place = {site: index for index, site in enumerate(problem.sites)}
        rows = {f"row{number}": row for number, row in enumerate(problem.rows)}
        limits = {}
        for name, row in rows.items():
            constant = Fraction(row.quantity.constant)
            limits[name] = [None if bound is None else float(bound - constant) for bound in row.linear_bounds()]
        items = {
            item.id: {
                "sites": [place[site] for site in item.sites],
                "loss": problem.objective[item.id],
                "costs": {name: row.quantity.coefficients[item.id] for name, row in rows.items()},
            }
            for item in problem.items
        }
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump({"items": items, "limits": limits}, file)
            file.flush()
            command = [python, str(Path(__file__).parent / "incumbent_search.py"), file.name]
            command += ["--gap", str(gap)] if gap > 1e-6 else []  # theirs is CBC's own: none
            try:
                done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=COMPARED_S)
            except subprocess.TimeoutExpired:
                return Run(COMPARED_S, COMPARED_S, None)
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
        told = json.loads(line.removeprefix("ANSWER "))
        broken = len(problem.violations(told["items"]))
        return Run(told["seconds"], told["cpu_seconds"], float(problem.objective_of(told["items"])), broken)

    return solve


def solvers(seeds: int, python: str | None) -> dict[str, Any]:
    ways: dict[str, Callable[[Problem, float], tuple[str, ...] | None]] = {
        "ours": ours,
        "highs": whole("HIGHS"),
        "scip": whole("GSCIP"),
        "cp-sat": whole("CP_SAT"),
        "scipy": scipy_milp,
    }
    theirs = incumbent(python) if python else None
    runs: dict[str, Any] = {}
    for name in PAPER_SIZES:
        for gap in GAPS:
            found: dict[str, list[Run]] = {}
            for seed in range(seeds):
                problem = instance(SIZES[name], seed)
                for way, solve in ways.items():
                    found.setdefault(way, []).append(timed(lambda: solve(problem, gap), problem))  # noqa: B023
                if theirs:
                    found.setdefault("incumbent", []).append(theirs(problem, gap))
                print(name, gap, seed, {way: (round(of[-1].cpu_s, 2), of[-1].objective) for way, of in found.items()})
            runs[f"{name} gap {gap:g}"] = {way: summary(of, found["ours"], gap) for way, of in found.items()}
    return runs


def summary(runs: Sequence[Run], ours: Sequence[Run], gap: float) -> dict[str, Any]:
    pairs = [(run.objective, own.objective) for run, own in zip(runs, ours, strict=True)]
    return {
        "median_wall_s": statistics.median(run.wall_s for run in runs),
        "median_cpu_s": statistics.median(run.cpu_s for run in runs),
        "cpu_s": [run.cpu_s for run in runs],
        "median_cpu_over_ours": statistics.median(run.cpu_s / own.cpu_s for run, own in zip(runs, ours, strict=True)),
        "objectives": [run.objective for run in runs],
        "largest_difference_from_ours": max(abs(a - b) for a, b in pairs if a is not None and b is not None),
        "answers_that_break_a_bound": sum(run.broken > 0 for run in runs),
        "nothing_found": sum(run.objective is None for run in runs),
    }


def fronts(seeds: int) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for name in PAPER_SIZES:
        for cost in ("params", "chat.e2e_ms", "chat.memory_gib"):
            walls, cpus, points = [], [], []
            for seed in range(seeds):
                problem = instance(SIZES[name], seed)
                begin, cpu = time.perf_counter(), cpu_seconds()
                points.append(len(front(problem, cost)))
                walls.append(time.perf_counter() - begin)
                cpus.append(cpu_seconds() - cpu)
            told[f"{name} {cost}"] = {
                "median_wall_s": statistics.median(walls),
                "median_cpu_s": statistics.median(cpus),
                "points": points,
            }
            print(name, cost, told[f"{name} {cost}"])
    return told


def slider(seeds: int, steps: int = 10) -> dict[str, Any]:
    """The memory bound in steps of 0.5 %, down and back."""
    told: dict[str, Any] = {}
    for name in PAPER_SIZES:
        walls, cpus, gaps = [], [], []
        for seed in range(seeds):
            problem = instance(SIZES[name], seed)
            start = minimise(problem, problem.objective, problem.rows, effort=Effort(1e-3))
            chosen = start.chosen if start else None
            for step in [*range(1, steps + 1), *reversed(range(steps))]:
                row = problem.rows[0]
                assert row.upper is not None
                moved = replace(row, upper=row.upper * (1000 - 5 * step) / 1000)
                begin, cpu = time.perf_counter(), cpu_seconds()
                choice = minimise(
                    problem, problem.objective, (moved, *problem.rows[1:]), effort=Effort(1e-3), start=chosen
                )
                walls.append(time.perf_counter() - begin)
                cpus.append(cpu_seconds() - cpu)
                assert choice is not None
                chosen = choice.chosen
                gaps.append(1 - choice.bound / float(choice.total))
        told[name] = {
            "median_wall_s": statistics.median(walls),
            "median_cpu_s": statistics.median(cpus),
            "90%_cpu_s": float(np.quantile(cpus, 0.9)),
            "largest_gap": max(gaps),
            "solves": len(walls),
        }
        print(name, told[name])
    return told


def large(seeds: int) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for name in ("126x500-sites", "126x500-blocks"):
        for gap in GAPS:
            walls, found = [], []
            for seed in range(seeds):
                problem = instance(SIZES[name], seed)
                begin = time.perf_counter()
                choice = minimise(problem, problem.objective, problem.rows, effort=Effort(gap, LIMIT_S - 5))
                walls.append(time.perf_counter() - begin)
                assert choice is not None
                found.append({"objective": float(choice.total), "gap": 1 - choice.bound / float(choice.total)})
            told[f"{name} gap {gap:g}"] = {"items": len(problem.items), "wall_s": walls, "answers": found}
            print(name, gap, told[f"{name} gap {gap:g}"])
    return told


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("modes", nargs="*", help="solvers, front, slider, large (default: all)")
    parser.add_argument("--incumbent", metavar="PYTHON")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    told = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for mode in options.modes or MODES:
        if mode == "solvers":
            result = solvers(options.seeds, options.incumbent)
        else:
            result = {"front": fronts, "slider": slider, "large": large}[mode](
                options.seeds if mode != "large" else min(options.seeds, 2)
            )
        told[mode] = {
            "environment": {**environment(), "scipy": metadata.version("scipy")},
            "seeds": options.seeds,
            **result,
        }
        RESULTS.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
