"""The roofline's throughput of a real heterogeneous model next to what its makers published.

Predicts tokens per second and GPU of Llama-3.1-70B and of Llama-3.1-Nemotron-51B (the paper's model, block by block)
on H100 SXM in FP8, and the ratio of the two, with the default efficiency, which is not tuned to any of this. Writes
``benchmarks/results/roofline_51b.json``.

    python benchmarks/bench_roofline.py

Published: Puzzle, arXiv 2411.19146, table 2: H100 SXM, weights, activations and KV cache in FP8, TensorRT-LLM, each
model at its best number of GPUs and batch size. Three readings of what that was, from most to least of it given:

* ``their batch``: on their numbers of GPUs, with their batch sizes (given for 128/1024 only);
* ``their GPUs``: on their numbers of GPUs, with as many sequences as fit by our memory model (the mean errors);
* ``our GPUs``: on the number of GPUs that the roofline finds best, with as many sequences as fit.

What they do not say and is assumed here is in ASSUMPTIONS.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from environment import environment

from puzzle import variants
from puzzle.profiling import hardware, roofline
from puzzle.profiling.roofline import Efficiency
from puzzle.profiling.source import points_of
from puzzle.search.metrics import Setting, quantity
from puzzle.types import GIB, AttentionSpec, Costs, FfnSpec, Item, ModelShape, Workload

RESULTS = Path(__file__).parent / "results" / "roofline_51b.json"
LLAMA_70B = ModelShape("llama", 80, 8192, 64, 8, 128, 28672, 128256, 131072, tied_embeddings=False)
# Per layer: KV heads (L: a linear map instead, -: no attention), and quarters of the FFN's 28672 channels. The
# block_configs of nvidia/Llama-3_1-Nemotron-51B-Instruct as transcribed in the public GenZ-LLM-Analyzer (its
# nvidia models): KV heads = 64 / n_heads_in_group, channels = ffn_mult * 8192 * 2 / 3. They make 51.50e9 parameters,
# the published number.
NEMOTRON_51B = """
    8:1 4:2 8:4 8:4 8:4 2:2 2:2 1:2 1:2 2:2   2:2 L:2 1:2 2:2 2:2 L:1 8:4 8:4 8:4 8:4
    8:4 8:4 8:4 8:4 8:4 8:4 8:4 8:4 8:4 8:4   8:4 8:4 8:4 8:4 8:4 L:2 8:4 8:4 L:2 L:4
    L:2 L:2 L:2 -:1 L:1 8:4 -:1 L:1 -:1 8:4   L:1 -:1 L:1 L:1 -:1 -:1 L:1 -:1 -:1 L:1
    L:1 L:1 L:1 8:4 8:4 8:4 8:4 8:4 8:4 8:4   8:4 8:4 8:4 8:4 8:4 8:4 8:4 8:4 8:4 8:4
