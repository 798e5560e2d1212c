"""Distillation on text that is not the teacher's own: what do correction, the LM loss and mixtures of texts do?

The bundled teacher knows Python's standard library; the foreign text is C++, the headers that torch comes with. One
shape (hidden size 192 of 256, FFNs 400 of 512), equal tokens of distillation; the corrected teacher has had as many
tokens of the LM loss on the foreign text: before, so that the student is made of it, or beside, so that it only
distils. Quality is CE against the bundled teacher's on both texts, on sequences nothing was chosen on: below zero is
better than that teacher.

    python benchmarks/bench_text.py [--seeds 0 1 2] [--kd-tokens N]
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from bench_minitron import SHAPE_OF_LOSSES, SHAPES, finished, initial, of_loss, pruned
from demo_runs import REPORT_SEQUENCES, Results, distilled, quality

from puzzle import artifacts
from puzzle.modeling import PuzzleForCausalLM
from puzzle.run import Run
from puzzle.stages.common import compute_of
from puzzle.teacher import load_model

RESULTS = Path(__file__).parent / "results" / "text.json"
HEADERS = Path(torch.__file__).parent / "include"
FOREIGN_BYTES = 6_000_000
WHOLE = "prune.num_layers=8"  # of 8: nothing goes
BIGGEST_FILE_BYTES = 40_000
Made = Callable[[], Path] | None


def foreign_text(work: Path) -> Path:
    """C++ headers, one document each, the same ones for every machine with this version of torch."""
    headers = [path for path in HEADERS.rglob("*.h") if path.stat().st_size <= BIGGEST_FILE_BYTES]
    headers.sort(key=lambda path: hashlib.sha256(str(path.relative_to(HEADERS)).encode()).digest())
    lines, size = [], 0
    for path in headers:
        text = path.read_text(errors="ignore")
        lines.append(json.dumps({"text": text}))
        size += len(text)
        if size > FOREIGN_BYTES:
            break
    artifacts.write_text(work / "headers.jsonl", "\n".join(lines) + "\n")
    return work / "headers.jsonl"


def arms(options: argparse.Namespace, seed: int) -> Mapping[str, Callable[[], PuzzleForCausalLM]]:
    """How each model comes about."""
    text = foreign_text(options.work)
    foreign, own = f"data.text={text}", "data.text=demo"
    both = f"data.sources=[{{path: {text}, weight: 0.5}}, {{path: demo, weight: 0.5}}]"

    @functools.cache
    def corrected() -> Path:
        return finished(pruned(options, f"seed={seed}", foreign, WHOLE, *of_loss("LM")))

    def student(where: str, loss: str = "KL", made_of: Made = None, distilled_by: Made = None) -> PuzzleForCausalLM:
        distils = [f"kd.teacher={distilled_by()}"] if distilled_by else []
        chosen = (f"seed={seed}", where, *SHAPES[SHAPE_OF_LOSSES], *of_loss(loss), *distils)
        run = pruned(options, *chosen, teacher=made_of and made_of())
        return distilled(run, initial(run))

    return {
        "teacher, corrected": lambda: load_model(corrected(), compute_of(pruned(options, f"seed={seed}", own, WHOLE))),
        "own text": lambda: student(own),
        "foreign text": lambda: student(foreign),
        "half of each": lambda: student(both),
        "foreign text, KL and LM": lambda: student(foreign, "KL and LM"),
        "foreign text, LM": lambda: student(foreign, "LM"),
        "foreign text, corrected before": lambda: student(foreign, made_of=corrected),
        "foreign text, corrected beside": lambda: student(foreign, distilled_by=corrected),
        "half of each, corrected before": lambda: student(both, made_of=corrected),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kd-tokens", type=int, default=262144)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bench-text")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    results = Results(options.output, {"kd_tokens": options.kd_tokens})
    for seed in options.seeds:
        texts = {"own": "data.text=demo", "foreign": f"data.text={foreign_text(options.work)}"}
        where = {name: pruned(options, f"seed={seed}", text, WHOLE) for name, text in texts.items()}
        for name, model in arms(options, seed).items():

            def found(
                model: Callable[[], PuzzleForCausalLM] = model, where: Mapping[str, Run] = where
            ) -> dict[str, dict[str, float]]:
                ready = model()
                return {text: quality(run, ready, "report", REPORT_SEQUENCES) for text, run in where.items()}

            results.once(f"{name}/{seed}", found)
    for name in dict.fromkeys(name.rpartition("/")[0] for name in results.figures):
        cells = ""
        for text in ("own", "foreign"):
            gaps = [results.figures[f"{name}/{seed}"][text]["ce_gap"] for seed in options.seeds]
            spread = statistics.stdev(gaps) if len(gaps) > 1 else float("nan")
            cells += f"  {text} {statistics.mean(gaps):+.4f} ± {spread:.4f}"
        print(f"{name:<34}{cells}")


if __name__ == "__main__":
    main()
