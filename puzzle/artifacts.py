"""What lies on disk: units that are whole or absent, fingerprints that say what they were made from, and events.

A unit is a folder with a marker ``unit.json`` or a single JSON file. Both carry ``inputs`` (named fingerprints of all
that went in) and ``content`` (a fingerprint of what came out, which downstream units name among their own inputs).
A unit is written aside, flushed to disk and renamed, so a crash at any moment leaves it whole or absent; what was
written aside is swept away the next time. Every disk operation that changes something goes through
:func:`_before`, where tests inject crashes and full disks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from puzzle.types import CorruptFileError, PuzzleError, StaleUnitError, from_json

SCHEMA_VERSION = 1
MARKER = "unit.json"
ASIDE = ".aside-"
CLOCK_TICK_SECONDS = 2  # the coarsest of file systems' clocks
Kind = TypeVar("Kind")


def _before(operation: str, path: Path) -> None:
    """Called before each operation that changes the disk: mkdir, write, flush, rename, remove, append."""


def fingerprint(value: Any) -> str:
    """16 hex digits of the SHA-256 of ``value`` as canonical JSON; equal values give equal fingerprints everywhere."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_fingerprint(path: Path) -> str:
    """16 hex digits of the SHA-256 of the file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


@contextlib.contextmanager
def remembered(path: Path) -> Iterator[dict[str, Any]]:
    """What ``path`` remembers, and what is added to it in the block; kept only where its folder exists already.

    Of processes launched together the first one keeps it: they read the same files at the same time.
    """
    known = read_json(path) if path.exists() else {}
    before = dict(known)
    yield known
    if known != before and path.parent.is_dir() and os.environ.get("RANK", "0") == "0":
        write_text(path, json.dumps(known, indent=1) + "\n")


def known_fingerprint(file: Path, key: str, known: dict[str, Any]) -> str:
    """:func:`file_fingerprint`; a file of the size and time of change in ``known[key]`` is not read again."""
    status = file.stat()
    stamp = [status.st_size, status.st_mtime_ns]
    entry = known.get(key)
    if entry and entry[0] == stamp:
        return str(entry[1])
    content = file_fingerprint(file)
    if time.time() - status.st_mtime > CLOCK_TICK_SECONDS:  # else it may change again without showing
        known[key] = [stamp, content]
    return content


@dataclass(frozen=True)
class File:
    """What a file of a folder was when it was published."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Unit:
    """A published unit as its marker tells it; ``files`` of a folder, by their names within it."""

    path: Path
    inputs: dict[str, str]
    content: str
    payload: dict[str, Any]
    files: dict[str, File] = field(default_factory=dict)

    def read(self, kind: type[Kind], *keys: str) -> Kind:
        """What the payload holds under ``keys``, each within the one before; CorruptFileError for anything else."""
        found: Any = self.payload
        for place, key in enumerate(keys):
            if not isinstance(found, dict) or key not in found:
                raise CorruptFileError(
                    f"{self.path}: it has no {'.'.join(keys[: place + 1])}; delete {self.path} and run again"
                )
            found = found[key]
        try:
            return from_json(kind, found, f"{self.path}: {'.'.join(keys)}" if keys else self.path)
        except CorruptFileError as error:
            raise CorruptFileError(f"{error}; delete {self.path} and run again") from None


def publish_json(path: Path, inputs: Mapping[str, str], payload: Mapping[str, Any]) -> Unit:
    """Publishes ``payload`` as a single-file unit."""
    with _aside(path) as aside:
        _write_json(aside, _marker(inputs, fingerprint(payload), payload))
    return read_unit(path)


def publish_folder(
    folder: Path,
    inputs: Mapping[str, str],
    write: Callable[[Path], Mapping[str, Any] | None],
    loose: Collection[str] = (),
) -> Unit:
    """Publishes a folder: ``write(aside)`` fills it and returns the marker's payload.

    ``loose``: files, by their names within it, that may change later and are no part of its content.
    """
    with _aside(folder) as aside:
        _before("mkdir", aside)
        aside.mkdir()
        payload = dict(write(aside) or {})
        files = {}
        for file in sorted(path for path in aside.rglob("*") if path.is_file()):
            _flush(file)
            name = file.relative_to(aside).as_posix()
            if name not in loose:
                files[name] = {"bytes": file.stat().st_size, "sha256": file_fingerprint(file)}
        for inner in (path for path in aside.rglob("*") if path.is_dir()):
            _flush_folder(inner)
        content = fingerprint({"files": files, "payload": payload})
        _write_json(aside / MARKER, {**_marker(inputs, content, payload), "files": files})
    return read_unit(folder)


def publish_copy(source: Path, folder: Path) -> Unit:
    """Publishes what ``source`` holds as ``folder``, too; where links can be, without taking its room twice."""
    unit = read_unit(source)

    def write(aside: Path) -> Mapping[str, Any]:
        for name in unit.files:
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source / name, aside / name)
            except OSError:  # another disk, or one that has no links
                shutil.copyfile(source / name, aside / name)
        return unit.payload

    return publish_folder(folder, unit.inputs, write)


def _marker(inputs: Mapping[str, str], content: str, payload: Mapping[str, Any]) -> dict[str, Any]:
    return {"schema_version": SCHEMA_VERSION, "inputs": dict(inputs), "content": content, "payload": dict(payload)}


