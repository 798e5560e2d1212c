"""A run: where its units lie, and what they hold. Pure; torch is never imported here.

Reads units already on disk; what the run rests on is in basis.py, what each unit is made from in plans.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from puzzle import artifacts, plans, search
from puzzle.basis import Basis
from puzzle.capabilities import served_as
from puzzle.config import PruneConfig, RefineConfig, TournamentConfig
from puzzle.data.packing import num_windows
from puzzle.profiling.source import CostSource
from puzzle.pruning import combinations, kept_layers, num_dropped, pruned_shape
from puzzle.scoring.draws import Draw, draw
from puzzle.search.constraints import workloads
from puzzle.search.problem import Problem
from puzzle.tables import ScoreTable, read_scores
from puzzle.types import ConfigError, Costs, Item, MissingMeasurementError, ModelShape, Solution
from puzzle.variants import params

GRID_AND_TOURNAMENT = (
    "combinations of prune.grid are chosen from in a tournament: give both, prune.grid and tournament: {candidates: 4, "
    "tokens: 500000}, or neither"
)


class Run(Basis):
    """Paths are of units whether they are there or not; what they hold is read when it is asked for."""

    # --- where things lie ------------------------------------------------------------------------------------------

    @property
    def data(self) -> Path:
        return self.folder / "data"

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
    def additivity(self) -> Path:
        return self.folder / "additivity"

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

    # --- what a pruning makes of the teacher ------------------------------------------------------------------------

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
        return self.contenders[artifacts.read_unit(self.contest).read(int, "tournament", "winner")].pruning

    @cached_property
    def kept_layers(self) -> tuple[int, ...]:
        """Of a pruning. CorruptFileError where they are chosen by scores that are not there yet."""
        scores: Mapping[int, float] = {}
        if not isinstance(self.pruning.layers_by, tuple) and num_dropped(self.pruning, self.shape):
            if self.pruning.layers_by == "block-importance":
                scores = dict(enumerate(artifacts.read_unit(self.importance).read(list[float], "importance")))
            else:
                scores = artifacts.read_unit(self.drops).read(dict[int, float], "scores", self.pruning.layers_metric)
        return kept_layers(self.pruning, self.shape, scores)

    @cached_property
    def student_shape(self) -> ModelShape:
        """Of a pruning, once it is known which layers stay."""
        return pruned_shape(self.pruning, self.shape, self.kept_layers)

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

    # --- what the units hold ----------------------------------------------------------------------------------------

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
        names = [f"{item_id}.json" for item_id in artifacts.read_unit(self.rescored).read(dict[str, str], "items")]
        return table.replaced(read_scores(self.folder / "rescored", names)) if names else table

    def _read_scores(self) -> ScoreTable:
        names = [f"{name}.json" for name in self.scored_together]
        if self.original is not None and not self.base_score.exists():
            raise MissingMeasurementError(f"{self.base_score}: not there yet; run `puzzle score RUN`")
        return read_scores(self.scores, [*names, *([self.base_score.name] if self.original else [])])

    def check_sequence_counts(self) -> None:
        """ConfigError where a split holds fewer sequences than a stage asks of it; needs the data unit."""
        counts = artifacts.read_unit(self.data).read(dict[str, int], "num_tokens")
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

    def solutions(self) -> tuple[Solution, ...]:
        """What was found for the constraint file, best first."""
        return tuple(artifacts.read_unit(self.solution).read(list[Solution], "solutions"))

    def problems(self, scores: ScoreTable | None = None, costs: Costs | None = None) -> tuple[Problem, ...]:
        """The search as programmes, one for each combination of batch sizes; on the run's tables, or those given."""
        tables = scores or self.read_scores(), costs or self.read_costs()
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
