"""The best starting point of each variant of a layer: several candidates, of which held-out tokens choose.

Reads the teacher's layer and its passes over tokens, which are computed anew each time they are iterated and never
held: the calibration ones once for the teacher's moments, and once more if there are candidates whose last matrix sees
something of its own (gqa, window); the held-out ones once per variant. Computes each candidate's local loss, the one
that BLD trains on, and returns the weights with the lowest, and all the losses.

A last matrix is fitted to the output of the teacher's block. Where a norm follows it (Gemma 3), a token counts by
``1 / rms(y)²``, as its error does after that norm. A linear variant has no norm there: it is fitted to what the site
adds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puzzle.blocks.candidates import Draft, GatedSeen, Seen, Weights, drafts, nested_weights, paper, paper_nested
from puzzle.blocks.layer import captured_calls, layer_with, output_projection
from puzzle.blocks.loss import LossAt, LossKind, local_loss
from puzzle.blocks.moments import Moments, exact_device, token_weights
from puzzle.modeling.modeling_puzzle import PuzzleDecoderLayer
from puzzle.teacher import LayerPass, attention_delta
from puzzle.types import Part, Spec, part_of


@dataclass(frozen=True)
class Start:
    """``weights`` of the candidate ``name``, whose local loss on held-out tokens is the lowest of ``losses``."""

    weights: Weights
    name: str
    losses: dict[str, float]


@torch.no_grad()
def nested_start(layer: PuzzleDecoderLayer, width: int, calibration: Iterable[LayerPass]) -> Weights:
    """An FFN of ``width`` channels, sorted, that holds every narrower one; from one pass."""
    return nested_weights(look(layer, {"ffn"}, calibration)["ffn"], width)


@torch.no_grad()
def paper_nested_start(layer: PuzzleDecoderLayer, width: int, calibration: Iterable[LayerPass]) -> Weights:
    """Likewise, each narrower one being the paper's start."""
    return paper_nested(layer, width, _activity(layer, calibration))


@torch.no_grad()
def paper_starts(
    layer: PuzzleDecoderLayer, specs: Sequence[Spec], calibration: Iterable[LayerPass]
) -> Iterator[tuple[Spec, Start]]:
    """The paper's start for each of ``specs``; of the tokens it takes only what each channel contributes."""
    activity = _activity(layer, calibration) if any(spec.kind == "narrow" for spec in specs) else None
    for spec in specs:
        yield spec, Start(paper(layer, spec, activity), "paper", {})


def _activity(layer: PuzzleDecoderLayer, calibration: Iterable[LayerPass]) -> Tensor:
    """(I,) fp64: Σ |x| of what a gated FFN's down projection sees."""
    down = output_projection(layer, "ffn")
    total = torch.zeros(down.in_features, dtype=torch.float64, device=exact_device(down.weight.device))
    for one in calibration:
        with captured_calls(down) as calls:
            layer.ffn_delta(one.middle)
        total += calls[0][0][token_weights(one.middle) > 0].abs().sum(0).to(total)
    return total


@torch.no_grad()
def best_starts(
    layer: PuzzleDecoderLayer,
    specs: Sequence[Spec],
    calibration: Iterable[LayerPass],
    held_out: Iterable[LayerPass],
    loss: tuple[LossAt, LossKind] = ("layer", "mse"),
) -> Iterator[tuple[Spec, Start]]:
    """For each of ``specs``, in their order, the best of its candidates by ``loss`` (loss.py)."""
    seen = look(layer, {part_of(spec) for spec in specs}, calibration)
    attention: dict[Spec, dict[str, Draft]] = {
        spec: drafts(seen["attention"], spec) for spec in specs if part_of(spec) == "attention"
    }
    fitted = refitted(layer, attention, calibration)
    for spec in specs:
        # an FFN's candidates are large: they are made when their turn has come, and let go after it
        ready = fitted.get(spec) or {name: draft.weights for name, draft in drafts(seen["ffn"], spec).items()}
        yield spec, _best(layer, spec, ready, held_out, loss)


def _best(
    layer: PuzzleDecoderLayer,
    spec: Spec,
    ready: Mapping[str, Weights],
    held_out: Iterable[LayerPass],
    loss: tuple[LossAt, LossKind],
) -> Start:
    part = part_of(spec)
    variants = {name: layer_with(layer, {part: spec}, weights) for name, weights in ready.items()}
    totals, count = dict.fromkeys(variants, 0.0), 0
    for one in held_out:
        count += 1
        for name, variant in variants.items():
            totals[name] += local_loss(variant, (part,), one, *loss).item()
    losses = {name: total / count for name, total in totals.items()}
    best = min(losses, key=lambda name: losses[name] if math.isfinite(losses[name]) else math.inf)
    return Start(dict(ready[best]), best, losses)


# --------------------------------------------------------------------------------------- passes over calibration


def look(layer: PuzzleDecoderLayer, parts: Iterable[Part], calibration: Iterable[LayerPass]) -> dict[Part, Seen]:
    """The teacher's moments, from one pass. NotFiniteError where they are of no use."""
    seen: dict[Part, Seen] = {}
    parts = sorted(parts)
    for one in calibration:
        weights = token_weights(one.middle)
        for part in parts:
            if part not in seen:
                seen[part] = _nothing_seen(layer, part, one)
            _see(seen[part], one, weights)
    for of_part in seen.values():
        of_part.inputs.check_finite()
        if of_part.gated is not None:
            of_part.gated.joint.check_finite()
    return seen


