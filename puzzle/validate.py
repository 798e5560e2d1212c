"""Finds every error of a run before anything runs, and estimates what the run will take.

Reads what :class:`~puzzle.run.Run` reads; computes the search problem on made-up scores and costs of exactly the units
that would be made, so a bound on something that will not be measured, or on bytes or counts that no choice keeps, is
found now. Writes nothing.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from puzzle import checkpoint, pipeline, plans, search
from puzzle.artifacts import read_json
from puzzle.basis import STORED_DTYPES
from puzzle.config import OBJECTIVES
from puzzle.data.source import check_sources
from puzzle.export.gguf_tokenizer import check_tokenizer
from puzzle.export.nemotron_nas import check_model
from puzzle.profiling.hardware import hardware
from puzzle.profiling.source import with_stand_ins
from puzzle.profiling.table import COMPILED_ENGINE, ENGINE, REST, SKIPPED
from puzzle.pruning import combinations, pruned_shape
from puzzle.report.pruning import DEVICE, EFFICIENCY, plan_text
from puzzle.run import GRID_AND_TOURNAMENT, Run
from puzzle.scoring.sampling import num_draws
from puzzle.search import mip
from puzzle.search.constraints import workloads
from puzzle.search.goal import goal_of, is_quality
from puzzle.search.halving import HALVING, num_distilled, num_rungs
from puzzle.search.meaning import meaning
from puzzle.search.metrics import METRICS
from puzzle.search.problem import Row
from puzzle.tables import CONTEXT, OF_BASE, ScoreTable
from puzzle.training_log import check_trackers
from puzzle.types import ConfigError, Costs, CostSetting, MissingMeasurementError, PuzzleError, Score
from puzzle.variants import flops_per_token, is_teacher, model_params, shape_id

TRAIN_FORWARDS = 3  # a backward pass costs about two forwards
ADAM_BYTES = 16  # per trained parameter: weight, gradient, two moments, fp32


def validate(run: Run) -> None:
    """ConfigError (or a more telling PuzzleError) with every problem found, one a line."""
    _raise(_problems(run, (*FILES, *SETTINGS, *(SEARCH if run.config.prune is None else PRUNING))))


def _problems(run: Run, checks: Sequence[Check]) -> list[PuzzleError]:
    problems: list[PuzzleError] = []
    found_teacher = _passes(lambda run: run.shape, run, problems)
    for needs_teacher, check in checks:
        if found_teacher or not needs_teacher:
            _passes(check, run, problems)
    return problems


def _raise(problems: Sequence[PuzzleError]) -> None:
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ConfigError("\n".join(map(str, problems)))


def _passes(check: Callable[[Run], object], run: Run, problems: list[PuzzleError]) -> bool:
    """Whether the check finds nothing; what it finds is added to ``problems``, once."""
    try:
        check(run)
        return True
    except PuzzleError as error:
        if str(error) not in map(str, problems):
            problems.append(error)
        return False


def _check_sequences(run: Run) -> None:
    asked, most = run.config.data.sequence_tokens, run.shape.max_position_embeddings
    if asked > most:
        raise ConfigError(f"data.sequence_tokens is {asked}, but the teacher takes at most {most} tokens; lower it")


def _check_tournament(run: Run) -> None:
    """Of a search or a pruning."""
    settings, kd = run.config.tournament, run.config.kd
    if not settings.candidates:
        return
    if kd.signal != "online":
        raise ConfigError(
            f"candidates compete beside the teacher itself, not its {kd.signal} signal; set kd.signal: online"
        )
    last = settings.tokens * HALVING ** (num_rungs(settings.candidates) - 1)
    if last >= kd.tokens:
        raise ConfigError(
            f"the tournament's last comparison is after {last:,} tokens, but kd.tokens is {kd.tokens:,}; lower "
            "tournament.tokens or tournament.candidates, or raise kd.tokens"
        )


def _check_answers(run: Run) -> None:
    """That the search gives the tournament as many as it asks for."""
    asked, there = run.config.tournament.candidates, run.constraint_file.solutions.count
    if (there := there + bool(run.config.refine.evaluations)) < asked:
        raise ConfigError(
            f"tournament.candidates is {asked}, but {run.constraints} asks for {there}; "
            f"say there solutions: {{count: {asked}}}"
        )


def _check_device(run: Run) -> None:
    if run.config.device in ("cuda", "mps"):
        from puzzle.teacher import Compute

        Compute.choose(run.config.device, run.config.dtype)


def _check_export(run: Run) -> None:
    """That the formats asked for can hold the teacher's layers, and be written here."""
    formats = plans.export_formats(run)
    if set(formats) - {"hf"}:
        check_model(read_json(run.teacher / "config.json"), run.shape)
    if "gguf" in formats:
        check_tokenizer(run.teacher)


