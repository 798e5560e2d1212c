"""The live explorer: a slider for each limit, the front, the layers, and an architecture to compare with.

A view of :class:`~puzzle.notebook.sliders.Sliders` in ipywidgets and a plotly figure (the extra ``explore``). While a
slider moves it shows answers within a gap of 1e-3; once it rests, the proven one and what the limits cost.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import anywidget  # noqa: F401 - plotly's figure asks for it, but only when it is made
import ipywidgets as widgets
import plotly.graph_objects as go

from puzzle import style
from puzzle.notebook.front import ParetoFront
from puzzle.notebook.html import STYLE, note, paragraph
from puzzle.notebook.sliders import QUICK, Limit, Sliders, price_words
from puzzle.notebook.solution import SolutionView
from puzzle.notebook.strip import svg
from puzzle.report.markup import folded_text, table
from puzzle.report.table import Table
from puzzle.report.words import figure, objective_unit, quality, status
from puzzle.search.explain import RowStory
from puzzle.search.pareto import heights, quality_label
from puzzle.search.programme import EXACT, Effort
from puzzle.types import InfeasibleError, OutOfTimeError

MOST_POINTS = 1000  # of the front in the picture
REST_S = 0.4  # without a move, after which a slider counts as at rest
HINT = "Click on a point of the front to compare with it."
GRID = "rgba(128, 128, 128, .22)"
CSS = f"""\
<style>
.puzzle .xtick text, .puzzle .ytick text, .puzzle .legendtext, .puzzle .xtitle, .puzzle .ytitle {{
  fill: currentColor !important }}
