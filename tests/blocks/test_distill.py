"""Block-wise distillation: it lowers the loss, to the loss it says, and nobody's result depends on a neighbour."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from puzzle.blocks.distill import distill, local_loss, normalised_mse
from puzzle.blocks.initialise import paper_start
from puzzle.blocks.layer import variant_layer
from puzzle.config import DistillConfig
from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM
from puzzle.schedule import warmup_cosine
from puzzle.teacher import Compute, freeze, layers_of, run_layers
from puzzle.types import AttentionSpec, FfnSpec, Item, Site, Spec
from puzzle.variants import site_item

FP32 = Compute(torch.device("cpu"), bf16=False)
SPECS: dict[str, list[Spec]] = {
    "attention": [AttentionSpec("gqa", num_kv_heads=2), AttentionSpec("linear")],
    "ffn": [FfnSpec("narrow", intermediate_size=48), FfnSpec("linear")],
}


@pytest.fixture(scope="module")
def teacher(tiny_llama: LlamaForCausalLM) -> PuzzleForCausalLM:
    model = PuzzleForCausalLM(PuzzleConfig.from_family(tiny_llama.config))
    model.load_state_dict(tiny_llama.state_dict())
    return freeze(model)


def batches(step: int) -> Tensor:
    return torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(step))


def starts_of(teacher: PuzzleForCausalLM, layers: list[int]) -> dict[Item, dict[str, Tensor]]:
    channels = torch.arange(96.0)
    return {
        site_item(Site(index, part), spec): paper_start(layers_of(teacher)[index], part, spec, channels)  # type: ignore[arg-type]
        for index in layers
        for part, specs in SPECS.items()
        for spec in specs
    }


@pytest.mark.parametrize("loss_at", ["layer", "site"])
def test_every_variant_gets_better_and_the_teacher_stays(teacher: PuzzleForCausalLM, loss_at: str) -> None:
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    config = DistillConfig(tokens=64 * 60, batch_size=4, learning_rate=3e-3, loss_at=loss_at)  # type: ignore[arg-type]
    # on what it sees: a random teacher has little that would generalise from so few tokens
    found = distill(teacher, starts_of(teacher, [1, 3]), lambda step: batches(0), [batches(0)], config, FP32)
    assert len(found) == 8
    for item, result in found.items():
        assert result.loss_after < 0.9 * result.loss_before, item.id
        assert result.tokens == 64 * 60
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_the_reported_loss_is_that_of_the_returned_weights(teacher: PuzzleForCausalLM) -> None:
    config = DistillConfig(tokens=64 * 5, batch_size=4)
    held_out = batches(-1)
    for item, result in distill(teacher, starts_of(teacher, [2]), batches, [held_out], config, FP32).items():
        part, spec = item.sites[0].part, item.specs[0]
        layer = variant_layer(layers_of(teacher)[2], part, spec, result.weights)
        with torch.no_grad():
            loss = local_loss(layer, part, run_layers(teacher, held_out, 3)[2], "layer")
        assert loss.item() == pytest.approx(result.loss_after, rel=1e-5)


def test_a_result_does_not_depend_on_which_others_train_beside_it(teacher: PuzzleForCausalLM) -> None:
    config = DistillConfig(tokens=64 * 4, batch_size=4)
    together = distill(teacher, starts_of(teacher, [0, 3]), batches, [batches(-1)], config, FP32)
    item, start = list(starts_of(teacher, [0, 3]).items())[-3]
    alone = distill(teacher, {item: start}, batches, [batches(-1)], config, FP32)[item]
    assert all(torch.equal(alone.weights[name], tensor) for name, tensor in together[item].weights.items())
    assert alone.loss_after == together[item].loss_after


def test_no_tokens_leave_the_start_as_it_is(teacher: PuzzleForCausalLM) -> None:
    starts = starts_of(teacher, [0])
    found = distill(teacher, starts, batches, [batches(-1)], DistillConfig(tokens=0), FP32)
    for item, weights in starts.items():
        assert all(torch.equal(found[item].weights[name], tensor) for name, tensor in weights.items())
        assert found[item].loss_before == found[item].loss_after


def test_the_loss_is_the_papers_without_the_first_position() -> None:
    target = torch.tensor([[[100.0, 100.0], [3.0, 4.0], [0.0, 5.0]]])
    prediction = torch.tensor([[[0.0, 0.0], [3.0, 3.0], [0.0, 5.0]]])
    assert normalised_mse(prediction, target).item() == pytest.approx(1 / 50)
    assert normalised_mse(torch.zeros_like(target), target).item() == pytest.approx(1.0)


def test_the_layer_loss_of_an_attention_variant_sees_the_ffn(teacher: PuzzleForCausalLM) -> None:
    one = run_layers(teacher, batches(0), 2)[1]
    layer = variant_layer(layers_of(teacher)[1], "attention", AttentionSpec("skip"), {})
    expected = normalised_mse(one.before + layer.ffn_delta(one.before), one.after)
    assert local_loss(layer, "attention", one, "layer").item() == pytest.approx(expected.item())


def test_the_rate_warms_up_and_decays_to_nothing() -> None:
    rates = [warmup_cosine(step, 100, 10) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == 1.0
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[100] == pytest.approx(0.0)
