"""Exact replace-one scores: put one item into the otherwise untouched teacher and compare the outputs.

Reads the teacher, items' weights and the ``score`` sequences; computes per sequence the KL(teacher ‖ student), the
cross-entropy difference and the top-1 agreement, means over tokens. What lies before the replaced layer is computed
once per layer and never again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from puzzle.blocks.layer import item_layer, parts_of
from puzzle.data.batches import Batch
from puzzle.metrics import TokenMetrics, sequence_means, token_metrics
from puzzle.modeling import PuzzleForCausalLM
from puzzle.modeling.modeling_puzzle import PuzzleDecoderLayer
from puzzle.teacher import LayerPass, embed, final_hidden, layers_of, run_layer, run_suffix
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
    batches: list[Batch],
) -> Iterator[tuple[Item, dict[str, Tensor]]]:
    """For every item of one layer, layer by layer, its values per sequence by metric: (sequences,) fp64."""
    heads = (model.lm_head, model.lm_head)
    references = [final_hidden(model, batch) for batch in batches]
    stream = [embed(model.model, batch, model.dtype) for batch in batches]
    for index, teacher_layer in enumerate(layers_of(model)):
        passes = [run_layer(teacher_layer, hidden, context) for hidden, context in stream]
        for item in items_of_layer.get(index, []):
            layer = item_layer(teacher_layer, item, read_weights(item))
            columns = [
                token_metrics(_replaced(model, layer, item, one), reference, heads, batch)
                for one, reference, batch in zip(passes, references, batches, strict=True)
            ]
            pairs = list(zip(columns, batches, strict=True))
            yield (
                item,
                {
                    metric: torch.cat([sequence_means(of_tokens(tokens), batch) for tokens, batch in pairs])
                    for metric, of_tokens in METRICS.items()
                },
            )
        stream = [(one.after, one.context) for one in passes]


def _replaced(model: PuzzleForCausalLM, layer: PuzzleDecoderLayer, item: Item, one: LayerPass) -> Tensor:
    """Final hidden states with ``layer`` in place; an FFN variant starts after the teacher's attention."""
    if "attention" in parts_of(item):
        hidden = run_layer(layer, one.before, one.context).after
    else:
        hidden = one.middle + layer.ffn_delta(one.middle)
    return run_suffix(model, hidden, one.context, layer.layer_idx + 1)
