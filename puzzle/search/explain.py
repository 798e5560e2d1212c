"""Why the answer is what it is: what binds, what a little more would buy, what gives way next, what a change costs.

Reads a Problem and its best choice; computes records, each from exact solves of changed problems (an integer programme
has no prices that a formula could tell); writes nothing. All of it holds at the batch sizes of that Problem.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from puzzle.search.linear import Choice, Cut, minimise
from puzzle.search.problem import Problem, Row
from puzzle.types import ConfigError, Site
from puzzle.variants import variant_name

SHARE = Fraction(1, 100)  # of a bound that it is moved by
DIGITS = 4


@dataclass(frozen=True)
class Change:
    """What is chosen otherwise at these sites, by item ids: a run of layers may take the place of several items."""

    sites: tuple[Site, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]


@dataclass(frozen=True)
class RowStory:
    """One bound. ``slack``: how far the value is from it, in its unit. Objectives are differences from the answer's.

    ``without``: if the bound were not there; it binds where that is below 0. ``looser`` and ``tighter``: if it were
    moved by ``step``; of an equality, up and down. None: nothing fits then. ``gives_way``: what changes when tightened.
    """

    row: Row
    value: Fraction
    slack: Fraction
    without: float
    step: Fraction
    looser: float | None
    tighter: float | None
    gives_way: tuple[Change, ...]

    @property
    def binds(self) -> bool:
        return self.without < 0

    @property
    def directions(self) -> tuple[str, str]:
        """Of the bound's number, where it is made looser and tighter."""
        return ("less", "more") if self.row.upper is None else ("more", "less")


@dataclass(frozen=True)
class Forced:
    """What it costs if ``item_id`` has to be chosen, or must not be; None: nothing fits then.

    ``instead``: what the best architecture has at its sites then; ``changes``: all that is otherwise.
    """

    item_id: str
    cost: float | None
    instead: tuple[str, ...]
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class Explanation:
    objective: float
    objective_name: str
    rows: tuple[RowStory, ...]
    kept: tuple[Forced, ...]


def explain(problem: Problem, chosen: Sequence[str], share: Fraction = SHARE) -> Explanation:
    """Of the best choice of a problem. ``share``: of a bound that it is moved by, rounded to one digit."""
    rows = prices(problem, chosen, share)
    return Explanation(float(problem.objective_of(chosen)), problem.objective_name, rows, kept(problem, chosen))


def prices(problem: Problem, chosen: Sequence[str], share: Fraction = SHARE) -> tuple[RowStory, ...]:
    """Of every bound what it costs the best choice of a problem, in the order of the rows."""
    return tuple(_story(problem, chosen, row, _step(row, share)) for row in problem.rows)


def changes(problem: Problem, before: Iterable[str], after: Iterable[str]) -> tuple[Change, ...]:
    """Site by site where items meet items of the same sites, else the smallest groups of sites that both cover."""
    left, right = set(before), set(after)
    open_ids = left ^ right
    found = []
    for site in problem.sites:
        group: set[str] = {item_id for item_id in open_ids if site in problem.by_id[item_id].sites}
        sites: set[Site] = set()
        while group and (grown := {at for item_id in group for at in problem.by_id[item_id].sites}) != sites:
            sites = grown
            group = {item_id for item_id in open_ids if sites & set(problem.by_id[item_id].sites)}
        if group:
            ordered = tuple(at for at in problem.sites if at in sites)
            found.append(Change(ordered, problem.in_order(group & left), problem.in_order(group & right)))
            open_ids -= group
    return tuple(found)


def kept(problem: Problem, chosen: Sequence[str]) -> tuple[Forced, ...]:
    """For every attention of the teacher's that the answer keeps: what the best answer without it costs more.

    The cheapest to lose first; those that cannot be lost last.
    """
    found = []
    for site in problem.sites:
        if site.part != "attention":
            continue
        keeping = [item.id for item in problem.items if site in item.sites and item.at[site].kind == "keep"]
        for item_id in set(keeping) & set(chosen):
            found.append(_without(problem, chosen, item_id, keeping))
    return _cheapest_first(found)


def alternatives(problem: Problem, chosen: Sequence[str], site: Site) -> tuple[Forced, ...]:
    """Every item that covers the site, and what it costs if it has to be chosen; what is chosen costs nothing.

    ConfigError for a site that the model does not have.
    """
    if site not in problem.sites:
        raise ConfigError(f"{site}: the model has no such site")
    items = [item for item in problem.items if site in item.sites]
    found = []
    for item in items:
        rivals = [other.id for other in problem.items if set(item.sites) & set(other.sites) and other is not item]
        found.append(_without(problem, chosen, item.id, rivals))
    return _cheapest_first(found)


def _cheapest_first(found: Iterable[Forced]) -> tuple[Forced, ...]:
    return tuple(sorted(found, key=lambda forced: math.inf if forced.cost is None else forced.cost))


def _story(problem: Problem, chosen: Sequence[str], row: Row, step: Fraction) -> RowStory:
    others = tuple(other for other in problem.rows if other is not row)
    looser = _solve(replace(problem, rows=(*others, _moved(row, step))), chosen)
    tighter = _solve(replace(problem, rows=(*others, _moved(row, -step))), chosen)
    without = _solve(replace(problem, rows=others), chosen)
    assert without is not None, "the answer itself is one"
    return RowStory(
        row,
        row.quantity.value(chosen),
        row.slack(chosen),
        _difference(problem, chosen, without) or 0.0,
        step,
        _difference(problem, chosen, looser),
        _difference(problem, chosen, tighter),
        () if tighter is None else changes(problem, chosen, tighter.chosen),
    )


