"""Who does what: every piece once, costs shared out, teams where pieces run out, and the dead by name."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from puzzle.ranks import Note, Ranks, noted, notes, rows_of, shares


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_piece_has_one_rank_and_every_rank_a_piece(count: int) -> None:
    rng = random.Random(count)
    for size in range(count, 30):
        costs = {f"u{index}": rng.uniform(0.1, 10) for index in range(size)}
        found = shares(costs, count, 8)
        assert [name for share in found for name in share.pieces] == list(costs)
        assert all(share.pieces and share.team == (rank,) for rank, share in enumerate(found))


def test_costs_are_shared_out_about_equally() -> None:
    rng = random.Random(0)
    costs = {f"u{index}": rng.uniform(0.5, 2) for index in range(200)}
    totals = [sum(costs[name] for name in share.pieces) for share in shares(costs, 8, 1)]
    assert max(totals) < 1.15 * sum(costs.values()) / 8


def test_where_pieces_run_out_ranks_share_the_batches() -> None:
    found = shares({"a": 1.0, "b": 1.0}, 5, most_in_team=8)
    assert [share.team for share in found] == [(0, 1), (0, 1), (2, 3), (2, 3), (4,)]
    assert [share.pieces for share in found] == [("a",), ("a",), ("b",), ("b",), ()]
    few_rows = shares({"a": 1.0}, 4, most_in_team=2)
    assert [share.pieces for share in few_rows] == [("a",), ("a",), (), ()]


def test_nothing_to_do_is_nothing_for_everybody() -> None:
    assert [share.pieces for share in shares({}, 3, 8)] == [(), (), ()]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_a_team_takes_each_row_once(size: int) -> None:
    team = tuple(range(10, 10 + size))
    rows = [row for rank in team for row in range(8)[rows_of(8, team, rank)]]
    assert rows == list(range(8))


def test_a_note_stays_behind_where_the_work_did_not_end(tmp_path: Path) -> None:
    with noted(tmp_path, Ranks(1, 2), "distill", 12):
        assert [note.rank for note in notes(tmp_path)] == [1]
    assert notes(tmp_path) == []

    def dies() -> None:
        with noted(tmp_path, Ranks(1, 2), "distill", 12):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        dies()
    (note,) = notes(tmp_path)
    assert "rank 1 (process" in str(note)
    assert "distill, 12 units" in str(note)


@pytest.mark.skipif(not hasattr(os, "waitid"), reason="waits for the end of a process without reaping it")
def test_a_rank_is_dead_once_its_process_is() -> None:
    here = socket.gethostname()
    assert not Note(0, here, os.getpid(), "distill", 12).died
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    note = Note(1, here, process.pid, "distill", 12)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert note.died  # before its launcher has noticed
    process.wait()
    assert note.died
    assert not Note(1, f"not-{here}", process.pid, "distill", 12).died


def test_the_launcher_says_which_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Ranks.current() == Ranks(0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert Ranks.current() == Ranks(3, 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert Ranks.current() == Ranks(3, 4, 2)
