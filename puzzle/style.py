"""How every figure looks, in a picture, a page or a notebook: one palette and one matplotlib style.

Colours are Okabe and Ito's, which the colour-blind tell apart. Attention is blue and FFN orange wherever they appear;
what is less than the teacher's is drawn narrower in the same colour, never in another one.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ATTENTION, FFN, NORM, HEAD, OTHER = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#999999"
TEACHER, CHOSEN, MISSING = OTHER, "#D55E00", "#CCCCCC"
SCALE = "cividis"  # of more and less; the same to all eyes
SCALE_STEPS = (  # of it, for what is drawn without matplotlib
    "#00224e", "#1a386f", "#434e6c", "#61656f", "#7d7c78", "#9b9476", "#bcae6c", "#dec958", "#fee838",
)  # fmt: skip
DPI = 120
ON_DARK = {"attention": "#56B4E9", "chosen": "#F28544", "teacher": "#8A8F98", "missing": "#3A3F47"}  # where it differs


def new_figure(width_inches: float, height_inches: float) -> Figure:
    """An empty figure that needs no display and belongs to no global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width_inches, height_inches), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    path.write_bytes(png(figure))


def png(figure: Figure) -> bytes:
    for axes in figure.axes:
        if not axes.images:  # a heat map keeps its frame
            axes.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


@dataclass(frozen=True, eq=False)
class Picture:
    """A figure that a notebook shows as a PNG, whichever backend matplotlib has."""

    figure: Figure

    def _repr_png_(self) -> bytes:
        return png(self.figure)

    def save(self, path: Path | str) -> None:
        save(self.figure, Path(path))


def css() -> tuple[str, str]:
    """The palette as custom properties of CSS: on a light ground, and what changes on a dark one."""
    light = {"attention": ATTENTION, "ffn": FFN, "chosen": CHOSEN, "teacher": TEACHER, "missing": MISSING}
    light |= {f"heat-{step}": colour for step, colour in enumerate(SCALE_STEPS)}
    return _properties(light), _properties(ON_DARK)


def _properties(colours: Mapping[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())
