"""What the coefficients of an interaction model multiply: curves of the sum of scores, and pairs of sites. Pure.

Reads single scores s_i, S = sum_i s_i; computes for each architecture its sum and one row of columns, all of which are
0 for an architecture of a single item (interactions.py has the equations).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from puzzle.types import ConfigError, Item, MissingMeasurementError, Site, Strict

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]
FADING_SITES = 4.0  # by a factor e over two layers
BENDS_AT = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # quantiles of log S; level before the first and after the last
LINE_SCALE, BEND_SCALE = 10.0, 3.0  # prior standard deviations of the curve's coefficients, in those of a rho


@dataclass(frozen=True)
class Single(Strict):
    """An item's score and the share of it that each of its sites bears. Below 0 it is rounding and counts as 0."""

    item_id: str
    sites: tuple[Site, ...]
    shares: tuple[float, ...]
    kl_nats: float

    def __post_init__(self) -> None:
        if not np.isfinite(self.kl_nats):
            raise ConfigError(f"{self.item_id}: the kl score is not finite; score it again, or leave it out")


def singles(items: Iterable[Item], scores: Mapping[str, float]) -> tuple[Single, ...]:
    """The items that have a KL score (nats). That of an item over several sites is shared out in proportion to the
    scores of the same variants alone, equally where one of them has none: it interacts as its parts would.
    """
    scored = [item for item in items if item.id in scores]
    alone = {(item.sites[0], item.specs[0]): max(scores[item.id], 0.0) for item in scored if len(item.sites) == 1}
    found = []
    for item in scored:
        parts = [alone.get(part, np.nan) for part in item.at.items()]
        weights = parts if sum(parts) > 0 else [1.0] * len(parts)  # nan is not
        shares = tuple(float(weight / sum(weights)) for weight in weights)
        found.append(Single(item.id, item.sites, shares, scores[item.id]))
    return tuple(found)


def sites_of(singles: Iterable[Single]) -> tuple[Site, ...]:
    """Those that the items cover, in the order in which the residual stream meets them."""
    return tuple(sorted({site for one in singles for site in one.sites}))


def scores_by_site(singles: Sequence[Single]) -> dict[str, Floats]:
    """By item (sites,): the nats that each site bears."""
    sites = sites_of(singles)
    found = {}
    for one in singles:
        found[one.item_id] = np.zeros(len(sites))
        found[one.item_id][[sites.index(site) for site in one.sites]] = max(one.kl_nats, 0.0) * np.array(one.shares)
    return found


def scores_at(by_site: Mapping[str, Floats], architectures: Iterable[Sequence[str]]) -> Floats:
    """(N, sites): the nats that the items of each architecture cost at each site."""
    return np.array([np.sum([by_site[item_id] for item_id in items], axis=0) for items in architectures])


@dataclass(frozen=True)
class Design:
    """What the coefficients of ``columns`` multiply. ``nats`` (items,); ``amplitudes`` (items, sites): square roots of
    the nats that each site bears; ``bends``: of log S, between its ends.
    """

    columns: tuple[str, ...]
    sites: tuple[Site, ...]
    places: Mapping[str, int]
    nats: Floats
    amplitudes: Floats
    bends: Floats

    @classmethod
    def of(
        cls, columns: tuple[str, ...], singles: Sequence[Single], architectures: Sequence[tuple[str, ...]]
    ) -> Design:
        nats = np.array([max(one.kl_nats, 0.0) for one in singles])
        places = {one.item_id: place for place, one in enumerate(singles)}
        by_site = scores_by_site(singles)
        amplitudes = np.sqrt([by_site[one.item_id] for one in singles])
        design = cls(columns, sites_of(singles), places, nats, amplitudes, np.zeros(len(BENDS_AT)))
        sums, _ = design.rows(architectures)
        if not sums.all():
            named = " ".join(architectures[int(np.argmin(sums))])
            raise ConfigError(f"the scores of {named} add up to 0; leave its evaluation out")
        return replace(design, bends=np.quantile(np.log(sums), BENDS_AT))

    def place(self, item_id: str) -> int:
        if item_id not in self.places:
            raise MissingMeasurementError(f"no kl score for {item_id}; run `puzzle score RUN`")
        return self.places[item_id]

    def rows(self, architectures: Sequence[Sequence[str]]) -> tuple[Floats, Floats]:
        """Sums (N,) in nats and columns (N, P)."""
        count = len(architectures)
        number = np.array([row for row, items in enumerate(architectures) for _ in items], dtype=np.intp)
        places = np.array([self.place(item_id) for items in architectures for item_id in items], dtype=np.intp)
        sums = np.bincount(number, self.nats[places], count).astype(np.float64)  # of nothing, it counts
        squares = np.bincount(number, self.nats[places] ** 2, count)
        safe = np.where(sums > 0, sums, 1.0)[:, None]
        coupling = (sums**2 - squares)[:, None] / safe**2
        curve, pairs = self._curve(np.log(safe)), self._pairs(number, places, count)
        return sums, np.concatenate([coupling * curve, pairs / safe], 1)

    def rho(self, coefficients: Floats) -> Floats:
        rho = np.zeros((len(self.sites), len(self.sites)))
        if "pairs" in self.columns:
            pairs, means = np.split(coefficients[-sum(self._means.shape) :], [len(self._means)])
            rho[self._ends] = pairs + self._means @ means
        return rho + rho.T

    @property
    def _ends(self) -> tuple[Ints, Ints]:
        """(pairs,) each: the earlier and the later site of every pair."""
        return np.triu_indices(len(self.sites), 1)

    @cached_property
    def _means(self) -> Floats:
        """(pairs, 0 or 8): how much each mean rho counts in that of each pair."""
        depth = np.array([2 * site.layer + (site.part == "ffn") for site in self.sites])
        first, second = (depth[ends] for ends in self._ends)
        classes = (2 * (first % 2) + second % 2)[:, None] == np.arange(4)
        fading = np.exp((first - second) / FADING_SITES)[:, None]
        return np.concatenate([classes, classes * fading], 1)[:, : 8 * ("means" in self.columns)]

    def _curve(self, log_sums: Floats) -> Floats:
        """(N, 0, 2 or 6) from (N, 1): level, slope, changes of slope; level beyond what was evaluated."""
        low, *bends, high = self.bends
        at = np.clip(log_sums, low, high)
        line = np.concatenate([np.ones(at.shape), at - (low + high) / 2], 1)
        bent = np.maximum(at - np.array(bends), 0.0)
        count = 6 if "bends" in self.columns else 2 * ("line" in self.columns)
        return np.concatenate([LINE_SCALE * line, BEND_SCALE * bent], 1)[:, :count]

    def _pairs(self, number: Ints, places: Ints, count: int) -> Floats:
        """(N, 0 or pairs + means): 2 sqrt(s_i s_j) at sites of different items, and its sums for each mean."""
        if "pairs" not in self.columns:
            return np.zeros((count, 0))
        amplitudes, owners = np.zeros((2, count, len(self.sites)))
        np.add.at(amplitudes, number, self.amplitudes[places])
        np.add.at(owners, number, (self.amplitudes[places] > 0) * np.arange(len(places))[:, None])
        first, second = self._ends
        products = 2 * amplitudes[:, first] * amplitudes[:, second] * (owners[:, first] != owners[:, second])
        return np.concatenate([products, products @ self._means], 1)
