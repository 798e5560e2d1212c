"""The front as a chart that moves (page.js) and in words: its points, and what the one that is picked comes to.

Reads records of searched.py; writes nothing.
"""

from __future__ import annotations

from fractions import Fraction

from puzzle.report.layers import Layer
from puzzle.report.markup import captioned, escaped, folded, legend, table
from puzzle.report.searched import Point, Trade
from puzzle.report.svg import Scale, chart, diamond, figure, line, polyline, star, words, x_axis, y_axis
from puzzle.report.table import Table
from puzzle.report.words import at_least, objective_unit

DIGITS = 8  # of a limit that a point keeps


def in_order(trade: Trade) -> list[Point]:
    """The points that can be clicked on, the chosen one among them, by cost."""
    if trade.chosen is None:
        return list(trade.points)
    others = [point for point in trade.points if point.blocks != trade.chosen.blocks]
    return sorted([*others, trade.chosen], key=lambda point: point.cost)


def start_of(trade: Trade) -> Point:
    """What is picked at first: the chosen one, else the dearest."""
    return trade.chosen or in_order(trade)[-1]


def layers_of(point: Point, trade: Trade) -> tuple[Layer, ...]:
    found = [trade.blocks[place] for place in point.blocks]
    return tuple(map(Layer, found[::2], found[1::2]))


def said(point: Point, trade: Trade) -> str:
    """Of one point, in one line."""
    chosen = "Chosen: " if point is trade.chosen else ""
    kept = f"breaks {', '.join(point.broken)}" if point.broken else "keeps every limit"
    lost = f"{figure(point.objective)} {objective_unit(trade.objective_name)}"
    return f"{chosen}{figure(point.cost)} {trade.cost_unit}, {lost}, {kept}"


def cost_label(trade: Trade) -> str:
    """With its unit, unless it is a count, whose name says what is counted."""
    counts = trade.cost_unit in ("", "parameters")
    return trade.cost_name if counts else f"{trade.cost_name}, {trade.cost_unit}"


def quality_name(trade: Trade) -> str:
    """With its unit, for an axis."""
    if trade.objective_name == "kl_nats":
        return "KL, sum of scores, nats per token"
    return f"{trade.objective_name.removesuffix('_nats')}, sum of scores, {objective_unit(trade.objective_name)}"


def chart_of(trade: Trade) -> str:
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
            f'aria-label="{escaped(said(point, trade))}"'
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
    chosen = "" if trade.chosen is None else f" {said(trade.chosen, trade)}."
    return (
        f"Predicted loss of quality against {trade.cost_name}: {len(trade.points)} of {trade.num_points} "
        f"architectures that nothing beats in both.{chosen}"
    )


# --- in words -----------------------------------------------------------------------------------------------------


def amounts(point: Point, trade: Trade) -> list[str]:
    """The totals with their units; a count says by its name what is counted."""
    pairs = zip(point.totals, trade.told, strict=True)
    return [figure(value) if unit == "parameters" else f"{figure(value)} {unit}" for value, (_, unit) in pairs]


def to_get(point: Point, trade: Trade) -> str:
    """The line of a constraint file that a point of the front answers."""
    limit = at_least(Fraction(point.cost) / (1 - Fraction(trade.cost_margin)), DIGITS)
    return f"constraints: {{{trade.cost_name}: {int(limit) if limit.is_integer() else limit}}}"


def _words_of(trade: Trade) -> str:
    if trade.num_points == 1:
        return "Only one architecture is worth choosing; its layers are below."
    drawn = "all" if len(trade.points) == trade.num_points else len(trade.points)
    told = (
        f"Nothing on offer is better in both than one of these {trade.num_points:,} architectures ({drawn} of them "
        "drawn). What one loses is the sum of its variants’ own scores, before global distillation. Pick one to see "
        "its layers below."
    )
    cost, loss = trade.end
    if cost < trade.points[0].cost:
        told += f" Cheaper ones go on to {figure(cost)} {trade.cost_unit}, where {figure(loss)} is lost."
    return told


def section(trade: Trade) -> str:
    """The chart, what is picked at first, and all points as a table."""
    points = in_order(trade)
    start = start_of(trade)
    totals = "".join(
        f"<div><dt>{escaped(name)}</dt><dd>{escaped(amount)}</dd></div>"
        for (name, _), amount in zip(trade.told, amounts(start, trade), strict=True)
    )
    rows = tuple(
        (
            ("chosen: " if point is trade.chosen else "") + figure(point.cost), figure(point.objective),
            *(figure(value) for value in point.totals), ", ".join(point.broken) or "all",
        )
        for point in points
    )  # fmt: skip
    head = (cost_label(trade), trade.objective_name, *(name for name, _ in trade.told), "limits kept")
    marked = points.index(trade.chosen) if trade.chosen is not None else None
    return f"""\
{captioned(escaped(_words_of(trade)), chart_of(trade), _legend(trade))}
<div class="selected"><output aria-live="polite">{escaped(said(start, trade))}</output><dl>{totals}</dl>
<p class="get">To have it searched for: <code>{escaped(to_get(start, trade))}</code></p>
<button type="button" disabled>Back to the chosen one</button></div>
{folded("The points as a table", table(Table(head, rows, "", marked)))}"""


def _legend(trade: Trade) -> str:
    marks = [
        ('<circle cx="7" cy="7" r="4" class="point"/>', "keeps every limit"),
        ('<circle cx="7" cy="7" r="4" class="point broken"/>', "breaks one"),
    ]
    if trade.chosen is not None:
        marks.append((diamond(7, 7, 6, "point chosen"), "chosen"))
    if trade.teacher_cost is not None:
        marks.append((star(7, 7, 7, "teacher-star"), "teacher"))
    return legend(marks)
