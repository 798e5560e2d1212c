"""Times every distinct shape of a search space, and whole models, at one point of the grid.

Reads a teacher's PuzzleConfig and specs; random weights suffice. Gives Cost records and Timings; writes nothing.

Shapes are timed in place, inside the forward of a real heterogeneous model that holds each of them once in a layer of
its own (norms, operation, residual add), next to two of the teacher's whole layers (of the kind it has most of):

* CPU and others: one forward per round, the layers in a new random order each time, a clock reading between any two.
  So all shapes share a round's drift, meet all kinds of neighbours, and none runs twice in a row.
* CUDA: CUDA graphs of [teacher, site, teacher] minus [teacher, teacher]. Events inside a graph are nodes between which
  kernels cannot overlap, and cost about as much as a small kernel; a difference telescopes to the whole model's graph.

What no site accounts for is "rest": embedding, rotary tables, mask, final norm, head on one token per sequence, and
what the forward costs in Python, including the call of as many (empty) layers as the teacher has. It is measured as the
whole forward minus its sites, so that by construction rest + sites is the whole, for that model at least. Where noise
is one-sided (a busy CPU) the medians of many short pieces still add up to some percent less than the whole's median.

Shapes: B batch, T new tokens, V vocabulary.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM
from puzzle.modeling.configuration_puzzle import Span
from puzzle.profiling.device import device_name
from puzzle.profiling.grid import GridPoint
from puzzle.profiling.kv_cache import PreallocatedCache, Slot
from puzzle.profiling.table import REST, SKIPPED
from puzzle.profiling.timer import Clock, Timing, graph_pool, make_clock, synchronize
from puzzle.types import GIB, AttentionSpec, ConfigError, Cost, Gap, ModelShape, Part, Site, Spec
from puzzle.variants import block_part, keep_spec, resolve, shape_id

Dtype = Literal["fp32", "bf16"]
TORCH_DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
ENGINE = "transformers"
PARTS: tuple[Part, Part] = ("attention", "ffn")
NUM_NEIGHBOURS = 2  # whole layers of the teacher around the sites
NUM_EMPTY = 2  # layers without a site, whose time is what calling a layer costs
WARMUP_ROUNDS = 2
ROUNDS_AGAIN = 4  # times as many, where a time was lost in noise
BUSY_BYTES = GIB  # what others may hold of a GPU's memory before we say so
DETAILS = ("norm", "head")


class PointTooLargeError(ConfigError):
    """A grid point that does not fit in the device's memory."""


class Probe(Protocol):
    """Something that a round of measurement runs once: milliseconds by name."""

    def run(self, rng: random.Random) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class SiteStack:
    """A model with random weights that holds every distinct shape once, in a layer of its own; one per profile."""

    shape: ModelShape
    model: PuzzleForCausalLM
    device: str
    dtype: Dtype
    sites: Mapping[str, nn.Module]  # shape_id → the layer with that site alone
    neighbours: tuple[nn.Module, ...]
    neighbour_ids: tuple[str, str]  # shape_id of either part of a neighbour
    empty: tuple[nn.Module, ...]

    @classmethod
    def build(
        cls, shape: ModelShape, config: PuzzleConfig, specs: Iterable[Spec], device: str, dtype: Dtype, seed: int = 0
    ) -> SiteStack:
        """``config`` is the teacher's (its blocks do not matter); ``specs``, resolved, may repeat and need no keep."""
        typical = _typical_layer(shape)
        keep_specs = [keep_spec(shape, Site(typical, part)) for part in PARTS]
        by_shape = {shape_id(spec, shape): spec for spec in (*keep_specs, *specs)}
        distinct = {name: spec for name, spec in by_shape.items() if name not in SKIPPED}
        keep, skip = {"kind": "keep"}, {"kind": "skip"}
        blocks = [{"attention": keep, "ffn": keep}] * NUM_NEIGHBOURS
        blocks += [{"attention": skip, "ffn": skip, _part(spec): block_part(spec)} for spec in distinct.values()]
        blocks += [{"attention": skip, "ffn": skip}] * NUM_EMPTY
        kinds = [typical] * NUM_NEIGHBOURS + [_layer_for(spec, shape) for spec in distinct.values()]
        model = random_model(config, blocks, device, dtype, seed, layers=kinds + [typical] * NUM_EMPTY)
        layers = tuple(model.model.layers)
        first_empty = NUM_NEIGHBOURS + len(distinct)
        sites = dict(zip(distinct, layers[NUM_NEIGHBOURS:first_empty], strict=True))
        del model.model.layers  # from now on a plain list, set anew for every forward
        attention, ffn = (shape_id(spec, shape) for spec in keep_specs)
        neighbours, empty = layers[:NUM_NEIGHBOURS], layers[first_empty:]
        return cls(shape, model, device, dtype, sites, neighbours, (attention, ffn), empty)

    def step(self, point: GridPoint) -> ForwardStep:
        """The forward that sites are timed in. It makes the teacher's masks, so they are part of the rest; those of
        other windows, which layers share, would be counted for models that have none, so they are there already."""
        own = {(self.shape.window(layer), 0) for layer in range(self.shape.num_layers)}
        return ForwardStep(self.model, point, ready_spans=[span for span in self.model.model.slots if span not in own])

    def use_layers(self, layers: Sequence[Callable[..., torch.Tensor]]) -> None:
        """Makes the next forward run through ``layers`` in this order."""
        self.model.model.layers = list(layers)


