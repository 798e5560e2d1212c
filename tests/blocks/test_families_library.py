"""Every family, streamed from disk, with every variant that it can have: its start, and some training."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
import torch

from puzzle.blocks.distill import Task, distill
from puzzle.blocks.starts import best_starts
from puzzle.blocks.stream import Stream
from puzzle.checkpoint import read_shape
from puzzle.config import DistillConfig
from puzzle.data.batches import Batch
from puzzle.modeling import FAMILIES
from puzzle.space import SearchSpace
from puzzle.teacher import Compute, LayerPass, Teacher, final_hidden, load_model
from puzzle.variants import has_weights, site_item
from tests.tiny_families import make_stock

ATTENTION = ["keep", "gqa-1", "window-3", "window-3-sinks-2", "linear", "skip"]
FFN = {False: ["keep", "narrow-24", "linear", "skip"], True: ["keep", "narrow-24", "experts-3", "active-1", "linear"]}
CPU = torch.device("cpu")


@functools.cache
def folder_of(family: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"{family}-"))
    make_stock(family).save_pretrained(folder, max_shard_size="40kB")
    return folder


def batch(seed: int) -> Batch:
    return Batch(torch.randint(3, 96, (4, 24), generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_streamed_teacher_computes_what_the_whole_one_does(family: str, dtype: torch.dtype) -> None:
    """In bf16 to bf16's precision: between layers the stream is rounded."""
    model = load_model(folder_of(family), Compute(CPU, bf16=False))
    teacher = Teacher(folder_of(family), CPU, dtype)
    stream = Stream.of(teacher, [batch(0)])
    for index in range(teacher.num_layers):
        stream.advance(teacher.layer(index))
    with torch.no_grad():
        expected = final_hidden(model, batch(0))
        found = model.model.norm(stream.hidden(0).float())
    error = (found - expected).norm() / expected.norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_variant_starts_and_trains(family: str) -> None:
    shape = read_shape(folder_of(family))
    names = FFN[bool(shape.moe_layers)]
    space = SearchSpace.parse({"attention": ATTENTION, "ffn": names}, shape)
    teacher = Teacher(folder_of(family), CPU, torch.float32)
    batches = [batch(seed) for seed in range(6)]
    calibration, held_out = Stream.of(teacher, batches), Stream.of(teacher, [batch(100)])
    training = Stream(teacher, lambda step: batch(step % 6), 12, None)
    kinds = set()
    for index in range(teacher.num_layers):
        layer = teacher.layer(index)
        sites = [site for site in space.on_offer if site.layer == index]
        items = [item for site in sites for item in (site_item(site, spec) for spec in space.on_offer[site])]
        trained = [item for item in items if has_weights(item)]
        passes: list[list[LayerPass]] = [list(stream.passes(layer)) for stream in (calibration, held_out)]
        found = dict(best_starts(layer, [item.specs[0] for item in trained], *passes))
        for start in found.values():
            if "paper" in start.losses:
                assert min(start.losses.values()) <= start.losses["paper"]
        starts = [Task(item.id, (item,), found[item.specs[0]].weights) for item in trained]
        config = DistillConfig(batch_size=4, learning_rate=1e-3)
        for unit, result in distill(starts, training, held_out, config).items():
            assert result.failed is None, unit
            assert result.after[unit] <= result.before[unit]
        kinds |= {item.specs[0].kind for item in trained}
        for stream in (calibration, held_out, training):
            stream.advance(layer)
    assert kinds == {"gqa", "window", "linear", "narrow", *(("experts", "active") if shape.moe_layers else ())}
