"""What a user sees of exports: the folder as a whole, its card, `puzzle convert` and `puzzle verify`."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from puzzle import artifacts
from puzzle.cli import main
from puzzle.export import card, publish
from puzzle.export.card import Licence, converted_card, untried, with_verdicts
from puzzle.export.shards import write_sharded
from puzzle.export.verify import RUNTIMES, Verdict
from puzzle.types import Architecture, AttentionSpec, FfnSpec, ModelShape
from tests.export.test_formats import BLOCKS, make_student
from tests.exporting import saved

SHAPE = ModelShape("llama", 2, 64, 4, 4, 16, 96, 128, 256, tied_embeddings=False)
LAYERS: Architecture = (
    (AttentionSpec("skip"), FfnSpec("keep")),
    (AttentionSpec("linear"), FfnSpec("narrow", 48)),
)


def verdict(runtime: str, difference: float = 0.0) -> Verdict:
    checks = RUNTIMES[runtime].checks
    return Verdict(runtime, "1.0", {**dict.fromkeys(checks, 0.0), "max_logit_difference": difference})


@pytest.fixture
def model(tiny_tokenizer_dir: Path, tmp_path: Path) -> Path:
    folder = saved(make_student(BLOCKS), tmp_path / "model")
    shutil.copytree(tiny_tokenizer_dir, folder, dirs_exist_ok=True)
    (folder / "README.md").write_text("---\nlicense: llama3.1\nlicense_link: LICENSE\n---\n# A | card\n")
    (folder / "LICENSE").write_text("its terms")
    return folder


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Verdict]:
    """What runtimes are to say; the clean processes are slow, and tested elsewhere."""
    said: dict[str, Verdict] = {}
    stand_in = lambda _folder, runtime, *_: said.get(runtime, verdict(runtime))
    monkeypatch.setattr(publish, "verify", stand_in)
    monkeypatch.setattr("puzzle.export.verify.verify", stand_in)
    return said


def test_convert_writes_a_whole_folder_that_is_verified_in_a_clean_process(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "nas"
    assert main(["--debug", "convert", str(model), str(out), "--target", "nemotron-nas"]) == 0
    assert re.search(r"^torch \S+: passed, logits within \S+ of the original$", capsys.readouterr().out, re.M)
    assert {path.name for path in out.iterdir()} == {
        *("config.json", "configuration_decilm.py", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("LICENSE", "README.md", "architecture.json", "verification", "unit.json"),
    }
    assert json.loads((out / "architecture.json").read_text())["L001.ffn"] == "narrow-40"
    text = (out / "README.md").read_text()
    assert "# Llama-model-saved-puzzle, for vLLM" in text and "Built with Llama" in text
    assert 'license: "llama3.1"' in text
    assert "- torch " in text and "vllm: cannot load it: vllm refuses attention skip at layer 0" in text
    assert main(["convert", str(model), str(out), "--target", "hf"]) == 2
    assert "exists; choose another name" in capsys.readouterr().err


def test_verify_again_and_what_is_damaged(
    model: Path, tmp_path: Path, checked: dict[str, Verdict], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mlx"
    checked["mlx-lm"] = Verdict("mlx-lm", reason="not installed here")
    assert main(["--debug", "convert", str(model), str(out), "--target", "mlx"]) == 0
    assert "- mlx-lm: not verified (not installed here)" in (out / "README.md").read_text()
    checked["mlx-lm"] = verdict("mlx-lm", 5e-6)
    assert main(["--debug", "verify", str(out), "--runtime", "mlx-lm"]) == 0
    text = (out / "README.md").read_text()
    assert "- mlx-lm 1.0: passed, logits within 5.0e-06 of the original" in text
    assert "- torch 1.0: passed" in text and "not verified" not in text
    checked["torch"] = verdict("torch", float("nan"))
    capsys.readouterr()
    assert main(["verify", str(out)]) == 1
    assert "torch 1.0: FAILED" in (out / "README.md").read_text()
    assert "does not load as it should in torch" in capsys.readouterr().err
    assert main(["verify", str(out), "--runtime", "llama.cpp"]) == 2

    weights = bytearray((out / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (out / "model.safetensors").write_bytes(weights)
    assert main(["verify", str(out)]) == 5
    assert "checksum differs" in capsys.readouterr().err
    (out / "model.safetensors").write_bytes(weights[:-1])
    assert main(["verify", str(out)]) == 5
    assert main(["verify", str(tmp_path)]) == 2
    assert "no export" in capsys.readouterr().err


def test_vllm_is_asked_on_request_and_not_for_what_it_is_known_to_refuse(
    tiny_tokenizer_dir: Path, tmp_path: Path, checked: dict[str, Verdict], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, blocks in (("good", BLOCKS[3:4]), ("bad", BLOCKS[:1])):
        folder = saved(make_student(blocks), tmp_path / name)
        shutil.copytree(tiny_tokenizer_dir, folder, dirs_exist_ok=True)
        assert main(["--debug", "convert", str(folder), str(tmp_path / name), "--target", "nemotron-nas"]) == 0
    assert "- vllm: not verified (loads every block" in (tmp_path / "good" / "README.md").read_text()
    checked["vllm"] = verdict("vllm", 1e-5)
    assert main(["verify", str(tmp_path / "good"), "--runtime", "vllm"]) == 0
    text = (tmp_path / "good" / "README.md").read_text()
    assert "- vllm 1.0: passed" in text and "- torch 1.0: passed" in text and "vllm: not verified" not in text
    assert main(["verify", str(tmp_path / "bad"), "--runtime", "vllm"]) == 2
    assert "bad: vllm: cannot load it: vllm refuses attention skip at layer 0" in capsys.readouterr().err


def test_what_does_not_load_is_not_published(
    model: Path, tmp_path: Path, checked: dict[str, Verdict], capsys: pytest.CaptureFixture[str]
) -> None:
    checked["transformers"] = verdict("transformers", 0.5)
    assert main(["convert", str(model), str(tmp_path / "out"), "--target", "hf"]) == 1
    assert "does not load as it should: transformers 1.0: FAILED: its logits differ" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".aside*"))
    (model / "tokenizer.json").unlink()
    assert main(["convert", str(model), str(tmp_path / "out"), "--target", "hf"]) == 2
    assert "no tokenizer here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_truncated_shard_is_named_and_nothing_is_written(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    write_sharded(tensors.items(), model, shard_bytes=100_000)
    shard = sorted(model.glob("model-0000*"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    assert main(["convert", str(model), str(tmp_path / "out"), "--target", "hf"]) == 5
    assert re.search(f"{shard.name}: .*bytes where its header says", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == [model.name]


@pytest.mark.parametrize("operation", ["mkdir", "write", "flush", "rename"])
@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC])
def test_a_disk_that_cannot_be_written_is_named_and_nothing_is_left(
    operation: str,
    code: int,
    model: Path,
    tmp_path: Path,
    checked: dict[str, Verdict],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(found: str, path: Path) -> None:
        if found == operation:
            raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(artifacts, "_before", fail)
    assert main(["convert", str(model), str(tmp_path / "out"), "--target", "hf"]) == 5
    advice = {errno.EROFS: "use a folder that can be written", errno.ENOSPC: "free some space"}[code]
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path) in line and os.strerror(code) in line and advice in line
    assert [path.name for path in tmp_path.iterdir()] == [model.name]


def test_nothing_from_outside_becomes_part_of_the_card() -> None:
    evil = "org/name</td> | `x`\n# [click](http://evil)"
    text = converted_card(evil, Licence({"license": "other: |\n  x"}), "hf", SHAPE, LAYERS)
    body = text.partition("\n---\n")[2]
    assert "</td>" not in body.replace("\\>", "") and "](http" not in body.replace("\\]", "") and "\n# [" not in body
    assert text.count("\n---\n") == 1
    assert "| 1 | linear | `███·······` | narrow-48 | `█████·····` |" in text
    config = "a: ```\nb"
    assert card._fenced(config, "yaml") == "````yaml\na: ```\nb\n````"


def test_verdicts_are_replaced_and_added() -> None:
    text = converted_card("base", Licence({}), "gguf", SHAPE, LAYERS)
    once = with_verdicts(text, ["first"], ["other"])
    assert once.count("- first") == 1
    again = with_verdicts(once, ["second"])
    assert "- first" not in again and "- other" not in again and again.count("- second") == 1
    assert with_verdicts("# Not ours", ["third"]).endswith("- third\n<!-- end of verification -->\n")


def test_other_runtimes_are_said_to_be_unverified_or_to_refuse() -> None:
    first, _, third = untried("nemotron-nas", SHAPE, LAYERS, ["torch"])
    assert first.refuses and first.line.startswith("vllm: cannot load it: vllm refuses attention skip at layer 0")
    assert not third.refuses
    assert third.line == "tensorrt-llm: not verified (loads every block of it, by what is known)"
    (plugin,) = untried("hf", SHAPE, LAYERS, ["transformers"])
    assert plugin.line == "vllm-plugin: not verified (loads every block of it, by what is known)"


@pytest.mark.parametrize(
    ("header", "llama"),
    [
        ("license: llama3.1", "Llama 3.1"),
        ("license: other\nlicense_name: llama-3-community", "Llama 3"),
        ("license: apache-2.0", None),
        ("license: [not, text]", None),
        ("a: [", None),
    ],
)
def test_licences_are_read_from_the_base_models_card(header: str, llama: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{header}\n---\ntext\n")
    licence = Licence.of(tmp_path)
    assert licence.llama == llama
    assert ("Built with Llama" in licence.words()) == (llama is not None)
    assert Licence.of(tmp_path / "nowhere").fields == {}


def test_loose_files_are_no_part_of_a_unit(tmp_path: Path) -> None:
    def write(aside: Path) -> dict[str, Any]:
        (aside / "kept").write_text("1")
        (aside / "card").write_text("2")
        return {}

    unit = artifacts.publish_folder(tmp_path / "unit", {}, write, loose=["card"])
    artifacts.write_text(unit.path / "card", "longer")
    artifacts.check_contents(unit.path)
    assert artifacts.content_of(unit.path) == unit.content
