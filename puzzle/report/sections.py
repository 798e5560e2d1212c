"""The sections of the page, as HTML: what each part of a run's contents says, draws and lists.

Reads :class:`~puzzle.report.contents.Contents`. Whatever comes from elsewhere (names of models, files, reasons) is
escaped where it is set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import puzzle.report.charts as charts
import puzzle.report.front as front
from puzzle.report.contents import Comparison, Contents, Left, Recipe, Trained
from puzzle.report.layers import Layer
from puzzle.report.markup import bullets, captioned, commands, escaped, folded, folded_text, legend, table
from puzzle.report.searched import Absent, HeatMap, Reached, Search, Trade
from puzzle.report.strip import Sizes, longest_name, strip
from puzzle.report.summary import MODELS, Summary
from puzzle.report.svg import diamond, figure
from puzzle.report.table import Table
from puzzle.report.words import objective_unit
from puzzle.types import mean_and_error

Found = TypeVar("Found")
MEANING = {
    "KL to the teacher": "how far the predictions of the next token are from the teacher’s, on average; 0 is the same.",
    "CE gap": "how much worse the text itself is predicted than by the teacher; bits per byte say the same per byte.",
    "Top-1 agreement": "the share of tokens at which both would say the same next.",
}


def sections_of(contents: Contents) -> list[tuple[str, str, str]]:
    """Name, title and text of each; without text where a run of this kind has none."""
    searched = contents.search
    trade: Trade | Absent | None = searched.trade if isinstance(searched, Search) else searched
    return [
        ("summary", "Summary", _part(contents.summary, _summary)),
        ("limits", "Limits", _part(searched, _limits)),
        ("what-fits", "What fits", _part(trade, front.section)),
        ("layers", "Layers", _part(drawn(contents), lambda found: _layers(found, trade))),
        ("choices", "What every layer had to choose from", _part(searched, _maps)),
        ("times", "Times", _part(contents.summary, _times)),
        ("distillation", "Distillation", _distillation(contents)),
        ("baselines", "Simpler ways to choose", _part(contents.compared, _baselines)),
        ("tournament", "Tournament", "" if contents.standings is None else table(contents.standings)),
        ("checkpoints", "Checkpoints", bullets(contents.exports)),
        ("reproduce", "Do it again", _recipe(contents.recipe)),
    ]


def drawn(contents: Contents) -> tuple[Layer, ...] | Absent:
    """The chosen architecture; where nothing was chosen, the point of the front that is picked at first."""
    trade = contents.search.trade if isinstance(contents.search, Search) else None
    if isinstance(contents.layers, Absent) and isinstance(trade, Trade):
        return front.layers_of(front.start_of(trade), trade)
    return contents.layers


def _part(found: Found | Absent | None, told: Callable[[Found], str]) -> str:
    if found is None:
        return ""
    return f'<p class="absent">{commands(found.reason)}</p>' if isinstance(found, Absent) else told(found)


def unfinished(left: Sequence[Left]) -> str:
    if not left:
        return ""
    lines = []
    for one in left:
        states = [
            f"{count} of {one.units} {what}"
            for count, what in ((one.missing, "missing"), (one.stale, "stale"))
            if count
        ]
        redo = " --redo" if one.stale else ""
        lines.append(
            f"<li>{escaped(one.stage)}: {', '.join(states)} – <code>puzzle {escaped(one.stage)} RUN{redo}</code></li>"
        )
    head = "This run is not finished. <code>puzzle run RUN</code> does what is missing; what is there is shown below."
    return f'<div class="left" role="note"><p>{head}</p><ul>{"".join(lines)}</ul></div>'


# --- sections -----------------------------------------------------------------------------------------------------


def _summary(summary: Summary) -> str:
    meaning = "".join(f"<li><strong>{name}</strong>: {text}</li>" for name, text in MEANING.items())
    figures = Table(("", *MODELS), tuple(summary.rows()))
    return (
        f'<dl class="keys">{"".join(_key(*one) for one in _keys(summary))}</dl>{table(figures)}'
        f'<p class="note">{escaped(summary.notes)}</p><ul class="note">{meaning}</ul>'
        + folded("Quality by how many tokens a prediction has in sight", table(summary.by_position()))
    )


def _key(name: str, value: str, beside: str) -> str:
    return (
        f'<div><dt>{escaped(name)}</dt><dd class="value">{escaped(value)}</dd>'
        f'<dd class="beside">{escaped(beside)}</dd></div>'
    )


def _keys(summary: Summary) -> list[tuple[str, str, str]]:
    """Name, value and what to hold it against."""
    old, new = summary.params["teacher"], summary.params["student"]
    quality = summary.quality["student"]
    keys = [("parameters", figure(new), f"{new / old:.0%} of the teacher’s {figure(old)}")]
    memory = next((name for name in summary.predicted["teacher"] if name.endswith("memory_gib")), None)
    if memory is not None:
        before, after = (summary.predicted[model][memory] for model in ("teacher", "student"))
        keys.append((memory, figure(after), f"{after / before:.0%} of the teacher’s {figure(before)}, predicted"))
    for workload, of in summary.speed.items():
        slow, fast = (of[model]["whole"]["output_tok_per_s"] for model in ("teacher", "student"))
        keys.append(
            (
                f"{workload}, tokens per second",
                figure(fast),
                f"{fast / slow:.2f} × the teacher’s {figure(slow)}, measured",
            )
        )
    kl, before_kl = quality["kl_nats"], summary.quality["student before GKD"]["kl_nats"]
    keys.append(
        (
            "KL to the teacher, nats/token",
            f"{kl['mean']:.4f}",
            f"± {kl['standard_error']:.4f}; {before_kl['mean']:.4f} before GKD",
        )
    )
    agreement = quality["agreement"]
    keys.append(
        ("top-1 agreement", f"{agreement['mean']:.1%}", f"± {agreement['standard_error']:.1%}, with the teacher")
    )
    return keys


def _limits(found: Search) -> str:
    if not found.reached:
        return "<p>None were set.</p>"
    rows = tuple(
        (one.written, one.unit, _number(one.teacher), _number(one.chosen), _room(one)) for one in found.reached
    )
    told = "What the search was asked to keep to, and what its answer comes to, as predicted."
    return f"<p>{told}</p>{table(Table(('limit', 'unit', 'teacher', 'chosen', 'room left'), rows))}"


def _room(one: Reached) -> str:
    """In the limit's unit and as a share of it."""
    if one.room is None:
        return ""
    return figure(one.room) + (f" ({one.room / abs(one.bound):.1%})" if one.bound else "")


