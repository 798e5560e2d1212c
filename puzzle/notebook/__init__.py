"""A run as a notebook sees it: tidy tables, searches that answer in about a second, fronts. Pure; no torch.

    run = puzzle.open_run("runs/demo")
    run.search({"workloads": {...}, "constraints": {"memory_gib": "60%"}})
    run.pareto("chat.memory_gib").explore()

Reads the run's folder; writes nothing there. Errors are those of the command line, in the same words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puzzle import pipeline, tables, yamlfiles
from puzzle.config import OBJECTIVES, ConstraintFile
from puzzle.notebook.front import ParetoFront
from puzzle.notebook.solution import SolutionView, Tables
from puzzle.run import Run
from puzzle.types import ConfigError
from puzzle.variants import variant_name

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped,unused-ignore]

__all__ = ["OpenRun", "ParetoFront", "SolutionView", "open_run"]

GIVEN = Path("constraints")  # what a file that has no name is called in messages
ITEM, HOW = ("item", "layer", "part", "variant"), ("num_sequences", "context_tokens", "method")  # columns of scores
Constraints = Path | str | Mapping[str, Any]


def open_run(path: Path | str, constraints: Constraints | None = None, pick: int | None = None) -> OpenRun:
    """The run in a folder, or of a config file.

    ``constraints``: other ones than the config's, as a file, the name of a shipped one, YAML, or a mapping with the
    file's keys. ``pick``: where they hold lists of values, which of the searches, from 1.
    """
    run = Run.open(Path(path))
    run.check_searches()
    return OpenRun(run if constraints is None and pick is None else _under(run, constraints, pick))


@dataclass(frozen=True, eq=False)
class OpenRun:
    """Made by :func:`open_run`. Tables are read once, when they are first asked for."""

    run: Run = field(repr=False)

    def __repr__(self) -> str:
        return f"OpenRun({str(self.run.folder)!r}, teacher {self.run.teacher_name}, {len(self.run.items)} items)"

    @property
    def stages(self) -> pd.DataFrame:
        """One row a stage: how many of its units are ``done``, ``stale`` (made from other inputs) and ``missing``."""
        import pandas as pd

        rows = []
        for stage in pipeline.stages_of(self.run):
            states = pipeline.unit_states(self.run, stage)
            rows.append((stage.name, *(states.count(state) for state in ("done", "stale", "missing"))))
        return pd.DataFrame(rows, columns=["stage", "done", "stale", "missing"])

    @property
    def scores(self) -> pd.DataFrame:
        """One row an item: its scores as sums take them (``kl_nats``: nats per token), each with its standard error.

        Columns: ``item``, ``layer`` (the first one), ``part``, ``variant``; ``NAME`` and ``NAME_se`` of each score;
        ``num_sequences``, ``context_tokens``, ``method``. The teacher's own blocks, which cost nothing, have no row.
        """
        import pandas as pd

        names = {score: name for name, score in OBJECTIVES.items()}
        by_id = {item.id: item for item in self.run.items}
        rows: dict[str, dict[str, object]] = {}
        for (item_id, metric), score in self._tables.scores.scores.items():
            item, name = by_id[item_id], names.get(metric, metric)
            part = item.sites[0].part if len(item.sites) == 1 else "several"
            told = (item_id, item.layers[0], part, "+".join(map(variant_name, item.specs)))
            row = rows.setdefault(item_id, dict(zip(ITEM, told, strict=True)))
            row |= {name: score.mean, f"{name}_se": score.standard_error}
            row |= dict(zip(HOW, (len(score.per_sequence), score.context_tokens, score.method), strict=True))
        scored = dict.fromkeys(name for row in rows.values() for name in row if name not in (*ITEM, *HOW))
        return pd.DataFrame(list(rows.values()), columns=[*ITEM, *scored, *HOW])

    @property
    def costs(self) -> pd.DataFrame:
        """One row a block shape and point of the grid: ``ms``, ``ms_p10``, ``ms_p90`` (milliseconds of one forward)."""
        return tables.costs_frame(self.run.read_costs())

    @property
    def library(self) -> pd.DataFrame:
        """One row a variant with weights of its own: losses before and after distillation (shares of the teacher's
        output), ``tokens`` it saw, ``bytes`` in the library."""
        from puzzle.report.library import library_frame

        return library_frame(self.run)

    @cached_property
    def _tables(self) -> Tables:
        return Tables.of(self.run)

    def search(self, constraints: Constraints | None = None, pick: int | None = None) -> SolutionView:
        """The best architecture under the constraints; by default under the run's own.

        ``constraints`` and ``pick`` as in :func:`open_run`. ConfigError for what means nothing, InfeasibleError with
        the nearest values that can hold, MissingMeasurementError for what a stage has not measured yet.
        """
        return self.solutions(constraints, pick)[0]

    def solutions(self, constraints: Constraints | None = None, pick: int | None = None) -> tuple[SolutionView, ...]:
        """As many different answers as the file asks for (``solutions: {count: 3}``), best first."""
        return self._under(constraints, pick).solve()

    def pareto(
        self, x: str = "params", y: str = "kl_nats", constraints: Constraints | None = None, pick: int | None = None
    ) -> ParetoFront:
        """The whole front of a sum of scores ``y`` against a cost ``x``, both named as in a constraint file.

        Workloads are those of the constraints, whose bounds do not bind here.
        """
        return ParetoFront.of(self._under(constraints, pick), x, y)

    def _under(self, constraints: Constraints | None, pick: int | None) -> Tables:
        if constraints is None and pick is None:
            _check_single(self.run)
            return self._tables
        return Tables.of(_under(self.run, constraints, pick))


def _under(run: Run, constraints: Constraints | None, pick: int | None) -> Run:
    """The run under other constraints."""
    if constraints is None:
        found = replace(run, pick=pick)
    elif isinstance(constraints, Mapping):
        given = yamlfiles.of_mapping(ConstraintFile, constraints, GIVEN)
        found = replace(run, constraints=None, pick=pick, limits=given)
    elif isinstance(constraints, str) and (": " in constraints or "\n" in constraints):
        given = yamlfiles.parse(ConstraintFile, constraints, GIVEN)
        found = replace(run, constraints=None, pick=pick, limits=given)
    else:
        found = replace(run, constraints=yamlfiles.locate("constraints", str(constraints)), pick=pick, limits=None)
    _check_single(found)
    return found


def _check_single(run: Run) -> None:
    """ConfigError where the constraints ask for several searches and none is chosen."""
    if run.pick is None and (count := len(run.picks)) > 1:
        raise ConfigError(
            f"{run.constraints or GIVEN} asks for {count} searches; say which: pick=1 ({run.picks[0]}) to "
            f"pick={count} ({run.picks[-1]})"
        )
