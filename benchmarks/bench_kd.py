"""What a step of global distillation takes: memory of the loss in chunks, and tokens a second.

    python benchmarks/bench_kd.py memory [--tokens 8192]
    python benchmarks/bench_kd.py speed [--device cuda]

``memory``: vocabulary 128,256, hidden size 1,024, fp32: peak memory of loss and gradient above what its inputs take,
each in a process of its own, for `divergence_loss` and for the plain formula on whole logits; largest difference of
their gradients.

``speed``: the bundled teacher, half of its FFN channels kept in the student: tokens a second of a KD step against those
of what it cannot avoid, the teacher's forward and the student's own step (forward, CE, backward, optimiser).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from environment import environment
from torch import Tensor, nn

from puzzle.build import build_student
from puzzle.checkpoint import DEMO_TEACHER
from puzzle.config import KdConfig
from puzzle.data.batches import Batch
from puzzle.kd import Distillation, distillation_loss
from puzzle.metrics import divergence_loss
from puzzle.teacher import Compute, load_model
from puzzle.types import AttentionSpec, FfnSpec, Item, Site
from puzzle.variants import site_item

VOCAB_SIZE, HIDDEN_SIZE = 128_256, 1024
ROUNDS = 7


def plain_loss(student: Tensor, teacher: Tensor, heads: tuple[nn.Module, nn.Module], weights: Tensor) -> Tensor:
    log_q = F.log_softmax(heads[0](student).float(), -1)
    with torch.no_grad():
        log_p = F.log_softmax(heads[1](teacher).float(), -1)
    each = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return (each * weights).sum() / weights.sum()


LOSSES: dict[str, Callable[..., Tensor]] = {"chunked": divergence_loss, "plain": plain_loss}


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child(options: argparse.Namespace) -> None:
    """Writes the gradients; prints the peak above the inputs, which are touched first."""
    torch.manual_seed(0)
    heads = nn.Linear(HIDDEN_SIZE, VOCAB_SIZE, bias=False), nn.Linear(HIDDEN_SIZE, VOCAB_SIZE, bias=False)
    student, teacher = torch.randn(2, 1, options.tokens, HIDDEN_SIZE).unbind()
    student = student.clone().requires_grad_()
    heads[0].weight.grad = torch.zeros_like(heads[0].weight)  # a step has it, whatever the loss
    inputs = peak_bytes()
    loss = LOSSES[options.loss](student, teacher, heads, torch.ones(1, options.tokens))
    loss.backward()
    peak = peak_bytes()
    torch.save({"loss": loss.item(), "hidden": student.grad, "head": heads[0].weight.grad}, options.out)
    print(peak - inputs)


def memory(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        peaks, found = {}, {}
        for loss in LOSSES:
            out = Path(folder) / f"{loss}.pt"
            arguments = ["--tokens", str(options.tokens), "--loss", loss, "--out", str(out)]
            command = [sys.executable, __file__, "child", *arguments]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
            peaks[loss] = int(done.stdout)
            found[loss] = torch.load(out, weights_only=True)
    off = {
        name: float((found["chunked"][name] - found["plain"][name]).norm() / found["plain"][name].norm())
        for name in ("hidden", "head")
    }
    return {
        "tokens": options.tokens, "vocab_size": VOCAB_SIZE, "logits_bytes": 4 * options.tokens * VOCAB_SIZE,
        "peak_bytes": peaks, "share_of_plain": peaks["chunked"] / peaks["plain"],
        "loss": {name: one["loss"] for name, one in found.items()}, "relative_difference_of_gradients": off,
    }  # fmt: skip


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Medians of rounds in which the parts and the whole take turns."""
    compute = Compute(torch.device(options.device), bf16=options.device != "cpu")
    teacher = load_model(DEMO_TEACHER, compute)
    width = teacher.config.intermediate_size // 2
    items: list[Item] = [
        site_item(Site(layer, part), spec)
        for layer in range(len(teacher.model.layers))
        for part, spec in (("attention", AttentionSpec("keep")), ("ffn", FfnSpec("narrow", width)))
    ]
    state = teacher.state_dict()

    def cut(item: Item) -> dict[str, Tensor]:
        prefix, found = f"model.layers.{item.sites[0].layer}.", {}
        for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight", "post_attention_layernorm.weight"):
            found[name] = state[prefix + name][:width] if name.startswith("mlp") else state[prefix + name]
        found["mlp.down_proj.weight"] = state[prefix + "mlp.down_proj.weight"][:, :width]
        return found

    student = build_student(teacher, items, cut)
    batch = Batch(torch.randint(3, teacher.config.vocab_size, (8, 256))).to(options.device)
    config = KdConfig(cosine_weight=1.0)
    job, alone = Distillation(student, teacher, config, compute), KdConfig(kl_weight=0, cosine_weight=0, lm_weight=1)

    def step(loss: Callable[[], Tensor]) -> None:
        with compute.autocast():
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(list(job.parameters.values()), 1.0)
        job.optimiser.step()
        job.optimiser.zero_grad(set_to_none=True)

    @torch.no_grad()
    def forward() -> None:
        with compute.autocast():
            teacher(batch.ids)

    def student_alone() -> Tensor:
        logits = student(batch.ids).logits[:, :-1].flatten(0, 1)
        return alone.lm_weight * F.cross_entropy(logits.float(), batch.ids[:, 1:].flatten())

    parts: dict[str, Callable[[], None]] = {
        "teacher_forward_s": forward,
        "student_step_s": functools.partial(step, student_alone),
        "kd_step_s": functools.partial(step, lambda: distillation_loss(student, teacher, batch, config)),
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(ROUNDS + 1):
        for name, part in parts.items():
            started = time.perf_counter()
            part()
            if options.device == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - started)
    found = {name: statistics.median(values[1:]) for name, values in times.items()}
    floor = found["teacher_forward_s"] + found["student_step_s"]
    return {
        **found, "tokens_per_second": batch.ids.numel() / found["kd_step_s"],
        "share_of_parts_speed": floor / found["kd_step_s"], "device": options.device,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "speed", "child"])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--loss", choices=LOSSES, default="chunked", help="of a child")
    parser.add_argument("--out", type=Path, help="of a child")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.what == "child":
        child(options)
        return
    found = {**{"memory": memory, "speed": speed}[options.what](options), "environment": environment()}
    output = options.output or Path(__file__).parent / "results" / f"kd_{options.what}.json"
    output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
