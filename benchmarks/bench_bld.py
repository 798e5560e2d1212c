"""How near block-wise distillation comes to what the hardware allows, and what it needs of memory.

    python benchmarks/bench_bld.py efficiency [--device cuda] [--shape 8b]
    python benchmarks/bench_bld.py memory [--layers 40]

``efficiency``: random weights, one layer of the shape with all its variants. One BLD step's time over the time of what
it cannot avoid: the matrix products of the teacher's pass and of every unit's forward and backward (as torch counts
them) at the rate of a plain product measured in the same run, and the optimiser's update measured alone. Against
training every variant on its own, each with its own teacher pass from the embedding on.

``memory``: `puzzle distill` on a random Llama (40 layers are 3 GiB) in a process of its own, within a small budget, the
residual stream on disk or recomputed: its peak resident memory, and its losses against those of a run that may hold
everything. Starting points are the paper's, since the default's
elimination of channels takes a core minutes a layer; the peak of `puzzle init` is given apart.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from environment import environment
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from puzzle.artifacts import read_unit
from puzzle.blocks.distill import Task, distill
from puzzle.blocks.layer import part_state
from puzzle.blocks.stream import InMemory, Stream
from puzzle.checkpoint import DEMO_TEACHER, TOKENIZER_FILES, read_shape
from puzzle.config import DistillConfig
from puzzle.data.batches import Batch
from puzzle.space import SearchSpace
from puzzle.teacher import Teacher
from puzzle.types import AttentionSpec, FfnSpec, Item, ModelShape
from puzzle.variants import has_weights

RESULTS = Path(__file__).parent / "results"
SHAPES: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 8},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
}
ATTENTION, FFN = ["gqa-*", "linear"], ["narrow-87%", "narrow-75%", "narrow-50%", "narrow-25%", "narrow-10%", "linear"]


def random_teacher(folder: Path, num_layers: int, vocab_size: int = 4096, **sizes: int) -> ModelShape:
    """A checkpoint of random bf16 weights, written a layer at a time."""
    config = LlamaConfig(num_hidden_layers=num_layers, vocab_size=vocab_size, max_position_embeddings=8192, **sizes)
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)
    hidden, width = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * (hidden // config.num_attention_heads)
    matrices = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (width, hidden),
        "mlp.up_proj": (width, hidden),
        "mlp.down_proj": (hidden, width),
    }
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return (torch.randn(size, generator=generator) * size[-1] ** -0.5).bfloat16()

    index: dict[str, str] = {}
    for layer in range(num_layers):
        prefix, name = f"model.layers.{layer}.", f"model-{layer:05d}.safetensors"
        state = {f"{prefix}{matrix}.weight": random(*size) for matrix, size in matrices.items()}
        state |= {
            f"{prefix}{norm}.weight": torch.ones(hidden).bfloat16()
            for norm in ("input_layernorm", "post_attention_layernorm")
        }
        save_file(state, folder / name, {"format": "pt"})
        index |= dict.fromkeys(state, name)
    rest = {
        "model.embed_tokens.weight": random(vocab_size, hidden) * hidden**0.5,
        "lm_head.weight": random(vocab_size, hidden),
    }
    rest["model.norm.weight"] = torch.ones(hidden).bfloat16()
    save_file(rest, folder / "rest.safetensors", {"format": "pt"})
    index |= dict.fromkeys(rest, "rest.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return read_shape(folder)


def start_of(teacher: Teacher, item: Item) -> Task:
    """The teacher's weights cut to size; how good it is does not matter here."""
    layer, site, spec = teacher.layer(item.sites[0].layer), item.sites[0], item.specs[0]
    state = part_state(layer, site.part)
    hidden = teacher.config.hidden_size
    if spec.kind == "linear":
        norm = next(name for name in state if "layernorm" in name)
        matrix = "self_attn.linear_attn.weight" if site.part == "attention" else "mlp.linear_mlp.weight"
        return Task(item.id, (item,), {norm: state[norm], matrix: torch.zeros(hidden, hidden)})
    if isinstance(spec, AttentionSpec) and spec.num_kv_heads:
        rows = spec.num_kv_heads * hidden // teacher.config.num_attention_heads
        return Task(item.id, (item,), {n: t[:rows] if "k_proj" in n or "v_proj" in n else t for n, t in state.items()})
    assert isinstance(spec, FfnSpec)
    width = spec.intermediate_size
    cut = {n: t[:, :width] if "down" in n else t[:width] if n.startswith("mlp.") else t for n, t in state.items()}
    return Task(item.id, (item,), cut)


