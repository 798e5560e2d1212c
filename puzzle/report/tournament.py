"""The tournament as a table: each candidate's quality at each comparison, its place there, and who won.

Reads the unit of what it decided; writes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from puzzle import artifacts
from puzzle.report.table import Table
from puzzle.types import mean_and_error

if TYPE_CHECKING:
    from puzzle.run import Run


@dataclass(frozen=True)
class _Rung:
    """A comparison: who came to it, and their KL per sequence."""

    tokens: int
    candidates: tuple[int, ...]
    kl_nats: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class _Contest:
    winner: int
    candidates: tuple[str, ...]
    rungs: tuple[_Rung, ...]


def standings(run: Run) -> Table | None:
    """None where nothing was chosen in a tournament."""
    if not run.config.tournament.candidates or not run.contest.exists():
        return None
    found = artifacts.read_unit(run.contest).read(_Contest, "tournament")
    return Table(
        ("candidate", "", *(f"after {rung.tokens:,} tokens" for rung in found.rungs)),
        tuple(
            (str(one + 1), told, *(_cell(rung, one) for rung in found.rungs))
            for one, told in enumerate(found.candidates)
        ),
        f"Tournament: candidate {found.winner + 1} of {len(found.candidates)} won. KL to the teacher on select, nats, "
        "and place at each comparison:",
        found.winner,
    )


def _cell(rung: _Rung, candidate: int) -> str:
    """Empty where it had been left out."""
    means = {one: mean_and_error(values) for one, values in zip(rung.candidates, rung.kl_nats, strict=True)}
    if candidate not in means:
        return ""
    place = sorted(means, key=lambda one: (means[one][0], one)).index(candidate) + 1
    mean, error = means[candidate]
    return f"{mean:.4f} ± {error:.4f} ({place}.)"
