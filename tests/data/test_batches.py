"""Batches: a pure function of seed and step, never a held-out window, with what belongs to each token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from puzzle.config import DataConfig
from puzzle.data.batches import Batch, TokenData
from puzzle.data.packing import Packed
from puzzle.data.source import SPLITS
from puzzle.types import ConfigError
from tests.data.factories import make_unit, text_file, texts


def tokens_of(length: int = 1000, sequence_tokens: int = 16, within_documents: bool = False) -> TokenData:
    """Ids that are different everywhere, in documents of 7 tokens; every third token does not count."""
    return TokenData(
        {
            split: Packed(
                (np.arange(length) + 10_000 * index).astype(np.int32),
                np.arange(0, length, 7),
                np.arange(length) % 3 > 0,
            )
            for index, split in enumerate(SPLITS)
        },
        dict.fromkeys(SPLITS, 3.0),
        sequence_tokens,
        within_documents,
    )


def test_windows_of_a_split_do_not_overlap_nor_leave_it() -> None:
    tokens = tokens_of()
    for index, split in enumerate(SPLITS):
        drawn = tokens.sequences(split, 40, seed=3).ids
        assert drawn.shape == (40, 16)
        assert drawn.dtype == torch.int64
        assert len(drawn.unique()) == drawn.numel()
        assert drawn.min() >= 10_000 * index
        assert drawn.max() < 10_000 * index + 1000


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    tokens = tokens_of()
    first = [tokens.batch(0, step, 4).ids for step in range(30)]
    again = [tokens_of().batch(0, step, 4).ids for step in reversed(range(30))][::-1]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert not torch.equal(tokens.batch(1, 0, 4).ids, first[0])
    assert not torch.equal(tokens.batch(0, 1, 4).ids, first[0])


def test_batches_are_those_that_earlier_versions_drew() -> None:
    tokens = tokens_of(length=19 * 16)
    assert tokens.batch(3, 5, 2).ids[:, 0].tolist() == expected_starts(3, 5, 2, per_epoch=17, sequence_tokens=16)


def expected_starts(seed: int, step: int, batch_size: int, per_epoch: int, sequence_tokens: int) -> list[int]:
    starts = []
    for index in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(index, per_epoch)
        rng = np.random.default_rng([seed, len(SPLITS), epoch])
        offset = rng.integers(sequence_tokens)
        starts.append(int(offset + rng.permutation(per_epoch)[place] * sequence_tokens))
    return starts


def test_an_epoch_sees_every_window_once() -> None:
    tokens = tokens_of(length=16 * 10)  # one window is held out, one is left for the offset
    epoch = torch.cat([tokens.batch(5, step, 2).ids for step in range(4)])
    assert len(epoch.unique()) == 8 * 16


@pytest.mark.parametrize(("length", "sequence_tokens"), [(200, 16), (1000, 16), (5000, 7), (3001, 100), (64 * 3, 64)])
def test_no_batch_and_no_sequence_ever_holds_a_token_that_is_held_out(length: int, sequence_tokens: int) -> None:
    tokens = tokens_of(length, sequence_tokens)
    held_out = set(tokens.held_out(tokens.num_held_out).ids.flatten().tolist())
    assert len(held_out) == tokens.num_held_out * sequence_tokens > 0
    drawn = set(tokens.sequences("train", tokens.num_sequences("train"), 0).ids.flatten().tolist())
    for seed in range(3):
        for step in range(60):
            drawn.update(tokens.batch(seed, step, 4).ids.flatten().tolist())
    assert not drawn & held_out
    assert max(drawn) < min(held_out)


def test_fewer_sequences_than_asked_for_is_an_error() -> None:
    with pytest.raises(ConfigError, match="'score' holds 62 windows of 16 tokens, 63 were asked for"):
        tokens_of().sequences("score", 63, 0)
    with pytest.raises(ConfigError, match="'train' holds 58 windows of 16 tokens, 59 were asked for"):
        tokens_of().sequences("train", 59, 0)
    with pytest.raises(ConfigError, match="'train' holds 4 held-out windows of 16 tokens, 5 were asked for"):
        tokens_of().held_out(5)
    with pytest.raises(ConfigError, match="too few"):
        tokens_of(length=20).batch(0, 0, 1)


def test_every_token_brings_what_belongs_to_it() -> None:
    tokens = tokens_of(within_documents=True)
    for batch in (tokens.batch(0, 3, 4), tokens.sequences("train", 5, 0), tokens.held_out(2)):
        assert batch.counted is not None
        assert batch.counted.dtype == torch.bool
        assert torch.equal(batch.counted, batch.ids % 3 > 0)
        assert batch.documents is not None
        assert batch.documents.dtype == torch.int32
        assert torch.equal(batch.documents, (batch.ids // 7 - (batch.ids // 7)[:, :1]).int())
    plain = TokenData({"score": Packed(np.arange(100), np.array([0]))}, {"score": 3.0}, 16).sequences("score", 2, 0)
    assert plain.counted is None
    assert plain.documents is None


def test_a_batch_splits_and_moves_with_all_its_parts() -> None:
    for batch in (tokens_of(within_documents=True).batch(0, 0, 5), Batch(torch.arange(10).view(5, 2))):
        pieces = batch.split(2)
        assert [len(piece) for piece in pieces] == [2, 2, 1]
        for name in ("ids", "counted", "documents"):
            whole, parts = getattr(batch, name), [getattr(piece, name) for piece in pieces]
            assert (torch.equal(torch.cat(parts), whole)) if whole is not None else parts == [None] * 3
        moved = batch.to("meta")
        assert moved.ids.device.type == "meta"
        assert (moved.counted is None) == (batch.counted is None)
        assert moved.documents is None or moved.documents.device.type == "meta"


def test_what_is_read_is_what_was_written_cut_to_any_length(tmp_path: Path) -> None:
    from puzzle.data.batches import read_tokens

    path = text_file(tmp_path / "a.jsonl", texts("a", 400))
    unit = make_unit(DataConfig(text=str(path)), tmp_path / "run")
    for sequence_tokens in (10, 64):
        settings = DataConfig(text=str(path), sequence_tokens=sequence_tokens, within_documents=True)
        tokens = read_tokens(unit, settings)
        assert tokens.num_sequences("score") == unit.payload["num_tokens"]["score"] // sequence_tokens
        batch = tokens.sequences("score", 2, 0)
        assert batch.ids.shape == (2, sequence_tokens)
        assert batch.documents is not None
        assert (batch.documents[:, -1] >= sequence_tokens // 41).all()
        # a document begins where its number does, with the separator
        begins = batch.documents[:, 1:] > batch.documents[:, :-1]
        assert torch.equal(batch.ids[:, 1:] == 2, begins)
