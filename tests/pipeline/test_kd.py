"""Global distillation as a stage: on two ranks as on one, continued from any checkpoint, every step logged once."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from puzzle import artifacts, training_log
from puzzle.cli import main
from puzzle.config import KdConfig
from puzzle.data.batches import Batch
from puzzle.kd import Distillation
from puzzle.kd.losses import check_comparable
from puzzle.ranks import Ranks
from puzzle.run import Run
from puzzle.sharding import load_sharded, mesh_of
from puzzle.teacher import Compute, load_model
from puzzle.types import ConfigError
from puzzle.validate import _forward_flops, _stage_flops
from tests.pipeline.conftest import Project
from tests.pipeline.test_torchrun import launched

FP32 = Compute(torch.device("cpu"), bf16=False)
STEPS = 4
# every part of the loss; layers mapped, widths mapped, pieces of uneven sizes
CONFIG = KdConfig(
    batch_size=6, micro_batch_size=2, warmup_steps=1, learning_rate=2e-3, mse_weight=0.5, lm_weight=0.1,
    match_embedding=True, balance="dynamic", checkpoint_activations=True,
)  # fmt: skip
DRIVER = """
import json, os, sys
from pathlib import Path
from puzzle.cli import main
from puzzle.kd import Distillation
from puzzle.ranks import Ranks
from tests.pipeline import test_kd

folder, config = Path(sys.argv[1]), sys.argv[2]
ranks, count = Ranks.current(), [0]
backward = Distillation._backward
def dying(job, batch, balance):
    count[0] += 1
    if ranks.rank == 1 and count[0] == 6:
        os._exit(9)
    return backward(job, batch, balance)

ranks.join()
logged = test_kd.trained(folder, ranks, folder / "by-one", folder / "by-two")
if ranks.first:
    (folder / "by-two.json").write_text(json.dumps(logged))
