"""Text to packed tokens, in four disjoint splits, and batches as a pure function of (data, split, seed, step).

Reads documents (data_source.py); writes one unit ``data/`` with a token array per split. Documents are packed end to
end, separated by the tokenizer's end-of-text token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from puzzle.data_source import SPLITS, documents
from puzzle.types import ConfigError, CorruptFileError


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    bos_token_id: int | None
    eos_token_id: int | None

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Any: ...


@dataclass(frozen=True)
class TokenData:
    """Packed tokens by split, cut into windows of ``sequence_tokens``; ``bytes_per_token`` is of each split's text."""

    tokens: Mapping[str, np.ndarray]
    bytes_per_token: Mapping[str, float]
    sequence_tokens: int

    def num_sequences(self, split: str) -> int:
        return len(self.tokens[split]) // self.sequence_tokens

    def sequences(self, split: str, count: int, seed: int) -> torch.Tensor:
        """(count, T) int64: the first ``count`` windows of the split in an order shuffled by ``seed``."""
        available = self.num_sequences(split)
        if count > available:
            raise ConfigError(
                f"split {split!r} holds {available} windows of {self.sequence_tokens} tokens, {count} were asked for; "
                "give more text or ask for fewer sequences"
            )
        order = np.random.default_rng([seed, SPLITS.index(split)]).permutation(available)[:count]
        return self._windows(split, order * self.sequence_tokens)

    def batch(self, seed: int, step: int, batch_size: int) -> torch.Tensor:
        """(B, T) int64 of ``train`` at ``step``: each epoch has its own order and its own offset of the windows."""
        per_epoch = self.num_sequences("train") - 1
        if per_epoch < 1:
            raise ConfigError(
                f"train holds {len(self.tokens['train'])} tokens: too few for windows of {self.sequence_tokens};"
                " give more text or lower data.sequence_tokens"
            )
        starts = []
        for index in range(step * batch_size, (step + 1) * batch_size):
            epoch, place = divmod(index, per_epoch)
            rng = np.random.default_rng([seed, len(SPLITS), epoch])
            offset = rng.integers(self.sequence_tokens)
            starts.append(offset + rng.permutation(per_epoch)[place] * self.sequence_tokens)
        return self._windows("train", np.array(starts))

    def _windows(self, split: str, starts: np.ndarray) -> torch.Tensor:
        windows = self.tokens[split][starts[:, None] + np.arange(self.sequence_tokens)]
        return torch.from_numpy(windows.astype(np.int64))


def write_tokens(path: Path, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """Tokenises the text at ``path`` into ``folder/tokens.safetensors``; returns the unit's payload."""
    texts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for document in documents(path):
        texts[document.split].append(document.text)
    separator = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    head = [] if separator is None else [separator]
    arrays, bytes_per_token = {}, {}
    for split in SPLITS:
        if not texts[split]:
            raise ConfigError(
                f"{path}: too little text: no document falls into the split {split!r}; give more documents"
            )
        rows = tokenizer(texts[split], add_special_tokens=False)["input_ids"]
        arrays[split] = np.concatenate([np.array([*head, *row], np.int32) for row in rows])
        bytes_per_token[split] = sum(len(text.encode()) for text in texts[split]) / max(1, len(arrays[split]))
    save_file(arrays, folder / "tokens.safetensors")
    counts = {split: len(array) for split, array in arrays.items()}
    return {"num_tokens": counts, "bytes_per_token": bytes_per_token, "separator": separator}


def read_tokens(folder: Path, payload: Mapping[str, Any], sequence_tokens: int) -> TokenData:
    """The unit that :func:`write_tokens` filled."""
    try:
        tokens = load_file(folder / "tokens.safetensors")
    except (SafetensorError, OSError) as error:
        raise CorruptFileError(f"{folder / 'tokens.safetensors'}: unreadable ({error}); delete {folder}") from None
    return TokenData(tokens, payload["bytes_per_token"], sequence_tokens)