def _number(value: float | None) -> str:
    return "" if value is None else figure(value)


def sizes_of(layers: Sequence[Layer], trade: Trade | Absent | None) -> Sizes:
    """Of the strip, with room for the longest variant that may have to be named."""
    known = [len(block.name) for block in trade.blocks] if isinstance(trade, Trade) else []
    return Sizes.of(len(layers), max(longest_name(layers), *known, 0))


def _layers(layers: Sequence[Layer], trade: Trade | Absent | None) -> str:
    picked = " It follows the point that is picked above." if isinstance(trade, Trade) else ""
    told = (
        "From the first layer to the last: attention above, FFN below, each as high as its share of the teacher’s "
        f"parameters; the grey behind is all of them.{picked}"
    )
    unanswered = isinstance(trade, Trade) and trade.chosen is None
    named = "The architecture that is picked at first" if unanswered else "The chosen architecture"
    spoken = f"{named}, {len(layers)} layers; a table follows"
    rows = tuple(
        (str(layer), *(cell for block in of.blocks for cell in (block.name, f"{block.share:.0%}")))
        for layer, of in enumerate(layers)
    )
    listed = Table(("layer", "attention", "of the teacher’s", "FFN", "of the teacher’s"), rows, named)
    return captioned(told, strip(layers, sizes_of(layers, trade), spoken, "strip"), fits=False) + folded(
        "The layers as a table", table(listed)
    )


def _maps(found: Search) -> str:
    trade = found.trade
    cost, unit = (front.cost_label(trade), trade.cost_unit) if isinstance(trade, Trade) else ("what it adds", "")
    quality = objective_unit(trade.objective_name) if isinstance(trade, Trade) else "nats"
    told = "<p>One column a layer, one row a variant. Orange: what was chosen. Grey: not on offer.</p>"
    drawn = []
    score = f"Score: {quality} lost with this variant alone"
    choice = "Choice: share of the points above"
    for place, one in enumerate(found.maps):
        kinds = [
            ("score", score, one.scores, quality, True),
            ("cost", f"Cost: {cost}", one.costs, unit, False),
            ("choice", choice, one.taken, "of the points", False),
        ]
        part = "FFN" if one.part == "ffn" else one.part.capitalize()
        drawn.append(f'<h3>{escaped(part)}</h3><div class="maps">')
        for kind, title, rows, of, logarithmic in kinds:
            if rows:
                name = f"{kind}-{place}"
                chart = charts.heat_map(name, one, rows, of, logarithmic)
                drawn.append(captioned(escaped(title), chart, folded("Numbers", _cells(name, one, rows)), fits=False))
        drawn.append("</div>")
    return told + "".join(drawn)


