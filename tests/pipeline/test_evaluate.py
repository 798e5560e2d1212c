"""`puzzle evaluate`: tasks of the lm-evaluation-harness from a local file, offline; speeds that vLLM measured."""

from __future__ import annotations

import json
import re
import socket
import sys
from pathlib import Path

import pytest

from puzzle import artifacts, pipeline
from puzzle.cli import main
from puzzle.report.served import bench_figures
from puzzle.run import Run
from puzzle.types import ConfigError, Workload
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
    assert "|  | teacher | student |" in of_folders
    known = lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: known)  # lm-eval's own take seconds to go through
    assert main(["evaluate", *folders, *asked[:1], "toi", *asked[2:]]) == 2
    assert f"lm-eval has no task 'toi', nor is there one in {tasks}; did you mean 'toy'?" in capsys.readouterr().err
    (tasks / "toy.yaml").write_text(TASK.format(folder=tasks / "nowhere"))
    assert main(["evaluate", *folders, *asked]) == 2
    assert "task toy: its questions cannot be read" in capsys.readouterr().err
    (tasks / "toy.yaml").write_text(TASK.format(folder=tasks).replace("test_split: test", "test_split: tests"))
    assert main(["evaluate", *folders, *asked]) == 2
    assert "task toy: lm-eval cannot ask it (KeyError: 'tests')" in capsys.readouterr().err
    (tasks / "tai.yaml").write_text("task: [tai")
    assert main(["evaluate", *folders, *asked[:1], "tai", *asked[2:]]) == 2
    assert f"{tasks / 'tai.yaml'}:1: not valid YAML" in capsys.readouterr().err


