"""The model that changes are put into: the teacher or, for conditional scores, the teacher partly compressed already.

Reads a :class:`~puzzle.teacher.Teacher` layer by layer and the library's weights; holds neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from puzzle.blocks.layer import layer_with
from puzzle.modeling import PuzzleDecoderLayer, part_prefixes
from puzzle.teacher import Teacher
from puzzle.types import Item, Part, Spec

ReadWeights = Callable[[Item], Mapping[str, Tensor]]


class ScoringContext:
    """``teacher`` with ``items`` in place; ``read_weights`` gives an item's trained tensors."""

    def __init__(self, teacher: Teacher, read_weights: ReadWeights, items: Sequence[Item] = ()) -> None:
        self.teacher, self.items = teacher, tuple(items)
        self.read_weights = read_weights

    def layer(self, index: int, changed: Sequence[Item] = ()) -> PuzzleDecoderLayer:
        """Layer ``index``, in which ``changed`` items take the place of what the context has there."""
        specs: dict[Part, Spec] = {}
        owner: dict[Part, Item] = {}
        for item in (*self.items, *changed):
            for site, spec in item.at.items():
                if site.layer == index:
                    specs[site.part], owner[site.part] = spec, item
        layer = self.teacher.layer(index)
        if not specs:
            return layer
        # an item over several layers may have nothing to read for this one
        read = {item.id: self.read_weights(item) for part, item in owner.items() if specs[part].kind != "skip"}
        weights = {
            name: tensor
            for part, item in owner.items()
            if specs[part].kind != "skip"
            for name, tensor in read[item.id].items()
            if name.startswith(part_prefixes(layer.config, part))
        }
        return layer_with(layer, specs, weights)
