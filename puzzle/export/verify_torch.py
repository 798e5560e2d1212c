"""Reads a nemotron-nas folder or a GGUF file of arch ``deci`` by its readers' own rules, in plain torch; a script that
knows nothing of ``puzzle``.

Reads EXPORT and REFERENCE.safetensors; writes the measured differences to RESULT.json. What readers get wrong is got
wrong here, too: llama.cpp drops the attention of a layer without FFN, so an export that relies on it fails.

    python -I verify_torch.py EXPORT REFERENCE.safetensors RESULT.json NUM_THREADS

Shapes: B batch, T tokens, H heads, D head size.
"""

# torch, transformers and gguf are typed in parts only.
# mypy: allow-untyped-calls

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOT_INSTALLED = 3

try:
    import torch
    import torch.nn.functional as F
    from safetensors.torch import load_file
    from torch import Tensor
    from transformers import AutoConfig, LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
except ImportError as error:
    print(error, file=sys.stderr)
    sys.exit(NOT_INSTALLED)


@dataclass
class Layer:
    """``heads`` None: no attention; ``kv_heads`` None: a linear one. ``width`` None: no FFN."""

    heads: int | None
    kv_heads: int | None
    width: int | None
    tensors: dict[str, Tensor]  # by the names below
    window: int | None = None  # tokens in sight


@dataclass
class Model:
    layers: list[Layer]
    embedding: Tensor
    norm: Tensor
    head: Tensor
    eps: float
    frequencies: Tensor  # (D / 2,) turns per token
    scaling: float  # of the rotated vectors
    interleaved: bool  # pairs of channels (2i, 2i + 1), or (i, i + D / 2)
    drops_without_ffn: bool


# ------------------------------------------------------------------------------------------------------- nemotron-nas

ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def read_folder(folder: Path) -> Model:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    state: dict[str, Tensor] = {}
    for file in folder.glob("model*.safetensors"):
        state |= {name: tensor.float() for name, tensor in load_file(file).items()}
    layers, count = [], len(config.block_configs)
    for index, block in enumerate(config.block_configs):
        prefix = f"model.layers.{index}."
        own = {name.removeprefix(prefix): state.pop(name) for name in [*state] if name.startswith(prefix)}
        layers.append(_deci_layer(config, block, own))
        if (getattr(config, "layer_types", None) or [""] * count)[index] == "sliding_attention":
            layers[-1].window = config.sliding_window
    embedding, norm = state.pop("model.embed_tokens.weight"), state.pop("model.norm.weight")
    head = embedding if config.tie_word_embeddings else state.pop("lm_head.weight")
    if state:
        raise ValueError(f"tensors that belong nowhere: {sorted(state)[:3]}")
    rotary = LlamaRotaryEmbedding(LlamaConfig(**{name: getattr(config, name) for name in _ROPE}))
    return Model(
        layers, embedding, norm, head, config.rms_norm_eps, rotary.inv_freq, rotary.attention_scaling, False, False
    )


_ROPE = ("hidden_size", "num_attention_heads", "head_dim", "max_position_embeddings", "rope_parameters")


def _deci_layer(config: Any, block: Any, own: dict[str, Tensor]) -> Layer:
    """Checked against the sizes that the config says: what is missing, superfluous or of another shape fails."""
    hidden, heads, size = config.hidden_size, config.num_attention_heads, config.head_dim
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    layer = Layer(None, None, None, {})
    if not block.attention.no_op:
        shapes["attention_norm"] = ("input_layernorm.weight", (hidden,))
        layer.heads = heads
        if block.attention.replace_with_linear:
            name = "self_attn.linear.weight" if "self_attn.linear.weight" in own else "self_attn.linear_attn.weight"
            shapes["o"] = (name, (hidden, hidden))
        else:
            layer.kv_heads = heads // block.attention.n_heads_in_group
            rows = {"q": heads * size, "k": layer.kv_heads * size, "v": layer.kv_heads * size}
            shapes |= {key: (f"self_attn.{ATTENTION[key]}.weight", (count, hidden)) for key, count in rows.items()}
            shapes["o"] = ("self_attn.o_proj.weight", (hidden, heads * size))
    if not block.ffn.no_op:
        shapes["ffn_norm"] = ("post_attention_layernorm.weight", (hidden,))
        if block.ffn.replace_with_linear:
            name = "mlp.linear.weight" if "mlp.linear.weight" in own else "mlp.linear_mlp.weight"
            layer.width = 0
            shapes["linear"] = (name, (hidden, hidden))
        else:
            width = int(2 * block.ffn.ffn_mult * hidden / 3)
            layer.width = width if width % 256 == 0 else width + 256 - width % 256
            shapes |= {key: (f"mlp.{MLP[key]}.weight", (layer.width, hidden)) for key in ("gate", "up")}
            shapes["down"] = ("mlp.down_proj.weight", (hidden, layer.width))
    for key, (name, shape) in shapes.items():
        tensor = own.pop(name)
        if tensor.shape != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, and the config says {shape}")
        layer.tensors[key] = tensor
    if own:
        raise ValueError(f"tensors that the layer has no use for: {sorted(own)[:3]}")
    return layer