def _part(spec: Spec) -> str:
    return "attention" if isinstance(spec, AttentionSpec) else "ffn"


def _typical_layer(shape: ModelShape) -> int:
    """The first layer of the kind that the teacher has most of."""
    kinds = [(shape.window(layer), layer in shape.moe_layers) for layer in range(shape.num_layers)]
    return kinds.index(Counter(kinds).most_common(1)[0][0])


def _layer_for(spec: Spec, shape: ModelShape) -> int:
    """A layer of the teacher that can have ``spec``, which is resolved."""
    layers = [layer for layer in range(shape.num_layers) if resolve(spec, shape, layer) == spec]
    assert layers, f"{spec} is not resolved"
    return layers[0]


def random_model(
    config: PuzzleConfig,
    blocks: Sequence[Mapping[str, Any]],
    device: str,
    dtype: Dtype,
    seed: int = 0,
    layers: Sequence[int] | None = None,
) -> PuzzleForCausalLM:
    """A model of the teacher's sizes with ``blocks`` for layers and random weights, made on ``device``.

    ``layers``: of which of the teacher's layers the kind (window, experts) each block is; default: as they come.
    """
    if dtype not in TORCH_DTYPES:
        raise ConfigError(f"cannot measure with weights in {dtype!r}; allowed: {', '.join(TORCH_DTYPES)}")
    stack_config = config.with_layers(range(len(blocks)) if layers is None else layers, blocks)
    devices = [torch.device(device)] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(seed)
        model: PuzzleForCausalLM = AutoModelForCausalLM.from_config(
            stack_config, dtype=TORCH_DTYPES[dtype], attn_implementation="sdpa"
        )
    model.eval()  # type: ignore[no-untyped-call]
    return model


