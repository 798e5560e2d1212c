"""The ``config.json`` of a nemotron-nas (DeciLM) checkpoint: what vLLM, TensorRT-LLM, llama.cpp and mlx-lm read of
models whose layers differ.

Both ways: from the teacher's ``config.json`` and one attention and one FFN spec per layer, and back, to the fields of a
PuzzleConfig (:func:`puzzle_fields`). Writes nothing. Pure. The format is Llama's with, per layer,

    KV heads  = num_attention_heads / n_heads_in_group
    FFN width = int(2 * ffn_mult * hidden_size / 3), rounded up to a multiple of 256

by every reader. A width that is no such multiple is stored with channels of zeros up to the next one, which is exact
(:func:`~puzzle.capabilities.stored_width`), and costs what the wider one does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from puzzle.capabilities import LLAMA_SHAPED, WIDTH_MULTIPLE, stored_width
from puzzle.types import Architecture, AttentionSpec, ConfigError, CorruptFileError, FfnSpec, ModelShape, Spec
from puzzle.variants import num_kv_heads, variant_name

MODEL_TYPE = "nemotron-nas"
CONFIG_CODE = "configuration_decilm"  # the file beside this one that goes into every folder
INSTEAD = "export hf, and serve it with serve_on: [transformers] or [vllm-plugin]"
WIDTH_MARGIN = (
    64  # aimed below the width, so that no reader's rounding of the multiplier ends above or a multiple below
)
FULL, SLIDING = "full_attention", "sliding_attention"
# Copied from the teacher where it has them: Llama's fields that are neither sizes of layers nor RoPE.
_COPIED = (
    "attention_bias",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "initializer_range",
    "max_position_embeddings",
    "mlp_bias",
    "pad_token_id",
    "rms_norm_eps",
    "vocab_size",
)


def read_width(ffn_mult: float, hidden_size: int) -> int:
    """The FFN width that readers make of ``ffn_mult``."""
    return stored_width(int(2 * ffn_mult * hidden_size / 3))


def ffn_mult(width: int, hidden_size: int) -> float:
    """The multiplier that every reader takes for :func:`~puzzle.capabilities.stored_width` of ``width``."""
    multiplier = (stored_width(width) - WIDTH_MARGIN) * 3 / (2 * hidden_size)
    assert read_width(multiplier, hidden_size) == stored_width(width)
    return multiplier


def format_refusal(spec: Spec, shape: ModelShape) -> str | None:
    """Why the format has no word for ``spec``; None where it has."""
    if isinstance(spec, FfnSpec):
        return "it has no experts" if spec.num_experts or spec.num_active_experts else None
    if spec.sink_tokens:
        return "it has no sinks"
    heads = num_kv_heads(spec, shape)
    if heads and shape.num_attention_heads % heads:
        return f"its KV heads divide the query heads, and {heads} does not divide {shape.num_attention_heads}"
    return None


def vllm_refusal(spec: Spec, shape: ModelShape) -> str | None:
    """Why vLLM's own reader (0.32) cannot take ``spec`` at any layer; None where it can."""
    if isinstance(spec, AttentionSpec) and spec.window_tokens is not None:
        return "it has no window per layer"  # but one for all that have one, which is not what a shape is measured as
    return "its reader has no linear maps" if spec.kind == "linear" else format_refusal(spec, shape)


def check_vllm(shape: ModelShape, layers: Architecture) -> None:
    """Raises ConfigError, naming layer and variant, where vLLM's reader would refuse the model or misread it."""
    check_family(shape)
    _check_specs(shape, layers, vllm_refusal, "vLLM cannot load {} as nemotron-nas")
    if not layers or layers[0][0].kind == "skip":
        raise ConfigError(
            "layer 0: vLLM cannot load attention skip as nemotron-nas: its reader wants attention in the first layer; "
            "leave skip out there (layers: in the search space)"
        )


def _check_specs(
    shape: ModelShape, layers: Architecture, refusal: Callable[[Spec, ModelShape], str | None], words: str
) -> None:
    """Raises ConfigError for the first spec that ``refusal`` has a reason against; ``words`` say what cannot be."""
    for layer, specs in enumerate(layers):
        for spec in specs:
            if reason := refusal(spec, shape):
                part = "attention" if isinstance(spec, AttentionSpec) else "ffn"
                raise ConfigError(
                    f"layer {layer}: {words.format(f'{part} {variant_name(spec)}')}: {reason}; with serve_on: [vllm] "
                    "in the constraint file, the search leaves such variants out"
                )


