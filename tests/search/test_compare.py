"""Every way to choose stands in the table with what it predicts, keeps to and, where asked, truly is."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from search_factories import make_costs, make_file, make_items, make_scores

from puzzle.search import problems
from puzzle.search.compare import compare, table
from puzzle.search.problem import Chosen, Problem
from puzzle.types import ModelShape


def problem_of(shape: ModelShape, **constraints: object) -> Problem:
    items = make_items(shape)
    chat = {"chat": {"isl": 128, "osl": 64, "batch_size": 4}}
    file = make_file(workloads=chat, constraints=constraints)
    (problem,) = problems(shape, items, make_scores(items), make_costs(shape), file)
    return problem


def test_the_mip_is_first_and_best_and_all_keep_the_bounds(shape: ModelShape) -> None:
    problem = problem_of(shape, params="70%")
    found = compare(problem, loss=dict.fromkeys(problem.objective, 0.0), importance=[1.0, 2.0, 3.0])
    assert [one.name for one in found] == [
        "MIP", "convex-hull greedy", "published greedy", "uniform", "most parameters", "random", "MIP by CE",
        "importance depth",
    ]  # fmt: skip
    for one in found:
        assert one.objective is not None and found[0].objective is not None
        assert one.objective >= found[0].objective
        assert problem.violations(one.chosen) == ()
        assert one.objective == float(problem.objective_of(one.chosen))
        assert one.totals == {"params": float(problem.quantity("params").value(one.chosen))}
        assert one.measured is None


def test_loss_only_is_the_optimum_of_other_scores_told_in_the_problems_own(shape: ModelShape) -> None:
    problem = problem_of(shape, params="70%")
    opposite = {item_id: 2.0 - score for item_id, score in problem.objective.items()}
    (other,) = [one for one in compare(problem, loss=opposite) if one.name == "MIP by CE"]
    assert other.objective == float(problem.objective_of(other.chosen))
    lacking = dict(list(opposite.items())[1:])
    (note,) = [one.note for one in compare(problem, loss=lacking) if one.name == "MIP by CE"]
    assert note == "L000.attention.keep has no such score"


def test_all_different_architectures_are_measured_at_once(shape: ModelShape) -> None:
    problem = problem_of(shape, params="60%")
    asked: list[Sequence[Chosen]] = []

    def measure(architectures: Sequence[Chosen]) -> list[Sequence[float] | None]:
        asked.append(architectures)
        return [(1.0 + place, 3.0 + place) for place in range(len(architectures))]

    found = compare(problem, measure=measure)
    (architectures,) = asked
    different = {frozenset(one.chosen) for one in found if one.chosen}
    assert len(architectures) == len(set(architectures)) == len(different) > 1
    assert {one.measured for one in found if set(one.chosen) == set(found[0].chosen)} == {(1.0, 3.0)}
    head, first, *others = table(found, problem).splitlines()
    assert [cell.strip() for cell in head.split("  ") if cell] == [
        "kl_nats, predicted", "true kl_nats", "over the MIP's", "params",
    ]  # fmt: skip
    assert "2.0000" in first and "+0.0000 ± 0.0000" in first
    assert any("3.0000  +1.0000 ± 0.0000" in line for line in others)


def test_a_way_that_does_not_fit_is_a_note_not_an_error(shape: ModelShape) -> None:
    problem = problem_of(shape, params="70%", layers_with_ffn={"min": 2}, output_tok_per_s=1000)
    found = {one.name: one for one in compare(problem)}
    assert found["MIP"].objective is not None
    assert "exactly one upper bound" in found["convex-hull greedy"].note
    assert "bound from below" in found["published greedy"].note
    lines = table(list(found.values()), problem).splitlines()
    assert len(lines) == len(found) + 1
    assert [line for line in lines if line.startswith("published greedy")][0].endswith("a bound from below")


@pytest.mark.parametrize("budget", ["1%"])
def test_what_nothing_can_keep_gives_notes_only(shape: ModelShape, budget: str) -> None:
    found = compare(problem_of(shape, params=budget), importance=[1.0, 1.0, 1.0])
    assert all(one.objective is None and one.note for one in found)
