"""The stages about the student but for its distillation: put together, evaluate, export."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import cast

from puzzle import artifacts, build
from puzzle.evaluate import Estimate, compared, evaluate
from puzzle.export import card as model_card
from puzzle.export import publish
from puzzle.export.source import Source
from puzzle.harness import Answerer, Harness
from puzzle.plans import Planned
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.speed import Subject, measured_speed
from puzzle.stages.common import compute_of, item_weights, sequences_of, stored_dtype, teacher_of, tokens_of
from puzzle.teacher import load_model, load_tokenizer
from puzzle.types import Format, to_json


def make_build(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    (unit,) = missing
    student = build.build_student(teacher_of(run), run.chosen_items(), functools.partial(item_weights, run))
    write = functools.partial(build.write_model, student, dtype=stored_dtype(run))
    artifacts.publish_folder(unit.path, unit.inputs, write)
    progress.done(unit.path.name)


def make_evaluate(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    for unit in missing:
        if unit.path == run.evaluation:
            _evaluate(run, unit)
            progress.done(unit.path.name)
    if tasks := [unit for unit in missing if unit.path != run.evaluation]:
        _answer(run, tasks, progress)


def _answer(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    """Tasks of the lm-evaluation-harness."""
    harness, tokenizer = Harness(run.config.evaluate), load_tokenizer(run.teacher)
    student = load_model(run.student / "final", compute_of(run))
    subjects = [Answerer("teacher", teacher_of(run), tokenizer), Answerer("student", student, tokenizer)]
    for unit in missing:
        figures = harness.figures(unit.path.stem, subjects)
        artifacts.publish_json(unit.path, unit.inputs, {"figures": [to_json(figure) for figure in figures]})
        progress.done(unit.path.name)


def _evaluate(run: Run, unit: Planned) -> None:
    compute, teacher, tokens = compute_of(run), teacher_of(run), tokens_of(run)
    batches = sequences_of(run, "report", run.config.evaluate.sequences)
    models = {
        "teacher": teacher,
        "student before GKD": load_model(run.student / "initial", compute),
        "student": load_model(run.student / "final", compute),
    }
    bytes_per_token = tokens.bytes_per_token["report"]
    quality = {name: to_json(evaluate(model, teacher, batches, bytes_per_token)) for name, model in models.items()}
    if run.distilling is not run:
        other = teacher_of(run.distilling)
        for name, model in models.items():
            quality[name]["kd_teacher_kl_nats"] = to_json(Estimate.of(compared(model, other, batches).kl_nats))
    subjects = {
        "teacher": Subject(teacher, run.keep_specs),
        "student": Subject(models["student"], tuple(spec for item in run.chosen_items() for spec in item.specs)),
    }
    speeds = measured_speed(run, subjects, run.batch_sizes)
    speed = {workload: {name: to_json(one) for name, one in of.items()} for workload, of in speeds.items()}
    params = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    artifacts.publish_json(unit.path, unit.inputs, {"quality": quality, "params": params, "speed": speed})


def make_export(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    source = Source.open(run.student / "final")
    for unit in missing:
        target = cast(Format, unit.path.name)
        card = model_card.run_card(run, target)
        write = functools.partial(
            publish.fill,
            source=source,
            target=target,
            tokenizer_dir=run.teacher,
            card=card,
            gguf_type=run.config.export.gguf_type,
        )
        artifacts.publish_folder(unit.path, unit.inputs, write, loose=publish.LOOSE)
        progress.done(str(unit.path))