def refitted(
    layer: PuzzleDecoderLayer, named: Mapping[Spec, Mapping[str, Draft]], calibration: Iterable[LayerPass]
) -> dict[Spec, dict[str, Weights]]:
    """Weights of attention candidates by spec and name; the output projections that ask for it fitted, in one pass."""
    fits = {
        (spec, name): _Fit.of(layer_with(layer, {"attention": spec}, draft.weights))
        for spec, of_spec in named.items()
        for name, draft in of_spec.items()
        if draft.refit
    }
    for one in calibration if fits else ():
        outputs = _run(layer, "attention", one).outputs
        weights = _as_normed(layer, "attention", outputs, token_weights(one.middle))
        for fit in fits.values():
            fit.add(one, outputs, weights)
    return {
        spec: {
            name: draft.weights | (fits[spec, name].matrix if draft.refit else {}) for name, draft in of_spec.items()
        }
        for spec, of_spec in named.items()
    }


@dataclass(frozen=True)
class _Fit:
    """An attention ``variant`` and the moments of what its output ``projection`` sees and is to give."""

    variant: PuzzleDecoderLayer
    projection: nn.Linear
    moments: Moments

    @classmethod
    def of(cls, variant: PuzzleDecoderLayer) -> _Fit:
        last = output_projection(variant, "attention")
        return cls(variant, last, Moments.zeros(last.in_features, last.out_features, last.weight.device))

    def add(self, one: LayerPass, outputs: Tensor, weights: Tensor) -> None:
        with captured_calls(self.projection) as calls:
            _delta(self.variant, "attention", one)
        bias = self.projection.bias
        self.moments.add(calls[0][0], outputs if bias is None else outputs - bias, weights)

    @property
    def matrix(self) -> Weights:
        weight = self.projection.weight
        return {"self_attn.o_proj.weight": self.moments.fit(weight).to(weight).contiguous()}


def _nothing_seen(layer: PuzzleDecoderLayer, part: Part, one: LayerPass) -> Seen:
    _, sequence_tokens, size = one.before.shape
    device = one.before.device
    inputs = Moments.zeros(size + 1, size, device)
    if part == "attention":
        tables = one.context.position[layer.rope]
        cos, sin = (table[0, 1].chunk(2)[0] for table in tables)  # of the second token: one turn
        return Seen(layer, part, inputs, sequence_tokens, torch.atan2(sin, cos).to(inputs.gram.device))
    if not hasattr(layer.mlp, "down_proj"):
        mlp: Any = layer.mlp
        counts = torch.zeros(mlp.experts.num_experts, dtype=torch.float64, device=inputs.gram.device)
        return Seen(layer, part, inputs, sequence_tokens, experts=counts)
    down = output_projection(layer, part)
    activity = torch.zeros(down.in_features, dtype=torch.float64, device=exact_device(device))
    gated = GatedSeen(down.weight, Moments.zeros(down.in_features + size + 1, 0, device), activity)
    return Seen(layer, part, inputs, sequence_tokens, gated=gated)


def _see(seen: Seen, one: LayerPass, weights: Tensor) -> None:
    """Adds one batch, with ``weights`` (B, T)."""
    layer, part, gated = seen.layer, seen.part, seen.gated
    if gated is None:
        run = _run(layer, part, one)
        if seen.experts is not None:
            seen.experts.add_(_experts_use(layer.mlp, run.inputs[weights > 0]).to(seen.experts.device))
    else:
        with captured_calls(output_projection(layer, part)) as calls:
            run = _run(layer, part, one)
        features = calls[0][0]
        together = torch.cat([features, with_one(run.inputs)], -1)
        gated.joint.add(together, None, _as_normed(layer, part, run.outputs, weights))
        gated.activity.add_(features[weights > 0].abs().sum(0).to(gated.activity.device))
    seen.inputs.add(with_one(run.inputs), run.delta, weights)


def _experts_use(mlp: Any, inputs: Tensor) -> Tensor:
    """(E,) fp64: per expert, the sum over tokens (N, D) of its routing weight times the norm of its output."""
    _, weights, chosen = mlp.gate(inputs)  # (N, K) both
    total = torch.zeros(mlp.experts.num_experts, dtype=torch.float64, device=inputs.device)
    for expert in range(len(total)):
        tokens, place = torch.where(chosen == expert)
        gate, up = F.linear(inputs[tokens], mlp.experts.gate_up_proj[expert]).chunk(2, dim=-1)
        outputs = F.linear(mlp.experts.act_fn(gate) * up, mlp.experts.down_proj[expert])
        total[expert] = (weights[tokens, place] * outputs.norm(dim=-1)).double().sum()
    return total


def with_one(inputs: Tensor) -> Tensor:
    """(..., D + 1)"""
    return torch.cat([inputs, torch.ones_like(inputs[..., :1])], -1)


def _as_normed(layer: PuzzleDecoderLayer, part: Part, outputs: Tensor, weights: Tensor) -> Tensor:
    """``weights`` (B, T) of tokens whose error counts as it is after the norm behind the block, if there is one."""
    if layer.post_norm_of(part) is None:
        return weights
    return weights / outputs.float().square().mean(-1).clamp_min(torch.finfo(torch.float32).tiny)


# ------------------------------------------------------------------------------------------- runs of one block


@dataclass(frozen=True)
class _Run:
    """A block's input after the norm, its output before any other, and what its site adds; each (B, T, D)."""

    inputs: Tensor
    outputs: Tensor
    delta: Tensor


def _run(layer: PuzzleDecoderLayer, part: Part, one: LayerPass) -> _Run:
    with captured_calls(layer.self_attn if part == "attention" else layer.mlp) as calls:
        delta = _delta(layer, part, one)
    return _Run(*calls[0], delta)


def _delta(layer: PuzzleDecoderLayer, part: Part, one: LayerPass) -> Tensor:
    return attention_delta(layer, one.before, one.context) if part == "attention" else layer.ffn_delta(one.middle)
