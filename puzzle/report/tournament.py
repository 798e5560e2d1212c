"""The tournament as a table: each candidate's quality at each comparison, its place there, and who won.

Reads the unit of what it decided; writes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from puzzle import artifacts
from puzzle.report.table import Table
from puzzle.types import mean_and_error

if TYPE_CHECKING:
    from puzzle.run import Run


def standings(run: Run) -> Table | None:
    """None where nothing was chosen in a tournament."""
    if not run.config.tournament.candidates or not run.contest.exists():
        return None
    return _table(artifacts.read_unit(run.contest).payload["tournament"])


def _table(found: dict[str, Any]) -> Table:
    rungs, winner = found["rungs"], found["winner"]
    return Table(
        ("candidate", "", *(f"after {rung['tokens']:,} tokens" for rung in rungs)),
        tuple(
            (str(one + 1), told, *(_cell(rung, one) for rung in rungs)) for one, told in enumerate(found["candidates"])
        ),
        f"Tournament: candidate {winner + 1} of {len(found['candidates'])} won. KL to the teacher on select, nats, and "
        "place at each comparison:",
        winner,
    )


def _cell(rung: dict[str, Any], candidate: int) -> str:
    """Empty where it had been left out."""
    means = {one: mean_and_error(values) for one, values in zip(rung["candidates"], rung["kl_nats"], strict=True)}
    if candidate not in means:
        return ""
    place = sorted(means, key=lambda one: (means[one][0], one)).index(candidate) + 1
    mean, error = means[candidate]
    return f"{mean:.4f} ± {error:.4f} ({place}.)"
