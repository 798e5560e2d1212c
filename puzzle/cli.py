"""The command line: ``puzzle COMMAND …``. Parses, calls, prints; every error of the user is one line and an exit code.

Exit codes: 0 done, 1 internal error, 2 configuration, 3 infeasible, 4 missing measurement, 5 unreadable, corrupt or
unwritable file, 6 stale unit. Nothing heavy is imported before it is known to be needed.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from puzzle import cli_evaluate, cli_explain, cli_export, cli_search
from puzzle.cli_options import open_run, open_runs, open_widths, with_run
from puzzle.ranks import Ranks
from puzzle.types import ConfigError, InfeasibleError, PuzzleError

if TYPE_CHECKING:
    from puzzle.run import Run

TEMPLATE = """\
# A puzzle run: one teacher, one search space, one limit. `puzzle validate FILE`, then `puzzle run FILE`.
run: {run} # everything is written here; killed at any moment, the same command continues
teacher: {teacher} # a Hugging Face folder, a hub id, or `demo` (the bundled model)
space: {space} # the variants on offer at every layer: a file, or a name from blocks/
constraints: half-memory # what the student must fit: a file, or a name from search/
seed: 0
device: auto # auto, cpu, cuda, mps
data:
  text: {text} # .txt, .jsonl (one {{"text": …}} per line), a folder, or `demo`
  sequence_tokens: {sequence_tokens} # at least isl + osl of every workload in the constraint file
distill: # block-wise local distillation, per variant
  tokens: {bld_tokens}
  learning_rate: 5e-4
score: {{sequences: {score_sequences}}}
profile: {{grid: {grid}}} # what is measured: a file, or a name from profiling/
kd: # global distillation of the finished student
  tokens: {kd_tokens}
  learning_rate: 5e-4
evaluate: {{sequences: {report_sequences}}}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        command: Callable[[argparse.Namespace], None] = options.command
        with contextlib.nullcontext() if Ranks.current().first else contextlib.redirect_stdout(io.StringIO()):
            command(options)
        sys.stdout.flush()
        return 0
    except PuzzleError as error:
        if options.debug:
            raise
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:  # `puzzle … | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if options.debug:
            raise
        hint = {
            errno.ENOSPC: "; free some space and run the same command again",
            errno.EROFS: "; use a folder that can be written",
        }
        return _fail(f"{error.filename or 'disk'}: {error.strerror or error}{hint.get(error.errno or 0, '')}", 5)
    except KeyboardInterrupt:
        return _fail("stopped; the same command continues where this one was", 130)
    except MemoryError:
        return _fail("out of memory; lower the batch sizes (distill, kd) or sequence counts and run the same again", 1)
    except Exception as error:  # a bug of ours: say so in one line, and how to see more
        if options.debug:
            raise
        return _fail(f"internal error: {type(error).__name__}: {error} (run again with --debug, and report it)", 1)


