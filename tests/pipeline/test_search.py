"""The search from the command line: lists of values, one of them built, and a cost minimised."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from puzzle import progress
from puzzle.cli import main
from puzzle.run import Run
from puzzle.search import linear
from puzzle.search.programme import Answer, Effort, Programme, solve
from tests.pipeline.conftest import Project

WORKLOAD = "workloads:\n  chat: {isl: 8, osl: 8, weights: fp32, kv: fp32, device: cpu}\n"


def limits(project: Project, name: str, text: str) -> list[str]:
    path = project.folder / f"{name}.yaml"
    path.write_text(WORKLOAD + text)
    return [str(project.config), "--constraints", str(path)]


def test_a_list_is_a_table_of_searches_each_of_which_can_be_gone_on_with(
    copy: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = limits(copy, "mine", 'constraints:\n  memory_gib: {values: ["90%", 1e-9, "80%"]}\n  params: {min: 5}\n')
    assert main(["--debug", "validate", *listed]) == 0
    assert main(["--debug", "search", *listed]) == 0
    header, *lines = capsys.readouterr().out.splitlines()[1:]  # validate's line first
    assert header.split()[:3] == ["pick", "memory_gib", "status"]
    assert [line.split()[:3] for line in lines[:3]] == [
        ["1", "90%", "optimal"],
        ["2", "1e-09", "infeasible"],
        ["3", "80%", "optimal"],
    ]
    assert lines[3].startswith("pick 2: memory_gib ≤ 1e-09 cannot be met: the smallest possible is")
    runs = [Run.open(copy.config, constraints=listed[2], pick=number) for number in (1, 3)]
    for run, line in zip(runs, (lines[0], lines[2]), strict=True):
        assert run.solution_id == line.split()[-1]
        (solution,) = run.solutions()
        assert f"{solution.objective_nats:.4f}" in line
    assert runs[0].solutions()[0].objective_nats < runs[1].solutions()[0].objective_nats
    # the solution is the one that the file with this value alone finds
    single = limits(copy, "mine", "constraints:\n  memory_gib: 80%\n  params: {min: 5}\n")
    before = (runs[1].solution / "unit.json").read_bytes()
    assert Run.open(copy.config, constraints=single[2]).solution_id == runs[1].solution_id
    assert main(["--debug", "build", *single]) == 0
    assert (runs[1].solution / "unit.json").read_bytes() == before


def test_one_of_a_list_is_built(copy: Project, capsys: pytest.CaptureFixture[str]) -> None:
    listed = limits(copy, "mine", 'constraints:\n  memory_gib: {values: ["90%", "80%"]}\n')
    for command in ("run", "build", "status", "pareto"):
        assert main([command, *listed]) == 2
        error = capsys.readouterr().err
        assert "mine.yaml asks for 2 searches" in error
        assert "--pick 1 (memory_gib 90%) to --pick 2 (memory_gib 80%)" in error
        assert error.count("\n") == 1
    assert main(["search", *listed, "--pick", "3"]) == 2
    assert "--pick 3" in capsys.readouterr().err
    for command in ("search", "build"):
        assert main(["--debug", command, *listed, "--pick", "2"]) == 0
    run = Run.open(copy.config, constraints=listed[2], pick=2)
    assert (run.student / "initial" / "unit.json").exists()
    assert not Run.open(copy.config, constraints=listed[2], pick=1).solution.exists()
    assert run.limits_name == "mine (memory_gib 80%)"


def test_a_list_of_what_cannot_be_is_infeasible(copy: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", *limits(copy, "mine", "constraints:\n  params: {values: [5, 6]}\n")]) == 3
    captured = capsys.readouterr()
    assert captured.err.count("cannot be met") == 2
    assert "infeasible" in captured.out


def test_a_cost_is_minimised_and_the_answer_says_what_was(copy: Project, capsys: pytest.CaptureFixture[str]) -> None:
    asked = limits(copy, "cheap", "constraints:\n  kl_nats: {max: 0.3}\nobjective: chat.e2e_ms\n")
    for command in ("validate", "search", "build"):
        assert main(["--debug", command, *asked]) == 0
    run = Run.open(copy.config, constraints=asked[2])
    (solution,) = run.solutions()
    assert solution.minimised == "chat.e2e_ms"
    assert 0 < solution.totals["kl_nats"] == solution.objective_nats <= 0.3
    out = capsys.readouterr().out
    assert f"solution 1: chat.e2e_ms {solution.totals['chat.e2e_ms']:.4f}"[:-1] in out
    assert f"{solution.objective_nats:.4f} ± " in out


def test_a_gap_and_a_time_limit_are_keys_and_what_they_leave_open_is_told(
    copy: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = limits(copy, "same", "constraints: {memory_gib: 80%}\n")
    spelt = limits(copy, "same", "constraints: {memory_gib: 80%}\nsolver: {gap: 1e-9}\n")
    name = Run.open(copy.config, constraints=plain[2]).solution_id
    assert Run.open(copy.config, constraints=spelt[2]).solution_id == name  # the default, spelt out
    asked = limits(copy, "quick", "constraints: {memory_gib: 80%}\nsolver: {gap: 0.01, time_limit_s: 9}\n")
    given = []

    def out_of_time(made: Programme, effort: Effort, start: object) -> Answer | None:
        given.append(effort)
        found = solve(made)
        return None if found is None else replace(found, bound=0.75 * found.value, closed=False)

    monkeypatch.setattr(linear, "solve", out_of_time)
    assert main(["--debug", "search", *asked]) == 0
    assert given[0].relative_gap == 0.01
    assert 0 < (given[0].seconds or 0) <= 9
    assert "predicted (the solver's time was up: best found, gap 25.00%, bound " in capsys.readouterr().out
    (entry,) = json.loads((Run.open(copy.config, constraints=asked[2]).solution / "solution.json").read_text())[
        "solutions"
    ]
    assert (entry["status"], entry["timed_out"]) == ("feasible", True)
    assert entry["gap"] == pytest.approx(0.25)


def test_where_several_answers_take_long_each_is_told(
    copy: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0)
    text = "constraints:\n  memory_gib: 90%\nsolutions: {count: 2, min_difference: 0.2}\n"
    assert main(["--debug", "search", *limits(copy, "mine", text)]) == 0
    first, second, *_ = (line for line in capsys.readouterr().err.splitlines() if line.startswith("search"))
    assert " 50 %" in first and " 100 %" in second


def test_a_front_of_two_costs_is_a_table_a_csv_and_a_picture(copy: Project, capsys: pytest.CaptureFixture[str]) -> None:
    costs = ["--cost", "params", "--cost", "chat.kv_cache_gib"]
    assert main(["--debug", "pareto", str(copy.config), *costs, "--points", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["point", "params", "chat.kv_cache_gib", "kl_nats", "bound", "gap"]
    csv = (copy.run / "pareto" / "pareto.csv").read_text().splitlines()
    assert csv[0] == "point,params,chat.kv_cache_gib,kl_nats,bound,gap,items"
    assert lines[-1].startswith(f"{len(csv) - 1} points, within the file's limits or not; ")
    assert len(csv) == len(lines) - 1 > 3
    assert (copy.run / "pareto" / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_fronts_and_chains_are_at_the_batch_sizes_that_the_search_chooses(
    copy: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the first of the list nothing fits; where nothing does anywhere, a front is still one to look at."""
    path = copy.folder / "sizes.yaml"
    workload = "workloads:\n  chat: {isl: 8, osl: 8, batch_size: [4000, 1], weights: fp32, kv: fp32, device: cpu}\n"
    path.write_text(workload + "constraints: {memory_gib: 0.005}\n")
    listed = [str(copy.config), "--constraints", str(path), "--points", "2"]
    for command in ("chain", "pareto"):
        assert main(["--debug", command, *listed]) == 0
        assert capsys.readouterr().out.startswith("at chat batch size 1\n")
    path.write_text(workload + "constraints: {memory_gib: 1e-9}\n")
    assert main(["--debug", "pareto", *listed]) == 0
    assert capsys.readouterr().out.startswith("at chat batch size 4000 (nothing keeps all limits)\n")
    assert main(["chain", *listed]) == 3
    assert main(["pareto", *listed[:-1], "0"]) == 2


