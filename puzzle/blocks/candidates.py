"""Candidates for a variant's starting point, from the teacher's weights and the moments of one part of its layer.

    gqa       paper: neighbouring KV heads averaged        refit: and the output projection fitted
              merged: heads.py's groups, keys and values, and the output projection fitted
    window    paper: the teacher's weights                 refit: and the output projection fitted
    narrow    paper: the channels that contribute most     refit: and the down projection fitted
              obs: channels.py's order, and the down projection fitted
              mixed: likewise, with some of channels.py's linear ones among them
    experts   reap: those that count most: Σ over tokens of routing weight · |output| (REAP, arXiv 2510.13999)
    active    the teacher's weights
    linear    paper: the product of value and output (up and down) projection, as if each token saw itself only
              refit: least squares of what the site adds on the normed input

A new kind is one more entry of ``CANDIDATES``. Pure functions: what passes over tokens are needed is starts.py's part.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from puzzle.blocks import channels, heads
from puzzle.blocks.channels import GatedMoments, best_mixture
from puzzle.blocks.keys import Distances
from puzzle.blocks.layer import block_of, config_with, part_state
from puzzle.blocks.moments import RIDGE_TO_ZERO, Moments, exact_device, ridge
from puzzle.modeling.modeling_puzzle import PuzzleDecoderLayer
from puzzle.types import AttentionSpec, FfnSpec, Part, Spec, part_of

HORIZON = 4  # times the calibration window: how far apart the tokens are that merged keys are made for
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Draft:
    """A candidate. ``refit``: its last matrix is yet to be fitted, on what it sees when the candidate runs."""

    weights: Weights
    refit: bool = False


@dataclass(frozen=True)
class GatedSeen:
    """What a gated FFN's ``down`` projection W (D, I) saw: ``joint`` moments of its input x, the block's input z and
    one (I + D + 1), and ``activity`` (I,) Σ |x|."""

    down: Tensor
    joint: Moments
    activity: Tensor

    @property
    def gram(self) -> Tensor:
        """(I, I) of x."""
        return self.joint.gram[: len(self.activity), : len(self.activity)]

    def damping(self, num_features: int) -> float:
        return ridge(num_features, self.joint.num_tokens)

    @functools.cached_property
    def contribution_order(self) -> Tensor:
        return channels.contribution_order(self.activity, self.down)

    @functools.cached_property
    def obs_order(self) -> Tensor:
        return channels.obs_order(self.gram, self.down, self.damping(len(self.activity)))

    def refitted(self, kept: Tensor) -> Tensor:
        """(D, N) the down projection of the channels ``kept`` (N,)."""
        return channels.refit_down(self.gram, self.down, kept, self.damping(len(kept))).to(self.down).contiguous()


@dataclass(frozen=True)
class Seen:
    """What calibration tokens told of one part of the teacher's ``layer``.

    ``inputs``: moments of the block's input after the norm, with a constant one (D + 1), and of what the site adds (D).
    ``angles`` (d/2,): the rotary embedding's turns per token, of an attention; ``sequence_tokens`` of the calibration.
    ``gated``: of an FFN of one piece; ``experts`` (E,): how much each expert counted, of one of many.
    """

    layer: PuzzleDecoderLayer
    part: Part
    inputs: Moments
    sequence_tokens: int
    angles: Tensor | None = None
    gated: GatedSeen | None = None
    experts: Tensor | None = None


def drafts(seen: Seen, spec: Spec) -> dict[str, Draft]:
    """The candidates for ``spec`` by name; the paper's first."""
    return CANDIDATES[spec.kind](seen, spec)


