"""A run: its folder, its configuration, and what each of its units is made from. Pure; torch is never imported here.

Reads the config, the teacher's headers, the search space, the grid and the constraint file, and the markers of units
already on disk. For every stage it plans the units: where each lies, and the fingerprints of all that goes in. A unit
whose marker holds the same fingerprints is done; one with others is stale (artifacts.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from puzzle import artifacts, checkpoint, config
from puzzle.config import ConstraintFile, GridFile, RunConfig, SpaceFile
from puzzle.data_source import text_fingerprint, text_path
from puzzle.profiling.grid import GridPoint, grid_points
from puzzle.tables import read_costs
from puzzle.types import ConfigError, Cost, Item, ModelShape, Site, Solution, from_json
from puzzle.variants import SearchSpace, shape_id

STORED_KINDS = ("gqa", "narrow", "linear")
ABSENT = "absent"
STORED_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes


@dataclass(frozen=True)
class Planned:
    """One unit: where it lies, and named fingerprints of what it is made from."""

    path: Path
    inputs: Mapping[str, str]


@dataclass(frozen=True)
class Run:
    """``folder`` holds everything the run writes; ``constraints`` is the constraint file's path."""

    folder: Path
    config: RunConfig
    constraints: Path

    @classmethod
    def open(cls, where: Path, overrides: Sequence[str] = (), constraints: str | None = None) -> Run:
        """From a config file, or from the folder of an existing run; ``overrides`` are ``a.b=value``."""
        path = where / "config.yaml" if where.is_dir() else where
        if where.is_dir() and not path.is_file():
            raise ConfigError(f"{where}: no run folder (it has no config.yaml); `puzzle run CONFIG` makes one")
        settings = config.load(RunConfig, path, overrides)
        folder = where if where.is_dir() else Path(settings.run)
        return cls(folder, settings, config.locate("constraints", constraints or settings.constraints))

    # --- what the run rests on -------------------------------------------------------------------------------------

    @cached_property
    def teacher(self) -> Path:
        return checkpoint.locate_teacher(self.config.teacher)

    @property
    def teacher_name(self) -> str:
        """For people: the hub id, or the folder's name."""
        return Path(self.config.teacher).name if Path(self.config.teacher).is_dir() else self.config.teacher

    @property
    def recipe(self) -> dict[str, Any]:
        """How the student is made, for its model card."""
        return {
            "teacher": self.teacher_name,
            "text": Path(self.config.data.text).name,
            "constraints": self.constraints.name,
            "bld_tokens": self.config.distill.tokens,
            "kd_tokens": self.config.kd.tokens,
            "seed": self.config.seed,
        }

    @cached_property
    def shape(self) -> ModelShape:
        return checkpoint.read_shape(self.teacher)

    @cached_property
    def space(self) -> SearchSpace:
        path = config.locate("space", self.config.space)
        names, shape = config.load(SpaceFile, path), self.shape
        try:
            return SearchSpace.parse(names.attention, names.ffn, shape, names.ffn_multiple_of)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @cached_property
    def items(self) -> tuple[Item, ...]:
        return self.space.items(self.shape)

    @cached_property
    def stored_items(self) -> tuple[Item, ...]:
        """Items with weights of their own: neither the teacher's block nor nothing."""
        return tuple(item for item in self.items if item.specs[0].kind in STORED_KINDS)

    @cached_property
    def grid(self) -> GridFile:
        return config.load(GridFile, config.locate("grid", self.config.profile.grid))

    @cached_property
    def grid_points(self) -> tuple[GridPoint, ...]:
        return grid_points(self.grid, self.shape)

    @cached_property
    def constraint_file(self) -> ConstraintFile:
        return config.load(ConstraintFile, self.constraints)

    @cached_property
    def teacher_fingerprint(self) -> str:
        return checkpoint.checkpoint_fingerprint(self.teacher, self.folder / "fingerprints.json")

    @cached_property
    def stored_dtype(self) -> str:
        """The dtype of the teacher's weights on disk, by torch's name."""
        settings = artifacts.read_json(self.teacher / "config.json")
        dtype = str(settings.get("dtype") or settings.get("torch_dtype") or "float32")
        if dtype not in STORED_DTYPES:
            allowed = ", ".join(STORED_DTYPES)
            raise ConfigError(f"{self.teacher / 'config.json'}: dtype {dtype!r} is not supported; supported: {allowed}")
        return dtype

    def read_costs(self) -> tuple[Cost, ...]:
        """The costs at the grid's points; what an earlier grid left in the folder is not among them."""
        return read_costs(self.costs, [f"{point.id}.json" for point in self.grid_points])

    def check_sequence_counts(self) -> None:
        """ConfigError where a split holds fewer sequences than a stage asks of it; needs the data unit."""
        counts = artifacts.read_unit(self.data).payload["num_tokens"]
        tokens = self.config.data.sequence_tokens
        asked = {
            "init.sequences": ("train", self.config.init.sequences),
            "score.sequences": ("score", self.config.score.sequences),
            "evaluate.sequences": ("report", self.config.evaluate.sequences),
        }
        for key, (split, wanted) in asked.items():
            if wanted > (there := counts[split] // tokens):
                raise ConfigError(
                    f"{key} is {wanted}, but split {split!r} holds {there} sequences of {tokens} tokens; "
                    "give more text or ask for fewer"
                )

    # --- where things lie ------------------------------------------------------------------------------------------

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def importance(self, layer: int) -> Path:
        return self.folder / "importance" / f"L{layer:03d}"

    def initial(self, item: Item) -> Path:
        return self.folder / "library" / "initial" / item.id

    def trained(self, item: Item) -> Path:
        return self.folder / "library" / "trained" / item.id

    @property
    def scores(self) -> Path:
        return self.folder / "scores"

    @property
    def costs(self) -> Path:
        return self.folder / "costs"

    @property
    def solution_id(self) -> str:
        """Named by what it rests on, so a changed constraint file or table gives a new solution beside the old one."""
        return f"{self.constraints.stem}-{artifacts.fingerprint(self._search_inputs())[:8]}"

    @property
    def solution(self) -> Path:
        return self.folder / "solutions" / self.solution_id

    @property
    def student(self) -> Path:
        return self.folder / "students" / self.solution_id

    @property
    def events(self) -> Path:
        return self.folder / "events.jsonl"

    def solutions(self) -> tuple[Solution, ...]:
        """What the search found for the constraint file, best first."""
        payload = artifacts.read_unit(self.solution).payload
        source = f"{self.solution / artifacts.MARKER}"
        return tuple(from_json(Solution, entry, source) for entry in payload["solutions"])

    def chosen_items(self) -> tuple[Item, ...]:
        """The items of the best solution."""
        by_id = {item.id: item for item in self.items}
        return tuple(by_id[item_id] for item_id in self.solutions()[0].items)

    # --- the units of each stage -----------------------------------------------------------------------------------

    def plan_data(self) -> list[Planned]:
        text = text_fingerprint(text_path(self.config.data.text))
        return [Planned(self.data, {"text": text, "tokenizer": checkpoint.tokenizer_fingerprint(self.teacher)})]

    def plan_importance(self) -> list[Planned]:
        inputs = {**self._teacher_and_data(), "init.sequences": self._slice(self.config.init.sequences)}
        return [Planned(self.importance(layer), inputs) for layer in range(self.shape.num_layers)]

    def plan_init(self) -> list[Planned]:
        return [
            Planned(
                self.initial(item),
                {
                    **self._teacher_and_data(),
                    "importance": _content(self.importance(item.sites[0].layer)),
                    "init": self._slice(self.config.init.model_dump()),
                },
            )
            for item in self.stored_items
        ]

    def plan_distill(self) -> list[Planned]:
        settings = self.config.distill.model_dump(exclude={"layers_per_pass"})  # how many train at once changes nothing
        return [
            Planned(
                self.trained(item),
                {
                    **self._teacher_and_data(),
                    "initial": _content(self.initial(item)),
                    "distill": self._slice([settings, self.config.dtype]),
                },
            )
            for item in self.stored_items
        ]

    def plan_score(self) -> list[Planned]:
        return [
            Planned(
                self.scores / f"{site}.json",
                {
                    **self._teacher_and_data(),
                    "library": self._library_content([item for item in self.stored_items if item.sites == (site,)]),
                    "space": artifacts.fingerprint([item.id for item in self.items_at(site)]),
                    "score": self._slice(self.config.score.model_dump()),
                },
            )
            for site in self.shape.sites
        ]

    def plan_profile(self) -> list[Planned]:
        shapes = sorted({shape_id(item.specs[0], self.shape) for item in self.items})
        settings = {
            "shape": artifacts.fingerprint(vars(self.shape)),
            "space": artifacts.fingerprint(shapes),
            "profile": artifacts.fingerprint([self.config.device, self.config.profile.weights, self.grid.repeats]),
        }
        return [Planned(self.costs / f"{point.id}.json", settings) for point in self.grid_points]

    def plan_search(self) -> list[Planned]:
        return [Planned(self.solution, self._search_inputs())]

    def plan_build(self) -> list[Planned]:
        chosen = [item for item in self._chosen_if_any() if item.specs[0].kind in STORED_KINDS]
        inputs = {
            "teacher": self.teacher_fingerprint,
            "solution": _content(self.solution),
            "library": self._library_content(chosen),
        }
        return [Planned(self.student / "initial", inputs)]

    def plan_kd(self) -> list[Planned]:
        settings = self.config.kd.model_dump(exclude={"checkpoint_steps"})
        inputs = {
            **self._teacher_and_data(),
            "initial": _content(self.student / "initial"),
            "kd": self._slice([settings, self.config.dtype]),
        }
        return [Planned(self.student / "final", inputs)]

    def plan_evaluate(self) -> list[Planned]:
        inputs = {
            **self._teacher_and_data(),
            "initial": _content(self.student / "initial"),
            "final": _content(self.student / "final"),
            "evaluate": self._slice(self.config.evaluate.model_dump()),
        }
        return [Planned(self.student / "evaluation.json", inputs)]

    def plan_export(self) -> list[Planned]:
        inputs = {
            "final": _content(self.student / "final"),
            "evaluation": _content(self.student / "evaluation.json"),
            "tokenizer": checkpoint.tokenizer_fingerprint(self.teacher),
            "recipe": artifacts.fingerprint(self.recipe),
        }
        return [Planned(self.student / "export", inputs)]

    def plan_report(self) -> list[Planned]:
        inputs = {
            "solution": _content(self.solution),
            "evaluation": _content(self.student / "evaluation.json"),
            "export": _content(self.student / "export"),
        }
        return [Planned(self.student / "report", inputs)]

    def items_at(self, site: Site) -> list[Item]:
        return [item for item in self.items if item.sites == (site,)]

    def _teacher_and_data(self) -> dict[str, str]:
        return {"teacher": self.teacher_fingerprint, "data": _content(self.data)}

    def _slice(self, settings: Any) -> str:
        """The fingerprint of a stage's own settings, with those that every training or scoring stage depends on."""
        return artifacts.fingerprint([settings, self.config.seed, self.config.data.sequence_tokens])

    def _library_content(self, items: Sequence[Item]) -> str:
        return artifacts.fingerprint({item.id: _content(self.trained(item)) for item in items})

    def _search_inputs(self) -> dict[str, str]:
        return {
            "scores": artifacts.fingerprint([_content(self.scores / f"{site}.json") for site in self.shape.sites]),
            "costs": artifacts.fingerprint([_content(self.costs / f"{point.id}.json") for point in self.grid_points]),
            "constraints": artifacts.fingerprint(self.constraint_file.model_dump(mode="json")),
            "space": artifacts.fingerprint([item.id for item in self.items]),
        }

    def _chosen_if_any(self) -> tuple[Item, ...]:
        return self.chosen_items() if self.solution.exists() else ()


def _content(path: Path) -> str:
    return artifacts.read_unit(path).content if path.exists() else ABSENT
