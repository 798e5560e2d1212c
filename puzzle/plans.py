"""What the units of every stage are made from: where each lies, and the fingerprints of all that goes in. Pure.

Reads the run's configuration and the markers of units already on disk. A unit whose marker holds the same fingerprints
is done; one with others is stale (artifacts.py). What a stage depends on is named here, or its units are not made anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puzzle import artifacts, checkpoint, yamlfiles
from puzzle.capabilities import FORMAT_OF
from puzzle.config import ImportanceConfig
from puzzle.data.inputs import data_inputs, source_fingerprint
from puzzle.data.packing import num_windows
from puzzle.pruning import num_dropped
from puzzle.scoring.sampling import undecided
from puzzle.types import ConfigError, Format, Item, Score
from puzzle.variants import has_weights, is_teacher, made_of, shape_id, variant_name

if TYPE_CHECKING:
    from puzzle.run import Run

SHARD_DOCUMENTS = 64  # of generated text, published together


@dataclass(frozen=True)
class Planned:
    """One unit: where it lies, and named fingerprints of what it is made from.

    ``outgrown``: it is there, but more is asked now; it is made anew, and stays until it is replaced.
    """

    path: Path
    inputs: Mapping[str, str]
    outgrown: bool = False


@dataclass(frozen=True)
class Truth(Planned):
    """The true scores of a whole architecture on a split; ``changes`` are its items, the teacher's own left out."""

    changes: tuple[Item, ...] = ()
    split: str = "score"


def plan_data(run: Run) -> list[Planned]:
    tokenizer = checkpoint.tokenizer_fingerprint(run.teacher)
    return [Planned(run.data, {**data_inputs(run.config.data, run.folder), "tokenizer": tokenizer})]


def plan_init(run: Run) -> list[Planned]:
    settings = [run.config.init.model_dump(), run.config.distill.loss_at, run.config.distill.loss]
    return [
        Planned(run.initial(unit), {**_teacher_and_data(run), "init": _slice(run, settings), **_widths(run, unit)})
        for unit in run.units
    ]


def plan_distill(run: Run) -> list[Planned]:
    # how much trains at once, and what is kept where, changes nothing
    settings = run.config.distill.model_dump(exclude={"residual", "nested"})
    return [
        Planned(
            run.trained(unit),
            {
                **_teacher_and_data(run),
                "initial": artifacts.content_of(run.initial(unit)),
                "distill": _slice(run, [settings, run.config.dtype]),
                **_widths(run, unit),
            },
        )
        for unit in run.units
    ]


def _widths(run: Run, unit: str) -> dict[str, str]:
    """Of a nested unit: the widths that share it."""
    items = run.units[unit]
    return {"widths": ", ".join(variant_name(item.specs[0]) for item in items)} if len(items) > 1 else {}


def plan_score(run: Run) -> list[Planned]:
    paths = {name: run.scores / f"{name}.json" for name in run.scored_together}
    base = [Planned(run.base_score, scored_from(run, [], estimated=False) | _original(run))] if run.original else []
    return base + [
        Planned(paths[name], scored_from(run, items, estimated=run.estimated), _is_undecided(run, paths[name]))
        for name, items in run.scored_together.items()
    ]


def _original(run: Run) -> dict[str, str]:
    """The teacher that the run's own was pruned from, where it is a search at another width."""
    return {} if run.original is None else {"original": run.original.teacher_fingerprint}


def _is_undecided(run: Run, path: Path) -> bool:
    """Whether ``score.until_se`` asks for more than the scores of a unit can tell, and there are more sequences."""
    until = run.config.score.until_se
    if until is None or not path.exists():
        return False
    records = artifacts.read_unit(path).read(list[Score], "scores")
    scores = {score.item_id: score.per_sequence for score in records if score.metric == "kl"}
    counts = artifacts.read_unit(run.data).read(dict[str, int], "num_tokens")
    available = num_windows(counts, "score", run.config.data.sequence_tokens)
    return any(len(values) < available for values in scores.values()) and bool(undecided(scores, until))


def exact_unit(run: Run, item: Item) -> Planned:
    """An item's exact score where the others are estimates."""
    return Planned(run.folder / "rescored" / f"{item.id}.json", scored_from(run, [item], estimated=False))


