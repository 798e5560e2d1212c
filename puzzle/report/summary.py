"""What a run found, gathered from its units into one record, and as a table for a terminal or a model card.

Reads the solution, the evaluation and the cost table; computes what the search predicts for the teacher and for the
student; writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from puzzle import artifacts
from puzzle.basis import STORED_DTYPES
from puzzle.pruning import change, predicted
from puzzle.report.layers import Layer, layers_of_run
from puzzle.report.served import served_figures
from puzzle.report.table import Table
from puzzle.report.tasks import ERRORS as TASK_ERRORS
from puzzle.report.tasks import TaskFigure
from puzzle.report.tasks import rows as task_rows
from puzzle.report.tournament import standings
from puzzle.search.problem import solved
from puzzle.types import GIB, Solution

if TYPE_CHECKING:
    from puzzle.run import Run

MODELS = ("teacher", "student before GKD", "student")
TIMES = {"ttft_ms": "ms", "tpot_ms": "ms", "output_tok_per_s": "tok/s"}
FIGURES = {
    "ce_nats": "CE, nats/token",
    "bits_per_byte": "bits per byte",
    "kl_nats": "KL to the teacher, nats/token",
    "ce_gap_nats": "CE gap to the teacher",
    "agreement": "top-1 agreement",
}
KD_TEACHER = "kd_teacher_kl_nats"  # a figure, where another teacher than the run's own distilled
ERRORS = "Standard errors (±) are over sequences of the report split, on which nothing was chosen."
TIMED = """\
Times: predicted by the search from the profile; then, measured in the same rounds, the sum of the parts and the whole
model. Parts against whole says whether times add up; predicted against whole also holds how the machine drifted since
the profile."""
SERVED = "vLLM: what `vllm bench` measured in milliseconds or per second."
TIMED_WHOLE = "Times: estimated by the roofline where it knows the device; then, measured, the whole model."


@dataclass(frozen=True)
class Summary:
    """``solution`` is a search's; None where the run is a pruning, whose predicted times are estimates."""

    title: str
    solution: Solution | None
    predicted: Mapping[str, Mapping[str, float]]  # model → metric → value
    quality: Mapping[str, Mapping[str, Mapping[str, float]]]  # model → figure → mean, standard_error
    params: Mapping[str, int]
    stored_dtype: str
    # workload → model → whole or parts → figure
    speed: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]
    layers: tuple[Layer, ...]
    standings: Table | None  # of the tournament, if there was one
    tasks: tuple[TaskFigure, ...]
    served: Mapping[str, Mapping[str, float]]  # workload.model → metric → what vllm bench measured
    positions: Sequence[Mapping[str, Any]]  # of the student: tokens in sight of a prediction, figures
    distilled_by: str  # the teacher's name

    @classmethod
    def of(cls, run: Run) -> Summary:
        """Of an evaluated student."""
        evaluation = artifacts.read_unit(run.evaluation)
        solution = run.solutions()[0] if run.config.prune is None else None
        return cls(
            title=f"{run.teacher_name}: {run.limits_name if solution else change(run.shape, run.student_shape)}",
            solution=solution,
            predicted=_predicted_of_search(run, solution) if solution else _predicted_of_pruning(run),
            quality={model: evaluation.read(dict[str, Any], "quality", model) for model in MODELS},
            params={model: evaluation.read(int, "params", model) for model in MODELS},
            stored_dtype=run.stored_dtype,
            speed=evaluation.read(dict[str, dict[str, dict[str, Any]]], "speed"),
            layers=layers_of_run(run),
            standings=standings(run),
            tasks=_answered(run),
            served=served_figures(run),
            positions=evaluation.read(list[dict[str, Any]], "quality", "student", "positions"),
            distilled_by=run.distilling.teacher_name,
        )

    def rows(self) -> list[tuple[str, ...]]:
        """A figure's name, and its cells for MODELS: parameters, bytes, quality, then times, predicted and measured."""
        sizes = {name: count * STORED_DTYPES[self.stored_dtype] / GIB for name, count in self.params.items()}
        rows: list[tuple[str, ...]] = [
            ("parameters", *(f"{self.params[model]:,}" for model in MODELS)),
            (f"weights, GiB ({self.stored_dtype})", *(f"{sizes[model]:.4g}" for model in MODELS)),
        ]
        figures = dict(FIGURES)
        if KD_TEACHER in self.quality["student"]:
            figures[KD_TEACHER] = f"KL to {self.distilled_by}, which distilled it"
        for name, label in figures.items():
            rows.append((label, *(_estimate(self.quality[model][name]) for model in MODELS)))
        rows += task_rows(self.tasks, MODELS)
        for metric, amount in self.predicted["student"].items():
            if metric.endswith(("memory_gib", "kv_cache_gib")):
                own = self.predicted["teacher"].get(metric)
                rows.append((f"{metric}, predicted", "" if own is None else f"{own:.4g}", "", f"{amount:.4g}"))
        for workload, of in self.speed.items():
            for name, unit in TIMES.items():
                key = f"{workload}.{name}"
                teacher, student = (
                    _times(self.predicted[model].get(key), of[model], name) for model in ("teacher", "student")
                )
                predicted = "estimate" if self.solution is None or key in self.solution.estimated else "predicted"
                rows.append((f"{key}, {unit}: {predicted} / parts / whole", teacher, "", student))
        return [*rows, *self._served_rows()]

    def _served_rows(self) -> list[tuple[str, ...]]:
        measured = {
            (f"{workload}.{name}", model): value
            for (workload, _, model), figures in ((key.rpartition("."), of) for key, of in self.served.items())
            for name, value in figures.items()
        }
        return [
            (
                f"{key}: predicted / vLLM",
                *(_beside(self.predicted.get(model, {}).get(key), measured.get((key, model))) for model in MODELS),
            )
            for key in dict.fromkeys(key for key, _ in measured)
        ]

    def by_position(self) -> Table:
        """CE of teacher and student, and KL between them, by how many tokens a prediction sees."""
        names = ("teacher_ce_nats", "ce_nats", "kl_nats")
        return Table(
            ("tokens in sight", "CE, teacher", "CE, student", "KL"),
            tuple(
                (f"{at['first']} to {at['last']}", *(_estimate(at[name]) for name in names)) for at in self.positions
            ),
        )

    def table(self) -> str:
        """The figures, and what they mean."""
        tables = (Table(("", *MODELS), tuple(self.rows())), self.by_position())
        return "\n\n".join([*(table.markdown() for table in tables), self.notes])

    @property
    def notes(self) -> str:
        more = [TASK_ERRORS] if self.tasks else []
        more += [SERVED] if self.served else []
        more += [TIMED if self.solution else TIMED_WHOLE] if self.speed else []
        return " ".join([ERRORS, *more])

    def markdown(self) -> str:
        lines = [f"# {self.title}", "", self.table(), ""]
        lines += [self.standings.markdown(), ""] if self.standings else []
        layers = tuple((str(index), of.attention.name, of.ffn.name) for index, of in enumerate(self.layers))
        return "\n".join([*lines, Table(("layer", "attention", "FFN"), layers).markdown()]) + "\n"


