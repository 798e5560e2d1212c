"""The stages that measure: every block shape at every point of the grid, and whole models beside the sums of parts."""

from __future__ import annotations

import contextlib
import datetime
import platform
import subprocess
from collections.abc import Sequence

import torch

from puzzle import artifacts
from puzzle.plans import Planned
from puzzle.profiling.correction import WholeModel, WholePoint, whole_models
from puzzle.profiling.grid import GridPoint, extremes
from puzzle.profiling.hardware import device_name
from puzzle.profiling.measure import measure_point, measure_wholes
from puzzle.profiling.probes import PointTooLargeError
from puzzle.profiling.regression import design
from puzzle.profiling.stack import Dtype, SiteStack, compile_layers, random_model
from puzzle.profiling.vllm import measure_model
from puzzle.profiling.vllm_costs import MeasuredModel, loadable
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.stages.common import compute_of, forget_teacher
from puzzle.teacher import load_config
from puzzle.types import ConfigError, PuzzleError, Spec, to_json
from puzzle.variants import block_part


def make_profile(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    if run.config.profile.backend == "vllm":
        _profile_in_vllm(run, missing, progress)
        return
    stack = _stack(run)
    _check_device(run, stack)
    points = dict(zip(run.cost_source.units, run.grid_points, strict=True))
    for unit in missing:
        found = measure_point(stack, points[unit.path], run.grid.repeats, run.config.seed)
        payload = {
            "costs": [to_json(cost) for cost in found.costs],
            "gaps": [to_json(gap) for gap in found.gaps],
            "details": [to_json(cost) for cost in found.details],
            "environment": _environment(stack.device),
        }
        artifacts.publish_json(unit.path, unit.inputs, payload)
        progress.done(unit.path.stem)


def _profile_in_vllm(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    """One start of the engine per model; the models are the same ones whenever they are asked for."""
    source, teacher = run.cost_source, artifacts.read_json(run.teacher / "config.json")
    assert source.settings.vllm is not None
    models = design(run.shape, loadable(source.specs, run.shape), num_layers=source.settings.vllm.num_layers)
    by_path = dict(zip(source.units, models, strict=True))
    for unit in missing:
        layers = by_path[unit.path]
        time = measure_model(teacher, run.shape, layers, run.grid_points, source.engine)
        environment = {"engine": time.version, "device": time.device, "date": datetime.date.today().isoformat()}
        measured = to_json(MeasuredModel(layers, time))
        artifacts.publish_json(unit.path, unit.inputs, {"measured": measured, "environment": environment})
        progress.done(unit.path.stem)


def make_fit_costs(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    """Each whole model is measured in the same rounds as the parts, so that the machine's drift cancels."""
    stack = _stack(run)
    _check_device(run, stack)
    points, chosen = extremes(run.grid_points), whole_models(run.shape, run.items, run.config.profile.fit_models)
    progress.total(len(missing) * len(points), 0)
    for unit in missing:
        name = unit.path.stem
        model = _measured_whole(run, stack, name, chosen[name], points, progress)
        payload = {"model": to_json(model), "environment": _environment(stack.device)}
        artifacts.publish_json(unit.path, unit.inputs, payload)


def _stack(run: Run) -> SiteStack:
    device = str(compute_of(run).device)
    weights = run.config.profile.weights
    dtype: Dtype = weights if weights != "auto" else "bf16" if device.startswith("cuda") else "fp32"
    forget_teacher()  # room for the largest points
    stack = SiteStack.build(run.shape, load_config(run.teacher), run.specs, device, dtype, run.config.seed)
    return stack.compiled() if run.config.profile.compile else stack


def _check_device(run: Run, stack: SiteStack) -> None:
    """A table is of one device and dtype: what was measured for this run already must be of this one's."""
    for cost in run.cost_source.published("costs"):
        if cost.setting != stack.setting:
            there, here = (f"{one.device} in {one.weights} ({one.engine})" for one in (cost.setting, stack.setting))
            raise ConfigError(
                f"{run.folder}: costs were measured on {there}, this is {here}; start a new run here, or measure all "
                "of them anew: `puzzle profile RUN --redo`"
            )


def _measured_whole(
    run: Run, stack: SiteStack, name: str, specs: Sequence[Spec], points: Sequence[GridPoint], progress: Progress
) -> WholeModel:
    pairs = zip(specs[::2], specs[1::2], strict=True)
    blocks = [{"attention": block_part(attention), "ffn": block_part(ffn)} for attention, ffn in pairs]
    model = random_model(load_config(run.teacher), blocks, stack.device, stack.dtype, run.config.seed)
    if run.config.profile.compile:
        compile_layers(model.model.layers)
    measured: list[WholePoint] = []
    for point in points:
        progress.fraction(1, f"{name}: {point.id}")
        # a point that does not fit is left out: the profile has said so
        with contextlib.suppress(PointTooLargeError, torch.OutOfMemoryError):
            measured += measure_wholes(stack, {name: (model, specs)}, point, run.grid.repeats, run.config.seed).values()
    if not measured:
        raise PuzzleError(f"{name} fits at no point of the grid; in the grid file, add smaller batch sizes")
    return WholeModel(name, stack.setting, tuple(measured))


def _environment(device: str) -> dict[str, str]:
    """What a time holds for, and when it was measured."""
    found = {"device": device_name(device), "torch": torch.__version__, "date": datetime.date.today().isoformat()}
    if device.startswith("cuda"):
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda), "driver": _driver()}
    else:
        found |= {"cpu": platform.processor() or platform.machine(), "threads": str(torch.get_num_threads())}
    return found


def _driver() -> str:
    """The version of the NVIDIA driver, where its own tool tells."""
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=10).stdout.split("\n")[0] or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
