"""What a run rests on: its configuration, and the teacher and the files that this names. Pure; torch is never imported.

Reads the config, the teacher's headers, the search space, the grid and the constraint file; writes nothing but
fingerprints that it remembers. Where a run's units lie, and what they hold, is in run.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

from puzzle import artifacts, checkpoint, yamlfiles
from puzzle.config import ConstraintFile, GridFile, RunConfig, SpaceFile
from puzzle.profiling.grid import GridPoint, grid_points
from puzzle.search.fan_out import Pick, picks
from puzzle.space import PARTS, SearchSpace
from puzzle.types import (
    TEACHER_CONTEXT,
    AttentionSpec,
    ConfigError,
    Item,
    MissingMeasurementError,
    ModelShape,
    Spec,
)
from puzzle.variants import has_weights, is_fused, keep_spec, params, shape_id, variant_name

LEAST_WINDOWS = 4  # how many windows of a window variant the sequences must hold
MOST_EXACT_LAYERS = 30  # beyond, scores are estimated: the time of exact ones grows with the square of the layers
DEFAULT_SPACE = "demo"
NO_LIMITS = ConstraintFile(constraints={})
FIRST = "first"  # as kd.teacher: in a chain of steps, its own teacher
STORED_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes


@dataclass(frozen=True)
class Basis:
    """``folder`` holds everything the run writes; ``constraints`` is the constraint file's path, if there is one.

    ``context_file``: the architecture.json of a partly compressed model that changes are scored on, not the teacher.
    ``pick``: of a constraint file with lists of values, which of its searches (fan_out.py). ``limits``: in the place
    of such a file, what it would hold.
    """

    folder: Path
    config: RunConfig
    constraints: Path | None
    context_file: Path | None = None
    pick: int | None = None
    limits: ConstraintFile | None = None

    @classmethod
    def open(
        cls,
        where: Path,
        overrides: Sequence[str] = (),
        constraints: str | None = None,
        context_file: Path | None = None,
        pick: int | None = None,
    ) -> Self:
        """From a config file, a recipe by its name, or the folder of a run; ``overrides`` are ``a.b=value``."""
        path = yamlfiles.locate_config(where)
        if where.is_dir() and not path.is_file():
            raise ConfigError(f"{where}: no run folder (it has no config.yaml); `puzzle run CONFIG` makes one")
        if path.is_file() and yamlfiles.read_yaml(path).get("steps"):
            raise ConfigError(
                f"{where} is a chain of steps; `puzzle run`, `validate` and `status` take it whole, any other command "
                "the folder of a step"
            )
        settings = yamlfiles.load(RunConfig, path, overrides)
        if settings.widths is not None:
            raise ConfigError(
                f"{where} offers several widths; `puzzle run`, `validate`, `status`, `rescore`, `search` and `pareto` "
                "take it whole, any other command the folder of a search in widths/"
            )
        folder = where if where.is_dir() else Path(settings.run)
        named = constraints or settings.constraints
        file = None if named is None else yamlfiles.locate("constraints", named)
        return cls(folder, settings, file, context_file, pick)

    @cached_property
    def teacher(self) -> Path:
        return checkpoint.locate_teacher(self.config.teacher)

    @property
    def teacher_name(self) -> str:
        """For people: the hub id, or the folder's name."""
        return Path(self.config.teacher).name if Path(self.config.teacher).is_dir() else self.config.teacher

    @cached_property
    def original(self) -> Self | None:
        """Of a search on a base that widths made: the search on the teacher that this is of."""
        if self.config.original is None:
            return None
        if "widths" not in self.folder.parts:
            raise ConfigError("original is of searches that widths made, in their folders; leave it out")
        update = {"teacher": self.config.original, "original": None}
        whole = replace(self, config=self.config.model_copy(update=update))
        size = whole.shape.hidden_size
        return replace(whole, folder=self.folder.parents[2] / str(size) / "steps" / "1-search")

    @cached_property
    def distilling(self) -> Self:
        """This run with the teacher that distils the student in the place of its own; itself where they are one.

        ConfigError where that one speaks of other tokens, or takes shorter sequences.
        """
        named = self.config.kd.teacher
        if named is None or not self.config.kd.needs_teacher:
            return self
        if named == FIRST:
            raise ConfigError(
                "kd.teacher: first is the teacher of a chain of steps, and this run is none; give a folder or a hub id"
            )
        folder = checkpoint.locate_teacher(named, "kd.teacher")
        if folder.resolve() == self.teacher.resolve():
            return self
        other = replace(self, config=self.config.model_copy(update={"teacher": named}))
        if other.shape.vocab_size != self.shape.vocab_size:
            raise ConfigError(
                f"kd.teacher: {folder} predicts {other.shape.vocab_size} tokens and {self.teacher} "
                f"{self.shape.vocab_size}; predictions are compared token by token, so take one with as many"
            )
        checkpoint.check_same_tokens(self.teacher, folder, "kd.teacher")
        if (tokens := self.config.data.sequence_tokens) > (most := other.shape.max_position_embeddings):
            raise ConfigError(f"data.sequence_tokens is {tokens}, but kd.teacher takes at most {most} tokens; lower it")
        return other

    @cached_property
    def shape(self) -> ModelShape:
        return checkpoint.read_shape(self.teacher)

    def check_searches(self) -> None:
        """ConfigError where the run is a pruning."""
        if self.config.prune is not None:
            raise ConfigError("this run is a pruning (prune: in its config): it has no library, scores or search")

    @cached_property
    def space(self) -> SearchSpace:
        if self.config.prune is not None:
            return SearchSpace.parse(dict.fromkeys(PARTS, ("keep",)), self.shape)
        path = yamlfiles.locate("space", self.config.space or DEFAULT_SPACE)
        file = yamlfiles.load(SpaceFile, path)
        layers = {
            layer: {part: names for part in PARTS if (names := getattr(own, part)) is not None}
            for layer, own in file.layers.items()
        }
        names = {part: getattr(file, part) for part in PARTS}
        try:
            return SearchSpace.parse(
                names, self.shape, file.ffn_multiple_of, layers, file.pairs, file.runs, file.fusion
            )
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @cached_property
    def items(self) -> tuple[Item, ...]:
        items = self.space.items()
        for spec in (spec for item in items for spec in item.specs):
            self._check_window(spec)
        return items

    def _check_window(self, spec: Spec) -> None:
        """On short sequences or documents a window looks free: nothing is out of its sight."""
        if not isinstance(spec, AttentionSpec) or spec.kind != "window":
            return
        if self.config.data.within_documents:
            raise ConfigError(
                f"{variant_name(spec)} looks free within documents shorter than it; set data.within_documents: false, "
                "or take the variant out of the space"
            )
        needed, there = LEAST_WINDOWS * (spec.window_tokens or 0), self.config.data.sequence_tokens
        if there < needed:
            raise MissingMeasurementError(
                f"{variant_name(spec)} must be trained and scored on at least {LEAST_WINDOWS} windows, {needed} "
                f"tokens, but data.sequence_tokens is {there}; raise it, or take the variant out of the space"
            )

    @cached_property
    def context(self) -> tuple[Item, ...]:
        """What is in place already in the model that changes are scored on; nothing where that is the teacher."""
        if self.context_file is None:
            return ()
        if self.config.original is not None:
            raise ConfigError("--on takes changes to a model of the teacher's own width; this search is at another")
        try:
            return self.space.items_of(artifacts.read_json(self.context_file))
        except ConfigError as error:
            raise ConfigError(f"{self.context_file}: {error}") from None

    @property
    def context_id(self) -> str:
        return artifacts.fingerprint([item.id for item in self.context])[:8] if self.context else TEACHER_CONTEXT

    @cached_property
    def units(self) -> Mapping[str, tuple[Item, ...]]:
        """What the library stores, and trains as one piece: by name, the items that are read from it."""
        units: dict[str, tuple[Item, ...]] = {}
        for item in self.items:
            if has_weights(item) and not is_fused(item):
                units[self.unit_of(item)] = (*units.get(self.unit_of(item), ()), item)
        return units

    def unit_of(self, item: Item) -> str:
        """The name of the library's unit that holds the item's weights."""
        nested = self.config.distill.nested and len(item.sites) == 1 and item.specs[0].kind == "narrow"
        return f"{item.sites[0]}.nested" if nested else item.id

    def unit_params(self, unit: str) -> int:
        """Parameters that the unit stores: of several items, those of the largest."""
        return max(sum(params(spec, self.shape) for spec in item.specs) for item in self.units[unit])

    @cached_property
    def keep_specs(self) -> tuple[Spec, ...]:
        """The teacher's own block at every site."""
        return tuple(keep_spec(self.shape, site) for site in self.shape.sites)

    @cached_property
    def specs(self) -> tuple[Spec, ...]:
        """Every spec on offer, once per different shape."""
        by_shape = {shape_id(spec, self.shape): spec for item in self.items for spec in item.specs}
        return tuple(by_shape.values())

    @cached_property
    def scored_together(self) -> Mapping[str, tuple[Item, ...]]:
        """The items of each unit of scores, by its name: those of a site, a layer's pairs, runs from a layer on."""
        names: dict[str, tuple[Item, ...]] = {}
        for item in self.items:
            several = "layer" if len(item.layers) == 1 else "fused" if is_fused(item) else "run"
            what = item.sites[0].part if len(item.sites) == 1 else several
            name = f"L{item.layers[0]:03d}.{what}"
            names[name] = (*names.get(name, ()), item)
        return names

    @cached_property
    def grid(self) -> GridFile:
        return yamlfiles.load(GridFile, yamlfiles.locate("grid", self.config.profile.grid))

    @cached_property
    def grid_points(self) -> tuple[GridPoint, ...]:
        return grid_points(self.grid, self.shape)

    @cached_property
    def picks(self) -> tuple[Pick, ...]:
        """The searches that the constraint file asks for: one, unless it has lists of values."""
        if self.limits is not None:
            return picks(self.limits)
        return picks(yamlfiles.load(ConstraintFile, self.constraints) if self.constraints else NO_LIMITS)

    @cached_property
    def constraint_file(self) -> ConstraintFile:
        """With one value each. ConfigError where it has a list and no ``pick`` says which."""
        count = len(self.picks)
        if self.pick is None and count > 1:
            raise ConfigError(
                f"{self.constraints} asks for {count} searches; `puzzle search` does them all, and anything else takes "
                f"one of them: --pick 1 ({self.picks[0]}) to --pick {count} ({self.picks[-1]})"
            )
        pick = 1 if self.pick is None else self.pick
        if not 1 <= pick <= count:
            raise ConfigError(f"--pick {pick}: {count} searches are asked for, numbered from 1")
        return self.picks[pick - 1].file

    def each_pick(self) -> tuple[Self, ...]:
        """This one, once for each search that is asked for and not chosen from."""
        if self.pick is not None or len(self.picks) == 1:
            return (self,)
        return tuple(replace(self, pick=one.number) for one in self.picks)

    @property
    def limits_name(self) -> str:
        """For people: the constraint file, and the values that were picked."""
        picked = str(self.picks[self.pick - 1]) if self.pick is not None else ""
        return f"{self._limits_stem} ({picked})" if picked else self._limits_stem

    @property
    def _limits_stem(self) -> str:
        if self.constraints:
            return self.constraints.stem
        return "no limits" if self.limits is None else "given limits"

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

    @property
    def estimated(self) -> bool:
        """Whether scores are estimated in one pass; those on top of a context are not, they may be below 0."""
        if self.context:
            return False
        mode = self.config.score.mode
        return mode == "one-pass" or (mode == "auto" and self.shape.num_layers > MOST_EXACT_LAYERS)

    def num_sequences(self, split: str) -> int:
        """Of the split, that changes are scored on: what chooses and what is reported is as sure as an evaluation."""
        return self.config.score.sequences if split == "score" else self.config.evaluate.sequences
