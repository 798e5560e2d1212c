"""Where a run's times come from, as a user drives it: measured with gaps, corrected, estimated, imported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from puzzle.artifacts import read_unit
from puzzle.cli import main
from puzzle.profiling import measure
from puzzle.profiling.grid import GridPoint
from puzzle.profiling.probes import Probe
from puzzle.profiling.stack import SiteStack
from puzzle.run import Run
from tests.pipeline.conftest import Project
from tests.profiling.test_vllm import environment_with

LIMIT = """\
workloads:
  chat: {isl: 8, osl: 8, weights: WEIGHTS, kv: WEIGHTS, device: DEVICE, runtime: vllm}
constraints:
  chat.e2e_ms: "90%"
"""


def limit(project: Project, device: str, weights: str = "bf16") -> str:
    path = project.folder / f"{device}.yaml"
    path.write_text(LIMIT.replace("DEVICE", device).replace("WEIGHTS", weights))
    return str(path)


def test_a_profile_prints_and_draws_where_the_time_goes(copy: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--debug", "profile", str(copy.config)]) == 0
    printed = capsys.readouterr().out
    assert all(part in printed for part in ("attention", "ffn", "norm", "head", "other", "total", "prefill", "decode"))
    assert (copy.run / "costs" / "profile.png").read_bytes().startswith(b"\x89PNG")
    (unit, *_) = sorted((copy.run / "costs").glob("*.json"))
    environment = read_unit(unit).payload["environment"]
    assert environment["device"] == "cpu" and environment["torch"] == torch.__version__ and environment["date"]


def test_whole_models_correct_predicted_times(copy: Project, capsys: pytest.CaptureFixture[str]) -> None:
    before = Run.open(copy.config).solution_id
    fit = ["fit-costs", str(copy.config), "--set", "profile.fit_models=3"]
    assert main(["--debug", *fit]) == 0
    assert "each model predicted from the others" in capsys.readouterr().out
    run = Run.open(copy.config, ["profile.fit_models=3"])
    costs = run.read_costs()
    assert {correction.phase for correction in costs.corrections} == {"prefill", "decode"}
    assert run.solution_id != before  # what was searched with uncorrected times is not taken for what is now asked
    units = sorted((copy.run / "whole-models").glob("*.json"))
    assert [unit.stem for unit in units] == ["random-00", "random-01", "random-02", "teacher"]
    bytes_before = [unit.read_bytes() for unit in units]
    units[1].unlink()
    assert not Run.open(copy.config, ["profile.fit_models=3"]).read_costs().corrections  # one short: none is used
    assert main(["--debug", *fit]) == 0
    assert [unit.read_bytes() for unit in units if unit != units[1]] == [bytes_before[k] for k in (0, 2, 3)]


def test_a_point_that_does_not_fit_is_a_gap_and_the_rest_goes_on(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = measure.site_probe

    def crowded(stack: SiteStack, point: GridPoint) -> Probe:
        if point.id == "decode.b1.t16":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(stack, point)

    monkeypatch.setattr(measure, "site_probe", crowded)
    assert main(["--debug", "profile", str(project.config)]) == 0
    printed = capsys.readouterr().out
    assert "not measured: decode, batch size 1, 16 tokens: decode.b1.t16 does not fit in the memory of cpu" in printed
    costs = Run.open(project.config).read_costs()
    assert len(costs.gaps) == 1
    assert {(cost.phase, cost.context_tokens) for cost in costs.rows} == {("prefill", 8), ("decode", 8)}


def test_costs_of_another_device_or_dtype_are_not_added_to(copy: Project, capsys: pytest.CaptureFixture[str]) -> None:
    unit = copy.run / "costs" / "decode.b1.t8.json"
    text = unit.read_text().replace('"device": "cpu"', '"device": "h100"').replace('"fp32"', '"bf16"')
    unit.write_text(text)
    (copy.run / "costs" / "decode.b1.t16.json").unlink()
    assert main(["profile", str(copy.config)]) == 2
    said = "costs were measured on h100 in bf16 (transformers), this is cpu in fp32 (transformers)"
    assert said in capsys.readouterr().err
    assert main(["profile", str(copy.config), "--redo"]) == 0


def test_estimates_need_no_profile_and_say_so(copy: Project, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(copy.run / "costs")
    arguments = [str(copy.config), "--constraints", limit(copy, "h100"), "--set", "profile.backend=roofline"]
    assert main(["--debug", "validate", *arguments]) == 0
    assert main(["--debug", "profile", *arguments]) == 0
    assert main(["--debug", "search", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "milliseconds of the teacher in one forward (estimated)" in printed and "h100" in printed
    (line,) = [line for line in printed.splitlines() if "chat.e2e_ms" in line]
    assert line.endswith("(estimate)")
    assert not any("memory" in line and "(estimate)" in line for line in printed.splitlines())
    assert main(["--debug", "pareto", *arguments, "--cost", "chat.e2e_ms"]) == 0
    assert main(["fit-costs", *arguments]) == 2
    assert main(["search", *arguments[:-1], "profile.backend=measured"]) == 4
    assert "profile" in capsys.readouterr().err


def test_a_table_made_elsewhere_is_imported_and_refused_for_another_device(
    copy: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "costs.csv"
    assert main(["--debug", "show", "costs", str(copy.config), "--output", str(table)]) == 0
    assert "# device: cpu" in table.read_text()
    text = table.read_text().replace(",cpu,", ",h200,").replace("transformers", "vllm")
    table.write_text(text)
    shutil.rmtree(copy.run / "costs")
    imported = ["--set", "profile.backend=imported", "--set", f"profile.table={table}"]
    assert main(["--debug", "search", str(copy.config), "--constraints", limit(copy, "h200", "fp32"), *imported]) == 0
    assert "(estimate)" not in capsys.readouterr().out  # it was measured, elsewhere
    on_h100 = [str(copy.config), "--constraints", limit(copy, "h100", "fp32"), *imported]
    assert main(["search", *on_h100]) == 4
    assert "nothing was measured on device h100" in capsys.readouterr().err
    assert main(["--debug", "search", *on_h100, "--set", "profile.stand_in={h100: h200}"]) == 0
    assert "(estimate)" in capsys.readouterr().out
    table.write_text("\n".join(line for line in text.splitlines() if "ffn.linear" not in line))
    assert main(["search", *on_h100, "--set", "profile.stand_in={h100: h200}"]) == 4
    assert "ffn.linear at prefill was never measured" in capsys.readouterr().err


def test_details_are_no_costs(finished: Project) -> None:
    units = [json.loads(path.read_text()) for path in (finished.run / "costs").glob("*.json")]
    assert all({entry["shape_id"] for entry in unit["payload"]["details"]} == {"norm", "head"} for unit in units)
    assert not {cost.shape_id for cost in Run.open(finished.config).read_costs().rows} & {"norm", "head"}


def test_costs_are_measured_in_vllm_one_start_a_model_and_taken_up_again(
    copy: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = environment_with(tmp_path / "engine", installed=True)
    shutil.rmtree(copy.run / "costs")
    space = copy.folder / "space.yaml"
    vllm = ["--set", "profile.backend=vllm", "--set", f"profile.vllm={{python: {python}}}"]
    arguments = [str(copy.config), "--constraints", limit(copy, "h100"), *vllm]
    assert main(["--debug", "profile", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "milliseconds of the teacher in one forward (vllm)" in printed
    assert "not measured: ffn.linear at prefill, batch size 1, 8 tokens: vLLM cannot load it" in printed
    units = sorted((copy.run / "costs").glob("vllm-*.json"))
    assert len(units) == 2 + 2 + 1 + 3  # shapes of attention and of FFN, the rest, and for error bars
    first = [unit.read_bytes() for unit in units]
    units[2].unlink()
    assert main(["search", *arguments]) == 4
    assert main(["--debug", "profile", *arguments]) == 0
    assert [unit.read_bytes() for unit in units] == first  # time is simulated
    assert main(["search", *arguments]) == 4  # a limit on time, and variants without one
    assert "attention.linear at prefill" in capsys.readouterr().err
    space.write_text(space.read_text().replace("linear, ", ""))
    assert main(["--debug", "profile", *arguments, "--redo"]) == 0
    assert main(["--debug", "score", *arguments, "--redo"]) == 0
    assert main(["--debug", "search", *arguments]) == 0
    assert "(estimate)" not in capsys.readouterr().out
    assert main(["profile", *arguments[:-1], "profile.vllm={python: /nowhere/python}", "--redo"]) == 2
    assert "/nowhere/python: cannot be run" in capsys.readouterr().err
