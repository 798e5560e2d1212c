"""The report as one page of HTML that needs nothing beside it: no network, no font, no library.

Reads :class:`~puzzle.report.contents.Contents`; computes the text of the file: the sections (sections.py), page.css,
page.js and, as JSON, what that needs. A content security policy lets the page load nothing and run that script only.
"""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import resources

import puzzle.report.front as front
from puzzle import style
from puzzle.report.contents import Contents
from puzzle.report.markup import escaped
from puzzle.report.searched import Absent, Search, Trade
from puzzle.report.sections import drawn, sections_of, sizes_of, unfinished


def page(contents: Contents) -> str:
    """The whole file."""
    sections = [section for section in sections_of(contents) if section[2]]
    script, css = _file("page.js"), _styles()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"script-src 'sha256-{digest}'"
    )
    links = "".join(f'<a href="#{name}">{escaped(title)}</a> ' for name, title, _ in sections)
    body = "".join(
        f'<section id="{name}" aria-labelledby="{name}-h"><h2 id="{name}-h">{escaped(title)}</h2>{text}</section>'
        for name, title, text in sections
    )
    return f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escaped(contents.title)} – {escaped(contents.subtitle)}</title>
<style>{css}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the contents</a>
<header>
<h1>{escaped(contents.title)}</h1>
<p class="subtitle">{escaped(contents.subtitle)}</p>
<nav aria-label="Contents">{links}</nav>
{unfinished(contents.left)}
</header>
<main id="main">
{body}
</main>
<footer>Written by puzzle. This file is complete: it loads nothing.</footer>
<script type="application/json" id="data">{_data(contents)}</script>
<script>{script}</script>
</body>
</html>
"""


def _file(name: str) -> str:
    return resources.files("puzzle.report").joinpath(name).read_text(encoding="utf-8")


def _styles() -> str:
    light, dark = style.css()
    heat = "".join(f".heat-{step} {{ fill: var(--heat-{step}); }}" for step in range(len(style.SCALE_STEPS)))
    on_screen = f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"
    return f":root {{ {light} }}\n{on_screen}\n{heat}\n{_file('page.css')}"


def _data(contents: Contents) -> str:
    """What page.js draws from; nothing in it can end the element that it stands in."""
    searched = contents.search
    trade = searched.trade if isinstance(searched, Search) else None
    if not isinstance(trade, Trade):
        return "null"
    points = front.in_order(trade)
    layers = drawn(contents)
    assert not isinstance(layers, Absent)  # there is a front
    sizes = sizes_of(layers, trade)
    data = {
        "blocks": [[block.name, block.told, *sizes.bar(block)] for block in trade.blocks],
        "strip": {"top": sizes.top, "bottom": sizes.bottom},
        "chosen": points.index(trade.chosen) if trade.chosen is not None else None,
        "points": [
            {
                "blocks": point.blocks,
                "said": front.said(point, trade),
                "totals": front.amounts(point, trade),
                "get": front.to_get(point, trade),
            }
            for point in points
        ],
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
