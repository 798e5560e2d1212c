"""Documents to the teacher's ids: texts as they are, conversations by the chat template. Pure.

Every document begins with the tokenizer's end-of-text token, which separates it from the one before; a conversation
does not if its template begins with a token of that kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from puzzle.data.chat import conversation_tokens
from puzzle.data.source import Conversation, Document
from puzzle.types import ConfigError


@dataclass(frozen=True)
class Encoded:
    """A document's ids (N,) int32, which of them count (None: all), and how many bytes of text those stand for."""

    ids: np.ndarray
    counted: np.ndarray | None
    num_bytes: int


@dataclass(frozen=True)
class Encoder:
    """The teacher's (Hugging Face) tokenizer, and how many ids the teacher knows."""

    tokenizer: Any
    vocab_size: int

    @property
    def separator(self) -> int | None:
        eos: int | None = self.tokenizer.eos_token_id
        bos: int | None = self.tokenizer.bos_token_id
        return eos if eos is not None else bos

    def encode(self, batch: Sequence[Document]) -> list[Encoded]:
        """The documents' tokens. ConfigError for an id that the teacher does not know."""
        texts = [document.content for document in batch if isinstance(document.content, str)]
        settings = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        rows = iter(self.tokenizer(texts, **settings)["input_ids"] if texts else [])
        head = [] if self.separator is None else [self.separator]
        encoded = []
        for document in batch:
            if isinstance(document.content, str):
                ids = np.array([*head, *next(rows)], np.int32)
                encoded.append(Encoded(ids, None, len(document.content.encode())))
            else:
                encoded.append(self._conversation(document.content, document.where))
            self._check(encoded[-1].ids)
        return encoded

    def _conversation(self, conversation: Conversation, where: str) -> Encoded:
        ids, counted = conversation_tokens(self.tokenizer, conversation, where)
        num_bytes = len(self.tokenizer.decode(ids[counted].tolist(), skip_special_tokens=True).encode())
        if self.separator is not None and ids[0] not in (self.separator, self.tokenizer.bos_token_id):
            ids, counted = np.insert(ids, 0, self.separator), np.insert(counted, 0, False)
        return Encoded(ids, counted, num_bytes)

    def _check(self, ids: np.ndarray) -> None:
        if ids.max(initial=0) >= self.vocab_size:
            raise ConfigError(
                f"the tokenizer gives the id {ids.max()}, but the teacher knows ids below {self.vocab_size} only; "
                "use the tokenizer that the teacher was trained with"
            )
