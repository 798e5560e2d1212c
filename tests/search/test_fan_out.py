"""Lists of values: every combination, each the file that one would have written with that value alone."""

from __future__ import annotations

import pytest
from search_factories import make_file

from puzzle.search.fan_out import picks
from puzzle.types import ConfigError

CHAT = {"chat": {"isl": 128, "osl": 64}}


def test_a_file_without_lists_is_the_only_one() -> None:
    file = make_file(workloads=CHAT, constraints={"memory_gib": 3, "params": {"min": 1, "max": 5}})
    (one,) = picks(file)
    assert (one.number, one.values, one.file) == (1, (), file)


def test_each_value_is_the_file_that_holds_it_alone() -> None:
    constraints = {"params": {"max": 9}, "memory_gib": {"values": [40, "75%", 20.5]}, "chat.ttft_ms": 8}
    found = picks(make_file(workloads=CHAT, constraints=constraints))
    assert [one.number for one in found] == [1, 2, 3]
    assert [str(one) for one in found] == ["memory_gib 40", "memory_gib 75%", "memory_gib 20.5"]
    for one, value in zip(found, (40, "75%", 20.5), strict=True):
        alone = make_file(workloads=CHAT, constraints={**constraints, "memory_gib": value})
        assert one.file == alone
        assert list(one.file.constraints) == list(alone.constraints)
        assert one.file.model_dump(mode="json") == alone.model_dump(mode="json")  # so its solution is that one's


def test_two_lists_are_every_combination() -> None:
    found = picks(make_file(constraints={"params": {"values": [5, 6]}, "kl_nats": {"values": [0.1, 0.2, 0.3]}}))
    assert len(found) == 6
    assert [one.file.constraints["kl_nats"] for one in found] == [0.1, 0.2, 0.3] * 2
    assert str(found[3]) == "params 6, kl_nats 0.1"


def test_more_searches_than_anybody_can_mean_are_an_error() -> None:
    lists = {name: {"values": list(range(1, 11))} for name in ("params", "kl_nats", "kv_heads_total", "weights_gib")}
    with pytest.raises(ConfigError, match=r"of params, kl_nats, kv_heads_total, weights_gib are 10,000 searches"):
        picks(make_file(constraints=lists))