def check_contents(folder: Path) -> None:
    """Reads every file of a published folder; CorruptFileError where one holds something else than was written."""
    for name, file in read_unit(folder).files.items():
        if file_fingerprint(folder / name) != file.sha256:
            raise CorruptFileError(
                f"{folder / name}: not what was written (its checksum differs); make or fetch it again"
            )


def read_unit(path: Path) -> Unit:
    """The unit at ``path``. CorruptFileError if its marker is unreadable, or a file missing or of another size."""
    marker_path = path / MARKER if path.is_dir() else path
    marker = read_json(marker_path)
    if "schema_version" not in marker:
        raise CorruptFileError(f"{marker_path}: not a unit's marker; delete {path} and run again")
    if (version := marker["schema_version"]) != SCHEMA_VERSION:
        raise CorruptFileError(
            f"{marker_path}: written by another version of puzzle (schema {version}, this one reads {SCHEMA_VERSION}); "
            "use that version, or start a new run folder"
        )
    try:
        unit = from_json(Unit, {**marker, "path": path}, marker_path)
    except CorruptFileError as error:
        raise CorruptFileError(f"{error}; delete {path} and run again") from None
    for name, known in unit.files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != known.bytes:
            found = f"{file.stat().st_size} bytes" if file.is_file() else "missing"
            raise CorruptFileError(f"{file}: expected {known.bytes} bytes, found {found}; delete {path} and run again")
    return unit


def content_of(path: Path) -> str:
    """The fingerprint of what the unit at ``path`` holds; ``absent`` where there is none."""
    return read_unit(path).content if path.exists() else "absent"


def is_current(path: Path, inputs: Mapping[str, str], stage: str) -> bool:
    """Whether the unit exists and was made from ``inputs``. StaleUnitError, naming what changed, if from others."""
    if not path.exists():
        return False
    changed = changed_inputs(path, inputs)
    if changed:
        raise StaleUnitError(
            f"{path} was made from other inputs (changed: {', '.join(changed)}); "
            f"run again with --redo {stage}, or use a new run folder"
        )
    return True


def changed_inputs(path: Path, inputs: Mapping[str, str]) -> list[str]:
    """Names of the inputs in which the unit on disk differs from ``inputs``; of a folder from before a change of what
    is published as a unit, which has no marker, its layout.
    """
    if path.is_dir() and not (path / MARKER).exists():
        return ["layout"]
    found = read_unit(path).inputs
    return sorted(name for name in {*found, *inputs} if found.get(name) != inputs.get(name))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file; CorruptFileError if there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CorruptFileError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise CorruptFileError(f"{path}: unreadable ({error}); delete it and run again") from None
    if not isinstance(data, dict):
        raise CorruptFileError(f"{path}: expected a JSON object; delete it and run again")
    return data


def write_text(path: Path, text: str) -> None:
    """Writes a file that is no unit (config, environment), atomically."""
    with _aside(path) as aside:
        _before("write", aside)
        aside.write_text(text, encoding="utf-8")
        _flush(aside)


def remove(path: Path) -> None:
    """Removes a unit at one stroke: renamed aside first, so it is never seen half gone."""
    if not path.exists():
        return
    with _aside(path) as aside:
        _before("rename", aside)
        os.replace(path, aside)
        _before("remove", aside)
        _delete(aside)


def sweep(folder: Path) -> None:
    """Removes what crashes left aside anywhere under ``folder``."""
    for aside in list(folder.rglob(f"{ASIDE}*")):
        _delete(aside)


@contextlib.contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to; renamed to ``path`` at the end if something is there, deleted on an error."""
    _before("mkdir", path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(ASIDE + path.name)
    _delete(aside)
    try:
        yield aside
        if aside.exists():
            _rename(aside, path)
    except SafetensorError as error:  # what safetensors makes of a full or failing disk
        _delete(aside)
        raise CorruptFileError(f"{path}: cannot be written ({error}); free some space and run again") from None
    except (Exception, KeyboardInterrupt):
        _delete(aside)
        raise


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    _before("write", path)
    path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    _flush(path)


def _flush(path: Path) -> None:
    _before("flush", path)
    with open(path, "rb+" if path.is_file() else "rb") as file:
        os.fsync(file.fileno())


def _rename(source: Path, target: Path) -> None:
    _before("rename", target)
    _flush_folder(source)
    os.replace(source, target)
    _flush_folder(target.parent)


def _flush_folder(path: Path) -> None:
    """Names reach the disk with the folder that holds them; Windows cannot open a folder for that."""
    if os.name == "posix" and path.is_dir():
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def append_event(path: Path, event: Mapping[str, Any]) -> None:
    """Appends one JSON line; a line torn by an earlier crash is closed first and stays ignored."""
    _before("append", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(dict(event), allow_nan=False).encode() + b"\n")


def read_events(path: Path) -> list[dict[str, Any]]:
    """All whole events, oldest first."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            events.append(json.loads(line))
    return events


@contextlib.contextmanager
def exclusive(run_dir: Path) -> Iterator[None]:
    """Holds the run folder for this process; PuzzleError if another one is working on it."""
    from filelock import FileLock, Timeout

    _before("mkdir", run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(run_dir / ".lock").acquire(blocking=False)
    except Timeout:
        raise PuzzleError(f"{run_dir}: another puzzle process is working on this run; wait for it or stop it") from None
    with lock:
        yield
