"""``puzzle evaluate``: the stage's options, and tasks answered by model folders that belong to no run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puzzle.cli_options import overrides
from puzzle.types import ConfigError

if TYPE_CHECKING:
    from puzzle.run import Run


def add_options(commands: Any) -> None:
    """To the stage's parser; ``commands`` is what ``add_subparsers`` returned."""
    evaluate = commands.choices["evaluate"]
    evaluate.add_argument("--tasks", metavar="A,B", help="of the lm-evaluation-harness, by name")
    evaluate.add_argument("--task-folder", metavar="FOLDER", help="YAML files of tasks of your own")
    evaluate.add_argument(
        "--vllm-bench",
        action="append",
        default=[],
        metavar="WORKLOAD.MODEL=FILE",
        help="what `vllm bench` wrote, of a workload of the constraint file and student or teacher",
    )
    evaluate.add_argument("--teacher", type=Path, metavar="FOLDER", help="of RUN a model folder: what to set beside it")


def check_options(options: argparse.Namespace) -> None:
    """ConfigError where something was asked of a run that only a model folder has."""
    if options.teacher:
        raise ConfigError(f"--teacher {options.teacher}: a run has its own teacher; it goes with a model folder")


def print_figures(run: Run, benches: Sequence[str]) -> None:
    """What is known of the run's student, and now of what `vllm bench` measured."""
    from puzzle.report.served import note_bench
    from puzzle.report.summary import Summary

    for bench in benches:
        note_bench(run, bench)
    print(Summary.of(run).table())


def is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and not (folder / "config.yaml").exists()


def evaluate_folder(options: argparse.Namespace) -> None:
    """Prints what the model in the folder, and its teacher, answer to the tasks."""
    if not options.tasks:
        raise ConfigError(f"{options.run} is a model, not a run: name what it is to answer, --tasks A,B")
    if options.vllm_bench:
        raise ConfigError(f"--vllm-bench is of a run, and {options.run} is a model; give the run's config")
    from ruamel.yaml.comments import CommentedMap

    from puzzle import yamlfiles
    from puzzle.checkpoint import tokenizer_fingerprint
    from puzzle.config import EvaluateConfig
    from puzzle.harness import Answerer, Harness
    from puzzle.report.tasks import table
    from puzzle.teacher import Compute, load_model, load_tokenizer

    given = [("teacher", options.teacher)] if options.teacher else []
    folders = [*given, ("student" if options.teacher else options.run.resolve().name, options.run)]
    if foreign := [one for one in options.set if not one.startswith("evaluate.")]:
        raise ConfigError(f"--set {foreign[0]}: of a model folder only evaluate.… can be set")
    asked = [one.removeprefix("evaluate.") for one in overrides(options) if one.startswith("evaluate.")]
    settings = yamlfiles.validated(EvaluateConfig, options.run, CommentedMap(), asked)
    harness, compute = Harness(settings), Compute.choose(options.device or "auto", "auto")
    for _, folder in folders:
        tokenizer_fingerprint(folder)  # says what it looked for
    subjects = [Answerer(name, load_model(folder, compute), load_tokenizer(folder)) for name, folder in folders]
    print(table([figure for task in settings.tasks for figure in harness.figures(task, subjects)]))
