"""How times are read: every distinct shape of a stack in place, and whole models, at one point of the grid.

Shapes are timed in place, inside the forward of a real heterogeneous model that holds each of them once in a layer of
its own (norms, operation, residual add), next to two of the teacher's whole layers (of the kind it has most of):

* CPU and others: one forward per round, the layers in a new random order each time, a clock reading between any two.
  So all shapes share a round's drift, meet all kinds of neighbours, and none runs twice in a row.
* CUDA: CUDA graphs of [teacher, site, teacher] minus [teacher, teacher]. Events inside a graph are nodes between which
  kernels cannot overlap, and cost about as much as a small kernel; a difference telescopes to the whole model's graph.

Whole models and single modules are timed by clocks: on a CPU ``perf_counter_ns``; on CUDA the callable is captured as
a graph, as serving engines run decode, and its replay is timed by events, so that Python and kernel launches do not
count; on other devices wall time between synchronisations.

What no site accounts for is "rest": embedding, rotary tables, mask, final norm, head on one token per sequence, and
what the forward costs in Python, including the call of as many (empty) layers as the teacher has. It is measured as the
whole forward minus its sites, so that by construction rest + sites is the whole, for that model at least. Where noise
is one-sided (a busy CPU) the medians of many short pieces still add up to some percent less than the whole's median.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from puzzle.modeling import PuzzleForCausalLM
from puzzle.profiling.grid import GridPoint
from puzzle.profiling.hardware import device_name
from puzzle.profiling.stack import NUM_NEIGHBOURS, ForwardStep, SiteStack
from puzzle.profiling.table import REST
from puzzle.types import GIB, ConfigError

Clock = Callable[[], float]  # runs the callable once, gives milliseconds
CAPTURE_WARMUPS = 3  # lets cuBLAS and the allocator settle before a capture, during which they must not allocate


@dataclass(frozen=True)
class Timing:
    """Median, 10th and 90th percentile of repeated readings."""

    ms: float
    ms_p10: float
    ms_p90: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """From at least one reading; percentiles are interpolated linearly between readings."""
        low, median, high = np.quantile(samples, (0.1, 0.5, 0.9)).tolist()
        return cls(median, low, high)


def make_clock(work: Callable[[], object], device: str, pool: Any = None) -> Clock:
    """A clock for ``work`` on ``device``. On CUDA ``work`` must be capturable and read and write the same tensors each
    time; ``pool`` (torch.cuda.graph_pool_handle) lets several clocks that never run at once share activations' memory.
    """
    if device.startswith("cuda"):
        return CapturedGraph(work, device, pool)

    def wall_clock() -> float:
        synchronize(device)
        start = time.perf_counter_ns()
        work()
        synchronize(device)
        return (time.perf_counter_ns() - start) / 1e6

    return wall_clock


def synchronize(device: str) -> None:
    """Waits until ``device`` has done what was asked of it; a CPU always has."""
    if device == "cpu":
        return
    getattr(torch, device.partition(":")[0]).synchronize()


class CapturedGraph:
    """``work`` as a CUDA graph; each call replays it and gives the milliseconds between two events around it."""

    def __init__(self, work: Callable[[], object], device: str, pool: Any = None) -> None:
        self._device = torch.device(device)
        with torch.cuda.device(self._device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(CAPTURE_WARMUPS):
                    work()
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=pool):
                self._result = work()  # lives in the graph's memory pool for as long as the graph
            self._start: Any = torch.cuda.Event(enable_timing=True)
            self._end: Any = torch.cuda.Event(enable_timing=True)

    def __call__(self) -> float:
        with torch.cuda.device(self._device):
            # The first replay keeps the GPU busy while the second is being launched; otherwise the start event would
            # fire at once and the launch would count. It also leaves the GPU's caches as a steady stream of steps does.
            self._graph.replay()
            self._start.record()
            self._graph.replay()
            self._end.record()
            self._end.synchronize()
            return float(self._start.elapsed_time(self._end))


BUSY_BYTES = GIB  # what others may hold of a GPU's memory before we say so
DETAILS = ("norm", "head")


class PointTooLargeError(ConfigError):
    """A grid point that does not fit in the device's memory."""


class Probe(Protocol):
    """Something that a round of measurement runs once: milliseconds by name."""

    def run(self, rng: random.Random) -> Mapping[str, float]: ...


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
        pool = torch.cuda.graph_pool_handle()
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
        raise PointTooLargeError(too_large(stack.device, point)) from None


def too_large(device: str, point: GridPoint) -> str:
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
