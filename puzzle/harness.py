"""Tasks of the lm-evaluation-harness (lm-eval), answered by several models: right answers beside CE and KL.

Reads models with their tokenizers and the definitions of tasks, those that lm-eval ships or YAML files in a folder;
computes lm-eval's metrics with its standard errors, and what a model differs by from the first one, paired over the
questions, which tells far smaller differences than two errors side by side. Writes nothing. lm-eval is imported when it
is needed and not before: it takes seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from puzzle import yamlfiles
from puzzle.config import EvaluateConfig
from puzzle.modeling import PuzzleForCausalLM
from puzzle.report.tasks import TaskFigure
from puzzle.search.goal import nearest
from puzzle.types import ConfigError, mean_and_error

INSTALL = "pip install 'puzzle-nas[eval]'"
BATCH_QUESTIONS = 8
RESAMPLED = 1000  # for errors of metrics that are no means


@dataclass(frozen=True)
class Answerer:
    """A model that answers. ``tokenizer`` is transformers'."""

    name: str
    model: PuzzleForCausalLM
    tokenizer: Any


class Harness:
    """Tasks, and how they are asked. ConfigError where lm-eval is missing, or knows no task of a name."""

    def __init__(self, settings: EvaluateConfig) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ConfigError(f"tasks need lm-eval, which cannot be imported here ({error}): {INSTALL}") from None
        self._settings = settings
        folder = settings.task_folder
        own = [] if folder is None else yamlfiles.files_in(folder, "evaluate.task_folder")
        self._manager = TaskManager(include_path=folder, include_defaults=folder is None)
        if not set(settings.tasks) <= set(self._manager.all_tasks):  # going through lm-eval's own takes seconds
            self._manager = TaskManager(include_path=folder)
        for name in settings.tasks:
            if name not in self._manager.all_tasks:
                for file in own:
                    if file.suffix == ".yaml":
                        yamlfiles.read_yaml(file)  # lm-eval passes over one that is no YAML
                where = "" if folder is None else f", nor is there one in {folder}"
                raise ConfigError(f"lm-eval has no task {name!r}{where}{nearest(name, self._manager.all_tasks)}")

    def figures(self, task: str, subjects: Sequence[Answerer]) -> list[TaskFigure]:
        """Of each model, the first as what the others are compared with. ConfigError where data cannot be had."""
        found = [self._answered(task, subject) for subject in subjects]
        return [
            figure
            for subject, answers in zip(subjects, found, strict=True)
            for figure in _figures(task, subject.name, answers, None if answers is found[0] else found[0])
        ]

    def _answered(self, task: str, subject: Answerer) -> Mapping[str, Any]:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        model = HFLM(
            pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=BATCH_QUESTIONS, backend="causal"
        )
        try:
            found: Mapping[str, Any] = simple_evaluate(
                model=model,
                tasks=[task],
                task_manager=self._manager,
                num_fewshot=self._settings.task_shots,
                limit=self._settings.task_questions,
                bootstrap_iters=RESAMPLED,
                log_samples=True,
            )
        except OSError as error:  # what `datasets` makes of a hub out of reach, or a file that is not there
            raise ConfigError(f"task {task}: its questions cannot be read ({error})".splitlines()[0]) from None
        except RuntimeError:  # the model's, not the task's
            raise
        except Exception as error:  # a task's templates, splits and metrics are code: they fail in any way
            cause = error.__cause__ or error
            said = f"{type(cause).__name__}: {cause}".splitlines()[0]
            raise ConfigError(f"task {task}: lm-eval cannot ask it ({said}); look at its YAML and questions") from error
        return found


def _figures(task: str, model: str, found: Mapping[str, Any], first: Mapping[str, Any] | None) -> list[TaskFigure]:
    results = found["results"]
    figures = []
    for name in [task] if task in results else sorted(results):  # a tag stands for tasks, and has no result of its own
        for key, value in results[name].items():
            metric, _, of = key.partition(",")
            if not of or metric.endswith("_stderr"):
                continue
            error = results[name].get(f"{metric}_stderr,{of}")
            known = error if isinstance(error, float) else None
            gap = None if first is None else _gap(_values(found, name, metric, of), _values(first, name, metric, of))
            label = metric if of == "none" else f"{metric} ({of})"
            figures.append(TaskFigure(name, label, model, float(value), known, gap))
    return figures


def _values(found: Mapping[str, Any], task: str, metric: str, of: str) -> dict[int, float]:
    """By question; none where the metric is no number of a question's own."""
    samples = [one for one in found["samples"].get(task, ()) if one["filter"] == of]
    return {one["doc_id"]: float(one[metric]) for one in samples if isinstance(one.get(metric), bool | int | float)}


def _gap(own: Mapping[int, float], other: Mapping[int, float]) -> tuple[float, float] | None:
    if not own or own.keys() != other.keys():
        return None
    return mean_and_error([own[question] - other[question] for question in own])
