"""Two processes on one run make what one makes, bit for bit; a rank that dies is named and its work taken up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import puzzle
from puzzle.artifacts import read_events, read_unit
from puzzle.cli import main
from puzzle.run import Run
from tests.pipeline.conftest import Project, copied
from tests.pipeline.test_prune import as_pruning

DRIVER = """
import os, sys
from puzzle.cli import main
import puzzle.stages.distill as stage
publish, count = stage._publish, [0]
def dying(run, planned, result):
    count[0] += 1
    if os.environ["RANK"] == "1" and count[0] > 2:
        os._exit(9)
    publish(run, planned, result)
stage._publish = dying
sys.exit(main(sys.argv[1:]))
"""
PRUNER = """
import os, shutil, sys
from pathlib import Path
from puzzle.blocks.refit import SideBySide
from puzzle.cli import main
from puzzle.ranks import Ranks
from puzzle.run import Run

ranks, config = Ranks.current(), sys.argv[1]
def dying(*given):
    if ranks.rank == 1:
        os._exit(9)
    return refit(*given)
refit = SideBySide.refit
for stage in ("importance", "prune"):
    assert main(["--debug", stage, config]) == 0
if ranks.first:
    shutil.copytree(Run.open(Path(config)).student / "initial", Path(config).parent / "by-two")