def _moved(row: Row, by: Fraction) -> Row:
    """Looser where ``by`` is positive; an equality goes up by it."""
    if row.lower is not None and row.upper is not None:
        return replace(row, lower=row.lower + by, upper=row.upper + by)
    if row.upper is not None:
        return replace(row, upper=row.upper + by)
    assert row.lower is not None
    return replace(row, lower=row.lower - by)


def _step(row: Row, share: Fraction) -> Fraction:
    """About that share of the bound, as one would say it: 1, 2 or 5 times a power of ten; of counts at least 1."""
    bound = abs(row.upper if row.upper is not None else row.lower or Fraction(0))
    wanted = bound * share or Fraction(1)
    step = round_step(wanted)
    if row.quantity.whole:
        return max(Fraction(round(step)), Fraction(1))
    if row.lower is not None and row.upper is None and row.quantity.numerator is not None:
        return min(step, row.lower / 2)  # a rate stays positive
    return step


def round_step(wanted: Fraction) -> Fraction:
    """1, 2 or 5 times a power of ten, about as large."""
    power = Fraction(10) ** math.floor(math.log10(wanted))
    return min((digit * power for digit in (1, 2, 5, 10)), key=lambda size: abs(size - wanted))


def _without(problem: Problem, chosen: Sequence[str], item_id: str, banned: Sequence[str]) -> Forced:
    """Told of ``item_id``, at whose sites it looks: the best choice that has none of ``banned``."""
    sites = set(problem.by_id[item_id].sites)
    choice = _solve(problem, chosen, [Cut(dict.fromkeys(banned, 1), 0)])
    if choice is None:
        return Forced(item_id, None, (), ())
    instead = [other for other in choice.chosen if sites & set(problem.by_id[other].sites)]
    otherwise = changes(problem, chosen, choice.chosen)
    return Forced(item_id, _difference(problem, chosen, choice), problem.in_order(instead), otherwise)


def _solve(problem: Problem, start: Sequence[str], cuts: Sequence[Cut] = ()) -> Choice | None:
    return minimise(problem, problem.objective, problem.rows, cuts, start=start)


def _difference(problem: Problem, chosen: Sequence[str], choice: Choice | None) -> float | None:
    return None if choice is None else float(choice.total - problem.objective_of(chosen))


def text(explanation: Explanation, problem: Problem) -> str:
    """For people, a few lines a bound."""
    unit = _unit(explanation.objective_name)
    lines = [f"{explanation.objective:.4f} {unit} predicted"]
    for story in explanation.rows:
        lines += ["", *_row_lines(story, problem, unit)]
    if explanation.kept:
        lines += ["", "kept attentions, and what the best architecture without each costs more:"]
    for forced in explanation.kept:
        lines.append(f"  {forced.item_id:<28}{_forced_words(forced, problem, unit)}")
    return "\n".join(lines)


def alternatives_text(found: Sequence[Forced], problem: Problem) -> str:
    """For people, one line an item."""
    unit = _unit(problem.objective_name)
    return "\n".join(f"  {forced.item_id:<28}{_forced_words(forced, problem, unit)}" for forced in found)


def _unit(objective_name: str) -> str:
    return objective_name.replace("_nats", " nats")


def _row_lines(story: RowStory, problem: Problem, unit: str) -> list[str]:
    quantity, row = story.row.quantity, story.row
    state = f"binds; without it {story.without:+.4f} {unit}" if story.binds else "does not bind"
    lines = [f"{row.written}: {_number(story.value)} {quantity.unit}, {_number(story.slack)} from the bound: {state}"]
    step = f"{_number(story.step)} {quantity.unit.partition(',')[0]}"  # without ", estimated"
    lines += [f"  {gain}" for gain in gains(story, step, unit)]
    if story.gives_way:
        lines.append(f"  {step} {story.directions[1]} would change:")
        lines += [f"    {_change_words(change, problem)}" for change in story.gives_way]
    return lines


def gains(story: RowStory, step: str, unit: str) -> list[str]:
    """What the bound ``step`` looser, then tighter, buys or costs, in words; ``unit`` is the quality's."""
    return [
        f"{step} {word}: " + ("nothing fits" if gain is None else f"{gain:+.4f} {unit}")
        for word, gain in zip(story.directions, (story.looser, story.tighter), strict=True)
    ]


def _forced_words(forced: Forced, problem: Problem, unit: str) -> str:
    if forced.cost is None:
        return "nothing fits"
    if not forced.changes:
        return "chosen"
    more = len(forced.changes) - 1
    instead = f", {_names(forced.instead, problem)} instead" if forced.item_id not in forced.instead else ""
    rest = f", {more} other change{'s' if more > 1 else ''}" if more else ""
    return f"{forced.cost:+.4f} {unit}{instead}{rest}"


def _change_words(change: Change, problem: Problem) -> str:
    where = str(change.sites[0]) if len(change.sites) == 1 else f"{change.sites[0]} to {change.sites[-1]}"
    return f"{where}: {_names(change.before, problem)} -> {_names(change.after, problem)}"


def _names(item_ids: Sequence[str], problem: Problem) -> str:
    return " + ".join(variant_name(spec) for item_id in item_ids for spec in problem.by_id[item_id].specs)


def _number(value: Fraction) -> str:
    return f"{float(value):,.{DIGITS}g}" if abs(value) < 10**DIGITS else f"{float(value):,.0f}"
