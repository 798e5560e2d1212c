"""What users get wrong: one clear line that says what to do, the right exit code, and nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from puzzle import yamlfiles
from puzzle.blocks import candidates
from puzzle.blocks.candidates import Draft, Seen
from puzzle.cli import main
from puzzle.config import ConstraintFile, RunConfig
from puzzle.run import Run
from puzzle.types import Spec
from tests.pipeline.conftest import Project


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def unknown_key(project: Project) -> None:
    edit(project.config, "teacher:", "teecher:")


def duplicate_key(project: Project) -> None:
    project.config.write_text(project.config.read_text() + "device: cpu\n")


def not_yaml(project: Project) -> None:
    project.config.write_text("run: [unclosed\n")


def wrong_type(project: Project) -> None:
    edit(project.config, "sequences: 8", "sequences: many")


def no_model_there(project: Project) -> None:
    (project.folder / "teacher" / "config.json").unlink()


def no_teacher(project: Project) -> None:
    shutil.rmtree(project.folder / "teacher")


def other_family(project: Project) -> None:
    edit_json(project.folder / "teacher" / "config.json", model_type="gpt2")


def truncated_weights(project: Project) -> None:
    weights = project.folder / "teacher" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def corrupt_weights(project: Project) -> None:
    (project.folder / "teacher" / "model.safetensors").write_bytes(b"\xff" * 5000)


def missing_weights(project: Project) -> None:
    (project.folder / "teacher" / "model.safetensors").unlink()


def missing_tensor(project: Project) -> None:
    path = project.folder / "teacher" / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, path)


def set_one_weight(project: Project, name: str, value: float) -> None:
    path = project.folder / "teacher" / "model.safetensors"
    tensors = load_file(path)
    tensors[name][0, 5] = value
    save_file(tensors, path, {"format": "pt"})


def values_that_are_not_finite(project: Project) -> None:
    set_one_weight(project, "model.layers.1.self_attn.v_proj.weight", torch.nan)


def channels_that_are_not_finite(project: Project) -> None:
    set_one_weight(project, "model.layers.1.mlp.up_proj.weight", torch.inf)


def other_shape(project: Project) -> None:
    edit_json(project.folder / "teacher" / "config.json", intermediate_size=64)


def no_tokenizer(project: Project) -> None:
    for path in (project.folder / "teacher").glob("*token*"):
        path.unlink()


def no_text(project: Project) -> None:
    (project.folder / "text.jsonl").unlink()


def text_too_short(project: Project) -> None:
    lines = (project.folder / "text.jsonl").read_text().splitlines()
    (project.folder / "text.jsonl").write_text("\n".join(line for line in lines if '"score"' not in line) + "\n")


def malformed_text(project: Project) -> None:
    (project.folder / "text.jsonl").write_text('{"text": "fine"}\n{"txt": "no"}\n')


def too_long_sequences(project: Project) -> None:
    edit(project.config, "sequence_tokens: 16", "sequence_tokens: 128")


def more_sequences_than_there_are(project: Project) -> None:
    edit(project.config, "evaluate: {sequences: 4}", "evaluate: {sequences: 4000}")


def all_loss_weights_zero(project: Project) -> None:
    edit(project.config, "kd: {", "kd: {kl_weight: 0, cosine_weight: 0, ")


def diverging_kd(project: Project) -> None:
    edit(project.config, "kd: {", "kd: {learning_rate: 1e30, ")


def heads_that_do_not_divide(project: Project) -> None:
    edit_json(project.folder / "teacher" / "config.json", hidden_size=30)


def empty_ffn_width(project: Project) -> None:
    edit(project.folder / "space.yaml", "narrow-50%", "narrow-0")


def key_that_is_a_number(project: Project) -> None:
    edit(project.config, "device: cpu", "device: cpu\n8: x")


def no_constraint_file(project: Project) -> None:
    (project.folder / "limit.yaml").unlink()


def unknown_metric(project: Project) -> None:
    edit(project.folder / "limit.yaml", "memory_gib", "memory_gb")


def unknown_constraint_key(project: Project) -> None:
    edit(project.folder / "limit.yaml", "isl: 8", "isl: 8, ols: 9")


def unmeasured_bound(project: Project) -> None:
    edit(project.folder / "limit.yaml", "memory_gib: 80%", "chat.ttft_ms: 80%\n  chat.tpot_ms: 80%")
    edit(project.folder / "limit.yaml", "isl: 8, osl: 8", "isl: 4, osl: 8")


def infeasible_bound(project: Project) -> None:
    edit(project.folder / "limit.yaml", "80%", "1e-9")


def variant_that_does_not_divide(project: Project) -> None:
    edit(project.folder / "space.yaml", "gqa-2", "gqa-3")


def grid_too_long(project: Project) -> None:
    edit(project.folder / "grid.yaml", "prefill_tokens: [8]", "prefill_tokens: [8, 100]")


CASES: list[tuple[Callable[[Project], None], int, tuple[str, ...]]] = [
    (unknown_key, 2, ("config.yaml:2", "unknown key 'teecher'", "did you mean 'teacher'")),
    (duplicate_key, 2, ("config.yaml:14", "duplicate key", "device")),
    (not_yaml, 2, ("config.yaml:2", "not valid YAML")),
    (wrong_type, 2, ("config.yaml:8", "init.sequences", "many")),
    (no_model_there, 2, ("is no model folder",)),
    (no_teacher, 2, ("teacher:", "no such folder")),
    (other_family, 2, ("family 'gpt2' is not supported", "llama")),
    (truncated_weights, 5, ("model.safetensors", "bytes where its header says")),
    (corrupt_weights, 5, ("model.safetensors", "no safetensors file, or truncated")),
    (missing_weights, 5, ("model.safetensors", "missing")),
    (missing_tensor, 5, ("layer 0: the tensors do not fit", "mlp.up_proj.weight")),
    (other_shape, 5, ("teacher", "size mismatch")),
    (values_that_are_not_finite, 5, ("teacher, layer 1", "activations are not finite")),
    (channels_that_are_not_finite, 5, ("teacher, layer 1", "activations are not finite")),
    (no_tokenizer, 2, ("no tokenizer here",)),
    (no_text, 2, ("data.text", "no such file")),
    (text_too_short, 2, ("too little text", "'score'")),
    (malformed_text, 5, ("text.jsonl:2", 'with a "text"')),
    (too_long_sequences, 2, ("data.sequence_tokens is 128", "at most 64")),
    (more_sequences_than_there_are, 2, ("evaluate.sequences is 4000", "'report' holds")),
    (all_loss_weights_zero, 2, ("config.yaml:12: kd", "all weights are 0")),
    (diverging_kd, 2, ("the loss is not finite at step", "lower kd.learning_rate")),
    (heads_that_do_not_divide, 2, ("config.json", "refused by transformers")),
    (empty_ffn_width, 2, ("'narrow-0'", "at least 1")),
    (key_that_is_a_number, 2, ("config.yaml:6", "unknown key '8'")),
    (no_constraint_file, 2, ("constraints", "no such file")),
    (unknown_metric, 2, ("memory_gb", "memory_gib")),
    (unknown_constraint_key, 2, ("limit.yaml:2", "unknown key 'workloads.chat.ols'")),
    (unmeasured_bound, 4, ("4 tokens lie outside", "prefill", "puzzle profile")),
    (variant_that_does_not_divide, 2, ("space.yaml", "3 does not divide the teacher's 4 KV heads")),
    (grid_too_long, 2, ("prefill_tokens", "64 positions")),
]


@pytest.mark.parametrize(("spoil", "code", "words"), CASES, ids=[case[0].__name__ for case in CASES])
def test_one_clear_line_and_the_right_exit_code(
    project: Project,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Project], None],
    code: int,
    words: tuple[str, ...],
) -> None:
    spoil(project)
    assert main(["run", str(project.config)]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("puzzle: ")]
    assert len(lines) == 1
    assert "Traceback" not in lines[0]
    for word in words:
        assert word in lines[0]
    assert not list(project.folder.rglob(".aside-*"))


def test_a_limit_that_no_choice_keeps_is_found_before_anything_runs(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    infeasible_bound(project)
    assert main(["run", str(project.config)]) == 3
    assert "memory_gib ≤ 1e-09 cannot be met: the smallest possible is" in capsys.readouterr().err
    assert not project.run.exists()


def test_validate_finds_every_error_at_once(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    too_long_sequences(project)
    unknown_metric(project)
    assert main(["validate", str(project.config)]) == 2
    error = capsys.readouterr().err
    assert "data.sequence_tokens is 128" in error
    assert "memory_gb" in error
    assert not project.run.exists()


def test_every_mistake_in_a_config_is_named(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    unknown_key(project)
    wrong_type(project)
    assert main(["validate", str(project.config)]) == 2
    error = capsys.readouterr().err
    assert "teecher" in error
    assert "init.sequences" in error


def test_numbers_are_read_as_yaml_1_2_reads_them(project: Project) -> None:
    edit(project.config, "tokens: 64,", "tokens: 64, learning_rate: 1e-4,")
    assert yamlfiles.load(RunConfig, project.config).distill.learning_rate == 1e-4
    (project.folder / "limit.yaml").write_text("constraints:\n  params: {max: 5.0e9}\n")
    bound = yamlfiles.load(ConstraintFile, project.folder / "limit.yaml").constraints["params"]
    assert bound.max == 5.0e9  # type: ignore[union-attr]


@pytest.mark.parametrize("bad", ["NaN", "Infinity", "-Infinity"])
def test_a_score_that_is_not_finite_is_a_corrupt_file(
    finished: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.run, run)
    shutil.rmtree(run / "solutions")
    path = run / "scores" / "L001.ffn.json"
    unit = json.loads(path.read_text())
    unit["payload"]["scores"][0]["per_sequence"][1] = float(bad)
    path.write_text(json.dumps(unit))
    assert main(["search", str(run)]) == 5
    error = capsys.readouterr().err
    assert "L001.ffn.json" in error
    assert "L001.ffn.narrow-24: the kl score is not finite" in error
    assert error.count("\n") == 1
    assert not (run / "solutions").exists()


def test_a_variant_whose_weights_are_not_finite_is_named(
    finished: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.run, run)
    weights = run / "library" / "trained" / "L000.ffn.linear" / "weights.safetensors"
    tensors = load_file(weights)
    tensors["mlp.linear_mlp.weight"][0, 0] = torch.nan
    save_file(tensors, weights)
    shutil.rmtree(run / "scores")
    assert main(["score", str(run)]) == 5
    assert "L000.ffn.linear" in capsys.readouterr().err


def test_a_damaged_marker_is_named(finished: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.run, run)
    marker = run / "library" / "trained" / "L000.ffn.linear" / "unit.json"
    marker.write_text(marker.read_text()[:20])
    assert main(["run", str(run)]) == 5
    assert str(marker) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("unit", "key", "value", "command"),
    [
        ("data", "payload.num_tokens", [1, 2], "score --redo"),
        ("library/trained/L000.ffn.linear", "inputs", ["teacher"], "distill"),
        ("library/trained/L000.ffn.linear", "files", [], "distill"),
        ("library/trained/L000.ffn.linear", "payload.tokens", "many", "show library"),
        ("scores/L001.ffn.json", "payload.scores", {"kl": 1.0}, "pareto"),
        ("costs/decode.b1.t8.json", "payload.costs", ["1 ms"], "pareto"),
        ("solutions/*", "payload.solutions", None, "search"),
        ("students/*/evaluation.json", "payload.quality", [], "evaluate"),
        ("students/*/export/hf", "payload.others", ["vllm: not verified"], "export"),
    ],
)
def test_a_unit_of_the_wrong_kind_is_named_with_what_to_do(
    copy: Project, capsys: pytest.CaptureFixture[str], unit: str, key: str, value: object, command: str
) -> None:
    (path,) = copy.run.glob(unit)
    marker = path / "unit.json" if path.is_dir() else path
    content = json.loads(marker.read_text())
    section, _, name = key.rpartition(".")
    (content[section] if section else content)[name] = value
    marker.write_text(json.dumps(content))
    assert main([*command.split(), str(copy.run)]) == 5
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line
    assert f"delete {path} and run again" in line


def test_a_teacher_without_a_pad_token_goes_all_the_way(project: Project) -> None:
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        path = project.folder / "teacher" / name
        if path.exists():
            settings = json.loads(path.read_text())
            settings.pop("pad_token", None)
            settings.pop("pad_token_id", None)
            path.write_text(json.dumps(settings))
    assert main(["--debug", "run", str(project.config)]) == 0
    exported = Run.open(project.config).student / "export" / "hf"
    assert json.loads((exported / "config.json").read_text()).get("pad_token_id") is None


def test_a_diverging_variant_is_failed_and_the_search_does_without_it(project: Project) -> None:
    from puzzle.tables import read_scores

    assert main(["--debug", "run", str(project.config), "--set", "distill.learning_rate=1e30"]) == 0
    run = Run.open(project.config, ["distill.learning_rate=1e30"])
    failed = read_scores(run.scores).failed
    assert failed
    assert all("not finite" in reason for reason in failed.values())
    assert not set(failed) & set(run.solutions()[0].items)


def test_one_nan_variant_fails_alone(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    linear = candidates.CANDIDATES["linear"]

    def with_one_nan(seen: Seen, spec: Spec) -> dict[str, Draft]:
        found = linear(seen, spec)
        if (seen.layer.layer_idx, seen.part) == (1, "ffn"):
            for draft in found.values():
                draft.weights["mlp.linear_mlp.weight"][2, 3] = torch.nan
        return found

    monkeypatch.setitem(candidates.CANDIDATES, "linear", with_one_nan)  # type: ignore[arg-type]
    for stage in ("data", "init", "distill", "score", "profile", "search"):
        assert main(["--debug", stage, str(project.config)]) == 0
    run = Run.open(project.config)
    failed = run.read_scores().failed
    assert set(failed) == {"L001.ffn.linear"}
    assert "L001.ffn.linear" not in run.solutions()[0].items
    capsys.readouterr()
    assert main(["--debug", "show", "library", str(project.config)]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "not finite" in line]
    assert row.split()[:2] == ["L001.ffn", "linear"]
    assert row.endswith(failed["L001.ffn.linear"])


def test_a_site_with_nothing_but_keep_is_done(project: Project) -> None:
    edit(project.folder / "space.yaml", "[keep, gqa-2, linear, skip]", "[keep]")
    edit(project.folder / "limit.yaml", "80%", "95%")
    assert main(["--debug", "run", str(project.config)]) == 0
    assert main(["--debug", "search", str(project.config)]) == 0


def test_refused_settings_leave_the_recorded_config_alone(finished: Project, tmp_path: Path) -> None:
    shutil.copytree(finished.run, tmp_path / "run")
    before = (tmp_path / "run" / "config.yaml").read_text()
    assert main(["distill", str(tmp_path / "run"), "--set", "distill.tokens=128"]) == 6
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_an_override_that_makes_no_sense(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(project.config), "--set", "distill.token=5"]) == 2
    assert "did you mean 'tokens'" in capsys.readouterr().err
