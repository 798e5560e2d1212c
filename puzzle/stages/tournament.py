"""The stage in which candidates compete: each distilled a little, half of them a little further.

They are the best answers of a search, or the combinations of sizes that a pruning may choose from. Reads the splits
``train`` and ``select``, which decides; writes the winner, that later stages go on with: of a search, a solution. Each
candidate follows the schedule of the whole distillation, so the winner is then as far on its way, bit for bit, as it
would be without a tournament, and goes on from there. What a candidate needs lies in
``students/ID/tournament/NUMBER``: the student as it was built, a checkpoint, and a figure for each comparison that it
came to, each a unit; a start after a stop repeats none of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from puzzle import artifacts, build, kd, pipeline, plans, training_log
from puzzle.data.batches import Batch
from puzzle.evaluate import compared
from puzzle.plans import Planned
from puzzle.progress import Progress
from puzzle.pruning import change
from puzzle.ranks import Ranks, shares
from puzzle.run import Run
from puzzle.schedule import num_steps
from puzzle.search.halving import Rung, halving, num_distilled
from puzzle.stages.common import compute_of, item_weights, sequences_of, stored_dtype, teacher_of, tokens_of
from puzzle.stages.kd import newest
from puzzle.stages.prune import publish_pruned
from puzzle.teacher import load_model
from puzzle.types import Item, mean_and_error


def make_tournament(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    """Ranks share the candidates."""
    (unit,) = missing
    candidates = _of_search(run) if run.config.prune is None else _of_pruning(run)
    select = sequences_of(run, "select", run.num_sequences("select"))
    first = _steps(run, run.config.tournament.tokens)
    field = _Field(run, candidates, select)
    progress.total(num_distilled(len(candidates)) * first, 0)
    rungs = halving(len(candidates), first, functools.partial(field.losses, progress=progress))
    winner = rungs[-1].on[0] if rungs else 0
    if Ranks.current().first:
        found = {
            "winner": winner,
            "candidates": [one.told for one in candidates],
            "rungs": [field.told(rung) for rung in rungs],
        }
        if rungs:  # what follows goes on from there, and so does its log
            said = (field.folder(winner) / training_log.NAME).read_text(encoding="utf-8")
            artifacts.write_text(run.student / training_log.NAME, said)
        if run.config.prune is None:
            chosen = replace(run.candidates()[winner], inputs=dict(unit.inputs))
            pipeline.publish_solutions(run, unit, [chosen], tournament=found)
        else:
            artifacts.publish_json(unit.path, unit.inputs, {"tournament": found})
        progress.done(unit.path.name)


@dataclass(frozen=True)
class _Candidate:
    """``told``: what there is to say of it beforehand; ``publish`` writes its student, as it was built, to a path."""

    told: str
    publish: Callable[[Path], None]


def _of_search(run: Run) -> tuple[_Candidate, ...]:
    def publish(path: Path, items: tuple[Item, ...]) -> None:
        student = build.build_student(teacher_of(run), items, functools.partial(item_weights, run))
        write = functools.partial(build.write_model, student, dtype=stored_dtype(run))
        artifacts.publish_folder(path, plans.student_inputs(run, items), write)

    return tuple(
        _Candidate(f"sum of scores {one.objective_nats:.4f}", functools.partial(publish, items=run.items_of(one)))
        for one in run.candidates()
    )


def _of_pruning(run: Run) -> tuple[_Candidate, ...]:
    return tuple(
        _Candidate(
            change(run.shape, one.student_shape), functools.partial(publish_pruned, one, plans.prune_inputs(one))
        )
        for one in run.contenders
    )


def _steps(run: Run, tokens: int) -> int:
    return num_steps(tokens, run.config.kd.batch_size, run.config.data.sequence_tokens)


def _tell(job: kd.Distillation, log: training_log.Log, progress: Progress, name: str, loss: float) -> None:
    progress.fraction(1, f"{name}, loss {loss:.4f}")
    assert job.last is not None
    log(job.last.step, job.last.figures())


@dataclass(frozen=True)
class _Field:
    """The candidates, and what they are compared on."""

    run: Run
    candidates: tuple[_Candidate, ...]
    select: Sequence[Batch]

    def folder(self, candidate: int) -> Path:
        return self.run.student / "tournament" / str(candidate)

    def losses(self, going: Sequence[int], steps: int, progress: Progress) -> list[float]:
        """Their KL on select after so many steps; this rank distils its share of those that have not come so far."""
        ranks = Ranks.current()
        names = {str(one): 1.0 for one in going}
        for name in shares(names, ranks.count, 1)[ranks.rank].pieces:
            if not self._figure(int(name), steps).exists():
                self._distil(int(name), steps, progress)
        ranks.wait(self.run.folder, "the tournament")
        if ranks.first:
            for one in {*range(len(self.candidates))}.difference(going):
                for what in ("initial", "kd"):  # large, and of no more use
                    artifacts.remove(self.folder(one) / what)
        return [mean_and_error(self._kl(one, steps))[0] for one in going]

    def told(self, rung: Rung) -> dict[str, object]:
        """A comparison for the solution's unit: who came to it, and their KL per sequence."""
        tokens = rung.steps * self.run.config.kd.batch_size * self.run.config.data.sequence_tokens
        return {
            "steps": rung.steps,
            "tokens": tokens,
            "candidates": list(rung.candidates),
            "kl_nats": [self._kl(one, rung.steps) for one in rung.candidates],
        }

    def _figure(self, candidate: int, steps: int) -> Path:
        return self.folder(candidate) / f"after-{steps:08d}.json"

    def _kl(self, candidate: int, steps: int) -> list[float]:
        return artifacts.read_unit(self._figure(candidate, steps)).read(list[float], "kl_nats")

    def _distil(self, candidate: int, steps: int, progress: Progress) -> None:
        """Brings a candidate to ``steps`` from its last checkpoint, or from where it is built."""
        run, folder = self.run, self.folder(candidate)
        if not (folder / "initial").exists():
            self.candidates[candidate].publish(folder / "initial")
        inputs = plans.kd_inputs(run, folder / "initial")
        teacher = teacher_of(run.distilling)
        job = kd.Distillation(load_model(folder / "initial", compute_of(run)), teacher, run.config.kd, compute_of(run))
        if (last := newest(folder / "kd")) is not None:
            job.load(last.path, last.payload)
        if job.step < steps:
            batches = functools.partial(tokens_of(run).batch, run.config.seed, batch_size=run.config.kd.batch_size)
            name = f"candidate {candidate + 1}"
            whole = _steps(run, run.config.kd.tokens)
            with training_log.opened(folder, job.step, ()) as log:
                job.run(batches, steps, whole, functools.partial(_tell, job, log, progress, name))
            artifacts.publish_folder(folder / "kd" / f"step-{steps:08d}", inputs, job.save)
        if last is not None and last.read(int, "step") < steps:
            artifacts.remove(last.path)
        kl = compared(job.finish(), teacher, self.select).kl_nats.tolist()
        artifacts.publish_json(self._figure(candidate, steps), inputs, {"kl_nats": kl})
