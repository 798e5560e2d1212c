"""Tables of models that nobody trained: shapes from a ``config.json``, scores made up by rule, no times."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from puzzle.notebook import open_run
from puzzle.notebook.front import ParetoFront
from puzzle.notebook.solution import Tables
from puzzle.run import Run
from puzzle.types import Costs
from tests.search.search_factories import make_scores

SPACE = {"attention": ["keep", "gqa-2", "skip"], "ffn": ["keep", "narrow-48", "skip"]}
WORKLOADS = {"chat": {"isl": 128, "osl": 64, "batch_size": [2, 8]}}
MakeFront = Callable[..., ParetoFront]


def made_run(folder: Path, num_layers: int, space: dict[str, Any]) -> Run:
    """Hidden 64, 4 heads and KV heads, FFN 96; nothing of it was trained or scored."""
    teacher = folder / "teacher"
    teacher.mkdir()
    shape = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": num_layers, "num_attention_heads": 4,
        "num_key_value_heads": 4, "intermediate_size": 96, "vocab_size": 128, "max_position_embeddings": 512,
    }  # fmt: skip
    (teacher / "config.json").write_text(json.dumps(shape))
    (folder / "space.yaml").write_text(json.dumps(space))
    named = {"run": folder / "run", "teacher": teacher, "space": folder / "space.yaml", "constraints": "half-memory"}
    config = {**{key: str(value) for key, value in named.items()}, "data": {"text": "demo", "sequence_tokens": 256}}
    (folder / "config.yaml").write_text(json.dumps(config))
    return Run.open(folder / "config.yaml")


@pytest.fixture
def make_front(tmp_path: Path) -> MakeFront:
    """``make_front(num_layers, constraints, cost, space)``: its front, by scores made up by rule."""

    def make(
        num_layers: int = 3,
        constraints: dict[str, Any] | None = None,
        cost: str = "chat.memory_gib",
        space: dict[str, Any] = SPACE,
    ) -> ParetoFront:
        run = made_run(tmp_path, num_layers, space)
        given = {"workloads": WORKLOADS, "constraints": {"memory_gib": "60%"}, **(constraints or {})}
        opened = open_run(tmp_path / "config.yaml", given)
        tables = Tables(opened.run, make_scores(run.items), Costs())
        return ParetoFront.of(tables, cost, "kl_nats")

    return make
