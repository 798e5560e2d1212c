"""An architecture as a notebook shows it: the page's strip of layers, and a static picture. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from puzzle import style
from puzzle.report.layers import Layer
from puzzle.report.strip import Sizes, longest_name, strip

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT = 52.0  # of the teacher's block: two strips are to be seen at once


def svg(layers: Sequence[Layer], label: str, other: Sequence[Layer] = ()) -> str:
    """The strip; ``label`` says what it is. What ``other`` has otherwise is framed."""
    sizes = Sizes.of(len(layers), longest_name([*layers, *other]), HEIGHT, turned=False)
    return strip(layers, sizes, f"{label}: {in_words(layers)}", other=other)


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


def in_words(layers: Sequence[Layer]) -> str:
    """For those who cannot see it."""
    counts = {
        "attention": Counter(layer.attention.name for layer in layers),
        "FFN": Counter(layer.ffn.name for layer in layers),
    }
    told = [f"{part} {', '.join(f'{count} {name}' for name, count in of.most_common())}" for part, of in counts.items()]
    return f"{len(layers)} layers; {'; '.join(told)}"
