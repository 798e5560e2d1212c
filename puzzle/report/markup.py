"""Pieces of HTML that the page and notebooks are made of. Words cannot become markup; what is markup is called so."""

from __future__ import annotations

import html
from collections.abc import Sequence

from puzzle.report.table import Table


def escaped(words: object) -> str:
    """As text or the value of an attribute, whatever is in it."""
    return html.escape(str(words), quote=True)


def commands(words: str) -> str:
    """What stands in back quotes as code."""
    pieces = escaped(words).split("`")
    return "".join(f"<code>{piece}</code>" if place % 2 else piece for place, piece in enumerate(pieces))


def table(of: Table) -> str:
    """Scrolled where it is too wide; the first cell of a row is its name."""
    caption = f"<caption>{escaped(of.caption)}</caption>" if of.caption else ""
    head = "".join(f'<th scope="col">{escaped(name)}</th>' for name in of.head)
    rows = []
    for place, (first, *others) in enumerate(of.rows):
        kind = ' class="marked"' if place == of.marked else ""
        cells = "".join(f"<td>{escaped(cell)}</td>" for cell in others)
        rows.append(f'<tr{kind}><th scope="row">{escaped(first)}</th>{cells}</tr>')
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll"><table>{caption}{body}</table></div>'


def bullets(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escaped(one)}</li>' for one in lines)}</ul>" if lines else ""


def folded(title: str, markup: str) -> str:
    """Opens on a click."""
    return f"<details><summary>{escaped(title)}</summary>{markup}</details>"


def folded_text(title: str, text: str) -> str:
    """As it is written."""
    return folded(title, f"<pre>{escaped(text)}</pre>")


def captioned(markup: str, chart: str, below: str = "", fits: bool = True) -> str:
    """A chart below ``markup``; one that ``fits`` shrinks with the page, another is scrolled."""
    kind = ' class="fit"' if fits else ""
    return f'<figure{kind}><figcaption>{markup}</figcaption><div class="scroll">{chart}</div>{below}</figure>'


def legend(marks: Sequence[tuple[str, str]]) -> str:
    """Each mark, drawn in 14 pixels, and what it means."""
    lines = "".join(
        f'<li><svg viewBox="0 0 14 14" aria-hidden="true">{mark}</svg>{escaped(words)}</li>' for mark, words in marks
    )
    return f'<ul class="key">{lines}</ul>'