def _cells(name: str, found: HeatMap, rows: Sequence[Sequence[float | None]]) -> str:
    """Of one heat map; page.js reads what it tells from here."""
    head = "".join(f"<th>{layer}</th>" for layer in range(len(found.chosen)))
    lines = []
    for place, (variant, values) in enumerate(zip(found.variants, rows, strict=True)):
        kinds = (" class=marked" if row == place else "" for row in found.chosen)
        cells = (
            f"<td{kind}>{'' if value is None else f'{value:.3g}'}</td>"
            for kind, value in zip(kinds, values, strict=True)
        )
        lines.append(f"<tr><th scope=row>{escaped(variant)}</th>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll"><table class="wide" id="{name}"><thead><tr><th>layer</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _times(summary: Summary) -> str:
    if not (chart := charts.times(summary)):
        none = "No workload of the constraint file is for the device that evaluated the models."
        alone = "Nothing was predicted that could be compared; what was measured stands in the table above."
        return f'<p class="absent">{alone if summary.speed else none}</p>'
    told = (
        "What was predicted, and the sum of the measured parts, over what the whole model was measured at: 1 came "
        "true. The measured value stands beside each name."
    )
    marks = [('<circle cx="7" cy="7" r="5" class="dot first"/>', "predicted" if summary.solution else "estimated")]
    if any(of[model]["parts"] for of in summary.speed.values() for model in of):
        marks.append((diamond(7, 7, 6, "dot second"), "sum of parts, measured in the same rounds"))
    return captioned(told, chart, legend(marks))


def _distillation(contents: Contents) -> str:
    local = (
        "" if contents.trained is None else "<h3>Each variant by itself (BLD)</h3>" + _part(contents.trained, _losses)
    )
    return f"{local}<h3>The whole student (GKD)</h3>{_part(contents.steps, _curve)}"


def _losses(trained: Sequence[Trained]) -> str:
    if not trained:
        return "<p>No variant on offer has weights to train.</p>"
    told = (
        "How much of the teacher’s output a variant misses on held-out tokens, before and after it was trained alone: "
        "means over layers, and grey from the best layer to the worst."
    )
    marks = [
        ('<circle cx="7" cy="7" r="5" class="dot start"/>', "starting point"),
        ('<circle cx="7" cy="7" r="5" class="dot first"/>', "trained, attention"),
        ('<circle cx="7" cy="7" r="5" class="dot ffn-dot"/>', "trained, FFN or layer"),
    ]
    rows = tuple(
        (
            f"{one.part}, {one.variant}",
            str(one.num_layers),
            *(figure(value) for value in (one.start, one.end, one.least, one.most)),
        )
        for one in trained
    )
    listed = Table(("variant", "layers", "before", "after", "best layer", "worst layer"), rows)
    return captioned(told, charts.losses(trained), legend(marks) + folded("The losses as a table", table(listed)))


def _curve(steps: Sequence[Mapping[str, Any]]) -> str:
    told = "Each step (thin) and smoothed (thick), on the tokens that the student was just training on."
    return captioned(told, charts.curve(steps))


def _baselines(comparison: Comparison) -> str:
    found = [one for one in comparison.found if one.objective is not None or one.measured]
    evaluated = any(one.measured for one in found)
    told = "What others would have chosen under the same limits" + (
        ": as the scores predict it, and as it truly is on the report split, before global distillation."
        if evaluated
        else ", as the scores predict it. <code>puzzle compare RUN --true</code> evaluates each."
    )
    metrics = list(dict.fromkeys(name for one in found for name in one.totals))
    rows = tuple(
        (
            one.name, _number(one.objective), *([_true(one.measured)] if evaluated else []),
            *(_number(one.totals.get(name)) for name in metrics),
        )
        for one in found
    )  # fmt: skip
    head = ("", f"{comparison.objective}, predicted", *(["true"] if evaluated else []), *metrics)
    marks = [('<circle cx="7" cy="7" r="5" class="dot first"/>', "predicted")]
    marks += [(diamond(7, 7, 6, "dot second"), "true, ± standard error")] if evaluated else []
    figure = captioned(told, charts.baselines(found, comparison.objective), legend(marks)) if found else ""
    notes = [f"{one.name}: {one.note}" for one in comparison.found if one.note]
    return figure + table(Table(head, rows, "", 0)) + bullets(notes)


def _true(values: Sequence[float] | None) -> str:
    if not values:
        return "" if values is None else "not finite"
    mean, error = mean_and_error(values)
    return f"{mean:.4f}" + (f" ± {error:.4f}" if math.isfinite(error) else "")


def _recipe(recipe: Recipe) -> str:
    files = "".join(folded_text(name, text) for name, text in recipe.files)
    versions = ", ".join(f"{name} {text}" for name, text in recipe.versions)
    constraints = f" --constraints {recipe.constraints}" if recipe.constraints else ""
    seconds = Table(("stage", "seconds"), tuple((stage, f"{value:,.1f}") for stage, value in recipe.seconds))
    taken = folded("How long it took", table(seconds)) if recipe.seconds else ""
    commands = "\n".join(f"puzzle {command} config.yaml{constraints}" for command in ("run", "report"))
    return (
        f"<p>Save the files below, then:</p><pre>{escaped(commands)}</pre>{files}{taken}"
        f'<p class="note">{escaped(versions)}</p>'
    )
