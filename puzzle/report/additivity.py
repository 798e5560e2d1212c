"""How far sums of scores are from the truth, and the best model of the difference: a table, a picture, a model.

Reads the scores and the architectures that were evaluated truly on the same sequences; writes ``additivity/model.json``
(an :class:`~puzzle.scoring.interactions.InteractionModel`) and ``additivity/additivity.png``.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puzzle import artifacts, plans, style
from puzzle.run import Run
from puzzle.scoring.design import singles
from puzzle.scoring.interactions import KINDS, Evaluation, Fit, best_of, cross_validated, spearman
from puzzle.tables import read_truth
from puzzle.types import to_json

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped,unused-ignore]

COLUMNS = ("architecture", "kind", "size", "num_changes", "sum_nats", "true_nats", "standard_error")
LEAST = 20  # architectures that a model is fitted to


def evaluations(run: Run) -> dict[str, Evaluation]:
    """The truly evaluated architectures, by their names; without those whose outputs are not finite."""
    units = {name: plans.truth_of(run, one.items, "score") for name, one in run.draws.items()}
    found = {name: (unit.changes, read_truth(unit.path).get("kl")) for name, unit in units.items()}
    return {name: Evaluation.of((item.id for item in of), kl) for name, (of, kl) in found.items() if kl is not None}


def frame(run: Run) -> pd.DataFrame:
    """One row per architecture: the sum of its scores, and its true KL on the same sequences."""
    import pandas as pd

    scores = run.first_scores()
    rows = [
        {
            "architecture": name,
            "kind": run.draws[name].kind,
            "size": run.draws[name].size,
            "num_changes": len(one.items),
            "sum_nats": math.fsum(scores[item_id] for item_id in one.items),
            "true_nats": one.kl_nats,
            "standard_error": one.standard_error,
        }
        for name, one in evaluations(run).items()
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def fits(run: Run) -> list[Fit]:
    """Every kind of model, cross-validated on the same folds; none where too few architectures were evaluated."""
    known = [one for one in evaluations(run).values() if len(one.items) > 1]
    if len(known) < LEAST:
        return []
    parts = singles(run.items, run.first_scores())
    return [cross_validated(kind, known, parts) for kind in KINDS]


def report(run: Run) -> str:
    """The tables as text; writes the model and the picture."""
    table, found = frame(run), fits(run)
    lines = [f"{'architectures':<22}{'number':>8}{'true / sum':>12}{'spread':>9}{'Spearman':>10}"]
    for (kind, size), rows in [*table.groupby(["kind", "size"], sort=False), (("all", ""), table)]:
        log_ratio = [math.log(true / total) for true, total in zip(rows.true_nats, rows.sum_nats, strict=True)]
        ratio, spread = math.exp(statistics.fmean(log_ratio)), statistics.pstdev(log_ratio)
        rank = spearman(rows.sum_nats.to_numpy(), rows.true_nats.to_numpy())
        lines.append(f"{kind + ' ' + size:<22}{len(rows):>8}{ratio:>12.3f}{spread:>9.1%}{rank:>10.4f}")
    lines.append("")
    lines += _models(found, run.additivity / "model.json") if found else [f"too few to fit a model; it takes {LEAST}"]
    picture = run.additivity / "additivity.png"
    draw(table, found, picture)
    return "\n".join([*lines, str(picture)])


def _models(found: Sequence[Fit], path: Path) -> list[str]:
    best = best_of(found)
    artifacts.write_text(path, json.dumps(to_json(best.model), indent=1) + "\n")
    lines = [f"{'model, held out':<24}{'spread':>9}{'bias':>8}{'Spearman':>10}{'within 2 se':>13}"]
    for fit in found:
        mark = "  <- best" if fit is best else ""
        cells = f"{fit.spread:>9.1%}{fit.bias:>8.3f}{fit.spearman:>10.4f}{fit.coverage:>13.0%}"
        lines.append(f"{fit.model.kind:<24}{cells}{mark}")
    return [*lines, str(path)]


def draw(table: pd.DataFrame, found: Sequence[Fit], path: Path) -> None:
    """Predicted against true, both logarithmic: the plain sum and, held out, the best model."""
    figure = style.new_figure(6, 5.5)
    axes: Any = figure.subplots()
    axes.scatter(table.true_nats, table.sum_nats, s=16, color=style.FFN, label="sum of scores")
    if found:
        best = best_of(found)
        true = [one.kl_nats for one in best.model.evaluations]
        held_out = [value * math.exp(error) for value, error in zip(true, best.log_errors, strict=True)]
        axes.scatter(true, held_out, s=16, color=style.ATTENTION, label=f"{best.model.kind}, held out")
    ends = [table.true_nats.min(), table.true_nats.max()]
    axes.plot(ends, ends, color=style.TEACHER, linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("true KL of the architecture, nats per token")
    axes.set_ylabel("predicted KL, nats per token")
    axes.set_title("When sums lie")
    axes.legend()
    path.parent.mkdir(exist_ok=True)
    style.save(figure, path)
