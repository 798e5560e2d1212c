"""Families that are not Llama, from the text to the report."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from puzzle.cli import main
from puzzle.run import Run
from tests.pipeline.conftest import Project
from tests.tiny_families import FULL, SLIDING, make_stock

# a layer with a window of its own before one without; a layer of experts before a dense one
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "gemma3_text": (
        {"layer_types": [SLIDING, FULL]},
        "attention: [keep, gqa-1, window-3, skip]\nffn: [keep, narrow-16, skip]\n",
    ),
    "qwen3_moe": (
        {},
        "attention: [keep, skip]\nffn: [keep, narrow-16, experts-3, active-1, skip]\n",
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_all_the_way(family: str, project: Project, tiny_tokenizer_dir: Path) -> None:
    fields, space = FAMILIES[family]
    teacher = project.folder / "teacher"
    shutil.rmtree(teacher)
    make_stock(family, vocab_size=128, num_hidden_layers=2, **fields).save_pretrained(teacher)
    shutil.copytree(tiny_tokenizer_dir, teacher, dirs_exist_ok=True)
    (project.folder / "space.yaml").write_text(space)
    assert main(["--debug", "run", str(project.config)]) == 0
    run = Run.open(project.config)
    assert run.shape.family == family
    assert not run.read_scores().failed
    assert run.report.is_file()