def _check_tasks(run: Run) -> None:
    if run.config.evaluate.tasks:
        from puzzle.harness import Harness

        Harness(run.config.evaluate)


def _check_constraints(run: Run) -> None:
    of = functools.partial(
        Score,
        base_id="teacher",
        context_id="teacher",
        split="score",
        per_sequence=(0.0,),
        context_tokens=run.config.data.sequence_tokens,
    )
    scores = [
        of(item.id, metric=metric)
        for item in run.items
        for metric in (*(("kl",) if run.estimated else OBJECTIVES.values()), *run.config.score.tasks)
        if not is_teacher(item)
    ]
    tasks = set(run.config.score.tasks)
    asked = {goal_of(run.constraint_file, tasks).quality, *run.constraint_file.constraints}
    for name in sorted(name for name in asked if is_quality(name, tasks) and name != "kl_nats"):
        if run.estimated:
            raise ConfigError(f"{run.constraints}: {name} needs exact scores; set score.mode: exact")
    base = () if run.original is None else [of(CONTEXT, metric=metric) for metric in OF_BASE]
    table = ScoreTable.of(scores, base=base)
    programmes = search.problems(run.shape, run.items, table, _promised_costs(run), run.constraint_file)
    mip.best_of([replace(problem, rows=tuple(filter(_is_known, problem.rows))) for problem in programmes])


def _is_known(row: Row) -> bool:
    """Whether it bounds what follows from shapes alone: bytes and counts, not times and scores."""
    metric = METRICS.get(row.quantity.name.rpartition(".")[2])
    return metric is not None and not metric.phases


def _promised_costs(run: Run) -> Costs:
    """A cost of 1 ms at every point that ``profile`` will measure, on the device and in the dtype it will use.

    Where nothing is measured, the costs themselves.
    """
    if run.config.profile.backend != "measured":
        return run.read_costs()
    asked = (*run.constraint_file.constraints, run.constraint_file.objective)
    if run.config.device == "auto" and not any("_ms" in name or "_per_s" in name for name in asked):
        device, weights = "cpu", "fp32"  # no bound asks for a time: no need to find out what device there is
    else:
        device, weights = _profiled_device(run)
    shapes = {shape_id(spec, run.shape) for spec in run.specs}.difference(SKIPPED) | {REST}
    engine = COMPILED_ENGINE if run.config.profile.compile else ENGINE
    setting = CostSetting(device, weights, weights, 1, engine)
    rows = tuple(point.cost(name, setting, (1.0, 1.0, 1.0)) for point in run.grid_points for name in sorted(shapes))
    original = None if run.original is None else (run.original.shape, _promised_costs(run.original))
    return Costs(with_stand_ins(rows, run.config.profile.stand_in), original=original)


def _profiled_device(run: Run) -> tuple[str, str]:
    from puzzle.profiling.hardware import device_name
    from puzzle.teacher import Compute

    device = str(Compute.choose(run.config.device, run.config.dtype).device)
    auto = "bf16" if device.startswith("cuda") else "fp32"
    return device_name(device), auto if run.config.profile.weights == "auto" else run.config.profile.weights


def _check_pruning(run: Run) -> None:
    settings = run.config.prune
    assert settings is not None
    if run.config.refine.evaluations:
        raise ConfigError("refine is of a search, and this run is a pruning (prune:); leave it out")
    if (settings.grid is not None) != bool(run.config.tournament.candidates):
        raise ConfigError(GRID_AND_TOURNAMENT)
    asked = run.config.tournament.candidates
    found = combinations(settings, run.shape, asked)
    for one in found:
        pruned_shape(one, run.shape)
    if len(found) < asked:
        raise ConfigError(
            f"tournament.candidates is {asked}, but of prune.grid {len(found)} can compete; give more sizes (or a "
            f"larger within), or {f'candidates: {len(found)}' if len(found) > 1 else 'this one in prune itself'}"
        )
    workloads(run.constraint_file, run.shape)
    known = {*OBJECTIVES.values(), *run.config.score.tasks}
    if (metric := settings.layers_metric) not in known:
        raise ConfigError(f"prune.layers_metric: no score is called {metric!r}; there are {', '.join(sorted(known))}")


