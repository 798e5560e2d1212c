"""`puzzle evaluate`: tasks of the lm-evaluation-harness from a local file, of a run and of model folders, offline."""

from __future__ import annotations

import json
import re
import socket
import sys
from pathlib import Path

import pytest

from puzzle import artifacts, pipeline
from puzzle.cli import main
from puzzle.run import Run
from tests.pipeline.conftest import Project

TASK = """\
task: toy
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [a, b]
doc_to_target: label
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
QUESTIONS = 12


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a task; nothing that is connected to from here answers."""
    datasets = pytest.importorskip("datasets", reason="needs puzzle-nas[eval]")
    pytest.importorskip("lm_eval", reason="needs puzzle-nas[eval]")
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "toy.yaml").write_text(TASK.format(folder=folder))
    lines = [json.dumps({"question": "abcd" * (1 + index % 5), "label": index % 2}) for index in range(QUESTIONS)]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def refuse(*_: object) -> None:
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return folder


@pytest.mark.filterwarnings("ignore")  # lm-eval's and its libraries' own
def test_tasks_of_a_run_and_of_its_folders(
    copy: Project, tasks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import lm_eval.tasks

    asked = ["--tasks", "toy", "--task-folder", str(tasks)]
    assert main(["--debug", "evaluate", str(copy.config), *asked]) == 0
    out = capsys.readouterr().out
    cells = r"\| toy: acc \| (\S+) ± (\S+) \|  \| (\S+) ± (\S+) \((\S+) ± (\S+)\) \|"
    teacher, teacher_error, student, _, gap, gap_error = map(float, re.search(cells, out).groups())
    assert gap == pytest.approx(student - teacher, abs=2e-4)
    assert teacher_error == pytest.approx((teacher * (1 - teacher) / (QUESTIONS - 1)) ** 0.5, abs=1e-4)
    assert 0 <= gap_error < 0.5 and "toy: acc_norm" in out and "paired" in out

    run = Run.open(copy.config, ["evaluate.tasks=[toy]", f"evaluate.task_folder={tasks}"])
    figures = artifacts.read_unit(run.task("toy")).payload["figures"]
    assert {(figure["model"], figure["metric"]) for figure in figures} >= {("teacher", "acc"), ("student", "acc_norm")}
    assert pipeline.unit_states(run, pipeline.BY_NAME["evaluate"]) == ["done", "done"]
    assert pipeline.unit_states(run, pipeline.BY_NAME["report"]) == ["stale"]  # the task is not in it yet
    with open(tasks / "questions.jsonl", "a") as file:
        file.write("\n")
    assert pipeline.unit_states(run, pipeline.BY_NAME["evaluate"]) == ["done", "stale"]

    folders = [str(run.checkpoint), "--teacher", str(run.teacher)]
    assert main(["--debug", "evaluate", *folders, "--device", "cpu", *asked]) == 0
    of_folders = capsys.readouterr().out
    assert f"| toy: acc | {teacher:.4f} ± {teacher_error:.4f} | {student:.4f} ± " in of_folders
    assert "| | teacher | student |" in of_folders
    known = lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: known)  # lm-eval's own take seconds to go through
    assert main(["evaluate", *folders, *asked[:1], "toi", *asked[2:]]) == 2
    assert f"lm-eval has no task 'toi', nor is there one in {tasks}; did you mean 'toy'?" in capsys.readouterr().err
    (tasks / "toy.yaml").write_text(TASK.format(folder=tasks / "nowhere"))
    assert main(["evaluate", *folders, *asked]) == 2
    assert "task toy: its questions cannot be read" in capsys.readouterr().err


def test_what_tasks_need_is_said(
    copy: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run.open(copy.config)
    assert main(["evaluate", str(run.checkpoint)]) == 2
    assert "is a model, not a run: name what it is to answer, --tasks A,B" in capsys.readouterr().err
    assert main(["evaluate", str(copy.config), "--tasks", "toy", "--task-folder", "nowhere"]) == 2
    assert "evaluate.task_folder: nowhere is no folder" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.tasks", raising=False)
    for where in (copy.config, run.checkpoint):
        assert main(["evaluate", str(where), "--tasks", "toy"]) == 2
        assert "pip install 'puzzle-nas[eval]'" in capsys.readouterr().err
    assert not run.task("toy").exists()
