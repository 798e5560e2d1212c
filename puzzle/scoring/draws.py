"""Architectures to look at truly: random ones and near-optimal ones, over a range of sizes. Pure; sees tables only.

At each site the item that is lowest in ``score * exp(noise * z) + price * params`` is taken, z normal and drawn anew
for every item and architecture; the price is the one at which the architecture has the size that was drawn for it.
With little noise that is an architecture near the front, with much a random one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from puzzle.types import ConfigError, Item, Site

NOISE = {"near-optimal": 0.3, "random": 3.0}
SIZES = {"mild": (0.75, 0.95), "hard": (0.35, 0.65)}  # shares of the layers' parameters
HALVINGS = 50


@dataclass(frozen=True)
class Draw:
    """``kind`` as in NOISE, ``size`` as in SIZES; ``items`` cover every site once, the teacher's own included."""

    kind: str
    size: str
    items: tuple[str, ...]


def draw(
    items: Sequence[Item], scores: Mapping[str, float], params: Mapping[str, int], count: int, seed: int = 0
) -> list[Draw]:
    """``count`` different architectures, in turn of every kind and size. The first ones do not depend on ``count``.

    ``scores`` (nats) and ``params`` by item. Items that overlap, as runs of layers do, are left out. ConfigError where
    the space has not so many architectures.
    """
    places = _places([item for item in items if item.id in scores])
    whole = sum(max(params[item.id] for item in of) for of in places)
    regimes = [(kind, size) for size in SIZES for kind in NOISE]
    found: dict[tuple[str, ...], Draw] = {}
    for attempt in range(50 * count):
        if len(found) == count:
            return list(found.values())
        kind, size = regimes[len(found) % len(regimes)]
        rng = np.random.default_rng([seed, attempt])
        limit = rng.uniform(*SIZES[size]) * whole
        chosen = _at_size(places, scores, params, limit, NOISE[kind], rng)
        found.setdefault(chosen, Draw(kind, size, chosen))
    raise ConfigError(f"the space has no {count} different architectures; ask for fewer (found {len(found)})")


def _places(items: Sequence[Item]) -> list[list[Item]]:
    """The items by what they cover: single sites, or whole layers where those are the smallest items."""
    covering: dict[tuple[Site, ...], list[Item]] = {}
    taken: set[Site] = set()
    for item in sorted(items, key=lambda item: len(item.sites)):
        if item.sites in covering or taken.isdisjoint(item.sites):
            covering.setdefault(item.sites, []).append(item)
            taken.update(item.sites)
    return [covering[sites] for sites in sorted(covering)]


def _at_size(
    places: Sequence[Sequence[Item]],
    scores: Mapping[str, float],
    params: Mapping[str, int],
    limit: float,
    noise: float,
    rng: np.random.Generator,
) -> tuple[str, ...]:
    """The architecture of at most ``limit`` parameters that is best in scores under noise, by bisecting the price."""
    noisy = [[scores[item.id] * float(np.exp(noise * rng.standard_normal())) for item in of] for of in places]
    low, high = -30.0, 10.0  # log of nats a parameter

    def at(price: float) -> tuple[Item, ...]:
        chosen = []
        for of, values in zip(places, noisy, strict=True):
            total = [score + np.exp(price) * params[item.id] for item, score in zip(of, values, strict=True)]
            chosen.append(of[int(np.argmin(total))])
        return tuple(chosen)

    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if sum(params[item.id] for item in at(middle)) > limit:
            low = middle
        else:
            high = middle
    return tuple(item.id for item in at(high))
