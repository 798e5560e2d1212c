"""The stage that evaluates whole architectures truly, on the sequences that their parts were scored on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from puzzle import artifacts
from puzzle.plans import Planned
from puzzle.progress import Progress
from puzzle.ranks import Ranks, shares
from puzzle.run import Run
from puzzle.scoring.exact import Change
from puzzle.stages.score import ScoreJob
from puzzle.variants import is_teacher


def make_additivity(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    """The true KL per sequence of the architectures that are missing, or of this rank's share of them."""
    wanted = {unit.path.stem: unit for unit in missing}
    by_id = {item.id: item for item in run.items}
    changes = [
        Change(name, tuple(by_id[item] for item in draw.items if not is_teacher(by_id[item])))
        for name, draw in run.draws.items()
        if name in wanted
    ]
    changes.sort(key=lambda change: (change.first_layer, change.name))
    ranks = Ranks.current()
    by_name = {change.name: change for change in changes}
    costs = {change.name: float(run.shape.num_layers - change.first_layer) for change in changes}
    pieces = shares(costs, ranks.count, 1)[ranks.rank].pieces
    own = [change for change in changes if change.name in pieces]
    with ScoreJob(run) as job:
        for _, group in itertools.groupby(own, lambda change: change.first_layer):
            for name, values in job.exact(list(group)):
                unit, change = wanted[name], by_name[name]
                finite = bool(torch.isfinite(values["kl"]).all())
                kl = values["kl"].tolist() if finite else None
                payload = {"items": [item.id for item in change.items], "kl": kl}
                artifacts.publish_json(unit.path, unit.inputs, payload)
                progress.done(name)
