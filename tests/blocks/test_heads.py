"""Grouped and merged heads: where nothing need be lost, the variant's attention gives what the teacher's does."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from puzzle.blocks import heads
from puzzle.blocks.heads import Heads, gains_of, grouping, mean_pooled, merged_heads, pair_costs, regrouped
from puzzle.blocks.keys import Distances, ScoreMoments
from puzzle.blocks.layer import layer_with, part_state
from puzzle.data.batches import Batch
from puzzle.modeling.modeling_puzzle import PuzzleDecoderLayer
from puzzle.teacher import LayerPass, attention_delta, freeze
from puzzle.types import AttentionSpec
from tests.blocks.conftest import layer_passes
from tests.tiny_families import make_kept, make_stock, make_tokens

BIASED, QK_NORMED, PLAIN = "qwen2", "gemma3_text", "llama"
KV_HEADS, QUERY_HEADS = 4, 8


def teacher(family: str) -> tuple[PuzzleDecoderLayer, LayerPass]:
    """A layer of a tiny model with 4 KV heads of 2 queries each, and a batch that passes through it."""
    stock = make_stock(family, num_attention_heads=QUERY_HEADS, num_key_value_heads=KV_HEADS)
    model = freeze(make_kept(stock))
    with torch.no_grad():
        return model.model.layers[1], layer_passes(model, Batch(make_tokens(8, 24)), 2)[1]


def heads_of(layer: PuzzleDecoderLayer) -> Heads:
    return Heads.of(part_state(layer, "attention"), layer.self_attn.head_dim, torch.device("cpu"))


def covariance(layer: PuzzleDecoderLayer, one: LayerPass) -> Tensor:
    normed = layer.input_layernorm(one.before).flatten(0, 1).double()
    tokens = torch.cat([normed, torch.ones(len(normed), 1)], 1)
    return tokens.T @ tokens


def distances(layer: PuzzleDecoderLayer, one: LayerPass) -> Distances:
    cos, sin = (table[0, 1].chunk(2)[0] for table in one.context.position[layer.rope])
    return Distances.up_to(one.before.shape[1], torch.atan2(sin, cos))


def difference(layer: PuzzleDecoderLayer, one: LayerPass, changed: Heads) -> float:
    """Squared error of the variant with these heads, relative to what the teacher's attention adds."""
    state = changed.state(part_state(layer, "attention"))
    spec = AttentionSpec("gqa", num_kv_heads=len(changed.key), window_tokens=layer.span[0])
    variant = layer_with(layer, {"attention": spec}, state)
    delta = one.middle - one.before
    error = attention_delta(variant, one.before, one.context) - delta
    return (error.square().sum() / delta.square().sum()).item()


def with_heads(layer: PuzzleDecoderLayer, one: LayerPass, changed: Heads) -> tuple[PuzzleDecoderLayer, LayerPass]:
    """Another teacher, with these heads, and its pass over the same batch."""
    state = changed.state(part_state(layer, "attention"))
    other = layer_with(layer, {"attention": AttentionSpec("keep", window_tokens=layer.span[0])}, state)
    middle = one.before + attention_delta(other, one.before, one.context)
    return other, LayerPass(one.before, middle, middle, one.context)


@pytest.mark.parametrize("family", [PLAIN, BIASED, QK_NORMED])
def test_weights_come_back_as_they_were(family: str) -> None:
    layer, _ = teacher(family)
    state = part_state(layer, "attention")
    back = heads_of(layer).state(state)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("family", [PLAIN, BIASED, QK_NORMED])
def test_another_order_of_the_heads_is_the_same_attention(family: str) -> None:
    layer, one = teacher(family)
    assert difference(layer, one, regrouped(heads_of(layer), torch.tensor([[2, 0], [3, 1]]))) < 1e-10


def test_mean_pooling_is_the_papers() -> None:
    own = heads_of(teacher(BIASED)[0])
    pooled = mean_pooled(own, 2)
    assert torch.equal(pooled.key[1], (own.key[2] + own.key[3]) / 2)
    assert torch.equal(pooled.value[0], (own.value[0] + own.value[1]) / 2)
    assert pooled.query is own.query and pooled.output is own.output


