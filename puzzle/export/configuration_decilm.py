"""The config class of a nemotron-nas checkpoint; copied as it is into exports, so it imports transformers only.

Readers take ``config.block_configs[i].attention.no_op``: entries of JSON that answer as attributes, too. Nothing here
depends on how transformers builds a config (it has changed), only on attributes being set.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig


class Entry(dict[str, Any]):
    """A JSON object whose fields are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def _entry(value: Any) -> Any:
    return Entry({name: _entry(inner) for name, inner in value.items()}) if isinstance(value, Mapping) else value


class DeciLMConfig(LlamaConfig):
    """Llama's fields, and ``block_configs``: one per layer, ``{attention: {…}, ffn: {…}}``."""

    model_type = "nemotron-nas"

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "block_configs":
            value = [_entry(block) for block in value or ()]
        super().__setattr__(name, value)
