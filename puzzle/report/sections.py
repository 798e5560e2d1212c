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
from puzzle.report.searched import Absent, HeatMap, Point, Reached, Search, Trade
from puzzle.report.summary import MODELS, Design, Summary
from puzzle.report.svg import diamond, escaped, figure, star
from puzzle.report.table import Table
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
        ("what-fits", "What fits", _part(trade, _front)),
        ("layers", "Layers", _part(drawn(contents), lambda found: _strip(found, trade))),
        ("choices", "What every layer had to choose from", _part(searched, _maps)),
        ("times", "Times", _part(contents.summary, _times)),
        ("distillation", "Distillation", _distillation(contents)),
        ("baselines", "Simpler ways to choose", _part(contents.compared, _baselines)),
        ("tournament", "Tournament", "" if contents.standings is None else _table(contents.standings)),
        ("checkpoints", "Checkpoints", _list(contents.exports)),
        ("reproduce", "Do it again", _recipe(contents.recipe)),
    ]


def drawn(contents: Contents) -> Design | Absent:
    """The chosen architecture; where nothing was chosen, the point of the front that is picked at first."""
    trade = contents.search.trade if isinstance(contents.search, Search) else None
    if isinstance(contents.design, Absent) and isinstance(trade, Trade):
        return front.design_of(front.start_of(trade), trade)
    return contents.design


def _part(found: Found | Absent | None, told: Callable[[Found], str]) -> str:
    if found is None:
        return ""
    return f'<p class="absent">{_commands(found.reason)}</p>' if isinstance(found, Absent) else told(found)


def _commands(text: str) -> str:
    """Escaped; what stands in back quotes as code."""
    pieces = escaped(text).split("`")
    return "".join(f"<code>{piece}</code>" if place % 2 else piece for place, piece in enumerate(pieces))


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
    table = Table(("", *MODELS), tuple(summary.rows()))
    return (
        f'<dl class="keys">{"".join(_key(*one) for one in _keys(summary))}</dl>{_table(table)}'
        f'<p class="note">{escaped(summary.notes)}</p><ul class="note">{meaning}</ul>'
        + _hidden("Quality by how many tokens a prediction has in sight", _table(summary.by_position()))
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
        (one.written, one.unit, _number(one.teacher), _number(one.chosen), _slack(one)) for one in found.reached
    )
    told = "What the search was asked to keep to, and what its answer comes to, as predicted."
    return f"<p>{told}</p>{_table(Table(('limit', 'unit', 'teacher', 'chosen', 'room left'), rows))}"


def _slack(one: Reached) -> str:
    """How far the chosen architecture is from the bound, in its unit and of it."""
    if one.chosen is None:
        return ""
    room = min(
        abs(bound - one.chosen) * (1 if inside else -1)
        for bound, inside in (
            (one.lower, one.lower is None or one.chosen >= one.lower),
            (one.upper, one.upper is None or one.chosen <= one.upper),
        )
        if bound is not None
    )
    bound = one.upper if one.upper is not None else one.lower
    return figure(room) + (f" ({room / abs(bound):.1%})" if bound else "")


def _number(value: float | None) -> str:
    return "" if value is None else figure(value)


def _front_words(trade: Trade) -> str:
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


def _front(trade: Trade) -> str:
    points = front.in_order(trade)
    start = front.start_of(trade)
    totals = "".join(
        f"<div><dt>{escaped(name)}</dt><dd>{escaped(amount(value, unit))}</dd></div>"
        for (name, unit), value in zip(trade.told, start.totals, strict=True)
    )
    rows = tuple(
        (
            ("chosen: " if point is trade.chosen else "") + figure(point.cost), figure(point.objective),
            *(figure(value) for value in point.totals), ", ".join(point.broken) or "all",
        )
        for point in points
    )  # fmt: skip
    head = (
        front.cost_label(trade),
        trade.objective_name,
        *(name for name, _ in trade.told),
        "limits kept",
    )
    marked = points.index(trade.chosen) if trade.chosen is not None else None
    said = ("Chosen: " if trade.chosen is not None else "") + front.said(start, trade)
    return f"""\
{_figure(escaped(_front_words(trade)), front.front(trade), _front_key(trade))}
<div class="selected"><output aria-live="polite">{escaped(said)}</output><dl>{totals}</dl>
<p class="get">To have it searched for: <code>{escaped(to_get(start, trade))}</code></p>
<button type="button" disabled>Back to the chosen one</button></div>
{_hidden("The points as a table", _table(Table(head, rows, "", marked)))}"""


def amount(value: float, unit: str) -> str:
    """A count says by its name what is counted."""
    return figure(value) if unit == "parameters" else f"{figure(value)} {unit}"


def to_get(point: Point, trade: Trade) -> str:
    """The line of a constraint file that a point of the front answers."""
    return f"constraints: {{{trade.cost_name}: {_at_least(point.cost)}}}"


def _at_least(value: float) -> str:
    """In seven digits, rounded up: a limit that the value itself keeps."""
    if value <= 0:
        return "0"
    unit = 10.0 ** (math.floor(math.log10(value)) - 6)
    return f"{math.ceil(value / unit) * unit:.7g}"