def items_of(shape: ModelShape, layers: list[int]) -> list[Item]:
    space = SearchSpace.parse({"attention": ATTENTION, "ffn": FFN}, shape)
    return [item for item in space.items() if has_weights(item) and item.sites[0].layer in layers]


def seconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The median of several calls."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times[1:])[repeats // 2]


@dataclass(frozen=True)
class Bench:
    """One layer of a random teacher under training, on random batches of ``sequence_tokens``."""

    teacher: Teacher
    layer: int
    config: DistillConfig
    sequence_tokens: int

    def batch(self, step: int) -> Batch:
        size, generator = (self.config.batch_size, self.sequence_tokens), torch.Generator().manual_seed(step)
        return Batch(torch.randint(4000, size, generator=generator), None, None).to(self.teacher.device)

    def prepared(self, num_steps: int, store: bool) -> tuple[Stream, Stream]:
        """The stream to train on, and one of no held-out batch, at the layer; nothing of it is timed or counted."""
        stream = Stream(self.teacher, self.batch, num_steps, InMemory() if store else None)
        held_out = Stream.of(self.teacher, [])
        for index in range(self.layer):
            stream.advance(self.teacher.layer(index))
            held_out.advance(self.teacher.layer(index))
        return stream, held_out

    def trained(self, items: list[Item], streams: tuple[Stream, Stream]) -> list[float]:
        """Seconds of each step of one training, without the first."""
        ends: list[float] = []

        def on_step(num_units: int) -> None:
            if self.teacher.device.type == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

        distill([start_of(self.teacher, item) for item in items], *streams, self.config, on_step)
        return [after - before for before, after in itertools.pairwise(ends)]

    def step_seconds(self, items: list[Item], num_steps: int, store: bool) -> float:
        return statistics.median(self.trained(items, self.prepared(1 + num_steps, store)))

    def step_flops(self, items: list[Item]) -> int:
        """Of one step's matrix products: the teacher's pass over the layer, every unit's forward and backward."""
        streams = self.prepared(1, store=True)
        with FlopCounterMode(display=False) as counter:
            self.trained(items, streams)
        return int(counter.get_total_flops())


