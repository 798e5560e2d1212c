"""Batches, and units to train."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from puzzle.blocks.distill import Task
from puzzle.blocks.layer import part_state
from puzzle.data.batches import Batch
from puzzle.modeling import PuzzleDecoderLayer, PuzzleForCausalLM
from puzzle.teacher import LayerPass, context_of, embed, layers_of, run_layer
from puzzle.types import AttentionSpec, FfnSpec, Item, Site, Spec
from puzzle.variants import site_item

SPECS: list[Spec] = [AttentionSpec("gqa", num_kv_heads=2), FfnSpec("narrow", intermediate_size=48), FfnSpec("linear")]


def batch(step: int) -> Batch:
    """(4, 16) ids that depend on the step alone."""
    return Batch(torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(step)), None, None)


def start_of(layers: Sequence[PuzzleDecoderLayer], item: Item) -> Task:
    """The teacher's weights cut to the item's sizes: a start as bad as any."""
    weights: dict[str, Tensor] = {}
    for site, spec in zip(item.sites, item.specs, strict=True):
        weights |= _cut(part_state(layers[site.layer], site.part), spec)
    return Task(item.id, (item,), weights)


def _cut(state: dict[str, Tensor], spec: Spec) -> dict[str, Tensor]:
    if spec.kind in ("keep", "skip"):
        return {}
    if spec.kind == "linear":
        norm = next(name for name in state if "layernorm" in name)
        matrix = "self_attn.linear_attn.weight" if norm.startswith("input") else "mlp.linear_mlp.weight"
        return {norm: state[norm], matrix: torch.eye(64) / 8}
    if isinstance(spec, AttentionSpec):
        rows = 16 * (spec.num_kv_heads or 4)
        return {name: t[:rows] if ".k_proj" in name or ".v_proj" in name else t for name, t in state.items()}
    return {name: _first(name, t, spec.intermediate_size or 0) for name, t in state.items()}


def _first(name: str, tensor: Tensor, width: int) -> Tensor:
    if not name.startswith("mlp."):
        return tensor
    return tensor[:, :width] if ".down_proj" in name else tensor[:width]


def items_at(layers: list[int]) -> list[Item]:
    return [
        site_item(Site(layer, "attention" if isinstance(spec, AttentionSpec) else "ffn"), spec)
        for layer in layers
        for spec in SPECS
    ]


def layer_passes(model: PuzzleForCausalLM, batch: Batch, num_layers: int) -> list[LayerPass]:
    """The passes of a whole model's first ``num_layers`` layers over one batch."""
    hidden, context = embed(model.model, batch, model.dtype), context_of(model.model, batch, model.dtype)
    passes: list[LayerPass] = []
    for layer in layers_of(model)[:num_layers]:
        passes.append(run_layer(layer, passes[-1].after if passes else hidden, context))
    return passes
