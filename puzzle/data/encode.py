"""Documents to the teacher's ids: texts as they are, conversations by the chat template. Pure.

Every document begins with the tokenizer's end-of-text token, which separates it from the one before; a conversation
does not if its template begins with a token of that kind.

Of a conversation those tokens count that the assistant wrote. A template that marks its part itself
(``{% generation %}``) is believed. For any other, the conversation is rendered up to each assistant's turn without and
with that turn, and the difference is the assistant's: from after the generation prompt to the end of the turn,
end-of-turn token included. That holds only if what is rendered stays as it is when turns are added; templates that
rewrite earlier turns are refused. Either way a token that lies partly in the assistant's turn counts.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from puzzle.data.source import Conversation, Document
from puzzle.types import ConfigError, CorruptFileError


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


_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def check_template(tokenizer: Any, label: str) -> None:
    """ConfigError if the tokenizer has no chat template for the conversations in ``label``."""
    if not tokenizer.chat_template:
        raise ConfigError(f"{label}: the teacher's tokenizer has no chat template; give a column of text, not messages")


def render_prompt(tokenizer: Any, turns: Conversation, where: str) -> list[int]:
    """The ids of a conversation up to where the assistant is to answer. CorruptFileError if the template refuses it."""
    text = str(_rendered(tokenizer, where, turns, tokenize=False, add_generation_prompt=True))
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _rendered(tokenizer: Any, where: str, turns: Conversation, **settings: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(turns, **settings)
    except Exception as error:  # templates are programs: they raise whatever they like
        reason = " ".join(str(error).split())
        raise CorruptFileError(f"{where}: refused by the chat template ({reason})") from None


def conversation_tokens(tokenizer: Any, conversation: Conversation, where: str) -> tuple[np.ndarray, np.ndarray]:
    """The ids (N,) int32, and which of them the assistant wrote (N,) bool.

    ConfigError for a template that does not let one tell, CorruptFileError for a conversation that the template refuses
    or in which the assistant says nothing.
    """
    render = functools.partial(_rendered, tokenizer, where)
    if _GENERATION.search(tokenizer.get_chat_template()):
        found = render(conversation, return_dict=True, return_assistant_tokens_mask=True)
        counted = np.array(found["assistant_masks"], bool)
    else:
        found, counted = _by_difference(tokenizer, render, conversation, where)
    if not counted.any():
        roles = ", ".join(dict.fromkeys(turn["role"] for turn in conversation))
        raise CorruptFileError(f"{where}: nothing in it is an answer of the assistant's (roles: {roles})")
    return np.array(found["input_ids"], np.int32), counted


def _by_difference(
    tokenizer: Any, render: Callable[..., Any], conversation: Conversation, where: str
) -> tuple[Any, np.ndarray]:
    text = str(render(conversation, tokenize=False))
    try:
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    except NotImplementedError:
        raise ConfigError(
            "the teacher's tokenizer does not tell where its tokens lie in the text (it is no fast one), so the "
            "assistant's cannot be found; use a chat template with {% generation %}, or a column of text"
        ) from None
    offsets = np.array(found["offset_mapping"], np.int64).reshape(-1, 2)
    counted = np.zeros(len(offsets), bool)
    for start, stop in _assistant_spans(render, conversation, text, where):
        counted |= (np.maximum(offsets[:, 1], offsets[:, 0] + 1) > start) & (offsets[:, 0] < stop)
    return found, counted


def _assistant_spans(
    render: Callable[..., Any], conversation: Conversation, text: str, where: str
) -> list[tuple[int, int]]:
    """Where in ``text`` the assistant's answers lie, in characters; a turn that opens the conversation is no answer."""
    spans = []
    for index, turn in enumerate(conversation):
        if turn["role"] == "assistant" and index > 0:
            prompt = render(conversation[:index], tokenize=False, add_generation_prompt=True)
            turned = render(conversation[: index + 1], tokenize=False)
            if not (turned.startswith(prompt) and text.startswith(turned)):
                raise ConfigError(
                    f"{where}: the chat template renders earlier turns otherwise when later ones follow, so the "
                    "assistant's tokens cannot be told apart; use a template with {% generation %}, or single answers"
                )
            spans.append((len(prompt), len(turned)))
    return spans
