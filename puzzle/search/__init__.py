"""The search: tables and a constraint file in, architectures out, in about a second. Sees no model, loads no torch.

Reads scores, costs and a constraint file; computes the best architectures that fit, and the whole front between quality
and one cost. Writes nothing: what is found goes back to the caller.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from puzzle.capabilities import offer
from puzzle.config import ConstraintFile, score_of
from puzzle.search.constraints import problems
from puzzle.tables import ScoreTable
from puzzle.types import Conflict, Costs, InfeasibleError, Item, ModelShape, Solution

if TYPE_CHECKING:
    from puzzle.search.programme import Effort

__all__ = ["effort_of", "problems", "search"]

_log = logging.getLogger(__name__)


def search(
    shape: ModelShape,
    items: Sequence[Item],
    scores: ScoreTable,
    costs: Costs,
    constraints: ConstraintFile,
    inputs: Mapping[str, str],
    conflicts: Sequence[Conflict] = (),
    on_solution: Callable[[], None] = lambda: None,
) -> tuple[Solution, ...]:
    """The best architectures that keep every bound, best first; ``inputs`` (fingerprints) are handed through.

    ``on_solution`` is called as each is found. Fewer than ``solutions.count`` where no more exist that differ enough
    (logged as a warning). Raises ConfigError for names that mean nothing, MissingMeasurementError for bounds on what
    nobody measured, InfeasibleError with the nearest values that can hold.
    """
    from puzzle.search import mip

    wanted = constraints.solutions
    programmes = problems(shape, items, scores, costs, constraints, conflicts)
    try:
        found = mip.solve(
            programmes,
            inputs,
            wanted.count,
            wanted.min_difference,
            effort_of(constraints),
            on_solution=on_solution,
        )
    except InfeasibleError as error:
        if not (refused := offer(items, constraints.serve_on, shape).refused):
            raise
        left_out = len({one.item.id for one in refused})
        raise InfeasibleError(
            f"{error} (serve_on leaves out {left_out} of {len(items)} items; `puzzle constraints explain` says why)"
        ) from None
    if found.note:
        _log.warning(found.note)
    return tuple(
        replace(solution, objective_se=scores.standard_error(solution.items, score_of(solution.objective_name)))
        for solution in found.solutions
    )


def effort_of(constraints: ConstraintFile) -> Effort:
    """How long, and how closely, one search looks."""
    from puzzle.search.programme import RELATIVE_GAP, Effort

    return Effort(max(constraints.solver.gap, RELATIVE_GAP), constraints.solver.time_limit_s)
