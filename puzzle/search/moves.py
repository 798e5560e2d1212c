"""Small steps from one architecture to others that keep every bound, valued by a surrogate. Pure, numpy.

A move puts one item in the place of what it overlaps; what that leaves uncovered keeps the specs that it had, as
items of its own (leaving a run of layers, its other layers stay left out), or takes what is best by score, where those
are not on offer. Neighbours are all architectures one move or two moves at different sites away, and all are valued at
once (surrogate.py). Bounds are looked at in floats first; what is returned is checked exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from puzzle.scoring.design import Floats, Ints, scores_at
from puzzle.search.problem import Chosen, Problem
from puzzle.search.surrogate import Surrogate
from puzzle.types import Item, Site, Spec

BLOCK = 2_000_000  # pairs of moves that are valued at once
KEPT = 100_000  # of these, the best
SLACK = 1e-9  # of a bound, within which the exact check decides
LEAST_GAIN = 1e-12  # relative: rounding alone could go round in circles


@dataclass(frozen=True, eq=False)
class _Steps:
    """Moves from one architecture, one row each; the last one changes nothing."""

    added: Sequence[Chosen]
    removed: Sequence[Chosen]
    scores: Floats  # (M, sites) what it adds
    costs: Floats  # (M, rows)
    touched: Floats  # (M, sites) 1 where it changes something


@dataclass(frozen=True, eq=False)
class Moves:
    """The moves of ``problem``, valued by ``surrogate``; ``scores`` by item, (sites,) as it was fitted to sums of."""

    problem: Problem
    scores: Mapping[str, Floats]
    surrogate: Surrogate

    def neighbours(self, chosen: Chosen, most: int, below: float = np.inf) -> Iterator[tuple[float, Chosen]]:
        """Up to ``most`` architectures that keep everything, each with its predicted KL, the lowest first.

        All are less than ``below``.
        """
        steps = self._steps(chosen)
        (start,) = scores_at(self.scores, [chosen])
        totals = self._costs[:, self._at(chosen)].sum(1) + self._bounds[2]
        found: list[tuple[float, int, int]] = []
        size = max(1, BLOCK // len(steps.added))
        for begin in range(0, len(steps.added), size):
            rows = slice(begin, begin + size)
            values = self.surrogate.of_pairs(start, steps.scores[rows], steps.scores)
            allowed = (values < below) & (steps.touched[rows] @ steps.touched.T == 0)
            allowed &= np.arange(len(steps.added))[rows, None] < np.arange(len(steps.added))
            for row, (lower, upper) in enumerate(zip(*self._bounds[:2], strict=True)):
                cost = totals[row] + steps.costs[rows, row, None] + steps.costs[:, row]
                allowed &= (cost >= lower) & (cost <= upper)
            places = np.flatnonzero(allowed)
            places = places[np.argsort(values.flat[places], kind="stable")[:KEPT]]
            first, second = np.unravel_index(places, values.shape)
            found += zip(values[first, second].tolist(), (first + begin).tolist(), second.tolist(), strict=True)
        given: set[Chosen] = {chosen}
        for value, *pair in sorted(found):
            gone = {name for move in pair for name in steps.removed[move]}
            new = (name for move in pair for name in steps.added[move])
            other = self.problem.in_order([*(name for name in chosen if name not in gone), *new])
            if other not in given and not self.problem.violations(other):
                given.add(other)
                yield value, other
                if len(given) > most:
                    return

    def descend(self, chosen: Chosen) -> Chosen:
        """The best neighbour's best neighbour, and so on, until none is better."""
        value = self.predicted(chosen)
        while better := next(self.neighbours(chosen, 1, below=value - LEAST_GAIN * abs(value)), None):
            value, chosen = better
        return chosen

    def predicted(self, chosen: Chosen) -> float:
        ((value,), _) = self.surrogate.predict(scores_at(self.scores, [chosen]))
        return float(value)

    def _steps(self, chosen: Chosen) -> _Steps:
        owner = {site: name for name in chosen for site in self.problem.by_id[name].sites}
        added: list[Chosen] = []
        removed: list[Chosen] = []
        for item in self.problem.items:
            gone = tuple(dict.fromkeys(owner[site] for site in item.sites))
            rest = None if item.id in gone else self._filled(gone, item)
            if rest is not None:
                added.append((item.id, *rest))
                removed.append(gone)
        added.append(())
        removed.append(())
        row = np.array([row for row, names in enumerate(added + removed) for _ in names], dtype=np.intp) % len(added)
        names = [name for of in (added, removed) for names in of for name in names]
        sign = np.where(np.arange(len(names)) < sum(map(len, added)), 1.0, -1.0)
        at = self._at(names)

        def summed(values: Floats) -> Floats:
            total = np.zeros((len(added), values.shape[1]))
            np.add.at(total, row, values[at] * sign[:, None])
            return total

        touched = np.zeros((len(added), len(self.problem.sites)))
        np.add.at(touched, row, self._covers[at])
        return _Steps(added, removed, summed(self._scores), summed(self._costs.T), (touched > 0).astype(float))

    def _filled(self, gone: Chosen, item: Item) -> Chosen | None:
        """Items for what ``gone`` covers and ``item`` does not, of the same specs or the best by score; or None."""
        left: dict[Site, Spec] = {}
        for name in gone:
            other = self.problem.by_id[name]
            left |= {site: spec for site, spec in other.at.items() if site not in item.sites}
        found = []
        while left:
            site = min(left)
            starting = self._starting[site]
            fits = next((one for one in starting if left.items() >= one[1].items()), None)
            if fits is None:
                rest = (one for one in starting if left.keys() >= one[1].keys())
                fits = min(rest, key=lambda one: self.problem.objective[one[0]], default=None)
            if fits is None:
                return None
            found.append(fits[0])
            for site in fits[1]:
                del left[site]
        return tuple(found)

    def _at(self, names: Sequence[str]) -> Ints:
        return np.array([self._place[name] for name in names], dtype=np.intp)

    @cached_property
    def _place(self) -> Mapping[str, int]:
        return {item.id: place for place, item in enumerate(self.problem.items)}

    @cached_property
    def _starting(self) -> Mapping[Site, Sequence[tuple[str, Mapping[Site, Spec]]]]:
        """By site, the items whose first it is, those that cover most first."""
        found: dict[Site, list[tuple[str, Mapping[Site, Spec]]]] = {site: [] for site in self.problem.sites}
        for item in sorted(self.problem.items, key=lambda item: -len(item.sites)):
            found[min(item.sites)].append((item.id, item.at))
        return found

    @cached_property
    def _scores(self) -> Floats:
        """(items, sites)"""
        return np.stack([self.scores[item.id] for item in self.problem.items])

    @cached_property
    def _covers(self) -> Floats:
        place = {site: index for index, site in enumerate(self.problem.sites)}
        covers = np.zeros((len(self.problem.items), len(place)))
        for row, item in zip(covers, self.problem.items, strict=True):
            row[[place[site] for site in item.sites]] = 1.0
        return covers

    @cached_property
    def _costs(self) -> Floats:
        """(rows, items)"""
        quantities = [row.quantity.coefficients for row in self.problem.rows]
        costs = [[of.get(item.id, 0.0) for item in self.problem.items] for of in quantities]
        return np.array(costs, float).reshape(len(quantities), len(self.problem.items))

    @cached_property
    def _bounds(self) -> tuple[Floats, Floats, Floats]:
        """Lower and upper bounds on the sums of costs, a little too wide, and the sums' constants; (rows,) each."""
        lower, upper = [], []
        for row in self.problem.rows:
            low, high = row.linear_bounds()
            lower.append(-np.inf if low is None else float(low) - SLACK * abs(float(low)))
            upper.append(np.inf if high is None else float(high) + SLACK * abs(float(high)))
        return np.array(lower), np.array(upper), np.array([row.quantity.constant for row in self.problem.rows])