Distillation._backward = dying
sys.exit(main(["kd", config]))
"""


def batches(step: int) -> Batch:
    """Rows in which different numbers of tokens count, of several documents."""
    random = torch.Generator().manual_seed(step)
    ids = torch.randint(3, 128, (6, 12), generator=random)
    documents = (torch.rand(6, 12, generator=random) < 0.2).cumsum(1).int()
    return Batch(ids, torch.rand(6, 12, generator=random) < 0.6, documents)


def trained(folder: Path, ranks: Ranks, start: Path | None, middle: Path) -> list[dict[str, float]]:
    """The losses of :data:`STEPS` steps, saved half-way in ``middle``; the second half again from ``start``."""
    logged: list[dict[str, float]] = []
    for first in [None] if start is None else [None, start]:
        if (mesh := mesh_of(FP32.device, ranks.count)) is None:
            models = [load_model(folder / name, FP32) for name in ("student", "teacher")]
        else:
            models = [
                load_sharded(folder / name, mesh, torch.float32, name == "student") for name in ("student", "teacher")
            ]
        job = Distillation(models[0], models[1], CONFIG, FP32, ranks)
        if first is not None:
            job.load(first, json.loads((first / "payload.json").read_text()))
        record = lambda _: logged.append(job.last.figures())  # noqa: B023
        if first is None:
            job.run(batches, STEPS // 2, STEPS, record)
            if ranks.first:
                middle.mkdir(exist_ok=True)
            payload = job.save(middle if ranks.first else None)
            if ranks.first:
                (middle / "payload.json").write_text(json.dumps(payload))
        job.run(batches, STEPS, STEPS, record)
    return logged


@pytest.fixture
def undistilled(finished: Project, tmp_path: Path) -> Project:
    """A finished run whose student has not been distilled yet."""
    project = finished.copy_to(tmp_path / "project")
    shutil.copytree(finished.run, project.run)
    student = Run.open(project.config).student
    for name in ("final", "export", "report"):
        shutil.rmtree(student / name)
    for name in ("evaluation.json", training_log.NAME):
        (student / name).unlink()
    return project


def log_of(project: Project) -> list[dict[str, Any]]:
    return training_log.read_log(Run.open(project.config).student / training_log.NAME)


def assert_same_curve(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected)
    for own, other in zip(found, expected, strict=True):
        assert own.keys() == other.keys()
        for name in own.keys() - {"tokens_per_s"}:
            assert own[name] == pytest.approx(other[name], rel=1e-4, abs=1e-7), name


def test_two_ranks_distil_as_one_does_and_a_dead_one_is_named(
    undistilled: Project, finished: Project, tmp_path: Path, tiny_pair: Path
) -> None:
    alone = trained(tiny_pair, Ranks(), None, tiny_pair / "by-one")
    (tmp_path / "driver.py").write_text(DRIVER)
    by = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--monitor-interval", "2"]
    died = launched(by, str(tmp_path / "driver.py"), str(tiny_pair), str(undistilled.config))
    assert (tiny_pair / "by-two.json").exists(), died.stderr
    assert_same_curve(json.loads((tiny_pair / "by-two.json").read_text()), [*alone, *alone[STEPS // 2 :]])
    one, two = ({p.name: load_file(p) for p in (tiny_pair / by).glob("*.safetensors")} for by in ("by-one", "by-two"))
    assert one.keys() == two.keys()
    for name, tensors in one.items():
        assert tensors.keys() == two[name].keys()
        for key, tensor in tensors.items():
            torch.testing.assert_close(two[name][key], tensor, rtol=1e-3, atol=1e-5)

    assert [line for line in died.stderr.splitlines() if "rank 1 (process" in line and " died; kd" in line], died.stderr
    expected = log_of(finished)
    assert_same_curve(log_of(undistilled), expected[:5])
    student = Run.open(undistilled.config).student
    assert [path.name for path in (student / "kd").iterdir()] == ["step-00000004"]
    assert main(["--debug", "kd", str(undistilled.config)]) == 0  # one rank goes on from the checkpoint of two
    assert_same_curve(log_of(undistilled), expected)
    final, other = (
        load_file(Run.open(of.config).student / "final" / "model.safetensors") for of in (undistilled, finished)
    )
    for name, tensor in other.items():
        torch.testing.assert_close(final[name], tensor, rtol=1e-3, atol=1e-5)


def test_a_run_killed_between_checkpoints_logs_every_step_once(
    undistilled: Project, finished: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward, count = Distillation._backward, 0

    def killed(job: Distillation, batch: Batch, balance: float) -> dict[str, torch.Tensor]:
        nonlocal count
        count += 1
        if count == 4:  # step 3 is logged, and lost with what came after the checkpoint of step 2
            raise KeyboardInterrupt
        return backward(job, batch, balance)

    with monkeypatch.context() as patched:
        patched.setattr(Distillation, "_backward", killed)
        assert main(["kd", str(undistilled.config)]) == 130
    assert [line["step"] for line in log_of(undistilled)] == [1, 2, 3]
    assert main(["--debug", "kd", str(undistilled.config)]) == 0
    found, expected = log_of(undistilled), log_of(finished)
    assert [line["loss"] for line in found] == [line["loss"] for line in expected]
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]


def test_a_diverging_loss_names_the_last_good_checkpoint(
    undistilled: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backward = Distillation._backward

    def diverging(job: Distillation, batch: Batch, balance: float) -> dict[str, torch.Tensor]:
        parts = backward(job, batch, balance)
        return {name: part * float("nan") for name, part in parts.items()} if job.step == 3 else parts

    monkeypatch.setattr(Distillation, "_backward", diverging)
    assert main(["kd", str(undistilled.config)]) == 2
    checkpoint = Run.open(undistilled.config).student / "kd" / "step-00000002"
    said = f"the loss is not finite at step 4; lower kd.learning_rate; the last good checkpoint is {checkpoint}"
    assert said in capsys.readouterr().err
    assert checkpoint.is_dir()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("kd.max_epochs=0.5", "kd.tokens is 192, but train holds"),
        ("kd.report_to=wandb", "kd.report_to: wandb is not installed; pip install wandb"),
    ],
)
def test_what_kd_refuses(
    undistilled: Project, setting: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training_log, "_installed", lambda name: False)
    tokens = ["--set", "kd.tokens=100000000"] if "epochs" in setting else []
    assert main(["kd", str(undistilled.config), "--set", setting, *tokens]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert said.replace("192", "100,000,000") in error


def test_another_vocabulary_is_refused_before_weights_are_read(tiny_pair: Path) -> None:
    for name in ("student", "teacher"):
        for weights in (tiny_pair / name).glob("*.safetensors"):
            weights.unlink()
    check_comparable(tiny_pair / "student", tiny_pair / "teacher")
    path = tiny_pair / "student" / "config.json"
    path.write_text(path.read_text().replace('"vocab_size": 128', '"vocab_size": 130'))
    with pytest.raises(ConfigError, match=r"student .* predicts 130 tokens and the teacher .* 128; .*same vocabulary"):
        check_comparable(tiny_pair / "student", tiny_pair / "teacher")


def test_trackers_are_told_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[Any, ...]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            told.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            told.append((name, value, step))

        def close(self) -> None:
            told.append(("closed",))

    online = types.ModuleType("wandb")
    monkeypatch.setattr(online, "init", lambda **named: told.append(("init", named["name"])), raising=False)
    monkeypatch.setattr(online, "log", lambda figures, step: told.append((step, figures)), raising=False)
    monkeypatch.setattr(online, "finish", lambda: told.append(("finished",)), raising=False)
    monkeypatch.setitem(sys.modules, "wandb", online)
    board = types.ModuleType("torch.utils.tensorboard")
    monkeypatch.setattr(board, "SummaryWriter", Writer, raising=False)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setattr(training_log, "_installed", lambda name: True)
    student = tmp_path / "id"
    with training_log.opened(student, 4, ("tensorboard", "wandb")) as log:
        log(5, {"loss": 0.25})
    assert told == [
        (str(student / "tensorboard"), 5), ("init", "id-4"), ("kd/loss", 0.25, 5), (5, {"loss": 0.25}),
        ("finished",), ("closed",),
    ]  # fmt: skip
    assert training_log.read_log(student / training_log.NAME) == [{"step": 5, "loss": 0.25}]


def test_a_stored_signal_is_the_teachers(undistilled: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Final hidden states give the losses that the teacher gives; made once, and continued after an interruption."""
    monkeypatch.setattr("puzzle.kd.stored.CHUNK_STEPS", 4)
    command = ["--debug", "kd", str(undistilled.config), "--redo", "--set", "kd.cosine_weight=0", "--set"]
    assert main([*command, "kd.signal=online"]) == 0
    expected = [line["loss"] for line in log_of(undistilled)]
    publish = artifacts.publish_folder

    def interrupted(path: Path, *rest: Any) -> artifacts.Unit:
        if path.name == "steps-00000004":
            raise InterruptedError
        return publish(path, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(artifacts, "publish_folder", interrupted)
        with pytest.raises(InterruptedError):
            main([*command, "kd.signal=hidden"])
    first = undistilled.run / "signal" / "steps-00000000" / "unit.json"
    written = first.stat().st_mtime_ns
    assert main([*command, "kd.signal=hidden"]) == 0
    assert first.stat().st_mtime_ns == written
    assert [line["loss"] for line in log_of(undistilled)] == pytest.approx(expected, rel=1e-5)


def test_a_sampled_signal_is_close_to_the_teachers(undistilled: Project) -> None:
    command = ["--debug", "kd", str(undistilled.config), "--redo", "--set", "kd.cosine_weight=0"]
    assert main(command) == 0
    expected = [line["kl"] for line in log_of(undistilled)]
    assert main([*command, "--set", "kd.signal=sampled", "--set", "kd.signal_samples=4000"]) == 0
    assert [line["kl"] for line in log_of(undistilled)] == pytest.approx(expected, rel=0.1)


@pytest.fixture
def larger(undistilled: Project) -> Path:
    """Another teacher of the same tokens: 3 layers of 40 in the place of 2 of 32."""
    folder = undistilled.folder / "larger"
    torch.manual_seed(5)
    config = LlamaConfig(
        hidden_size=40, num_hidden_layers=3, num_attention_heads=5, num_key_value_heads=5, intermediate_size=56,
        vocab_size=128, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for path in (undistilled.folder / "teacher").glob("*token*"):
        shutil.copy(path, folder)
    return folder


def test_another_teacher_may_distil(
    undistilled: Project, finished: Project, larger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of another depth and width; a signal on disk is its own, too, and the unit knows whose it is."""
    config, by_larger = str(undistilled.config), ["--set", f"kd.teacher={larger}"]
    assert main(["--debug", "validate", config, *by_larger]) == 0
    assert main(["--debug", "kd", config, *by_larger]) == 0
    assert [line["kl"] for line in log_of(undistilled)][0] > 2 * log_of(finished)[0]["kl"]
    student = Run.open(undistilled.config).student
    assert "kd_teacher" in artifacts.read_unit(student / "final").inputs
    assert main(["kd", config]) == 6
    assert "kd_teacher" in capsys.readouterr().err
    predictions = [*by_larger, "--set", "kd.cosine_weight=0", "--redo"]
    assert main(["--debug", "kd", config, *predictions]) == 0
    expected = [line["kl"] for line in log_of(undistilled)]
    assert main(["--debug", "kd", config, *predictions, "--set", "kd.signal=hidden"]) == 0
    assert [line["kl"] for line in log_of(undistilled)] == pytest.approx(expected, rel=1e-5)
    given = artifacts.read_unit(undistilled.run / "signal" / "steps-00000000").inputs["teacher"]
    assert given == Run.open(undistilled.config, [f"kd.teacher={larger}"]).distilling.teacher_fingerprint
    own = ["--set", "kd.cosine_weight=0", "--set", "kd.signal=hidden", "--redo"]
    assert main(["--debug", "kd", config, *own]) == 0  # and is made anew for the run's own
    assert artifacts.read_unit(undistilled.run / "signal" / "steps-00000000").inputs["teacher"] != given


def test_what_another_teacher_costs_is_forecast(undistilled: Project, larger: Path) -> None:
    alone, beside = (Run.open(undistilled.config, of) for of in ([], [f"kd.teacher={larger}"]))
    (_, own), (_, other) = (_forward_flops(run) for run in (alone, beside.distilling))
    assert other > own
    more = (other - own) * alone.config.kd.tokens
    assert _stage_flops(beside, "kd") - _stage_flops(alone, "kd") == pytest.approx(more)
    assert _stage_flops(beside, "evaluate") > _stage_flops(alone, "evaluate")
    alone_in_loss = ["kd.kl_weight=0", "kd.cosine_weight=0", "kd.lm_weight=1", "kd.teacher=first"]
    language = Run.open(undistilled.config, alone_in_loss)
    assert language.distilling is language  # nobody distils


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("vocab_size", "predicts 130 tokens and"),
        ("tokens", "has other tokens than"),
        ("max_position_embeddings", "data.sequence_tokens is 16, but kd.teacher takes at most 8 tokens"),
        ("weights", "model.safetensors: missing"),
        ("folder", "kd.teacher: nowhere: no such folder"),
    ],
)
def test_a_teacher_that_cannot_distil_is_refused_before_weights_are_read(
    undistilled: Project, larger: Path, wrong: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = larger / ("tokenizer.json" if wrong == "tokens" else "config.json")
    (larger / "model.safetensors").unlink()
    content = json.loads(path.read_text())
    if wrong == "tokens":
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    elif wrong not in ("weights", "folder"):
        content[wrong] = {"vocab_size": 130, "max_position_embeddings": 8}[wrong]
    path.write_text(json.dumps(content))
    where = ["--set", f"kd.teacher={'nowhere' if wrong == 'folder' else larger}"]
    for command in ("validate", "kd"):
        assert main([command, str(undistilled.config), *where]) in (2, 5)
        errors = capsys.readouterr().err.strip().splitlines()
        assert [line for line in errors if said in line]
        assert command == "validate" or len(errors) == 1