def scored_from(run: Run, items: Sequence[Item], estimated: bool, split: str = "score") -> dict[str, str]:
    settings = [run.num_sequences(split), run.config.score.tasks, estimated, run.config.dtype]
    return {
        **_teacher_and_data(run),
        "library": _library_content(run, [*items, *run.context]),
        "space": artifacts.fingerprint([item.id for item in items]),
        "score": _slice(run, settings),
    }


def plan_importance(run: Run) -> list[Planned]:
    """And, where a pruning asks for it, what leaving layers out costs."""
    how = run.config.prune.importance if run.config.prune else ImportanceConfig()
    settings = [run.config.init.sequences, how.model_dump()]
    units = [Planned(run.importance, {**_teacher_and_data(run), "init": _slice(run, settings)})]
    if run.config.prune is not None and run.config.prune.layers_by in ("loss", "contiguous"):
        paths = dict.fromkeys(one.drops for one in run.contenders if num_dropped(one.pruning, one.shape))
        units += [Planned(path, scored_from(run, [], estimated=False)) for path in paths]
    return units


def pruning_fingerprint(run: Run) -> str:
    """Of what is asked for; of combinations of sizes, with what chooses between them."""
    asked = run.config.prune
    assert asked is not None
    if asked.grid is not None:
        return _slice(run, [asked.model_dump(), run.config.init.model_dump(), _tournament_settings(run)])
    return _slice(run, [asked.model_dump(exclude={"grid"}), run.config.init.model_dump()])


def plan_prune(run: Run) -> list[Planned]:
    return [Planned(run.student / "initial", prune_inputs(run) | _winner(run))]


def prune_inputs(run: Run) -> dict[str, str]:
    scored = [artifacts.content_of(unit.path) for unit in plan_importance(run)]
    return {
        **_teacher_and_data(run),
        "importance": artifacts.fingerprint(scored),
        "prune": pruning_fingerprint(run),
    }


def _winner(run: Run) -> dict[str, str]:
    return {"winner": artifacts.content_of(run.contest)} if run.config.tournament.candidates else {}


def truth_of(run: Run, item_ids: Iterable[str], split: str) -> Truth:
    """Where the true scores of an architecture lie, and what they are made from."""
    if run.context:
        raise ConfigError("architectures are evaluated as changes to the teacher; leave out --on")
    if run.original is not None and split != "score":
        raise ConfigError("true evaluations are of changes to the teacher alone; this search is at another width")
    chosen = set(item_ids)
    changes = tuple(item for item in run.items if item.id in chosen and not is_teacher(item))
    path = run.folder / "truth" / split / f"{artifacts.fingerprint([item.id for item in changes])}.json"
    return Truth(path, scored_from(run, changes, estimated=False, split=split), changes=changes, split=split)


def plan_additivity(run: Run) -> list[Planned]:
    return [truth_of(run, one.items, "score") for one in run.draws.values()]


def plan_generate(run: Run) -> list[Planned]:
    settings, seed = run.config.generate, run.config.seed
    recipe = [settings.model_dump(exclude={"documents", "batch_size", "prompts"}), seed, run.config.dtype]
    inputs = {
        "teacher": run.teacher_fingerprint,
        "tokenizer": checkpoint.tokenizer_fingerprint(run.teacher),
        "generate": artifacts.fingerprint(recipe),
    }
    if settings.prompts is not None:
        inputs["prompts"] = source_fingerprint(settings.prompts, run.folder)
    shards = range(0, settings.documents, SHARD_DOCUMENTS)
    stops = [min(first + SHARD_DOCUMENTS, settings.documents) for first in shards]
    return [
        Planned(run.generated / f"{first:08d}-{stop:08d}", inputs) for first, stop in zip(shards, stops, strict=True)
    ]


def rows_of_shard(path: Path) -> range:
    """The numbers of the documents that a shard of generated text holds."""
    first, stop = map(int, path.name.split("-"))
    return range(first, stop)


def plan_rescore(run: Run) -> list[Planned]:
    return [Planned(run.rescored, tables(run))] if run.estimated else []


def plan_profile(run: Run) -> list[Planned]:
    return [Planned(path, measured_from(run)) for path in run.cost_source.units]


