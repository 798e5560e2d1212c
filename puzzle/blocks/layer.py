"""One layer with other blocks than the teacher's: how a variant becomes a module and its weights a state dict.

A variant is trained, scored and measured as a :class:`PuzzleDecoderLayer` in which one part, or both, is the variant;
names of tensors are those within a layer (``self_attn.q_proj.weight``), so building a student is only putting prefixes
on.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from puzzle.modeling import PuzzleConfig, PuzzleDecoderLayer, part_prefixes
from puzzle.space import PARTS
from puzzle.teacher import load_state
from puzzle.types import AttentionSpec, FfnSpec, Item, Part, Spec
from puzzle.variants import block_part


def block_of(attention: AttentionSpec, ffn: FfnSpec) -> dict[str, dict[str, Any]]:
    """The entry of ``config.blocks`` that the two specs mean."""
    return {"attention": block_part(attention), "ffn": block_part(ffn)}


def config_with(config: PuzzleConfig, layer_idx: int, block: Mapping[str, Any]) -> PuzzleConfig:
    """``config`` with one layer's block replaced."""
    changed = copy.copy(config)
    assert config.blocks is not None
    changed.blocks = [*config.blocks]
    changed.blocks[layer_idx] = dict(block)
    return changed


def parts_of(item: Item) -> dict[Part, Spec]:
    """The spec of each part that the item replaces."""
    return {site.part: spec for site, spec in item.at.items()}


def layer_with(
    teacher_layer: PuzzleDecoderLayer, specs: Mapping[Part, Spec], weights: Mapping[str, Tensor]
) -> PuzzleDecoderLayer:
    """A layer with ``specs`` in their parts, holding ``weights`` there in fp32; other parts are the teacher's modules.

    What ``specs`` keep of the teacher and ``weights`` lack is copied from the teacher, in fp32 too.
    """
    index, config = teacher_layer.layer_idx, teacher_layer.config
    kept: dict[Part, Any] = {"attention": AttentionSpec("keep"), "ffn": FfnSpec("keep")}
    with torch.device("meta"):
        layer = PuzzleDecoderLayer(config_with(config, index, block_of(**{**kept, **specs})), index, index)
    device = next(teacher_layer.parameters()).device
    for name, module in teacher_layer.named_children():
        if any(f"{name}.".startswith(part_prefixes(config, part)) for part in PARTS if part not in specs):
            setattr(layer, name, module)
    own: dict[str, Tensor] = {}
    for part, spec in specs.items():
        given = {name: tensor for name, tensor in weights.items() if name.startswith(part_prefixes(config, part))}
        own.update(given if given or spec.kind != "keep" else part_state(teacher_layer, part))
    shared = [name for part in PARTS if part not in specs for name in part_state(layer, part)]
    state = {name: tensor.to(device, torch.float32, copy=True) for name, tensor in own.items()}
    load_state(layer, state, f"layer {index}, {', '.join(spec.kind for spec in specs.values())}", present=shared)
    return layer.train(teacher_layer.training)


def part_state(layer: PuzzleDecoderLayer, part: Part) -> dict[str, Tensor]:
    """The tensors of one part of a layer, by their names within the layer."""
    prefixes = part_prefixes(layer.config, part)
    return {name: tensor for name, tensor in layer.state_dict().items() if name.startswith(prefixes)}


def part_parameters(layer: PuzzleDecoderLayer, part: Part) -> list[nn.Parameter]:
    prefixes = part_prefixes(layer.config, part)
    return [parameter for name, parameter in layer.named_parameters() if name.startswith(prefixes)]


def output_projection(layer: PuzzleDecoderLayer, part: Part) -> nn.Linear:
    """The last matrix of the part: everything the part adds to the residual stream comes out of it."""
    module = layer.self_attn if part == "attention" else layer.mlp
    names = ("o_proj", "linear_attn", "down_proj", "linear_mlp")
    found = [getattr(module, name) for name in names if hasattr(module, name)]
    assert len(found) == 1 and isinstance(found[0], nn.Linear)
    return found[0]


@contextlib.contextmanager
def captured_calls(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """(input, output) of every call of ``module`` inside the block."""
    found: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        found.append((given.detach(), (output[0] if isinstance(output, tuple) else output).detach()))

    handle = module.register_forward_hook(keep, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()
