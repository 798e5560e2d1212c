"""Minitron's claims and Puzzle beside it, on the bundled teacher: equal parameters, equal tokens, several seeds.

    python benchmarks/bench_minitron.py shapes     width, depth, Puzzle, and depth before Puzzle at equal parameters
                                                   (REFERENCE.md, claim 11), and one of the shapes from scratch
    python benchmarks/bench_minitron.py memory     the same at equal memory (weights, KV cache, workspace)
    python benchmarks/bench_minitron.py losses     what to distil on: KL, LM loss, hidden states (claims 10 and 13)
    python benchmarks/bench_minitron.py tokens     the gap that distillation closes, by tokens (claim 9)
    python benchmarks/bench_minitron.py depth      1, 2 and half of the layers dropped: at every position, and scattered

Quality is on ``report``, where nothing was chosen, before and after distillation; a seed is one of the order of the
text, and of the library. Among the shapes all see ``--bld-tokens`` and ``--kd-tokens`` together: what Puzzle trains its
library on, the others are distilled on. A work folder keeps what was stopped.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from demo_runs import (
    CONFIG,
    REPORT_SEQUENCES,
    Results,
    distilled,
    make_library,
    problem_of,
    problem_under,
    quality,
    student_of,
)

from puzzle import artifacts, pipeline
from puzzle.modeling import PuzzleForCausalLM
from puzzle.pruning import predicted, pruned_shape
from puzzle.run import Run
from puzzle.search import mip
from puzzle.search.baselines import best_uniform
from puzzle.search.problem import Problem
from puzzle.stages.common import compute_of
from puzzle.teacher import load_model

RESULTS = Path(__file__).parent / "results"
DROPPED = 3  # of 8 layers: what the other shapes have as many parameters as
DEPTH = (f"prune.num_layers={8 - DROPPED}", "prune.layers_by=contiguous")
SHAPES: Mapping[str, tuple[str, ...]] = {
    "width: FFN": ("prune.intermediate_size=192",),
    "width: FFN and heads": ("prune.intermediate_size=363", "prune.num_attention_heads=4"),
    "width: FFN and hidden size": ("prune.intermediate_size=400", "prune.hidden_size=192"),
    "depth: Block Importance": (f"prune.num_layers={8 - DROPPED}",),
    "depth: loss, scattered": (f"prune.num_layers={8 - DROPPED}", "prune.layers_by=loss"),
    "depth: loss, contiguous": DEPTH,
}
MEMORY = "memory_gib"
CANDIDATES: Mapping[str, Sequence[tuple[str, ...]]] = {  # the largest first; no other numbers of heads divide 256
    "width: FFN": [(f"prune.intermediate_size={width}",) for width in range(512, 0, -8)],
    "width: heads": [(f"prune.num_attention_heads={heads}",) for heads in (8, 4, 2, 1)],
    "width: FFN and hidden size": [
        (f"prune.hidden_size={hidden}", f"prune.intermediate_size={2 * hidden}") for hidden in range(256, 0, -8)
    ],
    "width: FFN, 5 heads and hidden size": [
        ("prune.hidden_size=240", "prune.num_attention_heads=5", f"prune.intermediate_size={width}")
        for width in range(512, 0, -8)
    ],
    "depth: loss, contiguous": [DEPTH],
}
SHAPE_OF_LOSSES = "width: FFN and hidden size"
LOSSES: Mapping[str, Mapping[str, float]] = {
    "KL": {"kl_weight": 1, "cosine_weight": 0, "lm_weight": 0},
    "KL and cosine": {"kl_weight": 1, "cosine_weight": 1, "lm_weight": 0},
    "KL and LM": {"kl_weight": 1, "cosine_weight": 0, "lm_weight": 1},
    "cosine": {"kl_weight": 0, "cosine_weight": 1, "lm_weight": 0},
    "LM": {"kl_weight": 0, "cosine_weight": 0, "lm_weight": 1},
}
TOKENS = (65_536, 131_072, 262_144, 524_288)


def described(options: argparse.Namespace, *settings: str, teacher: Path | None = None) -> Run:
    """A run of the bundled teacher, or another; one folder holds all of a seed's."""
    given = [f"kd.tokens={options.kd_tokens}", *settings, *([f"teacher={teacher}"] if teacher else [])]
    shared = [one for one in given if not one.startswith(("prune.", "kd."))]
    folder = options.work / artifacts.fingerprint(sorted(shared))
    config = options.work / f"{folder.name}.yaml"
    options.work.mkdir(parents=True, exist_ok=True)
    config.write_text(CONFIG.format(folder=folder))
    return Run.open(config, given)


