"""`widths:` in a config: a search on the teacher and on narrower ones, the best of which goes on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from puzzle import pipeline
from puzzle.artifacts import read_events, read_unit
from puzzle.cli import main
from puzzle.evaluate import compared
from puzzle.pipeline import solve
from puzzle.run import Run
from puzzle.search.constraints import teacher_value
from puzzle.search.metrics import Setting
from puzzle.search.pareto import front
from puzzle.stages.common import sequences_of
from puzzle.teacher import Compute, load_model
from puzzle.types import InfeasibleError, OutOfTimeError, Solution
from puzzle.widths import Widths, best, joint_front, rank, too_large
from tests.pipeline.conftest import Project, copied, offering
from tests.pipeline.test_prune import as_pruning


def opened(project: Project, *overrides: str) -> Widths:
    found = Widths.open(project.config, overrides)
    assert found is not None
    return found


def test_each_width_is_searched_and_the_best_goes_on(searched: Project, capsys: pytest.CaptureFixture[str]) -> None:
    runs = dict(opened(searched).runs())
    assert list(runs) == ["32/1-search", "24/1-prune", "24/2-search"]
    whole, base, narrow = runs.values()
    assert (whole.shape.hidden_size, narrow.shape.hidden_size) == (32, 24)
    assert narrow.config.teacher == str(base.checkpoint) and base.config.kd.tokens == 64
    assert "data" not in {event["stage"] for event in read_events(narrow.events)}  # taken over
    chosen = best([whole, narrow])
    answers = {run.folder: solve(run, {})[0].objective_nats for run in (whole, narrow)}
    assert answers[chosen.folder] == min(answers.values())
    assert [run.folder for run in (whole, narrow) if (run.folder / "students").exists()] == [chosen.folder]
    assert (chosen.checkpoint / "README.md").is_file()

    assert main(["--debug", "search", str(searched.config)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert "hidden size" in table[0]
    assert [line.split()[0] for line in table[1:3]] == ["32", "24"]
    assert f"{answers[narrow.folder]:.4f}" in table[2]
    assert main(["--debug", "status", str(searched.config)]) == 0
    assert "step 24/1-prune" in capsys.readouterr().out


def test_the_objective_is_the_base_s_own_loss_and_what_is_added_to_it(searched: Project) -> None:
    whole, narrow = opened(searched).searches()
    compute = Compute(torch.device("cpu"), bf16=False)
    models = [load_model(run.teacher, compute) for run in (narrow, whole)]
    found = compared(*models, sequences_of(narrow, "score", 4))
    table = narrow.read_scores()
    assert table.base["kl"].per_sequence == pytest.approx(found.kl_nats.tolist(), rel=1e-4)
    assert table.base["ce_delta"].mean == pytest.approx((found.ce_nats - found.teacher_ce_nats).mean().item(), abs=1e-5)
    assert found.kl_nats.mean() > 0.01
    solution = solve(narrow, {})[0]
    alone = table.means(narrow.items_of(solution), "kl")
    assert solution.objective_nats == pytest.approx(found.kl_nats.mean().item() + sum(alone.values()), rel=1e-4)
    assert not whole.read_scores().base


def test_percentages_are_of_the_teacher_at_every_width(searched: Project) -> None:
    whole, narrow = opened(searched).searches()
    for own, other in zip(narrow.problems(), whole.problems(), strict=True):
        limits = [{row.written.split(" of ")[0]: (row.lower, row.upper) for row in one.rows} for one in (own, other)]
        assert len(limits[0]) == 3 and limits[0] == limits[1]
    assert teacher_value("params", Setting(narrow.shape)) < teacher_value("params", Setting(whole.shape))
    assert Run.open(narrow.folder).problems()[0].rows[0].upper == whole.problems()[0].rows[0].upper  # alone, too


def test_one_front_of_all_widths(searched: Project, capsys: pytest.CaptureFixture[str]) -> None:
    runs = opened(searched).searches()
    fronts = [(run.shape.hidden_size, front(run.problems()[0], "params")) for run in runs]
    every = [(c, o, size) for size, one in fronts for c, o in zip(one.cost, one.objective, strict=True)]
    expected = sorted(
        point
        for point in every
        if not any(c <= point[0] and o <= point[1] and (c, o) != point[:2] for c, o, _ in every)
    )
    found = joint_front(fronts)
    assert [tuple(row) for row in found[["params", "kl_nats", "hidden size"]].to_numpy()] == [
        tuple(map(float, point)) for point in expected
    ]
    assert main(["--debug", "pareto", str(searched.config), "--points", "5"]) == 0
    *sizes, header, one, two, three, four, five, last = capsys.readouterr().out.splitlines()
    assert sorted(sizes) == [f"hidden size {size} at chat batch size 1" for size in (24, 32)]
    assert header.split() == ["point", "params", "kl_nats", "hidden", "size"] and "pareto.csv" in last
    assert np.isin([int(line.split()[-1]) for line in (one, two, three, four, five)], [24, 32]).all()
    assert (searched.run / "pareto" / "pareto.csv").is_file()
    assert main(["pareto", str(searched.config), "--cost", "params", "--cost", "chat.memory_gib"]) == 2


def test_a_width_that_is_too_large_is_left_out(
    searched: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit just below the fewest parameters of the teacher's own width."""
    searched = copied(searched, tmp_path / "project")
    runs = opened(searched).searches()
    least = [min(front(run.problems()[0], "params").cost) for run in runs]
    limit = searched.folder / "small.yaml"
    limit.write_text(f"constraints: {{params: {int(least[0]) - 1}}}\n")
    offered = Widths.open(searched.config, constraints=str(limit))
    assert offered is not None
    (only,) = offered.searches()
    assert only.shape.hidden_size == 24
    error = too_large(next(run for name, run in offered.runs() if name == "32/1-search"))
    assert error is not None and str(error).startswith("hidden size 32: ")
    assert main(["validate", str(searched.config), "--constraints", str(limit)]) == 0
    assert "32/1-search: left out" in capsys.readouterr().out
    capsys.readouterr()
    assert main(["--debug", "run", str(searched.config), "--constraints", str(limit), "--redo", "search"]) == 0
    out = capsys.readouterr().out
    assert "left out: hidden size 32" in out and "hidden size 24 is the best" in out
    assert main(["search", str(searched.config), "--constraints", str(limit)]) == 0
    assert "left out: hidden size 32" in capsys.readouterr().out
    assert only.distilling.shape.hidden_size == 32
    figures = read_unit(only.evaluation).payload["quality"]["student"]
    assert figures["kd_teacher_kl_nats"]["mean"] > 0
    assert main(["refine", str(only.folder)]) == 2
    assert "are of changes to the teacher alone" in capsys.readouterr().err
    limit.write_text("constraints: {params: 100}\n")
    assert main(["search", str(searched.config), "--constraints", str(limit)]) == 3
    # the inverse question: the cheapest that is good enough
    limit.write_text(f"objective: params\nconstraints: {{kl_nats: {{max: {1e9}}}}}\n")
    inverse = Widths.open(searched.config, constraints=str(limit))
    assert inverse is not None
    assert best(inverse.searches()).shape.hidden_size == 24
    assert rank(solve(best(inverse.searches()), {})[0]) == pytest.approx(min(least))


