"""The commands around the search: ``search``, ``refine``, ``pareto``, ``chain``, ``shrink``, and of its files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puzzle import capabilities, config, yamlfiles
from puzzle.cli_options import open_run, open_widths, with_run
from puzzle.report.words import figure, headline, status, with_error
from puzzle.types import ConfigError, InfeasibleError, OutOfTimeError, Solution

if TYPE_CHECKING:
    from puzzle.artifacts import Unit
    from puzzle.run import Run
    from puzzle.search.problem import Problem

FRONT_ROWS, GRID_LIMITS = 20, 8  # of a printed front; for each of several costs
DEFAULT_EVALUATIONS = 60  # of refine


def add_commands(commands: Any) -> None:
    """Adds the parsers; ``commands`` is what argparse's ``add_subparsers`` returned."""
    pareto = with_run(commands.add_parser("pareto", help="the whole front of accuracy against one cost, or several"))
    pareto.add_argument(
        "--cost",
        action="append",
        metavar="METRIC",
        help="as in a constraint file, e.g. chat.memory_gib (default params); several give a grid of searches",
    )
    pareto.add_argument(
        "--points", type=int, help="rows of the table (default 20); of several costs, limits for each (default 8)"
    )
    pareto.add_argument("--output", type=Path, help="folder for pareto.csv and pareto.png (default: the run's)")
    pareto.set_defaults(command=_pareto)

    chain = with_run(commands.add_parser("chain", help="a nested family: each model a reduction of the one before"))
    chain.add_argument("--cost", default="params", help="what is limited, as in a constraint file (default params)")
    chain.add_argument("--points", type=int, default=5, help="how many architectures (default 5)")
    chain.add_argument("--output", type=Path, metavar="CSV", help="default: chain.csv in the run's folder")
    chain.set_defaults(command=_chain)

    shrink = with_run(commands.add_parser("shrink", help="write a space of pairs (coupled BLD) of what is popular"))
    shrink.add_argument("output", type=Path, metavar="SPACE", help="the space file to write")
    shrink.add_argument("--cost", default="params", help="a metric as in a constraint file (default params)")
    shrink.add_argument("--within", type=float, default=0.15, help="of the solution's cost, either way (default 0.15)")
    shrink.add_argument("--least-share", type=float, default=0.05, help="of architectures that use it (default 0.05)")
    shrink.set_defaults(command=_shrink)

    limits = commands.add_parser("constraints", help="explain a constraint file, or import one").add_subparsers(
        required=True, metavar="COMMAND"
    )
    explained = with_run(limits.add_parser("explain", help="say what each line means in numbers for this teacher"))
    explained.set_defaults(command=_explain)
    imported = limits.add_parser("import", help="turn puzzletron's constraints (NVIDIA Model Optimizer) into ours")
    imported.add_argument("files", type=Path, nargs="+", metavar="FILE", help="its YAML files, later ones over earlier")
    imported.add_argument("-o", "--output", type=Path, required=True, help="the constraint file to write")
    imported.add_argument("--isl", type=int, help="prompt tokens, where the files do not say")
    imported.add_argument("--osl", type=int, help="generated tokens, where the files do not say")
    imported.add_argument("--device", help="where times are to hold, e.g. h100")
    imported.set_defaults(command=_import)

    schema = commands.add_parser("schema", help="print the JSON Schema of a kind of file, for editors")
    schema.add_argument("kind", choices=["constraints", "config", "space", "grid"])
    schema.set_defaults(command=_schema)


def search(run: Run, stage: str, redo: bool) -> None:
    """Searches (or measures what decides the search) once, or for each value of a list, and prints what was found."""
    from puzzle import pipeline

    runs = run.each_pick()
    if len(runs) == 1:
        pipeline.run_stage(runs[0], stage, redo)
        if stage == "search":
            print_solutions(runs[0].unrefined)
        return
    _fan_out(runs, stage, redo)


