"""How fast scores are.

    python benchmarks/bench_scores.py exact [--incumbent PYTHON]
    python benchmarks/bench_scores.py growth
    python benchmarks/bench_scores.py shape [--device cuda] [--shape 8b]

``exact``: the bundled teacher, every gqa, narrow and skip of its space. Time over its own floor: each variant's own
layer, the layers after it and the metrics of its outputs, one variant at a time, measured in the same run. With
``--incumbent``, the Python of an environment that holds ``nvidia-modelopt`` 0.47: its driver on the same weights and
tokens (incumbent_scorer.py), how far its KL and agreement are from ours, and how much longer it takes.

``growth``: random weights; seconds of exact and of one-pass scores by layers and by variants a site. ``shape``: all
variants of a model of one shape, random weights; seconds, and peak memory on a GPU.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_bld import ATTENTION, FFN, SHAPES, random_teacher, start_of
from demo_runs import make_library
from environment import environment
from safetensors.torch import save_file
from torch import Tensor

from puzzle.checkpoint import DEMO_TEACHER
from puzzle.data.batches import Batch
from puzzle.metrics import token_metrics
from puzzle.run import Run
from puzzle.scoring.context import ScoringContext
from puzzle.scoring.exact import Change, Scorer, Values, finals_of
from puzzle.scoring.one_pass import one_pass_scores
from puzzle.scoring.sampling import num_draws
from puzzle.space import SearchSpace
from puzzle.stages.common import item_weights, sequences_of, streamed_teacher
from puzzle.teacher import Teacher
from puzzle.types import AttentionSpec, FfnSpec, Item, Site
from puzzle.variants import has_weights, is_teacher, site_item

RESULTS = Path(__file__).parent / "results"
SAME = {"kl": "kl_div", "agreement": "greedy_teacher_prediction_in_student_top_1"}  # ours: theirs
LAYERS, VARIANTS = (8, 16, 32), (5, 10, 20)


def scored(scorer: Scorer, items: Sequence[Item]) -> dict[str, Values]:
    """Every item's values, in the order of the layers."""
    groups = itertools.groupby(items, lambda item: item.sites[0].layer)
    found = {}
    for _, group in groups:
        found |= {change.name: values for change, values in scorer.scores([Change(one.id, (one,)) for one in group])}
    return found


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """The median."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


@torch.no_grad()
def floor(
    context: ScoringContext, items: Sequence[Item], batches: Sequence[Batch], finals: Sequence[Tensor], repeats: int
) -> float:
    """Seconds of what no exact scorer can avoid, summed over the items; everything they start from is at hand."""
    teacher = context.teacher
    total = 0.0
    streams = [teacher.embed(batch) for batch in batches]
    beside = [teacher.context(batch) for batch in batches]
    heads = (teacher.top.lm_head,) * 2
    metrics = seconds(
        lambda: [token_metrics([f] * 8, f, heads, b) for f, b in zip(finals, batches, strict=True)], repeats
    )
    for index in range(teacher.num_layers):
        for item in [item for item in items if item.sites[0].layer == index]:
            own = context.layer(index, [item])

            def site(own: Any = own, part: str = item.sites[0].part) -> None:
                for hidden, other in zip(streams, beside, strict=True):
                    if part == "attention":
                        own(hidden, position_embeddings=other.position, attention_mask=other.masks)
                    else:
                        own.ffn_delta(hidden)

            total += seconds(site, repeats) + metrics / 8
        after = [teacher.layer(later) for later in range(index + 1, teacher.num_layers)]

        def suffix(after: Sequence[Any] = after) -> None:
            for hidden, other in zip(streams, beside, strict=True):
                for layer in after:
                    hidden = layer(hidden, position_embeddings=other.position, attention_mask=other.masks)

        total += seconds(suffix, repeats) * sum(item.sites[0].layer == index for item in items)
    return total


def exact(options: argparse.Namespace) -> dict[str, Any]:
    run = make_library(options.work, "seed=0", "distill.tokens=0", until="distill")
    items = [item for item in run.items if item.specs[0].kind in ("gqa", "narrow", "skip")]
    read_weights = functools.cache(functools.partial(item_weights, run))
    batches = sequences_of(run, "score", options.sequences)

    def ours(context: ScoringContext) -> dict[str, Values]:
        return scored(Scorer(context, batches, finals_of(context, batches), options.together), items)

    context, rounded = (
        ScoringContext(streamed_teacher(run, dtype, held=True), read_weights)
        for dtype in (torch.float32, torch.bfloat16)
    )
    values, in_bf16 = ours(context), ours(rounded)
    took, took_bf16 = (seconds(functools.partial(ours, one), options.repeats) for one in (context, rounded))
    kept = finals_of(context, batches)
    finals = [kept.read(place) for place in range(len(batches))]
    least = floor(context, items, batches, finals, options.repeats)
    off = {name: abs(float(in_bf16[name]["kl"].mean() - of["kl"].mean())) for name, of in values.items()}
    found = {
        "items": len(items), "sequences": options.sequences, "sequence_tokens": run.config.data.sequence_tokens,
        "seconds": took, "floor_s": least, "ratio": took / least, "seconds_bf16": took_bf16,
        "bf16_difference_nats": {"median": statistics.median(off.values()), "largest": max(off.values())},
    }  # fmt: skip
    if options.incumbent is not None:
        with tempfile.TemporaryDirectory() as folder:
            write_for_incumbent(run, items, torch.cat([batch.ids for batch in batches]), Path(folder))
            found["incumbent"] = {
                f"batch size {size}": compared(options.incumbent, Path(folder), size, values, found) for size in (1, 8)
            }
    return found


def write_for_incumbent(run: Run, items: Sequence[Item], ids: Tensor, folder: Path) -> None:
    """What incumbent_scorer.py reads."""
    (folder / "teacher").symlink_to(DEMO_TEACHER.resolve())
    save_file({"ids": ids.contiguous()}, folder / "tokens.safetensors")
    for item in items:
        (site,), (spec,) = item.sites, item.specs
        (variant := folder / "variants" / item.id).mkdir(parents=True)
        change: dict[str, Any] = {"no_op": True}
        if isinstance(spec, AttentionSpec) and spec.num_kv_heads:
            change = {"num_key_value_heads": spec.num_kv_heads}
        elif isinstance(spec, FfnSpec) and spec.intermediate_size:
            change = {"intermediate_size": spec.intermediate_size}
        (variant / "variant.json").write_text(json.dumps({"layer": site.layer, site.part: change}))
        if has_weights(item):
            prefix = f"model.layers.{site.layer}."
            state = {prefix + name: tensor.contiguous() for name, tensor in item_weights(run, item).items()}
            save_file(state, variant / "model.safetensors", {"format": "pt"})


def compared(
    python: Path, folder: Path, size: int, ours: Mapping[str, Values], times: Mapping[str, Any]
) -> dict[str, float]:
    """The incumbent's time over ours for the same items, and the largest relative difference of each metric."""
    script, out = Path(__file__).parent / "incumbent_scorer.py", folder / "incumbent.json"
    command = [str(python), str(script), str(folder), "--out", str(out), "--batch-size", str(size), "--shared-metrics"]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{python} failed; it needs nvidia-modelopt[puzzletron] and a transformers it knows:\n{done.stderr}")
    theirs = json.loads(out.read_text())
    found: dict[str, float] = {}
    for metric, name in SAME.items():
        pairs = [
            (ours[item][metric], torch.tensor(of["metrics"][name], dtype=torch.float64))
            for item, of in theirs["variants"].items()
        ]
        found[f"{metric}_difference_of_means"] = max(float((a.mean() / b.mean() - 1).abs()) for a, b in pairs)
        found[f"{metric}_difference"] = max(float(((a - b).abs() / b).max()) for a, b in pairs)
    spent = [of["seconds"] for of in theirs["variants"].values()]
    working = sum(of["load"] + of["forward"] + of["metrics"] for of in spent)
    whole = sum(of["total"] for of in spent)
    return {
        **found,
        "seconds": whole,
        "ratio": whole / times["seconds"],
        "ratio_without_garbage_collection": working / times["seconds"],
        "ratio_to_bf16": whole / times["seconds_bf16"],
    }