def plan_fit_costs(run: Run) -> list[Planned]:
    if run.config.profile.backend != "measured":
        raise ConfigError("whole models are measured beside measured parts only; set profile.backend: measured")
    return [Planned(path, measured_from(run)) for path in run.cost_source.whole_models]


def measured_from(run: Run) -> dict[str, str]:
    shapes, profile = sorted(shape_id(spec, run.shape) for spec in run.specs), run.config.profile
    return {
        "shape": artifacts.fingerprint(vars(run.shape)),
        "space": artifacts.fingerprint(shapes),
        "profile": artifacts.fingerprint([run.config.device, profile.weights, profile.compile, run.grid.repeats]),
        **_engine(run),
    }


def _engine(run: Run) -> dict[str, str]:
    """What only times in vLLM depend on: its settings, and all points, which one start of it measures."""
    profile = run.config.profile
    if profile.backend != "vllm" or profile.vllm is None:
        return {}
    points = [point.id for point in run.grid_points]
    return {"vllm": artifacts.fingerprint([profile.vllm.model_dump(exclude={"python"}), points])}


def plan_search(run: Run) -> list[Planned]:
    return [Planned(run.unrefined.solution, search_inputs(run))]


def plan_refine(run: Run) -> list[Planned]:
    return [Planned(run.uncontested.solution, refine_inputs(run))] if run.config.refine.evaluations else []


def refine_inputs(run: Run) -> dict[str, str]:
    settings = [run.config.refine.model_dump(), run.num_sequences("select"), run.config.score.tasks, run.config.dtype]
    return {**search_inputs(run), **_teacher_and_data(run), "refine": _slice(run, settings)}


def plan_tournament(run: Run) -> list[Planned]:
    if not run.config.tournament.candidates:
        return []
    return [Planned(run.contest, tournament_inputs(run) if run.config.prune is None else prune_inputs(run))]


def _tournament_settings(run: Run) -> list[Any]:
    settings = [run.config.tournament.model_dump(), _kd_settings(run), run.num_sequences("select")]
    return [*settings, *_distilled_by(run).values()]


def tournament_inputs(run: Run) -> dict[str, str]:
    settings = _tournament_settings(run)
    found = [artifacts.content_of(one.solution) for one in (run.uncontested, run.unrefined)]
    return {
        **(refine_inputs(run) if run.config.refine.evaluations else search_inputs(run)),
        **_teacher_and_data(run),
        "candidates": artifacts.fingerprint(found),
        "tournament": _slice(run, settings),
    }


def plan_build(run: Run) -> list[Planned]:
    chosen = run.chosen_items() if run.solution.exists() else ()
    inputs = {**student_inputs(run, chosen), "solution": artifacts.content_of(run.solution)}
    return [Planned(run.student / "initial", inputs)]


def student_inputs(run: Run, items: Sequence[Item]) -> dict[str, str]:
    """What the student of these items is put together from."""
    return {"teacher": run.teacher_fingerprint, "library": _library_content(run, items)}


def plan_kd(run: Run) -> list[Planned]:
    return [Planned(run.student / "final", kd_inputs(run, run.student / "initial"))]


def kd_inputs(run: Run, initial: Path) -> dict[str, str]:
    """What the distillation of the student in ``initial`` rests on."""
    return {
        **_teacher_and_data(run),
        **_distilled_by(run),
        "initial": artifacts.content_of(initial),
        "kd": _slice(run, _kd_settings(run)),
    }


def _distilled_by(run: Run) -> dict[str, str]:
    """The teacher that distils, where it is not the run's own."""
    return {} if run.distilling is run else {"kd_teacher": run.distilling.teacher_fingerprint}


def _kd_settings(run: Run) -> list[Any]:
    # how a step is cut up, how often it is saved and who is told changes nothing; the teacher counts by its content
    nothing = {"checkpoint_steps", "micro_batch_size", "checkpoint_activations", "report_to", "max_epochs", "teacher"}
    return [run.config.kd.model_dump(exclude=nothing), run.config.dtype]


def plan_evaluate(run: Run) -> list[Planned]:
    inputs = {
        **_teacher_and_data(run),
        **_distilled_by(run),
        "initial": artifacts.content_of(run.student / "initial"),
        "final": artifacts.content_of(run.student / "final"),
        "evaluate": _slice(run, {"sequences": run.config.evaluate.sequences, "positions": True}),
    }
    if run.config.prune is not None:  # a search's student is one for its constraint file
        served = {name: workload.model_dump() for name, workload in run.constraint_file.workloads.items()}
        inputs["workloads"] = artifacts.fingerprint(served)
    return [Planned(run.evaluation, inputs), *_plan_tasks(run)]


