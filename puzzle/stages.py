"""What each stage does: makes the units that are missing, publishing each as soon as it is whole.

The torch lane's side of the pipeline; every function takes a :class:`~puzzle.run.Run` and the planned units that are
missing, reads what earlier stages published, and writes nothing but those units.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from puzzle import artifacts, build, data, kd
from puzzle.blocks import distill, importance, initialise, library
from puzzle.data_source import text_path
from puzzle.evaluate import evaluate
from puzzle.export.card import model_card
from puzzle.modeling import PuzzleForCausalLM
from puzzle.progress import Progress
from puzzle.run import Planned, Run
from puzzle.schedule import num_steps
from puzzle.scoring.exact import exact_scores
from puzzle.speed import Subject, measured_speed
from puzzle.teacher import Compute, load_config, load_model, load_tokenizer, read_tensors, stream_layers
from puzzle.types import Item, PuzzleError, Score, to_json
from puzzle.variants import shape_id

BATCH_SEQUENCES = 8
transformers.logging.set_verbosity_error()  # its warnings are about uses that are not ours
transformers.logging.disable_progress_bar()


def compute_of(run: Run) -> Compute:
    return Compute.choose(run.config.device, run.config.dtype)


@functools.lru_cache(maxsize=1)
def _cached_model(folder: Path, fingerprint: str, compute: Compute) -> PuzzleForCausalLM:
    return load_model(folder, compute)


def teacher_of(run: Run) -> PuzzleForCausalLM:
    """The teacher, loaded once for consecutive stages of one process."""
    return _cached_model(run.teacher, run.teacher_fingerprint, compute_of(run))


def tokens_of(run: Run) -> data.TokenData:
    payload = artifacts.read_unit(run.data).payload
    return data.read_tokens(run.data, payload, run.config.data.sequence_tokens)


def sequences_of(run: Run, split: str, count: int) -> list[Tensor]:
    """Batches of ids on the device; the same for equal (split, count, seed)."""
    ids = tokens_of(run).sequences(split, count, run.config.seed)
    return list(ids.to(compute_of(run).device).split(BATCH_SEQUENCES))


def make_data(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    (unit,) = missing
    path = text_path(run.config.data.text)
    load_config(run.teacher)  # what transformers refuses is refused now, not after the first long stage
    tokenizer = load_tokenizer(run.teacher)
    artifacts.publish_folder(unit.path, unit.inputs, lambda aside: data.write_tokens(path, tokenizer, aside))
    progress.done(unit.path.name)


def make_importance(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    wanted = {unit.path: unit for unit in missing}
    batches = sequences_of(run, "train", run.config.init.sequences)
    for index, layer, passes in stream_layers(teacher_of(run), batches):
        unit = wanted.get(run.importance(index))
        if unit is not None:
            found = importance.layer_importance(layer, passes)
            artifacts.publish_folder(unit.path, unit.inputs, functools.partial(_write_importance, found))
            progress.done(unit.path.name)


def _write_importance(found: importance.LayerImportance, aside: Path) -> dict[str, Any]:
    save_file({"ffn_channels": found.ffn_channels.cpu()}, aside / "importance.safetensors")
    return {"block_importance": found.block}


def make_init(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    wanted = {unit.path: unit for unit in missing}
    batches = sequences_of(run, "train", run.config.init.sequences)
    for index, layer, passes in stream_layers(teacher_of(run), batches):
        channels = read_tensors(run.importance(index) / "importance.safetensors")["ffn_channels"]
        for item in run.stored_items:
            unit = wanted.get(run.initial(item))
            if unit is None or item.sites[0].layer != index:
                continue
            part, spec = item.sites[0].part, item.specs[0]
            weights = initialise.paper_start(layer, part, spec, channels)
            if run.config.init.start == "closed-form":
                weights = initialise.closed_form_start(layer, part, spec, weights, passes)
            artifacts.publish_folder(unit.path, unit.inputs, functools.partial(_write_variant, weights, {}))
            progress.done(item.id)


def _write_variant(weights: Mapping[str, Tensor], payload: Mapping[str, Any], aside: Path) -> Mapping[str, Any]:
    library.write_weights(aside, weights)
    return payload


def make_distill(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    settings, tokens, compute = run.config.distill, tokens_of(run), compute_of(run)
    held_out = sequences_of(run, "score", min(16, tokens.num_sequences("score")))
    wanted = {unit.path: unit for unit in missing}
    todo = [item for item in run.stored_items if run.trained(item) in wanted]
    for group in _groups_of_layers(todo, settings.layers_per_pass):
        starts = {item: library.read_weights(run.initial(item)) for item in group}
        batches = functools.partial(tokens.batch, run.config.seed, batch_size=settings.batch_size)
        steps = num_steps(settings.tokens, settings.batch_size, run.config.data.sequence_tokens)
        on_step = functools.partial(progress.fraction, len(group) / max(1, steps))
        done = distill.distill(teacher_of(run), starts, batches, held_out, settings, compute, on_step)
        for item, result in done.items():
            unit, weights = wanted[run.trained(item)], result.weights
            payload: dict[str, Any] = {"loss_before": result.loss_before, "loss_after": result.loss_after}
            if not math.isfinite(result.loss_before + result.loss_after):
                weights, payload = starts[item], {"failed": "its loss is not finite after distillation"}
            payload["tokens"] = result.tokens
            artifacts.publish_folder(unit.path, unit.inputs, functools.partial(_write_variant, weights, payload))
        progress.done(*(item.id for item in group))


def _groups_of_layers(items: Sequence[Item], layers_per_pass: int) -> list[list[Item]]:
    layers = sorted({item.sites[0].layer for item in items})
    chunks = [layers[start : start + layers_per_pass] for start in range(0, len(layers), layers_per_pass)]
    return [[item for item in items if item.sites[0].layer in chunk] for chunk in chunks]


def make_score(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    wanted = {unit.path: unit for unit in missing}
    sites = [site for site in run.shape.sites if run.scores / f"{site}.json" in wanted]
    pending = {site: [item for item in run.items_at(site) if item.specs[0].kind != "keep"] for site in sites}
    by_layer: dict[int, list[Item]] = {}
    for site in sites:
        by_layer.setdefault(site.layer, []).extend(pending[site])
    found: dict[Item, list[Score]] = {}
    failed: dict[Item, str] = {}
    batches = sequences_of(run, "score", run.config.score.sequences)
    sequence_tokens = run.config.data.sequence_tokens

    def read(item: Item) -> Mapping[str, Tensor]:
        return library.read_weights(run.trained(item)) if item.specs[0].kind != "skip" else {}

    for site in [site for site in sites if not pending[site]]:
        unit = wanted[run.scores / f"{site}.json"]
        artifacts.publish_json(unit.path, unit.inputs, {"scores": [], "failed": []})
        progress.done(str(site))
    for item, values in exact_scores(teacher_of(run), by_layer, read, batches):
        diverged = _failure(run, item)
        if diverged is not None:
            failed[item] = diverged
        elif all(torch.isfinite(column).all() for column in values.values()):
            found[item] = [
                Score(item.id, "teacher", "teacher", metric, "score", tuple(column.tolist()), sequence_tokens)
                for metric, column in values.items()
            ]
        else:
            failed[item] = "its score is not finite"
        site = item.sites[0]
        progress.fraction(1 / len(pending[site]))
        if all(other in found or other in failed for other in pending[site]):
            unit = wanted[run.scores / f"{site}.json"]
            payload = {
                "scores": [to_json(score) for one in pending[site] for score in found.get(one, [])],
                "failed": [{"item_id": one.id, "reason": failed[one]} for one in pending[site] if one in failed],
            }
            artifacts.publish_json(unit.path, unit.inputs, payload)
            progress.done(str(site))


def _failure(run: Run, item: Item) -> str | None:
    """Why the item's training failed, if it did."""
    if item.specs[0].kind == "skip":
        return None
    reason = artifacts.read_unit(run.trained(item)).payload.get("failed")
    return str(reason) if reason is not None else None


