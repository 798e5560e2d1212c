"""What every command on a run takes, and the run that it means."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from puzzle.types import ConfigError

if TYPE_CHECKING:
    from puzzle.run import Run
    from puzzle.widths import Widths


def with_run(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("run", type=Path, metavar="RUN", help="a config file, a run's folder, or a recipe's name")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a value of the config")
    parser.add_argument("--constraints", metavar="FILE", help="another constraint file than the config's")
    parser.add_argument(
        "--pick", type=int, metavar="N", help="of a constraint file with lists of values, the N-th search"
    )
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    parser.add_argument("--device", choices=["cpu", "cuda", "mps"])
    parser.add_argument("--memory-budget", type=float, metavar="GIB", help="what a stage may take on the device")
    parser.add_argument(
        "--on", type=Path, metavar="FILE", help="score changes to this architecture.json, not to the teacher"
    )
    return parser


def open_run(options: argparse.Namespace) -> Run:
    from puzzle.run import Run

    return Run.open(options.run, overrides(options), options.constraints, options.on, options.pick)


def open_widths(options: argparse.Namespace) -> Widths | None:
    """The searches of a config that offers several hidden sizes; None where it does not."""
    from puzzle.widths import Widths

    found = Widths.open(options.run, overrides(options), options.constraints, options.pick)
    if found is not None and options.on is not None:
        raise ConfigError(f"--on: {options.run} offers several widths; give the folder of a search in widths/")
    return found


def open_runs(options: argparse.Namespace) -> Iterator[tuple[str, Run]]:
    """The run, under an empty name; or of a chain, name and run of one step after the other, as they can be known."""
    from puzzle.steps import Chain

    if (offered := open_widths(options)) is not None:
        yield from offered.runs()
        if offered.waiting:
            print(f"{', '.join(offered.waiting)}: known when the step before is done")
        return
    chain = Chain.open(options.run, overrides(options))
    if chain is None:
        yield "", open_run(options)
        return
    for name in ("constraints", "on", "pick"):
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name}: {options.run} is a chain of steps; write it into the step that it is for")
    opened = 0
    for name, run in chain.runs():
        yield name, run
        opened += 1
    if waiting := [name for name, _ in chain.steps[opened:]]:
        print(f"{', '.join(waiting)}: known when the step before is done")


def overrides(options: argparse.Namespace) -> list[str]:
    """``a.b=value`` for each flag that stands for a value of the config, after those of --set."""
    tasks = vars(options).get("tasks")
    flags = {
        "device": options.device,
        "memory_budget_gib": options.memory_budget,
        "score.until_se": vars(options).get("until_se"),
        "refine.evaluations": vars(options).get("evaluations"),
        "refine.seed": vars(options).get("refine_seed"),
        "export.targets": vars(options).get("target"),
        "evaluate.tasks": None if tasks is None else [name.strip() for name in tasks.split(",")],
        "evaluate.task_folder": vars(options).get("task_folder"),
        "export.gguf_type": vars(options).get("gguf_type"),
        "additivity.architectures": vars(options).get("architectures"),
    }
    return [*options.set, *(f"{key}={value}" for key, value in flags.items() if value is not None)]
