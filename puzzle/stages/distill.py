"""The stage that trains the library: lays the work out within the memory budget and over the ranks, then BLD."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from puzzle import artifacts, memory_plan
from puzzle.blocks import distill, library
from puzzle.blocks.stream import InMemory, OnDisk, Store, Stream
from puzzle.data.batches import Batch
from puzzle.memory_plan import BldPlan, Machine
from puzzle.plans import Planned
from puzzle.progress import Progress
from puzzle.ranks import AddUp, Ranks, Share, alone, rows_of, shares, team_sum
from puzzle.run import Run
from puzzle.schedule import num_steps
from puzzle.stages.common import compute_of, held_out_of, machine_of, streamed_teacher, tokens_of, write_unit
from puzzle.variants import params


def make_distill(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    """Trains what is missing of the library, or this rank's share of it."""
    wanted = {unit.path.name: unit for unit in missing}
    ranks, settings = Ranks.current(), run.config.distill
    costs: dict[str, float] = {  # multiply-adds per token and step
        unit: sum(params(spec, run.shape) for item in items for spec in item.specs)
        for unit, items in run.units.items()
        if unit in wanted
    }
    share = shares(costs, ranks.count, settings.batch_size)[ranks.rank]
    add_up = _sum_over_team(run, costs, ranks, share)
    if not share.pieces:
        return
    steps = num_steps(settings.tokens, settings.batch_size, run.config.data.sequence_tokens)
    plan = plan_of(run, share.pieces, steps, machine_of(run))
    with _residual_store(run, plan, ranks) as store:
        rows = rows_of(settings.batch_size, share.team, ranks.rank)
        job = _Job(run, plan, store, steps, rows, add_up)
        for group in plan.groups:
            done = job.train(group, lambda num_units: progress.fraction(num_units / steps))
            for unit, result in done.items():
                if share.team[0] == ranks.rank:
                    _publish(run, wanted[unit], result)
            progress.done(*group)


def _publish(run: Run, planned: Planned, result: distill.Distilled) -> None:
    payload: dict[str, Any] = {"tokens": result.tokens}
    if result.failed is None:
        payload |= {"before": dict(result.before), "after": dict(result.after)}
    else:
        payload |= {"failed": result.failed}
    artifacts.publish_folder(planned.path, planned.inputs, functools.partial(write_unit, run, result.weights, payload))


class _Job:
    """The streams that all groups of this rank train on."""

    def __init__(self, run: Run, plan: BldPlan, store: Store | None, steps: int, rows: slice, add_up: AddUp) -> None:
        settings, tokens = run.config.distill, tokens_of(run)
        self._run, self._add_up = run, add_up
        self._teacher = streamed_teacher(run, compute_of(run).dtype, plan.hold_teacher)

        def batch(step: int) -> Batch:
            return tokens.batch(run.config.seed, step, settings.batch_size).rows(rows)

        self._stream = Stream(self._teacher, batch, steps, store, plan.chunk)
        self._held_out = Stream.of(self._teacher, held_out_of(run))

    def train(self, group: Sequence[str], on_step: Callable[[int], None]) -> dict[str, distill.Distilled]:
        run = self._run
        # a start that is not finite fails alone, in training
        weights = {unit: library.read_weights(run.initial(unit), finite=False) for unit in group}
        starts = [distill.Task(unit, run.units[unit], weights[unit]) for unit in group]
        for stream in (self._stream, self._held_out):
            while stream.depth < min(start.layer for start in starts):
                stream.advance(self._teacher.layer(stream.depth))
        return distill.distill(starts, self._stream, self._held_out, run.config.distill, on_step, self._add_up)


def plan_of(run: Run, units: Sequence[str], steps: int, machine: Machine) -> BldPlan:
    """How the units are trained on this machine."""
    settings = run.config.distill
    batches = memory_plan.Batches(
        steps, settings.batch_size * run.config.data.sequence_tokens, compute_of(run).dtype.itemsize
    )
    named = [memory_plan.Unit(unit, run.units[unit][0].layers[0], run.unit_params(unit)) for unit in units]
    wanted = None if settings.residual == "auto" else settings.residual
    return memory_plan.plan_bld(run.shape, named, batches, machine, wanted)


@contextlib.contextmanager
def _residual_store(run: Run, plan: BldPlan, ranks: Ranks) -> Iterator[Store | None]:
    """Where the residual stream is kept; what a crash leaves is swept away with other half-written things."""
    if plan.residual != "disk":
        yield InMemory() if plan.residual == "memory" else None
        return
    path = run.folder / f"{artifacts.ASIDE}residual-{ranks.rank}"
    store = OnDisk(path)
    try:
        yield store
    finally:
        path.unlink(missing_ok=True)


def _sum_over_team(run: Run, costs: Mapping[str, float], ranks: Ranks, share: Share) -> AddUp:
    """Every rank makes every team's group, in the same order; it sums over its own."""
    if ranks.count == 1:
        return alone
    every = shares(costs, ranks.count, run.config.distill.batch_size)
    teams = sorted({one.team for one in every if len(one.team) > 1})
    sums = {team: team_sum(team) for team in teams}
    return sums.get(share.team, alone)
