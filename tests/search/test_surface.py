"""The front of several costs against brute force: at every limit of the grid the optimum, and nothing dominated."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from search_factories import all_choices, make_problem

from puzzle.search import surface as module
from puzzle.search.linear import Effort
from puzzle.search.problem import Problem
from puzzle.search.surface import Surface, plot, surface
from puzzle.types import ConfigError, OutOfTimeError

Vector = tuple[Fraction, ...]


def allowed(problem: Problem) -> dict[tuple[str, ...], Vector]:
    """Every choice, its costs and then its objective, exactly."""
    free = replace(problem, rows=())
    return {
        chosen: (*(cost.value(chosen) for cost in problem.quantities), problem.objective_of(chosen))
        for chosen in all_choices(problem)
        if not free.violations(chosen)
    }


def beats(one: Vector, other: Vector) -> bool:
    return one != other and all(mine <= theirs for mine, theirs in zip(one, other, strict=True))


def named(problem: Problem) -> list[str]:
    return [quantity.name for quantity in problem.quantities]


@pytest.mark.parametrize(("costs", "wide", "conflicts"), [(2, 0, 0), (2, 3, 4), (3, 2, 2)])
@pytest.mark.parametrize("seed", range(4))
def test_every_limit_has_its_optimum_and_every_point_is_on_the_front(
    seed: int, costs: int, wide: int, conflicts: int
) -> None:
    problem = make_problem(random.Random(seed), 4, 3, ("max",) * costs, wide=wide, conflicts=conflicts)
    assert_complete(problem, num_limits=4)


@pytest.mark.parametrize("seed", range(4))
def test_ties_in_the_objective_are_broken_by_cost(seed: int) -> None:
    """Scores of few values, costs of few values: many choices are as good, and only some of them on the front."""
    rng = random.Random(seed)
    problem = make_problem(rng, 4, 3, ("eq", "eq"))
    problem = replace(problem, objective={item.id: float(rng.randint(0, 2)) for item in problem.items}, rows=())
    assert_complete(problem, num_limits=5)


def assert_complete(problem: Problem, num_limits: int) -> None:
    choices = allowed(problem)
    found = surface(problem, named(problem), num_limits)
    assert len(found.points) > 1
    vectors = [choices[point.chosen] for point in found.points]
    assert len(set(vectors)) == len(vectors)
    for point, vector in zip(found.points, vectors, strict=True):
        assert [*point.costs, point.objective] == [float(part) for part in vector]
        assert not any(beats(other, vector) for other in choices.values())
        assert point.gap == 0
        assert point.bound == pytest.approx(point.objective)
    ends = [(min(part), max(part)) for part in zip(*(vector[:-1] for vector in choices.values()), strict=True)]
    steps = [[low + (high - low) * Fraction(k, num_limits - 1) for k in range(num_limits)] for low, high in ends]
    for limits in itertools.product(*steps):
        within = [vector[-1] for vector in choices.values() if keeps(vector, limits)]
        assert min(within, default=None) == min((v[-1] for v in vectors if keeps(v, limits)), default=None)


def keeps(vector: Vector, limits: Vector) -> bool:
    return all(part <= limit for part, limit in zip(vector[:-1], limits, strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_with_a_gap_no_point_is_dominated_by_more_than_it(seed: int) -> None:
    problem = make_problem(random.Random(seed), 4, 3, ("max", "max"))
    choices = allowed(problem)
    found = surface(problem, named(problem), 4, Effort(relative_gap=0.2))
    for point in found.points:
        vector = choices[point.chosen]
        better = [other[-1] for other in choices.values() if beats(other, vector)]
        assert point.gap <= 0.2
        assert all(objective >= Fraction(point.bound) - Fraction(1, 10**9) for objective in better)


def test_solves_are_saved_where_limits_do_not_bind_and_begin_at_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(random.Random(1), 5, 3, ("max", "max"))
    starts, solve = [], module.minimise

    def counted(*args: object, **more: object) -> object:
        if "start" in more:
            starts.append(more["start"])
        return solve(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "minimise", counted)
    found = surface(problem, named(problem), 8)
    solved = len(starts) - len(found.points)  # the last ones look for the cheapest
    assert solved < 64 - 10
    assert any(start is not None for start in starts[:solved])


def test_a_limit_without_an_answer_in_time_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(random.Random(1), 4, 3, ("max", "max"))
    solve = module.minimise

    def late(*args: object, **more: object) -> object:
        rows = args[2]
        if len(rows) == 2 and rows[0].upper < 20:  # type: ignore[arg-type, index]
            raise OutOfTimeError("late", 0.0)
        return solve(*args, **more)  # type: ignore[arg-type]

    whole = surface(problem, named(problem), 4)
    monkeypatch.setattr(module, "minimise", late)
    found = surface(problem, named(problem), 4)
    assert found.unfinished > 0 == whole.unfinished
    assert 0 < len(found.points) < len(whole.points)


def test_what_makes_no_grid_is_refused() -> None:
    problem = make_problem(random.Random(0), 3, 2, ("max", "max"))
    for names, num_limits, said in (
        (["cost0", "cost0"], 4, "named twice"),
        (["cost0", "cost1"], 1, "give 2 or more"),
        (["cost0", "cost1"], 1000, "and fewer"),
        (["cost0", "speed"], 4, "nothing is known of 'speed'"),
    ):
        with pytest.raises(ConfigError, match=said):
            surface(problem, names, num_limits)
    rate = replace(problem.quantities[1], name="rate", numerator=5.0)
    with pytest.raises(ConfigError, match="is a rate"):
        surface(replace(problem, quantities=(problem.quantities[0], rate)), ["cost0", "rate"], 4)


def test_table_and_picture(tmp_path: Path) -> None:
    problem = make_problem(random.Random(0), 4, 3, ("max", "max"))
    found: Surface = surface(problem, named(problem), 4)
    frame = found.frame(architectures=True)
    assert list(frame.columns) == ["point", "cost0", "cost1", "kl_nats", "bound", "gap", "items"]
    assert list(found.frame().columns) == list(frame.columns)[:-1]
    assert frame["items"].map(lambda text: tuple(text.split())).tolist() == [point.chosen for point in found.points]
    assert frame["cost0"].is_monotonic_increasing
    plot(found, tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
