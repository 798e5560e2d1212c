"""The pipeline as a user drives it: run, run again, change something, ask for the state."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from puzzle.artifacts import read_unit
from puzzle.cli import main
from puzzle.plans import plan_export
from puzzle.report.library import library_frame
from puzzle.report.summary import Summary
from puzzle.run import Run
from puzzle.space import PARTS
from puzzle.types import Site
from tests.pipeline.conftest import Project


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_ends_with_a_verified_checkpoint_and_a_report(finished: Project) -> None:
    run = Run.open(finished.config)
    (unit,) = plan_export(run)
    assert unit.path == run.student / "export" / "hf"
    (verdict,) = read_unit(unit.path).payload["verification"]
    assert verdict["status"] == "passed" and verdict["runtime"] == "transformers"
    card = (unit.path / "README.md").read_text()
    assert f"- {verdict['line'].replace('_', chr(92) + '_')}" in card and "KL to the teacher" in card
    assert card.count('("THIS_FOLDER", trust_remote_code=True)') == 2
    assert json.loads((unit.path / "architecture.json").read_text()) == json.loads(
        (run.solution / "architecture.json").read_text()
    )
    assert "predicted / parts / whole" in (report := run.report.read_text())
    assert (run.student / "report" / "report.html").read_text() == report


def test_a_second_run_changes_nothing(copy: Project) -> None:
    # the copy lies elsewhere, so its config.yaml is written anew; nothing that was computed may change
    def computed() -> dict[str, bytes]:
        return {name: data for name, data in tree(copy.run).items() if not name.endswith("config.yaml")}

    before = computed()
    assert main(["--debug", "run", str(copy.config)]) == 0
    assert computed() == before


def test_a_new_constraint_file_repeats_nothing_above_search(copy: Project) -> None:
    limit = copy.folder / "tighter.yaml"
    limit.write_text((copy.folder / "limit.yaml").read_text().replace("80%", "70%"))
    before = tree(copy.run)
    assert main(["--debug", "search", str(copy.config), "--constraints", str(limit)]) == 0
    after = tree(copy.run)
    new = {name for name in after if before.get(name) != after[name]}
    new -= {"config.yaml", "events.jsonl", "fingerprints.json"}  # the last: of files that have not just been written
    assert new
    assert [name for name in new if not name.startswith("solutions/tighter-")] == []


def test_status_counts_done_missing_and_stale(copy: Project, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(copy.run / "library" / "trained" / "L000.ffn.linear")
    assert main(["status", str(copy.config), "--set", "score.sequences=3"]) == 0
    lines = dict(line.split("  (last")[0].split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["init"] == "8 done"  # two layers of gqa-2, linear, narrow-24, linear
    assert lines["distill"] == "7 done, 1 missing"
    assert lines["score"] == "4 stale"


def test_changed_settings_are_refused_by_name_until_redone(copy: Project, capsys: pytest.CaptureFixture[str]) -> None:
    changed = [str(copy.config), "--set", "distill.learning_rate=2e-3"]
    assert main(["run", *changed]) == 6
    error = capsys.readouterr().err
    assert "changed: distill" in error
    assert "--redo distill" in error
    before = tree(copy.run / "library" / "trained")
    assert main(["--debug", "run", *changed, "--redo", "distill"]) == 0
    assert tree(copy.run / "library" / "trained") != before


@pytest.mark.parametrize(
    "setting",
    [
        "distill.residual=disk",
        "distill.residual=recompute",
        "distill.residual=memory",
        "memory_budget_gib=7e-4",
    ],
)
def test_where_activations_are_kept_and_how_much_trains_at_once_changes_no_bit(copy: Project, setting: str) -> None:
    before = tree(copy.run / "library" / "trained")
    shutil.rmtree(copy.run / "library" / "trained")
    assert main(["--debug", "distill", str(copy.config), "--set", setting]) == 0
    assert tree(copy.run / "library" / "trained") == before
    assert not list(copy.run.glob(".aside*"))


def test_a_budget_that_nothing_fits_in_is_refused(copy: Project, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(copy.run / "library" / "trained")
    assert main(["distill", str(copy.config), "--set", "memory_budget_gib=1e-5"]) == 2
    assert "raise memory_budget_gib" in capsys.readouterr().err


def test_starting_points_that_do_not_fit_in_the_budget_are_refused(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--debug", "data", str(project.config)]) == 0
    small = [str(project.config), "--set", "memory_budget_gib=1e-5"]
    assert main(["init", *small]) == 2
    assert "raise memory_budget_gib, lower data.sequence_tokens, or set init.start: paper" in capsys.readouterr().err
    assert not (project.run / "library").exists()
    assert main(["--debug", "init", *small, "--set", "init.start=paper"]) == 0


@pytest.mark.parametrize("space", ["pairs: true", "nested"])
def test_pairs_and_nested_widths_go_all_the_way(
    project: Project, space: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--set", "distill.nested=true"] if space == "nested" else []
    names = "attention: [keep, gqa-2, skip]\nffn: [keep, narrow-50%, narrow-25%, skip]\nffn_multiple_of: 8\n"
    (project.folder / "space.yaml").write_text(names + ("pairs: true\n" if space == "pairs: true" else ""))
    assert main(["--debug", "run", str(project.config), *settings]) == 0
    units = {path.name for path in (project.run / "library" / "trained").iterdir()}
    if space == "nested":
        assert units == {f"L{layer:03d}.{name}" for layer in (0, 1) for name in ("attention.gqa-2", "ffn.nested")}
    else:
        assert len(units) == 2 * (3 * 4 - 4)  # all but keep+keep, keep+skip, skip+keep, skip+skip have weights
    run = Run.open(project.config, [setting for setting in settings if setting != "--set"])
    assert set(run.solutions()[0].items) <= {item.id for item in run.items}
    frame = library_frame(run)
    stored = {
        path.parent.name: sum(tensor.nbytes for tensor in load_file(path).values())
        for path in project.run.glob("library/trained/*/weights.safetensors")
    }
    assert frame.bytes.sum() == sum(stored.values())
    if space == "nested":
        whole = [stored[f"L{layer:03d}.ffn.nested"] for layer in (0, 1)]
        assert frame[frame.variant == "narrow-24"].bytes.tolist() == whole
        assert frame[frame.variant == "narrow-16"].bytes.tolist() == [0, 0]
    assert main(["--debug", "show", "library", str(project.config), *settings]) == 0
    assert "narrow-24" in capsys.readouterr().out
    assert (project.run / "library" / "library.png").read_bytes().startswith(b"\x89PNG")


def test_the_papers_start_of_nested_widths_is_taken_where_it_is_asked_for(project: Project) -> None:
    (project.folder / "space.yaml").write_text("attention: [keep]\nffn: [keep, narrow-32, narrow-16]\n")
    settings = ["--set", "distill.nested=true", "--set", "init.start=paper"]
    for stage in ("data", "init"):
        assert main(["--debug", stage, str(project.config), *settings]) == 0
    marker = read_unit(project.run / "library" / "initial" / "L001.ffn.nested")
    assert marker.payload["start"] == "paper"


def test_rank_0_alone_prints(
    finished: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["--debug", "show", "costs", str(finished.config)]) == 0
    assert capsys.readouterr().out == ""


def test_shrinking_leaves_pairs_that_a_second_run_trains(copy: Project, capsys: pytest.CaptureFixture[str]) -> None:
    space = copy.folder / "pairs.yaml"
    everything = ["--within", "10", "--least-share", "0"]
    assert main(["--debug", "shrink", str(copy.config), str(space), *everything]) == 0
    assert main(["shrink", str(copy.config), str(space)]) == 2
    assert "exists" in capsys.readouterr().err
    chosen = {item.id for item in Run.open(copy.config).chosen_items()}
    pairs = Run.open(copy.config, [f"space={space}"]).items
    assert all(len(item.sites) == 2 for item in pairs)
    for layer in (0, 1):
        both = "+".join(
            next(i.rpartition(".")[2] for i in chosen if i.startswith(f"L{layer:03d}.{part}")) for part in PARTS
        )
        assert f"L{layer:03d}.{both}" in {item.id for item in pairs}
    assert main(["shrink", str(copy.config), str(copy.folder / "none.yaml"), "--within", "-0.5"]) == 3
    second = ["--set", f"run={copy.folder / 'second'}", "--set", f"space={space}"]
    assert main(["--debug", "run", str(copy.config), *second]) == 0
    chosen = Run.open(copy.folder / "second").chosen_items()
    assert [item.sites for item in chosen] == [tuple(Site(layer, part) for part in PARTS) for layer in (0, 1)]


def test_a_window_needs_sequences_of_four_windows(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    space = (project.folder / "space.yaml").read_text()
    (project.folder / "space.yaml").write_text(space.replace("gqa-2", "window-5"))
    assert main(["validate", str(project.config)]) == 4
    assert "at least 4 windows, 20 tokens, but data.sequence_tokens is 16" in capsys.readouterr().err
    (project.folder / "space.yaml").write_text(space.replace("gqa-2", "window-4"))
    assert main(["--debug", "validate", str(project.config)]) == 0


def test_a_window_within_documents_is_refused(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    space = (project.folder / "space.yaml").read_text()
    (project.folder / "space.yaml").write_text(space.replace("gqa-2", "window-4"))
    assert main(["validate", str(project.config), "--set", "data.within_documents=true"]) == 2
    assert "window-4 looks free within documents shorter than it" in capsys.readouterr().err
    (project.folder / "space.yaml").write_text(space)
    assert main(["--debug", "validate", str(project.config), "--set", "data.within_documents=true"]) == 0


def test_a_stage_says_what_it_needs_first(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", str(project.config)]) == 4
    assert "run `puzzle distill RUN` first" in capsys.readouterr().err


def test_pareto_writes_table_and_picture(copy: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--debug", "pareto", str(copy.config), "--cost", "chat.memory_gib"]) == 0
    assert (copy.run / "pareto" / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert (copy.run / "pareto" / "pareto.csv").read_text().startswith("point,chat.memory_gib,kl_nats")
    assert "chat.memory_gib" in capsys.readouterr().out


def test_dry_run_writes_nothing(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--debug", "run", str(project.config), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "GiB of memory" in printed
    assert re.search(r"library/trained: \d+ units, L000\.attention\.\S+ to L001\.ffn\.\S+\n", printed)
    assert not project.run.exists()


def test_explain_says_what_binds_and_prices_a_site(copy: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--debug", "explain", str(copy.config), "--site", "L001.ffn", "--step", "5"]) == 0
    printed = capsys.readouterr().out
    assert "nats predicted" in printed
    assert "memory_gib" in printed and "from the bound" in printed
    assert "L001.ffn, if it had to be:" in printed
    assert main(["explain", str(copy.config), "--site", "L999.ffn"]) == 2
    assert main(["explain", str(copy.config), "--step", "0"]) == 2


def test_compare_prints_the_search_beside_the_baselines(
    copy: Project, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    importance = tmp_path / "importance.json"
    importance.write_text("[0.5, 0.1]")
    assert main(["--debug", "compare", str(copy.config), "--importance-file", str(importance)]) == 0
    printed = capsys.readouterr().out
    for name in ("MIP ", "published greedy", "convex-hull greedy", "MIP by CE", "importance depth", "memory_gib"):
        assert name in printed
    importance.write_text('{"0": 1}')
    assert main(["compare", str(copy.config), "--importance-file", str(importance)]) == 2
    assert "expected a list of numbers" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["search", "pareto", "explain", "compare"])
def test_searching_a_finished_run_never_imports_torch(copy: Project, command: str) -> None:
    shutil.rmtree(copy.run / "solutions")
    code = (
        "import sys; from puzzle.cli import main; code = main(sys.argv[1:]); "
        "assert code == 0, code; assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code, command, str(copy.config)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_show_prints_every_table(copy: Project, capsys: pytest.CaptureFixture[str]) -> None:
    for what, expected in (("library", "loss_end"), ("scores", "standard_error"), ("costs", "ms_p90")):
        assert main(["--debug", "show", what, str(copy.config)]) == 0
        assert expected in capsys.readouterr().out


def test_teacher_and_student_are_compared_at_the_batch_size_that_was_chosen(copy: Project) -> None:
    limit = copy.folder / "two.yaml"
    text = (copy.folder / "limit.yaml").read_text()
    limit.write_text(text.replace("osl: 8,", "osl: 8, batch_size: [2, 1],").replace("80%", "0.00008"))
    changed = [str(copy.config), "--constraints", str(limit)]
    assert main(["--debug", "run", *changed]) == 0
    summary = Summary.of(Run.open(copy.config, constraints=str(limit)))
    assert summary.solution.totals["chat.batch_size"] == 1  # two sequences take more memory, and so cost quality
    assert summary.predicted["teacher"]["chat.batch_size"] == 1


def test_a_reader_that_has_seen_enough_is_no_error(finished: Project) -> None:
    command = [sys.executable, "-c", "import sys; from puzzle.cli import main; sys.exit(main(sys.argv[1:]))"]
    process = subprocess.Popen(
        [*command, "show", "costs", str(finished.config)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()  # before anything was written
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 0, errors
    assert errors == b""