def opened(options: argparse.Namespace, *settings: str, teacher: Path | None = None) -> Run:
    """With its text."""
    run = described(options, *settings, teacher=teacher)
    pipeline.run_stage(run, "data")
    return run


def pruned(options: argparse.Namespace, *settings: str, teacher: Path | None = None) -> Run:
    """A run up to the pruned student."""
    run = opened(options, *settings, teacher=teacher)
    for stage in ("importance", "prune"):
        pipeline.run_stage(run, stage)
    return run


def finished(run: Run) -> Path:
    """The pruned student's checkpoint, once it is distilled."""
    for stage in ("kd", "evaluate", "export"):
        pipeline.run_stage(run, stage)
    return run.checkpoint


def initial(run: Run) -> PuzzleForCausalLM:
    return load_model(run.student / "initial", compute_of(run))


def before_and_after(options: argparse.Namespace, run: Run, student: PuzzleForCausalLM) -> dict[str, Any]:
    """Against the bundled teacher, whatever the run's is."""
    judge = opened(options, f"seed={run.config.seed}", "prune.num_layers=8")
    return {
        "params": sum(parameter.numel() for parameter in student.parameters()),
        "before": quality(judge, student, "report", REPORT_SEQUENCES),
        "after": quality(judge, distilled(run, student), "report", REPORT_SEQUENCES),
    }


def shapes(options: argparse.Namespace, results: Results) -> None:
    for seed in options.seeds:
        for name, settings in SHAPES.items():
            results.once(f"{name}/{seed}", functools.partial(of_shape, options, seed, (*settings, all_tokens(options))))
        results.once(f"from scratch: FFN and hidden size/{seed}", functools.partial(_scratch, options, seed))
        _puzzles(options, results, seed, lambda run: problem_of(run, (8 - DROPPED) / run.shape.num_layers))
    table(results, options.seeds)  # a layer of either teacher of Puzzle has as many parameters


def memory(options: argparse.Namespace, results: Results) -> None:
    """Of each way the largest size that needs no more than ``DEPTH``, at ``search/half-memory.yaml``'s workload."""
    goal = needed(options, DEPTH)
    sizes = {}
    for name, candidates in CANDIDATES.items():
        sizes[name] = next((one for one in candidates if needed(options, one) <= goal), None)
        results.once(f"{name}/size", lambda name=name: {"size": sizes[name], "of": goal})
    for seed in options.seeds:
        for name, size in sizes.items():
            if size:
                settings = (*size, all_tokens(options))
                results.once(f"{name}/{seed}", functools.partial(of_shape, options, seed, settings))
        _puzzles(options, results, seed, lambda run: problem_under(run, {MEMORY: goal}))
    table(results, options.seeds)


def needed(options: argparse.Namespace, settings: Sequence[str]) -> float:
    """GiB of a pruning's student, computed from its sizes."""
    run = described(options, *settings)
    totals = predicted(pruned_shape(run.config.prune, run.shape), run.constraint_file)  # type: ignore[arg-type]
    return totals[f"chat.{MEMORY}"]


def _puzzles(options: argparse.Namespace, results: Results, seed: int, problem: Callable[[Run], Problem]) -> None:
    """Students of ``problem``: the MIP's, the same variants in all layers, and the MIP's of a shallower teacher."""

    def student(found: Callable[[Problem], Sequence[str]]) -> dict[str, Any]:
        run = library(options, seed)
        return _of_items(options, run, found(problem(run)))

    def chained() -> dict[str, Any]:
        run = library(halved(options), seed, shallower(options, seed))
        return _of_items(halved(options), run, _best(problem(run)))

    results.once(f"Puzzle/{seed}", lambda: student(_best))
    results.once(f"Puzzle's variants, the same in all layers/{seed}", lambda: student(best_uniform))
    results.once(f"one layer less, then Puzzle/{seed}", chained)


def of_loss(name: str) -> tuple[str, ...]:
    return tuple(f"kd.{key}={weight}" for key, weight in LOSSES[name].items())


def all_tokens(options: argparse.Namespace) -> str:
    return f"kd.tokens={options.kd_tokens + options.bld_tokens}"


def of_shape(options: argparse.Namespace, seed: int, settings: Sequence[str]) -> dict[str, Any]:
    run = pruned(options, f"seed={seed}", *settings)
    return before_and_after(options, run, initial(run))


