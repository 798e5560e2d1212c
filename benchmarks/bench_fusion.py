"""FFN fusion against FFN removal (REFERENCE.md, claim 15), on the bundled teacher.

    python benchmarks/bench_fusion.py runs | costs

``runs``: for every run of 2 and 3 layers, true KL on ``report`` without the attentions of its later layers, and with
the FFNs in sequence as before, in parallel (fused), removed but for one (whichever is best), and the same with FFNs of
half the width: two of those have as many parameters as one of the teacher's. ``costs``: what fusing four layers of a
Llama-70B saves by the roofline, beyond what leaving out three attentions does.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from demo_runs import Results, make_library

from puzzle.profiling.grid import GridPoint
from puzzle.profiling.hardware import Deployment
from puzzle.profiling.roofline import estimate
from puzzle.run import Run
from puzzle.scoring.context import ScoringContext
from puzzle.scoring.exact import Change, Scorer, finals_of
from puzzle.stages.common import item_weights, sequences_of, streamed_teacher
from puzzle.types import AttentionSpec, FfnSpec, Item, ModelShape, Phase, Site, Spec, Workload
from puzzle.variants import fused_item, made_of, params, shape_id, site_item

RESULTS = Path(__file__).parent / "results"
SPACE = "attention: [keep, skip]\nffn: [keep, narrow-50%, skip]\nfusion: {max_layers: 3, ffn: [keep, narrow-50%]}\n"
LENGTHS = (2, 3)
CONTEXT = 1024
LLAMA_70B = ModelShape("llama", 80, 8192, 64, 8, 128, 28672, 128256, 131072, tied_embeddings=False)


def ways(run: Run, first: int, last: int) -> dict[str, tuple[Item, ...]]:
    """What may become of layers ``first`` to ``last`` without the attentions of the later ones."""
    layers = range(first, last + 1)
    skips = [site_item(Site(layer, "attention"), AttentionSpec("skip")) for layer in layers[1:]]
    narrow = FfnSpec("narrow", run.shape.intermediate_size // 2)
    found: dict[str, tuple[Item, ...]] = {}
    for name, ffn in (("", FfnSpec("keep")), (" of half the width", narrow)):
        fused = fused_item(first, last, ffn, run.shape)
        found[f"fused{name}"] = (fused,)
        found[f"in sequence{name}"] = (*skips, *made_of(fused, run.shape))
    for kept in layers:
        ffns = [site_item(Site(layer, "ffn"), FfnSpec("keep" if layer == kept else "skip")) for layer in layers]
        found[f"removed but for L{kept:03d}"] = (*skips, *ffns)
    return found


def scorer_of(run: Run, split: str, sequences: int) -> Scorer:
    teacher = streamed_teacher(run, torch.float32, held=True)
    context = ScoringContext(teacher, functools.cache(functools.partial(item_weights, run)))
    batches = sequences_of(run, split, sequences)
    return Scorer(context, batches, finals_of(context, batches))


def true_kl(scorer: Scorer, here: Mapping[str, tuple[Item, ...]]) -> dict[str, float]:
    """Nats per token, by name."""
    changes = [Change(name, items) for name, items in here.items()]
    return {change.name: float(values["kl"].mean()) for change, values in scorer.scores(changes)}


def size(run: Run, items: Sequence[Item]) -> int:
    specs: dict[Site, Spec] = dict(zip(run.shape.sites, run.keep_specs, strict=True))
    specs |= {site: spec for item in items for site, spec in zip(item.sites, item.specs, strict=True)}
    return sum(params(spec, run.shape) for spec in specs.values())


def runs(options: argparse.Namespace, run: Run) -> None:
    settings = {"bld_tokens": options.bld_tokens, "sequences": options.sequences}
    results = Results(options.output or RESULTS / "fusion.json", settings)
    spans = [(a, a + n - 1) for a in range(run.shape.num_layers) for n in LENGTHS if a + n <= run.shape.num_layers]
    scorer = scorer_of(run, "report", options.sequences)
    for first, last in spans:
        here = ways(run, first, last)
        results.once(f"L{first:03d}-L{last:03d}", lambda here=here: one_run(run, scorer, here))
    for length in LENGTHS:
        figures = [results.figures[f"L{a:03d}-L{b:03d}"] for a, b in spans if b - a + 1 == length]
        for name in figures[0]:
            print(length, name, f"{statistics.mean(one[name]['kl'] for one in figures):.4f}")
        for name in ("fused", "fused of half the width"):
            wins = sum(one[name]["kl"] < one["removed"]["kl"] for one in figures)
            print(f"{length}: {name} loses less than removal in {wins} of {len(figures)}")


def one_run(run: Run, scorer: Scorer, here: Mapping[str, tuple[Item, ...]]) -> dict[str, dict[str, float]]:
    kl = true_kl(scorer, here)
    best = min((name for name in here if name.startswith("removed")), key=kl.__getitem__)
    told = {name: name for name in here if not name.startswith("removed")} | {"removed": best}
    return {name: {"kl": kl[way], "params": size(run, here[way])} for name, way in told.items()}


def costs(options: argparse.Namespace) -> None:
    """Milliseconds on H100s, fp8."""
    results = Results(options.output or RESULTS / "fusion_costs.json", {"context_tokens": CONTEXT})
    phases: tuple[Phase, ...] = ("prefill", "decode")
    for tp, batch_size, phase in itertools.product((1, 8), (1, 64), phases):
        name = f"{phase}, batch size {batch_size}, {tp} GPU{'s' if tp > 1 else ''}"
        results.once(name, functools.partial(four_layers, GridPoint(phase, batch_size, CONTEXT), tp))


def four_layers(point: GridPoint, tp: int) -> dict[str, float]:
    attention, ffn = AttentionSpec("keep"), FfnSpec("keep")
    wide = fused_item(0, 3, ffn, LLAMA_70B).specs[0]
    served = Workload("w", CONTEXT, 1, weights="fp8", kv="fp8", device="h100", tp=tp, runtime="vllm")
    found = estimate(LLAMA_70B, (attention, ffn, wide), point, Deployment.of(served))
    ms = {cost.shape_id: cost.ms for cost in found}
    first, each, fused = (ms[shape_id(spec, LLAMA_70B)] for spec in (attention, ffn, wide))
    apart, together = first + 4 * each, first + fused
    return {"whole": 4 * (first + each), "in sequence": apart, "fused": together, "saved": 1 - together / apart}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["runs", "costs"])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "puzzle-bench")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--bld-tokens", type=int, default=131_072)
    parser.add_argument("--sequences", type=int, default=32)
    options = parser.parse_args()
    if options.what == "costs":
        costs(options)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    space = options.work / "fusion-space.yaml"
    space.write_text(SPACE)
    settings = (f"space={space}", f"distill.tokens={options.bld_tokens}")
    runs(options, make_library(options.work, *settings, until="distill"))


if __name__ == "__main__":
    main()
