"""`tournament:` in a run: the best on select goes on from where it is, and no rung is repeated after a stop."""

from __future__ import annotations

import shutil
import statistics

import pytest
from safetensors.torch import load_file, save_file

from puzzle import kd
from puzzle.artifacts import read_unit
from puzzle.checkpoint import read_shape
from puzzle.cli import main
from puzzle.pruning import change
from puzzle.report.summary import Summary
from puzzle.report.tournament import standings
from puzzle.run import Run
from puzzle.types import ConfigError
from tests.pipeline.conftest import Project
from tests.pipeline.test_prune import as_pruning

TOKENS = 32  # one step: batch of 2, sequences of 16 tokens; the whole distillation has 6
ASKED = ["tournament.candidates=4", f"tournament.tokens={TOKENS}"]
SET = [word for one in ASKED for word in ("--set", one)]


@pytest.fixture
def contested(copy: Project) -> Project:
    """A finished run whose constraint file asks for four answers; the search for them is not done yet."""
    limit = copy.folder / "limit.yaml"
    limit.write_text(limit.read_text() + "solutions: {count: 4, min_difference: 0.1}\n")
    return copy


def up_to(project: Project, *stages: str) -> Run:
    for stage in stages:
        assert main(["--debug", stage, str(project.config), *SET]) == 0
    return Run.open(project.config, ASKED)


def test_the_best_on_select_wins_and_goes_on_from_where_it_is(
    contested: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = up_to(contested, "search", "tournament")
    found = read_unit(run.solution).payload["tournament"]
    first, second = found["rungs"]
    assert [len(rung["candidates"]) for rung in found["rungs"]] == [4, 2]
    assert (first["tokens"], second["tokens"]) == (TOKENS, 2 * TOKENS)
    means = [statistics.fmean(kl) for kl in second["kl_nats"]]
    assert found["winner"] == second["candidates"][means.index(min(means))]
    assert run.solutions()[0].items == run.candidates()[found["winner"]].items
    table = capsys.readouterr().out
    assert f"candidate {found['winner'] + 1} of 4 won" in table and f"{min(means):.4f}" in table

    steps: list[int] = []
    whole = kd.Distillation.run

    def counted(self: kd.Distillation, *given: object) -> None:
        steps.append(self.step)
        whole(self, *given)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(kd.Distillation, "run", counted)
        up_to(contested, "build", "kd")
    assert steps[0] == 2
    assert main(["--debug", "evaluate", str(contested.config), *SET]) == 0
    assert (table := standings(run)) is not None and table.markdown() in Summary.of(run).markdown()
    went_on = (run.student / "final" / "model.safetensors").read_bytes()
    assert not (run.student / "tournament").exists()
    # as if there had been no tournament
    assert main(["--debug", "kd", str(contested.config), *SET, "--redo"]) == 0
    assert (run.student / "final" / "model.safetensors").read_bytes() == went_on


def test_candidates_compete_beside_the_teacher_that_distils(
    contested: Project,
) -> None:
    """And what was distilled beside another is not taken up."""
    up_to(contested, "search")
    other = contested.folder / "other"
    shutil.copytree(contested.folder / "teacher", other)
    weights = load_file(other / "model.safetensors")
    save_file({name: 1.1 * tensor for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    runs = []
    for settings in ([], [f"kd.teacher={other}"]):
        where = [word for one in settings for word in ("--set", one)]
        assert main(["--debug", "tournament", str(contested.config), *SET, *where]) == 0
        runs.append(Run.open(contested.config, [*ASKED, *settings]))
    first, second = (read_unit(run.solution).payload["tournament"]["rungs"][0]["kl_nats"] for run in runs)
    assert runs[0].student != runs[1].student
    assert min(map(statistics.fmean, second)) > max(map(statistics.fmean, first))


def test_a_tournament_that_was_stopped_repeats_no_rung_and_ends_as_it_would_have(
    contested: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = up_to(contested, "search")
    whole, trained = kd.Distillation.run, []

    def killed(self: kd.Distillation, *given: object) -> None:
        if len(trained) == 5:
            raise KeyboardInterrupt
        trained.append(self.step)
        whole(self, *given)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(kd.Distillation, "run", killed)
        assert main(["tournament", str(contested.config), *SET]) == 130
        trained.clear()
        assert main(["--debug", "tournament", str(contested.config), *SET]) == 0
        assert trained == [1]
    once = (run.solution / "unit.json").read_bytes()
    assert main(["--debug", "tournament", str(contested.config), *SET, "--redo"]) == 0
    assert (run.solution / "unit.json").read_bytes() == once


GRID = """prune:
  layers_by: contiguous
  grid: {num_layers: [1, 2], intermediate_size: [32, 48], num_key_value_heads: [50%, 2]}
"""


def test_combinations_of_sizes_compete_and_the_winner_is_pruned(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    as_pruning(project, GRID)
    assert main(["--debug", "run", str(project.config), "--dry-run", *SET]) == 0
    assert "student 4" in capsys.readouterr().out
    assert main(["--debug", "run", str(project.config), *SET]) == 0
    run = Run.open(project.config, ASKED)
    found = read_unit(run.contest).payload["tournament"]
    assert len(found["candidates"]) == len(set(found["candidates"])) == 4
    assert [len(rung["candidates"]) for rung in found["rungs"]] == [4, 2]
    assert run.pruning == run.contenders[found["winner"]].pruning
    shape = read_shape(run.student / "export" / "hf")
    assert change(run.shape, shape) == change(run.shape, run.student_shape) == found["candidates"][found["winner"]]
    assert f"candidate {found['winner'] + 1} of 4 won" in capsys.readouterr().out
    # as if that one alone had been asked for
    assert len({path.read_bytes() for path in project.run.glob("students/*/final/model.safetensors")}) == 1
    alone = run.pruning.model_dump_json(exclude_none=True)
    project.config.write_text(project.config.read_text().replace(GRID, f"prune: {alone}\n"))
    for stage in ("prune", "kd"):
        assert main(["--debug", stage, str(project.config)]) == 0
    assert len(list(project.run.glob("students/*/final"))) == 2
    assert len({path.read_bytes() for path in project.run.glob("students/*/final/model.safetensors")}) == 1


def test_what_cannot_be_is_said_before_anything_runs(contested: Project, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*settings: str) -> str:
        assert main(["validate", str(contested.config), *(word for one in settings for word in ("--set", one))]) == 2
        return capsys.readouterr().err

    assert "asks for 4; say there solutions: {count: 5}" in said("tournament.candidates=5", "tournament.tokens=32")
    assert "after 1,000,000 tokens, but kd.tokens is 192" in said("tournament.candidates=4")
    hidden = ["kd.signal=hidden", "kd.cosine_weight=0"]
    assert "set kd.signal: online" in said("tournament.candidates=4", "tournament.tokens=32", *hidden)
    assert "one candidate alone" in said("tournament.candidates=1")
    as_pruning(contested, GRID)
    assert "give both, prune.grid and tournament" in said()
    with pytest.raises(ConfigError, match="give both, prune.grid and tournament"):
        _ = Run.open(contested.config).pruning
    assert "after 1,000,000 tokens" in said("tournament.candidates=4")
    several = "tournament.candidates is 9, but of prune.grid"
    assert several in said("tournament.candidates=9", "tournament.tokens=4")
