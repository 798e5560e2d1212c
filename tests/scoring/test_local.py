"""Local errors and the anchored scores made of them."""

from __future__ import annotations

import functools

import pytest
import torch

from puzzle.blocks.layer import item_layer
from puzzle.data.batches import Batch
from puzzle.scoring.base import Base
from puzzle.scoring.exact import Scorer, finals_of
from puzzle.scoring.local import anchor_of
from puzzle.teacher import Teacher
from puzzle.types import AttentionSpec, FfnSpec, Item, Site
from puzzle.variants import layer_item, site_item
from tests.scoring.test_exact import read_weights

GQA, NARROW = AttentionSpec("gqa", num_kv_heads=1), FfnSpec("narrow", intermediate_size=48)


@pytest.fixture(scope="module")
def scorer(teacher: Teacher) -> Scorer:
    base = Base(teacher, functools.partial(read_weights, teacher))
    ids = torch.randint(3, 128, (5, 20), generator=torch.Generator().manual_seed(3))
    batches = [Batch(ids[:3]), Batch(ids[3:])]
    return Scorer(base, batches, finals_of(base, batches))


def errors(scorer: Scorer, item: Item) -> torch.Tensor:
    return scorer.local_errors([item])[item.id]


def test_nothing_is_wrong_with_what_is_there_and_everything_with_nothing(scorer: Scorer) -> None:
    for kept, gone in ((AttentionSpec("keep"), AttentionSpec("skip")), (FfnSpec("keep"), FfnSpec("skip"))):
        site = Site(2, "attention" if isinstance(kept, AttentionSpec) else "ffn")
        assert errors(scorer, site_item(site, kept)).abs().max() < 1e-10
        torch.testing.assert_close(errors(scorer, site_item(site, gone)), torch.ones(5, dtype=torch.float64))
    both = anchor_of(layer_item(2, GQA, NARROW))
    torch.testing.assert_close(errors(scorer, both), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("item", [site_item(Site(1, "ffn"), NARROW), layer_item(1, GQA, NARROW)])
def test_the_error_is_that_of_what_is_added(scorer: Scorer, teacher: Teacher, item: Item) -> None:
    layers = [teacher.layer(index) for index in range(4)]
    own = item_layer(layers[1], item, read_weights(teacher, item))
    found = []
    for batch in scorer.batches:
        context = teacher.context(batch)
        rest = {"position_embeddings": context.position}
        hidden = layers[0](teacher.embed(batch), **rest)
        expected, got = layers[1](hidden, **rest), own(hidden, **rest)
        before = hidden if len(item.sites) == 2 else hidden + layers[1].attention_delta(hidden, context.position)
        error, whole = ((x[:, 1:] ** 2).sum((1, 2)) for x in (got - expected, expected - before))
        found.append(error / whole)
    torch.testing.assert_close(errors(scorer, item).float(), torch.cat(found), rtol=1e-4, atol=1e-6)


def test_an_anchor_leaves_out_what_the_item_changes() -> None:
    anchor = anchor_of(layer_item(3, GQA, NARROW))
    assert anchor.sites == (Site(3, "attention"), Site(3, "ffn"))
    assert [spec.kind for spec in anchor.specs] == ["skip", "skip"]
    assert anchor_of(site_item(Site(3, "ffn"), NARROW)).id == "L003.ffn.skip"
