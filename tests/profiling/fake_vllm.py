"""Stands for vLLM in the tests: steps requests as its scheduler does, in a time that a formula gives.

Becomes the package ``vllm`` of a fake environment (conftest of the tests that use it). Time is simulated, and the
clock that :func:`install` sets shows it. A step takes

    3 ms + per layer: kv_heads * (0.1 * tokens computed + 0.001 * tokens in the cache) + width * tokens computed / 1000

FAKE_VLLM in the environment makes it fail: ``refuse`` (the model), ``memory`` (a batch of 4).
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

__version__ = "9.9.9"
platforms = SimpleNamespace(current_platform=SimpleNamespace(get_device_name=lambda: "NVIDIA H100 80GB HBM3"))
NOISE = (1.0, 1.02, 0.98, 1.01, 0.99)  # by step, in turn


class Clock:
    now_s = 0.0


def install() -> None:
    """Makes the clocks show simulated time."""
    time.perf_counter = lambda: Clock.now_s


@dataclass
class EngineArgs:
    model: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_memory_bytes: int = 0
    trust_remote_code: bool = False
    skip_tokenizer_init: bool = False
    load_format: str = "auto"
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    disable_log_stats: bool = False
    seed: int = 0


@dataclass
class SamplingParams:
    max_tokens: int
    ignore_eos: bool
    temperature: float
    detokenize: bool


@dataclass
class Request:
    prompt: int
    limit: int
    computed: int = 0
    tokens: list[int] = field(default_factory=list)


class LLMEngine:
    def __init__(self, arguments: EngineArgs) -> None:
        self.arguments = arguments
        self.config = json.loads((Path(arguments.model) / "config.json").read_text())
        self.requests: dict[str, Request] = {}
        self.steps = 0

    @classmethod
    def from_engine_args(cls, arguments: EngineArgs) -> LLMEngine:
        assert arguments.load_format == "dummy" and arguments.skip_tokenizer_init and arguments.trust_remote_code
        assert not arguments.enable_prefix_caching and os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        assert (Path(arguments.model) / "configuration_decilm.py").is_file()
        assert "puzzle" not in sys.modules
        Clock.now_s += 2.5
        print("(EngineCore pid=7) INFO 11-25 16:36:26 [cpu.py:224] starting", file=sys.stderr)
        if os.environ.get("FAKE_VLLM") == "refuse":
            print("(Worker pid=8) ERROR [worker.py:1] ValueError: head size 7 is not supported", file=sys.stderr)
            raise RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")
        return cls(arguments)

    def add_request(self, name: str, prompt: dict[str, Any], sampling: SamplingParams) -> None:
        tokens = prompt["prompt_token_ids"]
        assert all(0 <= token < self.config["vocab_size"] for token in tokens)
        assert (
            len(tokens) + sampling.max_tokens <= self.arguments.max_model_len <= self.config["max_position_embeddings"]
        )
        assert sampling.ignore_eos and name not in self.requests
        self.requests[name] = Request(len(tokens), sampling.max_tokens)

    def abort_request(self, names: list[str]) -> None:
        for name in names:
            self.requests.pop(name, None)

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def step(self) -> list[SimpleNamespace]:
        budget, taken, cached = self.arguments.max_num_batched_tokens, 0, 0
        room = self.arguments.kv_cache_memory_bytes or 10**9  # tokens, here
        outputs = []
        for request in list(self.requests.values())[: self.arguments.max_num_seqs]:
            room -= request.prompt + request.limit
            wanted = request.prompt + len(request.tokens) - request.computed
            now = min(wanted, budget - taken)
            if now == 0 or room < 0:
                break
            cached += request.computed
            request.computed += now
            taken += now
            if now == wanted:
                request.tokens.append(0)
                outputs.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=list(request.tokens))]))
        if os.environ.get("FAKE_VLLM") == "memory" and len(self.requests) >= 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the notes.")
        self.requests = {
            name: request for name, request in self.requests.items() if len(request.tokens) < request.limit
        }
        Clock.now_s += forward_ms(self.config, taken, cached) * NOISE[self.steps % len(NOISE)] / 1e3
        self.steps += 1
        return outputs


def forward_ms(config: dict[str, Any], taken: int, cached: int) -> float:
    total = 3.0
    for block in config["block_configs"]:
        if not block["attention"]["no_op"]:
            heads = config["num_attention_heads"] // block["attention"]["n_heads_in_group"]
            total += heads * (0.1 * taken + 0.001 * cached)
        if not block["ffn"]["no_op"]:
            width = int(2 * block["ffn"]["ffn_mult"] * config["hidden_size"] / 3)
            total += -(-width // 256) * 256 * taken / 1000
    return total
