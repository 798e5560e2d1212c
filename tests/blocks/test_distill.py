"""Block-wise distillation: it lowers the loss, to the loss it says, and nobody's result depends on a neighbour."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from puzzle.blocks.distill import Distilled, Task, distill
from puzzle.blocks.layer import layer_with, parts_of
from puzzle.blocks.loss import Goal, local_loss
from puzzle.blocks.nested import prefix, widths_at
from puzzle.blocks.stream import InMemory, OnDisk, Stream
from puzzle.config import DistillConfig
from puzzle.data.batches import Batch
from puzzle.modeling import PuzzleDecoderLayer
from puzzle.schedule import warmup_cosine
from puzzle.teacher import Context, Teacher, run_layer
from puzzle.types import AttentionSpec, FfnSpec, Item, Site
from puzzle.variants import layer_item, site_item
from tests.blocks.conftest import batch, items_at, start_of

CONFIG = DistillConfig(batch_size=4)


def layers_of(teacher: Teacher) -> list[PuzzleDecoderLayer]:
    return [teacher.layer(index) for index in range(teacher.num_layers)]


def loss(result: Distilled) -> float:
    """After BLD, of a unit of one item."""
    (value,) = result.after.values()
    return value


def start_loss(result: Distilled) -> float:
    (value,) = result.before.values()
    return value


def stream_at(teacher: Teacher, layer: int, steps: int, same: bool = False, store: OnDisk | None = None) -> Stream:
    stream = Stream(teacher, lambda step: batch(0 if same else step), steps, store or InMemory())
    for index in range(layer):
        stream.advance(teacher.layer(index))
    return stream


def held_out_at(teacher: Teacher, layer: int, seed: int = 1000) -> Stream:
    stream = Stream.of(teacher, [batch(seed)])
    for index in range(layer):
        stream.advance(teacher.layer(index))
    return stream


def train(teacher: Teacher, items: list[Item], steps: int, config: DistillConfig = CONFIG) -> dict[str, Distilled]:
    return trained_from(teacher, [start_of(layers_of(teacher), item) for item in items], steps, config)


def trained_from(teacher: Teacher, starts: list[Task], steps: int, config: DistillConfig) -> dict[str, Distilled]:
    first = min(start.layer for start in starts)
    return distill(starts, stream_at(teacher, first, steps), held_out_at(teacher, first), config)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
@pytest.mark.parametrize("loss_at", ["layer", "site"])
def test_every_variant_gets_better_and_the_teacher_stays(teacher_folder: Path, loss_at: str, kind: str) -> None:
    held = Teacher(teacher_folder, torch.device("cpu"), torch.float32, held=True)
    before = {name: tensor.clone() for name, tensor in held.layer(1).state_dict().items()}
    config = CONFIG.model_copy(update={"learning_rate": 3e-3, "loss_at": loss_at, "loss": kind})
    starts = [start_of(layers_of(held), item) for item in items_at([1, 2])]
    # on what it sees: a random teacher has little that would generalise from so few tokens
    found = distill(starts, stream_at(held, 1, 60, same=True), held_out_at(held, 1, seed=0), config)
    assert len(found) == 6
    for unit, result in found.items():
        assert loss(result) < 0.9 * start_loss(result), unit
        assert result.tokens == 64 * 60
    assert all(torch.equal(tensor, before[name]) for name, tensor in held.layer(1).state_dict().items())


def test_the_reported_loss_is_that_of_the_returned_weights(teacher: Teacher) -> None:
    items = items_at([2])
    for item, result in zip(items, train(teacher, items, 5).values(), strict=True):
        layer = layer_with(teacher.layer(2), parts_of(item), result.weights)
        with torch.no_grad():
            one = held_out_at(teacher, 2).at(teacher.layer(2), 0)
            expected = local_loss(layer, tuple(parts_of(item)), one)
        assert result.after == {item.id: pytest.approx(expected.item(), rel=1e-5)}


def test_a_result_does_not_depend_on_which_others_train_beside_it(teacher: Teacher) -> None:
    together = train(teacher, items_at([0, 3]), 4)
    item = items_at([0, 3])[-2]
    alone = train(teacher, [item], 4)[item.id]
    assert all(torch.equal(alone.weights[name], tensor) for name, tensor in together[item.id].weights.items())
    assert loss(alone) == loss(together[item.id])


def test_a_result_does_not_depend_on_where_the_stream_is_kept(teacher: Teacher, tmp_path: Path) -> None:
    item = items_at([2])[1]
    results = []
    for store in (InMemory(), OnDisk(tmp_path / "residual"), None):
        stream = Stream(teacher, batch, 4, store, chunk=3)
        for index in range(2):
            stream.advance(teacher.layer(index))
        results.append(distill([start_of(layers_of(teacher), item)], stream, held_out_at(teacher, 2), CONFIG)[item.id])
    for other in results[1:]:
        assert all(torch.equal(other.weights[name], tensor) for name, tensor in results[0].weights.items())


def test_no_tokens_leave_the_start_as_it_is(teacher: Teacher) -> None:
    for item, result in zip(items_at([0]), train(teacher, items_at([0]), 0).values(), strict=True):
        start = start_of(layers_of(teacher), item).weights
        assert all(torch.equal(result.weights[name], tensor) for name, tensor in start.items())
        assert start_loss(result) == loss(result)


def test_training_that_makes_it_worse_is_not_kept(teacher: Teacher) -> None:
    config = CONFIG.model_copy(update={"learning_rate": 0.5})
    item = items_at([1])[0]
    result = train(teacher, [item], 6, config)[item.id]
    start = start_of(layers_of(teacher), item).weights
    assert loss(result) == start_loss(result)
    assert all(torch.equal(result.weights[name], tensor) for name, tensor in start.items())


def test_a_variant_that_breaks_is_marked_and_harms_nobody(teacher: Teacher) -> None:
    good, bad = items_at([1])[0], items_at([1])[1]
    broken = start_of(layers_of(teacher), bad)
    broken.weights["mlp.up_proj.weight"][0, 0] = math.nan  # type: ignore[index]
    starts = [start_of(layers_of(teacher), good), broken]
    found = distill(starts, stream_at(teacher, 1, 40), held_out_at(teacher, 1), CONFIG)
    assert found[bad.id].failed is not None
    assert "not finite" in (found[bad.id].failed or "")
    assert found[bad.id].tokens < 64 * 40
    alone = train(teacher, [good], 40)[good.id]
    assert found[good.id].failed is None
    assert loss(found[good.id]) == loss(alone)


def test_who_stops_getting_better_stops(teacher: Teacher) -> None:
    """At a rate of almost nothing nobody gains; the others of the group go on."""
    still = CONFIG.model_copy(update={"learning_rate": 1e-12, "patience": 3})
    item = items_at([1])[0]
    result = train(teacher, [item], 100, still)[item.id]
    assert result.tokens == 64 * 5 * 4  # a check every 5 steps: one to begin with, three without a gain
    keen = CONFIG.model_copy(update={"learning_rate": 3e-3, "patience": 3})
    assert train(teacher, [item], 100, keen)[item.id].tokens > result.tokens


def test_who_stops_early_is_the_same_alone(teacher: Teacher) -> None:
    """Units of a group stop at different steps; each when it would have stopped without the others."""
    patient = CONFIG.model_copy(update={"learning_rate": 3e-3, "patience": 2})
    starts = [start_of(layers_of(teacher), item) for item in items_at([0, 3])]
    starts.append(nested_start(teacher, 0, [80, 16, 32]))
    together = trained_from(teacher, starts, 60, patient)
    assert len({result.tokens for result in together.values()}) > 2
    for start in starts:
        alone, beside = trained_from(teacher, [start], 60, patient)[start.unit], together[start.unit]
        assert (alone.tokens, alone.before, alone.after) == (beside.tokens, beside.before, beside.after)
        assert all(torch.equal(alone.weights[name], tensor) for name, tensor in beside.weights.items())


def test_with_patience_the_best_weights_are_kept(teacher: Teacher) -> None:
    config = CONFIG.model_copy(update={"learning_rate": 0.03, "patience": 20})
    item = items_at([2])[2]
    patient = train(teacher, [item], 60, config)[item.id]
    hasty = train(teacher, [item], 60, config.model_copy(update={"patience": None}))[item.id]
    assert loss(patient) <= loss(hasty)


def test_a_pair_is_trained_on_the_layer_and_returns_both_parts(teacher: Teacher) -> None:
    item = layer_item(1, AttentionSpec("gqa", num_kv_heads=2), FfnSpec("narrow", intermediate_size=48))
    result = train(teacher, [item], 60, CONFIG.model_copy(update={"learning_rate": 3e-3}))[item.id]
    assert loss(result) < 0.9 * start_loss(result)
    assert result.weights["self_attn.k_proj.weight"].shape == (32, 64)
    assert result.weights["mlp.down_proj.weight"].shape == (64, 48)


def nested_start(teacher: Teacher, layer: int, widths: list[int]) -> Task:
    items = tuple(site_item(Site(layer, "ffn"), FfnSpec("narrow", intermediate_size=width)) for width in widths)
    widest = max(items, key=lambda item: item.specs[0].intermediate_size)  # type: ignore[union-attr, return-value]
    return Task(f"L{layer:03d}.ffn.nested", items, start_of(layers_of(teacher), widest).weights)


def test_a_nested_ffn_holds_every_width(teacher: Teacher) -> None:
    start = nested_start(teacher, 1, [80, 16, 48, 32])
    config = CONFIG.model_copy(update={"learning_rate": 3e-3})
    result = distill([start], stream_at(teacher, 1, 80), held_out_at(teacher, 1), config)[start.unit]
    assert result.weights["mlp.gate_proj.weight"].shape == (80, 64)
    before = distill([start], stream_at(teacher, 1, 0), held_out_at(teacher, 1), config)[start.unit]
    for item in start.items:
        width = item.specs[0].intermediate_size  # type: ignore[union-attr]
        layer = layer_with(teacher.layer(1), parts_of(item), prefix(result.weights, width or 0))
        with torch.no_grad():
            one = held_out_at(teacher, 1).at(teacher.layer(1), 0)
            assert local_loss(layer, ("ffn",), one).item() == pytest.approx(result.after[item.id], rel=1e-5)
        assert result.after[item.id] < before.after[item.id]


def test_the_widest_and_the_narrowest_train_in_every_step() -> None:
    drawn = [widths_at(step, [16, 80, 32, 48], "L001.ffn.nested") for step in range(40)]
    assert all(widths[0] == 16 and widths[-1] == 80 and len(widths) == 3 for widths in drawn)
    assert {widths[1] for widths in drawn} == {32, 48}
    assert drawn == [widths_at(step, [80, 48, 32, 16], "L001.ffn.nested") for step in range(40)]
    assert widths_at(0, [16, 80], "x") == [16, 80]


def context_of(weights: Tensor) -> Context:
    return Context({}, None, weights)


def test_the_loss_is_the_papers_over_the_tokens_that_count() -> None:
    target = torch.tensor([[[100.0, 100.0], [3.0, 4.0], [0.0, 5.0]]])
    prediction = torch.tensor([[[0.0, 0.0], [3.0, 3.0], [0.0, 5.0]]])
    context = context_of(torch.tensor([[0.0, 1.0, 1.0]]))
    assert Goal.of(target, context).loss(prediction).item() == pytest.approx(1 / 50)
    assert Goal.of(target, context).loss(torch.zeros_like(target)).item() == pytest.approx(1.0)
    assert Goal.of(target, context, "cosine").loss(3 * target).item() == pytest.approx(0.0, abs=1e-6)
    assert Goal.of(target, context, "cosine").loss(-target).item() == pytest.approx(2.0)


def test_parts_of_a_batch_add_up_to_the_whole(teacher: Teacher) -> None:
    """Two who each take rows, and sum totals and gradients, are one who takes all."""
    whole, half = batch(0), [batch(0).rows(slice(0, 1)), batch(0).rows(slice(1, 4))]
    item = items_at([0])[1]
    layer = layer_with(teacher.layer(0), parts_of(item), start_of(layers_of(teacher), item).weights)
    passes = [run_layer(teacher.layer(0), teacher.embed(part), teacher.context(part)) for part in half]
    totals = [Goal.of(one.after, one.context).total for one in passes]

    def add_up(tensors: list[Tensor]) -> None:
        tensors[0].copy_(sum(totals))

    goals = [Goal.of(one.after, one.context, "mse", add_up) for one in passes]
    parts = [goal.loss(one.middle + layer.ffn_delta(one.middle)) for goal, one in zip(goals, passes, strict=True)]
    one = run_layer(teacher.layer(0), teacher.embed(whole), teacher.context(whole))
    assert sum(parts).item() == pytest.approx(local_loss(layer, ("ffn",), one).item(), rel=1e-5)  # type: ignore[union-attr]


def test_the_layer_loss_of_an_attention_variant_sees_the_ffn(teacher: Teacher) -> None:
    one = held_out_at(teacher, 1).at(teacher.layer(1), 0)
    item = site_item(Site(1, "attention"), AttentionSpec("skip"))
    layer = layer_with(teacher.layer(1), parts_of(item), {})
    expected = Goal.of(one.after, one.context).loss(one.before + layer.ffn_delta(one.before))
    assert local_loss(layer, ("attention",), one).item() == pytest.approx(expected.item())


def test_an_empty_batch_gives_no_loss() -> None:
    target = torch.randn(1, 3, 4)
    assert Goal.of(target, context_of(torch.zeros(1, 3))).loss(torch.zeros_like(target)).item() == 0.0


def test_the_rate_warms_up_and_decays_to_nothing() -> None:
    rates = [warmup_cosine(step, 100, 10) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == 1.0
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[100] == pytest.approx(0.0)


def test_a_batch_keeps_its_parts_together() -> None:
    full = Batch(torch.arange(8).view(4, 2), torch.ones(4, 2).bool(), torch.arange(8).view(4, 2).int())
    part = full.rows(slice(1, 3))
    assert part.ids.tolist() == [[2, 3], [4, 5]]
    assert part.documents is not None
    assert part.documents.tolist() == [[2, 3], [4, 5]]
