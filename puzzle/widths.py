"""The hidden size as a choice of the search: one search for each size on offer, on the teacher pruned to it.

Reads a config with ``widths``; gives, for each hidden size, a chain (steps.py) in ``widths/SIZE/steps``: below the
teacher's own size ``1-prune``, whose student is the base that ``2-search`` replaces blocks of, at its own ``1-search``
alone. Limits in percent are of the teacher everywhere, and so is what scores add up to:

    objective(size) = KL(teacher ‖ base of that size) + Σ scores of the items in that base

the KL true, on the split ``score``. Compares what the searches find; writes nothing. Pure.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from puzzle import checkpoint, pipeline, yamlfiles
from puzzle.basis import FIRST
from puzzle.config import PruneConfig, RunConfig
from puzzle.pruning import pruned_shape
from puzzle.ranks import Ranks
from puzzle.run import Run
from puzzle.search.metrics import METRICS
from puzzle.steps import Chain
from puzzle.types import ConfigError, InfeasibleError, OutOfTimeError, Solution
from puzzle.validate import validate

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped,unused-ignore]

    from puzzle.search.pareto import Front


@dataclass(frozen=True)
class Widths:
    """``chains``: what each hidden size takes, the largest first.

    ``stand_in``: the search that one at another size than the teacher's is, on the teacher in the place of its base.
    """

    chains: tuple[tuple[int, Chain], ...]
    stand_in: Run
    pick: int | None = None

    @classmethod
    def open(
        cls, where: Path, overrides: Sequence[str] = (), constraints: str | None = None, pick: int | None = None
    ) -> Widths | None:
        """From a config file; None where it offers no widths. ConfigError for sizes that cannot be."""
        path = yamlfiles.locate_config(where)
        if not path.is_file():
            return None  # whoever opens it as a run says so
        document = yamlfiles.read_yaml(path)
        asked_for = document.get("widths") or any(one.startswith("widths") for one in overrides)
        if not asked_for or document.get("steps"):
            return None
        config = yamlfiles.validated(RunConfig, path, document, overrides)
        if (widths := config.widths) is None:
            return None
        if constraints is not None:
            config = config.model_copy(update={"constraints": constraints})
        if config.refine.evaluations:
            raise ConfigError(f"{path}: refine is of changes to the teacher alone; leave it out, or widths")
        shape = checkpoint.read_shape(checkpoint.locate_teacher(config.teacher))
        asked: dict[int, int | str] = {}
        for given in widths.sizes:
            try:
                size = pruned_shape(PruneConfig(hidden_size=given), shape).hidden_size
            except ConfigError as error:
                raise ConfigError(f"{path}: widths.sizes: {error}") from None
            if size in asked:
                raise ConfigError(f"{path}: widths.sizes: {asked[size]} and {given} are both {size}; leave one out")
            asked[size] = given
        chains = tuple((size, _chain(config, size, shape.hidden_size)) for size in sorted(asked, reverse=True))
        update = {"widths": None, "original": config.teacher}
        limits = None if config.constraints is None else yamlfiles.locate("constraints", config.constraints)
        folder = Path(config.run) / "widths" / "any" / "steps" / "2-search"
        return cls(chains, Run(folder, config.model_copy(update=update), limits, pick=pick), pick)

    def check(self, runs: Sequence[Run]) -> None:
        """PuzzleError for what is wrong with searches whose base is not there yet; ``runs``: stand-ins of theirs."""
        for run in runs if self.waiting else ():
            with contextlib.suppress(InfeasibleError):  # a narrower one may do
                validate(run)

    def runs(self) -> Iterator[tuple[str, Run]]:
        """Name and run of one step after the other, size by size, as far as bases have been made."""
        for size, chain in self.chains:
            for name, run in chain.runs():
                yield f"{size}/{name}", replace(run, pick=self.pick if run.config.prune is None else None)

    @property
    def waiting(self) -> tuple[str, ...]:
        """The names of those that are not known yet."""
        known = {name for name, _ in self.runs()}
        names = [f"{size}/{name}" for size, chain in self.chains for name, _ in chain.steps]
        return tuple(name for name in names if name not in known)

    def searches(self, tell: Callable[[str], None] = lambda line: None) -> tuple[Run, ...]:
        """One for each size that may do; ``tell`` is called with a line for each that may not.

        ConfigError where a base is not there yet, InfeasibleError where no size may do.
        """
        if self.waiting:
            raise ConfigError(f"{self.waiting[0]}: its teacher is not made yet; `puzzle run` makes it")
        runs = [run for _, run in self.runs() if run.config.prune is None]
        refused = [too_large(run) for run in runs]
        if all(refused):
            raise InfeasibleError("; ".join(str(error) for error in refused))
        for error in filter(None, refused):
            tell(f"left out: {error}")
        return tuple(run for run, error in zip(runs, refused, strict=True) if error is None)


def _chain(config: RunConfig, size: int, teachers_size: int) -> Chain:
    assert config.widths is not None
    folder, alone = Path(config.run) / "widths" / str(size), {"widths": None}
    if size == teachers_size:
        return Chain(
            folder, (("1-search", config.model_copy(update={**alone, "run": str(folder / "steps/1-search")})),)
        )
    base = {
        "run": str(folder / "steps" / "1-prune"),
        "prune": PruneConfig(hidden_size=size),
        "constraints": None,
        "space": None,
        "kd": config.kd.model_copy(update={"tokens": config.widths.tokens}),
        "tournament": type(config.tournament)(),
        "export": config.export.model_copy(update={"targets": ("hf",)}),
    }
    search = {
        "run": str(folder / "steps" / "2-search"),
        "original": config.teacher,
        "kd": config.kd.model_copy(update={"teacher": config.kd.teacher or FIRST}),
    }
    steps = (("1-prune", base), ("2-search", search))
    return Chain(folder, tuple((name, config.model_copy(update={**alone, **update})) for name, update in steps))


def label(run: Run) -> str:
    """For people: which of the searches; of a constraint file with lists of values, the pick."""
    return f"hidden size {run.shape.hidden_size}" + (f", pick {run.pick}" if run.pick is not None else "")


def too_large(run: Run) -> InfeasibleError | None:
    """Why no choice of blocks makes the run's teacher small enough, whatever their scores; None: some may."""
    errors, picked = [], run.each_pick()
    for one in picked:
        try:
            validate(one)
        except InfeasibleError as error:
            errors.append(f"{label(one)}: {error}")
    return InfeasibleError("; ".join(errors)) if len(errors) == len(picked) else None


