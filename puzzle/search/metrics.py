"""What can be bounded: one registry of metrics, each a sum over sites (or a rate over such a sum). Pure.

Reads bytes from shapes (profiling.memory) and milliseconds from measured tables (profiling.table); writes nothing.

    memory = weights + KV cache at isl + osl + workspace          (GiB, on one GPU)
    e2e    = ttft + (osl - 1) * tpot                              (ms)
    output_tok_per_s = batch * osl / e2e,   total_tok_per_s = batch * (isl + osl) / e2e,   req_per_s = batch / e2e
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from puzzle import variants
from puzzle.capabilities import served_as
from puzzle.profiling import memory
from puzzle.profiling.table import REST, CostTable
from puzzle.search.problem import Quantity
from puzzle.types import (
    GIB,
    AttentionSpec,
    Costs,
    FfnSpec,
    Item,
    MissingMeasurementError,
    ModelShape,
    Part,
    Phase,
    Spec,
    Target,
    Workload,
)

DEFAULT_DTYPE = "bf16"  # of weights_gib when the file has no workload


@dataclass(frozen=True)
class Setting:
    """One workload at one batch size; ``workload`` None is the model by itself.

    ``serve_on``: runtimes whose forms of the variants cost (capabilities.py): the workload's own where it is among
    them, else, item by item, the dearest. Empty: the variants as they are, as always where times were measured.
    """

    shape: ModelShape
    workload: Workload | None = None
    batch_size: int = 1
    costs: Costs = field(default=Costs(), repr=False)
    serve_on: tuple[Target, ...] = ()

    def forms(self, item: Item) -> set[tuple[Spec, ...]]:
        """The blocks whose costs are the item's, once per form."""
        own = self.workload.runtime.removesuffix("-compiled") if self.workload else ""
        targets = [target for target in self.serve_on if target == own] or self.serve_on
        return {served_as(item, target, self.shape) for target in targets} or {item.specs}

    @property
    def served(self) -> Workload:
        assert self.workload is not None, "this metric needs a workload"
        return self.workload

    @cached_property
    def table(self) -> CostTable:
        return CostTable.for_workload(self.costs, self.served)


# one spec's share of a metric; None asks for the part that no variant changes (embedding, final norm, head)
Share = Callable[[Setting, Spec | None], float]


def _weights_gib(setting: Setting, spec: Spec | None) -> float:
    dtype, tp = (setting.workload.weights, setting.workload.tp) if setting.workload else (DEFAULT_DTYPE, 1)
    if spec is None:
        return memory.rest_weight_bytes(setting.shape, dtype, tp) / GIB
    return memory.weight_bytes(spec, setting.shape, dtype, tp) / GIB


def _kv_cache_gib(setting: Setting, spec: Spec | None) -> float:
    if spec is None:
        return 0.0
    return memory.kv_cache_bytes(spec, setting.shape, setting.served, setting.batch_size) / GIB


def _memory_gib(setting: Setting, spec: Spec | None) -> float:
    held = _weights_gib(setting, spec) + _kv_cache_gib(setting, spec)
    if spec is not None:
        return held + memory.added_workspace_bytes(spec, setting.shape, setting.served, setting.batch_size) / GIB
    return held + memory.workspace_bytes(setting.shape, setting.served, setting.batch_size) / GIB


def _ttft_ms(setting: Setting, spec: Spec | None) -> float:
    return setting.table.prefill_ms(_shape_id(setting, spec), setting.batch_size, setting.served.isl)


def _tpot_ms(setting: Setting, spec: Spec | None) -> float:
    served = setting.served
    return setting.table.decode_ms(_shape_id(setting, spec), setting.batch_size, served.isl, served.osl)


def _e2e_ms(setting: Setting, spec: Spec | None) -> float:
    steps = setting.served.osl - 1
    return _ttft_ms(setting, spec) + (steps * _tpot_ms(setting, spec) if steps else 0.0)


def _shape_id(setting: Setting, spec: Spec | None) -> str:
    return REST if spec is None else variants.shape_id(spec, setting.shape)


def _params(setting: Setting, spec: Spec | None) -> float:
    return variants.rest_params(setting.shape) if spec is None else variants.params(spec, setting.shape)


def _active_params(setting: Setting, spec: Spec | None) -> float:
    return variants.rest_params(setting.shape) if spec is None else variants.active_params(spec, setting.shape)


def _layers_with(part: Part) -> Share:
    """1 where the layer still has a real one: neither skipped nor a plain matrix."""
    kind = AttentionSpec if part == "attention" else FfnSpec

    def share(setting: Setting, spec: Spec | None) -> float:
        return float(isinstance(spec, kind) and spec.kind not in ("linear", "skip"))

    return share


