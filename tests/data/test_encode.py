"""Documents as ids: separated, checked against the teacher's vocabulary, with the bytes that their tokens stand for."""

from __future__ import annotations

import numpy as np
import pytest

from puzzle.data.encode import Encoder
from puzzle.data.source import Document
from puzzle.types import ConfigError
from tests.data.factories import PLAIN_TEMPLATE, VOCAB_SIZE, byte_tokenizer, chat

EOS = 2


def test_texts_begin_with_the_end_of_text_token() -> None:
    first, second = Encoder(byte_tokenizer(), VOCAB_SIZE).encode(
        [Document("a", "train", "ab"), Document("b", "score", "é")]
    )
    assert first.ids.dtype == np.int32
    assert list(first.ids[:1]) == list(second.ids[:1]) == [EOS]
    assert (len(first.ids), first.num_bytes, first.counted) == (3, 2, None)
    assert (len(second.ids), second.num_bytes) == (3, 2)


def test_without_an_end_of_text_token_the_beginnings_is_taken_and_without_both_none() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    assert list(Encoder(tokenizer, VOCAB_SIZE).encode([Document("a", "train", "")])[0].ids) == [1]
    tokenizer.bos_token = None
    assert len(Encoder(tokenizer, VOCAB_SIZE).encode([Document("a", "train", "ab")])[0].ids) == 2


@pytest.mark.parametrize(("template", "head"), [(PLAIN_TEMPLATE, [EOS]), ("<s>" + PLAIN_TEMPLATE, [1])])
def test_conversations_are_separated_once_and_count_by_their_answers(template: str, head: list[int]) -> None:
    tokenizer = byte_tokenizer(template)
    (found,) = Encoder(tokenizer, VOCAB_SIZE).encode([Document("a", "train", chat("Why?", "So é"))])
    assert list(found.ids[:1]) == head
    assert tokenizer.decode(found.ids[1:]) == "[user]Why?</s>[assistant]So é</s>"
    assert found.counted is not None
    assert tokenizer.decode(found.ids[found.counted]) == "So é</s>"
    assert found.num_bytes == len("So é".encode())


def test_an_id_that_the_teacher_does_not_know_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"gives the id \d+, but the teacher knows ids below 60 only"):
        Encoder(byte_tokenizer(), 60).encode([Document("a", "train", "abc")])
