"""Text to tokens: the four splits are disjoint, batches are a pure function, bad text is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from puzzle import data
from puzzle.checkpoint import DEMO_TEACHER
from puzzle.data_source import SPLITS, documents, text_fingerprint, text_path
from puzzle.types import ConfigError, CorruptFileError


def tokens_of(length: int = 1000, sequence_tokens: int = 16) -> data.TokenData:
    return data.TokenData(
        {split: np.arange(length) + 10_000 * index for index, split in enumerate(SPLITS)},
        dict.fromkeys(SPLITS, 3.0),
        sequence_tokens,
    )


def test_the_bundled_text_keeps_its_four_splits_apart() -> None:
    by_split: dict[str, set[str]] = {split: set() for split in SPLITS}
    for document in documents(text_path("demo")):
        by_split[document.split].add(document.name)
    assert all(by_split.values())
    names = [name for names in by_split.values() for name in names]
    assert len(names) == len(set(names))


def test_the_bundled_files_keep_their_limits() -> None:
    assert text_path("demo").stat().st_size <= 3_000_000
    assert (DEMO_TEACHER / "model.safetensors").stat().st_size <= 12_000_000
    assert 2048 <= len(AutoTokenizer.from_pretrained(DEMO_TEACHER)) <= 4096


def test_windows_of_a_split_do_not_overlap_nor_leave_it() -> None:
    tokens = tokens_of()
    for index, split in enumerate(SPLITS):
        drawn = tokens.sequences(split, 40, seed=3)
        assert drawn.shape == (40, 16)
        assert len(drawn.unique()) == drawn.numel()
        assert drawn.min() >= 10_000 * index
        assert drawn.max() < 10_000 * index + 1000


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    tokens = tokens_of()
    first = [tokens.batch(0, step, 4) for step in range(30)]
    again = [tokens.batch(0, step, 4) for step in reversed(range(30))][::-1]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert not torch.equal(tokens.batch(1, 0, 4), first[0])
    assert not torch.equal(tokens.batch(0, 1, 4), first[0])


def test_an_epoch_sees_every_window_once() -> None:
    tokens = tokens_of(length=16 * 9)
    epoch = torch.cat([tokens.batch(5, step, 2) for step in range(4)])
    assert len(epoch.unique()) == 8 * 16


def test_fewer_sequences_than_asked_for_is_an_error() -> None:
    with pytest.raises(ConfigError, match="'score' holds 62 windows of 16 tokens, 63 were asked for"):
        tokens_of().sequences("score", 63, 0)
    with pytest.raises(ConfigError, match="too few"):
        tokens_of(length=20).batch(0, 0, 1)


def test_text_comes_from_files_folders_and_archives(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 40_000)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as lines:
        lines.write(json.dumps({"path": "one", "split": "report", "text": "hello"}) + "\n")
    found = list(documents(tmp_path))
    assert [len(document.text) for document in found] == [16384, 16384, 40_000 - 2 * 16384, 5]
    assert found[-1].split == "report"
    assert {document.name: document.split for document in documents(tmp_path)} == {d.name: d.split for d in found}


def test_splits_by_name_have_their_shares(tmp_path: Path) -> None:
    (tmp_path / "many.jsonl").write_text("".join(f'{{"path": "doc{i}", "text": "x"}}\n' for i in range(4000)))
    splits = [document.split for document in documents(tmp_path / "many.jsonl")]
    for split in ("score", "select", "report"):
        assert 0.03 < splits.count(split) / len(splits) < 0.07


def test_bad_records_are_named_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "x", "split": "dev"}\n')
    with pytest.raises(ConfigError, match=r"bad\.jsonl:2: unknown split 'dev'"):
        list(documents(path))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 100)[:-10])
    with pytest.raises(CorruptFileError, match=r"cut\.jsonl\.gz: unreadable"):
        list(documents(tmp_path / "cut.jsonl.gz"))
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(CorruptFileError, match=r"latin\.txt: unreadable"):
        list(documents(tmp_path / "latin.txt"))


def test_a_changed_text_has_another_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    before = text_fingerprint(tmp_path)
    (tmp_path / "a.txt").write_text("two")
    assert text_fingerprint(tmp_path) != before
