"""The charts of the page, as SVG: front, layers, heat maps, times, distillation, baselines.

Each function takes records of contents.py and gives one chart; page.js moves what can be moved in them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from puzzle import style
from puzzle.report.contents import HeatMap, Point, Trade, Trained
from puzzle.report.summary import MODELS, TIMES, Design, Summary
from puzzle.report.svg import (
    Scale,
    chart,
    diamond,
    escaped,
    figure,
    line,
    polyline,
    rectangle,
    star,
    words,
    x_axis,
    y_axis,
)
from puzzle.search.compare import Compared
from puzzle.types import mean_and_error

WIDTH = 1000  # of the widest charts
LETTER = 6.4  # width of one, on average
CURVE_POINTS = 300

# --- front --------------------------------------------------------------------------------------------------------


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
        x_axis(x, top, bottom, trade.cost_name + (f", {trade.cost_unit}" if trade.cost_unit else "")),
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


# --- layers -------------------------------------------------------------------------------------------------------


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


def _numbered(num_layers: int, wide: float) -> int:
    """Every how manieth layer has its number, where a layer is so wide."""
    room = 14.0 + LETTER * len(str(num_layers - 1))
    return next(step for step in (1, 2, 5, 10, 20, 50, 100) if step * wide >= room)


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
    every = _numbered(num_layers, sizes.step)
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


# --- heat maps ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeatScale:
    """Which of the palette's steps a number takes; below the least positive one: the first."""

    low: float
    high: float
    logarithmic: bool

    @classmethod
    def over(cls, rows: Sequence[Sequence[float | None]], logarithmic: bool = False) -> HeatScale:
        values = [value for row in rows for value in row if value is not None]
        positive = [value for value in values if value > 0]
        if logarithmic and positive and min(values) >= 0:
            return cls(min(positive), max(positive), True)
        return cls(min(values, default=0.0), max(values, default=0.0), False)

    def step(self, value: float) -> int:
        count = len(style.SCALE_STEPS)
        if self.high <= self.low or value <= self.low:
            return 0
        share = (value - self.low) / (self.high - self.low)
        if self.logarithmic:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        return min(count - 1, int(share * count))


def heat_map(name: str, found: HeatMap, rows: Sequence[Sequence[float | None]], unit: str, logarithmic: bool) -> str:
    """Variants by layers. Cells of one colour are one path; what was chosen is framed, or, where there is no room for
    that, has a bar across it. Numbers: the table ``name``.
    """
    num_layers = len(found.chosen)
    left = LETTER * max(map(len, found.variants)) + 16
    wide = max(4.0, min(30.0, (WIDTH - left - 6) / num_layers))
    high, top, gap = 22.0, 4.0, 1.0 if wide >= 8 else 0.0
    scale = HeatScale.over(rows, logarithmic)
    cells: dict[str, list[str]] = {}
    for row, values in enumerate(rows):
        for layer, value in enumerate(values):
            kind = "missing" if value is None else f"heat-{scale.step(value)}"
            x, y = left + layer * wide, top + row * high
            cells.setdefault(kind, []).append(f"M{x:.1f} {y:.0f}h{wide - gap:.1f}v{high - 1:.0f}h-{wide - gap:.1f}z")
    drawn = [f'<path class="{kind}" d="{"".join(paths)}"/>' for kind, paths in sorted(cells.items())]
    drawn += [words(left - 8, top + row * high + 15, one, "tick", "end") for row, one in enumerate(found.variants)]
    marks = [
        f"M{left + layer * wide:.1f} {top + row * high:.0f}h{wide - gap:.1f}v{high - 1:.0f}h-{wide - gap:.1f}z"
        if gap
        else f"M{left + layer * wide:.1f} {top + row * high + 8:.0f}h{wide:.1f}v5h-{wide:.1f}z"
        for layer, row in enumerate(found.chosen)
        if row is not None
    ]
    drawn.append(f'<path class="{"frame" if gap else "bar"}" d="{"".join(marks)}"/>' if marks else "")
    bottom = top + len(rows) * high
    every = _numbered(num_layers, wide)
    drawn += [
        words(left + (layer + 0.5) * wide, bottom + 14, layer, "tick", "middle")
        for layer in range(0, num_layers, every)
    ]
    drawn.append(words(left - 8, bottom + 14, "layer", "tick", "end"))
    drawn += _legend(left, bottom + 26, scale)
    sizes = f'data-left="{left:.1f}" data-top="{top:g}" data-wide="{wide:.3f}" data-high="{high:g}"'
    width = left + max(num_layers * wide + 6, 230)
    told = (
        f"{found.part}, {unit}, by variant and layer, from {figure(scale.low)} to {figure(scale.high)}; a table follows"
    )
    return chart(f"map-{name}", (width, bottom + 46), told, "".join(drawn) + f'<g data-cells="{name}" {sizes}/>')


def _legend(x: float, y: float, scale: HeatScale) -> list[str]:
    drawn = [rectangle(x + 12 * step, y, 12, 9, f"heat-{step}") for step in range(len(style.SCALE_STEPS))]
    told = f"{figure(scale.low)} to {figure(scale.high)}{', logarithmic' if scale.logarithmic else ''}"
    return [*drawn, words(x + 12 * len(style.SCALE_STEPS) + 8, y + 9, told, "tick")]


# --- rows of dots: times, losses, baselines -----------------------------------------------------------------------


@dataclass(frozen=True)
class Dots:
    """One row: its label, and marks at values: (class, value, standard error or 0)."""

    label: str
    marks: tuple[tuple[str, float, float], ...]
    span: tuple[float, float] | None = None  # a band behind the marks
    joined: bool = False


