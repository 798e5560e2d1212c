"""Searches of the sizes of real ones, with scores made up by rule: what bench_search.py solves. Pure; no torch.

Shapes, parameters, bytes and times are those of Llama-3.1 70B and 405B on H100s by the project's own memory model and
roofline, so costs repeat from layer to layer as real ones do. Scores are drawn: a site's sensitivity is lognormal,
twice as high towards both ends of the model; a variant's score is that times what it takes away, to the power 1.5,
times lognormal noise; a block's is 0.6 to 1.0 times the sum of its two parts (0.75 on published scores of a 70B).
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal

from puzzle import variants
from puzzle.config import ConstraintFile
from puzzle.profiling.hardware import Deployment
from puzzle.profiling.roofline import estimate
from puzzle.profiling.source import points_of
from puzzle.search import problems
from puzzle.search.constraints import workloads
from puzzle.search.problem import Problem
from puzzle.space import SearchSpace
from puzzle.tables import ScoreTable
from puzzle.types import Costs, Item, ModelShape, Score, Site, Spec

LLAMA_70B = ModelShape("llama", 80, 8192, 64, 8, 128, 28672, 128256, 131072, tied_embeddings=False)
LLAMA_405B = ModelShape("llama", 126, 16384, 128, 8, 128, 53248, 128256, 131072, tied_embeddings=False)
PAPER_ATTENTION = ("keep", "gqa-*", "linear", "skip")  # 6
PAPER_FFN = ("keep", "narrow-87%", "narrow-75%", "narrow-50%", "narrow-25%", "narrow-20%", "narrow-10%", "linear",
             "skip")  # 9, so 54 blocks a layer  # fmt: skip
WIDE_ATTENTION = (*PAPER_ATTENTION, *(f"window-{tokens}" for tokens in range(128, 14 * 128 + 1, 128)))  # 20
WIDE_FFN = ("keep", *(f"narrow-{percent}%" for percent in range(4, 92, 4)), "linear", "skip")  # 25, so 500 blocks
Form = Literal["sites", "blocks"]


@dataclass(frozen=True)
class Size:
    """``form``: one item a variant and site, or one an (attention, FFN) pair with a score of its own."""

    name: str
    shape: ModelShape
    attention: tuple[str, ...]
    ffn: tuple[str, ...]
    form: Form

    @property
    def space(self) -> SearchSpace:
        return SearchSpace.parse(
            {"attention": self.attention, "ffn": self.ffn}, self.shape, pairs=self.form == "blocks"
        )


SIZES = {
    "80x54-sites": Size("80x54-sites", LLAMA_70B, PAPER_ATTENTION, PAPER_FFN, "sites"),
    "80x54-blocks": Size("80x54-blocks", LLAMA_70B, PAPER_ATTENTION, PAPER_FFN, "blocks"),
    "126x500-sites": Size("126x500-sites", LLAMA_405B, WIDE_ATTENTION, WIDE_FFN, "sites"),
    "126x500-blocks": Size("126x500-blocks", LLAMA_405B, WIDE_ATTENTION, WIDE_FFN, "blocks"),
}


def instance(size: Size, seed: int, percent: float = 60) -> Problem:
    """A search under bounds on memory (``percent`` of the teacher), throughput and parameters, all of which matter."""
    rng = random.Random(f"{size.name} {seed}")
    shape, space = size.shape, size.space
    items = space.items()
    chat = {"isl": 1024, "osl": 1024, "batch_size": 128, "device": "h100", "weights": "bf16", "tp": 8}
    file = ConstraintFile.model_validate(
        {
            "workloads": {"chat": chat},
            "constraints": {
                "memory_gib": f"{percent:g}%",
                "output_tok_per_s": f"{10000 / (0.945 * percent) * rng.uniform(0.99, 1.01):.4f}%",
                "params": f"{0.8 * percent * rng.uniform(0.99, 1.01):.4f}%",
            },
        }
    )
    scores = ScoreTable.of(_scores(items, shape, rng))
    (problem,) = problems(shape, items, scores, _costs(shape, items, file), file, space.conflicts())
    return problem


def _costs(shape: ModelShape, items: tuple[Item, ...], file: ConstraintFile) -> Costs:
    specs: set[Spec] = {spec for item in items for spec in item.specs}
    (workload,) = workloads(file, shape)
    points = points_of(workload, workload.batch_sizes[0])
    ordered = sorted(specs, key=str)
    return Costs(tuple(cost for point in points for cost in estimate(shape, ordered, point, Deployment.of(workload))))


def _scores(items: tuple[Item, ...], shape: ModelShape, rng: random.Random) -> list[Score]:
    sensitivity = {
        site: 0.1 * rng.lognormvariate(0, 0.8) * (1 + (2 * (site.layer + 0.5) / shape.num_layers - 1) ** 4)
        for site in shape.sites
    }
    noise: dict[tuple[Site, Spec], float] = {}
    scores = []
    for item in items:
        if variants.is_teacher(item):
            continue
        parts = []
        for site, spec in zip(item.sites, item.specs, strict=True):
            lost = 1 - variants.params(spec, shape) / variants.params(variants.keep_spec(shape, site), shape)
            if spec.kind == "window":
                lost = 0.3 - 0.02 * math.log2(spec.window_tokens or 1)
            factor = noise.setdefault((site, spec), rng.lognormvariate(0, 0.15))
            parts.append(sensitivity[site] * max(0.0, lost) ** 1.5 * factor)
        value = math.fsum(parts) * (rng.uniform(0.6, 1.0) if len([part for part in parts if part]) > 1 else 1.0)
        scores.append(Score(item.id, "teacher", "teacher", "kl", "score", (value,), 131072))
    return scores
