"""How many sequences scores need."""

from __future__ import annotations

import math

from puzzle.scoring.sampling import may_reach, num_draws, rounds, undecided


def test_a_score_reaches_what_lies_within_two_standard_errors() -> None:
    around = [0.2, 0.3] * 8  # 0.25, standard error 0.0129
    assert may_reach(around, 0.27) and may_reach(around, 0.24)
    assert not may_reach(around, 0.28)
    assert may_reach([0.25], 100.0)  # its error is not known
    assert may_reach([*around, math.nan], 100.0) and may_reach([*around, math.inf], 100.0)


def test_rounds_double_up_to_what_there_is() -> None:
    assert list(rounds(4, 20)) == [range(4), range(4, 8), range(8, 16), range(16, 20)]
    assert list(rounds(4, 4)) == [range(4)]
    assert list(rounds(8, 4)) == [range(4)]


def test_variants_with_equal_differences_in_every_sequence_are_told_apart() -> None:
    """However much sequences differ from one another: what counts is the difference within each."""
    hard = [0.1, 5.0, 0.3, 9.0, 2.0]
    scores = {"a": hard, "b": [value + 0.01 + 0.001 * (index % 2) for index, value in enumerate(hard)]}
    assert ("a", "b") not in undecided(scores, 1e-6)


def test_what_swaps_places_is_undecided_until_it_hardly_matters() -> None:
    scores = {"a": [1.0, 1.2, 1.0, 1.2], "b": [1.1, 1.0, 1.1, 1.1]}
    assert undecided(scores, 1e-3) == [("a", "b")]
    assert undecided(scores, 0.2) == []


def test_a_variant_competes_with_the_teacher_too() -> None:
    assert undecided({"a": [0.1, -0.1, 0.05, -0.04]}, 1e-3) == [("", "a")]
    assert undecided({"a": [0.1, 0.11, 0.1, 0.09]}, 1e-3) == []


def test_one_sequence_tells_nothing() -> None:
    assert undecided({"a": [0.1]}, 1.0) == [("", "a")]


def test_more_sequences_need_fewer_draws() -> None:
    assert [num_draws(count) for count in (1, 32, 64, 128, 1000)] == [16, 7, 4, 2, 1]