def check_family(shape: ModelShape) -> None:
    """Raises ConfigError for a teacher whose layers are not Llama's: the format could not say what they are."""
    if shape.family not in LLAMA_SHAPED:
        raise ConfigError(
            f"a {shape.family} model cannot be written as nemotron-nas, which has Llama's layers only; "
            f"families that can: {', '.join(LLAMA_SHAPED)}; {INSTEAD}"
        )
    if shape.qkv_bias or shape.output_bias or shape.mlp_bias:
        raise ConfigError(
            f"a model with biases cannot be written as nemotron-nas, "
            f"where no reader of it was seen to have them; {INSTEAD}"
        )
    if any(window is not None for window in shape.windows):
        raise ConfigError(
            f"a {shape.family} model with sliding windows cannot be written as nemotron-nas: it has none; {INSTEAD}"
        )


def check_model(teacher: Mapping[str, Any], shape: ModelShape) -> None:
    """Raises ConfigError for a teacher, by its ``config.json``, that the format could not say."""
    check_family(shape)
    if teacher.get("hidden_act", "silu") != "silu":
        raise ConfigError(
            f"nemotron-nas readers know silu only, and the teacher has {teacher['hidden_act']!r}; {INSTEAD}"
        )


def block_configs(shape: ModelShape, layers: Architecture) -> list[dict[str, Any]]:
    """One entry per layer. ConfigError, naming layer and variant, for what the format has no word for.

    Linear maps are written, though not every reader takes them: see :func:`check_vllm`.
    """
    _check_specs(shape, layers, format_refusal, "{} cannot be written as nemotron-nas")
    return [{"attention": _attention(attention, shape), "ffn": _ffn(ffn, shape)} for attention, ffn in layers]


