"""Constraints of NVIDIA's puzzletron, key by key, in our units; nothing of theirs goes without a word."""

from __future__ import annotations

from pathlib import Path

import pytest

from puzzle import yamlfiles
from puzzle.cli import main
from puzzle.config import ConstraintFile
from puzzle.search.constraints import bounds
from puzzle.search.fan_out import picks
from puzzle.search.puzzletron import HUMAN, MIP, Imported, convert
from puzzle.types import ConfigError

BASE = """\
defaults:
  - pruning: ffn_pruning
calc_subblock_stats:
  batch_sizes: [64, 96]
  prefill_seq_len: 4096
  generation_seq_len: 1024
mip:
  output_path: ${puzzle_dir}/mip
  gathered_metrics_path:
  objective: metrics.cosine_embedding_loss_hidden_states
  bigger_is_better: false
  subblock_stats_args:
    - batch_size: 96
      weights_dtype: torch.bfloat16
      activations_dtype: torch.bfloat16
      kv_cache_dtype: torch.float8_e4m3fn
  human_constraints:
    target_memory: 78_000
    num_params: 7_000_000_000
  mip_constraints:
  max_seconds_per_solution: 60
"""


def files(folder: Path, *texts: str) -> list[Path]:
    paths = [folder / f"part{number}.yaml" for number in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    return paths


def parsed(imported: Imported, folder: Path) -> ConstraintFile:
    path = folder / "ours.yaml"
    path.write_text(imported.text)
    return yamlfiles.load(ConstraintFile, path)


def constraints(folder: Path, mip: str) -> tuple[ConstraintFile, Imported]:
    imported = convert(files(folder, BASE, mip))
    return parsed(imported, folder), imported


def test_the_example_of_their_tutorial(tmp_path: Path) -> None:
    imported = convert(files(tmp_path, BASE))
    file = parsed(imported, tmp_path)
    (workload,) = file.workloads.values()
    assert (workload.isl, workload.osl, workload.batch_size) == (4096, 1024, 96)
    assert (workload.weights, workload.kv) == ("bf16", "fp8")
    assert [limit.written for limit in bounds(file)] == ["memory_gib ≤ 76.171875", "params ≤ 7000000000"]
    assert 78_000 * 2**20 == 76.171875 * 2**30
    assert file.objective == "hidden_distance"
    assert imported.left == (
        "calc_subblock_stats.batch_sizes: [64, 96] (how costs are measured: see profile in the run's config)",
        'mip.output_path: "${puzzle_dir}/mip" (says nothing about what a student must fit)',
        "mip.max_seconds_per_solution: 60 (says nothing about what a student must fit)",
        'other sections: ["defaults"] (says nothing about what a student must fit)',
    )
    for one in imported.left:
        assert f"#   {one}" in imported.text


@pytest.mark.parametrize(
    ("key", "value", "written"),
    [
        ("target_memory", "1024", "memory_gib ≤ 1"),
        ("target_throughput", "500", "output_tok_per_s ≥ 500"),
        ("target_latency_seconds", "2.5", "e2e_ms ≤ 2500"),
        ("target_time_to_first_token", "0.3", "ttft_ms ≤ 300"),
        ("num_params", "7_000_000_000", "params ≤ 7000000000"),
        ("stats.has_attention", "16", "layers_with_attention ≤ 16"),  # a maximum there, whatever was meant
    ],
)
def test_human_constraints(tmp_path: Path, key: str, value: str, written: str) -> None:
    text = BASE.replace("    target_memory: 78_000\n    num_params: 7_000_000_000\n", f"    {key}: {value}\n")
    file = parsed(convert(files(tmp_path, text)), tmp_path)
    assert [limit.written for limit in bounds(file)] == [written]


@pytest.mark.parametrize(
    ("key", "value", "written"),
    [
        ("stats.memory_mib", "2048", ["memory_gib ≤ 2"]),
        ("stats.kv_cache_memory_mib", "512", ["kv_cache_gib ≤ 0.5"]),
        ("stats.runtime_ms", "[100, 200]", ["e2e_ms ≥ 100", "e2e_ms ≤ 200"]),
        ("stats.prefill_runtime_ms", "30", ["ttft_ms ≤ 30"]),
        ("stats.num_params", "7.5B", ["params ≤ 7500000000"]),
        ("stats.active_params", "[2B, 3.5B]", ["active_params ≥ 2000000000", "active_params ≤ 3500000000"]),
        ("stats.has_attention", "[8, 16]", ["layers_with_attention ≥ 8", "layers_with_attention ≤ 16"]),
        ("stats.has_ffn", "[8, null]", ["layers_with_ffn ≥ 8"]),
        ("stats.num_kv_heads", "64", ["kv_heads_total ≤ 64"]),
    ],
)
def test_mip_constraints_go_before_human_ones(tmp_path: Path, key: str, value: str, written: list[str]) -> None:
    file, imported = constraints(tmp_path, f"mip:\n  mip_constraints: {{{key}: {value}}}\n")
    assert [limit.written for limit in bounds(file)] == written
    assert any(one.startswith('mip.human_constraints: {"target_memory": 78000') for one in imported.left)
    nested, _ = constraints(tmp_path, f"mip:\n  mip_constraints: {{stats: {{{key.split('.')[1]}: {value}}}}}\n")
    assert nested.constraints == file.constraints


def test_the_keys_are_those_that_their_source_allows() -> None:
    """PuzzleConstraints._ALLOWED_HUMAN_CONSTRAINTS of nvidia-modelopt 0.47, and what its MIP statistics are called."""
    allowed = {
        "target_memory",
        "target_throughput",
        "target_latency_seconds",
        "target_time_to_first_token",
        "num_params",
        "stats.has_attention",
    }
    assert set(HUMAN) == allowed
    assert all(key.startswith("stats.") for key in MIP)


def test_unknown_keys_are_named(tmp_path: Path) -> None:
    file, imported = constraints(tmp_path, "mip:\n  mip_constraints: {stats.has_moe: 3, stats.memory_mib: 1024}\n")
    assert set(file.constraints) == {"memory_gib"}
    assert "mip.mip_constraints.stats.has_moe: 3 (no metric of ours)" in imported.left
    _, imported = constraints(
        tmp_path,
        "mip:\n  objective: metrics.mine\n  surprise: {a: 1}\n  subblock_stats_args:\n"
        "    - {batch_size: 1, weights_dtype: torch.int3, kv_cache_dtype: torch.bfloat16, n_embd: 5}\n"
        "    - {batch_size: 2}\n",
    )
    for one in (
        'mip.objective: "metrics.mine" (no score of ours; kl_nats taken)',
        'mip.surprise: {"a": 1} (says nothing about what a student must fit)',
        'mip.subblock_stats_args.weights_dtype: "torch.int3" (no dtype of ours; bf16 taken)',
        "mip.subblock_stats_args.n_embd: 5 (no counterpart)",
        'mip.subblock_stats_args[1]: {"batch_size": 2} (a search of its own: import it alone)',
    ):
        assert one in imported.left


def test_several_searches_are_a_list_of_values(tmp_path: Path) -> None:
    listed = (
        "mip:\n  human_constraints:\n"
        "    - {target_memory: 1024, num_params: 5}\n    - {target_memory: 2048, num_params: 5}\n"
    )
    file, imported = constraints(tmp_path, listed)
    assert [str(one) for one in picks(file)] == ["memory_gib 1", "memory_gib 2"]
    assert not any("human_constraints" in one for one in imported.left)
    file, imported = constraints(tmp_path, listed.replace("5}", "6}", 1))
    assert [limit.written for limit in bounds(file)] == ["memory_gib ≤ 1", "params ≤ 6"]
    assert any(one.startswith("mip.human_constraints[1]: ") for one in imported.left)
    # a maximum of layers is not what a bare number means here, so no list can say it
    file, imported = constraints(
        tmp_path, "mip:\n  mip_constraints: [{stats.has_attention: 4}, {stats.has_attention: 5}]\n"
    )
    assert [limit.written for limit in bounds(file)] == ["layers_with_attention ≤ 4"]
    assert any(one.startswith("mip.mip_constraints[1]: ") for one in imported.left)


def test_a_sweep_is_a_list_of_percentages(tmp_path: Path) -> None:
    sweep = "mip:\n  sweep: {enabled: true, memory_compression_rates: [0.5, 0.75, 1.0], output_csv: x.csv}\n"
    file, imported = constraints(tmp_path, sweep)
    assert [str(one) for one in picks(file)] == ["memory_gib 50%", "memory_gib 75%", "memory_gib 100%"]
    assert 'mip.sweep.output_csv: "x.csv" (puzzle search prints a table)' in imported.left
    file, imported = constraints(tmp_path, sweep.replace("true", "false"))
    assert len(picks(file)) == 1
    assert any(one.startswith("mip.sweep: ") for one in imported.left)


def test_a_profile_has_the_same_keys_without_a_section(tmp_path: Path) -> None:
    profile = (
        "human_constraints: {target_memory: 1024}\n"
        "subblock_stats_args: [{batch_size: 8, prefill_seq_len: 64, generation_seq_len: 32}]\n"
    )
    file = parsed(convert(files(tmp_path, profile)), tmp_path)
    assert [limit.written for limit in bounds(file)] == ["memory_gib ≤ 1"]
    assert next(iter(file.workloads.values())).isl == 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\n", "no mip.human_constraints and no mip.mip_constraints"),
        ("mip: {runs: {}}\n", "mip.runs is of a later version, and not read"),
        ("mip: {human_constraints: {target_memory: 5}}\n", "prefill_seq_len is not said; .* or --isl ISL"),
        (BASE.replace("78_000", "lots"), "mip.human_constraints.target_memory: expected a number, found 'lots'"),
        (BASE.replace("78_000", "${memory}"), "found '\\${memory}'; write the number that it stands for"),
        (BASE.replace("78_000", ".inf"), "expected a number, found inf"),
        (BASE.replace("78_000", "-5"), "memory_gib is never below 0"),
        (BASE.replace("batch_size: 96", "batch_size: 0"), "workloads.serving.batch_size"),
        (BASE.replace("- batch_size: 96\n", "- n: 96\n"), "says no batch_size"),
        (
            BASE.replace("    target_memory: 78_000\n    num_params: 7_000_000_000\n", "    - 5\n"),
            "is not made of `key: value`",
        ),
    ],
)
def test_mistakes(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        convert(files(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (theirs,) = files(tmp_path, BASE.replace("  prefill_seq_len: 4096\n", ""))
    ours = tmp_path / "ours.yaml"
    asked = ["constraints", "import", str(theirs), "-o", str(ours)]
    assert main(asked) == 2
    assert "prefill_seq_len is not said" in capsys.readouterr().err
    assert not ours.exists()
    assert main([*asked, "--isl", "512", "--device", "h100"]) == 0
    out = capsys.readouterr().out
    assert "not taken over: mip.max_seconds_per_solution: 60" in out
    assert f"wrote {ours}" in out
    workload = yamlfiles.load(ConstraintFile, ours).workloads["serving"]
    assert (workload.isl, workload.osl, workload.device) == (512, 1024, "h100")
    assert main([*asked, "--isl", "512"]) == 2
    assert "exists" in capsys.readouterr().err