def efficiency(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    tokens = options.batch_size * options.sequence_tokens
    with tempfile.TemporaryDirectory() as folder:
        shape = random_teacher(Path(folder), options.layers, **SHAPES[options.shape])
        teacher, config = Teacher(Path(folder), device, dtype, held=True), DistillConfig(batch_size=options.batch_size)
        bench = Bench(teacher, options.layers - 1, config, options.sequence_tokens)
        items = items_of(shape, [bench.layer])
        ours = bench.step_seconds(items, options.steps, store=True)
        alone = sum(bench.step_seconds([item], options.steps, store=False) for item in items)
        flops = bench.step_flops(items)
        rate = matmul_rate(shape, tokens, device, dtype)
        update = optimiser_seconds(teacher, items, config, device)
    floor = flops / rate + update
    return {
        "shape": options.shape, "device": options.device, "dtype": options.dtype, "tokens_per_step": tokens,
        "units": len(items), "layers": options.layers, "step_s": ours, "floor_s": floor, "ratio": ours / floor,
        "matmul_s": flops / rate, "optimiser_s": update, "matmul_gflops": rate / 1e9,
        "utilisation_of_matmul_rate": flops / ours / rate, "tflops_reached": flops / ours / 1e12,
        "each_alone_over_together": alone / ours,
    }  # fmt: skip


def matmul_rate(shape: ModelShape, tokens: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the layer's widest product."""
    left = torch.randn(tokens, shape.hidden_size, device=device, dtype=dtype)
    right = torch.randn(shape.hidden_size, shape.intermediate_size, device=device, dtype=dtype)
    took = seconds(lambda: [left @ right for _ in range(8)], device, 9) / 8
    return 2.0 * tokens * shape.hidden_size * shape.intermediate_size / took


def optimiser_seconds(teacher: Teacher, items: list[Item], config: DistillConfig, device: torch.device) -> float:
    """One fused AdamW update of every unit's parameters."""
    total = 0.0
    for item in items:
        weights = [torch.nn.Parameter(t.to(device, torch.float32)) for t in start_of(teacher, item).weights.values()]
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        optimiser = torch.optim.AdamW(weights, lr=config.learning_rate, fused=True)
        total += seconds(optimiser.step, device, 3)
    return total


RUN = """\
run: {work}/run
teacher: {work}/teacher
space: {work}/space.yaml
constraints: half-memory
device: cpu
dtype: bf16
data: {{sequence_tokens: 128}}
init: {{start: paper, sequences: 8}}
distill: {{tokens: 1024, batch_size: 2, learning_rate: 1e-4, residual: {residual}}}
memory_budget_gib: {budget}
"""
SMALL_BUDGET_GIB = 0.9
BUDGETS_GIB = {"disk": SMALL_BUDGET_GIB, "recompute": SMALL_BUDGET_GIB, "memory": 64}  # the last holds everything
MEMORY_SIZES = {"hidden_size": 2048, "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 8}


def memory(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        work, teacher = Path(folder), Path(folder) / "teacher"
        random_teacher(teacher, options.layers, vocab_size=32000, **MEMORY_SIZES)
        for name in TOKENIZER_FILES:
            if (DEMO_TEACHER / name).is_file():
                shutil.copyfile(DEMO_TEACHER / name, teacher / name)
        (work / "space.yaml").write_text("attention: [keep, gqa-4]\nffn: [keep, narrow-25%]\n")
        size = sum(file.stat().st_size for file in teacher.glob("*.safetensors"))
        configs = {way: work / f"{way}.yaml" for way in BUDGETS_GIB}
        for way, config in configs.items():
            config.write_text(RUN.format(work=work, residual=way, budget=BUDGETS_GIB[way]))
        before = {stage: process(stage, configs["memory"]) for stage in ("data", "init")}
        trained = {way: process("distill", config) | losses_of(work / "run") for way, config in configs.items()}
    allowed = 0.3 * size + 2**30
    peaks = {way: one["peak_bytes"] for way, one in trained.items()}
    losses = {way: one["losses"] for way, one in trained.items()}
    return {
        "teacher_bytes": size,
        "layers": options.layers,
        "budget_gib": SMALL_BUDGET_GIB,
        "allowed_bytes": allowed,
        "data_peak_bytes": before["data"]["peak_bytes"],
        "init_peak_bytes": before["init"]["peak_bytes"],
        "distill_peak_bytes": peaks,
        "distill_within": {way: peaks[way] <= allowed for way in ("disk", "recompute")},
        "init_seconds": before["init"]["seconds"],
        "distill_seconds": {way: one["seconds"] for way, one in trained.items()},
        "units": len(losses["memory"]),
        "losses_equal": {way: losses[way] == losses["memory"] for way in ("disk", "recompute")},
        "better_than_start": sum(after < start for of in losses["memory"] for start, after in of),
    }


def losses_of(run: Path) -> dict[str, Any]:
    """By unit and item the loss before and after; the trained library is removed, for another way to make it anew."""
    trained = run / "library" / "trained"
    markers = [read_unit(path).payload for path in sorted(trained.glob("L*"))]
    shutil.rmtree(trained)
    pairs = [[(one["before"][item], one["after"][item]) for item in one["before"]] for one in markers]
    return {"losses": pairs}


def process(stage: str, config: Path) -> dict[str, Any]:
    """One stage in a process of its own: its peak resident memory, and how long it took."""
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "puzzle", stage, str(config)])
    _, status, usage = os.wait4(child.pid, 0)
    assert status == 0, stage
    return {"peak_bytes": usage.ru_maxrss * 1024, "seconds": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    fast = commands.add_parser("efficiency")
    fast.add_argument("--shape", choices=SHAPES, default="small")
    fast.add_argument("--device", default="cpu")
    fast.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16")
    fast.add_argument("--layers", type=int, default=4)
    fast.add_argument("--batch-size", type=int, default=8)
    fast.add_argument("--sequence-tokens", type=int, default=256)
    fast.add_argument("--steps", type=int, default=4)
    small = commands.add_parser("memory")
    small.add_argument("--layers", type=int, default=40)
    for command in (fast, small):
        command.add_argument("--output", type=Path)
    options = parser.parse_args()
    found = {**{"efficiency": efficiency, "memory": memory}[options.what](options), "environment": environment()}
    output = options.output or RESULTS / f"bld_{options.what}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