def test_what_tasks_need_is_said(
    copy: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run.open(copy.config)
    assert main(["evaluate", str(run.checkpoint)]) == 2
    assert "is a model, not a run: name what it is to answer, --tasks A,B" in capsys.readouterr().err
    assert main(["evaluate", str(run.checkpoint), "--tasks", "toy", "--vllm-bench", "chat.student=x.json"]) == 2
    assert "--vllm-bench is of a run" in capsys.readouterr().err
    assert main(["evaluate", str(copy.config), "--teacher", str(run.teacher)]) == 2
    assert "a run has its own teacher" in capsys.readouterr().err
    assert main(["evaluate", str(copy.config), "--tasks", "toy", "--task-folder", "nowhere"]) == 2
    assert "evaluate.task_folder: nowhere is no folder" in capsys.readouterr().err
    for arguments, said in (
        (
            [str(run.checkpoint), "--tasks", "toy", "--vllm-bench", "a.student=x"],
            "--vllm-bench is of a run",
        ),
        ([str(run.checkpoint), "--tasks", "toy", "--set", "kd.tokens=5"], "--set kd.tokens=5: of a model folder only"),
        ([str(copy.config), "--teacher", str(run.teacher)], "a run has its own teacher"),
        ([str(copy.config), "--tasks", ""], "evaluate.tasks.0: "),
    ):
        assert main(["evaluate", *arguments]) == 2
        assert said in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.tasks", raising=False)
    for where in (copy.config, run.checkpoint):
        assert main(["evaluate", str(where), "--tasks", "toy"]) == 2
        assert "pip install 'puzzle-nas[eval]'" in capsys.readouterr().err
    assert not run.task("toy").exists()


SERVED = {  # of `vllm bench serve --save-result`
    "date": "20261127-101010", "backend": "openai", "model_id": "student", "num_prompts": 10, "request_rate": "inf",
    "burstiness": 1.0, "max_concurrency": 1, "duration": 1.0, "completed": 10, "failed": 0, "total_input_tokens": 81,
    "total_output_tokens": 80, "request_throughput": 4.0, "output_throughput": 32.0, "total_token_throughput": 64.4,
    "mean_ttft_ms": 1.25, "median_ttft_ms": 1.2, "mean_tpot_ms": 0.75, "median_tpot_ms": 0.7,
}  # fmt: skip
FIGURES = {"ttft_ms": 1.25, "tpot_ms": 0.75, "output_tok_per_s": 32.0, "total_tok_per_s": 64.4, "req_per_s": 4.0}
LATENCY = {"avg_latency": 0.5, "std_latency": 0.1, "latencies": [0.4, 0.6], "percentiles": {"50": 0.5}}
THROUGHPUT = {
    "elapsed_time": 2.0, "num_requests": 10, "total_num_tokens": 160, "requests_per_second": 5.0,
    "tokens_per_second": 80.0,
}  # fmt: skip


def test_what_vllm_bench_measured_stands_beside_what_was_predicted(
    copy: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    command, arguments = ["--debug", "evaluate", str(copy.config)], []
    files = {"chat.student": SERVED, "chat.teacher": {**SERVED, "mean_ttft_ms": 2.5, "mean_e2el_ms": 9.5}}
    for name, found in files.items():
        (copy.folder / f"{name}.json").write_text(json.dumps(found))
        arguments += ["--vllm-bench", f"{name}={copy.folder / name}.json"]
    assert main([*command, *arguments]) == 0
    out = capsys.readouterr().out
    assert re.search(r"\| chat.ttft_ms: predicted / vLLM \| \d+\.\d+ / 2.50 \|  \| \d+\.\d+ / 1.25 \|", out)
    assert re.search(r"\| chat.e2e_ms: predicted / vLLM \| .* / 9.50 \|  \|  \|", out)
    assert "chat.output_tok_per_s: predicted / vLLM" in out and "what `vllm bench` measured" in out
    assert main(["--debug", "report", str(copy.config), "--redo"]) == 0
    assert " / 1.25</td>" in Run.open(copy.config).report.read_text()


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (SERVED, FIGURES),
        (LATENCY, {"e2e_ms": 500.0}),
        (THROUGHPUT, {"req_per_s": 5.0, "total_tok_per_s": 80.0}),
        ({**SERVED, "completed": 9}, "1 of 10 requests failed"),
        (
            {**SERVED, "max_concurrency": 4},
            "a concurrency of 4; chat has 1 at a time: --request-rate inf --max-con",
        ),
        ({**SERVED, "request_rate": 2.0}, "a request rate of 2.0"),
        ({**SERVED, "total_input_tokens": 90}, "9 tokens of prompt per request, where the workload has 8"),
        ({**SERVED, "total_output_tokens": 40}, "4 tokens of answer per request, where the workload has 8"),
        ({**THROUGHPUT, "num_requests": 5}, "32 tokens of prompt and answer per request, where the workload has 16"),
        ({**THROUGHPUT, "num_requests": 0}, "not what `vllm bench` writes"),
        ({"accuracy": 1.0}, "not what `vllm bench` writes"),
        ({**SERVED, "mean_tpot_ms": float("nan")}, "tpot_ms is nan"),
        ({**SERVED, "total_input_tokens": float("nan")}, "nan tokens of prompt per request"),
        ({**SERVED, "mean_ttft_ms": "soon"}, "could not convert string to float: 'soon'"),
        ({"avg_latency": -1}, "e2e_ms is -1000.0"),
        (["mean_ttft_ms"], "not what `vllm bench` writes"),
    ],
)
def test_files_of_vllm_bench(found: object, expected: dict[str, float] | str, tmp_path: Path) -> None:
    path, workload = tmp_path / "bench.json", Workload("chat", isl=8, osl=8)
    path.write_text(json.dumps(found))
    if isinstance(expected, dict):
        assert bench_figures(path, workload, 1) == expected
        return
    with pytest.raises(ConfigError, match=re.escape(expected)):
        bench_figures(path, workload, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("chat=x.json", "write WORKLOAD.student=FILE"),
        ("chat.pupil=x.json", "write WORKLOAD.student=FILE"),
        ("chats.student=x.json", "no workload of that name; did you mean 'chat'?"),
        ("chat.student=x.json", "x.json: No such file"),
    ],
)
def test_what_is_wrong_with_a_bench(
    given: str, message: str, copy: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(copy.config), "--vllm-bench", given]) in (2, 5)
    assert message in capsys.readouterr().err
