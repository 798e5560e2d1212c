"""The MIP's answer beside the baselines', under the same bounds: what each chooses, predicts and keeps to.

Reads a Problem; computes one record a way of choosing; writes nothing. What needs a model, the true quality of each
architecture, is handed in as a function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from puzzle.search.baselines import (
    best_uniform,
    greedy,
    importance_depth,
    most_params,
    published_greedy,
    random_feasible,
)
from puzzle.search.linear import minimise
from puzzle.search.problem import Problem
from puzzle.types import ConfigError, InfeasibleError

__all__ = ["Compared", "Evaluate", "compare", "table"]

Evaluate = Callable[[tuple[str, ...]], float]  # the true objective of an architecture, given its item ids
MIP = "MIP"


@dataclass(frozen=True)
class Compared:
    """``chosen`` is empty where nothing was found that fits, and ``note`` says why; or where it is no choice of items.

    ``objective``: as the problem's scores predict it; ``totals``: of the bounded metrics, by name; ``measured``: what
    the evaluation says.
    """

    name: str
    chosen: tuple[str, ...] = ()
    objective: float | None = None
    totals: Mapping[str, float] = field(default_factory=dict, hash=False)
    measured: float | None = None
    note: str = ""


def compare(
    problem: Problem,
    loss: Mapping[str, float] | None = None,
    importance: Sequence[float] | None = None,
    seed: int = 0,
    evaluate: Evaluate | None = None,
    more: Mapping[str, Callable[[], tuple[str, ...]]] | None = None,
) -> tuple[Compared, ...]:
    """The MIP first, then each baseline.

    ``loss``: scores by CE for the loss-only MIP; ``importance``: one number a layer; without them those two are left
    out. ``evaluate`` is called once for every different architecture. ``more``: further ways to choose, by name.
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
    measured: dict[frozenset[str], float] = {}
    return tuple(_compared(problem, name, choose, evaluate, measured) for name, choose in ways.items())


def _compared(
    problem: Problem,
    name: str,
    choose: Callable[[], tuple[str, ...]],
    evaluate: Evaluate | None,
    measured: dict[frozenset[str], float],
) -> Compared:
    try:
        chosen = choose()
    except (ConfigError, InfeasibleError) as error:
        return Compared(name, note=str(error))
    if evaluate is not None and frozenset(chosen) not in measured:
        measured[frozenset(chosen)] = evaluate(chosen)
    return Compared(
        name,
        chosen,
        float(problem.objective_of(chosen)),
        {row.quantity.name: float(row.quantity.value(chosen)) for row in problem.rows},
        measured.get(frozenset(chosen)),
    )


def _optimum(problem: Problem, objective: Mapping[str, float]) -> tuple[str, ...]:
    missing = [item.id for item in problem.items if item.id not in objective]
    if missing:
        raise ConfigError(f"{missing[0]} has no such score")
    choice = minimise(problem, objective, problem.rows)
    if choice is None:
        raise InfeasibleError("nothing keeps all bounds")
    return problem.in_order(choice.chosen)


def table(found: Sequence[Compared], problem: Problem) -> str:
    """For people: one line each, and a note where nothing was found."""
    metrics = list(dict.fromkeys(row.quantity.name for row in problem.rows))
    measured = any(one.measured is not None for one in found)
    head = ["", f"{problem.objective_name}, predicted", *(["measured"] if measured else []), *metrics]
    lines = [head]
    for one in found:
        if one.objective is None and one.measured is None:
            lines.append([one.name, f"- {one.note}"])
            continue
        truth = [] if not measured else ["" if one.measured is None else f"{one.measured:.4f}"]
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
