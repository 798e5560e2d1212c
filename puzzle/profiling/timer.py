"""Clocks for one callable in place, and what many readings say. Imports torch only when a clock is made.

CPU: ``perf_counter_ns``. CUDA: the callable is captured as a CUDA graph, as serving engines run decode, and its replay
is timed by events, so that Python and kernel launches do not count. Other devices: wall time between synchronisations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

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
    time; ``pool`` (from :func:`graph_pool`) lets several clocks that never run at once share their activations' memory.
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
    import torch

    getattr(torch, device.partition(":")[0]).synchronize()


def graph_pool() -> Any:
    """A memory pool for CUDA graphs that never run at once."""
    import torch

    return torch.cuda.graph_pool_handle()


class CapturedGraph:
    """``work`` as a CUDA graph; each call replays it and gives the milliseconds between two events around it."""

    def __init__(self, work: Callable[[], object], device: str, pool: Any = None) -> None:
        import torch

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
        import torch

        with torch.cuda.device(self._device):
            # The first replay keeps the GPU busy while the second is being launched; otherwise the start event would
            # fire at once and the launch would count. It also leaves the GPU's caches as a steady stream of steps does.
            self._graph.replay()
            self._start.record()
            self._graph.replay()
            self._end.record()
            self._end.synchronize()
            return float(self._start.elapsed_time(self._end))