def mergeable(own: Heads, pairs: list[tuple[int, int]]) -> Heads:
    """Heads that can be merged in ``pairs`` without loss: keys differ by a complex factor per plane (one of them by
    its sign), values by any invertible matrix."""
    generator = torch.Generator().manual_seed(0)
    key, value = own.key.clone(), own.value.clone()
    size = key.shape[1]
    for place, (first, second) in enumerate(pairs):
        factor = torch.polar(
            torch.rand(size // 2, generator=generator) + 0.5, torch.rand(size // 2, generator=generator) * 6
        )
        factor = -torch.ones_like(factor) if place == 0 else factor
        planes = torch.complex(*key[first].chunk(2)) * factor[:, None]
        key[second] = torch.cat([planes.real, planes.imag])
        mixing = torch.randn(size, size, generator=generator, dtype=torch.float64) + 3 * torch.eye(size)
        value[second] = mixing @ value[first]
    return Heads(own.query, key, value, own.output)


@pytest.mark.parametrize("family", [PLAIN, BIASED])
def test_heads_alike_but_for_what_can_be_moved_are_found_and_merged_exactly(family: str) -> None:
    layer, one = teacher(family)
    layer, one = with_heads(layer, one, mergeable(heads_of(layer), [(0, 2), (1, 3)]))
    own, seen = heads_of(layer), covariance(layer, one)
    merged = merged_heads(own, seen, distances(layer, one), 2)
    assert difference(layer, one, merged) < 1e-8
    assert difference(layer, one, mean_pooled(regrouped(own, torch.tensor([[0, 2], [1, 3]])), 2)) > 0.1
    assert torch.allclose(merged.key.square().sum((1, 2)), own.key[:2].square().sum((1, 2)), rtol=0.5)


def test_under_a_qk_norm_the_scale_of_a_key_does_not_matter() -> None:
    layer, one = teacher(QK_NORMED)
    own = heads_of(layer)
    key, value = own.key.clone(), own.value.clone()
    key[2], key[3], value[2], value[3] = 5 * key[0], 0.2 * key[1], value[0], value[1]
    layer, one = with_heads(layer, one, Heads(own.query, key, value, own.output))
    seen = covariance(layer, one)
    merged = merged_heads(heads_of(layer), seen, distances(layer, one), 2, gains_of(layer.self_attn))
    assert difference(layer, one, merged) < 1e-8


def test_merging_is_better_than_averaging_for_any_heads() -> None:
    for family in (PLAIN, BIASED, QK_NORMED):
        layer, one = teacher(family)
        own, seen = heads_of(layer), covariance(layer, one)
        for count in (1, 2):
            merged = merged_heads(own, seen, distances(layer, one), count, gains_of(layer.self_attn))
            assert difference(layer, one, merged) < difference(layer, one, mean_pooled(own, count))


def test_values_span_the_best_subspace() -> None:
    """Eckart and Young on the stacked maps from the input to the output, under the metric of the input."""
    layer, one = teacher(BIASED)
    own, seen = heads_of(layer), covariance(layer, one)
    merged = merged_heads(own, seen, distances(layer, one), 1)
    order = grouping(torch.zeros(KV_HEADS, KV_HEADS), 1)
    spread = torch.linalg.cholesky(seen + 1e-9 * seen.diagonal().mean() * torch.eye(len(seen)))
    per_query = regrouped(own, order).value.repeat_interleave(2, 0)
    wanted = (own.output @ per_query).flatten(0, 1) @ spread  # (H D, D+1)
    found = (merged.output @ merged.value).flatten(0, 1) @ spread
    lost = torch.linalg.svdvals(wanted)[own.value.shape[1] :].square().sum()
    assert (found - wanted).square().sum().item() == pytest.approx(lost.item(), rel=1e-5)


def test_pairs_cost_nothing_where_nothing_is_lost() -> None:
    layer, one = teacher(PLAIN)
    layer, one = with_heads(layer, one, mergeable(heads_of(layer), [(0, 2), (1, 3)]))
    own, seen = heads_of(layer), covariance(layer, one)
    scores, values = ScoreMoments.of(own.query, own.key, seen), heads.ValueMoments.of(own, seen)
    costs = pair_costs(scores, values, distances(layer, one))
    assert torch.equal(costs, costs.T)
    assert costs[0, 2] < 1e-5 and costs[1, 3] < 1e-5
    assert costs[0, 1] > 0.1 and costs[2, 3] > 0.1
    assert grouping(costs, 2).tolist() == [[0, 2], [1, 3]]


def test_groupings_are_near_the_best() -> None:
    def total(costs: Tensor, groups: list[list[int]]) -> float:
        return sum(costs[a, b].item() for group in groups for a, b in combinations(group, 2))

    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(10):
        costs = torch.rand(8, 8, generator=generator)
        costs = costs + costs.T
        found = grouping(costs, 2).tolist()
        assert sorted(found[0] + found[1]) == list(range(8)) and len(found[0]) == 4
        best = min(
            total(costs, [[0, *rest], [one for one in range(1, 8) if one not in rest]])
            for rest in combinations(range(1, 8), 3)
        )
        ratios.append(total(costs, found) / best)
    assert min(ratios) > 1 - 1e-6 and max(ratios) < 1.1 and sorted(ratios)[5] < 1 + 1e-6
