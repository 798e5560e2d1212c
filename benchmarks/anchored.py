"""Anchored scores: the exact KL of leaving a site out, times the share of its output that a variant gets wrong.

Kept for comparison only (bench_score_quality.py).

    score(variant) = KL(skip) * |delta_variant - delta|^2 / |delta|^2

delta is what the site adds to the residual stream (both parts', where both change), squares summed over the tokens of
each sequence. One exact evaluation a site, and of each variant its own forward: the cost does not grow with the layers
that come after it. Near the teacher KL is quadratic in the error, which is why this works; the anchor sets the scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from puzzle.modeling import PuzzleDecoderLayer
from puzzle.scoring.context import ScoringContext
from puzzle.teacher import LayerPass, attention_delta
from puzzle.types import Item, Part


@torch.no_grad()
def local_errors(context: ScoringContext, items: Sequence[Item], passes: Iterable[LayerPass]) -> dict[str, Tensor]:
    """Per sequence (sequences,) fp64, the normalised error of each item; all are in the layer that ``passes`` are of.

    0 for what the context has there, 1 for skip. The first token does not count (teacher.Context.weights).
    """
    layers = {item.id: context.layer(item.sites[0].layer, [item]) for item in items}
    parts = {item.id: {site.part for site in item.sites} for item in items}
    found: dict[str, list[Tensor]] = {item.id: [] for item in items}
    for one in passes:
        with context.teacher.autocast():
            for name, layer in layers.items():
                found[name].append(_error(layer, one, parts[name]).cpu().double())
    return {name: torch.cat(columns) for name, columns in found.items()}


def _error(layer: PuzzleDecoderLayer, one: LayerPass, parts: set[Part]) -> Tensor:
    """(B,): of what the layer's ``parts`` add, against what the context's do."""
    if parts == {"ffn"}:
        own, reference = layer.ffn_delta(one.middle), one.after - one.middle
    elif parts == {"attention"}:
        own, reference = attention_delta(layer, one.before, one.context), one.middle - one.before
    else:
        middle = one.before + attention_delta(layer, one.before, one.context)
        own, reference = middle + layer.ffn_delta(middle) - one.before, one.after - one.before
    weights = one.context.weights.unsqueeze(-1)
    error, whole = (
        (value.float().square() * weights).sum((1, 2)) for value in (own.float() - reference.float(), reference)
    )
    return error / whole
