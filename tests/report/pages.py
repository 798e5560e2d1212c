"""Contents of pages without a run: a made-up model of any depth, with scores, costs, a solution and what came of it."""

from __future__ import annotations

import random
from dataclasses import replace
from fractions import Fraction

from puzzle.report.contents import Comparison, Contents, Left, Recipe, Trained
from puzzle.report.front import in_order
from puzzle.report.layers import Layer, layers_of
from puzzle.report.searched import Absent, Search, Trade, searched
from puzzle.report.summary import MODELS, Summary
from puzzle.report.table import Table
from puzzle.search.compare import Compared
from puzzle.search.problem import Problem, Quantity, Row
from puzzle.types import AttentionSpec, FfnSpec, ModelShape, Solution
from puzzle.variants import params, site_item

ATTENTION = [AttentionSpec("keep"), AttentionSpec("gqa", 4), AttentionSpec("gqa", 2), AttentionSpec("gqa", 1)]
ATTENTION += [AttentionSpec("linear"), AttentionSpec("skip")]
FFN = [FfnSpec("keep"), *(FfnSpec("narrow", size) for size in (512, 256, 128, 64)), FfnSpec("linear"), FfnSpec("skip")]


def shape_of(num_layers: int) -> ModelShape:
    return ModelShape("llama", num_layers, 256, 8, 8, 32, 768, 1024, 4096, True)


def problem_of(num_layers: int, share: float = 0.6, variants: int = 7) -> Problem:
    """What is left out costs quality, at the ends of the model more; parameters are limited to a share."""
    shape, rng = shape_of(num_layers), random.Random(num_layers)
    items, objective, coefficients = [], {}, {}
    for site in shape.sites:
        own = FFN if site.part == "ffn" else ATTENTION
        depth = abs(2 * site.layer / max(1, num_layers - 1) - 1)
        for spec in own[:variants]:
            item = site_item(site, spec)
            items.append(item)
            coefficients[item.id] = float(params(spec, shape))
            gone = 1 - params(spec, shape) / params(own[0], shape)
            objective[item.id] = 0.3 * gone**2 * (0.3 + depth**3) * rng.uniform(0.6, 1.4)
    quantity = Quantity("params", "parameters", coefficients, 262_144.0, whole=True)
    speed = Quantity(
        "chat.output_tok_per_s", "tok/s", {one: 1e-6 * size for one, size in coefficients.items()}, 1.0, 1e3
    )
    keep = [f"{site}.keep" for site in shape.sites]
    limit = Row(quantity, f"params ≤ {share:.0%}", upper=Fraction(share) * quantity.value(keep))
    return Problem(tuple(items), shape.sites, objective, (limit,), (quantity, speed))


