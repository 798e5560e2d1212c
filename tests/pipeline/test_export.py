"""`puzzle export`: the formats that the config or the constraint file ask for, and what is found beforehand."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)

from puzzle.artifacts import MARKER, read_unit
from puzzle.cli import main
from puzzle.export import publish
from puzzle.export.verify import RUNTIMES, Verdict
from puzzle.plans import export_formats
from puzzle.run import Run
from puzzle.validate import validate
from tests.pipeline.conftest import Project


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    def passed(_folder: Path, runtime: str, *_: object) -> Verdict:
        return Verdict(runtime, "1.0", dict.fromkeys(RUNTIMES[runtime].checks, 0.0))

    monkeypatch.setattr(publish, "verify", passed)  # clean processes are slow, and tested elsewhere


def test_another_format_is_added_beside_the_first(copy: Project, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run.open(copy.config)
    first = read_unit(run.student / "export" / "hf")
    assert main(["--debug", "export", str(copy.config), "--target", "nemotron-nas", "--target", "hf"]) == 0
    assert "torch 1.0: passed" in capsys.readouterr().out
    assert read_unit(run.student / "export" / "hf") == first
    folder = run.student / "export" / "nemotron-nas"
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "nemotron-nas" and len(config["block_configs"]) == run.shape.num_layers
    card = (folder / "README.md").read_text()
    assert 'base_model: "teacher"' in card and 'base_model_relation: "finetune"' in card
    assert "ffn_multiple_of" not in card and "memory_gib: 80%" in card and "sequence_tokens: 16" in card
    assert "| student before GKD |" in card and "95 % interval" in card and "| 0 | " in card


def test_what_a_student_is_served_on_decides_its_formats(project: Project) -> None:
    limit = project.folder / "limit.yaml"
    limit.write_text(limit.read_text() + "serve_on: [transformers, vllm, mlx-lm]\n")
    assert export_formats(Run.open(project.config)) == ("hf", "nemotron-nas", "mlx")
    run = Run.open(project.config, ["export.targets=[mlx]"])
    assert export_formats(run) == ("mlx",)
    validate(run)


def test_formats_that_cannot_hold_the_teacher_are_found_first(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    path = project.folder / "teacher" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_act": "gelu"}))
    assert main(["validate", str(project.config), "--set", "export.targets=nemotron-nas"]) == 2
    assert "silu only, and the teacher has 'gelu'" in capsys.readouterr().err
    assert main(["validate", str(project.config), "--set", "export.targets=onnx"]) == 2
    assert "export.targets" in capsys.readouterr().err


@dataclass
class Hub:
    """Stands in for HfApi: repositories by name, whether they are private, and what was uploaded to them."""

    private: dict[str, bool] = field(default_factory=dict)
    uploaded: dict[str, set[str]] = field(default_factory=dict)
    error: Exception | None = None

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        if self.error:
            raise self.error
        self.private.setdefault(repo_id, private)

    def repo_info(self, repo_id: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.private[repo_id])

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> str:
        self.uploaded[repo_id] = {path.name for path in folder_path.iterdir()}
        return f"https://huggingface.co/{repo_id}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: stand_in)
    return stand_in


def test_an_export_is_uploaded_privately(copy: Project, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", str(copy.config), "--push-to-hub"]
    assert main(["--debug", *command, "me/student"]) == 0
    assert capsys.readouterr().out.endswith("https://huggingface.co/me/student\n")
    assert hub.private == {"me/student": True}
    assert {"config.json", "model.safetensors", "README.md", "unit.json"} <= hub.uploaded["me/student"]
    hub.private["me/known"] = False
    assert main([*command, "me/known"]) == 2
    assert "me/known is public: say --public" in capsys.readouterr().err
    assert "me/known" not in hub.uploaded
    assert main(["--debug", *command, "me/known", "--public"]) == main([*command, "me/new", "--public"]) == 0
    assert hub.private == {"me/student": True, "me/known": False, "me/new": False}
    assert set(hub.uploaded) == set(hub.private)
    assert main([*command, "me/more", "--target", "hf", "--target", "mlx"]) == 2
    assert "takes one format, and there are hf, mlx; choose with --target" in capsys.readouterr().err
    assert main([*command[:2], "--public"]) == 2
    assert "give --push-to-hub ORG/NAME, too" in capsys.readouterr().err


def test_what_is_not_verified_or_not_whole_is_not_uploaded(
    copy: Project, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, command = Run.open(copy.config).checkpoint, ["export", str(copy.config), "--push-to-hub", "me/student"]
    untried = Verdict("transformers", reason="not installed here")
    publish.note_verdicts(folder, [untried], [])
    assert main(command) == 1
    assert "no runtime has loaded it; run `puzzle verify" in capsys.readouterr().err
    assert not hub.uploaded
    assert main([*command, "--unverified"]) == 0
    wrong = Verdict("transformers", "1.0", dict.fromkeys(RUNTIMES["transformers"].checks, 0.5))
    publish.note_verdicts(folder, [wrong], [])
    assert main([*command, "--unverified"]) == 1
    assert "transformers 1.0: FAILED" in capsys.readouterr().err
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[::-1])
    assert main([*command, "--unverified"]) == 5
    assert "its checksum differs" in capsys.readouterr().err


def _refused(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    return kind(f"{status} of the hub\nmore", response=SimpleNamespace(status_code=status, headers={}, request=None))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (_refused(HfHubHTTPError, 401), "not to be written with your token; run `hf auth login`"),
        (_refused(HfHubHTTPError, 403), "not to be written with your token"),
        (_refused(RepositoryNotFoundError, 401), "not to be written with your token"),
        (_refused(GatedRepoError, 403), "gated; accept its terms on the hub"),
        (_refused(HfHubHTTPError, 500), "not to be written (500 of the hub)"),
        (LocalTokenNotFoundError("no token"), "not to be written without a token; run `hf auth login`"),
        (HFValidationError("bad name"), "no name of a repository; write ORGANISATION/NAME"),
        (RuntimeError("nobody there"), "not to be reached (nobody there)"),
    ],
)
def test_what_the_hub_says_is_said_in_words(
    error: Exception, message: str, copy: Project, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.error = error
    assert main(["export", str(copy.config), "--push-to-hub", "me/student"]) == 2
    assert f"--push-to-hub: me/student is {message}" in capsys.readouterr().err
    assert not hub.uploaded


def test_an_export_from_before_formats_were_units_is_stale(copy: Project, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Run.open(copy.config).checkpoint
    (folder / MARKER).rename(folder.parent / MARKER)  # where it was then
    assert main(["--debug", "status", str(copy.config)]) == 0
    assert re.search(r"^export +1 stale", capsys.readouterr().out, re.M)
    assert main(["export", str(copy.config)]) == 6
    assert "was made from other inputs (changed: layout); run again with --redo export" in capsys.readouterr().err
    assert main(["--debug", "export", str(copy.config), "--redo"]) == 0
    assert (folder / MARKER).is_file()
