"""A run as a notebook sees it: the same answers as the command line's, the same errors, and no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import puzzle
from puzzle.cli import main
from puzzle.run import Run
from puzzle.types import ConfigError, InfeasibleError, MissingMeasurementError
from tests.pipeline.conftest import FILES, Project

SCRIPT = """
import json, sys
import puzzle
run = puzzle.open_run(sys.argv[1])
found = run.search()
front = run.pareto("chat.memory_gib")
shown = len(found._repr_html_()), len(front.frame), len(run.scores), len(run.costs), len(run.library)
print(json.dumps({"shown": shown, "modules": sorted(sys.modules)}))
"""


def test_a_search_of_a_notebook_loads_no_torch(finished: Project) -> None:
    command = [sys.executable, "-c", SCRIPT, str(finished.run)]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert all(told["shown"])
    assert not {"torch", "transformers", "plotly"} & set(told["modules"])


def test_it_answers_as_the_command_line_did(finished: Project) -> None:
    (stored,) = Run.open(finished.config).solutions()
    path = finished.folder / "limit.yaml"
    given = {"workloads": {"chat": {"isl": 8, "osl": 8, "weights": "fp32", "kv": "fp32"}}}
    run = puzzle.open_run(finished.run)
    for constraints in (None, path, str(path), FILES["limit.yaml"], {**given, "constraints": {"memory_gib": "80%"}}):
        found = run.search(constraints).solution
        assert (found.items, found.objective_nats) == (stored.items, stored.objective_nats)
        assert found.objective_se == stored.objective_se
    assert run.search("constraints: {params: 90%}").solution.totals["params"] <= 0.9 * 21664
    with pytest.raises(ConfigError, match="constraints:1: unknown key 'constraint'"):
        run.search({"constraint": {}})


def test_a_solution_is_shown_with_its_slack_and_yields_its_constraint_file(copy: Project, tmp_path: Path) -> None:
    run = puzzle.open_run(copy.config)
    front = run.pareto("chat.memory_gib")
    assert repr(front) == f"ParetoFront({len(front)} points, kl_nats over chat.memory_gib)"
    point = len(front) // 2
    view = front.at(point)
    (bound,) = view.bounds.itertuples()
    assert bound.value + bound.slack == pytest.approx(front.front.cost[point])
    assert 0 <= bound.slack < 1e-9
    totals = view.totals.set_index("metric")
    assert totals.student["kl_nats"] == pytest.approx(front.front.objective[point])
    assert totals.share["params"] == totals.student["params"] / 21664
    assert list(view.layers.columns) == ["layer", "attention", "ffn", "attention_share", "ffn_share"]
    page = view._repr_html_()
    assert page.count("<svg") == 1
    for told in (f"KL {view.solution.objective_nats:.4f} ± ", "optimal", "chat.memory_gib ≤", "slack", "GiB"):
        assert told in page
    view.plot().save(tmp_path / "solution.png")
    assert (tmp_path / "solution.png").read_bytes().startswith(b"\x89PNG")
    written = view.write_constraints(tmp_path / "mine" / "limit.yaml")
    assert main(["--debug", "search", str(copy.run), "--constraints", str(written)]) == 0
    (found,) = Run.open(copy.config, constraints=str(written)).solutions()
    assert found.objective_nats == view.solution.objective_nats


def test_tables_are_tidy(finished: Project) -> None:
    run = puzzle.open_run(finished.run)
    scores = run.scores
    assert len(scores) == len(scores.item.unique()) == 12  # 3 of 4 variants at 4 sites: the teacher's own cost nothing
    assert {"kl_nats", "kl_nats_se", "ce_delta_nats", "layer", "part", "variant"} <= set(scores.columns)
    assert scores.kl_nats.notna().all()
    assert {"shape_id", "phase", "ms", "ms_p90"} <= set(run.costs.columns)
    assert len(run.library) == 8
    assert run.stages.missing.sum() == run.stages.stale.sum() == 0
    frame = run.pareto("params").frame
    assert list(frame.columns) == ["point", "params", "kl_nats", "share"]
    assert frame.share.iloc[-1] == 1
    by_ce = run.pareto("params", "hidden_distance")
    assert by_ce.front.objective_name == "hidden_distance"
    assert by_ce.at(0).solution.objective_name == "hidden_distance"


def test_a_run_with_missing_stages_says_which(project: Project) -> None:
    run = puzzle.open_run(project.config)
    assert set(run.stages[run.stages.missing > 0].stage) >= {"data", "score"}
    with pytest.raises(MissingMeasurementError, match="puzzle distill RUN"):
        _ = run.library
    for asked in (lambda: run.scores, run.search, run.pareto):
        with pytest.raises(MissingMeasurementError, match="puzzle score RUN"):
            asked()
    with pytest.raises(ConfigError, match="no run folder"):
        puzzle.open_run(project.folder / "teacher")
    assert not project.run.exists()


def test_errors_are_those_of_the_command_line(copy: Project, capsys: pytest.CaptureFixture[str]) -> None:
    run = puzzle.open_run(copy.config)
    (copy.folder / "tight.yaml").write_text(FILES["limit.yaml"].replace("80%", "1e-9"))
    assert main(["search", str(copy.config), "--constraints", str(copy.folder / "tight.yaml")]) == 3
    with pytest.raises(InfeasibleError) as caught:
        run.search(copy.folder / "tight.yaml")
    assert capsys.readouterr().err == f"puzzle: {caught.value}\n"
    listed = FILES["limit.yaml"].replace("80%", '{values: ["90%", "80%"]}')
    with pytest.raises(ConfigError, match=r"pick=1 \(memory_gib 90%\) to pick=2"):
        run.search(listed)
    with pytest.raises(ConfigError, match="--pick 0: 2 searches"):
        run.search(listed, pick=0)
    with pytest.raises(ConfigError, match="nothing has params ≤ nan"):
        run.pareto().within(float("nan"))
    assert run.search(listed, pick=2).solution.items == run.search().solution.items
    assert puzzle.open_run(copy.config, listed, pick=2).search().solution.items == run.search().solution.items
    with pytest.raises(ConfigError, match="'kl' is no sum of scores; known: kl_nats"):
        run.pareto("params", "kl")
    with pytest.raises(ConfigError, match="is a rate"):
        run.pareto("chat.req_per_s")


def test_several_answers_are_views_too(finished: Project) -> None:
    found = puzzle.open_run(finished.run).solutions(FILES["limit.yaml"] + "solutions: {count: 2}\n")
    assert found[0].solution.objective_nats <= found[1].solution.objective_nats
    assert found[0].solution.items != found[1].solution.items
