"""The schemas that editors read: complete, described, and of one mind with the parser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ruamel.yaml import YAML

from puzzle import yamlfiles
from puzzle.cli import main
from puzzle.config import OBJECTIVES, ConstraintFile
from puzzle.schema import FILES, METRIC_DESCRIPTIONS, schema
from puzzle.search.metrics import METRICS
from puzzle.types import ConfigError

SHIPPED = yamlfiles.shipped_inputs()
FOLDERS = {"constraints": "search", "space": "blocks", "grid": "profiling", "config": yamlfiles.RECIPES}


def validator(kind: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(schema(kind))  # type: ignore[arg-type]


def plain(text: str) -> Any:
    """As editors see YAML: keys are strings."""
    return json.loads(json.dumps(YAML(typ="safe").load(text)))


@pytest.mark.parametrize("kind", FILES)
def test_a_schema_is_one_and_describes_every_field(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--debug", "schema", kind]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == schema(kind)  # type: ignore[arg-type]
    jsonschema.Draft202012Validator.check_schema(printed)
    for model in (printed, *printed.get("$defs", {}).values()):
        for field in model["properties"].values():
            assert field["description"]


def test_every_metric_is_described() -> None:
    assert set(METRIC_DESCRIPTIONS) == {*METRICS, *OBJECTIVES}


@pytest.mark.parametrize(
    ("kind", "path"),
    [(kind, path) for kind, folder in FOLDERS.items() for path in sorted((SHIPPED / folder).glob("*.yaml"))],
    ids=lambda value: getattr(value, "stem", value),
)
def test_shipped_files_are_valid(kind: str, path: Path) -> None:
    validator(kind).validate(plain(path.read_text()))


def test_the_template_is_valid(tmp_path: Path) -> None:
    assert main(["new", str(tmp_path / "mine.yaml")]) == 0
    validator("config").validate(plain((tmp_path / "mine.yaml").read_text()))


GOOD = [
    "constraints: {memory_gib: 40, chat.ttft_ms: '75 %', params: {max: 5e9, min: '10%'}, mine: 3}",
    "constraints: {memory_gib: {values: [40, '50%']}}\nserve_on: [vllm, transformers]",
    "constraints: {}\nserve_on: vllm\nworkloads: {chat: {isl: 1, osl: 2, batch_size: [1, 2]}}",
]
BAD = [
    "constraints: {memory_gib: 40 GiB}",
    "constraints: {memory_gib: -5%}",
    "constraints: {memory_gib: 1e30}",
    "constraints: {memory_gib: true}",
    "constraints: {memory_gib: {maximum: 4}}",
    "constraints: {memory_gib: {values: [4], max: 3}}",
    "constraints: {}\nserve_on: [vlm]",
    "constraints: {}\nworkloads: {chat: {isl: 0, osl: 2}}",
    "constraints: {}\nworkloads: {chat: {isl: 1}}",
    "objective: kl_nats",
]


@pytest.mark.parametrize("text", GOOD + BAD)
def test_the_schema_and_the_parser_agree(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text + "\n")
    good = text in GOOD
    assert validator("constraints").is_valid(plain(text)) == good
    if good:
        assert yamlfiles.load(ConstraintFile, path)
    else:
        with pytest.raises(ConfigError):
            yamlfiles.load(ConstraintFile, path)
