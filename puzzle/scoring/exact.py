"""Exact replace-one scores: put one variant into the otherwise untouched teacher and compare the outputs.

Reads the teacher, variants' weights and the ``score`` sequences; computes per sequence the KL(teacher ‖ student), the
cross-entropy difference and the top-1 agreement, means over tokens. What lies before the replaced layer is computed
once per layer and never again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from puzzle.blocks.layer import variant_layer
from puzzle.metrics import TokenMetrics, token_metrics
from puzzle.modeling import PuzzleForCausalLM
from puzzle.modeling.modeling_puzzle import PuzzleDecoderLayer
from puzzle.teacher import LayerPass, final_hidden, run_suffix, stream_layers
from puzzle.types import Item

METRICS: Mapping[str, Callable[[TokenMetrics], Tensor]] = {
    "kl": lambda tokens: tokens.kl_nats,
    "ce_delta": lambda tokens: tokens.ce_nats - tokens.teacher_ce_nats,
    "agreement": lambda tokens: tokens.agreement,
}


@torch.no_grad()
def exact_scores(
    model: PuzzleForCausalLM,
    items_of_layer: Mapping[int, list[Item]],
    read_weights: Callable[[Item], Mapping[str, Tensor]],
    batches: list[Tensor],
) -> Iterator[tuple[Item, dict[str, Tensor]]]:
    """For every single-site item, layer by layer, its values per sequence by metric: (sequences,) fp64."""
    references = [final_hidden(model, ids) for ids in batches]
    for index, teacher_layer, passes in stream_layers(model, batches):
        for item in items_of_layer.get(index, []):
            layer = variant_layer(teacher_layer, item.sites[0].part, item.specs[0], read_weights(item))
            columns = [
                token_metrics(_replaced(model, layer, item, one), reference, (model.lm_head, model.lm_head), ids)
                for one, reference, ids in zip(passes, references, batches, strict=True)
            ]
            yield (
                item,
                {
                    metric: torch.cat([of_tokens(tokens).cpu().double().mean(1) for tokens in columns])
                    for metric, of_tokens in METRICS.items()
                },
            )


def _replaced(model: PuzzleForCausalLM, layer: PuzzleDecoderLayer, item: Item, one: LayerPass) -> Tensor:
    """Final hidden states with ``layer`` in place; an FFN variant starts after the teacher's attention."""
    if item.sites[0].part == "attention":
        hidden = layer(one.before, position_embeddings=one.position)
    else:
        hidden = one.middle + layer.ffn_delta(one.middle)
    return run_suffix(model, hidden, one.position, item.sites[0].layer + 1)