def paper(layer: PuzzleDecoderLayer, spec: Spec, activity: Tensor | None = None) -> Weights:
    """The paper's start without any moments; ``activity`` (I,) Σ |x| orders the channels of a narrow FFN.

    Where the paper has none (experts, a linear map in their place) the teacher's first experts, and nothing added.
    """
    state = part_state(layer, part_of(spec))
    if isinstance(spec, AttentionSpec) and spec.num_kv_heads is not None and spec.kind == "gqa":
        attention: Any = layer.self_attn
        own = heads.Heads.of(state, attention.head_dim, exact_device(state["self_attn.k_proj.weight"].device))
        return heads.mean_pooled(own, spec.num_kv_heads).state(state)
    if isinstance(spec, FfnSpec) and spec.intermediate_size is not None:
        assert activity is not None
        order = channels.contribution_order(activity, state["mlp.down_proj.weight"])
        return _cut(state, order[: spec.intermediate_size].sort().values)
    if isinstance(spec, FfnSpec) and spec.kind == "experts":
        kept = torch.arange(spec.num_experts or 0)
        return {name: _experts_of(name, tensor, kept) for name, tensor in state.items()}
    if spec.kind == "linear":
        norms, matrix = _linear_parts(layer, spec)
        some = next(iter(state.values()))
        product = _product(layer, part_of(spec))
        size = layer.config.hidden_size
        return {**norms, matrix: some.new_zeros(size, size) if product is None else product}
    return state


def _keep(seen: Seen, spec: Spec) -> dict[str, Draft]:
    return {"teacher": Draft(part_state(seen.layer, seen.part))}


def _skip(seen: Seen, spec: Spec) -> dict[str, Draft]:
    return {"nothing": Draft({})}


def _window(seen: Seen, spec: Spec) -> dict[str, Draft]:
    state = part_state(seen.layer, "attention")
    return {"paper": Draft(state), "refit": Draft(state, refit=True)}


def _gqa(seen: Seen, spec: Spec) -> dict[str, Draft]:
    assert isinstance(spec, AttentionSpec) and spec.num_kv_heads is not None and seen.angles is not None
    attention: Any = seen.layer.self_attn
    state, covariance = part_state(seen.layer, "attention"), seen.inputs.gram
    own = heads.Heads.of(state, attention.head_dim, covariance.device)
    pooled = paper(seen.layer, spec)
    reach = min(HORIZON * seen.sequence_tokens, seen.layer.span[0] or math.inf)
    distances = Distances.up_to(int(reach), seen.angles)
    merged = heads.merged_heads(own, covariance, distances, spec.num_kv_heads, heads.gains_of(attention)).state(state)
    return {"paper": Draft(pooled), "refit": Draft(pooled, refit=True), "merged": Draft(merged, refit=True)}


def _narrow(seen: Seen, spec: Spec) -> dict[str, Draft]:
    assert isinstance(spec, FfnSpec) and spec.intermediate_size is not None and seen.gated is not None
    gated, state, width = seen.gated, part_state(seen.layer, "ffn"), spec.intermediate_size
    contributing, surviving = (order[:width].sort().values for order in (gated.contribution_order, gated.obs_order))
    contributed = _cut(state, contributing)
    found = {
        "paper": Draft(contributed),
        "refit": Draft({**contributed, "mlp.down_proj.weight": gated.refitted(contributing)}),
        "obs": Draft({**_cut(state, surviving), "mlp.down_proj.weight": gated.refitted(surviving)}),
    }
    mixed = _mixed(seen.layer, gated, width)
    return found if mixed is None else {**found, "mixed": Draft(mixed)}


def _mixed(layer: PuzzleDecoderLayer, gated: GatedSeen, width: int) -> Weights | None:
    """With linear channels; None where they are of no use."""
    state = part_state(layer, "ffn")
    bias = "mlp.up_proj.bias" in state
    joint, up_norm = gated.joint.gram, state["mlp.up_proj.weight"].norm(dim=1).mean().item()
    moments = GatedMoments(joint, gated.down.to(joint), RIDGE_TO_ZERO * gated.damping(width), bias, up_norm)
    mixture = best_mixture(moments, gated.obs_order, width)
    if mixture is None:
        return None
    cut = _cut(state, mixture.kept)
    added = {f"mlp.{name}_proj.weight": rows[:, :-1] for name, rows in (("gate", mixture.gate), ("up", mixture.up))}
    if bias:
        added |= {"mlp.gate_proj.bias": mixture.gate[:, -1], "mlp.up_proj.bias": mixture.up[:, -1]}
    cut |= {name: torch.cat([cut[name], rows.to(cut[name])]) for name, rows in added.items()}
    return {**cut, "mlp.down_proj.weight": mixture.down.to(gated.down).contiguous()}


