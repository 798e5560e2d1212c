"""The stages about the student but for its distillation: put together, evaluate, export."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from puzzle import artifacts, build
from puzzle.evaluate import evaluate
from puzzle.export.card import model_card
from puzzle.plans import Planned
from puzzle.progress import Progress
from puzzle.run import Run
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