def times_of(
    context: ScoringContext, items: Sequence[Item], batches: Sequence[Batch], repeats: int
) -> dict[str, float]:
    finals, draws = finals_of(context, batches), num_draws(sum(len(batch.ids) for batch in batches))
    groups = itertools.groupby(items, lambda item: item.sites[0].layer)
    by_layer = [list(group) for _, group in groups]

    def timed(score: Callable[[], Any]) -> float:
        def whole() -> None:
            score()
            if context.teacher.device.type == "cuda":
                torch.cuda.synchronize()

        return seconds(whole, repeats)

    return {
        "exact_s": timed(lambda: scored(Scorer(context, batches, finals, 16), items)),
        "one_pass_s": timed(lambda: one_pass_scores(context, by_layer, batches, draws, 0)),
    }


def growth(options: argparse.Namespace) -> dict[str, Any]:
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8}
    found = []
    for num_layers in LAYERS:
        with tempfile.TemporaryDirectory() as folder:
            random_teacher(Path(folder), num_layers, vocab_size=2048, **sizes)
            teacher = Teacher(Path(folder), torch.device("cpu"), torch.float32, held=True)
            context = ScoringContext(teacher, lambda item, teacher=teacher: start_of(teacher, item).weights)
            ids = torch.randint(2000, (4, 128), generator=torch.Generator().manual_seed(0))
            for variants in VARIANTS:
                widths = [FfnSpec("narrow", 1024 * (place + 1) // (variants + 1)) for place in range(variants)]
                items = [site_item(Site(layer, "ffn"), width) for layer in range(num_layers) for width in widths]
                times = times_of(context, items, [Batch(ids, None, None)], options.repeats)
                found.append({"layers": num_layers, "variants": variants, **times})
                print(found[-1], flush=True)
    return {"growth": found}


def shape(options: argparse.Namespace) -> dict[str, Any]:
    device, dtype = torch.device(options.device), torch.bfloat16 if options.device == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        sizes = random_teacher(Path(folder), options.layers, **SHAPES[options.shape])
        teacher = Teacher(Path(folder), device, dtype, held=True)
        context = ScoringContext(teacher, lambda item: start_of(teacher, item).weights if has_weights(item) else {})
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(4000, (options.sequences, options.sequence_tokens), generator=generator)
        batches = [Batch(part, None, None).to(device) for part in ids.split(8)]
        space = SearchSpace.parse({"attention": [*ATTENTION, "skip"], "ffn": [*FFN, "skip"]}, sizes)
        items = [item for item in space.items() if not is_teacher(item)]
        found = {"shape": options.shape, "layers": options.layers, "items": len(items), "sequences": options.sequences}
        found |= {"sequence_tokens": options.sequence_tokens, **times_of(context, items, batches, 1)}
        if device.type == "cuda":
            found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["exact", "growth", "shape"])
    parser.add_argument("--incumbent", type=Path, metavar="PYTHON")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--sequence-tokens", type=int, default=2048, help="of random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--together", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bench-scores")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    found = {**{"exact": exact, "growth": growth, "shape": shape}[options.what](options), "environment": environment()}
    output = options.output or RESULTS / f"scores_{options.what}.json"
    output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
