"""A tournament: all candidates go a little way, half of them go on twice as far, until one is left.

Reads a function that says how good some of the candidates are after so many steps; computes who is left out when. Each
time, Optuna's SuccessiveHalvingPruner decides (Jamieson and Talwalkar, 1502.07943). It is made for trials that arrive
one by one, and lets the first ones pass whatever they are worth; so it is asked about the worst first, and lets nobody
pass before half of them have been asked about.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from puzzle.types import ConfigError

HALVING = 2  # one in so many goes on
Losses = Callable[[Sequence[int], int], Sequence[float]]  # of candidates by their numbers, after so many steps


@dataclass(frozen=True)
class Rung:
    """A comparison after ``steps``: ``losses`` of the ``candidates`` that got there, and those that go on."""

    steps: int
    candidates: tuple[int, ...]
    losses: tuple[float, ...]
    on: tuple[int, ...]

    @property
    def ranking(self) -> tuple[int, ...]:
        """The candidates, best first; of equals the first."""
        return tuple(one for _, one in sorted(zip(self.losses, self.candidates, strict=True)))


def num_rungs(candidates: int) -> int:
    """How many comparisons leave one."""
    return max(0, candidates.bit_length() - 1)


def num_distilled(candidates: int) -> int:
    """How often the steps to the first comparison are taken in all; twice as many lead to each later one."""
    far = [0, *(HALVING**rung for rung in range(num_rungs(candidates)))]
    return sum(candidates // HALVING**rung * (far[rung + 1] - far[rung]) for rung in range(num_rungs(candidates)))


def halving(candidates: int, first_steps: int, losses: Losses) -> tuple[Rung, ...]:
    """The comparisons, the last of which leaves one; none where there is one candidate to begin with.

    What ``losses`` says follows from candidates and steps, so a tournament that was stopped ends as it would have.
    ConfigError where no candidate has a finite loss.
    """
    import optuna  # takes a second

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="minimize")
    trials = [study.ask() for _ in range(candidates)]
    rungs: list[Rung] = []
    going, steps = tuple(range(candidates)), first_steps
    while len(going) > 1:
        found = [loss if math.isfinite(loss) else math.inf for loss in losses(going, steps)]
        if min(found) == math.inf:
            raise ConfigError(f"no candidate's loss is finite after {steps} steps; lower kd.learning_rate")
        rung = Rung(steps, going, tuple(found), ())
        left_out = len(going) - len(going) // HALVING
        study.pruner = optuna.pruners.SuccessiveHalvingPruner(first_steps, HALVING, bootstrap_count=left_out)
        on = []
        for one in reversed(rung.ranking):
            trials[one].report(found[going.index(one)], steps)
            if trials[one].should_prune():
                study.tell(trials[one], state=optuna.trial.TrialState.PRUNED)
            else:
                on.append(one)
        going, steps = tuple(sorted(on)), steps * HALVING
        rungs.append(Rung(rung.steps, rung.candidates, rung.losses, going))
    return tuple(rungs)
