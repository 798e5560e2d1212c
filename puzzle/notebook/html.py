"""Pieces of HTML that notebooks show: in the colours of the page, light or dark, and with every text escaped. Pure."""

from __future__ import annotations

from puzzle import style
from puzzle.report.markup import escaped

STYLE = f"""\
<style>
.puzzle, .puzzle .widget-html-content {{
  color: var(--jp-content-font-color1, var(--vscode-editor-foreground, inherit));
  font: 13px/1.5 var(--jp-content-font-family, system-ui, sans-serif); font-variant-numeric: tabular-nums }}
.puzzle table {{ border-collapse: collapse; margin: 4px 0 }}
.puzzle th, .puzzle td {{ padding: 2px 14px 2px 0; text-align: right; border: 0; background: none;
  white-space: nowrap }}
.puzzle th:first-child, .puzzle td:first-child {{ text-align: left }}
.puzzle thead th {{ font-weight: 600; border-bottom: 1px solid color-mix(in srgb, currentColor 30%, transparent) }}
.puzzle tbody th {{ font-weight: 400 }}
.puzzle .strong {{ font-size: 20px; font-weight: 600 }}
.puzzle .faint {{ opacity: .7 }}
.puzzle .note {{ border-left: 3px solid {style.CHOSEN}; padding: 4px 10px; margin: 4px 0; white-space: normal }}
.puzzle pre {{ color: inherit; background: color-mix(in srgb, currentColor 7%, transparent); padding: 8px 12px;
  margin: 4px 0; font: 12px/1.45 var(--jp-code-font-family, ui-monospace, monospace); overflow-x: auto }}
.puzzle summary {{ cursor: pointer }}
.puzzle .scroll {{ overflow-x: auto }}
.puzzle .chart {{ display: block; max-width: 100%; height: auto; font: 12px system-ui, sans-serif }}
.puzzle .chart text {{ fill: currentColor; opacity: .75 }}
.puzzle .outline {{ fill: currentColor; fill-opacity: .08 }}
.puzzle .site {{ fill: none; pointer-events: all }}
.puzzle .differs {{ stroke: {style.CHOSEN}; stroke-width: 1.6 }}
.puzzle .attention {{ fill: {style.ATTENTION} }}
.puzzle .ffn {{ fill: {style.FFN} }}
</style>"""


def page(*parts: str) -> str:
    """What a cell shows: the parts, one below the other, and how they look."""
    return f'{STYLE}<div class="puzzle">{"".join(parts)}</div>'


def paragraph(words: str, look: str = "") -> str:
    """``look``: strong, faint, or as the text around it."""
    return f'<div class="{look}">{escaped(words)}</div>'


def note(words: str) -> str:
    """What must not be overlooked."""
    return f'<div class="note" role="status">{escaped(words)}</div>'
