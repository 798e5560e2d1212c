"""The choice as an integer programme: items to choose from, bounds to keep, a sum to minimise. Data and arithmetic.

    minimise sum_i score_i x_i   subject to   every site in exactly one chosen item,   lower <= row(x) <= upper

(Puzzle, section 4.3). Sums are exact: floats are added as fractions, so that "fits" never depends on rounding.
Reads nothing and writes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property

from puzzle.types import ConfigError, Conflict, Item, Site, Solution
from puzzle.variants import is_teacher

Chosen = tuple[str, ...]  # an architecture: item ids in the order of the sites
# true values per sequence of each architecture, the same sequences for all; None where its outputs are not finite
Measure = Callable[[Sequence[Chosen]], Sequence[Sequence[float] | None]]


@dataclass(frozen=True)
class Quantity:
    """A metric of an architecture: ``constant`` + the chosen items' coefficients, or ``numerator`` over that sum.

    The second form is a rate: tokens per second are 1000 * tokens over milliseconds. An absent item adds nothing.
    """

    name: str
    unit: str
    coefficients: Mapping[str, float] = field(hash=False, repr=False)
    constant: float = 0.0
    numerator: float | None = None
    whole: bool = False  # a count: values are whole numbers
    margin: float = 0.0  # what it may be short of the truth, relative to it
    estimated: bool = False  # it rests on times that nobody measured

    def linear(self, chosen: Iterable[str]) -> Fraction:
        """The sum itself, exactly."""
        return sum((Fraction(self.coefficients.get(item_id, 0.0)) for item_id in chosen), Fraction(self.constant))

    def value(self, chosen: Iterable[str]) -> Fraction:
        """The metric in its unit, exactly."""
        return self.of_linear(self.linear(chosen))

    def of_linear(self, linear: Fraction) -> Fraction:
        return linear if self.numerator is None else Fraction(self.numerator) / linear


@dataclass(frozen=True)
class Row:
    """A bound on a quantity, in the quantity's unit; ``written`` is how the user put it."""

    quantity: Quantity
    written: str
    lower: Fraction | None = None
    upper: Fraction | None = None

    def linear_bounds(self) -> tuple[Fraction | None, Fraction | None]:
        """Lower and upper bound of the quantity's sum: a rate of at least X is a time of at most numerator / X."""
        if self.quantity.numerator is None:
            return self.lower, self.upper
        numerator = Fraction(self.quantity.numerator)
        return (
            None if self.upper is None else numerator / self.upper,
            None if self.lower is None else numerator / self.lower,
        )

    def holds(self, chosen: Iterable[str]) -> bool:
        lower, upper = self.linear_bounds()
        total = self.quantity.linear(chosen)
        return (lower is None or lower <= total) and (upper is None or total <= upper)

    def slack(self, chosen: Iterable[str]) -> Fraction:
        """How far the value is from the nearer bound, in the quantity's unit; below 0 where it breaks it."""
        value = self.quantity.value(chosen)
        below = [value - self.lower] if self.lower is not None else []
        above = [self.upper - value] if self.upper is not None else []
        return min(below + above)


@dataclass(frozen=True)
class Problem:
    """One search: ``rows`` bind, ``quantities`` are all metrics that can be told of an answer.

    ``objective`` is the sum of scores called ``objective_name``. Where there is a ``cost``, that is minimised in its
    place (a rate: made as large as possible), and the objective is what one of the rows bounds.
    """

    items: tuple[Item, ...]
    sites: tuple[Site, ...]
    objective: Mapping[str, float] = field(hash=False, repr=False)
    rows: tuple[Row, ...] = ()
    quantities: tuple[Quantity, ...] = field(default=(), repr=False)
    conflicts: tuple[Conflict, ...] = ()
    objective_name: str = "kl_nats"
    label: str = ""  # what tells it from its siblings: the batch sizes
    cost: Quantity | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        doubles = [item_id for item_id, count in Counter(item.id for item in self.items).items() if count > 1]
        if doubles:
            raise ConfigError(f"item {doubles[0]} is there twice")
        known = set(self.sites)
        covered = {site for item in self.items for site in item.sites}
        for item in self.items:
            assert item.id in self.objective, f"{item.id} has no score"
            if strange := sorted(set(item.sites) - known):
                raise ConfigError(f"item {item.id} covers {strange[0]}, which the model does not have")
        for site in self.sites:
            if site not in covered:
                raise ConfigError(f"no variant is left for {site}; add one to the search space")

    @cached_property
    def by_id(self) -> Mapping[str, Item]:
        return {item.id: item for item in self.items}

    @property
    def teacher(self) -> Chosen | None:
        """The choice that leaves the teacher as it is; None where that is not on offer."""
        keeping = [item for item in self.items if is_teacher(item)]
        covered = sum(len(item.sites) for item in keeping)
        return self.in_order(item.id for item in keeping) if covered == len(self.sites) else None

    @property
    def minimised(self) -> Mapping[str, float]:
        """By item, what the search makes as small as possible in sum."""
        return self.objective if self.cost is None else self.cost.coefficients

    def rank(self, total: Fraction) -> Fraction:
        """How good a sum of :attr:`minimised` is, the smaller the better: comparable between batch sizes."""
        if self.cost is None:
            return total
        value = self.cost.of_linear(total + Fraction(self.cost.constant))
        return value if self.cost.numerator is None else -value

    def objective_of(self, chosen: Iterable[str]) -> Fraction:
        """The sum of the scores, exactly."""
        return sum((Fraction(self.objective[item_id]) for item_id in chosen), Fraction(0))

    def totals(self, chosen: Iterable[str]) -> dict[str, float]:
        """Every metric of the architecture by its name in the constraint file."""
        ids = tuple(chosen)
        return {quantity.name: float(quantity.value(ids)) for quantity in self.quantities}

    def quantity(self, name: str) -> Quantity:
        """The quantity of that name. ConfigError listing the names if there is none."""
        for quantity in self.quantities:
            if quantity.name == name:
                return quantity
        raise ConfigError(f"nothing is known of {name!r}; known: {', '.join(known.name for known in self.quantities)}")

    def in_order(self, chosen: Iterable[str]) -> tuple[str, ...]:
        """The chosen items in the order in which the residual stream meets them."""
        place = {site: index for index, site in enumerate(self.sites)}
        return tuple(sorted(chosen, key=lambda item_id: min(place[site] for site in self.by_id[item_id].sites)))

    def violations(self, chosen: Iterable[str]) -> tuple[str, ...]:
        """What an architecture breaks, in words; empty if it is an answer. Exact."""
        ids = tuple(chosen)
        times_covered = Counter(site for item_id in ids for site in self.by_id[item_id].sites)
        broken = [f"{site} is covered {times_covered[site]} times" for site in self.sites if times_covered[site] != 1]
        broken += [conflict.reason for conflict in self.conflicts if set(conflict.item_ids) <= set(ids)]
        broken += [row.written for row in self.rows if not row.holds(ids)]
        return tuple(broken)


def solved(problems: Iterable[Problem], solution: Solution) -> Problem:
    """The one that ``solution`` is an answer of: each workload at the batch size that it chose."""
    return next(problem for problem in problems if _at_batch_sizes_of(problem, solution))


def _at_batch_sizes_of(problem: Problem, solution: Solution) -> bool:
    sizes = [quantity for quantity in problem.quantities if quantity.name.endswith(".batch_size")]
    return all(quantity.constant == solution.totals[quantity.name] for quantity in sizes)
