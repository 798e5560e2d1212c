"""The score stage: what it may hold changes no bit; sequences until told apart; on top of a model; runs; tasks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from puzzle.artifacts import read_unit
from puzzle.blocks.stream import OnDisk
from puzzle.cli import main
from puzzle.memory_plan import OnePassPlan, ScorePlan
from puzzle.plans import plan_additivity
from puzzle.report import additivity
from puzzle.run import Run
from puzzle.scoring.interactions import InteractionModel
from puzzle.scoring.sampling import may_reach
from puzzle.tables import read_truth
from puzzle.types import from_json
from tests.pipeline.conftest import Project


@pytest.fixture
def copy(finished: Project, tmp_path: Path) -> Project:
    project = finished.copy_to(tmp_path / "project")
    shutil.copytree(finished.run, project.run)
    return project


def scores(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.glob("*.json"))}


def lengths(project: Project) -> dict[str, set[int]]:
    """How many sequences the scores of each unit rest on."""
    units = {path.stem: read_unit(path) for path in (project.run / "scores").glob("*.json")}
    return {name: {len(score["per_sequence"]) for score in unit.payload["scores"]} for name, unit in units.items()}


@pytest.mark.parametrize("plan", [ScorePlan(False, 1, 1, 0), ScorePlan(True, 3, 3, 2)])
def test_how_much_may_be_held_changes_no_bit(copy: Project, plan: ScorePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    from puzzle.stages import common, score

    monkeypatch.setattr(common, "BATCH_SEQUENCES", 1)
    settings = [str(copy.config), "--redo", "--set", "score={sequences: 2, until_se: 1e-9}"]
    assert main(["--debug", "score", *settings]) == 0
    before = scores(copy.run / "scores")
    assert max(map(max, lengths(copy).values())) > 2
    files = []
    monkeypatch.setattr(score, "plan_scores", lambda *_: plan)
    monkeypatch.setattr(score, "OnDisk", lambda path: (files.append(path), OnDisk(path))[1])
    assert main(["--debug", "score", *settings]) == 0
    assert scores(copy.run / "scores") == before
    assert len(files) >= 2 and not any(path.exists() for path in files)


def test_the_budget_is_a_flag(copy: Project) -> None:
    before = scores(copy.run / "scores")
    shutil.rmtree(copy.run / "scores")
    assert main(["--debug", "score", str(copy.config), "--memory-budget", "0.0005"]) == 0
    assert scores(copy.run / "scores") == before


def test_a_budget_that_no_change_fits_in_is_refused(copy: Project, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(copy.run / "scores")
    assert main(["score", str(copy.config), "--memory-budget", "0.0001"]) == 2
    assert "score: one change on one batch needs 0.00 GiB" in capsys.readouterr().err


def test_sequences_are_added_where_variants_are_not_told_apart(copy: Project) -> None:
    settings = [str(copy.config), "--set", "score.sequences=2"]
    assert main(["--debug", "score", *settings, "--redo", "--until-se", "100"]) == 0
    assert set.union(*lengths(copy).values()) == {2}
    assert main(["--debug", "score", *settings, "--until-se", "1e-9"]) == 0  # goes on, without --redo
    found = lengths(copy)
    assert all(len(of) == 1 for of in found.values())  # all of a site met the same sequences
    assert max(max(of) for of in found.values()) > 2
    longest = max(found, key=lambda name: max(found[name]))
    first = json.loads((copy.run / "scores" / f"{longest}.json").read_text())["payload"]["scores"]
    assert main(["--debug", "score", str(copy.config), "--redo", "--set", "score.sequences=2"]) == 0
    few = json.loads((copy.run / "scores" / f"{longest}.json").read_text())["payload"]["scores"]
    for many, score in zip(first, few, strict=True):
        assert many["per_sequence"][:2] == score["per_sequence"]
    assert main(["--debug", "search", *settings]) == 0  # what was added makes nothing stale


def test_changes_to_a_model_that_is_partly_compressed(copy: Project) -> None:
    run = Run.open(copy.config)
    context = run.solution / "architecture.json"
    assert main(["--debug", "score", str(copy.config), "--on", str(context)]) == 0
    on = Run.open(copy.config, context_file=context)
    assert on.scores != run.scores and on.context
    table = on.read_scores()
    in_place = {item.id for item in on.context}
    for item in on.context:
        assert table.score(item.id, "kl").mean == 0.0
        assert table.score(item.id, "kl").context_id == on.context_id
    back = [f"{item.sites[0]}.keep" for item in on.context]
    assert min(table.score(item_id, "kl").mean for item_id in back) < 0 < table.base["kl"].mean
    assert main(["--debug", "search", str(copy.config), "--on", str(context)]) == 0
    (solution,) = on.solutions()
    increments = sum(table.score(i, "kl").mean for i in solution.items if (i, "kl") in table.scores)
    assert solution.objective_nats == pytest.approx(table.base["kl"].mean + increments)
    assert solution.objective_nats <= table.base["kl"].mean  # the context itself keeps the bounds
    assert in_place <= {item.id for item in on.items}
    assert main(["--debug", "search", str(copy.config)]) == 0  # and the teacher's own are untouched
    assert run.solutions()[0].items == Run.open(copy.config).solutions()[0].items


def test_an_architecture_that_is_not_on_offer_is_no_context(copy: Project, capsys: pytest.CaptureFixture[str]) -> None:
    (copy.folder / "other.json").write_text('{"L000.attention": "gqa-1"}')
    assert main(["score", str(copy.config), "--on", str(copy.folder / "other.json")]) == 2
    assert "other.json: L000.attention: gqa-1 is not on offer in the search space" in capsys.readouterr().err
    (copy.folder / "other.json").write_text('{"L009.ffn": "skip"}')
    assert main(["score", str(copy.config), "--on", str(copy.folder / "other.json")]) == 2
    assert "L009.ffn: the teacher has no such site" in capsys.readouterr().err


def test_runs_of_layers_are_scored_and_chosen_as_one(copy: Project) -> None:
    with open(copy.folder / "space.yaml", "a") as file:
        file.write("runs: 2\n")
    assert main(["--debug", "score", str(copy.config)]) == 0
    table = Run.open(copy.config).read_scores()
    one, both = table.score("L001-L001.skip", "kl"), table.score("L000-L001.skip", "kl")
    apart = [table.score(f"L001.{part}.skip", "kl").mean for part in ("attention", "ffn")]
    assert one.mean != pytest.approx(sum(apart), rel=1e-3)
    (copy.folder / "limit.yaml").write_text(f"constraints: {{params: {128 * 32 + 32}}}\n")  # nothing but the embedding
    assert main(["--debug", "search", str(copy.config)]) == 0
    (solution,) = Run.open(copy.config).solutions()
    assert solution.items == ("L000-L001.skip",)  # not its parts, whose sum may be less
    assert solution.objective_nats == pytest.approx(both.mean)
    assert main(["--debug", "pareto", str(copy.config)]) == 0
    smallest = (copy.run / "pareto" / "pareto.csv").read_text().splitlines()[1].split(",")
    assert float(smallest[2]) == pytest.approx(both.mean)
    assert (
        main(
            [
                "--debug",
                "shrink",
                str(copy.config),
                str(copy.folder / "pairs.yaml"),
                "--within",
                "10",
                "--least-share",
                "0",
            ]
        )
        == 0
    )
    assert "runs: 2" in (copy.folder / "pairs.yaml").read_text()


def test_a_task_of_the_users_own_is_scored(copy: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy.folder)
    Path("mine.py").write_text(
        "def spread(final, head, batch):\n    return head(final).float().std(-1).mean(-1)\n", encoding="utf-8"
    )
    assert main(["--debug", "score", str(copy.config), "--redo", "--set", "score.tasks={spread: 'mine:spread'}"]) == 0
    score = Run.open(copy.config).read_scores().score("L000.ffn.skip", "spread")
    assert len(score.per_sequence) == 4 and score.mean != 0
    with open(copy.folder / "limit.yaml", "a") as file:
        file.write("objective: spread\n")
    assert main(["--debug", "search", str(copy.config), "--set", "score.tasks={spread: 'mine:spread'}"]) == 0
    table = Run.open(copy.config).read_scores()
    (solution,) = Run.open(copy.config, ["score.tasks={spread: 'mine:spread'}"]).solutions()
    chosen = [item_id for item_id in solution.items if not item_id.endswith("keep")]
    assert solution.objective_nats == pytest.approx(sum(table.score(item_id, "spread").mean for item_id in chosen))


def test_a_task_that_is_not_there_is_named(copy: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", str(copy.config), "--redo", "--set", "score.tasks={x: 'nowhere:f'}"]) == 2
    assert "score.tasks.x: nowhere:f: No module named 'nowhere'" in capsys.readouterr().err


def test_an_estimate_is_trusted_where_its_upper_bound_is_small_enough() -> None:
    from puzzle.stages.score import Measured

    near, far = torch.tensor([0.24, 0.34] * 4), torch.tensor([0.15, 0.25] * 4)
    assert near.mean() < 0.3 and not Measured({"kl": near}, 1, "one-pass").trusted  # 0.29 + 2 * 0.019
    assert Measured({"kl": far}, 1, "one-pass").trusted
    assert Measured({"kl": near}, 1, "exact").trusted
    assert not Measured({"kl": far * torch.nan}, 1, "one-pass").trusted


def test_estimated_scores_and_what_decides_a_search_measured_again(copy: Project) -> None:
    settings = [str(copy.config), "--set", "score.mode=one-pass"]
    exact = Run.open(copy.config).read_scores()
    assert main(["--debug", "score", *settings, "--redo"]) == 0
    run = Run.open(copy.config, ["score.mode=one-pass"])
    table = run.read_scores()
    methods = {score.method for score in table.scores.values()}
    assert "one-pass" in methods
    for score in table.scores.values():
        if score.method == "exact":  # too large to be estimated
            assert score.per_sequence == exact.score(score.item_id, score.metric).per_sequence
        else:
            assert score.metric == "kl" and not may_reach(score.per_sequence, 0.3)
            assert 0.1 < score.mean / exact.score(score.item_id, "kl").mean < 10
    assert main(["--debug", "rescore", *settings]) == 0
    assert main(["--debug", "search", *settings]) == 0
    (solution,) = run.solutions()
    measured = run.read_scores()
    for item_id in solution.items:
        if not item_id.endswith("keep"):
            assert measured.score(item_id, "kl") == exact.score(item_id, "kl")


def test_how_many_batches_and_variants_a_pass_takes_changes_no_bit(
    copy: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    from puzzle.stages import common, score

    monkeypatch.setattr(common, "BATCH_SEQUENCES", 1)
    settings = [str(copy.config), "--set", "score.mode=one-pass", "--redo"]
    found = []
    for chunk, variant_bytes in ((1, 0.0), (3, 10_000.0), (4, 1e9)):
        plan = OnePassPlan(chunk, variant_bytes)
        monkeypatch.setattr(score, "plan_one_pass", lambda *_, plan=plan: plan)
        assert main(["--debug", "score", *settings]) == 0
        found.append(scores(copy.run / "scores"))
    assert found[0] == found[1] == found[2]


def test_what_was_measured_again_for_one_limit_is_not_for_another(
    copy: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    from puzzle.scoring.exact import Scorer

    settings = [str(copy.config), "--set", "score.mode=one-pass"]
    assert main(["--debug", "score", *settings, "--redo"]) == 0
    scored, scores_of = [], Scorer.scores
    monkeypatch.setattr(Scorer, "scores", lambda self, changes: scores_of(self, scored.append(changes) or changes))
    assert main(["--debug", "rescore", *settings]) == 0
    assert scored
    first = {change.name for changes in scored for change in changes}
    scored.clear()
    (copy.folder / "other.yaml").write_text((copy.folder / "limit.yaml").read_text().replace("80%", "81%"))
    assert main(["--debug", "rescore", *settings, "--constraints", str(copy.folder / "other.yaml")]) == 0
    assert not first & {change.name for changes in scored for change in changes}


def test_exact_scores_leave_nothing_to_measure_again(copy: Project) -> None:
    assert main(["--debug", "rescore", str(copy.config)]) == 0
    assert not (copy.run / "rescored").exists()


def test_additivity_is_reported_resumed_and_kept(copy: Project, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--debug", "additivity", str(copy.config), "--architectures"]
    assert main([*command, "8"]) == 0
    assert "too few to fit a model; it takes 20" in capsys.readouterr().out
    truth = copy.run / "truth" / "score"
    first = {path.name: path.read_text() for path in truth.glob("*.json")}
    assert len(first) == 8
    assert main([*command, "40"]) == 0
    out = capsys.readouterr().out
    assert "near-optimal mild" in out and "<- best" in out
    assert (copy.run / "additivity" / "additivity.png").read_bytes().startswith(b"\x89PNG")
    assert first.items() <= {path.name: path.read_text() for path in truth.glob("*.json")}.items()
    run = Run.open(copy.config, ["additivity.architectures=40"])
    model = from_json(InteractionModel, json.loads((copy.run / "additivity" / "model.json").read_text()), "model.json")
    one = next(iter(run.draws.values()))
    changed = [item_id for item_id in one.items if not item_id.endswith("keep")]
    assert model.predict(changed).mean > 0


def test_an_architecture_of_one_change_is_its_score(copy: Project) -> None:
    assert main(["--debug", "additivity", str(copy.config), "--architectures", "40"]) == 0
    run = Run.open(copy.config, ["additivity.architectures=40"])
    table, found = run.read_scores(), additivity.evaluations(run)
    for one in found.values():
        if len(one.items) == 1:
            assert one.kl_nats == pytest.approx(table.score(one.items[0], "kl").mean, rel=1e-6)
    frame = additivity.frame(run)
    assert (frame.true_nats > 0).all() and len(frame) == 40


def test_additivity_is_about_the_teacher(copy: Project, capsys: pytest.CaptureFixture[str]) -> None:
    context = str(Run.open(copy.config).solution / "architecture.json")
    assert main(["--debug", "score", str(copy.config), "--on", context]) == 0
    assert main(["additivity", str(copy.config), "--on", context]) == 2
    assert "leave out --on" in capsys.readouterr().err


def test_additivity_can_be_done_anew(copy: Project) -> None:
    command = ["--debug", "additivity", str(copy.config), "--architectures", "4"]
    assert main(command) == 0
    fewer = ["--set", "score.sequences=3"]
    assert main(["--debug", "score", str(copy.config), *fewer, "--redo"]) == 0
    assert main([*command, *fewer, "--redo"]) == 0
    run = Run.open(copy.config, ["score.sequences=3", "additivity.architectures=4"])
    assert {len(read_truth(unit.path)["kl"].per_sequence) for unit in plan_additivity(run)} == {3}


def test_the_dtype_that_is_scored_in_is_an_input(copy: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", str(copy.config), "--set", "dtype=bf16"]) == 6
    assert "--redo" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["kl", "ce_delta_nats", "agreement"])
def test_a_task_may_not_take_the_name_of_a_score(copy: Project, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", str(copy.config), "--set", f"score.tasks={{{name}: 'mine:f'}}"]) == 2
    assert f"{name} is a score already; choose another name" in capsys.readouterr().err


def test_rescoring_goes_on_where_it_was(copy: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from puzzle.stages.score import ScoreJob

    settings = [str(copy.config), "--set", "score.mode=one-pass"]
    assert main(["--debug", "score", *settings, "--redo"]) == 0
    measured, payload = [], ScoreJob.payload

    def killed_at_the_third(self: ScoreJob, *args: object) -> object:
        measured.append(args)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return payload(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(ScoreJob, "payload", killed_at_the_third)
    assert main(["rescore", *settings]) == 130
    kept = {path.name: path.stat().st_mtime_ns for path in (copy.run / "rescored").glob("L*.json")}
    assert len(kept) == 2
    assert main(["--debug", "rescore", *settings]) == 0
    now = {path.name: path.stat().st_mtime_ns for path in (copy.run / "rescored").glob("L*.json")}
    assert kept.items() <= now.items() and len(now) > 2