def _plan_tasks(run: Run) -> list[Planned]:
    """A unit for each task of the lm-evaluation-harness."""
    settings = run.config.evaluate
    folder = settings.task_folder and [
        (file.relative_to(settings.task_folder).as_posix(), artifacts.file_fingerprint(file))
        for file in yamlfiles.files_in(settings.task_folder, "evaluate.task_folder")
    ]
    inputs = {
        "teacher": run.teacher_fingerprint,
        "final": artifacts.content_of(run.student / "final"),
        "task": artifacts.fingerprint([folder, settings.task_shots, settings.task_questions, run.config.dtype]),
    }
    return [Planned(run.task(name), inputs) for name in settings.tasks]


def _evaluated(run: Run) -> dict[str, str]:
    """What is known of the student's worth."""
    tasks = {unit.path.stem: artifacts.content_of(unit.path) for unit in _plan_tasks(run)}
    return {
        "evaluation": artifacts.content_of(run.evaluation),
        **({"tasks": artifacts.fingerprint(tasks)} if tasks else {}),
    }


def plan_export(run: Run) -> list[Planned]:
    inputs = {
        "final": artifacts.content_of(run.student / "final"),
        **_evaluated(run),
        "tokenizer": checkpoint.tokenizer_fingerprint(run.teacher),
        "recipe": artifacts.fingerprint(run.recipe),
    }
    kinds = {"gguf": {"gguf_type": str(run.config.export.gguf_type)}}
    return [
        Planned(run.student / "export" / target, {**inputs, **kinds.get(target, {})}) for target in export_formats(run)
    ]


def export_formats(run: Run) -> Sequence[Format]:
    """What is exported: as the config says, else what the runtimes that the student is to be served on read, and hf."""
    served = [FORMAT_OF[runtime] for runtime in run.constraint_file.serve_on]
    return run.config.export.targets or tuple(dict.fromkeys(["hf", *served]))


def plan_report(run: Run) -> list[Planned]:
    inputs = {
        "solution": artifacts.content_of(run.student / "initial" if run.config.prune else run.solution),
        **_evaluated(run),
    }
    if served := {path.stem: artifacts.content_of(path) for path in sorted(run.served.glob("*.json"))}:
        inputs["served"] = artifacts.fingerprint(served)
    return [Planned(run.student / "report", inputs)]


def _teacher_and_data(run: Run) -> dict[str, str]:
    return {"teacher": run.teacher_fingerprint, "data": artifacts.content_of(run.data)}


def _slice(run: Run, settings: Any) -> str:
    """The fingerprint of a stage's own settings, with those that every training or scoring stage depends on."""
    window = [run.config.data.sequence_tokens, run.config.data.within_documents]
    return artifacts.fingerprint([settings, run.config.seed, window])


def _library_content(run: Run, items: Sequence[Item]) -> str:
    units = {run.unit_of(part) for item in items for part in made_of(item, run.shape) if has_weights(part)}
    return artifacts.fingerprint({unit: artifacts.content_of(run.trained(unit)) for unit in sorted(units)})


def search_inputs(run: Run) -> dict[str, str]:
    return {**tables(run), **({"rescored": artifacts.content_of(run.rescored)} if run.estimated else {})}


def tables(run: Run) -> dict[str, str]:
    """What a search sees before anything is scored anew for it."""
    # a key that came later and is not in the file leaves the solutions of before their names
    file = run.constraint_file
    unused = {key for key in ("serve_on", "solver") if getattr(file, key) == type(file).model_fields[key].default}
    return {
        "scores": artifacts.fingerprint([artifacts.content_of(unit.path) for unit in plan_score(run)]),
        "costs": run.cost_source.fingerprint,
        "constraints": artifacts.fingerprint(file.model_dump(mode="json", exclude=unused)),
        "space": artifacts.fingerprint([item.id for item in run.items]),
        **({} if run.original is None else {"original": run.original.cost_source.fingerprint}),
    }
