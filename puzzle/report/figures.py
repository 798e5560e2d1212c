"""The picture of a run: architecture layer by layer, quality before and after, the front, predicted against measured.

Reads a :class:`~puzzle.report.summary.Summary`; writes one PNG.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puzzle import style
from puzzle.report.summary import MODELS, TIMES, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_FRONT_POINTS = 2000


def draw(summary: Summary, path: Path) -> None:
    figure = style.new_figure(12, 8)
    axes: Any = figure.subplots(2, 2)
    draw_architecture(axes[0, 0], summary.architecture, summary.widths)
    _quality(axes[0, 1], summary)
    _front(axes[1, 0], summary)
    _times(axes[1, 1], summary)
    figure.suptitle(summary.title)
    style.save(figure, path)


def draw_architecture(axes: Axes, names: Sequence[tuple[str, str]], widths: Sequence[tuple[float, float]]) -> None:
    """One row a layer: attention to the left, FFN to the right, each as large as its share of the teacher's block."""
    from matplotlib.ticker import MaxNLocator

    for layer, ((attention, ffn), (left, right)) in enumerate(zip(names, widths, strict=True)):
        axes.barh(layer, -1, color="none", edgecolor=style.TEACHER, linewidth=0.5)
        axes.barh(layer, 1, color="none", edgecolor=style.TEACHER, linewidth=0.5)
        axes.barh(layer, -left, color=style.ATTENTION)
        rows = max(1, math.ceil(right))  # a fused FFN stands for those of several layers
        axes.barh(layer + (rows - 1) / 2, right / rows, 0.8 + rows - 1, color=style.FFN)
        if len(names) <= 40:
            axes.text(-1.03, layer, attention, ha="right", va="center", fontsize=8)
            axes.text(1.03, layer, ffn, ha="left", va="center", fontsize=8)
    axes.set_xlim(-1.6, 1.6)
    axes.set_xticks([-1, -0.5, 0, 0.5, 1], ["1", "½", "0", "½", "1"])
    axes.set_xlabel("parameters, share of the teacher's: attention (left), FFN (right)")
    axes.set_ylabel("layer")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.invert_yaxis()
    axes.set_title("Architecture")


def _quality(axes: Axes, summary: Summary) -> None:
    names = MODELS[1:]
    figures = (("kl_nats", "KL to the teacher", style.ATTENTION), ("ce_gap_nats", "CE gap to the teacher", style.FFN))
    for offset, (figure, label, colour) in enumerate(figures):
        values = [summary.quality[name][figure] for name in names]
        places = [index + 0.38 * (offset - 0.5) for index in range(len(names))]
        errors = [value["standard_error"] for value in values]
        means = [value["mean"] for value in values]
        axes.bar(places, means, 0.36, yerr=errors, color=colour, label=label, capsize=3)
    axes.set_xticks(range(len(names)), ["before GKD", "after GKD"])
    axes.set_ylabel("nats per token (report split, ± standard error)")
    axes.legend()
    axes.set_title("Quality of the student")


def _front(axes: Axes, summary: Summary) -> None:
    front, solution = summary.front, summary.solution
    axes.set_title("Front")
    if front is None or solution is None:
        axes.text(0.5, 0.5, "nothing was searched for: the model was pruned", ha="center", transform=axes.transAxes)
        return
    points = front.thinned(MAX_FRONT_POINTS)
    axes.step(front.cost[points], front.objective[points], where="post", color=style.ATTENTION, label="best by score")
    if front.teacher_cost is not None:
        axes.plot([front.teacher_cost], [0], "*", color="black", markersize=12, label="teacher")
    chosen = ([solution.totals[front.cost_name]], [solution.objective_nats])
    axes.plot(*chosen, "o", color=style.CHOSEN, label="chosen")
    axes.set_xlabel(f"{front.cost_name} ({front.cost_unit})")
    axes.set_ylabel(f"{front.objective_name}, sum of single scores")
    axes.legend()


def _times(axes: Axes, summary: Summary) -> None:
    """The search's prediction, and the sum of the parts measured beside the whole, over the whole."""
    labels, ratios = [], []
    for workload, of in summary.speed.items():
        for model, timed in of.items():
            for name in TIMES:
                predicted = summary.predicted[model].get(f"{workload}.{name}", math.nan)  # not profiled: no bar
                labels.append(f"{model}, {workload}.{name}")
                parts = (timed["parts"] or {}).get(name, math.nan)
                ratios.append((predicted / timed["whole"][name], parts / timed["whole"][name]))
    axes.set_title("Times over those of the whole model")
    if not ratios:
        axes.text(0.5, 0.5, "no workload of this device", ha="center", transform=axes.transAxes)
        return
    for offset, (label, colour) in enumerate(
        (("predicted from the profile", style.ATTENTION), ("parts, same rounds", style.FFN))
    ):
        places = [index + 0.4 * (offset - 0.5) for index in range(len(ratios))]
        axes.barh(places, [pair[offset] for pair in ratios], 0.38, color=colour, label=label)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_xlabel("ratio (1 = came true)")
    axes.set_ylim(len(ratios) + 0.6, -0.6)  # room for the legend below the last bar
    axes.legend(loc="lower right", ncols=2, fontsize=8)