.puzzle .teacher-star path {{ fill: currentColor }}
.puzzle .widget-button {{ width: auto; padding: 0 12px }}
.puzzle .noUi-connect {{ background: {style.ATTENTION} }}
</style>"""


class Explorer:
    """What :meth:`ParetoFront.explore` returns. ``chosen`` is where the sliders stand, ``compared`` what was clicked.

    ``chosen`` is None until something fits; ``compared`` until something is picked.
    """

    def __init__(self, front: ParetoFront) -> None:
        self.sliders = Sliders.of(front)
        self.chosen: SolutionView | None = None
        self.compared: SolutionView | None = None
        self._stories: Sequence[RowStory] = ()
        self._rest: asyncio.TimerHandle | None = None
        self._nearest: tuple[int, float] | None = None
        self._headline, self._message = widgets.HTML(), widgets.HTML()
        self._strips, self._figures = widgets.HTML(), widgets.HTML()
        self.controls = [_slider(limit) for limit in self.sliders.limits]
        self._labels = [widgets.HTML() for _ in self.controls]
        self._told = [widgets.HTML() for _ in self.controls]
        self._go = widgets.Button(icon="arrow-right", layout={"display": "none"})
        self._keep = widgets.Button(description="Keep for comparison", icon="thumb-tack")
        self._drop = widgets.Button(description="Compare with nothing")
        self.figure = _figure(front)
        self.view = self._layout()
        for index, control in enumerate(self.controls):
            control.observe(partial(self._moved, index), names="value")
        self.figure.data[0].on_click(self._clicked)
        self._go.on_click(self._to_nearest)
        self._keep.on_click(lambda _: self._compare(self.chosen))
        self._drop.on_click(lambda _: self._compare(None))
        self._solve(0, EXACT)

    def _repr_mimebundle_(self, **asked: Any) -> Any:
        return self.view._repr_mimebundle_(**asked)

    def _layout(self) -> Any:
        rows: list[Any] = []
        for label, control, told in zip(self._labels, self.controls, self._told, strict=True):
            rows.append(widgets.VBox([label, control, told]))
        buttons = widgets.HBox([self._keep, self._drop], layout={"flex_flow": "row wrap"})
        left = widgets.VBox(
            [self._headline, *rows, self._message, self._go, buttons],
            layout={"flex": "1 1 340px", "min_width": "300px"},
        )
        right = widgets.VBox([self.figure], layout={"flex": "2 1 460px", "min_width": "380px"})
        side_by_side = {"flex_flow": "row wrap", "align_items": "flex-start"}
        self._strips.layout = {"flex": "1 1 560px", "min_width": "420px", "margin": "0 24px 0 0"}
        top = widgets.HBox([left, right], layout=side_by_side)
        bottom = widgets.HBox([self._strips, self._figures], layout=side_by_side)
        view = widgets.VBox([widgets.HTML(STYLE + CSS), top, bottom])
        view.add_class("puzzle")
        return view

    @property
    def values(self) -> tuple[float, ...]:
        """Where the sliders stand."""
        return tuple(float(control.value) for control in self.controls)

    def _moved(self, index: int, _: object) -> None:
        self._solve(index, QUICK)
        if self._rest is not None:
            self._rest.cancel()
        try:
            self._rest = asyncio.get_running_loop().call_later(REST_S, self._solve, index, EXACT)
        except RuntimeError:  # no loop, as in a script: nothing comes in between
            self._solve(index, EXACT)

    def _solve(self, moved: int, effort: Effort) -> None:
        """Answers for where the sliders stand, and draws it."""
        begin = time.perf_counter()
        start = None if self.chosen is None else self.chosen.solution.items
        self._stories, self._nearest, trouble = (), None, ""
        try:
            self.chosen = self.sliders.solve(self.values, start, effort)
        except (InfeasibleError, OutOfTimeError) as error:
            trouble, near = str(error), self.sliders.nearest(self.values, moved)
            self._nearest = None if near is None else (moved, self.sliders.limits[moved].on_grid(near))
        took = time.perf_counter() - begin
        if effort == EXACT and self.chosen is not None and not trouble:
            self._stories = self.sliders.prices(self.chosen)
        self._draw(trouble, took)

    def _to_nearest(self, _: object) -> None:
        if self._nearest is not None:
            index, value = self._nearest
            self.controls[index].value = value

    def _clicked(self, _: object, points: Any, __: object) -> None:
        if points.point_inds:
            point = int(self.figure.data[0].customdata[points.point_inds[0]])
            self._compare(self.sliders.front.at(point))

    def _compare(self, view: SolutionView | None) -> None:
        self.compared = view
        self._draw_comparison()

    def _draw(self, trouble: str, took: float) -> None:
        self._message.value = note(f"Nothing fits here: {trouble}") if trouble else ""
        self._go.layout.display = "none" if self._nearest is None else ""
        if self._nearest is not None:
            index, value = self._nearest
            self._go.description = f"to the nearest that fits: {self.sliders.limits[index].label} {figure(value)}"
        self._headline.value = self._told_of_chosen(trouble, took)
        for limit, value, label in zip(self.sliders.limits, self.values, self._labels, strict=True):
            label.value = paragraph(f"{limit.label} {figure(value)} {limit.unit}")
        for index, told in enumerate(self._told):
            told.value = "" if trouble else paragraph(self._told_of_limit(index), "faint")
        self._draw_comparison(stale=bool(trouble))

    def _told_of_chosen(self, trouble: str, took: float) -> str:
        if self.chosen is None:
            return paragraph("no architecture yet", "strong")
        found = quality(self.chosen.solution)
        if trouble:
            return paragraph(found, "strong") + paragraph("the last that fitted", "faint")
        state = f"predicted; {status(self.chosen.solution)}, found in {1000 * took:.0f} ms"
        return paragraph(found, "strong") + paragraph(state, "faint")

    def _told_of_limit(self, index: int) -> str:
        if self.chosen is None:
            return ""
        row = self.chosen.problem.rows[index]
        reached = f"reaches {figure(float(row.quantity.value(self.chosen.solution.items)))}"
        if not self._stories:
            return reached
        name = self.chosen.solution.objective_name
        return f"{reached}; {price_words(self._stories[index], objective_unit(name))}"

    def _draw_comparison(self, stale: bool = False) -> None:
        chosen, compared = self.chosen, self.compared
        with self.figure.batch_update():
            for trace, view in zip(self.figure.data[2:], (chosen, compared), strict=True):
                at = None if view is None else self.sliders.point(view)
                trace.x, trace.y = ((), ()) if at is None else ((at[0],), (at[1],))
                low, top = self.figure.layout.yaxis.range or (0.0, 0.0)
                if at is not None and at[1] > top:
                    self.figure.layout.yaxis.range = (low, 1.1 * at[1])
        shown = [(name, view) for name, view in (("chosen", chosen), ("compared", compared)) if view is not None]
        parts = []
        for name, view in shown:
            others = [other.blocks for label, other in shown if label != name]
            parts.append(paragraph(f"{name}: {quality(view.solution)}"))
            parts.append(svg(view.blocks, name, *others))
        parts.append(paragraph(HINT if compared is None else "Outlined: where the two differ.", "faint"))
        self._strips.value = f'<div style="opacity:{0.4 if stale else 1}">{"".join(parts)}</div>'
        files = [folded_text(f"constraint file of the {name} one", view.constraints) for name, view in shown]
        self._figures.value = _comparison(chosen, compared) + "".join(files)


def _comparison(chosen: SolutionView | None, compared: SolutionView | None) -> str:
    """The totals of both beside the teacher's."""
    if chosen is None:
        return ""
    others = {} if compared is None else {of.metric: of.student for of in compared.figures}
    head = ("predicted", "chosen", "teacher", "of the teacher's", *(("compared", "difference") if others else ()))
    rows = []
    for of in chosen.figures:
        difference = [figure(others[of.metric]), figure(of.student - others[of.metric])] if of.metric in others else []
        rows.append((f"{of.metric}, {of.unit}", *of.cells, *difference))
    return table(Table(head, tuple(rows)))