def rank(solution: Solution) -> float:
    """What is minimised: the sum of scores or a cost; of a rate the negative."""
    if solution.minimised is None:
        return solution.objective_nats
    cost = solution.totals[solution.minimised]
    return -cost if METRICS[solution.minimised.rpartition(".")[2]].tokens else cost


def best(runs: Sequence[Run]) -> Run:
    """The search whose answer is the best, on every rank the one that the first finds. InfeasibleError where none has
    one."""
    found, refused = [], []
    for run in runs:
        try:
            found.append((rank(pipeline.solve(run, {})[0]), run))
        except (InfeasibleError, OutOfTimeError) as error:
            refused.append(f"{label(run)}: {error}")
    if not found:
        raise InfeasibleError("; ".join(refused))
    chosen, ranks = min(found, key=lambda one: one[0])[1], Ranks.current()
    ranks.join()
    (agreed,) = itertools.compress(runs, ranks.agreed(chosen.folder, "the run", [run is chosen for run in runs]))
    return agreed


def joint_front(fronts: Sequence[tuple[int, Front]]) -> pd.DataFrame:
    """By ascending cost, what no architecture of any hidden size beats: its cost, its objective, its hidden size."""
    import numpy as np
    import pandas as pd

    parts = [(front.cost, front.objective, np.full(len(front), size)) for size, front in fronts]
    cost, objective, size = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = np.lexsort((objective, cost))
    before = np.minimum.accumulate(np.concatenate([[np.inf], objective[order][:-1]]))
    kept = order[objective[order] < before]
    _, first = fronts[0]
    named = {first.cost_name: cost[kept], first.objective_name: objective[kept], "hidden size": size[kept]}
    return pd.DataFrame({"point": np.arange(len(kept)), **named})
