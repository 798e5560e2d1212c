"""Texts that a user's editor might hold, for the constraint parser, and what must be true whatever they say.

A text is arbitrary, or a good file with damage, or built from pieces that are nearly right. It either is a valid file,
which then goes through the search's programmes and its explanation, or an error of one line per mistake.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import strategies as st
from search_factories import make_costs, make_items, make_scores, make_shape

from puzzle import yamlfiles
from puzzle.config import OBJECTIVES, ConstraintFile
from puzzle.search import problems, search
from puzzle.search.fan_out import picks
from puzzle.search.meaning import meaning
from puzzle.search.metrics import METRICS
from puzzle.types import ConfigError, PuzzleError

NAME = Path("limits.yaml")
SHAPE = make_shape()
ITEMS = make_items(SHAPE)
SCORES = make_scores(ITEMS)
COSTS = make_costs(SHAPE)
GOOD = [path.read_text() for path in sorted((yamlfiles.shipped_inputs() / "search").glob("*.yaml"))]
GOOD.append(
    """\
workloads:
  chat: {isl: 128, osl: 64, batch_size: [1, 4]}
  doc: {isl: 64, osl: 1, batch_size: 4, tp: 2}
constraints:
  memory_gib: "90%"
  chat.output_tok_per_s: {min: "110%", max: 1e9}
  params: {values: [150000, 120000, "60%"]}
  layers_with_attention: {min: 1}
  kv_heads_total: {eq: 8}
  kl_nats: {max: 9.5}
