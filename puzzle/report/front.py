"""The charts that move: the front, and the layers of whichever of its points is picked. SVG; page.js does the moving.

Reads records of searched.py and summary.py; writes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from puzzle.report.searched import Point, Trade
from puzzle.report.summary import Design
from puzzle.report.svg import (
    LETTER,
    WIDTH,
    Scale,
    chart,
    diamond,
    escaped,
    every_layer,
    figure,
    line,
    polyline,
    rectangle,
    star,
    words,
    x_axis,
    y_axis,
)


def in_order(trade: Trade) -> list[Point]:
    """The points that can be clicked on, the chosen one among them, by cost."""
    if trade.chosen is None:
        return list(trade.points)
    others = [point for point in trade.points if point.blocks != trade.chosen.blocks]
    return sorted([*others, trade.chosen], key=lambda point: point.cost)


def start_of(trade: Trade) -> Point:
    """What is picked at first: the chosen one, else the dearest."""
    return trade.chosen or in_order(trade)[-1]


def design_of(point: Point, trade: Trade) -> Design:
    found = [trade.blocks[place] for place in point.blocks]
    pairs = list(zip(found[::2], found[1::2], strict=True))
    return Design(
        tuple((attention.name, ffn.name) for attention, ffn in pairs),
        tuple((attention.share, ffn.share) for attention, ffn in pairs),
    )


def said(point: Point, trade: Trade) -> str:
    """Of one point, in one line."""
    kept = f"breaks {', '.join(point.broken)}" if point.broken else "keeps every limit"
    return f"{figure(point.cost)} {trade.cost_unit}, {figure(point.objective)} {quality_unit(trade)}, {kept}"


def cost_label(trade: Trade) -> str:
    """With its unit, unless it is a count, whose name says what is counted."""
    counts = trade.cost_unit in ("", "parameters")
    return trade.cost_name if counts else f"{trade.cost_name}, {trade.cost_unit}"


def quality_name(trade: Trade) -> str:
    """With its unit, for an axis."""
    if trade.objective_name == "kl_nats":
        return "KL, sum of scores, nats per token"
    return f"{trade.objective_name.removesuffix('_nats')}, sum of scores, {quality_unit(trade)}"


def quality_unit(trade: Trade) -> str:
    return "nats" if trade.objective_name.endswith("_nats") else trade.objective_name


def front(trade: Trade) -> str:
    """Every point a radio button of one group: it can be clicked on, and reached by keyboard."""
    left, right, top, bottom = 70, 744, 16, 300
    points = in_order(trade)
    costs = [point.cost for point in points]
    teacher = trade.teacher_cost
    values = [point.objective for point in points]
    x = Scale.over([*costs, *([teacher] if teacher is not None else [])], left, right)
    y = Scale.over([0.0, max(values) or 1.0, *values], bottom, top)
    drawn = [
        x_axis(x, top, bottom, cost_label(trade)),
        y_axis(y, left, right, quality_name(trade)),
    ]
    for written, value in trade.limits:
        if x.low <= value <= x.high:
            side = "end" if x.at(value) > (left + right) / 2 else "start"
            drawn.append(line(x.at(value), top, x.at(value), bottom, "limit"))
            drawn.append(words(x.at(value) + (-6 if side == "end" else 6), top + 12, written, "limit-label", side))
    steps = [(x.at(point.cost), y.at(point.objective)) for point in trade.points]
    corners = [(steps[place][0], steps[max(0, place - 1)][1]) for place in range(len(steps))]
    drawn.append(polyline([one for pair in zip(corners, steps, strict=True) for one in pair], "front"))
    dots = []
    start = start_of(trade)
    for place, point in enumerate(points):
        chosen = point is trade.chosen
        checked, stop = ("true", 0) if point is start else ("false", -1)
        more = (
            f' role="radio" tabindex="{stop}" aria-checked="{checked}" data-point="{place}" '
            f'aria-label="{escaped(("the chosen one: " if chosen else "") + said(point, trade))}"'
        )
        at = x.at(point.cost), y.at(point.objective)
        if chosen:
            dots.append(diamond(*at, 7, "point chosen", more))
        else:
            kind = "point broken" if point.broken else "point"
            dots.append(f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="3" class="{kind}"{more}/>')
    drawn.append(f'<g role="radiogroup" aria-label="architectures on the front">{"".join(dots)}</g>')
    if teacher is not None:
        drawn.append(star(x.at(teacher), y.at(0.0), 8, "teacher-star"))
        drawn.append(words(x.at(teacher) + 2, y.at(0.0) - 12, "teacher", "tick", "end"))
    return chart("front", (760, 345), _front_told(trade), "".join(drawn), role="group")


def _front_told(trade: Trade) -> str:
    chosen = "" if trade.chosen is None else f" The chosen architecture: {said(trade.chosen, trade)}."
    return (
        f"Predicted loss of quality against {trade.cost_name}: {len(trade.points)} of {trade.num_points} "
        f"architectures that nothing beats in both.{chosen}"
    )


@dataclass(frozen=True)
class StripSizes:
    """Of the layer strip, in pixels: page.js draws other architectures by the same."""

    left: float
    step: float
    unit: float  # the height of the teacher's block
    top: float  # where attention stands on, growing upwards
    bottom: float  # where FFNs hang from

    @property
    def gap(self) -> float:
        return min(8.0, self.step * 0.2)


def strip_sizes(num_layers: int, longest: int) -> tuple[StripSizes, str]:
    """And how its variants are named: ``across``, ``turned`` or, where there is no room, not at all."""
    left = 74.0
    step = max(4.0, min(max(84.0, LETTER * longest), (WIDTH - left - 6) / num_layers))
    labels = "across" if LETTER * longest <= step else "turned" if step >= 15 else ""
    above = {"across": 20.0, "turned": 12 + LETTER * longest, "": 6.0}[labels]
    return StripSizes(left, step, 84.0, above + 84.0, above + 84.0 + 22), labels


def strip(design: Design, longest: int, told: str) -> str:
    """Depth from left to right; attention grows upwards, FFNs downwards, as large as their share of the teacher's."""
    num_layers = len(design.names)
    sizes, labels = strip_sizes(num_layers, longest)
    every = every_layer(num_layers, sizes.step)
    wide = sizes.step - sizes.gap
    below = sizes.bottom + sizes.unit
    end = below + sizes.top - sizes.unit
    drawn = [
        words(sizes.left - 10, sizes.top - sizes.unit / 2, "attention", "label", "end"),
        words(sizes.left - 10, sizes.bottom + sizes.unit / 2, "FFN", "label", "end"),
        words(sizes.left - 10, sizes.top + 15, "layer", "tick", "end"),
    ]
    for layer, (names, shares) in enumerate(zip(design.names, design.shares, strict=True)):
        x = sizes.left + layer * sizes.step
        drawn.append(rectangle(x, sizes.top - sizes.unit, wide, sizes.unit, "outline"))
        drawn.append(rectangle(x, sizes.bottom, wide, sizes.unit, "outline"))
        if layer % every == 0:
            drawn.append(words(x + wide / 2, sizes.top + 15, layer, "tick", "middle"))
        for part, (name, share) in enumerate(zip(names, shares, strict=True)):
            drawn.append(_bar(sizes, layer, part, name, share))
            if labels:
                drawn.append(_variant(sizes, layer, part, name, share, labels))
    return chart("strip", (sizes.left + num_layers * sizes.step + 6, end), told, "".join(drawn))


