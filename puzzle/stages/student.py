"""The stages that make the student: put together, distil, evaluate, export."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from puzzle import artifacts, build, kd
from puzzle.evaluate import evaluate
from puzzle.export.card import model_card
from puzzle.plans import Planned
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.schedule import num_steps
from puzzle.speed import Subject, measured_speed
from puzzle.stages.common import compute_of, item_weights, sequences_of, stored_dtype, teacher_of, tokens_of
from puzzle.teacher import Compute, load_model
from puzzle.types import PuzzleError, to_json


def make_build(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    (unit,) = missing
    student = build.build_student(teacher_of(run), run.chosen_items(), functools.partial(item_weights, run))
    write = functools.partial(build.write_model, student, dtype=stored_dtype(run))
    artifacts.publish_folder(unit.path, unit.inputs, write)
    progress.done(unit.path.name)


def make_kd(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    (unit,) = missing
    settings, tokens, compute = run.config.kd, tokens_of(run), compute_of(run)
    student = load_model(run.student / "initial", compute)
    job = kd.Distillation(student, teacher_of(run), settings, compute)
    checkpoints = run.student / "kd"
    if newest := _newest_checkpoint(checkpoints, unit.inputs):
        job.load(newest.path, newest.payload)
    steps = num_steps(settings.tokens, settings.batch_size, run.config.data.sequence_tokens)
    batches = functools.partial(tokens.batch, run.config.seed, batch_size=settings.batch_size)
    progress.total(steps, job.step)
    while job.step < steps:
        until = min(steps, job.step + settings.checkpoint_steps)
        job.run(batches, until, steps, lambda loss: progress.fraction(1, f"loss {loss:.4f}"))
        if job.step < steps:
            older = sorted(checkpoints.glob("step-*"))
            artifacts.publish_folder(checkpoints / f"step-{job.step:08d}", unit.inputs, job.save)
            for path in older:
                artifacts.remove(path)
    write = functools.partial(build.write_model, job.finish(), dtype=stored_dtype(run))
    artifacts.publish_folder(unit.path, unit.inputs, write)
    progress.done(unit.path.name)


def _newest_checkpoint(folder: Path, inputs: Mapping[str, str]) -> artifacts.Unit | None:
    """The latest checkpoint made from the same inputs; others are of no use and are swept away."""
    units = [artifacts.read_unit(path) for path in sorted(folder.glob("step-*"))]
    for stale in [unit for unit in units if unit.inputs != dict(inputs)]:
        artifacts.remove(stale.path)
    current = [unit for unit in units if unit.inputs == dict(inputs)]
    return current[-1] if current else None


def make_evaluate(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    (unit,) = missing
    compute, teacher, tokens = compute_of(run), teacher_of(run), tokens_of(run)
    batches = sequences_of(run, "report", run.config.evaluate.sequences)
    models = {
        "teacher": teacher,
        "student before GKD": load_model(run.student / "initial", compute),
        "student": load_model(run.student / "final", compute),
    }
    bytes_per_token = tokens.bytes_per_token["report"]
    quality = {name: to_json(evaluate(model, teacher, batches, bytes_per_token)) for name, model in models.items()}
    subjects = {
        "teacher": Subject(teacher, run.keep_specs),
        "student": Subject(models["student"], tuple(spec for item in run.chosen_items() for spec in item.specs)),
    }
    speeds = measured_speed(run, subjects, run.batch_sizes)
    speed = {workload: {name: to_json(one) for name, one in of.items()} for workload, of in speeds.items()}
    params = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    artifacts.publish_json(unit.path, unit.inputs, {"quality": quality, "params": params, "speed": speed})
    progress.done(unit.path.name)


def make_export(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    from puzzle.export.hf import export_hf
    from puzzle.export.verify import verify_hf, write_reference

    (unit,) = missing
    on_cpu = Compute(torch.device("cpu"), bf16=False)
    model = torch.nn.Module.to(load_model(run.student / "final", on_cpu), stored_dtype(run))

    def write(aside: Path) -> dict[str, Any]:
        folder = aside / "hf"
        export_hf(model, run.teacher, folder, model_card(run))
        reference = aside / "reference.safetensors"
        write_reference(model, reference)
        verification = verify_hf(folder, reference)
        reference.unlink()
        if not verification.passed:
            raise PuzzleError(
                f"the exported checkpoint does not reload as it should: {'; '.join(verification.failures)}"
            )
        return {"verification": to_json(verification)}

    artifacts.publish_folder(unit.path, unit.inputs, write)
    progress.done(str(unit.path))