# what can be wrong, and whether looking for it takes a teacher that was found
Check = tuple[bool, Callable[[Run], object]]
FILES: tuple[Check, ...] = (
    (False, lambda run: check_sources(run.config.data.all_sources)),
    (False, _check_device),
    (False, lambda run: check_trackers(run.config.kd.report_to or ())),
    (True, lambda run: checkpoint.weight_files(run.teacher)),
    (True, lambda run: checkpoint.weight_files(run.distilling.teacher)),
    (True, lambda run: checkpoint.tokenizer_fingerprint(run.teacher)),
)
SETTINGS: tuple[Check, ...] = (
    (False, lambda run: run.constraint_file),
    (False, _check_tasks),
    (True, _check_sequences),
    (True, lambda run: run.distilling),
)
SEARCH: tuple[Check, ...] = (
    (False, _check_tournament),
    (False, _check_answers),
    (True, lambda run: run.items),
    (True, lambda run: run.cost_source),
    (True, _check_export),
    (True, _check_constraints),
)
PRUNING: tuple[Check, ...] = ((False, _check_tournament), (True, _check_pruning))


def dry_run(run: Run) -> str:
    """The units that would be made, and a rough estimate of time, disk and memory.

    Where the teacher's config.json is all there is: what a pruning comes to, or what a search's limits mean.
    """
    if run.config.prune is not None:
        return _dry_pruning(run)
    _raise(_problems(run, (*SETTINGS, *SEARCH)))
    if missing := _problems(run, FILES):
        return "\n".join([*_search_plan(run), "before it can run:", *(f"  {problem}" for problem in missing)])
    rate = _matmul_flops_per_s(run)
    lines, units = _to_do(run, rate)
    library = 2 * STORED_DTYPES[run.stored_dtype] * sum(run.unit_params(unit) for unit in run.units)
    teacher = model_params(run.shape)
    memory = 4 * model_params(run.distilling.shape) + (4 + ADAM_BYTES) * teacher  # GKD: a student hardly smaller
    disk = (library + 4 * 8 * teacher) / 2**30
    lines.append(f"{disk:.2f} GiB of disk, {memory / 2**30:.2f} GiB of memory, and activations")
    return "\n".join([*lines, "units:", *units])


def _search_plan(run: Run) -> list[str]:
    """What the limits mean for the teacher, and GPU-hours of the stages, both without its weights."""
    try:
        costs = run.read_costs()
    except MissingMeasurementError:  # said again for each bound that needs one
        costs = Costs()
    sheet = hardware(DEVICE)
    rate = sheet.matmul_flops_per_s("bf16") * EFFICIENCY
    limits = meaning(run.shape, run.items, costs, run.constraint_file, run.config.score.tasks)
    lines = [*limits, "", f"{len(run.items)} items at {len(run.shape.sites)} sites, {len(run.units)} units to train"]
    for stage in pipeline.stages_of(run):
        if flops := _stage_flops(run, stage.name):
            lines.append(f"{stage.name:<12}{flops:>12.3g} FLOPs{flops / rate / 3600:>12,.0f} GPU-hours")
    return [*lines, f"at {EFFICIENCY:.0%} of {sheet.matmul_flops_per_s('bf16') / 1e12:,.0f} TFLOP/s ({DEVICE})", ""]


