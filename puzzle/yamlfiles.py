"""The YAML files that users write, read into the models of config: which file a name means, and every mistake in it.

YAML 1.2 with ruamel.yaml (``1e-4`` is a number, a duplicate key is an error). Every mistake is reported at once, as
``file:line: what is wrong, what is allowed``. Writes nothing.
"""

from __future__ import annotations

import difflib
import io
import itertools
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter

from puzzle.types import ConfigError

EXPECTED = {"tuple_type": "give a list: [a, b]", "model_type": "give a section: {key: value}"}  # by pydantic's error
DEEPEST, MOST_NODES, MOST_CHARACTERS = 30, 100_000, 1_000_000  # of any file
MOST_MISTAKES, LONGEST_LINE = 50, 500  # of what is told of them
UNICODE_BREAKS = frozenset("\x85\u2028\u2029")
TOO_LARGE = "nested too deeply, or too large, for a file of this kind"
File = TypeVar("File", bound=BaseModel)
RECIPES = "blocks/recipes"
SHIPPED = {"space": "blocks", "constraints": "search", "grid": "profiling", "table": "profiling/tables"}


def shipped_inputs() -> Path:
    """The folder that holds ``blocks/``, ``search/`` and ``profiling/``: in the wheel, or the checkout's root."""
    installed = Path(__file__).parent / "inputs"
    return installed if installed.is_dir() else Path(__file__).parent.parent


def locate(kind: Literal["space", "constraints", "grid", "table"], name: str) -> Path:
    """The file called ``name``: a path, or the name of one that is shipped (``llama``, ``half-memory``)."""
    if Path(name).is_file():
        return Path(name)
    folder, suffix = shipped_inputs() / SHIPPED[kind], ".csv" if kind == "table" else ".yaml"
    if (shipped := folder / f"{name}{suffix}").is_file():
        return shipped
    known = sorted(str(file.relative_to(folder).with_suffix("")) for file in folder.rglob(f"*{suffix}"))
    shipped_ones = f"and no shipped one of that name{_nearest(name, known)}"
    raise ConfigError(f"{kind} {name!r}: no such file (looked in {Path.cwd()}), {shipped_ones}")


def locate_config(where: Path) -> Path:
    """The run configuration that is meant: the file, or that of a run's folder, or a shipped recipe by its name."""
    if where.is_dir():
        return where / "config.yaml"
    recipe = shipped_inputs() / RECIPES / f"{where}.yaml"
    return recipe if recipe.is_file() and not where.exists() else where


def files_in(folder: str, key: str) -> list[Path]:
    """All files below the folder that ``key`` of a config names. ConfigError where there is no such folder."""
    if not Path(folder).is_dir():
        raise ConfigError(f"{key}: {folder} is no folder")
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


def load(kind: type[File], path: Path, overrides: Sequence[str] = ()) -> File:
    """The file as a ``kind``; ``overrides`` are ``a.b=value``, the value in YAML. ConfigError lists every mistake."""
    return validated(kind, path, read_yaml(path), overrides)


def parse(kind: type[File], text: str, name: Path) -> File:
    """:func:`load` of a text that is, or is to be, the file ``name``."""
    return validated(kind, name, parse_mapping(text, name))


def of_mapping(kind: type[File], given: Mapping[str, Any], name: Path) -> File:
    """:func:`load` of what a file called ``name`` would hold."""
    return validated(kind, name, CommentedMap(given))