def _predicted_of_search(run: Run, solution: Solution) -> dict[str, Mapping[str, float]]:
    """Nothing of the teacher where a layer does not offer its block: it was not on the table."""
    problem = solved(run.problems(), solution)
    teacher = {} if problem.teacher is None else problem.totals(problem.teacher)
    return {"teacher": teacher, "student": solution.totals}


def _predicted_of_pruning(run: Run) -> dict[str, Mapping[str, float]]:
    shapes = {"teacher": run.shape, "student": run.student_shape}
    return {name: predicted(shape, run.constraint_file) for name, shape in shapes.items()}


def _answered(run: Run) -> tuple[TaskFigure, ...]:
    paths = [run.task(name) for name in run.config.evaluate.tasks]
    return tuple(figure for path in paths for figure in artifacts.read_unit(path).read(list[TaskFigure], "figures"))


def _estimate(value: Mapping[str, float]) -> str:
    return f"{value['mean']:.4f} ± {value['standard_error']:.4f}"


def _beside(predicted: float | None, measured: float | None) -> str:
    if measured is None:
        return ""
    return f"{'not profiled' if predicted is None else f'{predicted:.2f}'} / {measured:.2f}"


def _times(predicted: float | None, timed: Mapping[str, Mapping[str, float]], name: str) -> str:
    from_table = "not profiled" if predicted is None else f"{predicted:.2f}"
    parts = f"{timed['parts'][name]:.2f}" if timed["parts"] else "–"  # a pruned model is not made of measured parts
    return f"{from_table} / {parts} / {timed['whole'][name]:.2f}"
