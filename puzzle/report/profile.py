"""Where a teacher's time goes, and what whole models say of predicted times: tables and a picture.

Reads the run's costs, wherever they come from, and what is in ``whole-models/`` (profiling/source.py). ``attention``
and ``ffn`` are the teacher's sites without their norms; ``norm`` is all norms, ``head`` the head on one token per
sequence, ``other`` what is left: embedding, rotary tables, masks and, where there are no CUDA graphs, the calls
themselves. Where norms and head were not timed apart, they are in the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puzzle import style
from puzzle.profiling.correction import Fit
from puzzle.profiling.table import REST
from puzzle.run import Run
from puzzle.types import MissingMeasurementError, ModelShape, Spec
from puzzle.variants import shape_id

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped,unused-ignore]

PARTS = ("attention", "ffn", "norm", "head", "other")
COLOURS = (style.ATTENTION, style.FFN, style.NORM, style.HEAD, style.OTHER)


def profile_frame(run: Run) -> pd.DataFrame:
    """The teacher's milliseconds per forward by part, one row per device and point. Points with gaps are left out."""
    import pandas as pd

    ms: dict[tuple[str, str, str, int, int], dict[str, float]] = {}
    for cost in (*run.read_costs().rows, *run.cost_source.published("details")):
        at = (cost.device, cost.weights, cost.phase, cost.batch_size, cost.context_tokens)
        ms.setdefault(at, {})[cost.shape_id] = cost.ms
    parts = {at: _parts(of, run.shape, run.keep_specs) for at, of in ms.items()}
    columns = ("device", "weights", "phase", "batch_size", "context_tokens")
    rows = [dict(zip(columns, at, strict=True)) | of for at, of in parts.items() if of is not None]
    if not rows:
        raise MissingMeasurementError(f"{run.folder}: nothing was measured there; run `puzzle profile RUN`")
    return pd.DataFrame(rows).sort_values(list(columns), ascending=[True, True, False, True, True])


def _parts(ms: Mapping[str, float], shape: ModelShape, keep: tuple[Spec, ...]) -> dict[str, float] | None:
    """Of one point; None where some shape of the teacher was not measured."""
    ids = [shape_id(spec, shape) for spec in keep]
    if not {*ids, REST} <= ms.keys():
        return None
    norm, head = ms.get("norm", 0.0), ms.get("head", 0.0)
    norms_at_site = 2 if shape.post_norms else 1
    sums = {
        part: math.fsum(ms[name] - norms_at_site * norm for name in ids if name.startswith(part))
        for part in ("attention", "ffn")
    }
    norms = (norms_at_site * len(ids) + 1) * norm
    total = math.fsum(ms[name] for name in (*ids, REST))
    return {
        **sums,
        "norm": norms,
        "head": head,
        "other": total - math.fsum(sums.values()) - norms - head,
        "total": total,
    }


def draw_profile(frame: pd.DataFrame, path: Path) -> None:
    """One bar per point, its parts as shares of the whole, the whole in milliseconds beside it."""
    figure = style.new_figure(9, 1.5 + 0.3 * len(frame))
    axes: Any = figure.subplots()
    labels = [f"{row.phase}, batch {row.batch_size}, {row.context_tokens} tokens" for row in frame.itertuples()]
    left = [0.0] * len(frame)
    for part, colour in zip(PARTS, COLOURS, strict=True):
        shares = [max(0.0, share) for share in frame[part] / frame.total]
        axes.barh(labels, shares, left=left, color=colour, label=part)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    for row, (end, total) in enumerate(zip(left, frame.total, strict=True)):
        axes.text(end + 0.01, row, f"{total:.3g} ms", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15)
    axes.set_xlabel("share of the teacher's time in one forward")
    figure.legend(ncols=len(PARTS), loc="outside upper center", fontsize=8)
    style.save(figure, path)


def fits_text(fits: tuple[Fit, ...]) -> str:
    """What was fitted in each phase, and the relative errors before and after, each model left out of its fit."""
    lines = ["relative error of predicted times, each model predicted from the others:"]
    for fit in fits:
        correction = fit.correction
        lines.append(
            f"  {correction.phase:<8} sum of parts: {_errors(fit.before)}   corrected: {_errors(fit.after)}   "
            f"overhead {correction.overhead_ms:+.3g} ms, attention x {correction.attention_factor:.3f}, "
            f"FFN x {correction.ffn_factor:.3f}"
        )
    return "\n".join(lines)


def _errors(errors: tuple[float, ...]) -> str:
    sizes = [abs(error) for error in errors]
    return f"mean {math.fsum(sizes) / len(sizes):.1%}, worst {max(sizes):.1%}"
