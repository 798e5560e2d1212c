"""The records: what they refuse, and that they survive JSON."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable

import pytest

from puzzle import types
from puzzle.types import AttentionSpec, Cost, FfnSpec, Item, Score, Site

SCORE = Score("L000.ffn.skip", "teacher", "teacher", "kl", "score", (0.1, 0.3, 0.2), 256)
COST = Cost("ffn.linear", "decode", 8, 128, "bf16", "bf16", "h100", 1, "transformers", 0.2, 0.1, 0.3, "measured")
ITEM = Item("pair", (Site(0, "attention"), Site(0, "ffn")), (AttentionSpec("gqa", 2), FfnSpec("narrow", 64)))
EXAMPLES = [
    SCORE,
    COST,
    ITEM,
    types.Interaction("a", "b", -0.01),
    types.Conflict(("a", "b"), "the loader drops it"),
    types.Capability("vllm", "lowered", "a linear map is self-only attention", "window-1"),
    types.Solution(("a",), 0.1, 0.1, "optimal", {"params": 5.0}, {"scores": "abc"}),
    types.ModelShape("llama", 2, 64, 4, 4, 16, 96, 128, 256, True),
    types.Workload("chat", 128, 128, (1, 8)),
]


@pytest.mark.parametrize("record", EXAMPLES, ids=lambda record: type(record).__name__)
def test_a_record_survives_json(record: object) -> None:
    assert types.from_json(type(record), json.loads(json.dumps(types.to_json(record))), "test") == record


@pytest.mark.parametrize("record", EXAMPLES, ids=lambda record: type(record).__name__)
def test_unknown_and_missing_fields_are_corrupt(record: object) -> None:
    good = types.to_json(record)
    with pytest.raises(types.CorruptFileError, match=r"somewhere\.json"):
        types.from_json(type(record), {**good, "surplus": 1}, "somewhere.json")
    good.pop(next(iter(good)))
    with pytest.raises(types.CorruptFileError, match=r"somewhere\.json"):
        types.from_json(type(record), good, "somewhere.json")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Site(-1, "ffn"),
        lambda: AttentionSpec("gqa"),
        lambda: AttentionSpec("keep", num_kv_heads=2),
        lambda: AttentionSpec("window"),
        lambda: AttentionSpec("gqa", num_kv_heads=-2),
        lambda: FfnSpec("narrow"),
        lambda: FfnSpec("experts"),
        lambda: FfnSpec("skip", intermediate_size=3),
        lambda: Item("x", (Site(0, "ffn"),), ()),
        lambda: Item("x", (Site(0, "ffn"), Site(0, "ffn")), (FfnSpec("skip"), FfnSpec("skip"))),
        lambda: Item("x", (Site(0, "ffn"),), (AttentionSpec("skip"),)),
        lambda: Score("x", "t", "t", "kl", "score", (), 8),
        lambda: Score("x", "t", "t", "kl", "score", (0.1, math.nan), 8),
        lambda: Cost(**{**types.to_json(COST), "ms": -1.0}),
        lambda: Cost(**{**types.to_json(COST), "ms_p90": math.inf}),
        lambda: Cost(**{**types.to_json(COST), "batch_size": 0}),
        lambda: types.Interaction("a", "a", 0.1),
        lambda: types.Workload("chat", 0, 1),
        lambda: types.Workload("chat", 1, 1, ()),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        make()


def test_mean_and_standard_error() -> None:
    assert SCORE.mean == pytest.approx(0.2)
    assert SCORE.standard_error == pytest.approx(0.1 / math.sqrt(3))
    assert Score("x", "t", "t", "kl", "score", (0.5,), 8).standard_error == math.inf


def test_records_are_frozen() -> None:
    with pytest.raises(AttributeError):
        SCORE.metric = "ce"  # type: ignore[misc]


def test_an_error_survives_the_way_to_another_process() -> None:
    error = pickle.loads(pickle.dumps(types.OutOfTimeError("nothing in time", 0.25)))
    assert (str(error), error.bound) == ("nothing in time", 0.25)
