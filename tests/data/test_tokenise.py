"""Tokenising: the demo's tokens are what they were, mixtures come true, a kill costs a shard and changes nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from puzzle import artifacts
from puzzle.checkpoint import DEMO_TEACHER
from puzzle.config import DataConfig, SourceConfig, TokensConfig
from puzzle.data import tokenise
from puzzle.data.source import SPLITS, documents
from puzzle.types import ConfigError
from tests.data.factories import (
    PLAIN_TEMPLATE,
    byte_tokenizer,
    chat,
    make_tokens,
    make_unit,
    text_file,
    texts,
    write_jsonl,
)

TOKENS = TokensConfig(train=4000, score=400, select=300, report=200)


class Killed(BaseException):
    """Like a kill: nothing may catch it."""


def test_the_demo_has_the_tokens_that_its_figures_rest_on(tmp_path: Path) -> None:
    tokens = make_tokens(DataConfig(), tmp_path, AutoTokenizer.from_pretrained(DEMO_TEACHER))
    digests = {split: hashlib.sha256(packed.ids.tobytes()).hexdigest()[:16] for split, packed in tokens.splits.items()}
    assert {split: len(packed) for split, packed in tokens.splits.items()} == {
        "train": 2708157,
        "score": 74595,
        "select": 170151,
        "report": 213057,
    }
    assert digests == {
        "train": "54f122bb03fd92eb",
        "score": "4c7a9ab0c09b818d",
        "select": "99d1eb5a67c63c90",
        "report": "93d3b704b003a47d",
    }
    assert tokens.bytes_per_token["report"] == 3.1066756783395992


@pytest.fixture
def mixture(tmp_path: Path) -> DataConfig:
    """Code, prose and chats of some 40 bytes each; ids tell them apart by their letter."""
    code = text_file(tmp_path / "code.jsonl", texts("c", 800))
    prose = text_file(tmp_path / "prose.jsonl", texts("p", 800))
    talk = write_jsonl(tmp_path / "talk.jsonl", ({"messages": chat(f"q{i}", f"answer {i}")} for i in range(800)))
    return DataConfig(
        sources=(
            SourceConfig(path=str(code), weight=0.3),
            SourceConfig(path=str(prose), weight=0.5),
            SourceConfig(path=str(talk), messages="messages", weight=0.2),
        ),
        tokens=TOKENS,
        sequence_tokens=64,
    )


def test_weights_are_shares_of_the_tokens_of_every_split(mixture: DataConfig, tmp_path: Path) -> None:
    unit = make_unit(mixture, tmp_path / "run", byte_tokenizer(PLAIN_TEMPLATE))
    assert unit.payload["num_tokens"] == TOKENS.model_dump()
    for source, weight in zip(unit.payload["sources"], (0.3, 0.5, 0.2), strict=True):
        for split, total in TOKENS.model_dump().items():
            assert source["num_tokens"][split] == pytest.approx(weight * total, abs=1)
    assert [source["name"] for source in unit.payload["sources"]] == ["code.jsonl", "prose.jsonl", "talk.jsonl"]


def test_without_amounts_the_shares_hold_too(mixture: DataConfig, tmp_path: Path) -> None:
    unit = make_unit(mixture.model_copy(update={"tokens": None}), tmp_path / "run", byte_tokenizer(PLAIN_TEMPLATE))
    for split in SPLITS:
        counts = np.array([source["num_tokens"][split] for source in unit.payload["sources"]])
        assert counts / counts.sum() == pytest.approx([0.3, 0.5, 0.2], abs=2 / counts.sum())


def test_no_text_lies_in_two_splits_even_if_it_occurs_in_two_sources(tmp_path: Path) -> None:
    shared = texts("s", 300)
    sources = [
        text_file(tmp_path / "a.jsonl", texts("a", 300) + shared),
        text_file(tmp_path / "b.jsonl", shared + texts("b", 300) + shared),
    ]
    settings = DataConfig(sources=tuple(SourceConfig(path=str(path)) for path in sources))
    tokens = make_tokens(settings, tmp_path / "run")
    found: dict[str, set[bytes]] = {}
    for split, packed in tokens.splits.items():
        stops = [*packed.starts[1:].tolist(), len(packed)]
        found[split] = {packed.ids[start:stop].tobytes() for start, stop in zip(packed.starts, stops, strict=True)}
    assert sum(map(len, found.values())) == 900 == len(set.union(*found.values()))
    assert sum(len(packed.starts) for packed in tokens.splits.values()) == 1500


def test_without_weights_everything_is_taken(tmp_path: Path) -> None:
    paths = [text_file(tmp_path / f"{name}.jsonl", texts(name, count)) for name, count in (("a", 100), ("b", 300))]
    settings = DataConfig(sources=tuple(SourceConfig(path=str(path)) for path in paths))
    unit = make_unit(settings, tmp_path / "run")
    assert sum(unit.payload["num_tokens"].values()) == 400 * 41
    assert sum(unit.payload["num_documents"].values()) == 400


def test_the_answers_of_a_mixtures_chats_count_and_all_of_its_texts(mixture: DataConfig, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(PLAIN_TEMPLATE)
    tokens = make_tokens(mixture, tmp_path / "run", tokenizer)
    packed = tokens.splits["train"]
    assert packed.counted is not None
    seen = set()
    for start, stop in zip(packed.starts[:-1], packed.starts[1:], strict=True):
        text = tokenizer.decode(packed.ids[start + 1 : stop])
        counted = tokenizer.decode(packed.ids[start:stop][packed.counted[start:stop]])
        if text.startswith("[user]"):
            assert counted in ("", text.partition("[assistant]")[2])  # a chat that was cut may end before its answer
            seen.add("chat")
        else:
            assert counted == "</s>" + text
            seen.add("text")
    assert seen == {"chat", "text"}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise, "SHARD_TOKENS", 1000)
    monkeypatch.setattr(tokenise, "BATCH_CHARACTERS", 300)


def files(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run_dir / "data").iterdir()}


def test_batches_and_shards_of_another_size_change_nothing(
    mixture: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for shard_tokens, batch_characters in ((4_000_000, 1_000_000), (1000, 300), (1, 1), (700, 10_000)):
        monkeypatch.setattr(tokenise, "SHARD_TOKENS", shard_tokens)
        monkeypatch.setattr(tokenise, "BATCH_CHARACTERS", batch_characters)
        run_dir = tmp_path / f"{shard_tokens}"
        make_unit(mixture, run_dir, byte_tokenizer(PLAIN_TEMPLATE))
        found.append(files(run_dir))
    assert found[1:] == found[:1] * 3


@pytest.mark.usefixtures("small_shards")
def test_killed_at_every_disk_operation_in_turn_the_result_is_the_same(
    mixture: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = byte_tokenizer(PLAIN_TEMPLATE)
    make_unit(mixture, tmp_path / "whole", tokenizer)
    crashed: set[tuple[str, str]] = set()

    def crash_once(operation: str, path: Path) -> None:
        if (operation, str(path)) not in crashed:
            crashed.add((operation, str(path)))
            raise Killed

    monkeypatch.setattr(artifacts, "_before", crash_once)
    while True:
        try:
            make_unit(mixture, tmp_path / "killed", tokenizer)
            break
        except Killed:
            artifacts.sweep(tmp_path / "killed")
    shards = {path for _, path in crashed if "shards" in path}
    assert len(shards) > 20
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


@pytest.mark.usefixtures("small_shards")
def test_what_is_tokenised_is_not_tokenised_again(
    mixture: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[tuple[str, int]] = []

    def watched(source: SourceConfig, start: int) -> Any:
        for document in documents(source, start):
            if (source.label, start) not in starts:
                starts.append((source.label, start))
            yield document

    monkeypatch.setattr(tokenise, "documents", watched)

    def kill(operation: str, path: Path) -> None:
        if operation == "rename" and path.parts[-2:] == ("01", "00001"):
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(artifacts, "_before", kill)
        with pytest.raises(Killed):
            make_unit(mixture, tmp_path / "run", byte_tokenizer(PLAIN_TEMPLATE))
    make_unit(mixture, tmp_path / "run", byte_tokenizer(PLAIN_TEMPLATE))
    assert [label for label, _ in starts] == ["code.jsonl", "prose.jsonl", "prose.jsonl", "talk.jsonl"]
    assert starts[1][1] == 0
    assert starts[2][1] > 0


@pytest.mark.usefixtures("small_shards")
def test_shards_made_from_other_inputs_or_behind_a_gap_are_made_anew(mixture: DataConfig, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(PLAIN_TEMPLATE)
    make_unit(mixture, tmp_path / "run", tokenizer)
    first = files(tmp_path / "run")
    artifacts.remove(tmp_path / "run" / "data")
    artifacts.remove(tmp_path / "run" / "shards" / "01" / "00000")
    make_unit(mixture, tmp_path / "run", tokenizer)
    assert files(tmp_path / "run") == first
    artifacts.remove(tmp_path / "run" / "data")
    text_file(tmp_path / "prose.jsonl", texts("P", 800))
    make_unit(mixture, tmp_path / "run", tokenizer)
    make_unit(mixture, tmp_path / "fresh", tokenizer)
    assert files(tmp_path / "run") == files(tmp_path / "fresh") != first


def test_a_source_that_runs_out_says_how_far_it_went(mixture: DataConfig, tmp_path: Path) -> None:
    more = mixture.model_copy(update={"tokens": TOKENS.model_copy(update={"select": 50_000})})
    message = r"code\.jsonl ran out: [\d,]+ tokens for the split 'select', where 15,000 were asked of it; lower"
    with pytest.raises(ConfigError, match=message):
        make_unit(more, tmp_path / "run", byte_tokenizer(PLAIN_TEMPLATE))
    with pytest.raises(ConfigError, match=message):  # and again, without reading it all anew
        make_unit(more, tmp_path / "run", byte_tokenizer(PLAIN_TEMPLATE))


def test_a_split_without_documents_is_named_with_the_source_that_lacks_it(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "a.jsonl", ({"text": f"{i}", "split": "train"} for i in range(9)))
    full = text_file(tmp_path / "b.jsonl", texts("b", 300))
    with pytest.raises(ConfigError, match=r"a\.jsonl: too little text: no document falls into the split 'score'"):
        make_unit(DataConfig(text=str(train)), tmp_path / "one")
    weighted = tuple(SourceConfig(path=str(path), weight=1.0) for path in (full, train))
    with pytest.raises(ConfigError, match=r"^a\.jsonl: too little text"):
        make_unit(DataConfig(sources=weighted), tmp_path / "two")
    unweighted = tuple(source.model_copy(update={"weight": None}) for source in weighted)
    assert make_unit(DataConfig(sources=unweighted), tmp_path / "three").payload["num_tokens"]["score"] > 0


def test_blank_texts_are_passed_over(tmp_path: Path) -> None:
    path = text_file(tmp_path / "a.jsonl", ["", " \n", *texts("a", 300), ""])
    unit = make_unit(DataConfig(text=str(path)), tmp_path / "run")
    assert sum(unit.payload["num_documents"].values()) == 300


def test_what_can_be_refused_is_refused_before_anything_is_tokenised(mixture: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"talk\.jsonl: the teacher's tokenizer has no chat template"):
        make_unit(mixture, tmp_path / "run", byte_tokenizer())
    assert not (tmp_path / "run" / "shards").exists()
