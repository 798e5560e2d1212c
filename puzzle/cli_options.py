"""What every command on a run takes, and the run that it means."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from puzzle.run import Run


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

    flags = {
        "device": options.device,
        "memory_budget_gib": options.memory_budget,
        "score.until_se": vars(options).get("until_se"),
        "refine.evaluations": vars(options).get("evaluations"),
        "refine.seed": vars(options).get("refine_seed"),
        "additivity.architectures": vars(options).get("architectures"),
    }
    overrides = [*options.set, *(f"{key}={value}" for key, value in flags.items() if value is not None)]
    return Run.open(options.run, overrides, options.constraints, options.on, options.pick)