def search_widths(runs: Sequence[Run], stage: str, redo: bool) -> None:
    """The same for each hidden size, in one table."""
    _fan_out([one for run in runs for one in run.each_pick()], stage, redo, of_widths=True)


def refine(options: argparse.Namespace) -> None:
    """Refines what the search found, and prints it beside the search's own."""
    from puzzle import artifacts, pipeline

    run = open_run(options).uncontested
    if not run.config.refine.evaluations:
        options.evaluations = DEFAULT_EVALUATIONS
        run = open_run(options).uncontested
    pipeline.run_stage(run, "refine", options.redo)
    print(_comparison(artifacts.read_unit(run.solution), run.solutions()[0].objective_name))
    print(run.solution / "architecture.json")
    print(f"to go on with it: puzzle run … --set refine.evaluations={run.config.refine.evaluations}, or in the config")


@dataclass(frozen=True)
class _Refined:
    """A row of what refine compared; true values with their errors, None: not finite, not known."""

    name: str
    sum: float
    predicted: float
    select: tuple[float | None, float | None]
    report: tuple[float | None, float | None]
    excess: tuple[float | None, float | None]


def _comparison(refined: Unit, objective: str) -> str:
    import pandas as pd

    rows = [
        {
            "": row.name,
            "sum of scores": f"{row.sum:.4f}",
            "predicted": f"{row.predicted:.4f}",
            "true on select": _measured(row.select),
            "true on report": _measured(row.report),
            "against the search": _measured(row.excess, "+"),
        }
        for row in refined.read(list[_Refined], "comparison")
    ]
    why = "the answer stands" if refined.read(bool, "stands") else "all are spent"
    num_trials = refined.read(int, "num_trials")
    head = f"{objective}, {num_trials} true evaluations on select ({why}); nothing was chosen on report"
    return head + "\n" + pd.DataFrame(rows).to_string(index=False)


def _measured(found: Sequence[float | None], sign: str = "") -> str:
    """A mean and its error; None: of outputs that are not finite, and the error of a single sequence."""
    mean, error = found
    if mean is None:
        return "not finite"
    return f"{mean:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")


def print_solutions(run: Run) -> None:
    for rank, solution in enumerate(run.solutions(), start=1):
        print(f"solution {rank}: {headline(solution)}")
        for name, value in solution.totals.items():
            print(f"  {name:<28}{figure(value)}" + ("  (estimate)" if name in solution.estimated else ""))
    for line in capabilities.told(capabilities.offer(run.items, run.constraint_file.serve_on, run.shape).refused):
        print(f"not on offer: {line}")
    print(run.solution / "architecture.json")


def _fan_out(runs: Sequence[Run], stage: str, redo: bool, of_widths: bool = False) -> None:
    """One search for each of ``runs``; what cannot be met is a line of the table, and an error only if nothing can."""
    from puzzle import pipeline
    from puzzle.widths import label

    found: list[tuple[Run, Solution | InfeasibleError | OutOfTimeError]] = []
    for run in runs:
        try:
            pipeline.run_stage(run, stage, redo)
            if stage == "search":
                found.append((run, run.unrefined.solutions()[0]))
        except (InfeasibleError, OutOfTimeError) as error:
            found.append((run, error))
    if stage == "search":
        print(_table(found, of_widths))
    reasons = [
        f"{label(run) if of_widths else f'pick {run.pick}'}: {answer}"
        for run, answer in found
        if not isinstance(answer, Solution)
    ]
    if len(reasons) == len(runs):
        raise InfeasibleError("; ".join(reasons))
    print("\n".join(reasons), end="\n" if reasons else "")
    if stage != "search":
        return
    if of_widths:
        several = len({run.pick for run in runs}) > 1
        print(f"`puzzle run` goes on with the best{' of one pick: puzzle run … --pick N' if several else ''}")
    else:
        print(f"{runs[0].folder / 'solutions'}; to go on with one of them: puzzle run … --pick N")


