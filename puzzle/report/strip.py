"""The layers as a strip of SVG: depth from left to right, attention upwards, FFNs downwards, each as high as its share.

Reads records of layers.py. The page and notebooks say by class how it looks (page.css, notebook/html.py); page.js draws
other architectures into it by the same sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from puzzle.report.layers import Block, Layer
from puzzle.report.markup import escaped
from puzzle.report.svg import LETTER, WIDTH, chart, every_layer, rectangle, words

PARTS = (("attention", "attention"), ("ffn", "FFN"))  # class and name


@dataclass(frozen=True)
class Sizes:
    """In pixels. ``labels``: how variants are named, ``across``, ``turned`` or, where there is no room, not at all."""

    left: float
    step: float
    unit: float  # the height of the teacher's block
    top: float  # where attention stands on, growing upwards
    labels: str

    @classmethod
    def of(cls, num_layers: int, longest: int, unit: float = 84.0, turned: bool = True) -> Sizes:
        """``longest``: letters of a variant's name; ``turned``: whether names may be, which takes height."""
        left = 74.0
        step = max(4.0, min(max(84.0, LETTER * longest), (WIDTH - left - 6) / num_layers))
        labels = "across" if LETTER * longest <= step else "turned" if turned and step >= 15 else ""
        above = {"across": 20.0, "turned": 12 + LETTER * longest, "": 6.0}[labels]
        return cls(left, step, unit, above + unit, labels)

    @property
    def bottom(self) -> float:
        """Where FFNs hang from."""
        return self.top + 22

    @property
    def wide(self) -> float:
        """A column without the gap to the next."""
        return self.step - min(8.0, self.step * 0.2)

    def bar(self, block: Block) -> tuple[float, float]:
        """Width and height; a fused FFN is as wide as the layers that it stands for."""
        wide = self.wide + (block.layers - 1) * self.step
        return round(wide, 1), round(self.unit * min(1.0, block.share / block.layers), 1)


def longest_name(layers: Sequence[Layer]) -> int:
    """In letters."""
    return max(len(block.name) for layer in layers for block in layer.blocks)


def strip(layers: Sequence[Layer], sizes: Sizes, told: str, name: str = "", other: Sequence[Layer] = ()) -> str:
    """``told``: what it is, in words; what ``other`` has otherwise is framed."""
    below = sizes.bottom + sizes.unit
    drawn = [
        words(sizes.left - 10, sizes.top - sizes.unit / 2, "attention", "label", "end"),
        words(sizes.left - 10, sizes.bottom + sizes.unit / 2, "FFN", "label", "end"),
        words(sizes.left - 10, sizes.top + 15, "layer", "tick", "end"),
    ]
    lefts = [sizes.left + layer * sizes.step for layer in range(len(layers))]
    whole = f"h{sizes.wide:.1f}v{sizes.unit:.1f}h-{sizes.wide:.1f}z"
    outlines = [f"M{x:.1f} {y:.1f}{whole}" for x in lefts for y in (sizes.top - sizes.unit, sizes.bottom)]
    drawn.append(f'<path class="outline" d="{"".join(outlines)}"/>')
    every = every_layer(len(layers), sizes.step)
    for index, (x, layer) in enumerate(zip(lefts, layers, strict=True)):
        if index % every == 0:
            drawn.append(words(x + sizes.wide / 2, sizes.top + 15, index, "tick", "middle"))
        for part, block in enumerate(layer.blocks):
            differs = bool(other) and (index >= len(other) or other[index].blocks[part] != block)
            drawn.append(_site(sizes, index, part, block, differs))
            if sizes.labels:
                drawn.append(_variant(sizes, x + sizes.wide / 2, 2 * index + part, block.name))
    size = sizes.left + len(layers) * sizes.step + 6, below + sizes.top - sizes.unit
    return chart(name, size, told, "".join(drawn))


def _site(sizes: Sizes, layer: int, part: int, block: Block, differs: bool) -> str:
    """The bar, and where the teacher's would be, which tells what it is when pointed at."""
    kind, name = PARTS[part]
    x, (wide, high) = sizes.left + layer * sizes.step, sizes.bar(block)
    y = sizes.bottom if part else sizes.top - sizes.unit
    return (
        f'<g data-site="{2 * layer + part}"><title>{escaped(f"layer {layer}, {name}: {block.told}")}</title>'
        + rectangle(x, y, sizes.wide, sizes.unit, "site differs" if differs else "site")
        + rectangle(x, sizes.bottom if part else sizes.top - high, wide, high, kind)
        + "</g>"
    )


def _variant(sizes: Sizes, middle: float, site: int, name: str) -> str:
    """Beyond the teacher's block."""
    part, more = site % 2, f' data-name="{site}"'
    if sizes.labels == "across":
        y = sizes.bottom + sizes.unit + 15 if part else sizes.top - sizes.unit - 7
        found = words(middle, y, name, "variant", "middle")
    else:
        y = sizes.bottom + sizes.unit + 8 if part else sizes.top - sizes.unit - 6
        found = words(middle + 4, y, name, "variant", "end" if part else "start", turned=True)
    return found.replace("<text", f"<text{more}", 1)
