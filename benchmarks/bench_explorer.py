"""What one move of a slider takes in the explorer, drawing included: a Llama 70B, 80 layers x 54 blocks, three limits.

Scores are made up by rule, costs are the roofline's (search_instances.py). Writes ``results/explorer_speed.json``.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from environment import environment
from search_instances import SIZES, Size, _costs, _scores

from puzzle.notebook import open_run
from puzzle.notebook.front import ParetoFront
from puzzle.notebook.sliders import QUICK
from puzzle.notebook.solution import Tables
from puzzle.tables import ScoreTable

RESULTS = Path(__file__).parent / "results" / "explorer_speed.json"
CHAT = {"isl": 1024, "osl": 1024, "batch_size": 128, "device": "h100", "weights": "bf16", "tp": 8}
LIMITS = {"memory_gib": "60%", "output_tok_per_s": "176%", "params": "48%"}


def front(size: Size, folder: Path, seed: int) -> ParetoFront:
    (folder / "teacher").mkdir()
    shape = size.shape
    teacher = {
        "model_type": "llama",
        "num_hidden_layers": shape.num_layers,
        "tie_word_embeddings": False,
        **{
            name: getattr(shape, name)
            for name in ("hidden_size", "num_attention_heads", "head_dim", "intermediate_size", "vocab_size")
        },
        "num_key_value_heads": shape.num_kv_heads,
        "max_position_embeddings": shape.max_position_embeddings,
    }
    (folder / "teacher" / "config.json").write_text(json.dumps(teacher))
    space = {"attention": size.attention, "ffn": size.ffn, "pairs": size.form == "blocks"}
    (folder / "space.yaml").write_text(json.dumps(space))
    named = {"run": folder / "run", "teacher": folder / "teacher", "space": folder / "space.yaml"}
    config = {**{key: str(value) for key, value in named.items()}, "constraints": "half-memory"}
    (folder / "config.yaml").write_text(json.dumps({**config, "data": {"text": "demo"}}))
    opened = open_run(folder / "config.yaml", {"workloads": {"chat": CHAT}, "constraints": LIMITS})
    items = opened.run.items
    scores = ScoreTable.of(_scores(items, shape, random.Random(seed)))
    return ParetoFront.of(
        Tables(opened.run, scores, _costs(shape, items, opened.run.constraint_file)), "chat.memory_gib", "kl_nats"
    )


def moves(of: ParetoFront, count: int = 20) -> dict[str, Any]:
    """The memory slider a step at a time, down and back; the time until all is drawn, and that of the proof at rest."""
    begin = time.perf_counter()
    explorer = of.explore()
    opened = time.perf_counter() - begin
    slider, walls, cpus = explorer.controls[0], [], []
    slider.unobserve_all()
    for step in [*range(1, count // 2 + 1), *reversed(range(count // 2))]:
        slider.value = explorer.sliders.limits[0].start - step * slider.step
        begin, cpu = time.perf_counter(), time.process_time()
        explorer._solve(0, QUICK)
        walls.append(time.perf_counter() - begin)
        cpus.append(time.process_time() - cpu)
        assert not explorer._message.value, "nothing fits there"
    return {
        "points_of_the_front": len(of),
        "opening_wall_s": opened,
        "median_wall_s": statistics.median(walls),
        "median_cpu_s": statistics.median(cpus),
        "90%_cpu_s": float(np.quantile(cpus, 0.9)),
        "moves": len(walls),
    }


def main() -> None:
    told: dict[str, Any] = {"environment": environment()}
    for name in ("80x54-sites", "80x54-blocks"):
        with tempfile.TemporaryDirectory() as temporary:
            told[name] = moves(front(SIZES[name], Path(temporary), seed=0))
        print(name, told[name])
    RESULTS.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