def validated(kind: type[File], path: Path, document: CommentedMap, overrides: Sequence[str] = ()) -> File:
    """What was read of ``path``, as a ``kind``; ConfigError lists every mistake."""
    for override in overrides:
        _apply(document, override)
    try:
        return kind.model_validate(plain(document))
    except ValidationError as error:
        mistakes = error.errors()
        lines = [_one_line(_explain(kind, path, document, dict(one))) for one in mistakes[:MOST_MISTAKES]]
        if len(mistakes) > MOST_MISTAKES:
            lines.append(f"{path}:1: and {len(mistakes) - MOST_MISTAKES} more mistakes")
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def read_yaml(path: Path) -> CommentedMap:
    """The mapping in a YAML 1.2 file, with the line of every key."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; `puzzle new` writes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: unreadable ({error})") from None
    return parse_mapping(text, path)


def parse_mapping(text: str, path: Path) -> CommentedMap:
    """The mapping in a text that ``path`` holds; ConfigError where it is none."""
    if len(text) > MOST_CHARACTERS or _open_brackets(text) > DEEPEST:  # ruamel.yaml would take minutes
        raise ConfigError(f"{path}:1: {TOO_LARGE}")
    try:
        document = YAML(typ="rt").load(text)
    except DuplicateKeyError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: {_one_line(error.problem)}; keep one of the two") from None
    except YAMLError as error:
        mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
        reason = _one_line(error.problem if isinstance(error, MarkedYAMLError) else error)
        raise ConfigError(f"{path}:{mark.line + 1 if mark else 1}: not valid YAML: {reason}") from None
    except RecursionError:
        raise ConfigError(f"{path}:1: {TOO_LARGE}") from None
    except Exception as error:  # ruamel.yaml trips over some odd input; for the user that is no valid YAML either
        raise ConfigError(f"{path}:1: not valid YAML: {_one_line(f'{type(error).__name__}: {error}')}") from None
    if not isinstance(document, CommentedMap):
        raise ConfigError(f"{path}:1: expected `key: value` lines")
    _check_content(document, path)
    return document


def _one_line(said: object) -> str:
    words = " ".join(str(said).split())
    return words if len(words) <= LONGEST_LINE else f"{words[:LONGEST_LINE]} …"


def _open_brackets(text: str) -> int:
    """How many are open at once at most, give or take those in comments and strings."""
    steps = (1 if bracket in "[{" else -1 for bracket in re.findall(r"[\[{\]}]", text))
    return max(itertools.accumulate(steps), default=0)


def _check_content(document: CommentedMap, path: Path) -> None:
    """ConfigError for what aliases make endless, or as good as endless, and for characters that are half of one."""
    nodes: list[tuple[Any, int]] = [(document, 0)]
    count = 0
    while nodes:
        node, depth = nodes.pop()
        count += 1
        if depth > DEEPEST or count > MOST_NODES:
            raise ConfigError(f"{path}:1: {TOO_LARGE}")
        if isinstance(node, str) and any("\ud800" <= character <= "\udfff" for character in node):
            raise ConfigError(f"{path}:1: {node!r} is not valid Unicode")
        inner = [*node, *node.values()] if isinstance(node, Mapping) else node if isinstance(node, list) else ()
        nodes.extend((one, depth + 1) for one in inner)


def dump(config: BaseModel) -> str:
    """The model as YAML that :func:`load` reads back to an equal model."""
    return as_yaml(config.model_dump(mode="json"))


def as_yaml(document: Mapping[str, Any]) -> str:
    out = io.StringIO()
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.width = 2**31  # a long line that is folded at two spaces reads back with one
    yaml.dump(dict(document), out)
    return out.getvalue()


class _Representer(RoundTripRepresenter):
    """Writes line breaks of Unicode by their names: a reader makes a space of them where they stand as they are."""

    def represent_str(self, data: str) -> ScalarNode:
        style = '"' if UNICODE_BREAKS.intersection(data) else None
        node: ScalarNode = self.represent_scalar("tag:yaml.org,2002:str", data, style)
        return node


_Representer.add_representer(str, _Representer.represent_str)


def _apply(document: CommentedMap, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: write it as key=value, e.g. --set distill.tokens=100000")
    *parents, last = key.split(".")
    node: Any = document
    for parent in parents:
        node = node.setdefault(parent, CommentedMap())
        if not isinstance(node, CommentedMap):
            raise ConfigError(f"--set {override}: {parent} is no section")
    try:
        node[last] = YAML(typ="safe").load(value)
    except YAMLError:
        raise ConfigError(f"--set {override}: {value!r} is not a valid YAML value") from None


def plain(node: Any) -> Any:
    """What was read, in Python's own types; keys are strings."""
    if isinstance(node, Mapping):
        return {str(key): plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [plain(value) for value in node]
    if isinstance(node, float):
        return float(node)
    if isinstance(node, int) and not isinstance(node, bool):
        return int(node)
    return node


def _explain(kind: type[BaseModel], path: Path, document: CommentedMap, problem: dict[str, Any]) -> str:
    # pydantic names the union branch it tried in `loc`; only what the file itself contains counts as a place
    place, line = _located(document, problem["loc"])
    where = f"{path}:{line}"
    key = ".".join(map(str, place))
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key {key!r}{_nearest(str(place[-1]), _field_names(kind, place[:-1]))}"
    if problem["type"] == "missing":
        return f"{where}: missing key {'.'.join(map(str, problem['loc']))!r}"
    found = problem["input"] if not isinstance(problem["input"], dict) else "a section"
    message = EXPECTED.get(problem["type"], str(problem["msg"]).removeprefix("Value error, "))
    return f"{where}: {key}: {message[:1].lower()}{message[1:]} (found {found!r})"


def _located(document: Any, loc: Sequence[str | int]) -> tuple[list[str | int], int]:
    """As much of ``loc`` as the file itself contains, and the line that it is on."""
    place: list[str | int] = []
    node, line = document, 1
    for part in loc:
        keys: Any = node if isinstance(node, Mapping) else range(len(node)) if isinstance(node, list) else ()
        found = [key for key in keys if str(key) == str(part)]  # YAML's keys may be numbers, or nothing
        if found:
            lines = node.lc.data or {} if isinstance(node, CommentedMap | CommentedSeq) else {}
            line = lines[found[0]][0] + 1 if found[0] in lines else line
            place.append(found[0])
            node = node[found[0]]
    return place, line


def _field_names(kind: Any, place: Sequence[str | int]) -> list[str]:
    """The keys that the section at ``place`` takes."""
    for part in place:
        fields = kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else {}
        kind = fields[str(part)].annotation if str(part) in fields else _section(kind)
    kind = kind if isinstance(kind, type) and issubclass(kind, BaseModel) else _section(kind)
    return sorted(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []


def _section(annotation: Any) -> Any:
    """The model inside ``dict[str, Model]`` or ``Amount | Model``."""
    origin = typing.get_origin(annotation)
    if origin not in (Annotated, dict, tuple, typing.Union, types.UnionType):
        return None
    for argument in reversed(typing.get_args(annotation)):
        if isinstance(argument, type) and issubclass(argument, BaseModel):
            return argument
        if (inner := _section(argument)) is not None:
            return inner
    return None


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; allowed: {', '.join(known)}" if known else ""
