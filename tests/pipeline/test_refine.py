"""`puzzle refine` and `compare --true`: what is chosen on select is reported on report, kept, and gone on with."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from puzzle import plans
from puzzle.artifacts import Unit, read_unit
from puzzle.cli import main
from puzzle.cli_search import _comparison
from puzzle.run import Run
from puzzle.scoring.exact import Scorer
from puzzle.tables import read_truth
from puzzle.variants import variant_name
from tests.pipeline.conftest import Project

EVALUATIONS = 12
REFINED = [f"refine.evaluations={EVALUATIONS}"]


def truths(project: Project) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in (project.run / "truth").rglob("*.json")}


def test_the_winner_on_select_is_reported_on_report_and_gone_on_with(
    copy: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--debug", "refine", str(copy.config), "--evaluations", str(EVALUATIONS)]
    before = Run.open(copy.config)
    assert main(command) == 0
    out = capsys.readouterr().out
    assert f"{EVALUATIONS} true evaluations on select" in out or "the answer stands" in out
    run = Run.open(copy.config, REFINED)
    (solution,) = run.solutions()
    assert solution.found_by == "refine"
    assert run.unrefined.solution == before.solution != run.solution
    (searched,) = run.unrefined.solutions()
    assert (searched.status, searched.gap) == ("optimal", 0.0)
    assert (solution.status, solution.gap) == (
        ("optimal", 0.0) if solution.items == searched.items else ("feasible", None)
    )
    *_, row = read_unit(run.solution).payload["comparison"]
    assert tuple(row["items"]) == solution.items
    figures = {}
    for split in ("select", "report"):
        score = read_truth(plans.truth_of(run, solution.items, split).path)["kl"]
        assert score.split == split
        figures[split] = statistics.fmean(score.per_sequence)
        assert row[split][0] == pytest.approx(figures[split])
        assert f"{figures[split]:.4f}" in out
    assert figures["select"] != figures["report"]
    # everything that was evaluated on select is no better there; report was asked of the contenders alone
    on_select = [read_truth(path)["kl"].mean for path in (copy.run / "truth" / "select").glob("*.json")]
    assert min(on_select) == pytest.approx(figures["select"])
    assert len(list((copy.run / "truth" / "report").glob("*.json"))) <= 3 < len(on_select)
    named = {
        str(site): variant_name(spec)
        for item in run.chosen_items()
        for site, spec in zip(item.sites, item.specs, strict=True)
    }
    assert json.loads((run.solution / "architecture.json").read_text()) == named
    assert main(["--debug", "build", str(copy.config), "--set", REFINED[0]]) == 0
    assert (run.student / "initial" / "unit.json").exists()
    assert run.student != before.student


def test_what_was_stopped_repeats_no_evaluation_and_finds_the_same(
    copy: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--debug", "refine", str(copy.config), "--evaluations", str(EVALUATIONS)]
    waves: list[int] = []
    wave = Scorer._wave

    def killed(self: Scorer, changes: list[object]) -> object:
        if len(waves) == 2:
            raise KeyboardInterrupt
        waves.append(len(changes))
        return wave(self, changes)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(Scorer, "_wave", killed)
        assert main(command[1:]) == 130
    stopped = truths(copy)
    assert stopped
    assert main(command) == 0
    whole = truths(copy)
    assert stopped.items() <= whole.items()
    run = Run.open(copy.config, REFINED)
    first = (run.solution / "unit.json").read_bytes()
    assert main([*command, "--redo"]) == 0
    assert truths(copy) == whole
    assert (run.solution / "unit.json").read_bytes() == first


def test_compare_evaluates_every_architecture_on_report(copy: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--debug", "compare", str(copy.config), "--true"]) == 0
    _, head, mip, *_ = capsys.readouterr().out.splitlines()
    assert "true kl_nats" in head and "over the MIP's" in head
    run = Run.open(copy.config)
    kl = read_truth(plans.truth_of(run, run.solutions()[0].items, "report").path)["kl"].mean
    assert f"{kl:.4f}" in mip and "+0.0000 ± 0.0000" in mip
    before = truths(copy)
    assert main(["--debug", "compare", str(copy.config), "--true"]) == 0
    assert truths(copy) == before
    found = read_unit(run.comparison).payload["found"]
    assert main(["--debug", "compare", str(copy.config)]) == 0  # what is known already is told without an evaluation
    assert "true kl_nats" in capsys.readouterr().out
    assert read_unit(run.comparison).payload["found"] == found
    assert truths(copy) == before
    gone = Path(next(iter(before)))
    gone.unlink()
    assert main(["--debug", "compare", str(copy.config)]) == 0
    known = [one["measured"] for one in read_unit(run.comparison).payload["found"]]
    assert None in known and any(known)
    assert not gone.exists()


def test_refine_is_about_quality_of_changes_to_the_teacher(copy: Project, capsys: pytest.CaptureFixture[str]) -> None:
    limits = copy.folder / "cheap.yaml"
    limits.write_text("constraints:\n  kl_nats: {max: 0.3}\nobjective: params\n")
    asked = [str(copy.config), "--constraints", str(limits)]
    assert main(["--debug", "search", *asked]) == 0
    assert main(["refine", *asked]) == 2
    assert "the objective is params" in capsys.readouterr().err
    assert main(["refine", str(copy.config), "--set", "evaluate.sequences=4000"]) == 2
    assert "ask for fewer" in capsys.readouterr().err


def test_an_objective_that_is_no_kl_is_studied_and_goes_on_where_it_was(copy: Project) -> None:
    limits = copy.folder / "by-ce.yaml"
    limits.write_text("constraints:\n  params: 80%\nobjective: ce_delta_nats\n")
    asked = [str(copy.config), "--constraints", str(limits)]
    command = ["refine", *asked, "--evaluations", str(EVALUATIONS)]
    assert main(["--debug", "search", *asked]) == 0
    assert main(["--debug", *command]) == 0
    run = Run.open(copy.config, REFINED, str(limits))
    (solution,) = run.solutions()
    on_select = [read_truth(path)["ce_delta"].mean for path in (copy.run / "truth" / "select").glob("*.json")]
    assert len(on_select) == EVALUATIONS
    score = read_truth(plans.truth_of(run, solution.items, "select").path)["ce_delta"]
    assert score.mean == pytest.approx(min(on_select))
    whole, first = truths(copy), (run.solution / "unit.json").read_bytes()
    assert main(["--debug", *command, "--redo"]) == 0
    assert truths(copy) == whole
    assert (run.solution / "unit.json").read_bytes() == first


def test_what_is_not_finite_is_said_in_the_table() -> None:
    row = {"name": "search", "sum": 0.1, "predicted": 0.1, "select": [0.2, 0.01], "report": [None, None]}
    rows = [{**row, "excess": [None, None]}, {**row, "report": [0.3, None], "excess": [-0.1, 0.02]}]
    refined = Unit(Path("refined"), {}, "", {"comparison": rows, "stands": False, "num_trials": 2})
    text = _comparison(refined, "kl_nats")
    _, head, first, second = text.splitlines()
    assert first.count("not finite") == 2 and "0.2000 ± 0.0100" in first
    assert "0.3000" in second and "-0.1000 ± 0.0200" in second and "true on report" in head