""".split()  # noqa: SIM905
ASSUMPTIONS = (
    "a batch runs as one: all prompts in one forward, then osl - 1 decode steps, then the next batch",
    "as many sequences as fit: weights + KV cache at isl + osl + workspace of a prefill in chunks, by the memory "
    "model, in the data sheet's 80e9 bytes of each GPU",
    "embedding and head in FP8 too; attention computed in bf16 from the FP8 cache",
    "tokens per second: generated ones of one copy of the model, divided by its number of GPUs",
    "our GPUs: the best of 1, 2, 4, 8",
)


@dataclass(frozen=True)
class Published:
    """Generated tokens per second and GPU, on how many GPUs; ``batches``: of student and teacher, where given.

    ``best``: whether these are the numbers of GPUs that were best for either.
    """

    isl: int
    osl: int
    student: float
    student_gpus: int
    teacher: float
    teacher_gpus: int
    batches: tuple[int, int] | None = None
    best: bool = True


PUBLISHED = (
    Published(128, 1024, 6472, 1, 2975, 4, batches=(256, 384)),
    Published(128, 1024, 6472, 1, 1274, 1, best=False),
    Published(128, 128, 5478, 1, 2645, 1),
    Published(128, 2048, 4910, 2, 2786, 4),
    Published(128, 4096, 3855, 2, 1828, 4),
    Published(2048, 128, 653, 1, 339, 4),
    Published(2048, 128, 653, 1, 301, 1, best=False),
    Published(2048, 2048, 2622, 2, 1336, 4),
)
NUM_GPUS = (1, 2, 4, 8)
READINGS = ("their batch", "their GPUs", "our GPUs")
EFFICIENCIES = {
    "default": Efficiency(),
    "matmul 0.5, attention 0.3": Efficiency(matmul=0.5, attention=0.3),
    "bandwidth 0.6": Efficiency(bandwidth=0.6),
    "link 0.35": Efficiency(link=0.35),
    "overhead x 4": Efficiency(overhead=4),
}


@dataclass(frozen=True)
class Served:
    """A model on some GPUs with some batch size."""

    num_gpus: int
    batch_size: int
    tok_per_s_per_gpu: float
    ttft_ms: float
    tpot_ms: float


def teacher() -> tuple[Item, ...]:
    return tuple(variants.site_item(site, variants.keep_spec(LLAMA_70B, site)) for site in LLAMA_70B.sites)


def student() -> tuple[Item, ...]:
    attention = {"8": AttentionSpec("keep"), "L": AttentionSpec("linear"), "-": AttentionSpec("skip")}
    attention |= {heads: AttentionSpec("gqa", num_kv_heads=int(heads)) for heads in "124"}
    ffn = {quarters: FfnSpec("narrow", intermediate_size=int(quarters) * 7168) for quarters in "12"}
    ffn["4"] = FfnSpec("keep")
    specs = [spec for block in NEMOTRON_51B for spec in (attention[block[0]], ffn[block[2]])]
    return tuple(variants.site_item(site, spec) for site, spec in zip(LLAMA_70B.sites, specs, strict=True))


def metric(name: str, setting: Setting, model: Sequence[Item]) -> float:
    """The search's own metric of a model."""
    return float(quantity(name, setting, model).value(item.id for item in model))


def largest_batch(model: Sequence[Item], workload: Workload) -> int:
    """The most sequences that fit in the device; 0 if not even one does."""
    limit = hardware.hardware(workload.device).memory_bytes / GIB

    def fits(batch_size: int) -> bool:
        return metric("memory_gib", Setting(LLAMA_70B, workload, batch_size), model) <= limit

    small, large = 0, 1
    while fits(large):
        small, large = large, 2 * large
    while large - small > 1:
        middle = (small + large) // 2
        small, large = (middle, large) if fits(middle) else (small, middle)
    return small


def estimates(model: Sequence[Item], workload: Workload, batch_size: int, efficiency: Efficiency) -> Costs:
    specs = list(dict.fromkeys(spec for item in model for spec in item.specs))
    setting, points = hardware.Deployment.of(workload), points_of(workload, batch_size)
    rows = [cost for point in points for cost in roofline.estimate(LLAMA_70B, specs, point, setting, efficiency)]
    return Costs(tuple(rows))


def serve(
    model: Sequence[Item], workload: Workload, efficiency: Efficiency, batch_size: int | None = None
) -> Served | None:
    """With ``batch_size`` sequences, by default as many as fit; None if not even one does."""
    size = largest_batch(model, workload) if batch_size is None else batch_size
    if not size:
        return None
    setting = Setting(LLAMA_70B, workload, size, estimates(model, workload, size, efficiency))
    rate = metric("output_tok_per_s", setting, model) / workload.tp
    ttft, tpot = (metric(name, setting, model) for name in ("ttft_ms", "tpot_ms"))
    return Served(workload.tp, size, rate, ttft, tpot)