def dots(name: str, rows: Sequence[Dots], x_label: str, told: str, log: bool = False, at: float | None = None) -> str:
    """``at``: where a line marks what is to be compared with."""
    left, right, top, high = min(330.0, LETTER * max(len(row.label) for row in rows) + 24), 744.0, 8.0, 26.0
    ends = [value + sign * error for row in rows for _, value, error in row.marks for sign in (-1, 1)]
    ends += [end for row in rows for end in row.span or ()] + ([at] if at is not None else [])
    x = Scale.over([end for end in ends if not log or end > 0], left, right, log)
    bottom = top + high * len(rows)
    drawn = [x_axis(x, top, bottom, x_label)]
    drawn += [] if at is None else [line(x.at(at), top, x.at(at), bottom, "mark")]
    for place, row in enumerate(rows):
        y = top + high * (place + 0.5)
        drawn.append(words(left - 10, y + 4, row.label, "tick", "end"))
        if row.span:
            drawn.append(line(x.at(row.span[0]), y, x.at(row.span[1]), y, "band"))
        if row.joined:
            drawn.append(line(x.at(row.marks[0][1]), y, x.at(row.marks[-1][1]), y, "joint"))
        for kind, value, error in row.marks:
            if error:
                drawn.append(line(x.at(max(x.low, value - error)), y, x.at(value + error), y, "error"))
            more = f' data-told="{escaped(f"{row.label}: {figure(value)}" + (f" ± {figure(error)}" if error else ""))}"'
            drawn.append(
                diamond(x.at(value), y, 6, kind, more)
                if kind.endswith("second")
                else f'<circle cx="{x.at(value):.1f}" cy="{y:.1f}" r="5" class="{kind}"{more}/>'
            )
    return chart(name, (760, bottom + 46), told, "".join(drawn))


def times(summary: Summary) -> str:
    """What was predicted over what was measured; empty where nothing was timed."""
    rows = []
    for workload, of in summary.speed.items():
        for model in (model for model in MODELS if model in of):
            for metric in TIMES:
                whole, parts = of[model]["whole"][metric], of[model]["parts"]
                predicted = summary.predicted[model].get(f"{workload}.{metric}")
                marks = [("dot first", predicted / whole, 0.0)] if predicted is not None else []
                marks += [("dot second", parts[metric] / whole, 0.0)] if parts else []
                label = f"{model}, {workload}.{metric}: {figure(whole)} {TIMES[metric]}"
                rows += [Dots(label, tuple(marks))] if marks else []
    if not rows:
        return ""
    told = "Predicted over measured times by model and metric; 1 is what the whole model took. The table above has all."
    return dots("times", rows, "share of what the whole model was measured at", told, at=1.0)


def losses(trained: Sequence[Trained]) -> str:
    rows = [
        Dots(
            f"{one.part}, {one.variant}",
            (("dot start", one.start, 0.0), ("dot first" if one.part == "attention" else "dot ffn-dot", one.end, 0.0)),
            (one.least, one.most),
            joined=True,
        )
        for one in trained
    ]
    told = "Local loss of each variant before and after block-wise distillation, means over layers; a table follows"
    return dots("losses", rows, "local loss, share of the teacher’s output (logarithmic)", told, log=True)


def baselines(compared: Sequence[Compared], objective: str) -> str:
    """Predicted and, where that was evaluated, true."""
    rows = []
    for one in compared:
        mean, error = mean_and_error(one.measured) if one.measured else (0.0, 0.0)
        error = error if math.isfinite(error) else 0.0
        marks = [("dot first", one.objective, 0.0)] if one.objective is not None else []
        marks += [("dot second", mean, error)] if one.measured else []
        rows += [Dots(one.name, tuple(marks))] if marks else []
    told = f"{objective} of each way to choose under the same limits; a table follows"
    return dots("baselines", rows, f"{objective.removesuffix('_nats')}, nats per token", told) if rows else ""


def curve(steps: Sequence[Mapping[str, Any]]) -> str:
    """The KL of global distillation, else its loss, over tokens: means of equally many steps, and smoothed."""
    figure_name = "kl" if "kl" in steps[-1] else "loss"
    known = [(float(one["tokens"]), float(one[figure_name])) for one in steps if figure_name in one]
    size = math.ceil(len(known) / CURVE_POINTS)
    bins = [known[start : start + size] for start in range(0, len(known), size)]
    points = [(of[-1][0], statistics.fmean(value for _, value in of)) for of in bins]
    reach = max(1, len(points) // 20)
    smooth = [
        (tokens, statistics.fmean(value for _, value in points[max(0, place - reach) : place + reach + 1]))
        for place, (tokens, _) in enumerate(points)
    ]
    left, right, top, bottom = 70, 744, 12, 240
    values = [value for _, value in points]
    log = min(values) > 0 and max(values) / min(values) > 5
    x = Scale.over([0.0, points[-1][0]], left, right, margin=0.0)
    y = Scale.over(values, bottom, top, log)
    label = {"kl": "KL, nats per token", "loss": "loss"}[figure_name]
    drawn = [
        x_axis(x, top, bottom, "tokens seen"),
        y_axis(y, left, right, label),
        polyline([(x.at(tokens), y.at(value)) for tokens, value in points], "raw"),
        polyline([(x.at(tokens), y.at(value)) for tokens, value in smooth], "smooth"),
    ]
    ends = f"from {figure(smooth[0][1])} to {figure(smooth[-1][1])}, smoothed"
    told = f"{label} over {len(known)} steps of global distillation: {ends}"
    return chart("curve", (760, 285), told, "".join(drawn))
