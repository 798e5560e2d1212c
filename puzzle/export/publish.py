"""Fills the folder of an export: weights in the format asked for, what goes along, the proof that it loads, the card.

Reads a :class:`~puzzle.export.source.Source`; writes one folder, for ``artifacts.publish_folder``, and, when an export
is verified again, the verdicts in its card and beside its reference. Nothing is published that a runtime here fails on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from puzzle import artifacts
from puzzle.export.card import Untried, untried, with_loading, with_verdicts
from puzzle.export.decilm import export_mlx, export_nemotron_nas
from puzzle.export.folder import copy_licences
from puzzle.export.gguf import GgufType, export_gguf, is_exact
from puzzle.export.hf import export_hf
from puzzle.export.source import Source
from puzzle.export.verify import REFERENCE, Verdict, verify, write_reference
from puzzle.types import Format, PuzzleError, to_json
from puzzle.variants import variant_name

Write = Callable[[Source, Path, Path, GgufType | None], None]
FORMATS: Mapping[Format, Write] = {
    "hf": lambda source, tokenizer, folder, _: export_hf(source, tokenizer, folder),
    "nemotron-nas": lambda source, tokenizer, folder, _: export_nemotron_nas(source, tokenizer, folder),
    "gguf": export_gguf,
    "mlx": lambda source, tokenizer, folder, _: export_mlx(source, tokenizer, folder),
}
CHECKED_IN: Mapping[Format, tuple[str, ...]] = {  # those of verify.RUNTIMES that can read it
    "hf": ("transformers",),
    "nemotron-nas": ("torch",),
    "gguf": ("torch", "llama.cpp"),
    "mlx": ("torch", "mlx-lm"),
}
ON_REQUEST: Mapping[Format, tuple[str, ...]] = {  # too heavy to be started unasked
    "hf": ("vllm-plugin",),
    "nemotron-nas": ("vllm",),
}
CARD, VERDICTS = "README.md", "verification/verdicts.json"
LOOSE = (CARD, VERDICTS)  # of a published export, what later verifications change
ARCHITECTURE = "architecture.json"


def fill(
    folder: Path,
    source: Source,
    target: Format,
    tokenizer_dir: Path,
    card: str,
    gguf_type: GgufType | None = None,
) -> dict[str, Any]:
    """Writes the whole export into ``folder``, new or empty; what its unit's marker is to say.

    PuzzleError where it does not load as it should in a runtime that is installed here.
    """
    FORMATS[target](source, tokenizer_dir, folder, gguf_type)
    copy_licences(tokenizer_dir, folder)
    variants = zip(source.shape.sites, (spec for specs in source.layers for spec in specs), strict=True)
    architecture = {str(site): variant_name(spec) for site, spec in variants}
    (folder / ARCHITECTURE).write_text(json.dumps(architecture, indent=1) + "\n")
    exact = target != "gguf" or is_exact(source, gguf_type)
    write_reference(source.folder, folder / REFERENCE, exact, tokenizer_dir)
    verdicts = [verify(folder, runtime) for runtime in CHECKED_IN[target]]
    if wrong := [verdict.line() for verdict in verdicts if verdict.status == "failed"]:
        raise PuzzleError(f"the export as {target} does not load as it should: {'; '.join(wrong)}")
    others = untried(target, source.shape, source.layers, [one.runtime for one in verdicts])
    card = with_loading(card, own_code=(folder / "modeling_puzzle.py").exists())
    lines = [one.line() for one in verdicts], [one.line for one in others]
    (folder / CARD).write_text(with_verdicts(card, *lines), encoding="utf-8")
    (folder / VERDICTS).write_text(_verdicts_text(verdicts))
    tried, rest = [_marked(one) for one in verdicts], [to_json(one) for one in others]
    return {"format": target, "verification": tried, "others": rest}


def note_verdicts(export_dir: Path, new: Sequence[Verdict], others: Sequence[Untried]) -> None:
    """Writes what was found now, and what was found before of other runtimes, into the card of an export."""
    path = export_dir / VERDICTS
    known = artifacts.read_json(path).get("verdicts", []) if path.exists() else []
    fresh = {one.runtime for one in new}
    kept = [one for one in known if one["runtime"] not in fresh]
    lines = [*(str(one["line"]) for one in kept), *(one.line() for one in new)]
    spoken = {str(one["runtime"]) for one in kept if one["status"] != "unverified"} | fresh
    rest = [one.line for one in others if one.runtime not in spoken]
    card = export_dir / CARD
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    artifacts.write_text(card, with_verdicts(text, lines, rest))
    artifacts.write_text(path, json.dumps({"verdicts": [*kept, *map(_marked, new)]}, indent=1) + "\n")


def _marked(verdict: Verdict) -> dict[str, Any]:
    return {**to_json(verdict), "status": verdict.status, "line": verdict.line()}


def _verdicts_text(verdicts: Sequence[Verdict]) -> str:
    return json.dumps({"verdicts": [_marked(one) for one in verdicts]}, indent=1) + "\n"