def _front_key(trade: Trade) -> str:
    marks = [
        ('<circle cx="7" cy="7" r="4" class="point"/>', "keeps every limit"),
        ('<circle cx="7" cy="7" r="4" class="point broken"/>', "breaks one"),
    ]
    if trade.chosen is not None:
        marks.append((diamond(7, 7, 6, "point chosen"), "chosen"))
    if trade.teacher_cost is not None:
        marks.append((star(7, 7, 7, "teacher-star"), "teacher"))
    return _key_of(marks)


def _key_of(marks: Sequence[tuple[str, str]]) -> str:
    lines = "".join(f'<li><svg viewBox="0 0 14 14" aria-hidden="true">{mark}</svg>{text}</li>' for mark, text in marks)
    return f'<ul class="key">{lines}</ul>'


def longest(design: Design, trade: Trade | Absent | None) -> int:
    """Letters of the longest variant that may have to be named."""
    known = [block.name for block in trade.blocks] if isinstance(trade, Trade) else []
    return max(map(len, [*known, *(name for names in design.names for name in names)]))


def _strip(design: Design, trade: Trade | Absent | None) -> str:
    picked = " It follows the point that is picked above." if isinstance(trade, Trade) else ""
    told = (
        "From the first layer to the last: attention above, FFN below, each as high as its share of the teacher’s "
        f"parameters; the grey behind is all of them.{picked}"
    )
    unanswered = isinstance(trade, Trade) and trade.chosen is None
    named = "The architecture that is picked at first" if unanswered else "The chosen architecture"
    spoken = f"{named}, {len(design.names)} layers; a table follows"
    rows = tuple(
        (str(layer), attention, f"{left:.0%}", ffn, f"{right:.0%}")
        for layer, ((attention, ffn), (left, right)) in enumerate(zip(design.names, design.shares, strict=True))
    )
    table = Table(("layer", "attention", "of the teacher’s", "FFN", "of the teacher’s"), rows, named)
    return _figure(told, front.strip(design, longest(design, trade), spoken), fits=False) + _hidden(
        "The layers as a table", _table(table)
    )


def _maps(found: Search) -> str:
    trade = found.trade
    cost, unit = (front.cost_label(trade), trade.cost_unit) if isinstance(trade, Trade) else ("what it adds", "")
    quality = front.quality_unit(trade) if isinstance(trade, Trade) else "nats"
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
                drawn.append(_figure(escaped(title), chart, _hidden("Numbers", _cells(name, one, rows)), fits=False))
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
    return _figure(told, chart, _key_of(marks))


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
    table = Table(("variant", "layers", "before", "after", "best layer", "worst layer"), rows)
    return _figure(told, charts.losses(trained), _key_of(marks) + _hidden("The losses as a table", _table(table)))


def _curve(steps: Sequence[Mapping[str, Any]]) -> str:
    told = "Each step (thin) and smoothed (thick), on the tokens that the student was just training on."
    return _figure(told, charts.curve(steps))


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
    figure = _figure(told, charts.baselines(found, comparison.objective), _key_of(marks)) if found else ""
    notes = [f"{one.name}: {one.note}" for one in comparison.found if one.note]
    return figure + _table(Table(head, rows, "", 0)) + _list(notes)


def _true(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean, error = mean_and_error(values)
    return f"{mean:.4f}" + (f" ± {error:.4f}" if math.isfinite(error) else "")


def _recipe(recipe: Recipe) -> str:
    files = "".join(_hidden(name, f"<pre>{escaped(text)}</pre>") for name, text in recipe.files)
    versions = ", ".join(f"{name} {text}" for name, text in recipe.versions)
    constraints = f" --constraints {recipe.constraints}" if recipe.constraints else ""
    seconds = Table(("stage", "seconds"), tuple((stage, f"{value:,.1f}") for stage, value in recipe.seconds))
    taken = _hidden("How long it took", _table(seconds)) if recipe.seconds else ""
    commands = "\n".join(f"puzzle {command} config.yaml{constraints}" for command in ("run", "report"))
    return (
        f"<p>Save the files below, then:</p><pre>{escaped(commands)}</pre>{files}{taken}"
        f'<p class="note">{escaped(versions)}</p>'
    )


# --- pieces -------------------------------------------------------------------------------------------------------


def _table(table: Table) -> str:
    caption = f"<caption>{escaped(table.caption)}</caption>" if table.caption else ""
    head = "".join(f'<th scope="col">{escaped(name)}</th>' for name in table.head)
    rows = []
    for place, (first, *others) in enumerate(table.rows):
        kind = ' class="marked"' if place == table.marked else ""
        cells = "".join(f"<td>{escaped(cell)}</td>" for cell in others)
        rows.append(f'<tr{kind}><th scope="row">{escaped(first)}</th>{cells}</tr>')
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll"><table>{caption}{body}</table></div>'


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escaped(one)}</li>' for one in lines)}</ul>" if lines else ""


def _figure(told: str, chart: str, below: str = "", fits: bool = True) -> str:
    """``told`` is markup; a chart that ``fits`` shrinks with the page, another is scrolled."""
    kind = ' class="fit"' if fits else ""
    return f'<figure{kind}><figcaption>{told}</figcaption><div class="scroll">{chart}</div>{below}</figure>'


def _hidden(title: str, text: str) -> str:
    return f"<details><summary>{escaped(title)}</summary>{text}</details>"