def _fail(message: str, code: int) -> int:
    print(f"puzzle: {message}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    from puzzle.pipeline import BY_NAME

    parser = argparse.ArgumentParser(prog="puzzle", description="The most accurate model that fits your limits.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    new = commands.add_parser("new", help="write a commented config")
    new.add_argument("config", type=Path, help="the file to write; the run is named after it")
    new.add_argument("--teacher", default="demo", help="a folder, a hub id, or org/name@revision (default: demo)")
    new.set_defaults(command=_new)

    for name, command, text in (
        ("run", _run, "do everything that is not done yet"),
        ("validate", _validate, "find every error before anything runs"),
        ("status", _status, "say what is done, stale and missing"),
    ):
        with_run(commands.add_parser(name, help=text)).set_defaults(command=command)
    commands.choices["run"].add_argument("--dry-run", action="store_true", help="print the units and an estimate")
    commands.choices["run"].add_argument(
        "--redo", metavar="STAGE", help="do this stage, and all that rests on it, anew"
    )

    for stage in BY_NAME.values():
        staged = with_run(commands.add_parser(stage.name, help=stage.summary))
        staged.add_argument("--redo", action="store_true", help="do it anew even where it is done")
        staged.set_defaults(command=_stage, stage=stage.name)
    commands.choices["score"].add_argument(
        "--until-se",
        type=float,
        metavar="NATS",
        help="add sequences until a site's variants are told apart, or so close",
    )

    refine = commands.choices["refine"]
    refine.add_argument("--evaluations", type=int, help="true ones (default: the config's, or 60)")
    refine.add_argument("--seed", type=int, dest="refine_seed", help="of a study of another score than KL (default 0)")

    commands.choices["additivity"].add_argument(
        "--architectures", type=int, help="how many are evaluated truly (default 120)"
    )
    cli_search.add_commands(commands)
    cli_explain.add_commands(commands)
    cli_evaluate.add_options(commands)
    cli_export.add_commands(commands)

    show = commands.add_parser("show", help="print a table of the run")
    show.add_argument("what", choices=["library", "scores", "costs"])
    show.add_argument("--output", type=Path, metavar="FILE", help="write it as CSV")
    with_run(show).set_defaults(command=_show)
    return parser


def _new(options: argparse.Namespace) -> None:
    if options.config.exists():
        raise ConfigError(f"{options.config} exists; choose another name")
    demo = options.teacher == "demo"
    values = {
        "run": f"runs/{options.config.stem}",
        "teacher": options.teacher,
        "space": "demo" if demo else "llama",
        "text": "demo" if demo else "my-text.jsonl",
        "sequence_tokens": 256 if demo else 2048,
        "bld_tokens": 65536 if demo else 50_000_000,
        "score_sequences": 24 if demo else 64,
        "grid": "demo" if demo else "serving",
        "kd_tokens": 393216 if demo else 500_000_000,
        "report_sequences": 96 if demo else 128,
    }
    options.config.parent.mkdir(parents=True, exist_ok=True)
    lines = [line.partition(" # ") for line in TEMPLATE.format(**values).splitlines(keepends=True)]
    column = max(len(setting) for setting, mark, _ in lines if mark)
    text = "".join(f"{setting:<{column}}{mark}{comment}" if mark else setting for setting, mark, comment in lines)
    options.config.write_text(text, encoding="utf-8")
    print(f"wrote {options.config}; next: puzzle validate {options.config}")


def _run(options: argparse.Namespace) -> None:
    from puzzle import pipeline
    from puzzle.validate import dry_run, validate
    from puzzle.widths import best, too_large

    if options.redo is not None and options.redo not in pipeline.BY_NAME:
        raise ConfigError(f"--redo: no stage is called {options.redo}; stages: {', '.join(pipeline.BY_NAME)}")
    before: Run | None = None
    offered = open_widths(options)
    if offered is not None:
        offered.check([offered.stand_in])
    for name, run in open_runs(options):
        if name:
            print(f"step {name}: {run.folder}", flush=True)
        if options.dry_run:
            print(dry_run(run))
            continue
        if offered is not None and run.config.prune is None and (error := too_large(run)) is not None:
            print(f"left out: {error}", flush=True)
            if run.original is None:
                pipeline.run_stage(run, "profile")  # what percentages of times are of
            continue
        validate(run)
        if before is not None:
            pipeline.take_over_data(run, before)
        before = run
        has_it = options.redo in {stage.name for stage in pipeline.stages_of(run)}
        redo = options.redo if has_it or not name else None  # a step leaves out what only others have
        if offered is None or run.config.prune is not None:
            _finish(run, redo)
        else:
            pipeline.run_all(run, redo, before="search")
    if offered is not None and not options.dry_run:
        chosen = best(offered.searches())
        print(f"hidden size {chosen.shape.hidden_size} is the best: {chosen.folder}", flush=True)
        _finish(chosen)


def _finish(run: Run, redo: str | None = None) -> None:
    from puzzle import pipeline

    pipeline.run_all(run, redo)
    _print_report(run, run.student / "report" / "report.html")
    print(f"checkpoints {run.student / 'export'}")


def _validate(options: argparse.Namespace) -> None:
    from puzzle.pruning import change, pruned_shape
    from puzzle.validate import validate

    offered = open_widths(options)
    if offered is not None:
        offered.check(offered.stand_in.each_pick())
    for name, run in open_runs(options):
        impossible, picked = [], list(run.each_pick())
        for one in picked:
            try:
                validate(one)
            except InfeasibleError as error:  # of a list of values, the search answers those that can be met
                impossible.append(error)
        if len(impossible) == len(picked):
            if offered is None:  # else another hidden size may do
                raise impossible[0]
            print(f"{name}: left out: {impossible[0]}")
            continue
        if run.config.prune is not None:
            found = "; ".join(change(run.shape, pruned_shape(one.pruning, one.shape)) for one in run.contenders)
        else:
            found = f"{len(run.items)} items at {len(run.shape.sites)} sites"
            if run.cost_source.units:
                found += f", {len(run.grid_points)} points of the grid"
        print(f"{name or options.run}: valid ({found})")
    if offered is not None and not offered.waiting:
        offered.searches()  # says why, where none may do


def _status(options: argparse.Namespace) -> None:
    for name, run in open_runs(options):
        if name:
            print(f"step {name}")
        _print_status(run)


def _print_status(run: Run) -> None:
    from puzzle import artifacts, pipeline

    finished = [event for event in artifacts.read_events(run.events) if event["event"] == "finished"]
    seconds = {event["stage"]: event["seconds"] for event in finished}
    for stage in pipeline.stages_of(run):
        states = pipeline.unit_states(run, stage)
        counts = {state: states.count(state) for state in ("done", "stale", "missing")}
        took = f"  (last time {seconds[stage.name]:.1f} s)" if stage.name in seconds else ""
        found = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        print(f"{stage.name:<11}{found or '0 needed'}{took}")


def _stage(options: argparse.Namespace) -> None:
    from puzzle import pipeline

    if options.stage == "evaluate" and cli_evaluate.is_model(options.run):
        cli_evaluate.evaluate_folder(options)
        return
    if options.stage == "evaluate":
        cli_evaluate.check_options(options)
    if options.stage in ("rescore", "search") and (offered := open_widths(options)) is not None:
        cli_search.search_widths(offered.searches(print), options.stage, options.redo)
        return
    run = open_run(options)
    if options.stage == "export":
        cli_export.check_push(run, options)
    if options.stage == "refine":
        cli_search.refine(options)
        return
    if options.stage in ("rescore", "search"):
        cli_search.search(run, options.stage, options.redo)
        return
    if options.stage == "report":
        if left := pipeline.report(run):
            print(f"not there yet: {', '.join(one.stage for one in left)}; the page says what there is\n{run.report}")
        else:
            _print_report(run, run.report)
        return
    pipeline.run_stage(run, options.stage, options.redo)
    if not Ranks.current().first:
        return
    if options.stage == "profile":
        _print_profile(run)
    elif options.stage == "evaluate":
        cli_evaluate.print_figures(run, options.vllm_bench)
    elif options.stage == "export":
        cli_export.print_exports(run)
        cli_export.push(run, options)
    elif options.stage == "fit-costs":
        from puzzle.report import profile

        print(profile.fits_text(run.cost_source.fits))
    elif options.stage == "generate-data":
        _print_generated(run)
    elif options.stage == "tournament":
        from puzzle.report.tournament import standings

        table = standings(run)
        print(table.markdown() if table else "no tournament: set tournament: {candidates: 4} in the config")
    elif options.stage == "additivity":
        from puzzle.report import additivity

        print(additivity.report(run))


def _print_report(run: Run, page: Path) -> None:
    from puzzle.report.summary import Summary

    print(f"{Summary.of(run).markdown()}\npage        {page}")


def _print_generated(run: Run) -> None:
    from puzzle import artifacts, plans

    shards = [artifacts.read_unit(unit.path) for unit in plans.plan_generate(run)]
    names = ("documents", "new_tokens", "ended", "too_long")
    counts = {name: sum(shard.read(int, name) for shard in shards) for name in names}
    source = run.config.generate.prompts
    messages = ", messages: messages" if source is not None and source.messages is not None else ""
    print(
        f"{counts['documents']:,} documents, {counts['new_tokens']:,} new tokens; {counts['ended']:,} came to an end; "
        f"{counts['too_long']:,} prompts were too long\n"
        f"to distil on it: data: {{sources: [{{path: {run.generated}{messages}, weight: 0.5}}, …]}}"
    )


def _print_profile(run: Run) -> None:
    from puzzle.report import profile

    frame = profile.profile_frame(run)
    backend = run.config.profile.backend
    print(f"milliseconds of the teacher in one forward ({'estimated' if backend == 'roofline' else backend})")
    print(frame.round(3).to_string(index=False))
    for gap in run.read_costs().gaps:
        what = f"{gap.shape_id} at " if gap.shape_id else ""
        print(
            f"not measured: {what}{gap.phase}, batch size {gap.batch_size}, {gap.context_tokens} tokens: {gap.reason}"
        )
    picture = run.folder / "costs" / "profile.png"
    picture.parent.mkdir(exist_ok=True)
    profile.draw_profile(frame, picture)
    print(picture)


def _show(options: argparse.Namespace) -> None:
    from puzzle import tables
    from puzzle.profiling.imported import write_table

    run = open_run(options)
    run.check_searches()
    if options.what == "scores":
        frame = tables.scores_frame(run.read_scores())
    elif options.what == "costs":
        frame = tables.costs_frame(run.read_costs())
    else:
        from puzzle.report import library

        frame = library.library_frame(run)
        library.draw(frame, run.folder / "library" / "library.png")
    if options.output and options.what == "costs":
        write_table(options.output, run.read_costs(), run.cost_source.environment)
    elif options.output:
        frame.to_csv(options.output, index=False)
    else:
        print(frame.to_string(index=False))
    if options.what == "library":
        print(run.folder / "library" / "library.png")


if __name__ == "__main__":
    sys.exit(main())
