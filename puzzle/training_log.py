"""What a training says at every step: JSON lines, and the user's trackers beside them. Pure, so reports can read it.

Writes ``kd_log.jsonl``, one line a step: ``step, tokens`` (seen so far), ``loss``, its parts without their weights
(``kl, lm, cosine, mse``), ``balance, learning_rate, gradient_norm, tokens_per_s``. A training that is continued first cuts off
what came after the checkpoint it continues from.
"""  # noqa: E501

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from puzzle import artifacts
from puzzle.types import ConfigError

NAME = "kd_log.jsonl"

Log = Callable[[int, Mapping[str, float]], None]  # of a step: its figures by name


def read_log(path: Path) -> list[dict[str, Any]]:
    """The steps so far, in order; none where there is no log."""
    return artifacts.read_events(path)


def check_trackers(names: Sequence[str]) -> None:
    """ConfigError naming the first that is not installed."""
    for name in names:
        if not _installed(name):
            raise ConfigError(f"kd.report_to: {name} is not installed; pip install {name}, or leave it out")


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


@contextlib.contextmanager
def opened(folder: Path, step: int, trackers: Sequence[str] | None) -> Iterator[Log]:
    """Logs the steps after ``step`` of what is trained in ``folder``; ``trackers`` None: TensorBoard if it is there."""
    names = trackers if trackers is not None else [name for name in ("tensorboard",) if _installed(name)]
    check_trackers(names)
    path = folder / NAME
    known = read_log(path)
    kept = [line for line in known if line["step"] <= step]
    if len(kept) < len(known):
        artifacts.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(TRACKERS[name](folder, step)) for name in names]

        def log(step: int, figures: Mapping[str, float]) -> None:
            artifacts.append_event(path, {"step": step, **figures})
            for tell in logs:
                tell(step, figures)

        yield log


@contextlib.contextmanager
def _tensorboard(folder: Path, step: int) -> Iterator[Log]:
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            writer.add_scalar(f"kd/{name}", value, step)

    try:
        yield log
    finally:
        writer.close()


def _online(package: str) -> Callable[[Path, int], contextlib.AbstractContextManager[Log]]:
    """W&B, and trackio, which has its interface. A training that goes on is a further run of the same group."""

    @contextlib.contextmanager
    def open_it(folder: Path, step: int) -> Iterator[Log]:
        module: Any = importlib.import_module(package)
        module.init(project="puzzle", group=folder.name, name=f"{folder.name}-{step}")
        try:
            yield lambda step, figures: module.log(dict(figures), step=step)
        finally:
            module.finish()

    return open_it


TRACKERS: dict[str, Callable[[Path, int], contextlib.AbstractContextManager[Log]]] = {
    "tensorboard": _tensorboard,
    "wandb": _online("wandb"),
    "trackio": _online("trackio"),
}