SideBySide.refit = dying
sys.exit(main(["prune", config, "--redo"]))
"""
OF_TWO = """
import sys
from puzzle.cli import main
from puzzle.ranks import Ranks
assert Ranks.current().count == 2
sys.exit(main(sys.argv[1:]))
"""
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# without a GPU too; with --cpu it starts one process, however many are asked for; port 0: a free one
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]


def torchrun(*command: str) -> subprocess.CompletedProcess[str]:
    return launched(TORCHRUN, *command)


def launched(by: list[str], *command: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, *by]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(puzzle.__file__).parent.parent)}
    return subprocess.run([*launcher, *command], capture_output=True, text=True, env=environment, timeout=240)


def weights(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    folders = (run / "library" / "trained").iterdir()
    return {folder.name: load_file(folder / "weights.safetensors") for folder in folders if folder.name[0] == "L"}


@pytest.fixture
def unfinished(finished: Project, tmp_path: Path) -> Project:
    """A finished run without its trained library."""
    project = finished.copy_to(tmp_path / "project")
    shutil.copytree(finished.run, project.run)
    shutil.rmtree(project.run / "library" / "trained")
    return project


def test_two_ranks_share_the_units_and_then_the_batches(unfinished: Project, finished: Project) -> None:
    done = torchrun("-m", "puzzle", "--debug", "distill", str(unfinished.config))
    assert done.returncode == 0, done.stderr
    found, expected = weights(unfinished.run), weights(finished.run)
    assert found.keys() == expected.keys()
    for unit, tensors in expected.items():
        for name, tensor in tensors.items():
            assert torch.equal(found[unit][name], tensor), (unit, name)
    assert not (unfinished.run / "ranks").exists() or not list((unfinished.run / "ranks").iterdir())

    shutil.rmtree(unfinished.run / "library" / "trained" / "L001.ffn.linear")  # one unit for two: half a batch each
    done = torchrun("-m", "puzzle", "--debug", "distill", str(unfinished.config))
    assert done.returncode == 0, done.stderr
    for name, tensor in expected["L001.ffn.linear"].items():
        torch.testing.assert_close(weights(unfinished.run)["L001.ffn.linear"][name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", [[], ["--set", "score={mode: one-pass, sequences: 2, until_se: 1e-9}"]])
def test_two_ranks_score_what_one_does(finished: Project, tmp_path: Path, settings: list[str]) -> None:
    found = []
    for name in ("alone", "two"):
        project = finished.copy_to(tmp_path / name)
        shutil.copytree(finished.run, project.run)
        shutil.rmtree(project.run / "scores")
        if name == "alone":
            assert main(["--debug", "score", str(project.config), *settings]) == 0
        else:
            done = torchrun("-m", "puzzle", "--debug", "score", str(project.config), *settings)
            assert done.returncode == 0, done.stderr
        found.append({path.name: path.read_text() for path in (project.run / "scores").glob("*.json")})
    assert found[0] == found[1]


def test_two_ranks_measure_what_decides_a_search_as_one_does(finished: Project, tmp_path: Path) -> None:
    settings = ["--set", "score.mode=one-pass"]
    found = []
    for name in ("alone", "two"):
        project = finished.copy_to(tmp_path / name)
        shutil.copytree(finished.run, project.run)
        assert main(["--debug", "score", str(project.config), *settings, "--redo"]) == 0
        if name == "alone":
            assert main(["--debug", "rescore", str(project.config), *settings]) == 0
        else:
            done = torchrun("-m", "puzzle", "--debug", "rescore", str(project.config), *settings)
            assert done.returncode == 0, done.stderr
        rescored = project.run / "rescored"
        found.append({path.relative_to(rescored): path.read_text() for path in rescored.rglob("*.json")})
    assert found[0] == found[1]
    assert len(found[0]) > 2  # what decides, and more than one item for two ranks to share


def test_ranks_stay_in_step_where_one_of_several_searches_has_no_answer(finished: Project, tmp_path: Path) -> None:
    project = finished.copy_to(tmp_path / "project")
    shutil.copytree(finished.run, project.run)
    limits = tmp_path / "limits.yaml"
    asked = "workloads:\n  chat: {isl: 8, osl: 8, weights: fp32, kv: fp32, device: cpu}\nconstraints:\n  memory_gib: "
    limits.write_text(asked + '{values: ["90%", 1e-9, "80%"]}\n')
    search = ["-m", "puzzle", "search", str(project.config), "--constraints", str(limits)]
    done = torchrun(*search)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("memory_gib ≤ 1e-09 cannot be met") == 1
    limits.write_text(asked + "1e-9\n")
    done = torchrun(*search)
    assert done.returncode != 0
    assert "memory_gib ≤ 1e-09 cannot be met" in done.stderr
    assert "died" not in done.stderr


def test_a_dead_rank_is_named_and_its_units_are_taken_up(
    unfinished: Project, finished: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "driver.py").write_text(DRIVER)
    # the launcher kills the survivors when it sees a dead rank: it looks so rarely that they have spoken by then
    seldom = [*TORCHRUN, "--monitor-interval", "3"]
    died = launched(seldom, str(tmp_path / "driver.py"), "distill", str(unfinished.config))
    assert died.returncode != 0
    (line,) = [line for line in died.stderr.splitlines() if " died; " in line]
    assert "rank 1 (process" in line
    assert "rank 0 (process" not in line
    left = weights(unfinished.run)
    assert 2 <= len(left) < len(weights(finished.run))
    assert main(["--debug", "distill", str(unfinished.config)]) == 0
    named = capsys.readouterr().err
    assert "rank 1 (process" in named
    assert "rank 0 (process" not in named
    assert {event["rank"] for event in read_events(unfinished.run / "events.jsonl") if event["event"] == "died"} == {1}
    expected = weights(finished.run)
    for unit, tensors in weights(unfinished.run).items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, expected[unit][name]), (unit, name)


def test_two_ranks_choose_between_widths_as_one_does_and_a_dead_one_is_named(searched: Project, tmp_path: Path) -> None:
    """Several runs in one command; the second one's library is where a rank dies."""
    project = copied(searched, tmp_path / "project")
    whole, narrow = Path("widths/32/steps/1-search"), Path("widths/24/steps/2-search")
    for name in ("scores", "solutions", "students"):
        for one in (whole, narrow):
            shutil.rmtree(project.run / one / name, ignore_errors=True)
    shutil.rmtree(project.run / narrow / "library" / "trained")
    for name, text in (("driver.py", DRIVER), ("of_two.py", OF_TWO)):
        (tmp_path / name).write_text(text)
    died = launched([*TORCHRUN, "--monitor-interval", "3"], str(tmp_path / "driver.py"), "run", str(project.config))
    assert died.returncode != 0
    (line,) = [line for line in died.stderr.splitlines() if " died; distill goes on" in line]
    assert "rank 1 (process" in line and "rank 0 (process" not in line

    done = launched(ACCELERATE, str(tmp_path / "of_two.py"), "--debug", "run", str(project.config))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" is the best: ") == done.stdout.count("\nstep 24/2-search: ") == 1
    assert "rank 1 (process" in done.stderr
    for one in (whole, narrow):
        found, expected = weights(project.run / one), weights(searched.run / one)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[unit][name], own) for unit in found for name, own in expected[unit].items())
        scores = [
            {path.name: path.read_text() for path in (of.run / one / "scores").iterdir()} for of in (project, searched)
        ]
        assert scores[0] == scores[1] and scores[0]
        assert not list((project.run / one / "ranks").iterdir())
    (student,) = project.run.glob("widths/*/steps/*-search/students/limit-*")
    other = searched.run / student.relative_to(project.run)
    tensors = load_file(other / "final" / "model.safetensors")
    for name, tensor in load_file(student / "final" / "model.safetensors").items():
        torch.testing.assert_close(tensor, tensors[name], rtol=1e-4, atol=1e-5)