def _bar(sizes: StripSizes, layer: int, part: int, name: str, share: float) -> str:
    """A fused FFN is as wide as the layers that it stands for."""
    layers = max(1, math.ceil(share - 1e-9))
    high, wide = sizes.unit * share / layers, sizes.step * layers - sizes.gap
    y = sizes.bottom if part else sizes.top - high
    kind = ("attention", "ffn")[part]
    told = f"layer {layer}, {('attention', 'FFN')[part]}: {name}, {share:.0%} of the teacher’s parameters"
    more = f' data-site="{2 * layer + part}" data-told="{escaped(told)}"'
    return rectangle(sizes.left + layer * sizes.step, y, wide, high, kind, more)


def _variant(sizes: StripSizes, layer: int, part: int, name: str, share: float, labels: str) -> str:
    """Just beyond the bar."""
    x = sizes.left + layer * sizes.step + (sizes.step - sizes.gap) / 2
    more = f' data-name="{2 * layer + part}"'
    if labels == "across":
        y = sizes.bottom + sizes.unit + 15 if part else sizes.top - sizes.unit - 7
        found = words(x, y, name, "variant", "middle")
    else:
        y = sizes.bottom + sizes.unit + 8 if part else sizes.top - sizes.unit - 6
        found = words(x + 4, y, name, "variant", "end" if part else "start", turned=True)
    return found.replace("<text", f"<text{more}", 1)
