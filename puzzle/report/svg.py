"""What charts are drawn with: scales with round ticks, axes, marks. Text out, nothing read.

Sizes are in pixels at the chart's natural width; colours and fonts are classes of page.css.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from puzzle.report.markup import escaped

WIDTH = 1000  # of the widest charts
LETTER = 6.4  # width of one, on average
SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k"))


def figure(value: float) -> str:
    """For people: four digits, large numbers as 5.772M."""
    for size, suffix in SUFFIXES:
        if abs(value) >= size:
            return f"{value / (1e3 if suffix == 'k' else size):.4g}{suffix}"
    return f"{value:.4g}"


def every_layer(num_layers: int, wide: float) -> int:
    """Every how manieth layer has its number, where a layer is so wide."""
    room = 14.0 + LETTER * len(str(num_layers - 1))
    return next(step for step in (1, 2, 5, 10, 20, 50, 100) if step * wide >= room)


@dataclass(frozen=True)
class Scale:
    """From values to pixels. ``low`` < ``high``; logarithmic ones are above 0."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    @classmethod
    def over(
        cls, values: Sequence[float], start: float, end: float, logarithmic: bool = False, margin: float = 0.04
    ) -> Scale:
        """From the least to the most value, and a share of that beyond; where they are the same, in the middle."""
        low, high = min(values), max(values)
        apart = high - low > 1e-9 * max(abs(low), abs(high))
        if logarithmic:
            room = (high / low) ** margin if apart else 2.0
            return cls(low / room, high * room, start, end, True)
        room = (high - low) * margin if apart else abs(high) / 2 or 1.0
        return cls(low - room, high + room, start, end)

    def at(self, value: float) -> float:
        low, high, value = (math.log(one) if self.logarithmic else one for one in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int = 6) -> list[float]:
        """About so many round values."""
        if self.logarithmic and self.high / self.low > 8:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)))
            factors = (1, 2, 5) if len(decades) <= count // 2 else (1,)
            values = [factor * 10.0**decade for decade in decades for factor in factors]
        else:
            rough = (self.high - self.low) / count
            power = 10.0 ** math.floor(math.log10(rough))
            step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
            values = [step * place for place in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [value for value in values if self.low <= value <= self.high]


def chart(name: str, size: tuple[float, float], told: str, content: str, role: str = "img") -> str:
    """``name``: its id, if any; ``told``: what a screen reader says in its place, unless with ``role`` group it meets
    the parts one by one.
    """
    width, height = size
    named = f' id="{name}"' if name else ""
    return (
        f'<svg class="chart"{named} viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" '
        f'role="{role}" aria-label="{escaped(told)}"><desc>{escaped(told)}</desc>{content}</svg>'
    )


def words(x: float, y: float, text: object, kind: str = "", anchor: str = "start", turned: bool = False) -> str:
    """One line of text; ``turned``: read from below."""
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}{turn}>{escaped(text)}</text>'


def rectangle(x: float, y: float, width: float, height: float, kind: str, more: str = "") -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" class="{kind}"{more}/>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" class="{kind}"/>'


def polyline(points: Sequence[tuple[float, float]], kind: str) -> str:
    joined = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path d="M{joined}" class="{kind}"/>'


def diamond(x: float, y: float, radius: float, kind: str, more: str = "") -> str:
    r = radius
    return f'<path d="M{x:.1f} {y - r:.1f}l{r} {r}l-{r} {r}l-{r} -{r}z" class="{kind}"{more}/>'


def star(x: float, y: float, radius: float, kind: str) -> str:
    corners = [(radius if place % 2 == 0 else radius * 0.42, math.pi * (place / 5 - 0.5)) for place in range(10)]
    joined = "L".join(f"{x + r * math.cos(angle):.1f} {y + r * math.sin(angle):.1f}" for r, angle in corners)
    return f'<path d="M{joined}z" class="{kind}"/>'


def x_axis(scale: Scale, top: float, bottom: float, label: str) -> str:
    """Ticks with grid lines from ``top`` to ``bottom``, the label below."""
    drawn = [
        line(scale.at(tick), top, scale.at(tick), bottom, "grid")
        + words(scale.at(tick), bottom + 16, figure(tick), "tick", "middle")
        for tick in scale.ticks()
    ]
    return "".join(drawn) + words((scale.start + scale.end) / 2, bottom + 36, label, "label", "middle")


def y_axis(scale: Scale, left: float, right: float, label: str) -> str:
    """Ticks with grid lines from ``left`` to ``right``, the label turned beside them."""
    drawn = [
        line(left, scale.at(tick), right, scale.at(tick), "grid")
        + words(left - 8, scale.at(tick) + 4, figure(tick), "tick", "end")
        for tick in scale.ticks(5)
    ]
    return "".join(drawn) + words(left - 52, (scale.start + scale.end) / 2, label, "label", "middle", turned=True)
