"""NVIDIA's own solver call (puzzletron's MIP in ``nvidia-modelopt``, through PuLP and CBC): what ours is compared with.

Run by the PYTHON of an environment of its own, which holds ``pulp``, and ``nvidia-modelopt`` without its dependencies:

    PYTHON benchmarks/incumbent_search.py INSTANCE.json [--gap 1e-3]

Reads ``{"items": {ID: {"sites": [..], "loss": .., "costs": {NAME: ..}}}, "limits": {NAME: [least, most]}}``, calls
their ``run_mip`` as it is (a site is their parent layer) and prints one line of JSON: seconds of the call, of
which CBC, objective, item ids and versions. Their call leaves CBC's gap at its default of zero; ``--gap`` sets one.
Their package imports torch, which this does not need: the two files that matter are loaded alone.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import os
import resource
import sys
import time
import types
from importlib import metadata
from pathlib import Path
from typing import Any

import pulp


def their_module() -> Any:
    """``mip_with_multi_layer_replacements`` with its neighbour ``utils``, but without the packages above them."""
    folder = Path(str(metadata.distribution("nvidia-modelopt").locate_file("modelopt/torch/puzzletron/mip")))
    package = types.ModuleType("their_mip")
    package.__path__ = [str(folder)]
    sys.modules["their_mip"] = package
    return importlib.import_module("their_mip.mip_with_multi_layer_replacements")


def cpu_seconds() -> float:
    """Of this process and its children: CBC is a program of its own."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("instance", type=Path)
    parser.add_argument("--gap", type=float)
    options = parser.parse_args()
    given = json.loads(options.instance.read_text())
    replacements = {
        item_id: {
            "parent_layer_indices": item["sites"],
            "metrics": {"loss": item["loss"]},
            "stats": item["costs"],
            "replacement_id": item_id,
        }
        for item_id, item in given["items"].items()
    }
    limits = {f"stats.{name}": tuple(limit) for name, limit in given["limits"].items()}
    theirs, solving = their_module(), []
    real = pulp.LpProblem.solve

    def timed(problem: Any, solver: Any) -> Any:
        begin = time.perf_counter()
        status = real(problem, solver)
        solving.append(time.perf_counter() - begin)
        return status

    pulp.LpProblem.solve = timed
    if options.gap is not None:
        pulp.PULP_CBC_CMD = functools.partial(pulp.PULP_CBC_CMD, gapRel=options.gap)
    begin, cpu = time.perf_counter(), cpu_seconds()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        found = theirs.run_mip(replacements, "metrics.loss", limits, bigger_is_better=False)
    seconds, cpu = time.perf_counter() - begin, cpu_seconds() - cpu
    answer = {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "solver_seconds": solving[0],
        "objective": found[0]["total_value"] if found else None,
        "items": [one["replacement_id"] for one in found[0]["chosen_replacements"]] if found else [],
        "versions": {name: metadata.version(name) for name in ("nvidia-modelopt", "pulp")},
    }
    print("ANSWER " + json.dumps(answer))


if __name__ == "__main__":
    main()