def _kv_heads(setting: Setting, spec: Spec | None) -> float:
    return 0.0 if spec is None else float(variants.num_kv_heads(spec, setting.shape))


@dataclass(frozen=True)
class Metric:
    """``scalar``: what a bare number bounds. ``workload``: whether the metric is one of a workload.

    ``phases``: those whose times it rests on. ``tokens`` makes it a rate: so many (of a workload, at a batch size) per
    second of the share's milliseconds. ``structure``: it tells of the variants themselves, in whatever form they run.
    """

    unit: str
    scalar: Literal["min", "max"]
    workload: Literal["needed", "if given", "none"]
    share: Share
    phases: tuple[Phase, ...] = ()
    tokens: Callable[[Workload, int], int] | None = None
    whole: bool = False
    structure: bool = False


BOTH: tuple[Phase, ...] = ("prefill", "decode")
METRICS: dict[str, Metric] = {
    "memory_gib": Metric("GiB", "max", "needed", _memory_gib),
    "weights_gib": Metric("GiB", "max", "if given", _weights_gib),
    "kv_cache_gib": Metric("GiB", "max", "needed", _kv_cache_gib),
    "ttft_ms": Metric("ms", "max", "needed", _ttft_ms, ("prefill",)),
    "tpot_ms": Metric("ms", "max", "needed", _tpot_ms, ("decode",)),
    "e2e_ms": Metric("ms", "max", "needed", _e2e_ms, BOTH),
    "output_tok_per_s": Metric("tok/s", "min", "needed", _e2e_ms, BOTH, lambda served, batch: batch * served.osl),
    "total_tok_per_s": Metric(
        "tok/s", "min", "needed", _e2e_ms, BOTH, lambda served, batch: batch * served.context_tokens
    ),
    "req_per_s": Metric("req/s", "min", "needed", _e2e_ms, BOTH, lambda served, batch: batch),
    "params": Metric("parameters", "max", "none", _params, whole=True),
    "active_params": Metric("parameters", "max", "none", _active_params, whole=True),
    "layers_with_attention": Metric("layers", "min", "none", _layers_with("attention"), whole=True, structure=True),
    "layers_with_ffn": Metric("layers", "min", "none", _layers_with("ffn"), whole=True, structure=True),
    "kv_heads_total": Metric("heads", "max", "none", _kv_heads, whole=True, structure=True),
}


def quantity(name: str, setting: Setting, items: Iterable[Item]) -> Quantity:
    """The metric ``name`` of an architecture of ``items``. MissingMeasurementError where a time was not measured."""
    metric = METRICS[name]
    of_workload = metric.workload != "none" and setting.workload is not None
    numerator = 1000.0 * metric.tokens(setting.served, setting.batch_size) if metric.tokens else None
    estimated = bool(metric.phases) and setting.table.estimated
    as_is = metric.structure or (bool(metric.phases) and not estimated)  # times are measured of what is there
    shares: dict[Spec, float] = {}  # layers share shapes: thousands of items, a dozen shapes
    coefficients = {}
    for item in items:
        forms = {item.specs} if as_is else setting.forms(item)
        for spec in {spec for form in forms for spec in form}.difference(shares):
            shares[spec] = metric.share(setting, spec)
        coefficients[item.id] = max(math.fsum(shares[spec] for spec in form) for form in forms)
    return Quantity(
        name=f"{setting.served.name}.{name}" if of_workload else name,
        unit=f"{metric.unit}, estimated" if estimated else metric.unit,
        coefficients=coefficients,
        constant=metric.share(setting, None),
        numerator=numerator,
        whole=metric.whole,
        margin=setting.table.margin(metric.phases) if metric.phases else 0.0,
        estimated=estimated,
    )


def known_quantities(alone: Setting, settings: Sequence[Setting], items: Sequence[Item]) -> tuple[Quantity, ...]:
    """Every metric that can be computed: the model's own, then each workload's. What was not measured is absent."""
    names = [name for name, metric in METRICS.items() if metric.workload == "none"]
    if not settings:
        names += [name for name, metric in METRICS.items() if metric.workload == "if given"]
    found = [quantity(name, alone, items) for name in names]
    for setting in settings:
        found.append(Quantity(f"{setting.served.name}.batch_size", "sequences", {}, setting.batch_size, whole=True))
        for name, metric in METRICS.items():
            if metric.workload != "none":
                try:
                    found.append(quantity(name, setting, items))
                except MissingMeasurementError:
                    continue  # only bounded metrics must be measured, and those were asked for before
    return tuple(found)
