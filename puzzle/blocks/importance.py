"""How much each layer, head, FFN channel and channel of the residual stream does, from one forward pass (Minitron).

Per token t of sequence s, with X the input of a block after its norm (2407.14679, section 2.2)::

    head      |attn_i(X)|₂            its output before the output projection
    channel   |x_i|                   the gated activation
    hidden    |norm(x)_i|             summed over the norms that read the residual stream, the last one included
    layer     1 - E[cos(x_l, x_l+1)]  Block Importance, a mean over all tokens (2408.11796)

each aggregated over the tokens of a sequence, then over sequences. As in moments.py, the first token of a sequence and
massive ones are left out of heads and channels: most of every sum, and nothing about the text. Experts have no channels
that are the same for all tokens, so an FFN of them has none here. Reads a layer's passes; nothing of them is kept but
one number per sequence and channel of one layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from puzzle.blocks.layer import captured_calls, output_projection
from puzzle.blocks.moments import token_weights
from puzzle.config import Aggregation, ImportanceConfig
from puzzle.modeling import PuzzleDecoderLayer
from puzzle.space import PARTS
from puzzle.teacher import LayerPass

# over the tokens of (B, T, N) that have a weight (B, T): (B, N)
AGGREGATIONS: Mapping[Aggregation, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda values, weights: _mean(values, weights),
    "l2": lambda values, weights: _mean(values.square(), weights).sqrt(),
    "max": lambda values, weights: (values * weights[..., None]).amax(1),
    "var": lambda values, weights: (_mean(values.square(), weights) - _mean(values, weights).square()).clamp_min(0),
}


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights[..., None]).sum(1) / weights.sum(1).clamp_min(1)[:, None]


# of numbers by sequence (S, ...) those of all processes, in order
AllRows = Callable[[Tensor], Tensor]


@dataclass
class Scores:
    """An accumulator for one kind of channel: of each sequence one number per channel."""

    how: ImportanceConfig
    all_rows: AllRows
    _rows: list[Tensor] = field(default_factory=list)

    def add(self, values: Tensor, weights: Tensor) -> None:
        """Values (B, T, N) of tokens of ``weights`` (B, T)."""
        self._rows.append(AGGREGATIONS[self.how.sequence](values.float(), weights).cpu())

    def total(self) -> Tensor:
        """(N,) over all sequences, fp64."""
        rows = self.all_rows(torch.cat(self._rows).double())[None]  # (1, sequences, N)
        return AGGREGATIONS[self.how.batch](rows, torch.ones_like(rows[..., 0]))[0]


@dataclass(frozen=True)
class LayerImportance:
    """``heads`` (H,), ``channels`` (I,) or None where the FFN is experts, ``hidden`` (D,), all fp64; ``block``."""

    heads: Tensor
    channels: Tensor | None
    hidden: Tensor
    block: float


def layer_importance(
    layer: PuzzleDecoderLayer,
    passes: Iterable[LayerPass],
    how: ImportanceConfig,
    all_rows: AllRows = lambda rows: rows,
) -> LayerImportance:
    """Of a teacher's layer; ``passes`` computes them as it is iterated, each batch once."""
    attention, head_dim = output_projection(layer, "attention"), int(layer.self_attn.head_dim)  # type: ignore[arg-type]
    down = output_projection(layer, "ffn") if hasattr(layer.mlp, "down_proj") else None
    heads, channels, *hidden = (Scores(how, all_rows) for _ in range(2 + len(PARTS)))
    cosines: list[Tensor] = []
    norms = [norm for part in PARTS if (norm := layer.norm_of(part)) is not None]
    with contextlib.ExitStack() as stack:
        seen = {name: stack.enter_context(captured_calls(module)) for name, module in enumerate([attention, *norms])}
        gated = stack.enter_context(captured_calls(down)) if down is not None else []
        for one in passes:
            weights = token_weights(one.middle)
            mixed = seen[0][0][0].unflatten(-1, (-1, head_dim))  # (B, T, H, d)
            heads.add(mixed.float().norm(dim=-1), weights)
            for scores, calls in zip(hidden, (seen[1], seen[2]), strict=True):
                scores.add(calls[0][1].abs(), weights)
            if gated:
                channels.add(gated[0][0].abs(), weights)
            cosines.append(F.cosine_similarity(one.before, one.after, dim=-1).double().mean(1).cpu())  # (B,)
            for calls in (*seen.values(), gated):
                calls.clear()
    block = 1 - all_rows(torch.cat(cosines)).mean().item()  # sequences are of equal length
    of_hidden = torch.stack([scores.total() for scores in hidden]).sum(0)
    return LayerImportance(heads.total(), channels.total() if down is not None else None, of_hidden, block)
