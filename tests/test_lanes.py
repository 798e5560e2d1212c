"""Imports run one way: within each lane from top to bottom, and never from the pure lane into the torch lane."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import puzzle
from puzzle import checkpoint

PACKAGE = Path(puzzle.__file__).parent
HEAVY = {"torch", "transformers", "accelerate"}
# each module may import, at its top level, only modules that stand before it
PURE = """
    types formats style config.fields config.text config.library config.student config.files config.run config yamlfiles
    artifacts variants capabilities space memory_plan export.nemotron_nas
    export.gguf_tokenizer checkpoint data
    data.streamed data.source data.inputs data.encode data.packing schedule forecast ranks training_log
    tables scoring.draws scoring.sampling profiling
    profiling.memory profiling.table profiling.grid profiling.hardware profiling.kernels profiling.roofline
    profiling.imported profiling.correction profiling.regression profiling.vllm
    profiling.vllm_costs profiling.source search.problem search.metrics search.goal search.fan_out schema
    search.constraints search.meaning search.puzzletron search.programme search.linear search.infeasible search.mip
    search.surface search.chain search.pareto search.baselines search.evolution search.shrink search.explain
    search.compare search pruning scoring.design scoring.interactions search.surrogate search.moves search.refine
    search.study search.halving basis plans run steps
    report.table report.layers report.tournament report.tasks report.served report.summary report.library report.profile
    report.pruning report.additivity
    report.searched report.contents report.words report.markup report.svg report.strip report.front report.charts
    report.sections report.page
    report export.card progress
    data.tokenise pipeline notebook.html notebook.strip notebook.solution notebook.front notebook.sliders
    notebook.widget notebook validate widths rivals cli_options cli_search cli_explain cli_evaluate cli_export cli
""".split()  # noqa: SIM905
TORCH = """
    modeling.configuration_puzzle modeling.families_puzzle modeling.spans_puzzle modeling.layers_puzzle
    modeling.modeling_puzzle modeling data.batches teacher sharding metrics blocks blocks.layer blocks.nested
    blocks.fusion blocks.library blocks.loss blocks.moments blocks.channels blocks.keys blocks.heads blocks.candidates
    blocks.starts blocks.stream blocks.distill blocks.importance blocks.prune blocks.refit scoring scoring.context
    scoring.exact scoring.one_pass build kd.losses kd.stored kd.loop kd evaluate harness generate export export.folder
    export.shards export.source export.lowering export.hf export.decilm export.gguf export.verify
    export.publish export.hub profiling.stack profiling.probes profiling.measure speed stages.common stages.starts
    stages.distill stages.score stages.rescore stages.truth stages.refine stages.rivals stages.profile stages.prune
    stages.student stages.kd stages.tournament stages.generate stages vllm_plugin vllm_plugin.model
""".split()  # noqa: SIM905
ALONE = {
    "export.verify_child",
    "export.verify_torch",
    "export.verify_llama_cpp",
    "export.verify_mlx",
    "export.verify_vllm",
    "export.configuration_decilm",
    "profiling.vllm_child",
    "__main__",
    "",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Absolute names imported when the module is imported: not inside functions, not under TYPE_CHECKING."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module_name(path).rpartition(".")[0] if node.level else ""
            base = ".".join(part for part in ("puzzle" if node.level else "", package, node.module or "") if part)
            found.update(f"{base}.{alias.name}" for alias in node.names)
            found.add(base)
    return found


def own(names: set[str], known: set[str]) -> set[str]:
    """Those that are modules of puzzle, without the package's name."""
    stripped = {name.removeprefix("puzzle.") for name in names if name.startswith("puzzle.")}
    return stripped & known


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if "inputs" not in path.parts}


def test_every_module_has_its_place_in_a_lane() -> None:
    assert set(FILES) == {*PURE, *TORCH, *ALONE}


@pytest.mark.parametrize("module", PURE)
def test_the_pure_lane_imports_nothing_heavy_and_nothing_below(module: str) -> None:
    found = imports(FILES[module])
    assert not {name.split(".")[0] for name in found} & HEAVY
    assert own(found, set(FILES)) - {module} <= set(PURE[: PURE.index(module)])


@pytest.mark.parametrize("module", TORCH)
def test_the_torch_lane_imports_nothing_below(module: str) -> None:
    allowed = {*PURE, *TORCH[: TORCH.index(module)]}
    assert own(imports(FILES[module]), set(FILES)) - {module} <= allowed


def test_importing_the_package_and_the_search_loads_no_torch() -> None:
    code = (
        "import puzzle, puzzle.search, puzzle.report, puzzle.cli, puzzle.pipeline, sys; "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_modelling_code_stands_alone() -> None:
    """It is copied into exports: torch, transformers, the standard library, and each other."""
    for name in ("configuration_puzzle", "modeling_puzzle"):
        roots = {found.split(".")[0] for found in imports(FILES[f"modeling.{name}"])}
        assert roots <= {"torch", "transformers", "puzzle", *sys.stdlib_module_names}
        inside = {found for found in imports(FILES[f"modeling.{name}"]) if found.startswith("puzzle")}
        assert all(found.startswith("puzzle.modeling") for found in inside)


def test_both_lanes_know_the_same_families() -> None:
    from puzzle.modeling import FAMILIES

    assert set(checkpoint.FAMILIES) == set(FAMILIES)
