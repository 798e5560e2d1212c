"""The charts of the page that stand still, as SVG: heat maps, times, distillation, baselines.

Each function takes records of contents.py and searched.py and gives one chart; page.js tells the numbers in them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from puzzle import style
from puzzle.report.contents import Trained
from puzzle.report.markup import escaped
from puzzle.report.searched import HeatMap
from puzzle.report.summary import MODELS, TIMES, Summary
from puzzle.report.svg import (
    LETTER,
    WIDTH,
    Scale,
    chart,
    diamond,
    every_layer,
    figure,
    line,
    polyline,
    rectangle,
    words,
    x_axis,
    y_axis,
)
from puzzle.search.compare import Compared
from puzzle.types import mean_and_error

CURVE_POINTS = 300


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
    every = every_layer(num_layers, wide)
    drawn += [
        words(left + (layer + 0.5) * wide, bottom + 14, layer, "tick", "middle")
        for layer in range(0, num_layers, every)
    ]
    drawn.append(words(left - 8, bottom + 14, "layer", "tick", "end"))
    steps = range(len(style.SCALE_STEPS))
    drawn += [rectangle(left + 12 * step, bottom + 26, 12, 9, f"heat-{step}") for step in steps]
    ends = f"{figure(scale.low)} to {figure(scale.high)}"
    legend = f"{ends}, log" if scale.logarithmic else ends
    drawn.append(words(left + 12 * len(steps) + 8, bottom + 35, legend, "tick"))
    sizes = f'data-left="{left:.1f}" data-top="{top:g}" data-wide="{wide:.3f}" data-high="{high:g}"'
    width = left + max(num_layers * wide + 6, 12 * len(steps) + 8 + LETTER * len(legend))
    told = f"{found.part}, {unit}, by variant and layer, from {ends}; a table follows"
    return chart(f"map-{name}", (width, bottom + 46), told, "".join(drawn) + f'<g data-cells="{name}" {sizes}/>')


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
