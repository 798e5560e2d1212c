"""An architecture as a strip, one column a layer: attention upwards, FFN downwards, as large as it is of the teacher's.

Reads a model's shape and chosen items; computes records and inline SVG, whose text takes the colour of the page. Pure.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from puzzle import style
from puzzle.types import FfnSpec, Item, ModelShape, Part, Site, Spec
from puzzle.variants import keep_spec, params, variant_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Block", "Layer", "draw", "layers_of", "svg"]

WIDTH, LEFT, HEIGHT, MIDDLE = 960, 70, 52, 20  # of the drawing; of names at the left; of a whole block; between parts
WIDEST, NAMED = 84, 46  # of columns; those at least so wide have room for the variants' names
NUMBERED = 24  # between two layers' numbers
NAME_HEIGHT = 16


@dataclass(frozen=True)
class Block:
    """A variant by its name. ``share``: its parameters over those of the teacher's block.

    ``layers``: how many it stands for, more than one where FFNs are fused; ``share`` is then of one layer's.
    """

    name: str
    share: float
    layers: int = 1


@dataclass(frozen=True)
class Layer:
    attention: Block
    ffn: Block

    def block(self, part: Part) -> Block:
        return self.attention if part == "attention" else self.ffn


def layers_of(shape: ModelShape, items: Sequence[Item]) -> tuple[Layer, ...]:
    """Of the items that cover every site once."""
    specs = {site: spec for item in items for site, spec in zip(item.sites, item.specs, strict=True)}
    blocks = {site: _block(shape, site, specs[site]) for site in shape.sites}
    return tuple(
        Layer(blocks[Site(layer, "attention")], blocks[Site(layer, "ffn")]) for layer in range(shape.num_layers)
    )


def _block(shape: ModelShape, site: Site, spec: Spec) -> Block:
    fused = spec.num_fused or 1 if isinstance(spec, FfnSpec) else 1
    return Block(variant_name(spec), params(spec, shape) / params(keep_spec(shape, site), shape), fused)


def svg(layers: Sequence[Layer], label: str, other: Sequence[Layer] = ()) -> str:
    """The drawing; ``label`` says what it is. What ``other`` has otherwise is outlined."""
    column = min(WIDEST, (WIDTH - LEFT) / len(layers))
    named = column >= NAMED
    above = NAME_HEIGHT if named else 2
    centre = above + HEIGHT
    height = 2 * (above + HEIGHT) + MIDDLE
    width = LEFT + math.ceil(len(layers) * column)
    size = f'viewBox="0 0 {width} {height}" width="100%" style="max-width:{width}px;display:block"'
    told = f"{label}: {_in_words(layers)}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(told)}" '
        'font-family="system-ui, sans-serif" fill="currentColor">',
        _text(LEFT - 10, centre - HEIGHT / 2 + 4, "attention", 12, "end"),
        _text(LEFT - 10, centre + MIDDLE / 2 + 4, "layer", 10, "end", faint=True),
        _text(LEFT - 10, centre + MIDDLE + HEIGHT / 2 + 4, "FFN", 12, "end"),
    ]
    every = math.ceil(NUMBERED / column)
    for index, layer in enumerate(layers):
        left = LEFT + index * column
        for part in ("attention", "ffn"):
            base = centre if part == "attention" else centre + MIDDLE
            differs = bool(other) and (index >= len(other) or other[index].block(part) != layer.block(part))
            parts.append(_bar(index, part, layer.block(part), left, base, column, differs))
            if named:
                y = above - 5 if part == "attention" else height - above + 12
                parts.append(_text(left + column / 2, y, layer.block(part).name, 9.5, "middle", faint=True))
        if index % every == 0:
            parts.append(_text(left + column / 2, centre + MIDDLE / 2 + 4, str(index), 10, "middle", faint=True))
    return "".join([*parts, "</svg>"])


def draw(axes: Axes, layers: Sequence[Layer]) -> None:
    """For a static picture: one row a layer, attention to the left, FFN to the right."""
    from matplotlib.ticker import MaxNLocator

    for index, layer in enumerate(layers):
        for block, sign, colour in ((layer.attention, -1, style.ATTENTION), (layer.ffn, 1, style.FFN)):
            axes.barh(index, sign, color="none", edgecolor=style.TEACHER, linewidth=0.5)
            tall = 0.8 + block.layers - 1
            axes.barh(index + (block.layers - 1) / 2, sign * block.share / block.layers, tall, color=colour)
            if len(layers) <= 40:
                side = "right" if sign < 0 else "left"
                axes.text(1.03 * sign, index, block.name, ha=side, va="center", fontsize=8)
    axes.set_xlim(-1.6, 1.6)
    axes.set_xticks([-1, -0.5, 0, 0.5, 1], ["1", "½", "0", "½", "1"])
    axes.set_xlabel("parameters, share of the teacher's: attention (left), FFN (right)")
    axes.set_ylabel("layer")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.invert_yaxis()
    axes.set_title("Architecture")


def _bar(index: int, part: Part, block: Block, left: float, base: float, column: float, differs: bool) -> str:
    """The teacher's block as a faint frame, the variant's share of it in colour, and what it is as a tooltip."""
    gap = min(6.0, 0.22 * column)
    width = column - gap
    top = base - HEIGHT if part == "attention" else base
    share = block.share / block.layers
    tall = HEIGHT * min(1.0, share)
    colour = style.ATTENTION if part == "attention" else style.FFN
    y = base - tall if part == "attention" else base
    what = "attention" if part == "attention" else "FFN"
    over = f", in the place of {block.layers} layers' FFNs" if block.layers > 1 else ""
    tip = escape(f"layer {index}, {what}: {block.name}{over}, {block.share:.0%} of the teacher's parameters")
    x = left + gap / 2
    frame = f'stroke="{style.CHOSEN}" stroke-width="1.6"' if differs else ""
    return (
        f"<g><title>{tip}</title>"
        f'<rect x="{x:.2f}" y="{top:.2f}" width="{width:.2f}" height="{HEIGHT}" rx="2" fill-opacity=".08" {frame}/>'
        f'<rect x="{x:.2f}" y="{y:.2f}" width="{width + (block.layers - 1) * column:.2f}" height="{tall:.2f}" rx="2" '
        f'fill="{colour}"/></g>'
    )


def _text(x: float, y: float, words: str, size: float, anchor: str, faint: bool = False) -> str:
    opacity = ' fill-opacity=".7"' if faint else ""
    return f'<text x="{x:.2f}" y="{y:.2f}" font-size="{size:g}" text-anchor="{anchor}"{opacity}>{escape(words)}</text>'


def _in_words(layers: Sequence[Layer]) -> str:
    """For those who cannot see it."""
    counts: Mapping[str, Counter[str]] = {
        "attention": Counter(layer.attention.name for layer in layers),
        "FFN": Counter(layer.ffn.name for layer in layers),
    }
    told = [f"{part} {', '.join(f'{count} {name}' for name, count in of.most_common())}" for part, of in counts.items()]
    return f"{len(layers)} layers; {'; '.join(told)}"
