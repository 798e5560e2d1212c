"""The configuration of a decoder whose layers differ: one family's config plus one entry per layer in ``blocks``.

Reads the family's fields (those of Llama's config, say, with the teacher's sizes) and ``blocks``; computes what each
layer is made of; writes a ``config.json`` that any Hugging Face program can read. This file is copied as it is into
exported checkpoints, so it imports transformers only.

    {"model_type": "puzzle", "family": "llama", "hidden_size": 4096, …,
     "blocks": [{"attention": {"kind": "gqa", "num_kv_heads": 2}, "ffn": {"kind": "narrow", "intermediate_size": 256}},
                {"attention": {"kind": "skip"}, "ffn": {"kind": "keep"}}, …]}
"""

# transformers is typed in parts only.
# mypy: allow-untyped-calls

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

# The field that each kind must have next to "kind"; None: no other field.
ATTENTION_KINDS: dict[str, str | None] = {"keep": None, "gqa": "num_kv_heads", "linear": None, "skip": None}
FFN_KINDS: dict[str, str | None] = {"keep": None, "narrow": "intermediate_size", "linear": None, "skip": None}
KINDS = {"attention": ATTENTION_KINDS, "ffn": FFN_KINDS}

KEEP_BLOCK = {"attention": {"kind": "keep"}, "ffn": {"kind": "keep"}}


def legacy_rope_fields(rope_parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling`` as programs older than ``rope_parameters`` expect them.

    Such programs assume a theta of their own where the key is missing, without a word. Empty where the parameters
    differ by layer type, which the old keys cannot say.
    """
    if not rope_parameters or "rope_theta" not in rope_parameters:
        return {}
    scaling = {name: value for name, value in rope_parameters.items() if name != "rope_theta"}
    is_scaled = rope_parameters.get("rope_type", "default") != "default"
    return {"rope_theta": rope_parameters["rope_theta"], "rope_scaling": scaling if is_scaled else None}


class PuzzleConfig(PreTrainedConfig):
    """``family`` is the Hugging Face ``model_type`` of the teacher; every field of its config is a field of this one.

    ``num_key_value_heads`` and ``intermediate_size`` are the teacher's; a layer's own sizes are in ``blocks``. Without
    ``blocks`` every layer is kept. Raises ValueError for a block that no model could be built from.
    """

    model_type = "puzzle"
    keys_to_ignore_at_inference = ["past_key_values"]

    family: str = "llama"
    blocks: list[dict[str, Any]] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.family not in CONFIG_MAPPING:
            raise ValueError(f"family {self.family!r} is not a model_type that transformers knows")
        if kwargs.get("rope_parameters"):  # the legacy keys only repeat it, and would take precedence if left
            kwargs.pop("rope_theta", None)
            kwargs.pop("rope_scaling", None)
        if self.blocks is not None:
            kwargs.setdefault("num_hidden_layers", len(self.blocks))

        family_class = CONFIG_MAPPING[self.family]
        own_names = {field.name for field in fields(self)}
        names = {field.name for field in fields(family_class)} - own_names
        given = {name: kwargs.pop(name) for name in (*names, "rope_theta", "rope_scaling") if name in kwargs}
        # The family's class fills in its defaults, brings RoPE into one form and refuses what it does not allow.
        family_config = family_class(**copy.deepcopy(given))
        for name in names:
            setattr(self, name, getattr(family_config, name))

        if self.blocks is None:
            self.blocks = [copy.deepcopy(KEEP_BLOCK) for _ in range(self.num_hidden_layers)]
        super().__post_init__(**kwargs)
        self._check_blocks()

    @classmethod
    def from_family(cls, config: PreTrainedConfig, blocks: list[dict[str, Any]] | None = None) -> PuzzleConfig:
        """The same model as ``config`` describes, with ``blocks`` in place of its layers (default: all kept)."""
        values = copy.deepcopy(config.to_dict())
        for name in ("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path"):
            values.pop(name, None)
        values["attn_implementation"] = config._attn_implementation
        return cls(family=config.model_type, blocks=blocks, **values)

    def num_kv_heads(self, layer_idx: int) -> int | None:
        """KV heads of the layer; None where it has no real attention, and so no KV cache."""
        block = self._blocks[layer_idx]["attention"]
        sizes = {"keep": self.num_key_value_heads, "gqa": block.get("num_kv_heads")}
        return sizes.get(block["kind"])

    def ffn_width(self, layer_idx: int) -> int | None:
        """Intermediate channels of the layer; None where it has no gated FFN."""
        block = self._blocks[layer_idx]["ffn"]
        sizes = {"keep": self.intermediate_size, "narrow": block.get("intermediate_size")}
        return sizes.get(block["kind"])

    def cache_idx(self, layer_idx: int) -> int:
        """The layer's slot in the KV cache: its ordinal among the layers with real attention.

        Transformers takes the number of tokens seen from slot 0, so slot 0 must belong to a layer that fills it.
        """
        return sum(self.num_kv_heads(layer) is not None for layer in range(layer_idx))

    def layer_config(self, layer_idx: int) -> PreTrainedConfig:
        """A copy with this layer's sizes where the family keeps its own, for building the family's modules."""
        config = copy.copy(self)
        config.num_key_value_heads = self.num_kv_heads(layer_idx) or self.num_key_value_heads
        config.intermediate_size = self.ffn_width(layer_idx) or self.intermediate_size
        return config

    def to_dict(self) -> dict[str, Any]:
        """As the base class does it, with RoPE in the old form next to the new one."""
        values: dict[str, Any] = super().to_dict()
        return {**values, **legacy_rope_fields(values.get("rope_parameters"))}

    @property
    def _blocks(self) -> list[dict[str, Any]]:
        assert self.blocks is not None  # __post_init__ filled it in
        return self.blocks

    def _check_blocks(self) -> None:
        if len(self._blocks) != self.num_hidden_layers:
            raise ValueError(f"{len(self._blocks)} blocks for num_hidden_layers = {self.num_hidden_layers}")
        for layer_idx, block in enumerate(self._blocks):
            if not isinstance(block, dict) or set(block) != set(KINDS):
                raise ValueError(f"layer {layer_idx}: a block has the keys attention and ffn, found {block!r}")
            for part in KINDS:
                self._check_part(layer_idx, part, block[part])

    def _check_part(self, layer_idx: int, part: str, spec: Any) -> None:
        where = f"layer {layer_idx}, {part}"
        kind = spec.get("kind") if isinstance(spec, dict) else None
        if kind not in KINDS[part]:
            raise ValueError(f"{where}: unknown kind {kind!r} in {spec!r}; allowed: {', '.join(KINDS[part])}")
        size_name = KINDS[part][kind]
        allowed = {"kind"} if size_name is None else {"kind", size_name}
        if set(spec) != allowed:
            raise ValueError(f"{where}: kind {kind!r} has the fields {sorted(allowed)}, found {sorted(spec)}")
        if size_name is None:
            return
        size = spec[size_name]
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{where}: {size_name} of kind {kind!r} must be a positive integer, found {size!r}")
        if kind == "gqa" and self.num_attention_heads % size:
            raise ValueError(
                f"{where}: num_kv_heads = {size} of kind 'gqa' does not divide the {self.num_attention_heads} heads"
            )
