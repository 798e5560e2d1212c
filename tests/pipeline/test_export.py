"""`puzzle export`: the formats that the config or the constraint file ask for, and what is found beforehand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from puzzle.artifacts import read_unit
from puzzle.cli import main
from puzzle.export import publish
from puzzle.export.verify import RUNTIMES, Verdict
from puzzle.plans import export_formats
from puzzle.run import Run
from puzzle.validate import validate
from tests.pipeline.conftest import Project


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    def passed(_folder: Path, runtime: str, *_: object) -> Verdict:
        return Verdict(runtime, "1.0", dict.fromkeys(RUNTIMES[runtime].checks, 0.0))

    monkeypatch.setattr(publish, "verify", passed)  # clean processes are slow, and tested elsewhere


def test_another_format_is_added_beside_the_first(copy: Project, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run.open(copy.config)
    first = read_unit(run.student / "export" / "hf")
    assert main(["--debug", "export", str(copy.config), "--target", "nemotron-nas", "--target", "hf"]) == 0
    assert "torch 1.0: passed" in capsys.readouterr().out
    assert read_unit(run.student / "export" / "hf") == first
    folder = run.student / "export" / "nemotron-nas"
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "nemotron-nas" and len(config["block_configs"]) == run.shape.num_layers
    card = (folder / "README.md").read_text()
    assert 'base_model: "teacher"' in card and 'base_model_relation: "finetune"' in card
    assert "ffn_multiple_of" not in card and "memory_gib: 80%" in card and "sequence_tokens: 16" in card
    assert "| student before GKD |" in card and "95 % interval" in card and "| 0 | " in card


def test_what_a_student_is_served_on_decides_its_formats(project: Project) -> None:
    limit = project.folder / "limit.yaml"
    limit.write_text(limit.read_text() + "serve_on: [transformers, vllm, mlx-lm]\n")
    assert export_formats(Run.open(project.config)) == ("hf", "nemotron-nas", "mlx")
    run = Run.open(project.config, ["export.targets=[mlx]"])
    assert export_formats(run) == ("mlx",)
    validate(run)


def test_formats_that_cannot_hold_the_teacher_are_found_first(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    path = project.folder / "teacher" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_act": "gelu"}))
    assert main(["validate", str(project.config), "--set", "export.targets=nemotron-nas"]) == 2
    assert "silu only, and the teacher has 'gelu'" in capsys.readouterr().err
    assert main(["validate", str(project.config), "--set", "export.targets=onnx"]) == 2
    assert "export.targets" in capsys.readouterr().err
