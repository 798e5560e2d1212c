"""Where there is no terminal, a stage says now and then how far it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from puzzle import progress


def test_a_log_hears_of_a_long_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with progress.stage_progress("init", 4, tmp_path / "events.jsonl") as seen:
        seen.done("L000.attention")
        assert capsys.readouterr().err == ""  # it has not taken long
        monkeypatch.setattr(progress, "QUIET_SECONDS", 0)
        seen.fraction(0.0, "L000.ffn")
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("init       25 %") and line.endswith("L000.ffn")
    assert "4 units in" in capsys.readouterr().err


def test_what_is_finer_than_units_stays_where_it_is_when_a_unit_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0)
    with progress.stage_progress("search", 1, tmp_path / "events.jsonl") as seen:
        seen.total(4, 2)
        for _ in range(2):
            seen.fraction(1)
        seen.done("solution")
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()[:3]] == ["75", "100", "100"]
