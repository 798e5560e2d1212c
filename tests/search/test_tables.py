"""Reading what the stages wrote: whole, finite and once, or an error of the right kind with the file's name."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from search_factories import make_costs, make_score, make_shape

from puzzle.artifacts import publish_json
from puzzle.tables import costs_frame, read_costs, read_scores, scores_frame
from puzzle.types import CorruptFileError, MissingMeasurementError, to_json

FIRST, SECOND = make_score("L000.ffn.skip", 1.5), make_score("L001.ffn.skip", 0.5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    publish_json(tmp_path / "a.json", {}, {"scores": [to_json(FIRST)]})
    failed = [{"item_id": "L000.ffn.linear", "reason": "diverged"}]
    publish_json(tmp_path / "b.json", {}, {"scores": [to_json(SECOND)], "failed": failed})
    return tmp_path


def test_scores_of_all_files_are_read_together(folder: Path) -> None:
    table = read_scores(folder)
    assert table.score("L000.ffn.skip", "kl") == FIRST
    assert table.score("L001.ffn.skip", "kl") == SECOND
    assert table.failed == {"L000.ffn.linear": "diverged"}
    with pytest.raises(MissingMeasurementError, match="no ce_delta score for L000.ffn.skip; run `puzzle score RUN`"):
        table.score("L000.ffn.skip", "ce_delta")


def test_scores_frame_is_tidy(folder: Path) -> None:
    frame = scores_frame(read_scores(folder))
    assert list(frame["mean"]) == [1.5, 0.5]
    assert list(frame["standard_error"]) == pytest.approx([0.25, 0.25])
    assert list(frame["num_sequences"]) == [2, 2]
    assert "per_sequence" not in frame.columns
    assert list(scores_frame([]).columns) == list(frame.columns)


def test_costs_are_read_back_equal_and_framed_with_their_fields(tmp_path: Path) -> None:
    costs = make_costs(make_shape())
    publish_json(tmp_path / "costs.json", {}, {"costs": [to_json(cost) for cost in costs.rows]})
    assert read_costs(tmp_path) == costs
    frame = costs_frame(costs)
    assert list(frame.columns) == list(asdict(costs.rows[0]))
    assert frame["ms"].sum() == pytest.approx(sum(cost.ms for cost in costs.rows))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_score_that_is_not_finite_is_corrupt(folder: Path, value: float) -> None:
    spoil(folder / "b.json", "scores", "per_sequence", [0.5, value])
    with pytest.raises(CorruptFileError) as caught:
        read_scores(folder)
    message = str(caught.value)
    assert caught.value.exit_code == 5
    assert str(folder / "b.json") in message
    assert "L001.ffn.skip" in message
    assert "not finite" in message
    assert "\n" not in message


@pytest.mark.parametrize("column", ["ms", "ms_p10", "ms_p90"])
def test_cost_that_is_not_finite_is_corrupt(tmp_path: Path, column: str) -> None:
    (cost, *_) = make_costs(make_shape()).rows
    publish_json(tmp_path / "costs.json", {}, {"costs": [to_json(cost)]})
    spoil(tmp_path / "costs.json", "costs", column, float("nan"))
    with pytest.raises(CorruptFileError, match=r"costs\.json.*rest: prefill time is not a finite") as caught:
        read_costs(tmp_path)
    assert "\n" not in str(caught.value)


def test_unknown_and_missing_fields_are_corrupt(folder: Path) -> None:
    spoil(folder / "a.json", "scores", "perplexity", 3.0)
    with pytest.raises(CorruptFileError, match=r"a\.json.*perplexity"):
        read_scores(folder)
    publish_json(folder / "a.json", {}, {"score": []})
    with pytest.raises(CorruptFileError, match=r"a\.json: it has no scores; delete .*a\.json and run again"):
        read_scores(folder)


def test_only_the_files_that_are_asked_for_are_read(folder: Path) -> None:
    (folder / "b.json").write_text("of an earlier space, and damaged")
    assert set(read_scores(folder, ["a.json", "absent.json"]).scores) == {("L000.ffn.skip", "kl")}
    with pytest.raises(CorruptFileError, match=r"b\.json: unreadable"):
        read_scores(folder)


def test_same_score_in_two_files_is_corrupt(folder: Path) -> None:
    shutil.copy(folder / "a.json", folder / "c.json")
    with pytest.raises(CorruptFileError, match=r"c\.json: L000\.ffn\.skip \(kl\) is in .*a\.json too"):
        read_scores(folder)


def test_half_written_units_are_not_read_and_no_unit_at_all_is_missing(folder: Path) -> None:
    for name in ("a.json", "b.json"):
        (folder / name).rename(folder / f".aside-{name}")
    with pytest.raises(MissingMeasurementError, match="no scores there; run `puzzle score RUN`"):
        read_scores(folder)
    with pytest.raises(MissingMeasurementError, match="no costs there; run `puzzle profile RUN`"):
        read_costs(folder)


def spoil(path: Path, kind: str, field: str, value: object) -> None:
    data = json.loads(path.read_text())
    data["payload"][kind][0][field] = value
    path.write_text(json.dumps(data))
