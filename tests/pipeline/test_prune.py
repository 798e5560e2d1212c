"""A pruning as a user drives it: run, again, changed, and what is asked of it that only a search has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from puzzle import artifacts
from puzzle.blocks.moments import token_weights
from puzzle.cli import main
from puzzle.pipeline import stages_of
from puzzle.run import Run
from puzzle.stages.common import sequences_of
from puzzle.teacher import load_config, read_tensors
from puzzle.variants import model_params
from tests.pipeline.conftest import Project

PRUNE = "prune: {hidden_size: 24, intermediate_size: 32, num_attention_heads: 75%, num_layers: 1, layers_by: loss}"


def as_pruning(project: Project, prune: str = PRUNE, limits: bool = True) -> Project:
    text = project.config.read_text()
    lines = [
        line for line in text.splitlines() if not line.startswith(("space:", *(() if limits else ("constraints:",))))
    ]
    text = "\n".join([*lines, prune, ""]).replace("kd: {", "kd: {cosine_weight: 0, ")
    project.config.write_text(text)
    return project


def test_a_pruning_ends_with_a_plain_checkpoint_and_a_report(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    as_pruning(project)
    assert main(["--debug", "validate", str(project.config)]) == 0
    assert "layers 2 → 1, hidden size 32 → 24" in capsys.readouterr().out
    assert main(["--debug", "run", str(project.config)]) == 0
    run = Run.open(project.config)
    shape = run.student_shape
    for model in ("initial", "final"):  # what global distillation compares each layer with; lost, it would guess
        assert load_config(run.student / model).layers_from == list(run.kept_layers)
    exported = run.student / "export" / "hf"
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert isinstance(model, LlamaForCausalLM)
    assert (model.config.hidden_size, model.config.num_attention_heads, model.config.num_hidden_layers) == (24, 3, 1)
    assert sum(parameter.numel() for parameter in model.parameters()) == model_params(shape)
    assert "trust_remote_code" not in (exported / "README.md").read_text()
    report = run.report.read_text()
    assert "hidden size 32 → 24" in report
    assert "chat.memory_gib, predicted" in report
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in run.student.rglob("*")}
    assert main(["--debug", "run", str(project.run)]) == 0  # the folder knows what it is
    assert {path: path.stat().st_mtime_ns for path in run.student.rglob("*")} == before
    assert main(["--debug", "status", str(project.config)]) == 0
    lines = capsys.readouterr().out.splitlines()
    states = dict(line.split("  (last")[0].split(maxsplit=1) for line in lines[-len(stages_of(run)) :])
    other = {"importance": "2 done", "tournament": "0 needed"}
    assert states == {stage.name: other.get(stage.name, "1 done") for stage in stages_of(run)}
    _check_what_only_a_search_has(project, capsys)
    _check_changes(project, capsys)


def _check_what_only_a_search_has(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["search"], ["distill"], ["additivity"], ["pareto"], ["show", "library"], ["compare"], ["explain"]):
        assert main([*command, str(project.config)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "pruning (prune: in its config)" in line


def _check_changes(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    """Another width is another student; other sequences are another calibration of all of them."""
    narrower = ["--set", "prune.hidden_size=12"]
    assert main(["--debug", "prune", str(project.config), *narrower]) == 0
    students = {path.name for path in (project.run / "students").iterdir()}
    assert students == {Run.open(project.config, where).student.name for where in ([], [narrower[1]])}
    assert main(["prune", str(project.config), "--set", "init.sequences=7"]) == 6
    assert "importance" in capsys.readouterr().err


@pytest.mark.parametrize("start", ["best", "paper"])
@pytest.mark.parametrize("by", ["contiguous", "block-importance", "[0]"])
def test_layers_go_as_asked_and_nothing_else_changes(project: Project, by: str, start: str) -> None:
    """Depth alone, by the paper's start: the other layer and the ends are the teacher's, bit for bit."""
    as_pruning(project, f"prune: {{num_layers: 1, layers_by: {by}}}", limits=False)
    where = ["--set", f"init.start={start}"]
    for stage in ("data", "importance", "prune"):
        assert main(["--debug", stage, str(project.config), *where]) == 0
    run = Run.open(project.config, [where[1]])
    (kept,) = run.kept_layers
    if by == "[0]":
        assert kept == 1
    if by == "contiguous":
        payload = artifacts.read_unit(run.drops).payload["scores"]["kl"]
        assert payload[str(kept)] == max(payload.values())
    teacher = LlamaForCausalLM.from_pretrained(project.folder / "teacher").state_dict()
    for name, tensor in read_tensors(run.student / "initial" / "model.safetensors").items():
        same = torch.equal(tensor, teacher[name.replace("layers.0.", f"layers.{kept}.")])
        assert same or start == "best"


def test_importance_is_that_of_plain_torch(project: Project) -> None:
    as_pruning(project, "prune: {importance: {sequence: l2, batch: mean}}", limits=False)
    assert main(["--debug", "data", str(project.config)]) == 0
    assert main(["--debug", "importance", str(project.config)]) == 0
    run = Run.open(project.config)
    found = read_tensors(run.importance / "importance.safetensors")
    model = LlamaForCausalLM.from_pretrained(project.folder / "teacher").eval()
    seen: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        for name, module in (("heads", layer.self_attn.o_proj), ("channels", layer.mlp.down_proj)):
            module.register_forward_pre_hook(lambda _, args, key=f"{index}.{name}": seen.__setitem__(key, args[0]))
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda _, args, key=f"{index}.middle": seen.__setitem__(key, args[0])
        )
    expected: dict[str, list[torch.Tensor]] = {}
    for batch in sequences_of(run, "train", 8):
        for row in batch.ids:
            with torch.no_grad():
                model(row[None])
            for index in range(2):
                used = token_weights(seen[f"{index}.middle"])[0] > 0
                heads = seen[f"{index}.heads"][0, used].unflatten(-1, (4, 8)).norm(dim=-1)
                expected.setdefault(f"{index}.heads", []).append(heads.square().mean(0).sqrt())
                channels = seen[f"{index}.channels"][0, used]
                expected.setdefault(f"{index}.channels", []).append(channels.square().mean(0).sqrt())
    for name, rows in expected.items():
        assert torch.allclose(found[name], torch.stack(rows).double().mean(0), rtol=1e-4)
    assert set(found) == {"hidden", *expected}


@pytest.mark.parametrize(
    ("prune", "words"),
    [
        ("prune: {num_attention_heads: 3, num_key_value_heads: 2}", "3 query heads cannot share 2 KV heads"),
        ("prune: {num_key_value_heads: 2, num_attention_heads: 4}", "1 to 1 (the teacher's) times"),
        ("prune: {hidden_size: 20, num_attention_heads: 3}", "take 18 or another number of heads"),
        ("prune: {hidden_size: 64}", "prune.hidden_size is 64, but the teacher has 32"),
        ("prune: {num_layers: 1, layers_by: [0, 1]}", "which leaves 0; leave some"),
        ("prune: {layers_by: [7]}", "the teacher has layers 0 to 1, not 7"),
        ("prune: {layers_by: loss}", "needs num_layers"),
        ("prune: {layers_by: best}", "give one of block-importance, loss, contiguous, or a list"),
        ("prune: {hidden_size: 0}", "give a whole number, or a percentage"),
        ("prune: {hidden_size: 24}\nspace: demo", "a run is a search (space) or a pruning (prune), not both"),
        ("prune: {num_layers: 1, layers_by: loss, layers_metric: mine}", "no score is called 'mine'"),
    ],
)
def test_what_cannot_be_pruned_is_said_in_one_line(
    project: Project, capsys: pytest.CaptureFixture[str], prune: str, words: str
) -> None:
    as_pruning(project, prune)
    assert main(["validate", str(project.config)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_config_alone_is_enough_for_a_dry_run(
    project: Project, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    as_pruning(project, "prune: {hidden_size: 24, layers_by: [1]}")
    assert main(["--debug", "run", str(project.config), "--dry-run"]) == 0
    assert "students/pruned-" in capsys.readouterr().out
    config = json.loads((project.folder / "teacher" / "config.json").read_text())
    for path in (project.folder / "teacher").iterdir():
        path.unlink()
    (project.folder / "teacher" / "config.json").write_text(json.dumps(config))
    assert main(["--debug", "run", str(project.config), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"{model_params(Run.open(project.config).student_shape):,}" in out
    assert "layers that go: 1" in out
    assert "model.safetensors: missing" in out
    assert not project.run.exists()
