"""`puzzle report` on a finished run, one that has hardly begun, one without an answer, and beside a comparison."""

from __future__ import annotations

import pytest

from puzzle.cli import main
from puzzle.report.contents import Comparison, Contents
from puzzle.report.searched import Absent, Search, Trade
from puzzle.run import Run
from tests.pipeline.conftest import Project


def test_a_finished_run_is_told_whole_and_the_same_again(copy: Project, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run.open(copy.config)
    contents = Contents.of(run)
    parts = [contents.summary, contents.layers, contents.search, contents.trained, contents.steps]
    assert not [part for part in parts if isinstance(part, Absent)]
    assert isinstance(contents.search, Search) and isinstance(contents.search.trade, Trade)
    assert contents.search.trade.cost_name == "chat.memory_gib"  # what the constraint file limits
    assert isinstance(contents.compared, Absent) and "puzzle compare RUN --true" in contents.compared.reason
    assert [name for name, _ in contents.recipe.seconds][:3] == ["data", "init", "distill"]
    assert "hf: transformers" in contents.exports[0]
    config = contents.recipe.files[0][1]  # knows the other files by the names that they are to be saved under
    assert "space: space.yaml\n" in config and "constraints: limit.yaml\n" in config and "grid: grid.yaml\n" in config
    pages = []
    for _ in range(2):
        assert main(["--debug", "report", str(copy.config)]) == 0
        assert "| layer | attention | FFN |" in (out := capsys.readouterr().out) and str(run.report) in out
        pages.append(run.report.read_text())
    assert pages[0] == pages[1] == (run.student / "report" / "report.html").read_text()


def test_what_compare_found_is_told_and_finishes_nothing_anew(copy: Project) -> None:
    assert main(["--debug", "compare", str(copy.config)]) == 0
    assert main(["--debug", "report", str(copy.config)]) == 0
    run = Run.open(copy.config)
    compared = Contents.of(run).compared
    assert isinstance(compared, Comparison) and compared.objective == "kl_nats"
    assert [one.name for one in compared.found][:2] == ["MIP", "convex-hull greedy"]
    assert compared.found[0].objective == pytest.approx(run.solutions()[0].objective_nats)
    assert "published greedy" in run.report.read_text()


def test_a_run_that_has_hardly_begun_is_told(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--debug", "data", str(project.config)]) == 0
    assert main(["--debug", "report", str(project.config)]) == 0
    page = Run.open(project.config).report.read_text()
    assert "init: 8 of 8 missing" in page and "<li>data" not in page
    assert "not there yet; run <code>puzzle score RUN</code>" in page
    assert "not there yet: init, distill, score" in capsys.readouterr().out
    assert main(["status", str(project.config)]) == 0
    assert "report     1 missing" in capsys.readouterr().out


def test_where_nothing_keeps_the_limits_there_is_a_front_and_no_answer(copy: Project) -> None:
    tight = copy.folder / "tight.yaml"
    tight.write_text((copy.folder / "limit.yaml").read_text().replace("80%", "0.0000001"))
    changed = [str(copy.config), "--constraints", str(tight)]
    assert main(["search", *changed]) == 3
    assert main(["--debug", "report", *changed]) == 0
    run = Run.open(copy.config, constraints=str(tight))
    contents = Contents.of(run)
    assert isinstance(contents.layers, Absent) and "puzzle search RUN" in contents.layers.reason
    assert isinstance(contents.search, Search) and isinstance(contents.search.trade, Trade)
    assert contents.search.trade.chosen is None and all(point.broken for point in contents.search.trade.points)
    assert 'id="strip"' in run.report.read_text()


def test_what_is_stale_is_named_and_left_out(copy: Project, capsys: pytest.CaptureFixture[str]) -> None:
    changed = ["--set", "score.sequences=3", "--set", "evaluate.sequences=3"]
    assert main(["--debug", "report", str(copy.config), *changed]) == 0
    page = Run.open(copy.config).report.read_text()
    assert "score: 4 of 4 stale – <code>puzzle score RUN --redo</code>" in page
    for stage in ("score", "evaluate"):
        assert f"made from other inputs; run <code>puzzle {stage} RUN --redo</code>" in page
    assert 'id="front"' not in page and 'id="strip"' in page
    assert "not there yet: score, evaluate" in capsys.readouterr().out
