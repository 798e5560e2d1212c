"""Uniform pruning of width and depth: the student's sizes, and which layers stay. Pure.

Heads go by whole KV groups, within groups, or both: a student of H' query heads on K' KV heads keeps K' of the
teacher's groups and H'/K' query heads in each. The size of a head stays, and with it RoPE and QK-norms.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from puzzle.checkpoint import FAMILIES
from puzzle.config import ConstraintFile, ProfileConfig, PruneConfig
from puzzle.profiling.hardware import HARDWARE
from puzzle.profiling.source import CostSource
from puzzle.search.constraints import workloads
from puzzle.search.metrics import Setting, known_quantities
from puzzle.space import hardware_multiple
from puzzle.types import ConfigError, ModelShape
from puzzle.variants import keep_spec, model_params, site_item


def num_dropped(settings: PruneConfig, shape: ModelShape) -> int:
    """How many layers go. ConfigError where the teacher has too few, or a list of them says otherwise."""
    listed, layers = settings.layers_by, shape.num_layers
    if not isinstance(listed, tuple):
        return layers - _size("num_layers", settings.num_layers, layers)
    if beyond := [layer for layer in listed if layer >= layers]:
        raise ConfigError(f"prune.layers_by: the teacher has layers 0 to {layers - 1}, not {beyond[0]}")
    left = layers - len(listed)
    if not left or settings.num_layers not in (None, left):
        raise ConfigError(
            f"prune.layers_by drops {len(listed)} of {layers} layers, which leaves {left}; "
            + (f"leave out num_layers, or set it to {left}" if left else "leave some")
        )
    return len(listed)


def kept_layers(settings: PruneConfig, shape: ModelShape, scores: Mapping[int, float]) -> tuple[int, ...]:
    """The layers that stay. ``scores``: by layer, what leaving it out costs, or a run of them from it on (contiguous).

    Of equal scores the later layer goes. A list of layers, or keeping all, needs no scores.
    """
    count = num_dropped(settings, shape)
    if isinstance(settings.layers_by, tuple):
        dropped = set(settings.layers_by)
    elif settings.layers_by == "contiguous" and count:
        first = min(scores, key=lambda layer: (scores[layer], -layer))
        dropped = set(range(first, first + count))
    else:
        dropped = set(sorted(scores, key=lambda layer: (scores[layer], -layer))[:count])
    return tuple(layer for layer in range(shape.num_layers) if layer not in dropped)


def pruned_shape(settings: PruneConfig, shape: ModelShape, layers: tuple[int, ...] | None = None) -> ModelShape:
    """The student's sizes; ``layers`` are those that stay, and where that is not known yet, the first ones.

    ConfigError, in one line, for sizes that no student of the family can have.
    """
    left = shape.num_layers - num_dropped(settings, shape)
    layers = layers or tuple(range(left))
    assert len(layers) == left
    if shape.moe_layers and settings.intermediate_size is not None:
        raise ConfigError(
            "prune.intermediate_size: the teacher's FFNs are experts, which keep their widths; leave it out (hidden "
            "size, heads and layers can go)"
        )
    heads, kv_heads = _heads(settings, shape)
    hidden = _width("hidden_size", settings.hidden_size, shape.hidden_size)
    if hidden % heads and FAMILIES[shape.family].hidden_by_heads:
        raise ConfigError(
            f"prune: {heads} query heads do not divide a hidden size of {hidden}, which a {shape.family} model must "
            f"have, whatever the size of a head; take {hidden // heads * heads} or another number of heads"
        )
    windows = tuple(shape.window(layer) for layer in layers)
    return replace(
        shape,
        num_layers=left,
        hidden_size=hidden,
        intermediate_size=_width("intermediate_size", settings.intermediate_size, shape.intermediate_size),
        num_attention_heads=heads,
        num_kv_heads=kv_heads,
        windows=windows if any(windows) else (),
        moe_layers=tuple(place for place, layer in enumerate(layers) if layer in shape.moe_layers),
    )


def _heads(settings: PruneConfig, shape: ModelShape) -> tuple[int, int]:
    """Query and KV heads."""
    asked, asked_kv = settings.num_attention_heads, settings.num_key_value_heads
    each = shape.num_attention_heads // shape.num_kv_heads
    heads = _size("num_attention_heads", asked, shape.num_attention_heads)
    kv_heads = _size("num_key_value_heads", asked_kv, shape.num_kv_heads)
    if asked is None:
        heads = kv_heads * each
    elif asked_kv is None and each == 1:
        kv_heads = heads
    if heads % kv_heads or heads // kv_heads > each:
        raise ConfigError(
            f"prune: {heads} query heads cannot share {kv_heads} KV heads; num_attention_heads must be 1 to {each} "
            f"(the teacher's) times num_key_value_heads: give both, or other numbers"
        )
    return heads, kv_heads


def _width(name: str, asked: int | str | None, most: int) -> int:
    return _size(name, asked, most, hardware_multiple(most))


def _size(name: str, asked: int | str | None, most: int, multiple: int = 1) -> int:
    """``asked`` in numbers; percentages are rounded to whole multiples."""
    if asked is None:
        return most
    if isinstance(asked, str):
        asked = max(1, round(float(asked.rstrip("% ")) / 100 * most / multiple)) * multiple
    if asked > most:
        raise ConfigError(f"prune.{name} is {asked}, but the teacher has {most}; give at most that, or leave it out")
    return asked


def combinations(settings: PruneConfig, shape: ModelShape, count: int) -> tuple[PruneConfig, ...]:
    """At most ``count`` of the grid, the nearest to its ``params`` first; the settings alone where there is no grid.

    Combinations that no student of the family can have are left out, and so are those of sizes that came before.
    ConfigError where none is left, or one of the sizes is beyond the teacher's.
    """
    grid = settings.grid
    if grid is None:
        return (settings,)
    for name, sizes in grid.axes.items():
        for size in sizes:
            _size(f"grid.{name}", size, getattr(shape, name.replace("key_value", "kv")))
    of_shape: dict[ModelShape, PruneConfig] = {}
    refused: ConfigError | None = None
    for choice in itertools.product(*grid.axes.values()):
        one = settings.model_copy(update={"grid": None, **dict(zip(grid.axes, choice, strict=True))})
        try:
            of_shape.setdefault(pruned_shape(one, shape), one)
        except ConfigError as error:
            refused = error
    if not of_shape:
        assert refused is not None
        raise refused
    if grid.params is None:
        return tuple(of_shape.values())[:count]
    target = _size("grid.params", grid.params, model_params(shape))
    distances = {one: abs(model_params(one) - target) for one in of_shape}
    near = sorted((one for one in of_shape if distances[one] <= grid.within * target), key=distances.__getitem__)
    if not near:
        nearest = model_params(min(of_shape, key=distances.__getitem__))
        raise ConfigError(
            f"prune.grid: no combination has {target:,} parameters, {grid.within:.0%} more or less (the nearest has "
            f"{nearest:,}); give more sizes, or another params"
        )
    return tuple(of_shape[one] for one in near[:count])


SIZES = {
    "num_layers": "layers",
    "hidden_size": "hidden size",
    "intermediate_size": "FFN channels",
    "num_attention_heads": "query heads",
    "num_kv_heads": "KV heads",
}


def change(teacher: ModelShape, student: ModelShape) -> str:
    """``hidden size 4096 → 3072, FFN channels 14336 → 9216``."""
    sizes = {label: (getattr(teacher, name), getattr(student, name)) for name, label in SIZES.items()}
    changed = [f"{label} {old} → {new}" for label, (old, new) in sizes.items() if old != new]
    return ", ".join(changed) or "nothing pruned"


def predicted(shape: ModelShape, file: ConstraintFile) -> dict[str, float]:
    """Metrics of a whole model at the file's workloads, at their first batch sizes.

    Times are estimates, and only of workloads whose device has a hardware sheet.
    """
    items = tuple(site_item(site, keep_spec(shape, site)) for site in shape.sites)
    specs = tuple({spec: None for item in items for spec in item.specs})
    served = workloads(file, shape)
    known = tuple(workload for workload in served if workload.device in HARDWARE)
    costs = CostSource(ProfileConfig(backend="roofline"), Path(), shape, specs, (), {}, known).estimates
    settings = [Setting(shape, workload, workload.batch_sizes[0], costs) for workload in served]
    ids = [item.id for item in items]
    return {one.name: float(one.value(ids)) for one in known_quantities(Setting(shape), settings, items)}
