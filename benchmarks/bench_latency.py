"""Minitron's prunings and Puzzle at equal measured time of whole models, and what each keeps of the quality.

What counts is the time from prompt to last token at the workload of ``search/half-memory.yaml``, on this machine. The
goal is what the bundled teacher takes with ``--layers`` of its 8 layers; every other way gets the largest size whose
whole model, measured beside that one in the same rounds, takes no longer (within ``NOISE``), if any of its sizes does.
Then each is distilled on as many tokens, and its KL and CE gap are taken on sequences nothing was chosen on.

Times and students are found apart, because nothing else may run on the machine while times are taken:

    python benchmarks/bench_latency.py sizes       [--layers 5] [--seeds 0 1 2]
    python benchmarks/bench_latency.py students    distils them, in any company
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_minitron import all_tokens, before_and_after, described, halved, library, of_shape, shallower, table
from demo_runs import Results, problem_under, student_of

from puzzle import pipeline
from puzzle.blocks.prune import KEEP_BLOCK, student_config
from puzzle.build import blocks_of
from puzzle.modeling import PuzzleForCausalLM
from puzzle.profiling.stack import random_model
from puzzle.pruning import pruned_shape
from puzzle.run import Run
from puzzle.search import mip
from puzzle.search.constraints import workloads
from puzzle.speed import Subject, measured_speed
from puzzle.teacher import load_config

RESULTS = Path(__file__).parent / "results" / "latency.json"
LAYERS = 8
NOISE = 0.02
SHARES = [percent / 100 for percent in range(84, 44, -2)]  # of the teacher's predicted time, that a search may take
PRUNINGS: Mapping[str, Sequence[tuple[str, ...]]] = {  # the largest first
    "width: FFN": [(f"prune.intermediate_size={width}",) for width in range(480, 0, -32)],
    "width: FFN and hidden size": [
        (f"prune.hidden_size={hidden}", f"prune.intermediate_size={2 * hidden}") for hidden in range(240, 64, -16)
    ],
    "width: FFN and heads": [
        ("prune.num_attention_heads=4", f"prune.intermediate_size={width}") for width in range(512, 0, -32)
    ],
}


def depth(layers: int) -> tuple[str, ...]:
    return (f"prune.num_layers={layers}", "prune.layers_by=contiguous")


def untrained(run: Run) -> PuzzleForCausalLM:
    """A model of the pruning's sizes: as fast as the trained one."""
    shape = pruned_shape(run.config.prune, run.shape)  # type: ignore[arg-type]
    config = student_config(load_config(run.teacher), shape, range(shape.num_layers))
    return random_model(config, [KEEP_BLOCK] * shape.num_layers, "cpu", "fp32")


def relative_times(
    options: argparse.Namespace, candidates: Sequence[Callable[[], PuzzleForCausalLM]]
) -> tuple[float, list[float]]:
    """Of the teacher and of each candidate, over the time that is the goal, all in the same rounds."""
    goal, teacher = described(options, *depth(options.layers)), described(options, *depth(LAYERS))
    models = {"goal": untrained(goal), "teacher": untrained(teacher)}
    models |= {str(number): candidate() for number, candidate in enumerate(candidates)}
    (workload,) = workloads(goal.constraint_file, goal.shape)
    subjects = {name: Subject(model, ()) for name, model in models.items()}
    rates = measured_speed(goal, subjects, goal.batch_sizes)[workload.name]
    times = {name: 1 / rate.whole.output_tok_per_s for name, rate in rates.items()}
    return times["teacher"] / times["goal"], [times[str(number)] / times["goal"] for number in range(len(candidates))]


def largest(
    options: argparse.Namespace, sizes: Sequence[Any], model: Callable[[Any], PuzzleForCausalLM]
) -> dict[str, Any]:
    """The first of ``sizes`` that takes no longer than the goal (None where none does), and all times over it."""
    teacher, times = relative_times(options, [functools.partial(model, size) for size in sizes])
    if times[0] < 1 - NOISE:
        raise SystemExit(f"{sizes[0]}: the largest on offer takes {times[0]:.3f} of the goal; offer larger ones")
    chosen = next((list(size) for size, time in zip(sizes, times, strict=True) if time <= 1 + NOISE), None)
    return {"size": chosen, "teacher_time": teacher, "times": times}


def answers(run: Run) -> list[tuple[str, ...]]:
    """Architectures, the most accurate first: one for each share of the predicted time."""
    pipeline.run_stage(run, "profile")
    tables, found = (run.read_scores(), run.read_costs()), []
    for share in SHARES:
        solutions = mip.solve([problem_under(run, {"chat.e2e_ms": f"{share:.0%}"}, *tables)], {}).solutions
        found += [one.items for one in solutions[:1]]
    return list(dict.fromkeys(found))


def untrained_answer(run: Run, chosen: Sequence[str]) -> PuzzleForCausalLM:
    by_id = {item.id: item for item in run.items}
    blocks = blocks_of([by_id[one] for one in chosen], run.shape.num_layers)
    return random_model(load_config(run.teacher), blocks, "cpu", "fp32")


def searched(options: argparse.Namespace, seed: int) -> Mapping[str, Callable[[], Run]]:
    """Libraries to choose from; the tokens of a chain's first step are taken off those of its last."""
    return {
        "Puzzle": lambda: library(options, seed),
        "one layer less, then Puzzle": lambda: library(halved(options), seed, shallower(options, seed)),
    }


def sizes(options: argparse.Namespace, results: Results) -> None:
    for name, candidates in PRUNINGS.items():

        def of_pruning(candidates: Sequence[tuple[str, ...]] = candidates) -> dict[str, Any]:
            return largest(options, candidates, lambda settings: untrained(described(options, *settings)))

        results.once(f"{name}/size", of_pruning)
    for seed in options.seeds:
        for name, made in searched(options, seed).items():

            def of_search(made: Callable[[], Run] = made) -> dict[str, Any]:
                run = made()
                return largest(options, answers(run), functools.partial(untrained_answer, run))

            results.once(f"{name}/size/{seed}", of_search)


def students(options: argparse.Namespace, results: Results) -> None:
    for seed in options.seeds:
        shapes = {f"depth: {options.layers} layers": depth(options.layers)}
        shapes |= {name: size for name in PRUNINGS if (size := results.figures[f"{name}/size"]["size"])}
        for name, settings in shapes.items():
            results.once(f"{name}/{seed}", functools.partial(of_shape, options, seed, (*settings, all_tokens(options))))
        for name, made in searched(options, seed).items():
            chosen = results.figures[f"{name}/size/{seed}"]["size"]

            def of_search(made: Callable[[], Run] = made, chosen: Sequence[str] = chosen) -> dict[str, Any]:
                run = made()
                return before_and_after(options, run, student_of(run, chosen))

            results.once(f"{name}/{seed}", of_search)
    table(results, options.seeds)


def main() -> None:
    commands: dict[str, Callable[[argparse.Namespace, Results], None]] = {"sizes": sizes, "students": students}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=commands)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--bld-tokens", type=int, default=131072)
    parser.add_argument("--kd-tokens", type=int, default=262144)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bench-library")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    settings = {name: getattr(options, name) for name in ("layers", "bld_tokens", "kd_tokens")}
    commands[options.what](options, Results(options.output, settings))


if __name__ == "__main__":
    main()
