"""Several processes on one run, as `torchrun` and `accelerate launch` start them: who does what, and who is missing.

Reads RANK, WORLD_SIZE, LOCAL_WORLD_SIZE and LOCAL_RANK. Work is shared out in pieces that do not depend on one another,
so what a piece comes to does not depend on how many ranks there are; where pieces run out, several ranks share the
batches of one. Rank 0 alone holds the run's lock, writes events and prints. While it works, each rank keeps a note of
what it is at in ``ranks/N.json``: a note left behind names a rank that died.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from puzzle import artifacts
from puzzle.types import PuzzleError

LAUNCHED = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}  # what the launcher sets, and one process alone
PATIENCE = datetime.timedelta(days=30)  # the others wait while rank 0 does what is not shared


@dataclass(frozen=True)
class Ranks:
    """This process's place among ``count``, of which ``count_here`` share this machine."""

    rank: int = 0
    count: int = 1
    count_here: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """As the launcher says; one process alone where there is none."""
        return cls(*(int(os.environ.get(name, default)) for name, default in LAUNCHED.items()))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def join(self) -> None:
        """Connects the processes, once, until this one ends; does nothing for one alone.

        Not anew for each run of a command: a launcher's store would still hold the addresses of the time before.
        """
        if self.count == 1:
            return
        import torch
        import torch.distributed as dist

        if dist.is_initialized():
            return
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=PATIENCE)
        atexit.register(dist.destroy_process_group)

    def wait(self, folder: Path, what: str) -> None:
        """Until all are here. PuzzleError naming who is not, if one has died."""
        if self.count == 1:
            return
        import torch.distributed as dist

        with self.naming_the_dead(folder, what):
            dist.barrier()

    def agreed(self, folder: Path, what: str, marks: Sequence[bool]) -> list[bool]:
        """Those of rank 0, on every rank; ``marks`` has one length on all. PuzzleError as in :meth:`wait`."""
        if self.count == 1:
            return list(marks)
        import torch
        import torch.distributed as dist

        told = torch.tensor(marks, dtype=torch.uint8)
        with self.naming_the_dead(folder, what):
            dist.broadcast(told, 0)
        return [bool(mark) for mark in told.tolist()]

    @contextlib.contextmanager
    def work_of_first(self, folder: Path, what: str) -> Iterator[None]:
        """A block in which rank 0 alone works, while the others wait for its end: what it raises there, all raise, so
        that they stay in step. PuzzleError as in :meth:`wait`."""
        told: list[PuzzleError | None] = [None]
        try:
            yield
        except PuzzleError as error:
            told = [error]
        if self.count > 1:
            import torch
            import torch.distributed as dist

            with self.naming_the_dead(folder, what):
                dist.broadcast_object_list(told, 0, device=torch.device("cpu"))
        if told[0] is not None:
            raise told[0]

    @contextlib.contextmanager
    def naming_the_dead(self, folder: Path, what: str, only_known: bool = False) -> Iterator[None]:
        """PuzzleError for a RuntimeError in the block; with ``only_known``, where some rank is known to have died."""
        try:
            yield
        except RuntimeError:
            dead = ", ".join(str(note) for note in notes(folder) if note.died) if self.count > 1 else ""
            if only_known and not dead:
                raise
            artifacts.remove(note_path(folder, self.rank))  # this rank lives: the next start must not name it
            dead = dead or "another rank"
            raise PuzzleError(f"rank {self.rank}: {dead} died; {what} goes on where it was at the next start") from None


@dataclass(frozen=True)
class Note:
    """What a rank is at."""

    rank: int
    host: str
    pid: int
    stage: str
    units: int

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host}, {self.stage}, {self.units} units)"

    @property
    def died(self) -> bool:
        """Whether its process is gone; of another machine's that is not known here."""
        if self.host != socket.gethostname():
            return False
        try:
            return bool(psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE)  # the launcher has yet to notice
        except psutil.NoSuchProcess:
            return True


@contextlib.contextmanager
def noted(folder: Path, ranks: Ranks, stage: str, units: int) -> Iterator[None]:
    """Leaves a note while the block runs; it stays behind where the process dies or the block raises."""
    path = note_path(folder, ranks.rank)
    note = Note(ranks.rank, socket.gethostname(), os.getpid(), stage, units)
    artifacts.write_text(path, json.dumps(vars(note)) + "\n")
    yield
    artifacts.remove(path)


def note_path(folder: Path, rank: int) -> Path:
    return folder / "ranks" / f"{rank}.json"


def notes(folder: Path) -> list[Note]:
    """Of ranks at work, or dead."""
    found = []
    for path in sorted((folder / "ranks").glob("*.json")):
        with contextlib.suppress(PuzzleError, TypeError):
            found.append(Note(**artifacts.read_json(path)))
    return found


@dataclass(frozen=True)
class Share:
    """``pieces`` that this rank works at, with the other ranks of ``team`` (itself included) on parts of each batch."""

    pieces: tuple[str, ...]
    team: tuple[int, ...]


def shares(costs: Mapping[str, float], count: int, most_in_team: int) -> tuple[Share, ...]:
    """One share per rank: consecutive pieces of about equal cost; of more ranks than pieces, teams. Deterministic.

    A team has at most ``most_in_team`` ranks; who is left over has nothing to do.
    """
    names = list(costs)
    if not names:
        return tuple(Share((), (rank,)) for rank in range(count))
    if len(names) < count:
        size = min(count // len(names), most_in_team)
        teams = [tuple(range(place * size, (place + 1) * size)) for place in range(len(names))]
        of_rank = {rank: Share((name,), team) for name, team in zip(names, teams, strict=True) for rank in team}
        return tuple(of_rank.get(rank, Share((), (rank,))) for rank in range(count))
    return tuple(Share(tuple(part), (rank,)) for rank, part in enumerate(_parts(names, costs, count)))


def _parts(names: Sequence[str], costs: Mapping[str, float], count: int) -> list[list[str]]:
    """``count`` non-empty runs of ``names``; each ends where its cost is nearest to an equal share of the rest."""
    parts: list[list[str]] = []
    place = 0
    for left in range(count, 0, -1):
        most = len(names) - (left - 1) - place  # the others need one each
        aim = sum(costs[name] for name in names[place:]) / left
        taken, size = 0.0, 0
        while size < most:
            cost = costs[names[place + size]]
            if size > 0 and left > 1 and abs(taken + cost - aim) > abs(taken - aim):
                break
            taken, size = taken + cost, size + 1
        parts.append(list(names[place : place + size]))
        place += size
    return parts


def rows_of(batch_size: int, team: Sequence[int], rank: int) -> slice:
    """The rows of a batch that ``rank`` takes in its team; as equal as can be."""
    place, size = list(team).index(rank), len(team)
    return slice(batch_size * place // size, batch_size * (place + 1) // size)


AddUp = Callable[[list[Any]], None]  # sums tensors in place over the ranks that share the work


def alone(tensors: list[Any]) -> None:
    """The sum over one rank."""


def team_sum(team: Sequence[int]) -> AddUp:
    """A function that sums lists of tensors in place over the team; to be made by all ranks in the same order."""
    import torch.distributed as dist

    group = dist.new_group(list(team))

    def add_up(tensors: list[Any]) -> None:
        for tensor in tensors:
            dist.all_reduce(tensor, group=group)

    return add_up
