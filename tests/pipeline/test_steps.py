"""A chain of compression steps: each starts from the student of the one before."""

from __future__ import annotations

from pathlib import Path

import pytest

from puzzle import artifacts
from puzzle.cli import main
from puzzle.config import PruneConfig
from puzzle.kd.losses import layer_pairs
from puzzle.run import Run
from puzzle.steps import Chain
from puzzle.teacher import load_config
from puzzle.types import ConfigError
from tests.pipeline.conftest import Project

STEPS = """\
steps:
  - prune: {num_layers: 1, layers_by: [0]}
    kd: {kl_weight: 0, cosine_weight: 0, lm_weight: 1, tokens: 64}
  - constraints: CONSTRAINTS
    kd: {teacher: first}
"""


@pytest.fixture
def chain(project: Project) -> Path:
    """The project's config as a chain: depth, then a search."""
    lines = project.config.read_text().splitlines(keepends=True)
    limits, space = (next(line for line in lines if line.startswith(key)) for key in ("constraints", "space"))
    kept = "".join(line for line in lines if line not in (limits, space))
    step = STEPS.replace("CONSTRAINTS", limits.split(": ", 1)[1].strip() + f"\n    {space.strip()}")
    project.config.write_text(kept + step)
    return project.config


def test_each_step_starts_from_the_student_before(
    chain: Path, project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", str(chain)]) == 0
    assert "2-search: known when the step before is done" in capsys.readouterr().out
    assert main(["--debug", "run", str(chain)]) == 0
    folders = {path.name: path for path in (project.run / "steps").iterdir()}
    assert sorted(folders) == ["1-prune", "2-search"]
    opened = Chain.open(chain)
    assert opened is not None
    runs = dict(opened.runs())
    assert runs["2-search"].config.teacher == str(runs["1-prune"].checkpoint)
    assert runs["2-search"].shape.num_layers == 1
    _check_first_distilled(runs["1-prune"], runs["2-search"])
    assert len({artifacts.content_of(run.data) for run in runs.values()}) == 1
    events = artifacts.read_events(runs["2-search"].events)
    assert "data" not in {event["stage"] for event in events}  # taken over, not made again
    before = {name: artifacts.read_unit(run.student / "final").content for name, run in runs.items()}
    assert main(["run", str(chain)]) == 0
    assert before == {name: artifacts.read_unit(run.student / "final").content for name, run in runs.items()}
    capsys.readouterr()
    assert main(["status", str(chain)]) == 0
    assert "step 2-search" in capsys.readouterr().out


def _check_first_distilled(first: Run, second: Run) -> None:
    """The second step's student, of two layers the one that was left, beside the chain's own teacher."""
    assert second.distilling.teacher == first.teacher and second.distilling.shape.num_layers == 2
    student, teacher = load_config(second.student / "final"), load_config(first.teacher)
    assert layer_pairs(student, teacher, False) == ((0, 1),)
    quality = artifacts.read_unit(second.evaluation).payload["quality"]
    of_teacher = [artifacts.read_unit(first.evaluation).payload["quality"]["student"], quality["teacher"]]
    assert of_teacher[1]["kd_teacher_kl_nats"]["mean"] == pytest.approx(of_teacher[0]["kl_nats"]["mean"], rel=1e-3)
    assert of_teacher[1]["kl_nats"]["mean"] == 0
    assert (
        quality["student"]["kd_teacher_kl_nats"]["mean"] < quality["student before GKD"]["kd_teacher_kl_nats"]["mean"]
    )
    assert "from teacher |" in (second.checkpoint / "README.md").read_text()
    reopened = Run.open(second.folder)  # a step by itself knows it, too
    assert reopened.distilling.teacher == first.teacher
    with pytest.raises(ConfigError, match="this run is none; give a folder or a hub id"):
        _ = Run.open(second.folder, ["kd.teacher=first"]).distilling


def test_a_step_that_says_nothing_else_only_trains(tmp_path: Path) -> None:
    config = tmp_path / "chain.yaml"
    correction = "{kl_weight: 0, cosine_weight: 0, lm_weight: 1, tokens: 64}"
    overlay = f"{{kd: {correction}, export: {{targets: gguf}}}}"  # the last step: nothing starts from it
    config.write_text(f"run: {tmp_path}/run\nkd: {{warmup_steps: 1}}\nsteps: [{overlay}]\n")
    opened = Chain.open(config)
    assert opened is not None
    (((name, first)),) = opened.steps
    assert name == "1-train" and first.prune == PruneConfig()
    assert (first.kd.kl_weight, first.kd.cosine_weight, first.kd.lm_weight, first.kd.tokens) == (0, 0, 1, 64)
    assert first.kd.warmup_steps == 1  # the chain's own, which the step leaves as it is


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("steps: {prune: {}}", "steps is a list"),
        ("steps: [{teacher: demo}]", "teacher in step 1"),
        ("space: x\nsteps: [{prune: {num_layers: 1}}]", "space beside steps"),
        ("steps: [{prune: {num_layer: 1}}]", "did you mean 'num_layers'"),
        ("steps: [{kd: {tokens: -1}}, {prune: {num_layers: 0}}]", "kd.tokens"),
        ("steps: [{export: {targets: [gguf]}}, {prune: {num_layers: 1}}]", "of step 1 lacks hf"),
    ],
)
def test_mistakes_are_told_in_one_line_each(tmp_path: Path, step: str, said: str) -> None:
    config = tmp_path / "chain.yaml"
    config.write_text(f"run: {tmp_path}/run\n{step}\n")
    with pytest.raises(ConfigError, match=said) as error:
        Chain.open(config)
    assert all(line.startswith(str(config)) for line in str(error.value).splitlines())


def test_the_line_of_a_mistake_is_that_of_the_step(tmp_path: Path) -> None:
    config = tmp_path / "chain.yaml"
    config.write_text(f"run: {tmp_path}/run\nsteps:\n  - kd: {{tokens: 5}}\n  - prune:\n      num_layers: none\n")
    with pytest.raises(ConfigError, match=rf"{config}:5: prune.num_layers"):
        Chain.open(config)


def test_other_commands_ask_for_a_step(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "library", str(chain)]) == 2
    assert "is a chain of steps" in capsys.readouterr().err
    assert main(["run", str(chain), "--pick", "2"]) == 2
    assert "write it into the step" in capsys.readouterr().err