def _to_do(run: Run, rate: float) -> tuple[list[str], list[str]]:
    """A table of the stages with their minutes at ``rate`` FLOP/s, and the units that are missing."""
    lines = [f"{'stage':<12}{'to do':>8}{'of':>8}{'minutes':>10}"]
    units: list[Path] = []
    total = 0.0
    for stage in pipeline.stages_of(run):
        planned = stage.plan(run)
        to_do = [unit for unit in planned if pipeline.unit_state(unit) != "done"]
        units += [unit.path for unit in to_do]
        minutes = _stage_flops(run, stage.name) * len(to_do) / max(1, len(planned)) / (rate * EFFICIENCY) / 60
        total += minutes
        lines.append(f"{stage.name:<12}{len(to_do):>8}{len(planned):>8}{minutes:>10.1f}")
    lines.append(
        f"about {total:.1f} minutes at {rate * EFFICIENCY / 1e9:,.0f} GFLOP/s ({EFFICIENCY:.0%} of a measured matmul)"
    )
    if run.config.prune is None and run.config.init.start == "best":
        lines.append(
            "without init's closed-form solves, which grow with the cube of the FFN's width; init.start: paper has none"
        )
    return lines, _by_folder(units)


def _by_folder(units: Iterable[Path]) -> list[str]:
    """A line for each folder, with its units or, of many, the first and the last: a library has thousands."""
    lines = []
    for folder, paths in groupby(units, key=lambda path: path.parent):
        names = [path.name for path in paths]
        listed = ", ".join(names) if len(names) <= 3 else f"{len(names)} units, {names[0]} to {names[-1]}"
        lines.append(f"  {folder}: {listed}")
    return lines


def _dry_pruning(run: Run) -> str:
    _raise(_problems(run, (*SETTINGS, *PRUNING)))
    lines = [plan_text(run), ""]
    if missing := _problems(run, FILES):
        return "\n".join([*lines, "before it can run:", *(f"  {problem}" for problem in missing)])
    table, units = _to_do(run, _matmul_flops_per_s(run))
    return "\n".join([*lines, *table, "units:", *units])


def _stage_flops(run: Run, stage: str) -> float:
    """Forward and backward FLOPs of one whole stage; what does not compute with the model counts as nothing."""
    tokens = run.config.data.sequence_tokens
    trained = [item for items in run.units.values() for item in items]
    variant = sum(flops_per_token(spec, run.shape, tokens / 2) for item in trained for spec in item.specs)
    head, forward = _forward_flops(run)
    distilling = _forward_flops(run.distilling)[1]
    one_pass = forward * (2 + num_draws(run.config.score.sequences)) + variant if run.estimated else 0.0
    several = [len(item.layers) > 1 for item in run.items]  # those are never estimated
    exact = sum(several) if run.estimated else sum(not is_teacher(item) for item in run.items)
    per_token = {
        "init": 2 * forward + variant,
        "importance": 2 * forward,
        "prune": 4 * forward * (run.config.init.start == "best"),
        "distill": TRAIN_FORWARDS * variant * (1.5 if run.config.distill.loss_at == "layer" else 1) + forward,
        "score": one_pass + (forward / 2 + head) * exact,
        "tournament": distilling + TRAIN_FORWARDS * forward,  # the student counted as large as the teacher
        "kd": distilling + TRAIN_FORWARDS * forward,
        "evaluate": 6 * forward + (3 * (forward + distilling) if run.distilling is not run else 0.0),
    }
    count = {
        "init": run.config.init.sequences * tokens,
        "importance": run.config.init.sequences * tokens,
        "prune": run.config.init.sequences * tokens,
        "distill": run.config.distill.tokens,
        "score": run.config.score.sequences * tokens,
        "tournament": run.config.tournament.tokens * num_distilled(run.config.tournament.candidates),
        "kd": run.config.kd.tokens,
        "evaluate": run.config.evaluate.sequences * tokens,
    }
    return per_token.get(stage, 0.0) * count.get(stage, 0)


def _forward_flops(run: Run) -> tuple[float, float]:
    """Of the teacher for a token: its head's alone, and all."""
    seen = run.config.data.sequence_tokens / 2
    head = 2 * run.shape.vocab_size * run.shape.hidden_size
    return head, sum(flops_per_token(spec, run.shape, seen) for spec in run.keep_specs) + head


def _matmul_flops_per_s(run: Run) -> float:
    import torch

    from puzzle.teacher import Compute

    compute = Compute.choose(run.config.device, run.config.dtype)
    dtype = torch.bfloat16 if compute.bf16 else torch.float32
    size = 1024 if compute.device.type == "cpu" else 4096
    left = torch.randn(size, size, device=compute.device, dtype=dtype)
    seconds = []
    for _ in range(10):  # the best round: others had company, or were the first
        started = time.perf_counter()
        (left @ left).sum().item()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)
