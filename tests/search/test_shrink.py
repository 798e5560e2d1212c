"""A second round keeps what architectures near the limit use, runs of layers included."""

from __future__ import annotations

import pytest

from puzzle.search.pareto import front
from puzzle.search.problem import Problem, Quantity
from puzzle.search.shrink import popular
from puzzle.space import SearchSpace
from puzzle.types import ModelShape
from puzzle.variants import is_teacher, params


@pytest.mark.parametrize(("power", "least_cost", "expected"), [(-0.5, 0, 3), (-0.5, 1, 2), (1.0, 1, 0)])
def test_runs_stay_as_long_as_they_are_used(shape: ModelShape, power: float, least_cost: int, expected: int) -> None:
    """Where runs cost less than their parts the longest stays; where they cost more none is used, nor offered again.

    Without parameters there is no architecture but the run of all layers.
    """
    space = SearchSpace.parse({"attention": ("linear",), "ffn": ("linear",)}, shape, runs=3)
    lengths = {item.id: len({site.layer for site in item.sites}) for item in space.items()}
    objective = {
        item.id: 0.0 if is_teacher(item) else length * float(length) ** power if len(item.sites) > 1 else 0.1
        for item, length in zip(space.items(), lengths.values(), strict=True)
    }
    sizes = {item.id: sum(params(spec, shape) for spec in item.specs) for item in space.items()}
    cost = Quantity("cost0", "params", sizes, whole=True)
    problem = Problem(space.items(), shape.sites, objective, (), (cost,), space.conflicts())
    found = popular(problem, front(problem, "cost0"), (least_cost, sum(sizes.values())), 0.05)
    assert found.runs == expected
