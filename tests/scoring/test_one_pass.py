"""One-pass scores against exact ones of small changes, and their gradients against autograd's through whole layers."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from puzzle.data.batches import Batch
from puzzle.scoring.context import ScoringContext
from puzzle.scoring.exact import Change, Scorer, finals_of
from puzzle.scoring.one_pass import _Backward, one_pass_scores
from puzzle.teacher import Teacher
from puzzle.types import AttentionSpec, FfnSpec, Item, Site
from puzzle.variants import layer_item, site_item
from tests.scoring.test_exact import read_weights

WIDE, WHOLE = FfnSpec("narrow", intermediate_size=96), AttentionSpec("gqa", num_kv_heads=4)
SMALL = [site_item(Site(1, "attention"), WHOLE), site_item(Site(2, "ffn"), WIDE), layer_item(1, WHOLE, WIDE)]
TOGETHER = [[SMALL[0], SMALL[2]], [SMALL[1]]]


def nearly(teacher: Teacher, item: Item, off: float = 0.01) -> dict[str, torch.Tensor]:
    """The teacher's own weights, a little off."""
    generator = torch.Generator().manual_seed(len(item.id))
    weights = read_weights(teacher, item)
    return {name: t + off * t.std() * torch.randn(t.shape, generator=generator) for name, t in weights.items()}


@pytest.fixture(scope="module")
def context(teacher: Teacher) -> ScoringContext:
    return ScoringContext(teacher, functools.partial(nearly, teacher))


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    """Of the second one only some tokens count."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 128, (rows, 24), generator=generator) for rows in (4, 4)]
    return [Batch(ids[0]), Batch(ids[1], torch.rand(4, 24, generator=generator) < 0.5)]


def estimates(context: ScoringContext, batches: list[Batch], draws: int, seed: int = 0) -> dict[str, torch.Tensor]:
    return one_pass_scores(context, TOGETHER, batches, draws, seed)


def test_small_changes_cost_what_they_cost(context: ScoringContext, batches: list[Batch]) -> None:
    found = estimates(context, batches, 100)
    scorer = Scorer(context, batches, finals_of(context, batches))
    for item in sorted(SMALL, key=lambda item: item.sites[0].layer):
        ((_, exact),) = scorer.scores([Change(item.id, (item,))])
        assert found[item.id].shape == (8,)
        # 800 draws: 5 % off, three times that
        assert found[item.id].mean().item() == pytest.approx(exact["kl"].mean().item(), rel=0.15), item.id
        halves = [(found[item.id][part].mean() / exact["kl"][part].mean()).item() for part in (slice(4), slice(4, 8))]
        assert halves == pytest.approx([1.0, 1.0], rel=0.25)  # whichever tokens count


def test_what_is_there_costs_nothing(teacher: Teacher, batches: list[Batch]) -> None:
    context = ScoringContext(teacher, lambda item: {})
    keep = site_item(Site(2, "ffn"), FfnSpec("keep"))
    assert one_pass_scores(context, [[keep]], batches, 2, 0)[keep.id].abs().max() < 1e-12


def test_gradients_are_those_of_the_whole_layer(teacher: Teacher, batches: list[Batch]) -> None:
    layer, beside = teacher.layer(2), teacher.context(batches[0])
    hidden = teacher.embed(batches[0]).detach().requires_grad_()
    goal = torch.randn(3, *hidden.shape, generator=torch.Generator().manual_seed(2))
    one = _Backward(teacher, layer, hidden.detach(), beside, goal)
    for draw in range(3):
        out = layer(hidden, position_embeddings=beside.position)
        (expected,) = torch.autograd.grad((out * goal[draw]).sum(), hidden)
        torch.testing.assert_close(one.at_input[draw], expected, rtol=1e-3, atol=1e-4)


def test_what_a_change_is_multiplied_with(teacher: Teacher, batches: list[Batch]) -> None:
    """To first order, the inner product is the change of what the gradient is of."""
    layer, beside = teacher.layer(2), teacher.context(batches[0])
    hidden = teacher.embed(batches[0]).detach()
    goal = torch.randn(1, *hidden.shape, generator=torch.Generator().manual_seed(2))
    one = _Backward(teacher, layer, hidden, beside, goal)
    context = ScoringContext(teacher, functools.partial(nearly, teacher, off=1e-4))
    for item in (site_item(Site(2, "attention"), WHOLE), site_item(Site(2, "ffn"), WIDE), layer_item(2, WHOLE, WIDE)):
        own = context.layer(2, [item])
        with torch.no_grad():
            after = [each(hidden, position_embeddings=beside.position) for each in (own, layer)]
        change = ((after[0] - after[1]) * goal[0]).sum((1, 2))
        found = one.inner_products(own, {site.part for site in item.sites})[0]
        torch.testing.assert_close(found, change, rtol=0.02, atol=1e-3)


def test_labels_depend_on_the_batch_alone(context: ScoringContext, batches: list[Batch]) -> None:
    together = estimates(context, batches, 2)
    apart = [one_pass_scores(context, TOGETHER, [batch], 2, 0, first) for first, batch in enumerate(batches)]
    for item in SMALL:
        assert torch.equal(torch.cat([part[item.id] for part in apart]), together[item.id])
    other = estimates(context, batches, 2, seed=1)
    assert not torch.equal(other[SMALL[0].id], together[SMALL[0].id])


def test_which_variants_are_held_together_changes_no_bit(context: ScoringContext, batches: list[Batch]) -> None:
    more = [site_item(Site(1, "ffn"), WIDE), site_item(Site(3, "ffn"), WIDE), *SMALL]
    layers = [[item for item in more if item.sites[0].layer == layer] for layer in (1, 2, 3)]
    together = one_pass_scores(context, layers, batches, 2, 0)
    apart = one_pass_scores(context, [[item] for item in reversed(more)], batches, 2, 0)
    assert apart.keys() == together.keys() == {item.id for item in more}
    assert all(torch.equal(apart[name], kl) for name, kl in together.items())


@pytest.mark.gpu
def test_a_gpu_comes_to_the_same(
    teacher: Teacher, teacher_folder: Path, context: ScoringContext, batches: list[Batch]
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    device = torch.device("cuda")
    there = ScoringContext(Teacher(teacher_folder, device, torch.float32), context.read_weights)
    moved = [batch.to(device) for batch in batches]
    scorers = [Scorer(context, batches, finals_of(context, batches)), Scorer(there, moved, finals_of(there, moved))]
    for item in sorted(SMALL, key=lambda item: item.sites[0].layer):
        found = [dict(scorer.scores([Change(item.id, (item,))]))[Change(item.id, (item,))] for scorer in scorers]
        torch.testing.assert_close(found[0]["kl"], found[1]["kl"], rtol=1e-2, atol=1e-5)
    for name, kl in estimates(there, moved, 100).items():
        assert kl.mean().item() == pytest.approx(estimates(context, batches, 100)[name].mean().item(), rel=0.3)
