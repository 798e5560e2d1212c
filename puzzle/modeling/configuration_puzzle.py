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
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

Span = tuple[int | None, int]  # the window in tokens (None: all), and how many first tokens stay visible beyond it

# The field that each kind must have next to "kind"; None: no other field.
ATTENTION_KINDS: dict[str, str | None] = {
    "keep": None,
    "gqa": "num_kv_heads",
    "window": "window_tokens",
    "linear": None,
    "skip": None,
}
FFN_KINDS: dict[str, str | None] = {
    "keep": None,
    "narrow": "intermediate_size",
    "experts": "num_experts",
    "active": "num_active_experts",
    "linear": None,
    "skip": None,
}
KINDS = {"attention": ATTENTION_KINDS, "ffn": FFN_KINDS}
OPTIONAL_FIELDS = {"window": {"sink_tokens"}}

KEEP_BLOCK = {"attention": {"kind": "keep"}, "ffn": {"kind": "keep"}}

FULL, SLIDING = "full_attention", "sliding_attention"
# Fields of a family that say what its layers are, by layer or by their types. They are kept in ``teacher_layers``:
# transformers would build KV caches from them, whose slots are not this model's layers. ``rope_parameters`` is among
# them where it differs by type, which transformers would not know of without the types.
LAYER_FIELDS = ("layer_types", "sliding_window")
LEGACY_ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_local_base_freq")
# What a family's config may ask for and this model does not do.
UNSUPPORTED_FIELDS = ("use_bidirectional_attention", "final_logit_softcapping", "attn_logit_softcapping")


