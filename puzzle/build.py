"""Puts a student together: the teacher's embedding, norm and head, and for each site the chosen variant's weights.

Reads the teacher, the chosen items and the library; writes a folder that :func:`puzzle.teacher.load_model` reads back
(``config.json``, ``model.safetensors``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from puzzle.blocks.layer import block_of, part_state
from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM
from puzzle.sharding import whole
from puzzle.teacher import freeze, layers_of, load_state
from puzzle.types import AttentionSpec, FfnSpec, Item, Site


def blocks_of(items: Sequence[Item], num_layers: int) -> list[dict[str, Any]]:
    """``config.blocks`` of the architecture."""
    specs = {site: spec for item in items for site, spec in item.at.items()}
    blocks = []
    for layer in range(num_layers):
        attention, ffn = specs[Site(layer, "attention")], specs[Site(layer, "ffn")]
        assert isinstance(attention, AttentionSpec) and isinstance(ffn, FfnSpec)
        blocks.append(block_of(attention, ffn))
    return blocks


def build_student(
    teacher: PuzzleForCausalLM, items: Sequence[Item], read_weights: Callable[[Item], Mapping[str, Tensor]]
) -> PuzzleForCausalLM:
    """A new model on the teacher's device; ``read_weights`` is asked for items that are neither keep nor skip."""
    config = copy.deepcopy(teacher.config)
    config.blocks = blocks_of(items, config.num_hidden_layers)
    state = {name: tensor for name, tensor in teacher.state_dict().items() if not name.startswith("model.layers.")}
    for item in items:
        for site, spec in item.at.items():
            if spec.kind == "skip":
                continue
            kept = spec.kind == "keep"
            part = part_state(layers_of(teacher)[site.layer], site.part) if kept else read_weights(item)
            state.update({f"model.layers.{site.layer}.{name}": tensor for name, tensor in part.items()})
    student = PuzzleForCausalLM(config)
    load_state(student, state, "student")
    return freeze(nn.Module.to(student, teacher.device))


def write_model(model: PuzzleForCausalLM, folder: Path | None, dtype: torch.dtype) -> None:
    """Writes the model, rounded to ``dtype``, for :func:`puzzle.teacher.load_model`; a tied head is stored once.

    Of a sharded model every rank calls this, all but one with None for a folder: they write nothing.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        full = whole(tensor.detach())
        if folder is not None:
            state[name] = full.to("cpu", dtype)
    if folder is not None:
        write_state(state, model.config, folder, dtype)


def write_state(state: Mapping[str, Tensor], config: PuzzleConfig, folder: Path, dtype: torch.dtype) -> None:
    """:func:`write_model` of a model of ``config`` by its tensors alone."""
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    stored = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items() if name not in tied}
    save_file(stored, folder / "model.safetensors")
    config.save_pretrained(folder)