def workload_of(published: Published, num_gpus: int) -> Workload:
    name, dtype = f"{published.isl}/{published.osl}", "fp8"
    return Workload(
        name, published.isl, published.osl, weights=dtype, kv=dtype, device="h100", tp=num_gpus, runtime="tensorrt-llm"
    )


def their_gpus(published: Published, efficiency: Efficiency, batches: tuple[int, int] | None = None) -> list[Served]:
    """Student and teacher on the published numbers of GPUs."""
    sizes = batches or (None, None)
    found = [
        serve(model, workload_of(published, num_gpus), efficiency, size)
        for model, num_gpus, size in zip(
            (student(), teacher()), (published.student_gpus, published.teacher_gpus), sizes, strict=True
        )
    ]
    assert all(found), "both models fit on what they were measured on"
    return [served for served in found if served]


def our_gpus(published: Published, efficiency: Efficiency) -> list[Served]:
    """Student and teacher on the numbers of GPUs that the roofline finds best."""
    return [
        max(
            filter(None, (serve(model, workload_of(published, tp), efficiency) for tp in NUM_GPUS)),
            key=lambda served: served.tok_per_s_per_gpu,
        )
        for model in (student(), teacher())
    ]


def reading(published: Published, served: Sequence[Served]) -> dict[str, Any]:
    """The ratio of student and teacher, and how far it and they are from what was published."""
    ours, theirs = served
    ratio = ours.tok_per_s_per_gpu / theirs.tok_per_s_per_gpu
    return {
        "ratio": ratio,
        "ratio_error": ratio / (published.student / published.teacher) - 1,
        "student_error": ours.tok_per_s_per_gpu / published.student - 1,
        "teacher_error": theirs.tok_per_s_per_gpu / published.teacher - 1,
        "student": asdict(ours),
        "teacher": asdict(theirs),
    }


def compare(published: Published, efficiency: Efficiency) -> dict[str, Any]:
    readings = {"their GPUs": reading(published, their_gpus(published, efficiency))}
    if published.best:
        readings["our GPUs"] = reading(published, our_gpus(published, efficiency))
    if published.batches:
        readings["their batch"] = reading(published, their_gpus(published, efficiency, published.batches))
    return {"published": asdict(published), "published_ratio": published.student / published.teacher} | readings


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = rows[0]
    return {
        "published_ratio_128_1024": first["published_ratio"],
        **{f"ratio_128_1024, {name}": first[name]["ratio"] for name in READINGS},
        "mean_error, their GPUs": {
            what: statistics.fmean(abs(row["their GPUs"][what]) for row in rows)
            for what in ("ratio_error", "student_error", "teacher_error")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    params = {
        name: metric("params", Setting(LLAMA_70B), model)
        for name, model in (("student", student()), ("teacher", teacher()))
    }
    rows = [compare(published, EFFICIENCIES["default"]) for published in PUBLISHED]
    for row in rows:
        published = row["published"]
        print(f"{published['isl']}/{published['osl']}: published ratio {row['published_ratio']:.2f}")
        for name in READINGS:
            if name in row:
                found = row[name]
                print(
                    f"    {name:12} {found['ratio']:.2f} ({found['ratio_error']:+.0%}); errors of "
                    f"student {found['student_error']:+.0%} and teacher {found['teacher_error']:+.0%}"
                )
    result = {
        "environment": environment(),
        "settings": {
            "device": "h100",
            "efficiency": asdict(EFFICIENCIES["default"]),
            "assumptions": ASSUMPTIONS,
            "architecture": " ".join(NEMOTRON_51B),
            "params": params,
        },
        "summary": summary(rows),
        "rows": rows,
        "ratio_128_1024_with_other_efficiencies": {
            name: {
                kind: found["ratio"] for kind, found in compare(PUBLISHED[0], efficiency).items() if kind in READINGS
            }
            for name, efficiency in EFFICIENCIES.items()
        },
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
