"""A solution of the search in words, as the command line and notebooks tell it, and numbers to write down.

Reads a Solution; writes nothing.
"""

from __future__ import annotations

import math
from fractions import Fraction

from puzzle.types import Solution

QUALITIES = {"kl_nats": "KL", "ce_delta_nats": "CE gap", "hidden_distance": "hidden distance"}
MOST_DIGITS = 12  # of a number in a constraint file


def headline(solution: Solution) -> str:
    name = solution.objective_name or "kl_nats"
    quality = f"{with_error(solution)} {objective_unit(name)} predicted"
    if solution.minimised is None:
        return f"{quality} ({status(solution)}, bound {solution.bound_nats:.4f})"
    cost = f"{solution.minimised} {figure(solution.totals[solution.minimised])}"
    return f"{cost} ({status(solution)}, bound {figure(solution.cost_bound or 0.0)}), {quality}"


def with_error(solution: Solution) -> str:
    """The sum of scores, with its standard error where that is known."""
    error = "" if solution.objective_se is None else f" ± {solution.objective_se:.4f}"
    return f"{solution.objective_nats:.4f}{error}"


def status(solution: Solution) -> str:
    """``optimal``, or how far it may be from that and why the solver stopped."""
    if solution.status == "optimal":
        return solution.status
    gap = "" if solution.gap is None else f", gap {solution.gap:.2%}"
    return f"the solver's time was up: best found{gap}" if solution.timed_out else f"{solution.status}{gap}"


def figure(value: float) -> str:
    """Four significant digits, or four after the point where that is more."""
    return f"{value:.4g}" if abs(value) < 1 else f"{value:,.4f}".rstrip("0").rstrip(".")


def objective_unit(name: str) -> str:
    """Of a sum of scores; one of the user's own is called by its name."""
    return "nats" if name.endswith("_nats") else name


def at_least(value: Fraction, digits: int = MOST_DIGITS) -> float:
    """A number that one can write down in about so many digits, not below ``value`` and hardly above it."""
    if value.denominator == 1 and abs(value) < 2**53:
        return float(value)
    step = Fraction(10) ** (math.floor(math.log10(abs(value))) - digits + 2)
    written = float(f"{float(math.ceil(value / step) * step):.{digits}g}")
    return written if Fraction(written) >= value else math.nextafter(written, math.inf)


def quality(solution: Solution) -> str:
    """The sum of scores with its standard error and unit."""
    name = solution.objective_name or "kl_nats"
    unit = " nats per token" if name.endswith("_nats") else ""
    return f"{QUALITIES.get(name, name)} {with_error(solution)}{unit}"
