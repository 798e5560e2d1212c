"""An architecture layer by layer: what stands in each, and how large it is beside the teacher's. Pure.

Reads a model's shape and chosen items, or a run; computes the records that a page, a notebook and a model card show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from puzzle.types import FfnSpec, Item, ModelShape, Part, Site, Spec
from puzzle.variants import keep_spec, params, variant_name

if TYPE_CHECKING:
    from puzzle.run import Run


@dataclass(frozen=True)
class Block:
    """A variant in the place of a teacher's block. ``share``: its parameters over those of that block.

    ``layers``: how many it stands for, more than one where FFNs are fused; ``share`` is then of one layer's.
    """

    name: str
    share: float
    layers: int = 1

    @property
    def told(self) -> str:
        over = f", in the place of {self.layers} layers’ FFNs" if self.layers > 1 else ""
        return f"{self.name}{over}, {self.share:.0%} of the teacher’s parameters"


@dataclass(frozen=True)
class Layer:
    attention: Block
    ffn: Block

    @property
    def blocks(self) -> tuple[Block, Block]:
        return self.attention, self.ffn


def block_of(shape: ModelShape, site: Site, spec: Spec) -> Block:
    fused = spec.num_fused or 1 if isinstance(spec, FfnSpec) else 1
    return Block(variant_name(spec), params(spec, shape) / params(keep_spec(shape, site), shape), fused)


def layers_of(shape: ModelShape, items: Sequence[Item]) -> tuple[Layer, ...]:
    """Of the items that cover every site once."""
    specs = {site: spec for item in items for site, spec in item.at.items()}
    blocks = {site: block_of(shape, site, specs[site]) for site in shape.sites}
    return tuple(
        Layer(blocks[Site(layer, "attention")], blocks[Site(layer, "ffn")]) for layer in range(shape.num_layers)
    )


def layers_of_run(run: Run) -> tuple[Layer, ...]:
    """Of the best solution, or of the pruned student by the teacher's layers; both must be there."""
    if run.config.prune is None:
        return layers_of(run.shape, run.chosen_items())
    student = run.student_shape
    heads, channels = f"{student.num_attention_heads} heads on {student.num_kv_heads}", student.intermediate_size
    return tuple(
        Layer(
            _left(run, layer, "attention", heads),
            _left(run, layer, "ffn", "experts" if layer in run.shape.moe_layers else f"{channels} channels"),
        )
        for layer in range(run.shape.num_layers)
    )


def _left(run: Run, layer: int, part: Part, name: str) -> Block:
    """What a pruning leaves of a part of the teacher's ``layer``."""
    if layer not in run.kept_layers:
        return Block("skip", 0.0)
    place = run.kept_layers.index(layer)
    own = params(keep_spec(run.student_shape, Site(place, part)), run.student_shape)
    return Block(name, own / params(keep_spec(run.shape, Site(layer, part)), run.shape))
