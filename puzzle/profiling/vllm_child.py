"""Times one model in vLLM at many points; run as a script by :mod:`puzzle.profiling.vllm` in the engine's environment.

Reads REQUEST.json (the model's folder, engine settings, points); writes RESULT.json: milliseconds of every forward.
Knows nothing of ``puzzle``. One engine start serves all points. The engine runs in this process and is stepped from
here, so that a batch starts together and the time of every single step is seen, not a mean:

* prefill: from the first request to the moment when the last of them has its first token (TTFT of the batch);
* decode: between one token and the next, over the steps in which every sequence of the batch makes one (TPOT).

    VLLM_ENABLE_V1_MULTIPROCESSING=0 python -I vllm_child.py REQUEST.json RESULT.json
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

NOT_INSTALLED = 3  # exit code
WARMUPS = 2
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class TooSmallCacheError(Exception):
    """The KV cache does not hold the batch, so that its sequences were not computed together."""


class Requests:
    """Random prompts of one length, started together; ids are never used twice."""

    def __init__(self, engine: Any, sampling: Callable[..., Any], vocab_size: int, seed: int) -> None:
        self.engine = engine
        self._sampling = sampling
        self._vocab_size = vocab_size
        self._rng = random.Random(seed)
        self._count = 0
        self._last: list[str] = []

    def prompts(self, batch_size: int, num_tokens: int) -> list[Any]:
        """As the engine wants them, so that preparing them is not timed."""
        plain = [
            {"prompt_token_ids": [self._rng.randrange(self._vocab_size) for _ in range(num_tokens)]}
            for _ in range(batch_size)
        ]
        render = getattr(getattr(self.engine, "renderer", None), "render_cmpl", None)  # older engines take them plain
        return list(render(plain)) if render is not None else plain

    def add(self, prompts: Sequence[Any], max_tokens: int) -> None:
        sampling = self._sampling(max_tokens=max_tokens, ignore_eos=True, temperature=0.0, detokenize=False)
        self._last = [str(self._count + place) for place in range(len(prompts))]
        self._count += len(prompts)
        for name, prompt in zip(self._last, prompts, strict=True):
            self.engine.add_request(name, prompt, sampling)

    def abort(self) -> bool:
        """Gives up those added last; whether the engine is idle then."""
        self.engine.abort_request(self._last)
        return not self.engine.has_unfinished_requests()


def timed_forwards(requests: Requests, point: dict[str, Any], clock: Callable[[], float]) -> list[float]:
    """Milliseconds: of the prefill (one), or of ``steps`` decode steps of the whole batch."""
    batch_size, engine = point["batch_size"], requests.engine
    prompts = requests.prompts(batch_size, point["prompt_tokens"])
    num_started, steps = 0, []
    prefill_s = None
    start = last = clock()
    requests.add(prompts, point["max_tokens"])
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = clock()
        made = [len(output.outputs[0].token_ids) for output in outputs]
        if not made:
            continue
        num_started += made.count(1)
        if prefill_s is None and num_started == batch_size:
            prefill_s = now - start
        if len(made) == batch_size and min(made) > 1:
            steps.append(1e3 * (now - last))
        last = now
    if point["phase"] == "prefill":
        assert prefill_s is not None
        return [1e3 * prefill_s]
    if len(steps) < point["steps"]:
        raise TooSmallCacheError(f"the KV cache is too small for {batch_size} sequences of this length at once")
    return steps[: point["steps"]]


def measure(requests: Requests, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Per point the forwards of every repeat, or why there are none. Every round runs all points in a new order."""
    points, clock, rng = job["points"], CLOCKS[job["clock"]], random.Random(job["seed"])
    results: list[dict[str, Any]] = [{"forwards_ms": [], "error": None} for _ in points]
    by_size = sorted(range(len(points)), key=lambda place: points[place]["batch_size"] * points[place]["prompt_tokens"])
    for place in by_size:
        try:
            for _ in range(WARMUPS):
                timed_forwards(requests, points[place], clock)
        except (TooSmallCacheError, MemoryError, RuntimeError) as error:  # CUDA's out of memory is a RuntimeError
            results[place]["error"] = str(error).strip().splitlines()[0]
            if not requests.abort():
                raise  # what is under way would be timed with the next point
    good = [place for place in by_size if results[place]["error"] is None]
    for _ in range(job["repeats"]):
        rng.shuffle(good)
        for place in good:
            forwards = timed_forwards(requests, points[place], clock)
            results[place]["forwards_ms"].append([round(ms, 5) for ms in forwards])
    return results


def main(request_file: str, result_file: str) -> int:
    try:
        import vllm
    except ImportError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return NOT_INSTALLED
    job = json.loads(Path(request_file).read_text())
    start = time.perf_counter()
    engine = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**job["engine"]))
    ready_s = time.perf_counter() - start
    requests = Requests(engine, vllm.SamplingParams, job["vocab_size"], job["seed"])
    points = measure(requests, job)
    result = {
        "version": vllm.__version__,
        "device": vllm.platforms.current_platform.get_device_name(),
        "start_seconds": ready_s,
        "points": points,
    }
    Path(result_file).write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