def solution_of(problem: Problem) -> Solution | None:
    """The dearest point of the front that keeps the limit, if one does."""
    found = searched(problem, shape_of(len(problem.sites) // 2), None).trade
    assert isinstance(found, Trade)
    kept = [point for point in in_order(found) if not point.broken]
    if not kept:
        return None
    names = [found.blocks[block].name for block in kept[-1].blocks]
    items = tuple(f"{site}.{name}" for site, name in zip(problem.sites, names, strict=True))
    return Solution(items, kept[-1].objective, None, "optimal", problem.totals(items), {}, objective_name="kl_nats")


def summary_of(solution: Solution, layers: tuple[Layer, ...], problem: Problem, name: str) -> Summary:
    def quality(kl: float) -> dict[str, dict[str, float]]:
        figures = {
            "ce_nats": 2.25 + kl,
            "bits_per_byte": 1.05,
            "kl_nats": kl,
            "ce_gap_nats": kl * 0.9,
            "agreement": 0.9,
        }
        return {figure: {"mean": mean, "standard_error": mean / 40} for figure, mean in figures.items()}

    def timed(factor: float) -> dict[str, dict[str, float]]:
        whole = {"ttft_ms": 75.9 * factor, "tpot_ms": 5.1 * factor, "output_tok_per_s": 1423 / factor}
        return {"whole": whole, "parts": {metric: value * 0.97 for metric, value in whole.items()}}

    keep = [item.id for item in problem.items if item.id.endswith(".keep")]
    totals = {"teacher": problem.totals(keep), "student": solution.totals}
    return Summary(
        title=name,
        solution=solution,
        predicted={model: {**of, "chat.memory_gib": of["params"] * 2 / 2**30} for model, of in totals.items()},
        quality=dict(zip(MODELS, map(quality, (0.0, 0.21, 0.093)), strict=True)),
        params={model: round(totals["teacher" if model == "teacher" else "student"]["params"]) for model in MODELS},
        stored_dtype="bfloat16",
        speed={"chat": {"teacher": timed(1.0), "student": timed(0.7)}},
        layers=layers,
        standings=None,
        tasks=(),
        served={},
        positions=[{"first": 1, "last": 63, **quality(0.1), "teacher_ce_nats": {"mean": 2.4, "standard_error": 0.1}}],
        distilled_by=name,
    )


def contents_of(num_layers: int = 8, name: str = "a-teacher", variants: int = 7) -> Contents:
    """Everything that a page can have; of one variant only, the teacher is all that can be chosen."""
    problem, rng = problem_of(num_layers, 0.6 if variants > 1 else 1.0, variants), random.Random(0)
    solution = solution_of(problem)
    assert solution is not None
    layers = layers_of(shape_of(num_layers), [problem.by_id[item_id] for item_id in solution.items])
    kinds = [("attention", one) for one in ("gqa-4", "gqa-2", "linear")] + [
        ("ffn", one) for one in ("narrow-512", "linear")
    ]
    starts = [0.02 * (2 + place) for place in range(len(kinds))]
    trained = [
        Trained(part, variant, start, start * 0.4, start * 0.2, start * 0.7, num_layers)
        for (part, variant), start in zip(kinds, starts, strict=True)
    ]
    steps = [
        {"step": step, "tokens": 2048 * step, "loss": 1.0, "kl": 0.21 / (1 + step / 60) * rng.uniform(0.8, 1.2)}
        for step in range(1, 400)
    ]
    truth = tuple(0.2 + 0.01 * place for place in range(8))
    compared = [
        Compared(
            way, solution.items, solution.objective_nats * factor, {"params": 4e6}, tuple(factor * one for one in truth)
        )
        for way, factor in (("MIP", 1.0), ("convex-hull greedy", 1.07), ("uniform", 1.9), ("random", 2.4))
    ]
    compared.append(Compared("importance depth", note="nothing that fits was found"))
    return Contents(
        title=name,
        subtitle="compressed within half-memory",
        left=(),
        summary=summary_of(solution, layers, problem, name),
        layers=layers,
        search=searched(problem, shape_of(num_layers), solution),
        trained=tuple(trained),
        steps=tuple(steps),
        compared=Comparison("kl_nats", tuple(compared)),
        standings=Table(
            ("candidate", "sum of scores", "after 32 tokens"), (("1", "0.2", "0.1 ± 0.01 (1.)"),), "Who won:", 0
        ),
        exports=("hf: transformers: passed",),
        recipe=Recipe(
            "limit.yaml",
            (("config.yaml", "run: runs/demo\n"), ("limit.yaml", "constraints: {}\n")),
            (("python", "3.11"),),
            (),
        ),
    )


def unfinished(contents: Contents) -> Contents:
    """The same, of a run of which nothing is done."""
    absent = Absent("not there yet; run `puzzle score RUN`")
    return replace(
        contents,
        left=(Left("score", 4, 0, 16), Left("search", 0, 1, 1)),
        summary=absent, layers=absent, search=absent, trained=absent, steps=absent, compared=absent, standings=None,
        exports=(),
    )  # fmt: skip


def without_answer(num_layers: int) -> Contents:
    """The same, of a limit that nothing keeps: there is a front, but nothing was chosen."""
    problem = problem_of(num_layers, share=0.001)
    assert solution_of(problem) is None
    found: Search = searched(problem, shape_of(num_layers), None)
    return replace(unfinished(contents_of(num_layers)), search=found)