# --------------------------------------------------------------------------------------------------------------- GGUF

GGUF = {
    "attention_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "ffn_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


def read_gguf(path: Path) -> Model:
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError as error:
        print(error, file=sys.stderr)
        sys.exit(NOT_INSTALLED)
    reader = GGUFReader(path)
    state = {
        one.name: torch.from_numpy(
            dequantize(one.data, one.tensor_type).reshape(tuple(map(int, one.shape))[::-1]).copy()
        )
        for one in reader.tensors
    }

    def value(key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    if value("general.architecture") != "deci":
        raise ValueError(f"architecture {value('general.architecture')!r}, expected 'deci'")
    count, size = value("deci.block_count"), value("deci.rope.dimension_count")
    layers = []
    for index in range(count):
        heads, kv_heads, width = (
            value(f"deci.{key}")[index]
            for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
        )
        prefix = f"blk.{index}."
        own = {
            key: state.pop(f"{prefix}{name}.weight") for key, name in GGUF.items() if f"{prefix}{name}.weight" in state
        }
        if set(own) != _expected(heads, kv_heads, width):
            raise ValueError(f"layer {index} has {sorted(own)}, and the metadata says {heads}, {kv_heads}, {width}")
        layers.append(Layer(heads or None, kv_heads or None, width or None, own))
    frequencies = value("deci.rope.freq_base") ** -(torch.arange(0, size, 2).float() / size)
    if value("deci.rope.scaling.type") == "linear":
        frequencies = frequencies / value("deci.rope.scaling.factor")
    frequencies = frequencies / state.pop("rope_freqs.weight", torch.ones(()))
    embedding, norm = state.pop("token_embd.weight"), state.pop("output_norm.weight")
    head = state.pop("output.weight", embedding)
    if state:
        raise ValueError(f"tensors that belong nowhere: {sorted(state)[:3]}")
    eps = value("deci.attention.layer_norm_rms_epsilon")
    return Model(layers, embedding, norm, head, eps, frequencies, 1.0, True, True)


def _expected(heads: int, kv_heads: int, width: int) -> set[str]:
    attention = {"attention_norm", "o", *(("q", "k", "v") if kv_heads else ())} if heads else set()
    return attention | ({"ffn_norm", "gate", "up", "down"} if width else set())


# ------------------------------------------------------------------------------------------------------------ forward


def logits(model: Model, tokens: Tensor) -> Tensor:
    x = model.embedding[tokens]
    for layer in model.layers:
        own, before = layer.tensors, x
        if layer.heads is not None:
            z = _norm(model, x, own["attention_norm"])
            if layer.kv_heads is not None:
                z = _attention(model, layer, z, layer.heads, layer.kv_heads)
            x = x + z @ own["o"].T
        if layer.width is None:
            x = before if model.drops_without_ffn else x
            continue
        z = _norm(model, x, own["ffn_norm"])
        if "linear" in own:
            x = x + z @ own["linear"].T
        else:
            x = x + (F.silu(z @ own["gate"].T) * (z @ own["up"].T)) @ own["down"].T
    return _norm(model, x, model.norm) @ model.head.T


def _norm(model: Model, x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + model.eps) * weight


def _attention(model: Model, layer: Layer, x: Tensor, heads: int, kv_heads: int) -> Tensor:
    """(B, T, H * D): what the output projection takes."""
    own, positions = layer.tensors, torch.arange(x.shape[1])
    counts = (("q", heads), ("k", kv_heads), ("v", kv_heads))
    query, key, value = ((x @ own[name].T).unflatten(-1, (count, -1)).transpose(1, 2) for name, count in counts)
    query, key = _rotate(model, query), _rotate(model, key)
    key, value = (one.repeat_interleave(heads // kv_heads, dim=1) for one in (key, value))
    ago = positions[:, None] - positions  # (T, T)
    mask = (ago >= 0) & (ago < (layer.window or x.shape[1]))
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return mixed.transpose(1, 2).flatten(-2)


def _rotate(model: Model, x: Tensor) -> Tensor:  # (B, H, T, D)
    angles = torch.arange(x.shape[2])[:, None] * model.frequencies
    cos, sin = angles.cos() * model.scaling, angles.sin() * model.scaling
    if model.interleaved:
        first, second = x[..., ::2], x[..., 1::2]
        return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


@torch.no_grad()
def main(export_dir: str, reference_file: str, result_file: str, num_threads: str) -> None:
    torch.set_num_threads(int(num_threads))
    reference, folder = load_file(reference_file), Path(export_dir)
    files = sorted(folder.glob("*.gguf"))
    model = read_gguf(files[0]) if files else read_folder(folder)
    found = logits(model, reference["input_ids"])
    difference = float((found - reference["logits"]).abs().max())
    result = {"version": torch.__version__, "differences": {"max_logit_difference": difference}}
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    sys.modules["puzzle"] = None  # type: ignore[assignment]
    main(*sys.argv[1:])
