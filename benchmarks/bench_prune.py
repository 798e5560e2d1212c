"""Uniform pruning of the bundled teacher: what is left by the paper's start, and by least-squares refits.

For widths, heads and depth alone and together: parameters, KL and CE gap on ``report``, before distillation and, with
``--kd-tokens``, after it (on logits alone). Every figure is written to ``benchmarks/results/prune.json`` as it is
found, and a run that was stopped goes on from there.

    python benchmarks/bench_prune.py [--sequences 48] [--kd-tokens N]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from demo_runs import REPORT_SEQUENCES, Results, distilled, quality

from puzzle import pipeline
from puzzle.run import Run
from puzzle.stages.common import compute_of
from puzzle.teacher import load_model

RESULTS = Path(__file__).parent / "results" / "prune.json"
PRUNINGS = {
    "hidden 75 %": "{hidden_size: 192}",
    "FFN 50 %": "{intermediate_size: 256}",
    "heads 50 %": "{num_attention_heads: 4}",
    "hidden and FFN 75 %": "{hidden_size: 192, intermediate_size: 384}",
    "depth 6 of 8": "{num_layers: 6}",
    "depth 6 of 8, contiguous": "{num_layers: 6, layers_by: contiguous}",
}
STARTS = ("paper", "best")


def pruned(work: Path, prune: str, start: str, sequences: int, kd_tokens: int) -> dict[str, Any]:
    work.mkdir(parents=True, exist_ok=True)
    config = work / "config.yaml"
    config.write_text(f"run: {work}/run\nprune: {prune}\n")
    settings = (f"init.sequences={sequences}", f"init.start={start}", f"kd.tokens={kd_tokens}", "kd.cosine_weight=0")
    run = Run.open(config, settings)
    for stage in ("data", "importance", "prune"):
        pipeline.run_stage(run, stage)
    student = load_model(run.student / "initial", compute_of(run))
    found: dict[str, Any] = {"params": sum(parameter.numel() for parameter in student.parameters())}
    found["before"] = quality(run, student, "report", REPORT_SEQUENCES)
    if kd_tokens:
        found["after"] = quality(run, distilled(run, student), "report", REPORT_SEQUENCES)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=48)
    parser.add_argument("--kd-tokens", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bench-prune")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    results = Results(options.output, {"sequences": options.sequences, "kd_tokens": options.kd_tokens})
    for name, prune in PRUNINGS.items():
        for start in STARTS:
            asked = (options.work, prune, start, options.sequences, options.kd_tokens)
            results.once(f"{name}, {start}", lambda asked=asked: pruned(*asked))


if __name__ == "__main__":
    main()
