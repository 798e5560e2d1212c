"""Every file we ship goes through the real command line, and every mistake in a user's file is found and explained."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from puzzle import config, yamlfiles
from puzzle.cli import main
from puzzle.config import ConstraintFile, GridFile, RunConfig, SpaceFile
from puzzle.search.constraints import bounds
from puzzle.space import SearchSpace
from puzzle.types import ConfigError, Site
from puzzle.variants import variant_name
from tests.test_variants import SHAPE

SHIPPED = yamlfiles.shipped_inputs()


def names(folder: str) -> list[str]:
    found = sorted(path.stem for path in (SHIPPED / folder).glob("*.yaml"))
    assert found
    return found


@pytest.mark.parametrize("space", sorted({*names("blocks")} - {"moe"}))  # the demo has no experts
def test_every_shipped_space_is_valid_for_the_demo(tmp_path: Path, space: str) -> None:
    assert main(["new", str(tmp_path / "demo.yaml")]) == 0
    assert main(["--debug", "validate", str(tmp_path / "demo.yaml"), "--set", f"space={space}", "--device", "cpu"]) == 0


@pytest.mark.parametrize("name", names("search"))
def test_every_shipped_constraint_file_means_something(name: str) -> None:
    assert bounds(yamlfiles.load(ConstraintFile, yamlfiles.locate("constraints", name)))


@pytest.mark.parametrize("name", names("profiling"))
def test_every_shipped_grid_loads(name: str) -> None:
    assert yamlfiles.load(GridFile, yamlfiles.locate("grid", name)).decode_context_tokens


def test_the_template_is_a_valid_config_for_demo_and_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", str(tmp_path / "mine.yaml"), "--teacher", "/models/llama"]) == 0
    loaded = yamlfiles.load(RunConfig, tmp_path / "mine.yaml")
    assert loaded.teacher == "/models/llama"
    assert loaded.kd.learning_rate == 5e-4
    lines = (tmp_path / "mine.yaml").read_text().splitlines()
    assert 15 <= len(lines) <= 25
    assert main(["new", str(tmp_path / "mine.yaml")]) == 2
    assert "exists" in capsys.readouterr().err


def test_a_config_dumped_reads_back_as_itself(tmp_path: Path) -> None:
    loaded = RunConfig(run="r", constraints="c" * 90 + "  c", seed=3, data=config.DataConfig(text="x.txt"))
    (tmp_path / "dumped.yaml").write_text(yamlfiles.dump(loaded))
    assert yamlfiles.load(RunConfig, tmp_path / "dumped.yaml") == loaded


@pytest.mark.parametrize("name", ["\x85", "a\u2028b", "\u2029 c", "\n", "\r\n", "a\tb", "1e3", "null", "'", ""])
def test_any_text_dumped_reads_back_as_itself(name: str) -> None:
    document = {"name": name, "in a list": [name]}
    assert YAML(typ="safe").load(yamlfiles.as_yaml(document)) == document


def test_the_llama_space_has_the_papers_54_blocks() -> None:
    path = yamlfiles.locate("space", "llama")
    file = yamlfiles.load(SpaceFile, path)
    shape = type(SHAPE)("llama", 32, 4096, 32, 8, 128, 14336, 128256, 8192, False)
    space = SearchSpace.parse({"attention": file.attention, "ffn": file.ffn}, shape, file.ffn_multiple_of)
    assert len(space.on_offer[Site(0, "attention")]) * len(space.on_offer[Site(0, "ffn")]) == 54


def test_the_space_for_experts_offers_fewer_of_them() -> None:
    file = yamlfiles.load(SpaceFile, yamlfiles.locate("space", "moe"))
    shape = replace(
        type(SHAPE)("qwen3_moe", 48, 2048, 32, 4, 128, 6144, 151936, 40960, False, qk_norm=True),
        moe_layers=tuple(range(48)),
        num_experts=128,
        num_active_experts=8,
        moe_intermediate_size=768,
    )
    space = SearchSpace.parse({"attention": file.attention, "ffn": file.ffn}, shape, file.ffn_multiple_of)
    names = [variant_name(spec) for spec in space.on_offer[Site(7, "ffn")]]
    assert names == ["keep", "experts-96", "experts-64", "experts-32", "active-4", "active-2", "linear", "skip"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: r\nconstraints: c\nkd: {tokens: -5}\n", "x.yaml:3: kd.tokens"),
        ("run: r\nconstraints: c\nkd:\n  token: 5\n", "x.yaml:4: unknown key 'kd.token'; did you mean 'tokens'"),
        ("run: r\n", "x.yaml:1: missing key 'constraints'"),
        ("run: r\nconstraints: c\ndevice: gpu\n", "x.yaml:3: device"),
        ("run: r\nconstraints: c\ndistill: {learning_rate: .nan}\n", "x.yaml:3: distill.learning_rate"),
        ("run: r\nconstraints: c\nseed: 1.5\n", "x.yaml:3: seed"),
        ("- a\n- b\n", "x.yaml:1: expected `key: value` lines"),
        ("", "x.yaml:1: expected `key: value` lines"),
        ("run: r\nrun: s\nconstraints: c\n", "x.yaml:2"),
        ("run: 'r\n", "x.yaml:"),
    ],
)
def test_mistakes_are_found_with_their_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        yamlfiles.load(RunConfig, path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("'\\U00110000'\n".replace("'", '"'), "x.yaml:1: not valid YAML: ValueError"),
        ("a: !!timestamp 2001-99-99\n", "x.yaml:1: "),
        ("a: " + "[" * 2000, "nested too deeply, or too large"),
        ("- " * 2000, "nested too deeply, or too large"),
        ("#" * 2_000_000, "nested too deeply, or too large"),
        (
            "a: &a [1]\n" + "".join(f"{n}: &{n} [{', '.join(['*' + m] * 9)}]\n" for m, n in pairwise("abcdefgh")),
            "large",
        ),
        ("".join(f"k{number}: 1\n" for number in range(200)), "and 151 more mistakes"),
        ('constraints: {"\\ud800": 5}\n', "'\\ud800' is not valid Unicode"),
        ("? \n: 1\n", "unknown key 'None'"),
        ('constraints: {"a\\nb": 5}\n', "give a name, in printable characters"),
        ("constraints: {params: {maximum: 5}}\n", "unknown key 'constraints.params.maximum'; did you mean 'max'"),
        ("constraints: {params: {}}\n", "give at least one of min, max, eq"),
        ("constraints: {params: a lot}\n", "constraints.params"),
        ("constraint: {params: 5}\n", "did you mean 'constraints'"),
        ("workloads: {chat: {isl: 8}}\nconstraints: {params: 5}\n", "missing key 'workloads.chat.osl'"),
        ("constraints: {params: 5}\nsolutions: {min_difference: 2}\n", "x.yaml:2: solutions.min_difference"),
        ("constraints: {params: 4 GiB}\n", "constraints.params: give a number in the unit that the metric is named by"),
        ("constraints: {params: {max: [5]}}\n", "constraints.params.max: give a number"),
        ("constraints: {params: {min: 5, max: 4}}\n", "min 5.0 is above max 4.0"),
        ("constraints: {params: {values: []}}\n", "at least one value"),
        ("constraints: {params: {values: [5, 5]}}\n", "none twice"),
        ("constraints: {params: {values: [5], max: 3}}\n", "values stand alone; leave out max"),
        ("constraints: {params: 5}\nserve_on: [vlm]\n", "x.yaml:2: serve_on.0: input should be 'transformers', '"),
        ("constraints: {}\nworkloads: {c: {isl: 1, osl: 1, batch_size: [x]}}\n", "x.yaml:2: workloads.c.batch_size.0"),
    ],
)
def test_mistakes_in_a_constraint_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        yamlfiles.load(ConstraintFile, path)
    assert message in str(caught.value)
    assert all(line.startswith(f"{path}:") for line in str(caught.value).splitlines())


@pytest.mark.parametrize("override", ["distill.tokens", "=5", "seed.x=5", "seed=[1"])
def test_overrides_that_are_none(tmp_path: Path, override: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("run: r\nconstraints: c\nseed: 1\n")
    with pytest.raises(ConfigError, match="--set"):
        yamlfiles.load(RunConfig, path, [override])


def test_a_name_that_is_not_shipped_names_those_that_are() -> None:
    with pytest.raises(ConfigError, match="no shipped one of that name; did you mean 'half-memory'"):
        yamlfiles.locate("constraints", "half-memoy")
