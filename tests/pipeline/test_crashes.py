"""Killed anywhere and started again, a run ends with the same architecture and the same weights, bit for bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

import pytest

from puzzle import artifacts
from puzzle.blocks import stream
from puzzle.cli import main
from puzzle.export import publish
from puzzle.export.verify import RUNTIMES, Verdict
from puzzle.run import Run
from tests.pipeline.conftest import Project


class InjectedCrash(BaseException):
    """Like a kill: no handler of the code under test may catch it."""


def results(project: Project) -> dict[str, bytes]:
    """The architecture and the student's weights, as bytes."""
    run = Run.open(project.config)
    files = {
        "architecture": run.solution / "architecture.json",
        "initial": run.student / "initial" / "model.safetensors",
        "final": run.student / "final" / "model.safetensors",
        "exported": run.student / "export" / "hf" / "model.safetensors",
    }
    return {name: path.read_bytes() for name, path in files.items()}


def with_costs_of(finished: Project, project: Project) -> Project:
    shutil.copytree(finished.run / "costs", project.run / "costs")
    return project


def test_a_crash_at_every_disk_operation_in_turn(
    finished: Project, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each operation of the whole run crashes once, when first reached; a restart follows each crash."""
    with_costs_of(finished, project)
    crashed: set[tuple[str, str]] = set()

    def crash_once(operation: str, path: Path) -> None:
        key = (operation, str(path))
        if key not in crashed:
            crashed.add(key)
            raise InjectedCrash

    passed = Verdict("transformers", differences=dict.fromkeys(RUNTIMES["transformers"].checks, 0.0))
    monkeypatch.setattr(publish, "verify", lambda *_: passed)  # the clean process is slow, and tested elsewhere
    with monkeypatch.context() as patched:  # looking at the results may write, too: what the teacher's files hash to
        patched.setattr(artifacts, "_before", crash_once)
        while True:
            try:
                assert main(["--debug", "run", str(project.config)]) == 0
                break
            except InjectedCrash:
                continue
    operations = {operation for operation, _ in crashed}
    assert operations == {"mkdir", "write", "flush", "rename", "append", "remove"}
    assert len(crashed) > 150
    assert results(project) == results(finished)
    assert not list(project.run.rglob(".aside-*"))


def test_sigkill_at_random_moments(finished: Project, project: Project) -> None:
    with_costs_of(finished, project)
    rng = random.Random(1)
    command = [sys.executable, "-m", "puzzle.cli", "run", str(project.config)]
    kills = 0
    for _ in range(4):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        units = count_units(project)
        until = units + rng.randrange(1, 9)  # killed when that many more units are there, wherever it then is
        while process.poll() is None and count_units(project) < until:
            time.sleep(0.001 * rng.random())
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills > 0
    assert main(["--debug", "run", str(project.config)]) == 0
    assert results(project) == results(finished)


def count_units(project: Project) -> int:
    # os.walk, unlike rglob, does not mind folders that are renamed under its feet
    found = [(folder, name) for folder, _, names in os.walk(project.run) for name in names]
    return sum(name == "unit.json" or Path(folder).name == "scores" for folder, name in found)


def test_a_full_disk_is_one_clear_line_and_loses_nothing(
    finished: Project, project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_costs_of(finished, project)

    def full(operation: str, path: Path) -> None:
        if operation == "write" and "trained" in str(path):
            raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(artifacts, "_before", full)
        assert main(["run", str(project.config)]) == 5
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("puzzle: ")
    assert "No space left on device; free some space and run the same command again" in error
    assert len(list((project.run / "library" / "initial").iterdir())) == 8
    assert main(["--debug", "run", str(project.config)]) == 0
    assert results(project) == results(finished)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="writes to a device that is always full")
def test_a_disk_that_the_residual_stream_fills_is_one_clear_line(
    finished: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project = finished.copy_to(tmp_path / "project")
    shutil.copytree(finished.run, project.run)
    expected = library_of(project)
    for trained in project.run.glob("library/trained/L001*"):
        shutil.rmtree(trained)
    command = ["distill", str(project.config), "--set", "distill.residual=disk"]
    writes = 0

    def full_at_the_second(path: Path, mode: str) -> BinaryIO:
        nonlocal writes
        writes += mode == "r+b"
        return open("/dev/full" if mode == "r+b" and writes == 2 else path, mode)  # type: ignore[return-value]

    with monkeypatch.context() as patched:
        patched.setattr(stream, "open", full_at_the_second, raising=False)
        assert main(command) == 5
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith(f"puzzle: {project.run / '.aside-residual-0'}: No space left on device; free some space")
    assert not list(project.run.rglob(".aside-*"))
    assert main(["--debug", *command]) == 0
    assert library_of(project) == expected


def library_of(project: Project) -> dict[str, bytes]:
    """Every unit's weights, as bytes."""
    return {path.parent.name: path.read_bytes() for path in project.run.glob("library/trained/*/weights.safetensors")}


def test_a_read_only_disk_is_one_clear_line(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read_only(operation: str, path: Path) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(artifacts, "_before", read_only)
    assert main(["run", str(project.config)]) == 5
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert "Read-only file system; use a folder that can be written" in error
    assert not project.run.exists()
