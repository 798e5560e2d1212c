"""A table of words: for a terminal or a model card as Markdown; the page makes HTML of it (page.py). Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """``marked``: the row that the others are to be seen beside, by its place."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    marked: int | None = None

    def markdown(self) -> str:
        """Below its caption; the first cell of the marked row is bold."""
        lines = [self.caption, ""] if self.caption else []
        lines += [f"| {' | '.join(self.head)} |", "|---" * len(self.head) + "|"]
        for place, (first, *others) in enumerate(self.rows):
            name = f"**{first}**" if place == self.marked else first
            lines.append(f"| {' | '.join([name, *others])} |")
        return "\n".join(lines)