def _experts(seen: Seen, spec: Spec) -> dict[str, Draft]:
    assert isinstance(spec, FfnSpec) and spec.num_experts is not None and seen.experts is not None
    kept = seen.experts.topk(spec.num_experts).indices.sort().values
    state = part_state(seen.layer, "ffn")
    return {"reap": Draft({name: _experts_of(name, tensor, kept) for name, tensor in state.items()})}


def _experts_of(name: str, tensor: Tensor, kept: Tensor) -> Tensor:
    return tensor[kept.to(tensor.device)] if name.startswith(("mlp.experts.", "mlp.gate.")) else tensor


def paper_nested(layer: PuzzleDecoderLayer, width: int, activity: Tensor) -> Weights:
    """The teacher's ``width`` channels that contribute most, the first the most: each prefix is the paper's start."""
    state = part_state(layer, "ffn")
    return _cut(state, channels.contribution_order(activity, state["mlp.down_proj.weight"])[:width])


def nested_weights(seen: Seen, width: int) -> Weights:
    """A gated FFN of the ``width`` most important channels, the most important first, so that each prefix is an FFN.

    The order is that of ``obs``; the down projection is fitted for the whole width.
    """
    assert seen.gated is not None
    kept = seen.gated.obs_order[:width]
    cut = _cut(part_state(seen.layer, "ffn"), kept)
    return {**cut, "mlp.down_proj.weight": seen.gated.refitted(kept)}


def _cut(state: Mapping[str, Tensor], kept: Tensor) -> Weights:
    """The tensors of a gated FFN with only the channels ``kept``."""

    def of(name: str, tensor: Tensor) -> Tensor:
        index = kept.to(tensor.device)
        if name.startswith(("mlp.gate_proj.", "mlp.up_proj.")):
            return tensor[index]
        return tensor[:, index].contiguous() if name == "mlp.down_proj.weight" else tensor

    return {name: of(name, tensor) for name, tensor in state.items()}


def _linear(seen: Seen, spec: Spec) -> dict[str, Draft]:
    norms, matrix = _linear_parts(seen.layer, spec)
    moments = Moments(seen.inputs.gram[:-1, :-1], seen.inputs.cross[:-1], seen.inputs.num_tokens)
    product = _product(seen.layer, seen.part)
    found = {} if product is None else {"paper": Draft({**norms, matrix: product})}
    some = next(iter(norms.values()))
    fitted = moments.fit().to(some).contiguous()
    return {**found, "refit": Draft({**norms, matrix: fitted})}


def _linear_parts(layer: PuzzleDecoderLayer, spec: Spec) -> tuple[Weights, str]:
    """The norms that a linear variant keeps, and the name of its matrix."""
    state, names = part_state(layer, part_of(spec)), _names(layer, spec)
    (matrix,) = (name for name in names if name.startswith(("self_attn.", "mlp.")))
    return {name: state[name] for name in names if name != matrix}, matrix


def _names(layer: PuzzleDecoderLayer, spec: Spec) -> list[str]:
    """The names of the tensors that ``spec`` has at this layer."""
    part, blocks = part_of(spec), {"attention": AttentionSpec("skip"), "ffn": FfnSpec("skip")}
    config = config_with(layer.config, layer.layer_idx, block_of(**{**blocks, part: spec}))  # type: ignore[arg-type]
    with torch.device("meta"):
        return list(part_state(PuzzleDecoderLayer(config, layer.layer_idx, 0), part))


def _product(layer: PuzzleDecoderLayer, part: Part) -> Tensor | None:
    """(D, D) the paper's linear variant; None for experts, of which it says nothing."""
    if part == "ffn":
        mlp: Any = layer.mlp
        return mlp.down_proj.weight @ mlp.up_proj.weight if hasattr(mlp, "up_proj") else None
    attention: Any = layer.self_attn
    values = attention.v_proj.weight.unflatten(0, (-1, attention.head_dim))  # (K, d, D)
    per_head = values.repeat_interleave(attention.num_key_value_groups, 0).flatten(0, 1)  # (H d, D)
    product: Tensor = attention.o_proj.weight @ per_head
    return product


CANDIDATES: Mapping[str, Callable[[Seen, Spec], dict[str, Draft]]] = {
    "keep": _keep,
    "skip": _skip,
    "gqa": _gqa,
    "window": _window,
    "narrow": _narrow,
    "experts": _experts,
    "active": _keep,
    "linear": _linear,
}
