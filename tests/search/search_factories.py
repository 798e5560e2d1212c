"""Small factories: a model shape, its items, scores made up by rule, costs of a grid with a straight line in it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

from puzzle import variants
from puzzle.config import ConstraintFile
from puzzle.search.problem import Problem, Quantity, Row
from puzzle.tables import ScoreTable
from puzzle.types import Conflict, Cost, Costs, FfnSpec, Item, ModelShape, Score, Site

ATTENTION, FFN = ("keep", "gqa-2", "linear", "skip"), ("keep", "narrow-48", "linear", "skip")


def make_shape(num_layers: int = 3) -> ModelShape:
    return ModelShape(
        family="llama",
        num_layers=num_layers,
        hidden_size=64,
        num_attention_heads=4,
        num_kv_heads=4,
        head_dim=16,
        intermediate_size=96,
        vocab_size=128,
        max_position_embeddings=512,
        tied_embeddings=False,
    )


def make_items(shape: ModelShape) -> list[Item]:
    names = {"attention": ATTENTION, "ffn": FFN}
    return [
        variants.site_item(site, variants.parse_variant(site.part, name, shape))
        for site in shape.sites
        for name in names[site.part]
    ]


def make_score(item_id: str, mean: float, metric: str = "kl", context_tokens: int = 512) -> Score:
    return Score(item_id, "teacher", "teacher", metric, "score", (mean - 0.25, mean + 0.25), context_tokens)


def make_scores(items: Sequence[Item], seed: int = 0) -> ScoreTable:
    """Every item but the teacher's own has a KL score drawn at random."""
    rng = random.Random(seed)
    return ScoreTable.of(make_score(item.id, rng.uniform(0.01, 2.0)) for item in items if item.specs[0].kind != "keep")


def make_costs(shape: ModelShape, batch_sizes: Sequence[int] = (1, 4), device: str = "cpu") -> Costs:
    """Straight lines: prefill ``batch * tokens * unit / 64``, decode ``unit * (1 + tokens / 1024)`` milliseconds.

    ``unit`` is 1 per 10,000 parameters of the shape, and 0.5 for the rest.
    """
    units = {"rest": 0.5}
    for item in make_items(shape):
        if item.specs[0].kind != "skip":
            units[variants.shape_id(item.specs[0], shape)] = variants.params(item.specs[0], shape) / 10_000
    costs = []
    for shape_id, unit in units.items():
        for batch, tokens in itertools.product(batch_sizes, (1, 512)):
            for phase, ms in (("prefill", batch * tokens * unit / 64), ("decode", unit * (1 + tokens / 1024))):
                costs.append(
                    Cost(
                        shape_id,
                        phase,
                        batch,
                        tokens,
                        "bf16",
                        "bf16",
                        device,
                        1,
                        "transformers",
                        ms,
                        ms,
                        ms,
                        "measured",
                    )
                )
    return Costs(tuple(costs))


def make_file(**sections: object) -> ConstraintFile:
    return ConstraintFile.model_validate({"constraints": {}, **sections})


def make_problem(
    rng: random.Random, num_sites: int, choices: int, rows: Sequence[str] = ("max",), wide: int = 0, conflicts: int = 0
) -> Problem:
    """A random problem; ``wide`` items cover two or three neighbouring sites; bounds lie amid what occurs."""
    sites = tuple(Site(layer, "ffn") for layer in range(num_sites))
    items = [Item(f"{site}.{k}", (site,), (FfnSpec("narrow", k + 1),)) for site in sites for k in range(choices)]
    for number in range(wide):
        first, length = rng.randrange(num_sites - 1), rng.choice((2, 3))
        run = sites[first : first + length]
        items.append(Item(f"wide-{number}", run, (FfnSpec("skip"),) * len(run)))
    objective = {item.id: rng.uniform(0, 1) * len(item.sites) for item in items}
    made = []
    for number, side in enumerate(rows):
        whole = side == "eq"
        draw: Callable[[], float] = (lambda: float(rng.randint(1, 3))) if whole else (lambda: rng.uniform(0, 10))
        quantity = Quantity(f"cost{number}", "u", {item.id: draw() for item in items}, constant=1.0, whole=whole)
        middle = Fraction(1 + 2 * num_sites) if whole else Fraction(1 + 5.0 * num_sites * rng.uniform(0.5, 1.1))
        lower, upper = (middle if side in ("min", "eq") else None), (middle if side in ("max", "eq") else None)
        made.append(Row(quantity, f"cost{number} {side} {float(middle):.3g}", lower, upper))
    pairs = [tuple(rng.sample([item.id for item in items], 2)) for _ in range(conflicts)]
    return Problem(
        tuple(items),
        sites,
        objective,
        tuple(made),
        tuple(row.quantity for row in made),
        tuple(Conflict(pair, f"{pair[0]} and {pair[1]} do not go together") for pair in pairs),
    )


def all_choices(problem: Problem) -> Iterator[tuple[str, ...]]:
    """Every way to cover each site exactly once, bounds or not."""

    def extend(chosen: tuple[str, ...], covered: frozenset[Site]) -> Iterator[tuple[str, ...]]:
        left = [site for site in problem.sites if site not in covered]
        if not left:
            yield chosen
            return
        for item in problem.items:
            if left[0] in item.sites and not covered & set(item.sites):
                yield from extend((*chosen, item.id), covered | set(item.sites))

    return extend((), frozenset())
