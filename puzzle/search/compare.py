"""The MIP's answer beside the baselines', under the same bounds: what each chooses, predicts and keeps to.

Reads a Problem; computes one record a way of choosing; writes nothing. What needs a model, the true quality of each
architecture, is handed in as a function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from puzzle.search.baselines import (
    best_uniform,
    greedy,
    importance_depth,
    most_params,
    published_greedy,
    random_feasible,
)
from puzzle.search.linear import minimise
from puzzle.search.problem import Chosen, Measure, Problem
from puzzle.types import ConfigError, InfeasibleError, mean_and_error

MIP = "MIP"


@dataclass(frozen=True)
class Compared:
    """``chosen`` is empty where nothing was found that fits, and ``note`` says why; or where it is no choice of items.

    ``objective``: as the problem's scores predict it; ``totals``: of the bounded metrics, by name; ``measured``: the
    true objective per sequence, where that is known; empty where it is not finite.
    """

    name: str
    chosen: Chosen = ()
    objective: float | None = None
    totals: Mapping[str, float] = field(default_factory=dict, hash=False)
    measured: tuple[float, ...] | None = None
    note: str = ""


def compare(
    problem: Problem,
    loss: Mapping[str, float] | None = None,
    importance: Sequence[float] | None = None,
    seed: int = 0,
    measure: Measure | None = None,
    more: Mapping[str, Callable[[], Chosen]] | None = None,
) -> tuple[Compared, ...]:
    """The MIP first, then each baseline.

    ``loss``: scores by CE for the loss-only MIP; ``importance``: one number a layer; without them those two are left
    out. ``measure`` is called once, with every different architecture. ``more``: further ways to choose, by name.
    """
    ways: dict[str, Callable[[], tuple[str, ...]]] = {
        MIP: lambda: _optimum(problem, problem.objective),
        "convex-hull greedy": lambda: greedy(problem),
        "published greedy": lambda: published_greedy(problem),
        "uniform": lambda: best_uniform(problem),
        "most parameters": lambda: most_params(problem),
        "random": lambda: random_feasible(problem, seed, 1)[0],
    }
    if loss is not None:
        ways["MIP by CE"] = lambda: _optimum(problem, loss)
    if importance is not None:
        ways["importance depth"] = lambda: importance_depth(problem, importance)
    ways.update(more or {})
    found = tuple(_compared(problem, name, choose) for name, choose in ways.items())
    different = list(dict.fromkeys(problem.in_order(one.chosen) for one in found if one.chosen))
    if measure is None or not different:
        return found
    values = dict(zip(different, measure(different), strict=True))
    return tuple(
        replace(one, measured=tuple(values[problem.in_order(one.chosen)] or ())) if one.chosen else one for one in found
    )


def _compared(problem: Problem, name: str, choose: Callable[[], Chosen]) -> Compared:
    try:
        chosen = choose()
    except (ConfigError, InfeasibleError) as error:
        return Compared(name, note=str(error))
    return Compared(
        name,
        chosen,
        float(problem.objective_of(chosen)),
        {row.quantity.name: float(row.quantity.value(chosen)) for row in problem.rows},
    )


def _optimum(problem: Problem, objective: Mapping[str, float]) -> tuple[str, ...]:
    missing = [item.id for item in problem.items if item.id not in objective]
    if missing:
        raise ConfigError(f"{missing[0]} has no such score")
    choice = minimise(problem, objective, problem.rows)
    if choice is None:
        raise InfeasibleError("nothing keeps all bounds")
    return problem.in_order(choice.chosen)


def _truth(values: Sequence[float] | None, first: Sequence[float] | None) -> list[str]:
    """The mean, and its excess over the first's with the standard error of the paired differences."""
    if values is None:
        return ["", ""]
    mean = f"{mean_and_error(values)[0]:.4f}" if values else "not finite"
    if not values or not first:
        return [mean, ""]
    excess, error = mean_and_error([one - other for one, other in zip(values, first, strict=True)])
    return [mean, f"{excess:+.4f} ± {error:.4f}"]


def table(found: Sequence[Compared], problem: Problem) -> str:
    """For people: one line each, and a note where nothing was found."""
    metrics = list(dict.fromkeys(row.quantity.name for row in problem.rows))
    measured = any(one.measured for one in found)
    true = [f"true {problem.objective_name}", f"over the {MIP}'s"] if measured else []
    head = ["", f"{problem.objective_name}, predicted", *true, *metrics]
    lines = [head]
    for one in found:
        if one.objective is None and not one.measured:
            lines.append([one.name, f"- {one.note}"])
            continue
        truth = _truth(one.measured, found[0].measured) if measured else []
        predicted = "" if one.objective is None else f"{one.objective:.4f}"
        totals = (f"{one.totals[name]:,.6g}" if name in one.totals else "" for name in metrics)
        lines.append([one.name, predicted, *truth, *totals])
    whole = [line for line in lines if len(line) == len(head)]
    widths = [max(len(line[place]) for line in whole) for place in range(len(head))]
    widths[0] = max(len(line[0]) for line in lines)
    rows = []
    for line in lines:
        cells = line[1:] if len(line) != len(head) else [c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)]
        rows.append("  ".join([line[0].ljust(widths[0]), *cells]).rstrip())
    return "\n".join(rows)
