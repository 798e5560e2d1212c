"""The library as a table and a heat map: what every variant at every site is worth, before and after BLD.

Reads the markers of the units in ``library/trained``; losses are those of loss.py on held-out tokens of ``train``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from puzzle import artifacts, style
from puzzle.checkpoint import check_safetensors
from puzzle.run import Run
from puzzle.types import MissingMeasurementError
from puzzle.variants import params, variant_name

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped,unused-ignore]

LOSSES = ("before", "after")  # of the payload
COLUMNS = ("site", "variant", "start", "loss_start", "loss_end", "tokens", "bytes", "failed")


def library_frame(run: Run) -> pd.DataFrame:
    """One row per variant that has weights of its own. MissingMeasurementError where nothing was trained yet.

    ``start``: which starting point was taken; ``tokens`` it was trained on; ``bytes`` of its tensors in the library (a
    nested FFN's count at its widest variant, and 0 at the others); ``failed``: why, or empty.
    """
    import pandas as pd

    rows = []
    for unit, items in run.units.items():
        if not run.trained(unit).exists():
            continue
        trained = artifacts.read_unit(run.trained(unit))
        before, after = (trained.read(dict[str, float], when) if when in trained.payload else {} for when in LOSSES)
        start = artifacts.read_unit(run.initial(unit)).payload.get("start", "") if run.initial(unit).exists() else ""
        widest = max(items, key=lambda item: sum(params(spec, run.shape) for spec in item.specs))
        for item in items:
            rows.append(
                {
                    "site": ".".join(item.id.split(".")[:-1]),
                    "variant": "+".join(map(variant_name, item.specs)),
                    "start": start,
                    "loss_start": before.get(item.id),
                    "loss_end": after.get(item.id),
                    "tokens": trained.read(int, "tokens"),
                    "bytes": _stored_bytes(run.trained(unit)) if item is widest else 0,
                    "failed": trained.payload.get("failed", ""),
                }
            )
    if not rows:
        raise MissingMeasurementError(f"{run.folder}: no library there; run `puzzle distill RUN`")
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _stored_bytes(folder: Path) -> int:
    """Of the tensors of one unit, without their names."""
    header = check_safetensors(folder / "weights.safetensors")
    return max(int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__")


def draw(frame: pd.DataFrame, path: Path) -> None:
    """A heat map of ``loss_end`` by site and variant, on a logarithmic scale; grey: not on offer, or failed."""
    import numpy as np
    from matplotlib.colors import LogNorm

    parts = [(part, frame[frame.site.str.endswith(part)]) for part in ("attention", "ffn")]
    panels = [(part, of) for part, of in parts if len(of)] or [("layer", frame)]
    known = frame.loss_end.dropna()
    known = known[known > 0]
    norm = LogNorm(known.min(), known.max()) if len(known) else None
    num_layers = max(of.site.nunique() for _, of in panels)
    num_columns = sum(of.variant.nunique() for _, of in panels)
    figure = style.new_figure(3 + 0.6 * num_columns, 2 + 0.28 * num_layers)
    ratios = [of.variant.nunique() for _, of in panels]
    all_axes: Any = figure.subplots(1, len(panels), squeeze=False, width_ratios=ratios)[0]
    for axes, (part, of) in zip(all_axes, panels, strict=True):
        table = of.pivot(index="site", columns="variant", values="loss_end")[list(dict.fromkeys(of.variant))]
        values = np.ma.masked_invalid(np.asarray(table, float))
        axes.set_facecolor(style.MISSING)
        image = axes.imshow(values, aspect="auto", norm=norm, cmap=style.SCALE)
        axes.set_xticks(range(len(table.columns)), list(table.columns), rotation=45, ha="right")
        axes.set_yticks(range(len(table)), [site.split(".")[0] for site in table.index])
        axes.set_title(part)
    figure.colorbar(image, ax=list(all_axes), label="local loss after BLD (share of the teacher's output)")
    style.save(figure, path)