def legacy_rope_fields(rope_parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling`` as programs older than ``rope_parameters`` expect them.

    Such programs assume a theta of their own where the key is missing, without a word. Where the parameters differ by
    layer type, in the form that Gemma 3 had.
    """
    if not rope_parameters:
        return {}
    if FULL in rope_parameters and SLIDING in rope_parameters:
        local = {"rope_local_base_freq": rope_parameters[SLIDING]["rope_theta"]}
        return {**legacy_rope_fields(rope_parameters[FULL]), **local}
    if "rope_theta" not in rope_parameters:
        return {}
    scaling = {name: value for name, value in rope_parameters.items() if name != "rope_theta"}
    is_scaled = rope_parameters.get("rope_type", "default") != "default"
    return {"rope_theta": rope_parameters["rope_theta"], "rope_scaling": scaling if is_scaled else None}


class LayerConfig:
    """The model's config as one layer's modules see it: the layer's own ``values`` first, all else the model's.

    Reads through instead of copying, so that ``model.set_attn_implementation()`` reaches every layer.
    """

    def __init__(self, config: PreTrainedConfig, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values, shared=config)

    def __getattr__(self, name: str) -> Any:
        if name == "shared" or name.startswith("__"):  # while it is being copied or unpickled
            raise AttributeError(name)
        return getattr(self.shared, name)


class PuzzleConfig(PreTrainedConfig):
    """``family`` is the Hugging Face ``model_type`` of the teacher; every field of its config is a field of this one,
    but for those by layer, which lie in ``teacher_layers``.

    ``num_key_value_heads``, ``intermediate_size`` and ``num_experts`` are the teacher's; a layer's own sizes are in
    ``blocks``. Without ``blocks`` every layer is kept. Raises ValueError for a block that no model could be built from.
    """

    model_type = "puzzle"
    keys_to_ignore_at_inference = ["past_key_values"]

    family: str = "llama"
    blocks: list[dict[str, Any]] | None = None
    teacher_layers: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.family not in CONFIG_MAPPING:
            raise ValueError(f"family {self.family!r} is not a model_type that transformers knows")
        kwargs |= self.teacher_layers or {}
        if kwargs.get("rope_parameters"):  # the legacy keys only repeat it, and would take precedence if left
            kwargs = _without(kwargs, LEGACY_ROPE_FIELDS)
        if self.blocks is not None:
            kwargs.setdefault("num_hidden_layers", len(self.blocks))

        family_class = CONFIG_MAPPING[self.family]
        names = {field.name for field in fields(family_class)} - {field.name for field in fields(self)}
        # The family's class fills in its defaults, brings RoPE into one form and refuses what it does not allow.
        family_config = family_class(**copy.deepcopy(kwargs))
        by_layer = [name for name in LAYER_FIELDS if name in names]
        if {FULL, SLIDING} & set(getattr(family_config, "rope_parameters", None) or {}):
            by_layer.append("rope_parameters")
        self.teacher_layers = {name: getattr(family_config, name) for name in by_layer} or None
        for name in names.difference(by_layer):
            setattr(self, name, getattr(family_config, name))

        if self.blocks is None:
            self.blocks = [copy.deepcopy(KEEP_BLOCK) for _ in range(self.num_hidden_layers)]
        aliases = getattr(family_class, "attribute_map", {}).values()
        taken = {*names, *aliases, *LAYER_FIELDS, *LEGACY_ROPE_FIELDS, "_sliding_window_pattern"}
        super().__post_init__(**_without(kwargs, taken))
        self._check_teacher()
        self._check_blocks()

    @classmethod
    def from_family(cls, config: PreTrainedConfig, blocks: list[dict[str, Any]] | None = None) -> PuzzleConfig:
        """The same model as ``config`` describes, with ``blocks`` in place of its layers (default: all kept)."""
        values = _without(copy.deepcopy(config.to_dict()), ("model_type", *_NOT_OF_THE_FAMILY))
        values["attn_implementation"] = config._attn_implementation
        return cls(family=config.model_type, blocks=blocks, **values)

    def family_config(self) -> PreTrainedConfig:
        """The teacher's config, of the family's own class."""
        values = _without(self.to_dict(), ("model_type", *_NOT_OF_THE_FAMILY, *LEGACY_ROPE_FIELDS))
        config = CONFIG_MAPPING[self.family](**values, **copy.deepcopy(self.teacher_layers or {}))
        config._attn_implementation = self._attn_implementation
        return config

    def with_layers(self, layers: Sequence[int], blocks: Sequence[Mapping[str, Any]]) -> PuzzleConfig:
        """The same sizes, but one layer per entry of ``layers``: of the kind that this model's teacher has there."""
        values = {**self.to_dict(), "num_hidden_layers": len(layers), "blocks": [dict(block) for block in blocks]}
        teacher = dict(self.teacher_layers or {})
        if "layer_types" in teacher:
            teacher["layer_types"] = [self.layer_type(layer) for layer in layers]
        if getattr(self, "num_experts", 0):
            dense = [index for index, layer in enumerate(layers) if not self.has_experts(layer)]
            values |= {"mlp_only_layers": dense, "decoder_sparse_step": 1}
        config: PuzzleConfig = PuzzleConfig.from_dict({**values, "teacher_layers": teacher or None})
        return config

    # ------------------------------------------------------------------------- what the teacher has at a layer

    def layer_type(self, layer_idx: int) -> str:
        """``full_attention`` or ``sliding_attention``."""
        types = self._teacher_field("layer_types")
        if types is not None:
            return str(types[layer_idx])
        return FULL if self._teacher_field("sliding_window") is None else SLIDING

    def own_window(self, layer_idx: int) -> int | None:
        """The tokens that the teacher's attention is limited to."""
        window: int | None = self._teacher_field("sliding_window")
        return window if self.layer_type(layer_idx) == SLIDING else None

    def has_experts(self, layer_idx: int) -> bool:
        """Whether the teacher's FFN is a mixture of experts."""
        if not getattr(self, "num_experts", 0) or layer_idx in self.mlp_only_layers:
            return False
        return bool((layer_idx + 1) % self.decoder_sparse_step == 0)

    # ---------------------------------------------------------------------------- what this model has at a layer

    def kv_heads(self, layer_idx: int) -> int | None:
        """KV heads of the layer; None where it has no real attention, and so no KV cache.

        Not ``num_kv_heads``: vLLM takes that for a field.
        """
        block = self._blocks[layer_idx]["attention"]
        if block["kind"] in ("linear", "skip"):
            return None
        heads: int = block.get("num_kv_heads", self.num_key_value_heads)
        return heads

    def span(self, layer_idx: int) -> Span:
        """What the layer's attention sees."""
        block = self._blocks[layer_idx]["attention"]
        if block["kind"] == "window":
            return block["window_tokens"], block.get("sink_tokens") or 0
        return self.own_window(layer_idx), 0

    def ffn_width(self, layer_idx: int) -> int | None:
        """Intermediate channels of the layer; None where it has no gated FFN of one piece."""
        block = self._blocks[layer_idx]["ffn"]
        if block["kind"] in ("linear", "skip") or self.has_experts(layer_idx):
            return None
        width: int = block.get("intermediate_size", self.intermediate_size)
        return width

    def experts(self, layer_idx: int) -> tuple[int, int] | None:
        """(experts, active experts per token) of the layer; None where it has none."""
        block = self._blocks[layer_idx]["ffn"]
        if block["kind"] in ("linear", "skip") or not self.has_experts(layer_idx):
            return None
        count: int = block.get("num_experts", self.num_experts)
        return count, min(block.get("num_active_experts", self.num_experts_per_tok), count)

    def cache_idx(self, layer_idx: int) -> int:
        """The layer's slot in the KV cache: its ordinal among the layers with real attention.

        Transformers takes the number of tokens seen from slot 0, so slot 0 must belong to a layer that fills it.
        """
        return sum(self.kv_heads(layer) is not None for layer in range(layer_idx))

    def layer_config(self, layer_idx: int) -> LayerConfig:
        """This config with the layer's own sizes where the family keeps its own, for building the family's modules."""
        window, experts = self.span(layer_idx)[0], self.experts(layer_idx)
        values = {
            "num_key_value_heads": self.kv_heads(layer_idx) or self.num_key_value_heads,
            "intermediate_size": self.ffn_width(layer_idx) or self.intermediate_size,
            "sliding_window": window,
            "layer_types": [FULL if window is None else SLIDING] * self.num_hidden_layers,
        }
        if experts is not None:
            values |= {"num_experts": experts[0], "num_experts_per_tok": experts[1]}
        return LayerConfig(self, values)

    # ---------------------------------------------------------------------------------------- as transformers asks

    def to_dict(self) -> dict[str, Any]:
        """As the base class does it, with RoPE in the old form next to the new one."""
        values: dict[str, Any] = super().to_dict()
        rope_parameters = values.get("rope_parameters") or self._teacher_field("rope_parameters")
        return {**values, **legacy_rope_fields(rope_parameters)}

    def convert_rope_params_to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Nothing: the family's class has brought RoPE into one form."""
        return kwargs

    # ------------------------------------------------------------------------------------------------------ checks

    @property
    def _blocks(self) -> list[dict[str, Any]]:
        assert self.blocks is not None  # __post_init__ filled it in
        return self.blocks

    def _teacher_field(self, name: str) -> Any:
        return (self.teacher_layers or {}).get(name)

    def _check_teacher(self) -> None:
        asked = [name for name in UNSUPPORTED_FIELDS if getattr(self, name, None)]
        if asked:
            raise ValueError(f"{asked[0]} = {getattr(self, asked[0])!r} is not supported")
        unknown = {*(self._teacher_field("layer_types") or ())} - {FULL, SLIDING}
        if unknown:
            raise ValueError(
                f"layer_types: {', '.join(sorted(unknown))} is not supported; supported: {FULL}, {SLIDING}"
            )

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
        needed = {"kind"} if size_name is None else {"kind", size_name}
        if not needed <= set(spec) <= needed | OPTIONAL_FIELDS.get(kind, set()):
            raise ValueError(f"{where}: kind {kind!r} has the fields {sorted(needed)}, found {sorted(spec)}")
        for name in set(spec) - {"kind"}:
            size = spec[name]
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{where}: {name} of kind {kind!r} must be a positive integer, found {size!r}")
        if size_name is not None:
            self._check_size(where, layer_idx, kind, size_name, spec[size_name])

    def _check_size(self, where: str, layer_idx: int, kind: str, name: str, size: int) -> None:
        own_window, has_experts = self.own_window(layer_idx), self.has_experts(layer_idx)
        if kind == "gqa" and self.num_attention_heads % size:
            raise ValueError(
                f"{where}: num_kv_heads = {size} of kind 'gqa' does not divide the {self.num_attention_heads} heads"
            )
        if kind == "window" and own_window is not None and size > own_window:
            raise ValueError(f"{where}: the teacher's attention sees {own_window} tokens only, fewer than {size}")
        if kind == "narrow" and has_experts:
            raise ValueError(f"{where}: kind 'narrow' is for an FFN of one piece, and this one has experts")
        if kind in ("experts", "active"):
            most = self.num_experts if has_experts else 0
            if size > most:
                raise ValueError(f"{where}: {name} = {size}, and the teacher has {most} experts there")


# Fields of every config that are about the checkpoint or this class rather than about the family's model.
_NOT_OF_THE_FAMILY = (
    "family",
    "blocks",
    "teacher_layers",
    "architectures",
    "auto_map",
    "transformers_version",
    "_name_or_path",
)


def _without(values: Mapping[str, Any], names: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}