def test_estimated_scores_and_lists_of_values(
    searched: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A base's own KL is measured, and so is what decides; where a value cannot be met, which one of what size."""
    project = copied(searched, tmp_path / "project")
    text = project.config.read_text()
    project.config.write_text(text.replace("score: {sequences: 4}", "score: {sequences: 4, mode: one-pass}"))
    limit = project.folder / "limit.yaml"
    limit.write_text(limit.read_text().replace("params: 80%", "params: {values: [70%, 1%]}"))
    for run in opened(project).searches():
        assert main(["--debug", "score", str(run.folder), "--set", "score.mode=one-pass", "--redo"]) == 0
    assert main(["search", str(project.config)]) == 4
    assert "run `puzzle rescore RUN` first" in capsys.readouterr().err
    for command in ("rescore", "search", "validate"):
        capsys.readouterr()
        assert main(["--debug", command, str(project.config)]) == 0
        if command == "search":
            out = capsys.readouterr().out
    assert [line.split()[:2] for line in out.splitlines()[1:5]] == [["32", "1"], ["32", "2"], ["24", "1"], ["24", "2"]]
    for size in (32, 24):
        assert f"\nhidden size {size}, pick 2: " in out and f"hidden size {size}, pick 1: " not in out
    assert "the best of one pick: puzzle run … --pick N" in out

    picked = Widths.open(project.config, pick=1)
    assert picked is not None
    narrow = picked.searches()[1]
    table, solution = narrow.read_scores(), solve(narrow, {})[0]
    assert {"exact", "one-pass"} == {score.method for score in table.scores.values()}
    chosen = [item for item in solution.items if (item, "kl") in table.scores]
    assert chosen and {table.score(item, "kl").method for item in chosen} == {"exact"}
    measured = opened(searched).searches()[1].read_scores().base["kl"]
    assert table.base["kl"].per_sequence == measured.per_sequence
    alone = sum(table.score(item, "kl").mean for item in chosen)
    assert solution.objective_nats == pytest.approx(measured.mean + alone)
    for command in ("pareto", "status"):
        assert main(["--debug", command, str(project.config), "--pick", "1"]) == 0
    for command in ("validate", "search", "run"):
        capsys.readouterr()
        assert main([command, str(project.config), "--pick", "2"]) == 3
        assert "hidden size 32, pick 2: " in capsys.readouterr().err
    assert main(["run", str(project.config)]) == 2
    assert "asks for 2 searches" in capsys.readouterr().err


def test_a_search_that_ran_out_of_time_is_not_the_best(searched: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    too_late: set[int] = set()

    def by_then(run: Run, inputs: dict[str, str]) -> tuple[Solution, ...]:
        if run.shape.hidden_size in too_late:
            raise OutOfTimeError("nothing in time", 0.0)
        return solve(run, inputs)

    monkeypatch.setattr(pipeline, "solve", by_then)
    too_late.add(32)
    assert best(opened(searched).searches()).shape.hidden_size == 24
    too_late.add(24)
    with pytest.raises(InfeasibleError, match="hidden size 32: nothing in time; hidden size 24: nothing in time"):
        best(opened(searched).searches())


def test_before_a_base_is_there(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    offering(project, '["75%"]')
    assert main(["--debug", "validate", str(project.config)]) == 0
    out = capsys.readouterr().out
    assert "24/1-prune: valid (hidden size 32 → 24)" in out and "24/2-search: known when" in out
    assert main(["--debug", "run", str(project.config), "--dry-run"]) == 0
    assert "students/pruned-" in capsys.readouterr().out and not project.run.exists()
    for setting, said in (("space=nofile", "nofile"), ("tournament.candidates=2", "tournament.candidates is 2")):
        for command in ("validate", "run"):  # of what is to be searched on the base
            assert main([command, str(project.config), "--set", setting]) == 2
            assert said in capsys.readouterr().err and not project.run.exists()
    assert main(["search", str(project.config)]) == 2
    assert "24/2-search: its teacher is not made yet; `puzzle run` makes it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ("[100%, 64]", "prune.hidden_size is 64, but the teacher has 32"),
        ("[75%, 24]", "widths.sizes: 75% and 24 are both 24; leave one out"),
        ("[32, 100%]", "widths.sizes: 32 and 100% are both 32; leave one out"),
        ("[18]", "4 query heads do not divide a hidden size of 18"),
        ("75%", "widths.sizes: give a list"),
        ("[]", "there is nothing to choose from"),
        ("[0]", "give a whole number, or a percentage"),
    ],
)
def test_sizes_that_cannot_be(project: Project, sizes: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    offering(project, sizes)
    for command in ("validate", "run", "search"):
        assert main([command, str(project.config)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line and str(project.config) in line


def test_where_widths_cannot_be(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(command: str, *more: str) -> str:
        assert main([command, str(project.config), *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    offering(project, "[24]")
    assert "offers several widths" in said("distill")
    assert "widths: give a section" in said("validate", "--set", "widths=24")
    assert "refine is of changes to the teacher alone" in said("run", "--set", "refine.evaluations=3")
    assert "offers several widths" in said("run", "--on", str(tmp_path / "architecture.json"))
    as_pruning(project, "prune: {num_layers: 1, layers_by: [0]}\n")
    assert "widths are of a search; a pruning takes prune.hidden_size" in said("validate")
    text = project.config.read_text().replace("prune: {num_layers: 1, layers_by: [0]}", "")
    kept = [line for line in text.splitlines() if not line.startswith(("constraints", "space"))]
    project.config.write_text("\n".join([*kept, "steps: [{prune: {num_layers: 1, layers_by: [0]}}]", ""]))
    assert "widths" in said("validate")
    lines = [line for line in kept if not line.startswith("widths")]
    project.config.write_text("\n".join([*lines, "steps: [{constraints: half-memory, widths: {sizes: [24]}}]", ""]))
    assert "widths in a chain of steps" in said("validate")
