"""One FFN that holds many widths: its first N channels are the variant ``narrow-N``.

Channels are sorted by importance; the widths share their weights and are trained together (once-for-all's elastic
width; slimmable networks), each step on the widest, the narrowest and one between. The library of a site then costs one
FFN instead of one per width.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.func import functional_call

from puzzle.modeling.modeling_puzzle import PuzzleDecoderLayer

ROWS = (".gate_proj.weight", ".up_proj.weight", ".gate_proj.bias", ".up_proj.bias")
COLUMNS = (".down_proj.weight",)


def prefix(weights: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    """The tensors of the FFN's first ``width`` channels; others as they are."""

    def of(name: str, tensor: Tensor) -> Tensor:
        if name.endswith(ROWS):
            return tensor[:width]
        return tensor[:, :width] if name.endswith(COLUMNS) else tensor

    return {name: of(name, tensor) for name, tensor in weights.items()}


class PrefixFfn(nn.Module):
    """A layer's FFN site at any width up to its own: ``ffn_at(width)(hidden)`` is what the site adds."""

    def __init__(self, layer: PuzzleDecoderLayer) -> None:
        super().__init__()
        self.layer = layer
        self._names = [f"layer.{name}" for name, _ in layer.named_parameters() if name.startswith("mlp.")]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layer.ffn_delta(hidden)

    def at(self, width: int, hidden: Tensor) -> Tensor:
        """(B, T, D): what the first ``width`` channels add."""
        parameters = {name: self.get_parameter(name) for name in self._names}
        delta: Tensor = functional_call(self, prefix(parameters, width), (hidden,))
        return delta


def widths_at(step: int, widths: Sequence[int], seed: str) -> list[int]:
    """The widths trained at ``step``: the widest, the narrowest, one between; a pure function of its arguments."""
    ordered = sorted(widths)
    between = ordered[1:-1]
    chosen = {ordered[0], ordered[-1]}
    if between:
        chosen.add(random.Random(f"{seed}/{step}").choice(between))
    return sorted(chosen)
