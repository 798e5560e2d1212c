"""A run: its folder, its configuration, what it rests on, and where its units lie. Pure; torch is never imported here.

Reads the config, the teacher's headers, the search space, the grid and the constraint file, and units already on disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from puzzle import artifacts, checkpoint, plans, search, yamlfiles
from puzzle.capabilities import served_as
from puzzle.config import (
    ConstraintFile,
    GridFile,
    PruneConfig,
    RefineConfig,
    RunConfig,
    SpaceFile,
    TournamentConfig,
)
from puzzle.data.packing import num_windows
from puzzle.profiling.grid import GridPoint, grid_points
from puzzle.profiling.source import CostSource
from puzzle.pruning import combinations, kept_layers, num_dropped, pruned_shape
from puzzle.scoring.draws import Draw, draw
from puzzle.search.constraints import workloads
from puzzle.search.fan_out import Pick, picks
from puzzle.search.problem import Problem
from puzzle.space import PARTS, SearchSpace
from puzzle.tables import ScoreTable, read_scores
from puzzle.types import (
    TEACHER_CONTEXT,
    AttentionSpec,
    ConfigError,
    Costs,
    Item,
    MissingMeasurementError,
    ModelShape,
    Solution,
    Spec,
    from_json,
)
from puzzle.variants import has_weights, is_fused, keep_spec, params, shape_id, variant_name

FIRST = "first"  # as kd.teacher: in a chain of steps, its own teacher
LEAST_WINDOWS = 4  # how many windows of a window variant the sequences must hold
MOST_EXACT_LAYERS = 30  # beyond, scores are estimated: the time of exact ones grows with the square of the layers
DEFAULT_SPACE = "demo"
NO_LIMITS = ConstraintFile(constraints={})
STORED_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes

GRID_AND_TOURNAMENT = (
    "combinations of prune.grid are chosen from in a tournament: give both, prune.grid and tournament: {candidates: 4, "
    "tokens: 500000}, or neither"
)


@dataclass(frozen=True)
class Run:
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
    ) -> Run:
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
                f"{where} offers several widths; `puzzle run`, `validate`, `status`, `search` and `pareto` take it "
                "whole, any other command the folder of a search in widths/"
            )
        folder = where if where.is_dir() else Path(settings.run)
        named = constraints or settings.constraints
        file = None if named is None else yamlfiles.locate("constraints", named)
        return cls(folder, settings, file, context_file, pick)

    # --- what the run rests on -------------------------------------------------------------------------------------

    @cached_property
    def teacher(self) -> Path:
        return checkpoint.locate_teacher(self.config.teacher)

    @property
    def teacher_name(self) -> str:
        """For people: the hub id, or the folder's name."""
        return Path(self.config.teacher).name if Path(self.config.teacher).is_dir() else self.config.teacher

    @cached_property
    def original(self) -> Run | None:
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
    def distilling(self) -> Run:
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

    @property
    def recipe(self) -> dict[str, Any]:
        """How the student is made, for its model card."""
        settled = self.config.prune and (self.pruning if self.settled else self.config.prune)
        pruned = {"prune": settled.model_dump(mode="json", exclude={"grid"})} if settled else {}
        return {
            **pruned,
            "teacher": self.teacher_name,
            **({"distilled_by": self.distilling.teacher_name} if self.distilling is not self else {}),
            "text": self.config.data.label,
            "constraints": self.constraints.name if self.constraints and self.pick is None else self.limits_name,
            "bld_tokens": self.config.distill.tokens,
            "kd_tokens": self.config.kd.tokens,
            "seed": self.config.seed,
        }

    @cached_property
    def shape(self) -> ModelShape:
        return checkpoint.read_shape(self.teacher)

    @property
    def pruning(self) -> PruneConfig:
        """What is pruned; of several combinations, the winner of their tournament.

        ConfigError where the run is a search, or has a grid and no tournament; CorruptFileError where nobody has won.
        """
        if self.config.prune is None:
            raise ConfigError("this run is a search; a pruning has a section prune: in its config")
        if self.config.prune.grid is None:
            return self.config.prune
        if not self.config.tournament.candidates:
            raise ConfigError(GRID_AND_TOURNAMENT)
        winner: int = artifacts.read_unit(self.contest).payload["tournament"]["winner"]
        return self.contenders[winner].pruning

    @cached_property
    def contenders(self) -> tuple[Run, ...]:
        """Of a pruning, one run for each combination that competes; the run itself where there is no grid."""
        if self.config.prune is None or self.config.prune.grid is None:
            return (self,)
        found = combinations(self.config.prune, self.shape, self.config.tournament.candidates)
        return tuple(replace(self, config=self.config.model_copy(update={"prune": one})) for one in found)

    @property
    def settled(self) -> bool:
        """Whether it is known what is pruned."""
        return self.config.prune is not None and (self.config.prune.grid is None or self.contest.exists())

    def check_searches(self) -> None:
        """ConfigError where the run is a pruning."""
        if self.config.prune is not None:
            raise ConfigError("this run is a pruning (prune: in its config): it has no library, scores or search")

    @cached_property
    def kept_layers(self) -> tuple[int, ...]:
        """Of a pruning. CorruptFileError where they are chosen by scores that are not there yet."""
        scores: Mapping[int, float] = {}
        if not isinstance(self.pruning.layers_by, tuple) and num_dropped(self.pruning, self.shape):
            if self.pruning.layers_by == "block-importance":
                scores = dict(enumerate(artifacts.read_unit(self.importance).payload["importance"]))
            else:
                found = artifacts.read_unit(self.drops).payload["scores"][self.pruning.layers_metric]
                scores = {int(layer): score for layer, score in found.items()}
        return kept_layers(self.pruning, self.shape, scores)

    @cached_property
    def student_shape(self) -> ModelShape:
        """Of a pruning, once it is known which layers stay."""
        return pruned_shape(self.pruning, self.shape, self.kept_layers)

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

    def each_pick(self) -> tuple[Run, ...]:
        """This run, once for each search that is asked for and not chosen from."""
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

    @cached_property
    def cost_source(self) -> CostSource:
        """Where times come from; not what an earlier grid left in the folder."""
        settings = self.config.profile
        measured = settings.backend in ("measured", "vllm")
        targets = () if measured else self.picks[0].file.serve_on  # estimates cost nothing: of lowered forms, too
        lowered = [one for item in self.items for target in targets for one in served_as(item, target, self.shape)]
        return CostSource(
            settings,
            self.folder,
            self.shape,
            (*self.keep_specs, *self.specs, *dict.fromkeys(lowered)),
            self.grid_points if measured else (),
            plans.measured_from(self) if measured else {},
            () if measured else workloads(self.picks[0].file, self.shape),
        )

    def read_costs(self) -> Costs:
        found = self.cost_source.read()
        if self.original is None:
            return found
        try:
            costs = self.original.read_costs()
        except MissingMeasurementError:  # said again for each limit that needs one
            costs = Costs()
        return replace(found, original=(self.original.shape, costs))

    def read_scores(self) -> ScoreTable:
        """The scores of the space's items, exact where they were measured again for this constraint file.

        What an earlier space left in the folder is not among them.
        """
        self.check_searches()
        table = self._read_scores()
        if not self.estimated or not self.rescored.exists():
            return table
        names = [f"{item_id}.json" for item_id in artifacts.read_unit(self.rescored).payload["items"]]
        return table.replaced(read_scores(self.folder / "rescored", names)) if names else table

    def _read_scores(self) -> ScoreTable:
        names = [f"{name}.json" for name in self.scored_together]
        if self.original is not None and not self.base_score.exists():
            raise MissingMeasurementError(f"{self.base_score}: not there yet; run `puzzle score RUN`")
        return read_scores(self.scores, [*names, *([self.base_score.name] if self.original else [])])

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

    def check_sequence_counts(self) -> None:
        """ConfigError where a split holds fewer sequences than a stage asks of it; needs the data unit."""
        counts = artifacts.read_unit(self.data).payload["num_tokens"]
        tokens = self.config.data.sequence_tokens
        asked = [
            ("init.sequences", "train", self.config.init.sequences),
            ("score.sequences", "score", self.config.score.sequences),
            ("evaluate.sequences", "report", self.config.evaluate.sequences),
        ]
        if self.config.refine.evaluations or self.config.tournament.candidates:
            asked.append(("evaluate.sequences", "select", self.config.evaluate.sequences))
        for key, split, wanted in asked:
            if wanted > (there := num_windows(counts, split, tokens)):
                raise ConfigError(
                    f"{key} is {wanted}, but split {split!r} holds {there} sequences of {tokens} tokens; "
                    "give more text or ask for fewer"
                )

    # --- where things lie ------------------------------------------------------------------------------------------

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def initial(self, unit: str) -> Path:
        return self.folder / "library" / "initial" / unit

    def trained(self, unit: str) -> Path:
        return self.folder / "library" / "trained" / unit

    @property
    def scores(self) -> Path:
        """Of changes to the teacher, or to the context."""
        return self.folder / "scores" / (self.context_id if self.context else "")

    @property
    def base_score(self) -> Path:
        """Of a search at another width than the teacher's: how far its base is from that."""
        return self.scores / "base.json"

    @property
    def rescored(self) -> Path:
        """Which exact scores decide the search under the constraint file."""
        name = f"{self._limits_stem}-{artifacts.fingerprint(plans.tables(self))[:8]}.json"
        return self.folder / "rescored" / "for" / name

    @property
    def solution_id(self) -> str:
        """Named by what it rests on, so a changed constraint file or table gives a new solution beside the old one."""
        if self.config.tournament.candidates:
            kind, inputs = "-tournament", plans.tournament_inputs(self)
        elif self.config.refine.evaluations:
            kind, inputs = "-refined", plans.refine_inputs(self)
        else:
            kind, inputs = "", plans.search_inputs(self)
        return f"{self._limits_stem}{kind}-{artifacts.fingerprint(inputs)[:8]}"

    @cached_property
    def uncontested(self) -> Run:
        """This run, whose solution is what refine or the search found, before any tournament."""
        if not self.config.tournament.candidates:
            return self
        return replace(self, config=self.config.model_copy(update={"tournament": TournamentConfig()}))

    @cached_property
    def unrefined(self) -> Run:
        """This run, whose solution is the search's."""
        if not self.config.refine.evaluations:
            return self.uncontested
        return replace(self, config=self.uncontested.config.model_copy(update={"refine": RefineConfig()}))

    @property
    def solution(self) -> Path:
        return self.folder / "solutions" / self.solution_id

    @property
    def student(self) -> Path:
        """Named by the search's solution, or by what the pruning is asked for."""
        name = f"pruned-{plans.pruning_fingerprint(self)[:8]}" if self.config.prune else self.solution_id
        return self.folder / "students" / name

    @property
    def contest(self) -> Path:
        """What the tournament decided: of a search's answers the solution, else which combination is pruned."""
        return self.solution if self.config.prune is None else self.student / "winner.json"

    @property
    def evaluation(self) -> Path:
        return self.student / "evaluation.json"

    def task(self, name: str) -> Path:
        """What teacher and student answer to a task of the lm-evaluation-harness."""
        return self.student / "tasks" / f"{name}.json"

    @property
    def served(self) -> Path:
        """Speeds that others measured, of the student as it is now."""
        return self.student / "served" / artifacts.content_of(self.student / "final")

    @property
    def checkpoint(self) -> Path:
        """The student as a Hugging Face folder."""
        return self.student / "export" / "hf"

    @property
    def events(self) -> Path:
        return self.folder / "events.jsonl"

    @property
    def report(self) -> Path:
        """The page that was written last; each finished student has its own beside it."""
        return self.folder / "report.html"

    @property
    def comparison(self) -> Path:
        """What `puzzle compare` found last, under these limits and on these tables."""
        return self.folder / "comparisons" / f"{self.unrefined.solution_id}.json"

    def solutions(self) -> tuple[Solution, ...]:
        """What was found for the constraint file, best first."""
        payload = artifacts.read_unit(self.solution).payload
        source = f"{self.solution / artifacts.MARKER}"
        return tuple(from_json(Solution, entry, source) for entry in payload["solutions"])

    def problems(self) -> tuple[Problem, ...]:
        """The search on the run's tables as programmes, one for each combination of batch sizes."""
        tables = self.read_scores(), self.read_costs()
        return search.problems(self.shape, self.items, *tables, self.constraint_file, self.space.conflicts())

    def items_of(self, solution: Solution) -> tuple[Item, ...]:
        by_id = {item.id: item for item in self.items}
        return tuple(by_id[item_id] for item_id in solution.items)

    def chosen_items(self) -> tuple[Item, ...]:
        """The items of the best solution; of a pruning, which changes all alike, the teacher's."""
        return self.items if self.config.prune is not None else self.items_of(self.solutions()[0])

    def candidates(self) -> tuple[Solution, ...]:
        """What competes: the refined solution, if there is one, then the search's own, best first."""
        found = {one.items: one for run in (self.uncontested, self.unrefined) for one in run.solutions()}
        return tuple(found.values())[: self.config.tournament.candidates]

    @property
    def batch_sizes(self) -> dict[str, int]:
        """At which the student is timed, by workload: as the best solution chose, or the first ones."""
        if self.config.prune is not None:
            return {one.name: one.batch_sizes[0] for one in workloads(self.constraint_file, self.shape)}
        totals = self.solutions()[0].totals
        return {name: round(totals[f"{name}.batch_size"]) for name in self.constraint_file.workloads}

    @cached_property
    def draws(self) -> Mapping[str, Draw]:
        """The architectures that `puzzle additivity` evaluates, by names that say what they are made of."""
        sizes = {item.id: sum(params(spec, self.shape) for spec in item.specs) for item in self.items}
        count, seed = self.config.additivity.architectures, self.config.seed
        found = draw(self.items, self.first_scores(), sizes, count, seed)
        return {artifacts.fingerprint(one.items): one for one in found}

    def first_scores(self) -> dict[str, float]:
        """KL by item on the sequences that all scores begin with, as measured or estimated for the whole space."""
        if self.context:
            raise ConfigError("additivity looks at changes to the teacher; leave out --on")
        table, count = self._read_scores(), self.config.score.sequences
        means = table.means(self.items, "kl")
        first = {key[0]: score.per_sequence[:count] for key, score in table.scores.items() if key[1] == "kl"}
        return means | {item_id: sum(values) / len(values) for item_id, values in first.items() if item_id in means}

    @property
    def generated(self) -> Path:
        """The teacher's own text."""
        return self.folder / "generated"

    @property
    def importance(self) -> Path:
        return self.folder / "importance"

    @property
    def drops(self) -> Path:
        """What leaving out as many consecutive layers as the pruning asks for costs, from each layer on."""
        together = num_dropped(self.pruning, self.shape) if self.pruning.layers_by == "contiguous" else 1
        return self.folder / "drops" / f"{together:02}.json"

    @property
    def additivity(self) -> Path:
        return self.folder / "additivity"

    @cached_property
    def scored_together(self) -> Mapping[str, tuple[Item, ...]]:
        """The items of each unit of scores, by its name: those of a site, a layer's pairs, runs from a layer on."""
        names: dict[str, tuple[Item, ...]] = {}
        for item in self.items:
            layers = {site.layer for site in item.sites}
            several = "layer" if len(layers) == 1 else "fused" if is_fused(item) else "run"
            what = item.sites[0].part if len(item.sites) == 1 else several
            name = f"L{item.sites[0].layer:03d}.{what}"
            names[name] = (*names.get(name, ()), item)
        return names
