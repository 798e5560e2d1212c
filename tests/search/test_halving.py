"""Successive halving: the best half goes on, whatever the order, until one is left."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from puzzle.search.halving import halving, num_distilled, num_rungs
from puzzle.types import ConfigError


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 9])
def test_the_better_half_goes_on_until_one_is_left(count: int) -> None:
    """Against sorting; every candidate's loss changes from one comparison to the next."""
    rng = random.Random(count)
    table = {
        (one, 10 * 2**rung): rng.choice([0.1, 0.2, 0.3, rng.random()]) for one in range(count) for rung in range(4)
    }
    taken: dict[int, int] = {}

    def losses(going: Sequence[int], steps: int) -> list[float]:
        taken.update(dict.fromkeys(going, steps))
        return [table[one, steps] for one in going]

    rungs = halving(count, 10, losses)
    going, steps = tuple(range(count)), 10
    for rung in rungs:
        assert (rung.steps, rung.candidates) == (steps, going)
        ranked = sorted(going, key=lambda one: (table[one, rung.steps], one))
        assert rung.ranking == tuple(ranked)
        assert len(rung.on) == len(going) // 2
        assert sorted(table[one, rung.steps] for one in rung.on) == [
            table[one, rung.steps] for one in ranked[: len(rung.on)]
        ]
        going, steps = rung.on, 2 * steps
    assert len(going) == 1
    assert len(rungs) == num_rungs(count)
    assert sum(taken.values()) == 10 * num_distilled(count)


def test_what_is_not_finite_loses() -> None:
    (rung,) = halving(3, 1, lambda going, steps: [math.nan, 0.3, math.inf])
    assert rung.on == (1,)
    with pytest.raises(ConfigError, match=r"no candidate.*after 1 steps; lower kd.learning_rate"):
        halving(2, 1, lambda going, steps: [math.nan, math.inf])