def _table(found: Sequence[tuple[Run, Solution | InfeasibleError | OutOfTimeError]], of_widths: bool) -> str:
    """One line for each search: its values, what was found, and its folder."""
    import pandas as pd

    rows = []
    for run, answer in found:
        pick = run.picks[(run.pick or 1) - 1]
        row = {
            **({"hidden size": str(run.shape.hidden_size)} if of_widths else {}),
            "pick": str(pick.number),
            **{key: f"{value:.12g}" if isinstance(value, float) else value for key, value in pick.values},
        }
        if not isinstance(answer, Solution):
            rows.append({**row, "status": "infeasible" if isinstance(answer, InfeasibleError) else "out of time"})
            continue
        asked = [*run.constraint_file.constraints, *([answer.minimised] if answer.minimised else [])]
        shown = [name for name in answer.totals if any(name == key or name.endswith(f".{key}") for key in asked)]
        rows.append(
            {
                **row,
                "status": status(answer),
                f"{answer.objective_name} predicted": with_error(answer),
                **{
                    f"{name} reached": figure(answer.totals[name]) + (" (estimate)" * (name in answer.estimated))
                    for name in shown
                    if name != answer.objective_name
                },
                "solution": run.unrefined.solution_id,
            }
        )
    columns = [*dict.fromkeys(key for row in rows for key in row if key != "solution"), "solution"]
    return pd.DataFrame([[row.get(key, "") for key in columns] for row in rows], columns=columns).to_string(index=False)


def _pareto(options: argparse.Namespace) -> None:
    from puzzle.search import effort_of, surface
    from puzzle.search.pareto import front as front_of
    from puzzle.search.pareto import plot

    costs = options.cost or ["params"]
    if options.points is not None and options.points < 1:
        raise ConfigError(f"--points: give 1 or more, found {options.points}")
    if (offered := open_widths(options)) is not None:
        _pareto_of_widths(offered.searches(print), costs, options)
        return
    run = open_run(options)
    problem, folder = _at_batch_sizes(run), options.output or run.folder / "pareto"
    folder.mkdir(parents=True, exist_ok=True)
    table, picture = folder / "pareto.csv", folder / "pareto.png"
    if len(costs) == 1:
        front = front_of(problem, costs[0])
        print(front.frame(options.points or FRONT_ROWS).to_string(index=False))
        front.frame().to_csv(table, index=False)
        plot(front, picture)
        print(f"{len(front)} points, within the file's limits or not; {table}, {picture}")
        return
    found = surface.surface(problem, costs, options.points or GRID_LIMITS, effort_of(run.constraint_file))
    print(found.frame().to_string(index=False))
    found.frame(architectures=True).to_csv(table, index=False)
    surface.plot(found, picture)
    late = f"; at {found.unfinished} limits nothing was found in time" if found.unfinished else ""
    print(f"{len(found.points)} points, within the file's limits or not{late}; {table}, {picture}")


def _at_batch_sizes(run: Run, whose: str = "") -> Problem:
    """The search at the batch sizes that it chooses, or the first ones where nothing fits. Says at which."""
    from puzzle.search import effort_of, mip
    from puzzle.search.problem import solved

    problems = run.problems()
    if len(problems) == 1:
        return problems[0]
    problem, why = problems[0], ""
    try:
        (best,) = mip.solve(problems, {}, effort=effort_of(run.constraint_file)).solutions
        problem = solved(problems, best)
    except InfeasibleError:
        why = " (nothing keeps all limits)"
    except OutOfTimeError:
        why = " (nothing was found in time)"
    print(f"{whose}at {problem.label}{why}")
    return problem


