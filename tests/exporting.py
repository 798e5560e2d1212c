"""Students in memory, for tests of what is written from their folders."""

from __future__ import annotations

from pathlib import Path

from puzzle import build
from puzzle.export.hf import export_hf as export_source
from puzzle.export.source import Source
from puzzle.modeling import PuzzleForCausalLM


def saved(model: PuzzleForCausalLM, folder: Path) -> Path:
    """A student's folder, made beside ``folder``."""
    path = folder.with_name(f"{folder.name}-saved")
    path.mkdir(exist_ok=True)
    build.write_model(model, path, model.dtype)
    return path


def export_hf(model: PuzzleForCausalLM, tokenizer_dir: Path, out_dir: Path) -> None:
    export_source(Source.open(saved(model, out_dir)), tokenizer_dir, out_dir)
