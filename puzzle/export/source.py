"""A model folder that is to be written in another format: what its layers are, and their tensors, one layer at a time.

Reads a student, a family's checkpoint or a nemotron-nas one; writes nothing. Every exporter takes a :class:`Source`, so
nothing holds more than a layer and one shard of what is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puzzle.capabilities import findings, told
from puzzle.checkpoint import shape_of
from puzzle.modeling import PuzzleConfig, part_prefixes
from puzzle.teacher import Shards, load_config
from puzzle.types import Architecture, AttentionSpec, ConfigError, FfnSpec, ModelShape, Part, Spec, Target
from puzzle.variants import resolve

OUTER = ("model.embed_tokens.", "model.norm.", "lm_head.")  # all tensors that belong to no layer


@dataclass(frozen=True)
class Source:
    """``layers`` are resolved specs; ``shape`` is the teacher's that the specs are variants of."""

    folder: Path
    config: PuzzleConfig
    shape: ModelShape
    layers: Architecture
    shards: Shards

    @classmethod
    def open(cls, folder: Path) -> Source:
        """ConfigError for a model that is not supported, CorruptFileError for a folder that is not whole."""
        config = load_config(folder)
        shape = shape_of(config.family_config().to_dict(), folder / "config.json")
        assert config.blocks is not None
        specs = [_specs(block, shape, layer) for layer, block in enumerate(config.blocks)]
        return cls(folder, config, shape, tuple(specs), Shards(folder, config))

    @property
    def dtype(self) -> str:
        """What the weights are stored as, by torch's name."""
        return str(next(iter(self.read("model.norm.").values())).dtype).removeprefix("torch.")

    def read(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin so, in the dtype that they are stored in. A tied head is not among them."""
        found = self.shards.read(prefix, torch.device("cpu"), None)
        if self.config.tie_word_embeddings:
            found.pop("lm_head.weight", None)
        return found

    def outer(self) -> Iterator[tuple[str, Tensor]]:
        """Embedding, last norm and head."""
        for prefix in OUTER:
            yield from self.read(prefix).items()

    def block(self, layer: int, part: Part) -> dict[str, Tensor]:
        """The tensors of one block with its norm, by their names within the layer."""
        prefix = f"model.layers.{layer}."
        found = {
            name: tensor for own in part_prefixes(self.config, part) for name, tensor in self.read(prefix + own).items()
        }
        return {name.removeprefix(prefix): tensor for name, tensor in found.items() if "rotary_emb" not in name}


def _specs(block: Mapping[str, Any], shape: ModelShape, layer: int) -> tuple[AttentionSpec, FfnSpec]:
    attention = resolve(AttentionSpec(**block["attention"]), shape, layer)
    ffn = resolve(FfnSpec(**block["ffn"]), shape, layer)
    assert isinstance(attention, AttentionSpec) and isinstance(ffn, FfnSpec)  # the config's own checks have passed
    return attention, ffn


def check_runtime(source: Source, runtime: Target) -> None:
    """Raises ConfigError, naming layer and variant, for what ``runtime`` cannot load even if it is lowered."""
    refused = [one for one in findings(runtime, source.layers, source.shape) if one.capability.status == "refused"]
    if refused:
        advice = f"with serve_on: [{runtime}] in the constraint file, the search leaves such variants out"
        raise ConfigError(f"{told(refused)[0]}; {advice}")


@dataclass(frozen=True)
class Piece:
    """A block as it is written: what it is, and its tensors by their names within the layer, made when asked for."""

    spec: Spec
    tensors: Callable[[], Mapping[str, Tensor]]


Layers = Sequence[tuple[Piece, Piece]]  # attention and FFN of each layer that is written


def pieces(source: Source) -> list[tuple[Piece, Piece]]:
    """Every block as it is."""
    return [
        (
            Piece(attention, lambda layer=layer: source.block(layer, "attention")),  # type: ignore[misc]
            Piece(ffn, lambda layer=layer: source.block(layer, "ffn")),  # type: ignore[misc]
        )
        for layer, (attention, ffn) in enumerate(source.layers)
    ]
