"""The stage that distils the student: on this process, or on all ranks together, from the last checkpoint on."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from puzzle import artifacts, build, training_log
from puzzle.data.batches import Batch, TokenData
from puzzle.forecast import Schedule, forecast, forecast_step
from puzzle.kd import Distillation, DivergedError
from puzzle.kd.losses import check_comparable
from puzzle.kd.stored import Stored
from puzzle.plans import Planned
from puzzle.progress import Progress, console
from puzzle.ranks import Ranks
from puzzle.run import Run
from puzzle.schedule import num_steps
from puzzle.sharding import load_sharded, mesh_of
from puzzle.stages.common import compute_of, forget_teacher, stored_dtype, streamed_teacher, teacher_of, tokens_of
from puzzle.teacher import load_model
from puzzle.types import ConfigError


def make_kd(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    (unit,) = missing
    settings, tokens, ranks = run.config.kd, tokens_of(run), Ranks.current()
    steps = num_steps(settings.tokens, settings.batch_size, run.config.data.sequence_tokens)
    _check(run, tokens, ranks)
    batches = functools.partial(tokens.batch, run.config.seed, batch_size=settings.batch_size)
    stored = _stored(run, unit, batches, steps, ranks)
    job = _job(run, ranks, stored)
    checkpoints = run.student / "kd"
    if ranks.first:
        _sweep(checkpoints, unit.inputs)
    ranks.wait(run.folder, "kd")
    good = newest(checkpoints) or _winners(run, unit.inputs)
    if good is not None:
        job.load(good.path, good.payload)
    progress.total(steps, job.step)
    with _log(run, job.step, ranks) as log, ranks.naming_the_dead(run.folder, "kd", only_known=True):
        tell = functools.partial(_tell, run, job, log, progress)
        schedule = _schedule(run)
        if log is not None and job.step >= (forecast_step(schedule) or steps):
            _foretell(run, schedule)
        while job.step < steps:
            until = min(steps, job.step + settings.checkpoint_steps)
            try:
                job.run(batches, until, steps, tell)
            except DivergedError as error:
                where = "there is no checkpoint yet" if good is None else f"the last good checkpoint is {good.path}"
                raise ConfigError(f"{error}; {where}") from None
            if job.step < steps:
                older = sorted(checkpoints.glob("step-*"))
                good = _published(checkpoints / f"step-{job.step:08d}", unit.inputs, job.save, ranks)
                for path in older if ranks.first else ():
                    artifacts.remove(path)
        write = functools.partial(build.write_model, job.finish(), dtype=stored_dtype(run))
        _published(unit.path, unit.inputs, write, ranks)
    progress.done(unit.path.name)


def _check(run: Run, tokens: TokenData, ranks: Ranks) -> None:
    """ConfigError before any weights are loaded."""
    settings, sequence_tokens = run.config.kd, run.config.data.sequence_tokens
    check_comparable(run.student / "initial", run.distilling.teacher)
    if settings.batch_size % ranks.count:
        raise ConfigError(
            f"kd.batch_size is {settings.batch_size}, which {ranks.count} ranks cannot share equally; "
            "make it a multiple of their number"
        )
    available = tokens.num_sequences("train") * sequence_tokens
    if settings.max_epochs is not None and settings.tokens > settings.max_epochs * available:
        raise ConfigError(
            f"kd.tokens is {settings.tokens:,}, but train holds {available:,} tokens and kd.max_epochs is "
            f"{settings.max_epochs:g}; give more text, ask for fewer tokens, or allow more epochs"
        )


def _stored(run: Run, unit: Planned, batches: Callable[[int], Batch], steps: int, ranks: Ranks) -> Stored | None:
    """The teacher's signal on disk, where the config wants it there; made where it is missing."""
    settings, seed = run.config.kd, run.config.seed
    if settings.signal == "online":
        return None
    forget_teacher()
    teacher = streamed_teacher(run.distilling, compute_of(run).dtype)
    stored = Stored(run.folder / "signal", teacher, batches, steps, settings, seed)
    window = [run.config.data.sequence_tokens, run.config.data.within_documents]
    kind = [settings.signal, settings.batch_size, settings.temperature, settings.signal_samples, run.config.dtype]
    inputs = {"teacher": run.distilling.teacher_fingerprint, "data": unit.inputs["data"]}
    stored.make({**inputs, "signal": artifacts.fingerprint([seed, window, kind])}, ranks)
    ranks.wait(run.folder, "kd")
    return stored


