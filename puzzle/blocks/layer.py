"""One layer with other blocks than the teacher's: how a variant becomes a module and its weights a state dict.

A variant is trained, scored and measured as a :class:`PuzzleDecoderLayer` whose one part is the variant; names of
tensors are those within a layer (``self_attn.q_proj.weight``), so building a student is only putting prefixes on.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from puzzle.modeling import PuzzleConfig
from puzzle.modeling.modeling_puzzle import PuzzleDecoderLayer
from puzzle.teacher import load_state
from puzzle.types import AttentionSpec, FfnSpec, Part, Spec
from puzzle.variants import block_part

PREFIXES: dict[Part, tuple[str, ...]] = {
    "attention": ("input_layernorm.", "self_attn."),
    "ffn": ("post_attention_layernorm.", "mlp."),
}


def block_of(attention: AttentionSpec, ffn: FfnSpec) -> dict[str, dict[str, Any]]:
    """The entry of ``config.blocks`` that the two specs mean."""
    return {"attention": block_part(attention), "ffn": block_part(ffn)}


def config_with(config: PuzzleConfig, layer_idx: int, block: Mapping[str, Any]) -> PuzzleConfig:
    """``config`` with one layer's block replaced."""
    changed = copy.deepcopy(config)
    assert changed.blocks is not None
    changed.blocks[layer_idx] = dict(block)
    return changed


def variant_layer(
    teacher_layer: PuzzleDecoderLayer, part: Part, spec: Spec, weights: Mapping[str, Tensor]
) -> PuzzleDecoderLayer:
    """A copy of the teacher's layer with ``spec`` in ``part``, holding ``weights`` there; the other part is shared."""
    index, config = teacher_layer.layer_idx, teacher_layer.config
    specs: dict[Part, Any] = {"attention": AttentionSpec("keep"), "ffn": FfnSpec("keep"), part: spec}
    layer = PuzzleDecoderLayer(config_with(config, index, block_of(**specs)), index, index)
    other: Part = "ffn" if part == "attention" else "attention"
    for name, module in teacher_layer.named_children():
        if f"{name}.".startswith(PREFIXES[other]):
            setattr(layer, name, module)
    device = next(teacher_layer.parameters()).device
    state = {**part_state(teacher_layer, other), **weights}
    load_state(layer, state, f"layer {index}, {part} {spec.kind}")
    return layer.to(device)


def part_state(layer: nn.Module, part: Part) -> dict[str, Tensor]:
    """The tensors of one part of a layer, by their names within the layer."""
    return {name: tensor for name, tensor in layer.state_dict().items() if name.startswith(PREFIXES[part])}


def part_parameters(layer: nn.Module, part: Part) -> list[nn.Parameter]:
    return [parameter for name, parameter in layer.named_parameters() if name.startswith(PREFIXES[part])]


def output_projection(layer: PuzzleDecoderLayer, part: Part) -> nn.Linear:
    """The last matrix of the part: everything the part adds to the residual stream comes out of it."""
    module = layer.self_attn if part == "attention" else layer.mlp
    names = ("o_proj", "linear_attn", "down_proj", "linear_mlp")
    found = [getattr(module, name) for name in names if hasattr(module, name)]
    assert len(found) == 1 and isinstance(found[0], nn.Linear)
    return found[0]


@contextlib.contextmanager
def captured_inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what ``module`` is called with inside the block."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    try:
        yield seen
    finally:
        handle.remove()