def _scratch(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The same shape with random weights, on the language model's loss, at as many tokens."""
    run = pruned(options, f"seed={seed}", *SHAPES[SHAPE_OF_LOSSES], *of_loss("LM"), all_tokens(options))
    student = initial(run)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
            else:
                parameter.fill_(1.0)
    return before_and_after(options, run, student)


def library(options: argparse.Namespace, seed: int, teacher: Path | None = None) -> Run:
    """Trained and scored; the bundled teacher distils its students, whatever it is made from."""
    settings = [f"seed={seed}", f"distill.tokens={options.bld_tokens}", f"kd.tokens={options.kd_tokens}"]
    return make_library(options.work, *settings, *([f"teacher={teacher}", "kd.teacher=demo"] if teacher else []))


def _best(problem: Problem) -> Sequence[str]:
    return mip.solve([problem], {}).solutions[0].items


def _of_items(options: argparse.Namespace, run: Run, chosen: Sequence[str]) -> dict[str, Any]:
    return {**before_and_after(options, run, student_of(run, chosen)), "items": list(chosen)}


def halved(options: argparse.Namespace) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(options), "kd_tokens": options.kd_tokens // 2})


def shallower(options: argparse.Namespace, seed: int) -> Path:
    """A teacher of one layer less, distilled on half of the tokens; the other half is for its Puzzle student."""
    return finished(pruned(halved(options), f"seed={seed}", "prune.num_layers=7", "prune.layers_by=loss"))


def losses(options: argparse.Namespace, results: Results) -> None:
    for seed in options.seeds:
        for name in LOSSES:
            given = (*SHAPES[SHAPE_OF_LOSSES], *of_loss(name))
            results.once(f"{name}/{seed}", functools.partial(of_shape, options, seed, given))
    table(results, options.seeds)


def tokens(options: argparse.Namespace, results: Results) -> None:
    for count in TOKENS:
        for seed in options.seeds:
            given = (*SHAPES[SHAPE_OF_LOSSES], f"kd.tokens={count}")
            results.once(f"{count}/{seed}", functools.partial(of_shape, options, seed, given))
    table(results, options.seeds)


def depth(options: argparse.Namespace, results: Results) -> None:
    """Before any distillation: the bundled teacher alone, no seeds."""
    for count in (1, 2, 4):
        runs = {f"from {first}": tuple(range(first, first + count)) for first in range(8 - count + 1)}
        ways = {
            **{where: f"prune.layers_by=[{', '.join(map(str, layers))}]" for where, layers in runs.items()},
            "scattered by loss": "prune.layers_by=loss",
            "scattered by Block Importance": "prune.layers_by=block-importance",
        }
        for where, how in ways.items():

            def found(how: str = how, count: int = count) -> dict[str, Any]:
                run = pruned(options, f"prune.num_layers={8 - count}", how)
                return {"before": quality(run, initial(run), "report", REPORT_SEQUENCES), "layers": run.kept_layers}

            results.once(f"{count} dropped/{where}", found)
    for name, figure in results.figures.items():
        print(f"{name:<44} KL {figure['before']['kl']:.4f} CE gap {figure['before']['ce_gap']:.4f} {figure['layers']}")


def table(results: Results, seeds: Sequence[int]) -> None:
    for name in dict.fromkeys(name.rpartition("/")[0] for name in results.figures):
        rows = [row for seed in seeds if "after" in (row := results.figures.get(f"{name}/{seed}", {}))]
        if not rows:
            continue
        cells = [
            f"{key} {when} {_mean([row[when][key] for row in rows])}"
            for key in ("kl", "ce_gap")
            for when in ("before", "after")
        ]
        print(f"{name:<36} {rows[0]['params']:>9,}  {'  '.join(cells)}")


def _mean(values: Sequence[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.4f} ± {spread:.4f}"


def main() -> None:
    commands: dict[str, Callable[[argparse.Namespace, Results], None]] = {
        "shapes": shapes,
        "memory": memory,
        "losses": losses,
        "tokens": tokens,
        "depth": depth,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=commands)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--bld-tokens", type=int, default=131072)
    parser.add_argument("--kd-tokens", type=int, default=262144)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bench-library")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    settings = {"bld_tokens": options.bld_tokens, "kd_tokens": options.kd_tokens}
    results = Results(options.output or RESULTS / f"minitron_{options.what}.json", settings)
    commands[options.what](options, results)


if __name__ == "__main__":
    main()