def _attention(spec: AttentionSpec, shape: ModelShape) -> dict[str, Any]:
    heads = num_kv_heads(spec, shape)
    return {"n_heads_in_group": shape.num_attention_heads // heads if heads else None, **_switches(spec)}


def _ffn(spec: FfnSpec, shape: ModelShape) -> dict[str, Any]:
    has_channels = spec.kind not in ("linear", "skip")
    width = spec.intermediate_size or shape.intermediate_size
    return {"ffn_mult": ffn_mult(width, shape.hidden_size) if has_channels else None, **_switches(spec)}


def _switches(spec: Spec) -> dict[str, bool]:
    return {"no_op": spec.kind == "skip", "replace_with_linear": spec.kind == "linear"}


def nemotron_nas_config(
    teacher: Mapping[str, Any], shape: ModelShape, layers: Architecture, dtype: str
) -> dict[str, Any]:
    """The whole ``config.json`` of a model with ``layers``, as many as there are (not the teacher's number).

    ``teacher`` is its ``config.json``, ``dtype`` as transformers writes it (bfloat16). Raises ConfigError for a teacher
    or a layer that the format cannot hold.
    """
    check_model(teacher, shape)
    return {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": MODEL_TYPE,
        "auto_map": {"AutoConfig": f"{CONFIG_CODE}.DeciLMConfig"},
        **{name: teacher[name] for name in _COPIED if name in teacher},
        **_rope(teacher),
        **_windows(layers),
        "block_configs": block_configs(shape, layers),
        "dtype": dtype,
        "head_dim": shape.head_dim,
        "hidden_size": shape.hidden_size,
        # of no layer in particular, but strict configs refuse null
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_hidden_layers": len(layers),
        "num_key_value_heads": shape.num_kv_heads,
        "tie_word_embeddings": shape.tied_embeddings,
        "torch_dtype": dtype,  # the name that older readers know
    }


def _windows(layers: Architecture) -> dict[str, Any]:
    """The one size of window that vLLM takes beside the layers that have it; other readers ignore both."""
    found = {attention.window_tokens: layer for layer, (attention, _) in enumerate(layers) if attention.window_tokens}
    if len(found) > 1:
        (first, one), (second, other), *_ = found.items()
        raise ConfigError(
            f"layer {other}: a window of {second} tokens cannot be written as nemotron-nas beside one of {first} at "
            f"layer {one}: it has one size for all layers; search with serve_on: [vllm]"
        )
    if not found:
        return {}
    types = [FULL if attention.window_tokens is None else SLIDING for attention, _ in layers]
    return {"layer_types": types, "sliding_window": next(iter(found))}


def _rope(teacher: Mapping[str, Any]) -> dict[str, Any]:
    """In both forms, ``rope_parameters`` and the two fields that it replaced: readers know one or the other."""
    given = teacher.get("rope_parameters") or {
        **(teacher.get("rope_scaling") or {}),
        "rope_theta": teacher.get("rope_theta", 10000.0),  # what Llama's config means when it does not say
    }
    kind = given.get("rope_type", given.get("type", "default"))
    scaling = {name: value for name, value in given.items() if name not in ("rope_theta", "rope_type", "type")}
    return {
        "rope_parameters": {**scaling, "rope_theta": given["rope_theta"], "rope_type": kind},
        "rope_theta": given["rope_theta"],
        "rope_scaling": {**scaling, "rope_type": kind} if kind != "default" else None,
    }


# ------------------------------------------------------------------------------------------------------ reading it back

_KEEP = {"attention": {"kind": "keep"}, "ffn": {"kind": "keep"}}
# What else a block may say, and no reader does: windows, sinks, sparsity. Null or false means that it does not.
_KNOWN = ("n_heads_in_group", "num_key_value_heads", "ffn_mult", "intermediate_size", "no_op", "replace_with_linear")


def puzzle_fields(config: Mapping[str, Any], source: object) -> dict[str, Any]:
    """The fields of a PuzzleConfig of family ``llama`` that is the model which ``config`` describes.

    ``keep`` is the widest that occurs. ConfigError, naming ``source``, for what Llama's layers cannot do;
    CorruptFileError for a field that is missing or malformed.
    """
    try:
        heads, hidden_size = int(config["num_attention_heads"]), int(config["hidden_size"])
        layers = [_read_block(block, heads, hidden_size) for block in config["block_configs"]]
        kv_heads = max((count for count, _ in layers if isinstance(count, int)), default=heads)
        width = max((width for _, width in layers if isinstance(width, int)), default=WIDTH_MULTIPLE)
        slides = [kind == SLIDING for kind in config.get("layer_types") or [FULL] * len(layers)]
        windows = [int(config["sliding_window"]) if slide else None for slide in slides]
        return {
            "family": "llama",
            **{name: config[name] for name in _COPIED if name in config},
            **_rope(config),
            "blocks": [_block(*own, kv_heads, width, window) for own, window in zip(layers, windows, strict=True)],
            "dtype": config.get("dtype") or config.get("torch_dtype") or "float32",
            "head_dim": config.get("head_dim") or hidden_size // heads,
            "hidden_size": hidden_size,
            "intermediate_size": width,
            "num_attention_heads": heads,
            "num_hidden_layers": len(layers),
            "num_key_value_heads": kv_heads,
            "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        }
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise CorruptFileError(f"{source}: missing or malformed field ({error})") from None
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def llama_fields(config: Mapping[str, Any], source: object) -> dict[str, Any]:
    """Llama's ``config.json`` of the same model; ConfigError, naming the first one, where its layers differ."""
    fields = puzzle_fields(config, source)
    for layer, block in enumerate(fields.pop("blocks")):
        if block != _KEEP:
            other = next(f"{part} {one}" for part, one in block.items() if one != _KEEP[part])
            raise ConfigError(
                f"{source}: its layers differ (layer {layer}: {other}), and a teacher's must be alike; "
                "`puzzle convert` writes such a model in other formats"
            )
    return {**fields, "model_type": fields.pop("family")}


def _read_block(block: Mapping[str, Any], heads: int, hidden_size: int) -> tuple[int | str, int | str]:
    """KV heads and FFN width of a layer, ``linear`` or ``skip`` in their place."""
    attention, ffn = block["attention"], block["ffn"]
    for part, entry in (("attention", attention), ("ffn", ffn)):
        asked = [name for name, value in entry.items() if value and name not in _KNOWN]
        if asked and not (entry.get("no_op") or entry.get("replace_with_linear")):
            raise ConfigError(f"block_configs: {part}: {asked[0]} = {entry[asked[0]]!r} is not supported")
    count: int | str | None = _replaced(attention)
    width: int | str | None = _replaced(ffn)
    if count is None:
        count = int(attention.get("num_key_value_heads") or heads // attention["n_heads_in_group"])
    if width is None:
        width = int(ffn.get("intermediate_size") or read_width(ffn["ffn_mult"], hidden_size))
    return count, width


def _replaced(entry: Mapping[str, Any]) -> str | None:
    return "skip" if entry.get("no_op") else "linear" if entry.get("replace_with_linear") else None


def _block(
    count: int | str, width: int | str, kv_heads: int, widest: int, window: int | None
) -> dict[str, dict[str, Any]]:
    """An entry of ``PuzzleConfig.blocks``."""
    attention: dict[str, Any] = {"kind": count} if isinstance(count, str) else {"kind": "keep"}
    ffn: dict[str, Any] = {"kind": width} if isinstance(width, str) else {"kind": "keep"}
    if isinstance(count, int) and count != kv_heads:
        attention = {"kind": "gqa", "num_kv_heads": count}
    if isinstance(count, int) and window is not None:
        if count != kv_heads:
            raise ConfigError(
                f"a layer with a window and {count} KV heads, where others have {kv_heads}, is not supported"
            )
        attention = {"kind": "window", "window_tokens": window}
    if isinstance(width, int) and width != widest:
        ffn = {"kind": "narrow", "intermediate_size": width}
    return {"attention": attention, "ffn": ffn}