def make_profile(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    from puzzle.profiling import measure

    device = str(compute_of(run).device)
    weights = run.config.profile.weights
    dtype: measure.Dtype = weights if weights != "auto" else "bf16" if device.startswith("cuda") else "fp32"
    specs = {shape_id(item.specs[0], run.shape): item.specs[0] for item in run.items}
    _cached_model.cache_clear()  # room for the largest points
    stack = measure.SiteStack.build(run.shape, load_config(run.teacher), specs.values(), device, dtype, run.config.seed)
    points = {run.costs / f"{point.id}.json": point for point in run.grid_points}
    for unit in missing:
        costs = measure.measure_point(stack, points[unit.path], run.grid.repeats, run.config.seed)
        artifacts.publish_json(unit.path, unit.inputs, {"costs": [to_json(cost) for cost in costs]})
        progress.done(unit.path.stem)


def make_build(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    (unit,) = missing
    student = build.build_student(
        teacher_of(run), run.chosen_items(), lambda item: library.read_weights(run.trained(item))
    )
    artifacts.publish_folder(unit.path, unit.inputs, functools.partial(_write_model, student, teacher_dtype(run)))
    progress.done(unit.path.name)


def teacher_dtype(run: Run) -> torch.dtype:
    """The dtype the teacher's weights are stored in: the student's too."""
    dtype: torch.dtype = getattr(torch, run.stored_dtype)
    return dtype


def _write_model(model: PuzzleForCausalLM, dtype: torch.dtype, aside: Path) -> None:
    build.write_model(model, aside, dtype)


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
    artifacts.publish_folder(unit.path, unit.inputs, functools.partial(_write_model, job.finish(), teacher_dtype(run)))
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
    totals = run.solutions()[0].totals
    batch_sizes = {name: round(totals[f"{name}.batch_size"]) for name in run.constraint_file.workloads}
    subjects = {
        "teacher": Subject(teacher, tuple(item.specs[0] for item in run.items if item.specs[0].kind == "keep")),
        "student": Subject(models["student"], tuple(spec for item in run.chosen_items() for spec in item.specs)),
    }
    speeds = measured_speed(run, subjects, batch_sizes)
    speed = {workload: {name: to_json(one) for name, one in of.items()} for workload, of in speeds.items()}
    params = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    artifacts.publish_json(unit.path, unit.inputs, {"quality": quality, "params": params, "speed": speed})
    progress.done(unit.path.name)


def make_export(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    from puzzle.export.hf import export_hf
    from puzzle.export.verify import verify_hf, write_reference

    (unit,) = missing
    on_cpu = Compute(torch.device("cpu"), bf16=False)
    model = torch.nn.Module.to(load_model(run.student / "final", on_cpu), teacher_dtype(run))

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


MAKERS: Mapping[str, Callable[[Run, Sequence[Planned], Progress], None]] = {
    "data": make_data,
    "importance": make_importance,
    "init": make_init,
    "distill": make_distill,
    "score": make_score,
    "profile": make_profile,
    "build": make_build,
    "kd": make_kd,
    "evaluate": make_evaluate,
    "export": make_export,
}