serve_on: [transformers, mlx-lm]
objective: chat.e2e_ms
solutions: {count: 2, min_difference: 0.1}
solver: {gap: 1e-3, time_limit_s: 5}
"""
)
NASTY = [
    "&a [*a]", "*a", "!!python/object:os.system x", "!!set {a}", "!!binary x", "!!timestamp 2001-99-99", "!!int x",
    "!!float x", "!!bool x", "!!null x", "!x y", "<<: *a", "<<: {a: 1}", "? [a]: b", "? {a: 1}\n: b", "~", "null:",
    "true:", "1e999", ".nan", "-.inf", "0x", "0o9", "0b2", "1_0", "1:2:3", "-0", "1e400%", "9" * 5000, "9" * 400 + "%",
    "-5%", "5 %", "5%%", "\t", "\0", "\x85", "\u2028", "\ufeff", "\ud7ff", "%YAML 9.9\n---", "%TAG ! x\n---", "---",
    "...", "--- |", ">-", "|5", "'", '"', "{", "}", "[", "]", ",", ":", "#", "- ", "? ", "{" * 50, "[" * 2000,
    "- " * 500, "a: " * 50, '"\\x"', '"\\U00110000"', "2001-01-01", "2001-13-01", "=", "<<", "batch_size: []",
    "values: []", "{values: 5}", "{values: {}}", "{min: null}",
]  # fmt: skip
KEYS = ["workloads", "constraints", "objective", "solutions", "serve_on", "isl", "osl", "batch_size", "weights", "kv"]
KEYS += [
    "device",
    "tp",
    "runtime",
    "min",
    "max",
    "eq",
    "values",
    "count",
    "min_difference",
    "solver",
    "gap",
    "time_limit_s",
    "chat",
    "doc",
    "",
]
NAMES = [*METRICS, *OBJECTIVES, *(f"chat.{name}" for name in METRICS), "chat.", ".params", "chat.chat.ttft_ms"]

numbers: st.SearchStrategy[Any] = st.one_of(
    st.integers(-2, 600), st.integers(), st.floats(), st.sampled_from([0, 1, 4, 64, 128, 10**9, 10**30, 0.5, 1e300])
)
scalars = st.one_of(
    numbers,
    st.booleans(),
    st.none(),
    st.sampled_from(
        ["75%", "100 %", "0%", "1e5%", "bf16", "int4-g32", "fp9", "cpu", "h100", "vllm", "kl_nats", "params"]
    ),
    st.text(max_size=8),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=8,
)
amounts = st.one_of(
    numbers,
    st.floats(0, 1e6),
    st.integers(1, 250).map(lambda percent: f"{percent}%"),
    st.fixed_dictionaries({}, optional={side: numbers | st.just("50%") for side in ("min", "max", "eq")}),
    st.fixed_dictionaries({"values": st.lists(st.floats(0, 1e6) | st.just("50%"), max_size=3)}),
    values,
)
workloads = st.fixed_dictionaries(
    {"isl": st.integers(1, 512) | values, "osl": st.integers(1, 512) | values},
    optional={
        "batch_size": st.sampled_from([1, 4, 8, [1, 4], [4, 1], []]) | values,
        "weights": st.sampled_from(["bf16", "fp8"]) | values,
        "kv": st.just("bf16") | values,
        "device": st.just("cpu") | values,
        "tp": st.sampled_from([1, 2]) | values,
        "runtime": st.just("transformers") | values,
    },
)
documents = st.fixed_dictionaries(
    {"constraints": st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=6), amounts, max_size=4) | values},
    optional={
        "workloads": st.dictionaries(st.sampled_from(["chat", "doc", "a.b", ""]), workloads | values, max_size=2)
        | values,
        "objective": st.sampled_from(NAMES) | values,
        "solutions": st.fixed_dictionaries({}, optional={"count": numbers, "min_difference": numbers}) | values,
        "solver": st.fixed_dictionaries({}, optional={"gap": numbers, "time_limit_s": numbers}) | values,
        "serve_on": st.lists(st.sampled_from(["vllm", "transformers", "llama.cpp"]), max_size=2) | values,
    },
)


@st.composite
def damaged(draw: Callable[[st.SearchStrategy[Any]], Any]) -> str:
    """A good file with a few cuts, doubled lines and insertions."""
    text: str = draw(st.sampled_from(GOOD))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 30)))
        middle = draw(st.sampled_from(["", text[start:end] * 2, *NASTY]) | st.text(max_size=4))
        text = text[:start] + middle + text[end:]
    return text


texts = st.one_of(
    damaged(),
    documents.map(json.dumps),
    values.map(json.dumps),
    st.text(),
    st.lists(st.sampled_from(NASTY)).map(" ".join),
)

Result = TypeVar("Result")


def _or_one_line(step: Callable[[], Result]) -> Result | None:
    """What the step returns, or None where it has found a mistake of the user's and says so in one line."""
    try:
        return step()
    except PuzzleError as error:
        said = str(error)
    assert said.strip()
    assert len(said.splitlines()) == 1, said
    return None


def read(step: Callable[[], ConstraintFile], name: Path) -> ConstraintFile | None:
    """The file, or None where it is an error with a line for each mistake that begins with the file's name."""
    try:
        return step()
    except ConfigError as error:
        lines = str(error).splitlines()
    assert lines
    assert all(line.startswith(f"{name}:") for line in lines), lines
    return None


def check(text: str, solve: bool = False) -> bool:
    """Whether ``text`` is a valid constraint file; anything but that or a clear error is an exception."""
    file = read(lambda: yamlfiles.parse(ConstraintFile, text, NAME), NAME)
    if file is None:
        return False
    assert yamlfiles.parse(ConstraintFile, yamlfiles.dump(file), NAME) == file
    _or_one_line(lambda: meaning(SHAPE, ITEMS, COSTS, file))
    for one in (_or_one_line(lambda: picks(file)) or ())[:3]:
        made = _or_one_line(lambda one=one: problems(SHAPE, ITEMS, SCORES, COSTS, one.file))  # type: ignore[misc]
        if solve and made is not None and len(made) <= 2 and one.file.solutions.count <= 3:
            _or_one_line(lambda one=one: search(SHAPE, ITEMS, SCORES, COSTS, one.file, {}))  # type: ignore[misc]
    return True