def _job(run: Run, ranks: Ranks, stored: Stored | None) -> Distillation:
    settings, compute = run.config.kd, compute_of(run)
    initial, online = run.student / "initial", settings.needs_teacher and stored is None
    if (mesh := mesh_of(compute.device, ranks.count)) is None:
        teacher = teacher_of(run.distilling) if online else None
        return Distillation(load_model(initial, compute), teacher, settings, compute, stored=stored)
    forget_teacher()
    # what trains is in fp32; a frozen weight that is stored in bf16 and multiplied in bf16 loses nothing by staying so
    frozen = min(compute.dtype, stored_dtype(run.distilling), key=lambda dtype: dtype.itemsize)
    teacher = load_sharded(run.distilling.teacher, mesh, frozen, trained=False) if online else None
    student = load_sharded(initial, mesh, torch.float32, trained=True)
    return Distillation(student, teacher, settings, compute, ranks, stored)


def _log(run: Run, step: int, ranks: Ranks) -> contextlib.AbstractContextManager[training_log.Log | None]:
    """Of rank 0; the others have none."""
    if not ranks.first:
        return contextlib.nullcontext()
    return training_log.opened(run.student, step, run.config.kd.report_to)


def _tell(run: Run, job: Distillation, log: training_log.Log | None, progress: Progress, loss: float) -> None:
    progress.fraction(1, f"loss {loss:.4f}")
    if log is not None and job.last is not None:
        log(job.last.step, job.last.figures())
        if job.last.step == forecast_step(schedule := _schedule(run)):
            _foretell(run, schedule)


def _schedule(run: Run) -> Schedule:
    settings = run.config.kd
    steps = num_steps(settings.tokens, settings.batch_size, run.config.data.sequence_tokens)
    return Schedule(steps, settings.warmup_steps, settings.min_learning_rate / settings.learning_rate)


def _foretell(run: Run, schedule: Schedule) -> None:
    """Says what KL the training will come to, from what the log holds of its beginning."""
    step = forecast_step(schedule) or 0
    kl = [line["kl"] for line in training_log.read_log(run.student / training_log.NAME)[:step] if "kl" in line]
    if step and len(kl) == step and min(kl) > 0:
        found = forecast(kl, schedule)
        told = (
            f"forecast from {step / schedule.steps:.0%} of the tokens: KL {found.mean:.4f} ± {found.standard_error:.4f}"
        )
        console.print(f"{'kd':<10} {told} at the end, on what it is trained on", markup=False, soft_wrap=True)


def _published(
    path: Path, inputs: Mapping[str, str], write: Callable[[Path | None], Mapping[str, object] | None], ranks: Ranks
) -> artifacts.Unit | None:
    """Rank 0 publishes; the others do their part in putting tensors together."""
    if ranks.first:
        return artifacts.publish_folder(path, inputs, write)
    write(None)
    return None


def _sweep(folder: Path, inputs: Mapping[str, str]) -> None:
    """Removes checkpoints that were made from other inputs: they are of no use."""
    for path in sorted(folder.glob("step-*")):
        if artifacts.changed_inputs(path, inputs):
            artifacts.remove(path)


def newest(folder: Path) -> artifacts.Unit | None:
    """The latest checkpoint in the folder."""
    found = sorted(folder.glob("step-*"))
    return artifacts.read_unit(found[-1]) if found else None


def _winners(run: Run, inputs: Mapping[str, str]) -> artifacts.Unit | None:
    """Where the winner of the run's tournament stood at its end, if there was one and it is there still."""
    if not run.config.tournament.candidates:
        return None
    winner = artifacts.read_unit(run.contest).read(int, "tournament", "winner")
    checkpoint = newest(run.student / "tournament" / str(winner) / "kd")
    return checkpoint if checkpoint is not None and checkpoint.inputs == dict(inputs) else None