def _slider(limit: Limit) -> Any:
    kind = widgets.IntSlider if limit.whole else widgets.FloatSlider
    ends = [limit.start, limit.least, limit.most, limit.step]
    start, least, most, step = map(round, ends) if limit.whole else ends
    return kind(
        value=start,
        min=least,
        max=most,
        step=step,
        readout=False,  # the label says more
        tooltip=f"{limit.label} ({limit.unit})",
        layout={"width": "96%"},
    )


def _figure(front: ParetoFront) -> Any:
    """The front, the teacher, and places for the chosen and the compared architecture."""
    of = front.front
    points = of.thinned(MOST_POINTS)
    told = f"{of.cost_name} %{{x:.4g}} {of.cost_unit}<br>{of.objective_name} %{{y:.4f}}<extra></extra>"
    teacher = ([], []) if of.teacher_cost is None else ([of.teacher_cost], [0.0])
    line = {"shape": "hv", "color": style.ATTENTION, "width": 2}
    marked = {"size": 6 if len(points) <= 300 else 4, "color": style.ATTENTION}
    made = go.FigureWidget(
        [
            go.Scatter(
                x=of.cost[points], y=of.objective[points], customdata=points, mode="lines+markers", line=line,
                marker=marked, name=f"best for this cost ({len(of):,} points)", hovertemplate=told,
            ),
            go.Scatter(
                x=teacher[0], y=teacher[1], mode="markers", name="teacher", hovertemplate=told,
                marker={"symbol": "star", "size": 15, "color": style.TEACHER},
            ),
            go.Scatter(
                x=[], y=[], mode="markers", name="chosen", hovertemplate=told,
                marker={"size": 14, "color": style.CHOSEN},
            ),
            go.Scatter(
                x=[], y=[], mode="markers", name="compared", hovertemplate=told,
                marker={"symbol": "diamond-open", "size": 14, "color": style.HEAD, "line": {"width": 3}},
            ),
        ]
    )  # fmt: skip
    axis = {"gridcolor": GRID, "zerolinecolor": GRID, "linecolor": GRID}
    made.update_layout(
        height=380,
        autosize=True,
        margin={"l": 60, "r": 10, "t": 10, "b": 50},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hovermode="closest",
        showlegend=True,
        legend={"x": 1, "xanchor": "right", "y": 0.92, "yanchor": "top", "bgcolor": "rgba(0,0,0,0)"},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": style.OTHER, "remove": ["select2d", "lasso2d", "autoScale2d"]},
        xaxis={**axis, "title": {"text": f"{of.cost_name} ({of.cost_unit})"}},
        yaxis={**axis, "title": {"text": quality_label(of.objective_name)}, "range": heights(of)},
    )
    return made
