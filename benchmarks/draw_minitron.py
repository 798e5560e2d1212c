"""Minitron against Puzzle, one table and one picture: at equal parameters, memory, and measured time.

Reads what ``bench_minitron.py shapes``, ``bench_minitron.py memory`` and ``bench_latency.py`` found; writes
``results/minitron.md`` and ``.png``.

    python benchmarks/draw_minitron.py [--results FOLDER]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puzzle import artifacts, style

RESULTS = Path(__file__).parent / "results"
PANELS = {"minitron_shapes": "as many parameters", "minitron_memory": "as much memory", "latency": "as fast, measured"}
COLOURS = {"Puzzle": style.CHOSEN, "depth": style.ATTENTION, "width": style.FFN}
WHEN = ("before", "after")
TICKS = (0.05, 0.2, 1, 5)


@dataclass(frozen=True)
class Row:
    """One way to make a student: its figures by seed."""

    name: str
    seeds: Sequence[Mapping[str, Any]]

    @property
    def params(self) -> float:
        return statistics.fmean(one["params"] for one in self.seeds)

    def values(self, when: str, key: str) -> Sequence[float]:
        return [one[when][key] for one in self.seeds]

    def mean(self, when: str, key: str) -> float:
        return statistics.fmean(self.values(when, key))

    def cell(self, when: str, key: str) -> str:
        values = self.values(when, key)
        return f"{self.mean(when, key):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def rows(file: Path) -> list[Row]:
    """The best after distillation first."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for key, figure in json.loads(file.read_text())["results"].items():
        if "after" in figure:
            found.setdefault(key.rpartition("/")[0], []).append(figure)
    return sorted((Row(*one) for one in found.items()), key=lambda row: row.mean("after", "kl"))


def table(title: str, found: Sequence[Row]) -> str:
    lines = [
        f"| {title} | parameters | KL before | KL after | CE gap after | seeds |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row.name} | {row.params / 1e6:.2f}M | {row.cell('before', 'kl')} | {row.cell('after', 'kl')} "
            f"| {row.cell('after', 'ce_gap')} | {len(row.seeds)} |"
            for row in found
        ),
    ]
    return "\n".join(lines)


def draw(panels: Mapping[str, Sequence[Row]], path: Path) -> None:
    """KL of every way before (hollow) and after distillation (filled), a dot a seed."""
    most = max(map(len, panels.values()))
    figure = style.new_figure(14, 1.3 + 0.34 * most)
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharex=True)[0]
    for axes, (title, found) in zip(all_axes, panels.items(), strict=True):
        for place, row in enumerate(reversed(found)):
            colour = next((one for word, one in COLOURS.items() if word in row.name), style.OTHER)
            axes.plot([row.mean(when, "kl") for when in WHEN], [place, place], color=colour, lw=1, alpha=0.4)
            for when, fill in zip(WHEN, ("none", colour), strict=True):
                values = row.values(when, "kl")
                axes.scatter(values, [place] * len(values), 26, facecolors=fill, edgecolors=colour, zorder=2)
        axes.set_yticks(range(len(found)), [row.name for row in reversed(found)])
        axes.set_ylim(len(found) - most - 0.5, len(found) - 0.5)  # rows as high in each panel
        axes.set_xscale("log")
        axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
        axes.set_xticks([], minor=True)
        axes.set_title(title, loc="left")
        axes.grid(axis="x", alpha=0.2)
    figure.supxlabel("KL to the teacher in nats, before (hollow) and after distillation", fontsize="medium")
    style.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    folder = parser.parse_args().results
    panels = {title: rows(folder / f"{name}.json") for name, title in PANELS.items()}
    text = "\n\n".join(table(title, found) for title, found in panels.items())
    artifacts.write_text(folder / "minitron.md", text + "\n")
    draw(panels, folder / "minitron.png")
    print(text)


if __name__ == "__main__":
    main()