def test_a_chain_is_a_table_and_a_csv(copy: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--debug", "chain", str(copy.config), "--points", "3"]) == 0
    header, *lines, last = capsys.readouterr().out.splitlines()
    assert header.split() == ["limit", "params", "kl_nats", "free", "extra"]
    csv = (copy.run / "chain.csv").read_text().splitlines()
    assert csv[0] == "limit,params,kl_nats,free,extra,items"
    assert len(csv) - 1 == len(lines) == 3
    assert last.startswith("in sum ")
    assert " (optimal, bound " in last


def test_solutions_of_before_are_read(finished: Project) -> None:
    """Files that hold nothing of what came later."""
    from puzzle.types import Solution, from_json

    (entry,) = json.loads((Run.open(finished.config).solution / "solution.json").read_text())["solutions"]
    old = {
        key: value
        for key, value in entry.items()
        if key not in ("objective_name", "minimised", "cost_bound", "gap", "timed_out")
    }
    read = from_json(Solution, old, "solution.json")
    assert read.objective_nats == entry["objective_nats"]
    assert read.minimised is None


def test_a_constraint_file_is_explained_without_any_score(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    asked = limits(project, "mine", 'constraints:\n  memory_gib: "80%"\n  chat.ttft_ms: "50%"\n  params: 5\n')
    assert main(["--debug", "constraints", "explain", *asked]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("mine.yaml for the teacher teacher")
    assert lines[1].startswith("chat: 8 + 8 tokens, batch size 1, weights fp32")
    assert "breaks it (weights " in lines[2]
    assert "not known: workload chat: nothing was measured" in lines[3]
    assert not project.run.exists()
