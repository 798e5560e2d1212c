"""Makes the cost tables that are shipped: ``profiling/tables/GPU/MODEL.csv``, from the models' sizes alone.

    python benchmarks/make_tables.py --device cuda [--models llama-3.1-8b …]

Random weights suffice: of each model the stack holds every shape of the search space once, two whole layers, embedding
and head. A point that does not fit on the device is left out, and the table says so in its first lines. Prints how long
each model took. A table that is there already is not made again.
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
import time
from pathlib import Path

import torch
import transformers

from puzzle import yamlfiles
from puzzle.checkpoint import read_shape
from puzzle.config import SpaceFile
from puzzle.modeling import PuzzleConfig
from puzzle.profiling.grid import GridPoint
from puzzle.profiling.hardware import device_name
from puzzle.profiling.imported import write_table
from puzzle.profiling.measure import measure_point
from puzzle.profiling.stack import SiteStack
from puzzle.space import PARTS, SearchSpace
from puzzle.types import Cost, Costs, Gap, ModelShape

TABLES = Path(__file__).parent.parent / "profiling" / "tables"
LLAMA_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS: dict[str, transformers.PretrainedConfig] = {
    "llama-3.1-8b": transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rope_parameters=LLAMA_ROPE,
    ),
    "llama-3.1-70b": transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rope_parameters=LLAMA_ROPE,
    ),
    "qwen3-8b": transformers.Qwen3Config(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
    ),
}
POINTS = (
    *(GridPoint("prefill", size, tokens) for size in (1, 4) for tokens in (1024, 4096)),
    *(GridPoint("decode", size, tokens) for size in (1, 16, 64, 256) for tokens in (128, 1024, 4096, 8192)),
)


def table(
    name: str, points: tuple[GridPoint, ...], device: str, dtype: str, repeats: int
) -> tuple[ModelShape, list[Cost], list[Gap]]:
    """All costs of one model, and the points that did not fit."""
    own = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        own.save_pretrained(folder)
        shape = read_shape(Path(folder))
    file = yamlfiles.load(SpaceFile, yamlfiles.locate("space", "llama"))
    space = SearchSpace.parse({part: getattr(file, part) for part in PARTS}, shape, file.ffn_multiple_of)
    specs = [spec for item in space.items() for spec in item.specs]
    stack = SiteStack.build(shape, PuzzleConfig.from_family(own), specs, device, dtype)  # type: ignore[arg-type]
    rows: list[Cost] = []
    gaps: list[Gap] = []
    for point in points:
        found = measure_point(stack, point, repeats, seed=0)
        rows += found.costs
        gaps += found.gaps
        print(
            f"{name} {point.id}: {len(found.costs)} shapes{''.join(f'; {gap.reason}' for gap in found.gaps)}",
            flush=True,
        )
    return shape, rows, gaps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--points", type=int, default=len(POINTS), help="only the first so many")
    parser.add_argument("--out", type=Path, default=TABLES)
    args = parser.parse_args()
    for name in args.models:
        path = args.out / device_name(args.device) / f"{name}.csv"
        if path.exists():
            continue
        start = time.perf_counter()
        shape, rows, gaps = table(name, POINTS[: args.points], args.device, args.dtype, args.repeats)
        seconds = time.perf_counter() - start
        notes = {
            "model": f"{name} ({shape.num_layers} layers), search space llama",
            "device": torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else args.device,
            "torch": torch.__version__,
            "date": datetime.date.today().isoformat(),
            "measured in": f"{seconds:.0f} s",
            **{f"not measured {number}": f"{gap}" for number, gap in enumerate(gaps)},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_table(path, Costs(tuple(rows)), notes)
        print(f"{path}: {len(rows)} costs in {seconds:.0f} s", flush=True)
        if args.device.startswith("cuda"):
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
