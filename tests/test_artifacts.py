"""Units on disk: whole or absent, stale by name, events that survive a torn line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import SafetensorError

from puzzle import artifacts
from puzzle.types import CorruptFileError, PuzzleError, StaleUnitError

INPUTS = {"teacher": "aaaa", "data": "bbbb"}


def write_two_files(aside: Path) -> dict[str, int]:
    (aside / "inner").mkdir()
    (aside / "inner" / "one.txt").write_text("one")
    (aside / "two.txt").write_text("two")
    return {"step": 3}


def test_a_folder_is_published_with_its_marker(tmp_path: Path) -> None:
    unit = artifacts.publish_folder(tmp_path / "unit", INPUTS, write_two_files)
    assert unit == artifacts.read_unit(tmp_path / "unit")
    assert unit.payload == {"step": 3}
    assert (tmp_path / "unit" / "inner" / "one.txt").read_text() == "one"
    assert artifacts.is_current(tmp_path / "unit", INPUTS, "stage")


def test_content_depends_on_the_bytes_alone(tmp_path: Path) -> None:
    first = artifacts.publish_folder(tmp_path / "a", INPUTS, write_two_files)
    second = artifacts.publish_folder(tmp_path / "b", {"other": "x"}, write_two_files)
    assert first.content == second.content
    (tmp_path / "c").mkdir()
    third = artifacts.publish_folder(tmp_path / "c" / "d", INPUTS, lambda aside: {"step": 4})
    assert third.content != first.content


@pytest.mark.parametrize("error", [OSError(28, "No space left"), ValueError("bug"), KeyboardInterrupt()])
def test_an_error_while_writing_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def fail(aside: Path) -> None:
        write_two_files(aside)
        raise error

    with pytest.raises(type(error)):
        artifacts.publish_folder(tmp_path / "unit", INPUTS, fail)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_under_safetensors_is_named(tmp_path: Path) -> None:
    def full(aside: Path) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.raises(CorruptFileError, match=r"unit: cannot be written .*No space left.*free some space"):
        artifacts.publish_folder(tmp_path / "unit", INPUTS, full)
    assert list(tmp_path.iterdir()) == []


def test_other_inputs_are_stale_by_name(tmp_path: Path) -> None:
    artifacts.publish_json(tmp_path / "unit.json", INPUTS, {"x": 1})
    assert not artifacts.is_current(tmp_path / "absent.json", INPUTS, "score")
    with pytest.raises(StaleUnitError, match=r"changed: data\); run again with --redo score"):
        artifacts.is_current(tmp_path / "unit.json", {**INPUTS, "data": "cccc"}, "score")
    with pytest.raises(StaleUnitError, match="changed: more"):
        artifacts.is_current(tmp_path / "unit.json", {**INPUTS, "more": "dddd"}, "score")


def test_a_file_of_another_size_is_corrupt(tmp_path: Path) -> None:
    artifacts.publish_folder(tmp_path / "unit", INPUTS, write_two_files)
    (tmp_path / "unit" / "two.txt").write_text("tw")
    with pytest.raises(CorruptFileError, match=r"two\.txt: expected 3 bytes, found 2 bytes"):
        artifacts.read_unit(tmp_path / "unit")
    (tmp_path / "unit" / "two.txt").unlink()
    with pytest.raises(CorruptFileError, match="found missing"):
        artifacts.read_unit(tmp_path / "unit")


KEYS = ("schema_version", "inputs", "content", "payload")


@pytest.mark.parametrize(
    ("key", "value"), [*((key, None) for key in KEYS), *((key, ["a", "b"]) for key in (*KEYS[1:], "files"))]
)
def test_a_marker_of_the_wrong_kind_says_what_to_do(tmp_path: Path, key: str, value: object) -> None:
    """Lacking a key (value None), or with a list in its place."""
    path = tmp_path / "unit"
    artifacts.publish_folder(path, INPUTS, write_two_files)
    marker = json.loads((path / "unit.json").read_text())
    changed = {name: entry for name, entry in {**marker, key: value}.items() if entry is not None}
    (path / "unit.json").write_text(json.dumps(changed))
    with pytest.raises(CorruptFileError) as caught:
        artifacts.read_unit(path)
    assert str(path / "unit.json") in str(caught.value)
    assert f"delete {path} and run again" in str(caught.value)


def test_what_a_payload_holds_is_read_as_what_it_should_be(tmp_path: Path) -> None:
    unit = artifacts.publish_json(tmp_path / "unit.json", INPUTS, {"steps": {"first": 1}, "losses": [0.5, 2]})
    assert unit.read(int, "steps", "first") == 1
    assert unit.read(list[float], "losses") == [0.5, 2.0]
    with pytest.raises(CorruptFileError, match=r"unit\.json: it has no steps\.last; delete .*unit\.json and run again"):
        unit.read(int, "steps", "last")
    with pytest.raises(CorruptFileError, match=r"unit\.json: losses: not a valid dict.*unit\.json and run again"):
        unit.read(dict[str, float], "losses")


def test_another_schema_is_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "unit.json"
    artifacts.publish_json(path, INPUTS, {})
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 99}))
    with pytest.raises(CorruptFileError, match="another version of puzzle"):
        artifacts.read_unit(path)


def test_what_is_not_a_number_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        artifacts.publish_json(tmp_path / "unit.json", INPUTS, {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_events_survive_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    artifacts.append_event(path, {"n": 1})
    with open(path, "a") as file:
        file.write('{"n": 2, "torn')
    artifacts.append_event(path, {"n": 3})
    assert artifacts.read_events(path) == [{"n": 1}, {"n": 3}]


def test_a_run_folder_belongs_to_one_process(tmp_path: Path) -> None:
    with (
        artifacts.exclusive(tmp_path),
        pytest.raises(PuzzleError, match="another puzzle process"),
        artifacts.exclusive(tmp_path),
    ):
        pass
    with artifacts.exclusive(tmp_path):
        pass


def test_sweeping_removes_what_was_left_aside_and_nothing_else(tmp_path: Path) -> None:
    artifacts.publish_folder(tmp_path / "deep" / "unit", INPUTS, write_two_files)
    (tmp_path / "deep" / ".aside-other").mkdir()
    (tmp_path / "deep" / ".aside-other" / "half").write_text("x")
    (tmp_path / ".aside-file.json").write_text("{")
    artifacts.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "deep",
        "inner",
        "one.txt",
        "two.txt",
        "unit",
        "unit.json",
    ]


def test_fingerprints_do_not_depend_on_order() -> None:
    assert artifacts.fingerprint({"a": 1, "b": [2]}) == artifacts.fingerprint({"b": [2], "a": 1})
    assert artifacts.fingerprint({"a": 1}) != artifacts.fingerprint({"a": 2})


def test_nothing_in_the_package_unpickles_or_trusts_remote_code() -> None:
    package = Path(artifacts.__file__).parent
    for path in package.rglob("*.py"):
        text = path.read_text()
        for word in ("import pickle", "torch.load(", "joblib", "allow_pickle=True"):
            assert word not in text, path
        if path.name not in ("verify_child.py", "verify_torch.py"):  # they load an export as a stranger would
            assert "trust_remote_code=True" not in text.replace('", trust_remote_code=True"', ""), path


def test_of_several_ranks_the_first_remembers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, kept in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        with artifacts.remembered(tmp_path / "known.json") as known:
            known["file"] = "hash"
        assert (tmp_path / "known.json").exists() == kept