def _pareto_of_widths(runs: Sequence[Run], costs: Sequence[str], options: argparse.Namespace) -> None:
    """The front of all hidden sizes together, with the one that each point is of."""
    from puzzle.search.pareto import front as front_of
    from puzzle.widths import joint_front

    if len(costs) > 1:
        raise ConfigError("several widths have a front against one --cost; for several, give the folder of a search")
    fronts = [
        (run.shape.hidden_size, front_of(_at_batch_sizes(run, f"hidden size {run.shape.hidden_size} "), costs[0]))
        for run in runs
    ]
    frame = joint_front(fronts)
    count = min(options.points or FRONT_ROWS, len(frame))
    shown = frame.iloc[[round(row * (len(frame) - 1) / max(1, count - 1)) for row in range(count)]]
    print(shown.to_string(index=False))
    table = (options.output or runs[0].folder.parents[3] / "pareto") / "pareto.csv"
    table.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(table, index=False)
    print(f"{len(frame)} points; {table}")


def _chain(options: argparse.Namespace) -> None:
    from puzzle.search import chain, effort_of

    run = open_run(options)
    problem, effort = _at_batch_sizes(run), effort_of(run.constraint_file)
    limits = chain.even_limits(problem, options.cost, options.points)
    found = chain.chain(problem, run.shape, options.cost, limits, effort)
    print(found.frame().to_string(index=False))
    table = options.output or run.folder / "chain.csv"
    table.parent.mkdir(parents=True, exist_ok=True)
    found.frame(architectures=True).to_csv(table, index=False)
    total = sum(link.objective for link in found.links)
    how = "optimal" if found.proven else "feasible"
    print(f"in sum {total:.4f} ({how}, bound {round(found.bound, 4) + 0.0:.4f}); {table}")


def _shrink(options: argparse.Namespace) -> None:
    from dataclasses import replace

    from puzzle import pipeline
    from puzzle.search.pareto import front as front_of
    from puzzle.search.problem import solved
    from puzzle.search.shrink import popular
    from puzzle.variants import is_fused

    run = open_run(options)
    if options.output.exists():
        raise ConfigError(f"{options.output} exists; choose another name")
    (solution, *_) = pipeline.solve(run, {})
    problem = solved(run.problems(), solution)
    if problem.label:
        print(f"at {problem.label}")
    problem = replace(problem, items=tuple(item for item in problem.items if not is_fused(item)))  # no pairs can be
    front = front_of(problem, options.cost)
    cost = float(problem.quantity(options.cost).value(solution.items))
    space = popular(problem, front, (cost * (1 - options.within), cost * (1 + options.within)), options.least_share)
    options.output.write_text(yamlfiles.dump(space), encoding="utf-8")
    pairs = sum(len(layer.attention or ()) * len(layer.ffn or ()) for layer in space.layers.values())
    print(f"wrote {options.output}: {pairs} pairs; train them in a new run: set run and space, then `puzzle run`")


def _explain(options: argparse.Namespace) -> None:
    from puzzle.search.meaning import meaning
    from puzzle.types import Costs, MissingMeasurementError

    run = open_run(options)
    run.check_searches()
    assert run.constraints is not None  # a search has limits
    try:
        costs = run.read_costs()
    except MissingMeasurementError:  # said again for each bound that needs one
        costs = Costs()
    file = run.constraint_file if run.pick else yamlfiles.load(config.ConstraintFile, run.constraints)
    print(f"{run.constraints} for the teacher {run.teacher_name}")
    print("\n".join(meaning(run.shape, run.items, costs, file, run.config.score.tasks)))


def _schema(options: argparse.Namespace) -> None:
    from puzzle.schema import schema

    print(json.dumps(schema(options.kind), indent=2))


def _import(options: argparse.Namespace) -> None:
    from puzzle.search.puzzletron import convert

    if options.output.exists():
        raise ConfigError(f"{options.output} exists; choose another name")
    imported = convert(options.files, options.isl, options.osl, options.device)
    options.output.write_text(imported.text, encoding="utf-8")
    for one in imported.left:
        print(f"not taken over: {one}")
    print(f"wrote {options.output}; next: puzzle constraints explain RUN --constraints {options.output}")
