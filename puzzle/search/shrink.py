"""A smaller space for a second round: at every layer, what good architectures near the limit really use.

Coupled BLD trains pairs of attention and FFN, which a full space has too many of (Puzzle, section 2.2: search on the
decoupled library, keep what is popular, train pairs of that, search again). Reads the front; computes a SpaceFile.
"""

from __future__ import annotations

from collections import Counter

from puzzle.config import LayerSpaceFile, SpaceFile
from puzzle.search.pareto import Front
from puzzle.search.problem import Problem
from puzzle.types import InfeasibleError, Part
from puzzle.variants import variant_name

NUM_POINTS = 200


def popular(problem: Problem, front: Front, costs: tuple[float, float], least_share: float) -> SpaceFile:
    """The space of pairs in which each layer keeps the variants that at least ``least_share`` of the points use.

    Points: up to 200 of the front, evenly spread, whose cost lies in ``costs`` (from, to). The teacher's own block is
    always kept, and so are runs of layers up to the longest that as many points use. InfeasibleError where the front
    has no point there.
    """
    points = [int(point) for point in front.thinned(len(front)) if costs[0] <= front.cost[point] <= costs[1]]
    if not points:
        raise InfeasibleError(
            f"no architecture has {front.cost_name} between {costs[0]:g} and {costs[1]:g} {front.cost_unit}; the front "
            f"goes from {front.cost[0]:g} to {front.cost[-1]:g}"
        )
    points = points[:: max(1, len(points) // NUM_POINTS)]
    used: Counter[tuple[int, Part, str]] = Counter()
    longest: list[int] = []  # run of each point
    for point in points:
        chosen = [problem.by_id[item_id] for item_id in front.chosen(point)]
        longest.append(max(len(item.layers) for item in chosen))
        for item in chosen:
            for site, spec in item.at.items():
                used[site.layer, site.part, variant_name(spec)] += 1
    popular_runs = [length for length in longest if sum(own >= length for own in longest) >= least_share * len(points)]
    runs = max(popular_runs, default=1)
    layers = {}
    for layer in sorted({site.layer for site in problem.sites}):
        kept: dict[Part, tuple[str, ...]] = {}
        for part in ("attention", "ffn"):
            names = [name for (at, of, name), count in used.items() if (at, of) == (layer, part)]
            often = [name for name in names if used[layer, part, name] >= least_share * len(points)]
            kept[part] = tuple(dict.fromkeys(["keep", *sorted(often)]))
        layers[layer] = LayerSpaceFile(attention=kept["attention"], ffn=kept["ffn"])
    return SpaceFile(attention=("keep",), ffn=("keep",), layers=layers, pairs=True, runs=runs if runs > 1 else 0)