class ForwardStep:
    """One prefill or decode step of a whole model, repeatable: each call finds the cache as the first one did.

    Masks are made anew in every step, as in use, but for those of ``ready_spans``.
    """

    def __init__(
        self, model: PuzzleForCausalLM, point: GridPoint, seed: int = 0, ready_spans: Iterable[Span] = ()
    ) -> None:
        config, weight = model.config, model.lm_head.weight
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._model = model
        self.cache = PreallocatedCache(_slots(config), head_dim, point, weight, seed)
        generator = torch.Generator().manual_seed(seed)
        size = (point.batch_size, point.new_tokens)
        self._input_ids = torch.randint(config.vocab_size, size, generator=generator).to(weight.device)  # (B, T)
        positions = torch.arange(point.cached_tokens, point.total_tokens, device=weight.device)
        self._position_ids = positions.unsqueeze(0)  # (1, T)
        self._like = weight.new_empty(*size, 0)
        self._ready_masks = self._masks(ready_spans)
        self._made_spans = [span for span in model.model.slots if span not in self._ready_masks]

    def _masks(self, spans: Iterable[Span]) -> dict[Span, Any]:
        masks: dict[Span, Any] = self._model.model.masks(self._like, None, self.cache, self._position_ids, spans)
        return masks

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:  # (B, 1, V)
        output = self._model(
            input_ids=self._input_ids,
            attention_mask={**self._masks(self._made_spans), **self._ready_masks},
            position_ids=self._position_ids,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits
        return logits


def _slots(config: PuzzleConfig) -> list[Slot]:
    """The cache slots of the model, each as large as PuzzleModel.new_cache lets it become."""
    slots = []
    for layer in range(config.num_hidden_layers):
        heads, (window, sinks) = config.num_kv_heads(layer), config.span(layer)
        if heads is not None:
            slots.append(Slot(heads, window, sinks))
    return slots


class ModelProbe:
    """A whole model, under ``name``."""

    def __init__(self, name: str, model: PuzzleForCausalLM, point: GridPoint) -> None:
        self._name = name
        self._clock = make_clock(ForwardStep(model, point), str(model.lm_head.weight.device))

    def run(self, rng: random.Random) -> Mapping[str, float]:
        return {self._name: self._clock()}


class DetailProbe:
    """What sites and the rest consist of, timed alone, for people who want to know where the time goes: one norm over
    all tokens, and the head on one token of each sequence. No model's time is made of these."""

    def __init__(self, stack: SiteStack, point: GridPoint) -> None:
        model, weight = stack.model, stack.model.lm_head.weight
        size = (point.batch_size, point.new_tokens, weight.shape[1])
        hidden = torch.zeros(size, dtype=weight.dtype, device=weight.device)

        def work(module: nn.Module, inputs: torch.Tensor) -> Callable[[], object]:
            return torch.no_grad()(lambda: module(inputs))

        self._clocks = {
            "norm": make_clock(work(model.model.norm, hidden), stack.device),
            "head": make_clock(work(model.lm_head, hidden[:, -1:]), stack.device),
        }

    def run(self, rng: random.Random) -> Mapping[str, float]:
        return {name: clock() for name, clock in self._clocks.items()}


class MarkedSites:
    """All sites of a stack by clock readings between its layers, one forward per round; for devices without graphs."""

    def __init__(self, stack: SiteStack, point: GridPoint) -> None:
        self._stack = stack
        self._step = stack.step(point)

    def run(self, rng: random.Random) -> Mapping[str, float]:
        stack, readings = self._stack, _Readings(self._stack.device)
        layers = [readings.marked(name, layer) for name, layer in stack.sites.items()]
        layers += [readings.marked("neighbour", layer) for layer in stack.neighbours]
        layers += [readings.marked("empty", layer) for layer in stack.empty]
        rng.shuffle(layers)
        stack.use_layers(layers)
        start = readings.now_ms()
        self._step()
        total = readings.now_ms() - start
        spent = readings.spent_ms
        empty = sum(spent["empty"]) / len(spent["empty"])
        rest = total - sum(map(sum, spent.values())) + stack.shape.num_layers * empty
        return {REST: rest} | {name: spent[name][0] - empty for name in stack.sites}


class _Readings:
    """Milliseconds spent in each marked layer of one forward."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.spent_ms: dict[str, list[float]] = {}

    def now_ms(self) -> float:
        synchronize(self._device)
        return time.perf_counter_ns() / 1e6

    def marked(self, name: str, layer: nn.Module) -> Callable[..., torch.Tensor]:
        spent = self.spent_ms.setdefault(name, [])

        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            start = self.now_ms()
            output: torch.Tensor = layer(*args, **kwargs)
            spent.append(self.now_ms() - start)
            return output

        return call


class GraphedSites:
    """All sites of a stack as differences of CUDA graphs: [teacher, site, teacher] minus [teacher, teacher]."""

    def __init__(self, stack: SiteStack, point: GridPoint) -> None:
        step = stack.step(point)
        self._keep = stack.neighbour_ids
        self._clocks: dict[str, Clock] = {}
        first, last = stack.neighbours
        # each graph's activations are dead when it ends, and those of a long prompt would not fit a dozen times
        pool = graph_pool()
        for name, between in {"neighbours": [], **{name: [site] for name, site in stack.sites.items()}}.items():
            stack.use_layers([first, *between, last])
            self._clocks[name] = make_clock(step, stack.device, pool)

    def run(self, rng: random.Random) -> Mapping[str, float]:
        order = list(self._clocks)
        rng.shuffle(order)
        spent = {name: self._clocks[name]() for name in order}
        base = spent.pop("neighbours")
        sites = {name: ms - base for name, ms in spent.items()}
        return {REST: base - NUM_NEIGHBOURS * sum(sites[name] for name in self._keep), **sites}


def site_probe(stack: SiteStack, point: GridPoint) -> Probe:
    """What measures all sites of the stack and the rest at one point; PointTooLargeError if the point does not fit."""
    try:
        return (GraphedSites if stack.device.startswith("cuda") else MarkedSites)(stack, point)
    except torch.OutOfMemoryError:
        raise PointTooLargeError(_too_large(stack.device, point)) from None


def _too_large(device: str, point: GridPoint) -> str:
    """Says, too, what others hold of a GPU: it may be busy rather than small."""
    message = (
        f"{point.id} does not fit in the memory of {device_name(device)}: in the grid file, leave out batch "
        f"size {point.batch_size} or {point.context_tokens} tokens"
    )
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        others = total - free - torch.cuda.memory_reserved(device)
        if others > BUSY_BYTES:
            message += f"; other processes hold {others / GIB:.1f} GiB of it"
    return message


def measure_many(probes: Sequence[Probe], repeats: int, seed: int) -> dict[str, Timing]:
    """Runs every probe once a round, in a new random order each round, so that drift hits all alike.

    ``repeats`` rounds count, after a few that do not. The order is drawn from ``seed``. Names must differ over probes.
    Where there are several, each runs once untimed first: in use a step follows a step of the same model, not one of
    another that has just emptied the caches.
    """
    rng = random.Random(seed)
    passes = 2 if len(probes) > 1 else 1
    samples: dict[str, list[float]] = {}
    for round_number in range(WARMUP_ROUNDS + repeats):
        order = list(probes)
        rng.shuffle(order)
        readings = [reading for probe in order for reading in [probe.run(rng) for _ in range(passes)][-1].items()]
        assert len({name for name, _ in readings}) == len(readings), "two probes measure the same name"
        if round_number >= WARMUP_ROUNDS:
            for name, ms in readings:
                samples.setdefault(name, []).append(ms)
    return {name: Timing.of(values) for name, values in samples.items()}


@dataclass(frozen=True)
class Measured:
    """What one point of the grid gave: costs, gaps where there are none, and times of ``details`` of models."""

    costs: tuple[Cost, ...]
    gaps: tuple[Gap, ...] = ()
    details: tuple[Cost, ...] = ()


def measure_point(stack: SiteStack, point: GridPoint, repeats: int, seed: int) -> Measured:
    """Of every distinct shape but skip, and of the rest. A point that does not fit in memory is a gap.

    Where small shapes are lost in the noise of differences, the point is measured again on more rounds; what still
    is no positive time is a gap.
    """
    try:
        probes = [site_probe(stack, point), DetailProbe(stack, point)]
        timings = measure_many(probes, repeats, seed)
        if any(timings[name].ms <= 0 for name in (*stack.sites, REST)):
            timings = measure_many(probes, ROUNDS_AGAIN * repeats, seed)
    except (PointTooLargeError, torch.OutOfMemoryError) as error:
        if not isinstance(error, PointTooLargeError):
            error = PointTooLargeError(_too_large(stack.device, point))
        return Measured((), (Gap(point.phase, point.batch_size, point.context_tokens, str(error)),))
    found = {name: timing for name, timing in timings.items() if timing.ms > 0}
    lost = [name for name in (*stack.sites, REST) if name not in found]
    gaps = [
        Gap(point.phase, point.batch_size, point.context_tokens, "too short to be told from noise", name)
        for name in lost
    ]
    return Measured(
        tuple(_cost(stack, point, name, found[name]) for name in (*stack.sites, REST) if name in found),
        tuple(gaps),
        tuple(_cost(stack, point, name, found[name]) for name in DETAILS if name in found),
    )


def _cost(stack: SiteStack, point: GridPoint, name: str, timing: Timing) -> Cost:
    return Cost(
        shape_id=name,
        phase=point.phase,
        batch_size=point.batch_size,
        context_tokens=point.context_tokens,
        weights=stack.dtype,
        kv=stack.dtype,
        device=device_name(stack.device),
        tensor_parallel=1,
        engine=ENGINE,
        ms=timing.ms,
        ms_p10=timing.ms_p10,
        ms_p90=timing.ms_p90,
        source="measured",
    )