def close(found: Path, expected: Path) -> bool:
    """Whether the tensors in two files are equal, up to a millionth."""
    own, other = load_file(found), load_file(expected)
    assert own.keys() == other.keys()
    near = [
        torch.allclose(own[name], one, rtol=1e-6, atol=1e-6 * one.abs().max().item()) for name, one in other.items()
    ]
    return all(near)


def test_two_ranks_prune_as_one_does_and_a_dead_one_is_named(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three batches of calibration tokens, the last a small one; what each layer's loss costs shared, too."""
    prune = "prune: {hidden_size: 24, intermediate_size: 32, num_attention_heads: 75%, num_layers: 1, layers_by: loss}"
    as_pruning(project, prune + "\n")
    project.config.write_text(project.config.read_text().replace("init: {sequences: 8}", "init: {sequences: 20}"))
    assert main(["--debug", "data", str(project.config)]) == 0
    two = project.copy_to(tmp_path / "two")
    two.config.write_text(project.config.read_text().replace(str(project.folder), str(two.folder)))
    shutil.copytree(project.run, two.run)
    for stage in ("importance", "prune"):
        assert main(["--debug", stage, str(project.config)]) == 0
    (tmp_path / "driver.py").write_text(PRUNER)
    died = launched([*TORCHRUN, "--monitor-interval", "3"], str(tmp_path / "driver.py"), str(two.config))
    assert (two.folder / "by-two").exists(), died.stderr
    importance = Path("importance") / "importance.safetensors"
    assert close(two.run / importance, project.run / importance)
    blocks, costs = (
        [read_unit(of.run / name).payload for of in (two, project)] for name in ("importance", "drops/01.json")
    )
    assert blocks[0]["importance"] == pytest.approx(blocks[1]["importance"], rel=1e-6)
    for metric, of_layers in costs[1]["scores"].items():
        assert costs[0]["scores"][metric] == pytest.approx(of_layers, rel=1e-6), metric
    student = Run.open(two.config).student / "initial" / "model.safetensors"
    expected = Run.open(project.config).student / "initial" / "model.safetensors"
    assert close(two.folder / "by-two" / "model.safetensors", expected)

    assert [line for line in died.stderr.splitlines() if "rank 1 (process" in line and " died; prune" in line], (
        died.stderr
    )
    assert not student.exists()
    assert main(["--debug", "prune", str(two.config)]) == 0
    assert "rank 1 (process" in capsys.readouterr().err
    assert close(student, expected)
