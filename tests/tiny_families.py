"""A tiny random model of every family, and what such models compute, in plain torch.

The models are set up so that whatever a family has matters: windows of a few tokens, head sizes of their own, scaled
RoPE, biases that are not zero, norms that are not all ones, layers with and without experts.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from puzzle.checkpoint import read_shape
from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM, stock_state
from puzzle.types import ModelShape

VOCAB_SIZE = 96
FULL, SLIDING = "full_attention", "sliding_attention"
COMMON: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
OWN: dict[str, dict[str, Any]] = {
    "llama": {
        "head_dim": 8,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "mistral": {
        "sliding_window": 5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "ministral": {"head_dim": 16, "sliding_window": 5, "layer_types": [FULL, SLIDING, SLIDING, SLIDING]},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2, "tie_word_embeddings": True},
    "qwen3": {
        "head_dim": 16,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": [FULL, SLIDING, SLIDING, FULL],
    },
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": 5,
        "layer_types": [SLIDING, FULL, SLIDING, FULL],
        "rope_parameters": {
            FULL: {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
            SLIDING: {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
        "use_sliding_window": True,
        "sliding_window": 7,
    },
}


def make_stock(family: str, **fields: Any) -> PreTrainedModel:
    """Transformers' own model of the family."""
    config = CONFIG_MAPPING[family](**{**COMMON, **OWN[family], **fields})
    torch.manual_seed(5)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5))
            elif name.endswith(".bias"):
                parameter.normal_(std=0.3)
    stock: PreTrainedModel = model.eval()
    return stock


def shape_of(stock: PreTrainedModel) -> ModelShape:
    """What the pure lane reads of the model's config."""
    with tempfile.TemporaryDirectory() as folder:
        stock.config.save_pretrained(folder)
        return read_shape(Path(folder))


def make_kept(stock: PreTrainedModel) -> PuzzleForCausalLM:
    """The same model as a puzzle with every block kept."""
    config = PuzzleConfig.from_family(stock.config)
    model = PuzzleForCausalLM(config).eval()
    model.load_state_dict(stock_state(config, stock.state_dict()), strict=True)
    return model


def make_student(stock: PreTrainedModel, blocks: list[dict[str, Any]]) -> PuzzleForCausalLM:
    """A puzzle model with ``blocks``: the stock model's tensors where they fit, random ones elsewhere."""
    torch.manual_seed(6)
    model = PuzzleForCausalLM(PuzzleConfig.from_family(stock.config, blocks)).eval()
    state, given = model.state_dict(), stock.state_dict()
    fitting = {
        name: given[name] for name, tensor in state.items() if name in given and given[name].shape == tensor.shape
    }
    model.load_state_dict({**state, **fitting}, strict=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias") and name not in fitting:
                parameter.normal_(std=0.3)
    return model


def make_tokens(batch_size: int, num_tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randint(3, VOCAB_SIZE, (batch_size, num_tokens), generator=generator)


# ---------------------------------------------------------------------------------------------------- the reference


def reference_logits(model: PuzzleForCausalLM, stock: PreTrainedModel, tokens: Tensor) -> Tensor:
    """(B, T, V), unpadded, from the tensors and the config's numbers; RoPE's frequencies are the stock model's."""
    config, state = model.config, model.state_dict()
    gemma = config.family == "gemma3_text"
    x = state["model.embed_tokens.weight"][tokens] * (config.hidden_size**0.5 if gemma else 1.0)
    for index, block in enumerate(config.blocks):
        own = _below(state, f"model.layers.{index}.")
        attention, ffn = block["attention"], block["ffn"]
        if attention["kind"] != "skip":
            z = _norm(config, x, own["input_layernorm.weight"])
            if attention["kind"] == "linear":
                x = x + z @ own["self_attn.linear_attn.weight"].T
            else:
                z = _attention(config, stock, index, attention, z, _below(own, "self_attn."))
                x = x + (_norm(config, z, own["post_attention_layernorm.weight"]) if gemma else z)
        if ffn["kind"] != "skip":
            before = "pre_feedforward_layernorm" if gemma else "post_attention_layernorm"
            z = _norm(config, x, own[f"{before}.weight"])
            if ffn["kind"] == "linear":
                x = x + z @ own["mlp.linear_mlp.weight"].T
            else:
                mlp = _below(own, "mlp.")
                z = _experts(config, ffn, z, mlp) if "gate.weight" in mlp else _gated(config, z, mlp)
                x = x + (_norm(config, z, own["post_feedforward_layernorm.weight"]) if gemma else z)
    return _norm(config, x, state["model.norm.weight"]) @ state["lm_head.weight"].T


def _below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _norm(config: PuzzleConfig, x: Tensor, weight: Tensor) -> Tensor:
    scale = weight + 1 if config.family == "gemma3_text" else weight
    return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * scale


def _linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", torch.zeros(()))


def _attention(
    config: PuzzleConfig,
    stock: PreTrainedModel,
    index: int,
    spec: dict[str, Any],
    x: Tensor,
    weights: dict[str, Tensor],
) -> Tensor:
    num_tokens, head_dim = x.shape[1], weights["q_proj.weight"].shape[0] // config.num_attention_heads
    query, key, value = (
        _linear(x, weights, f"{name}_proj").unflatten(-1, (-1, head_dim)).transpose(1, 2) for name in "qkv"
    )
    if "q_norm.weight" in weights:
        query, key = (_norm(config, z, weights[f"{name}_norm.weight"]) for z, name in ((query, "q"), (key, "k")))
    rotary: Any = stock.model.rotary_emb
    prefix = f"{stock.config.layer_types[index]}_" if config.family == "gemma3_text" else ""
    frequencies, scaling = getattr(rotary, f"{prefix}inv_freq"), getattr(rotary, f"{prefix}attention_scaling")
    query, key = (_rotate(z, frequencies, scaling) for z in (query, key))
    group = query.shape[1] // key.shape[1]
    key, value = (z.repeat_interleave(group, dim=1) for z in (key, value))
    scale = getattr(config, "query_pre_attn_scalar", head_dim) ** -0.5
    scores = query @ key.transpose(-1, -2) * scale
    for q in range(num_tokens):
        for k in range(num_tokens):
            if not _sees(q, k, _window(stock, index, spec), spec.get("sink_tokens", 0)):
                scores[:, :, q, k] = -torch.inf
    mixed = scores.softmax(-1) @ value  # (B, H, T, head_dim)
    return _linear(mixed.transpose(1, 2).flatten(-2), weights, "o_proj")


def _window(stock: PreTrainedModel, index: int, spec: dict[str, Any]) -> int | None:
    if "window_tokens" in spec:
        return int(spec["window_tokens"])
    types = getattr(stock.config, "layer_types", None)
    if types is not None and types[index] == FULL:
        return None
    return getattr(stock.config, "sliding_window", None)


def _sees(query: int, key: int, window: int | None, sinks: int) -> bool:
    return key <= query and (window is None or key > query - window or key < sinks)


def _rotate(x: Tensor, frequencies: Tensor, scaling: float) -> Tensor:
    """Turns the pair of channels (i, i + d/2) of every head by position times frequency; x is (B, H, T, d)."""
    angles = torch.arange(x.shape[2])[:, None] * frequencies  # (T, d/2)
    cos, sin = angles.cos() * scaling, angles.sin() * scaling
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _act(config: PuzzleConfig, x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh") if config.family == "gemma3_text" else F.silu(x)


def _gated(config: PuzzleConfig, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    gated = _act(config, _linear(x, weights, "gate_proj")) * _linear(x, weights, "up_proj")
    return _linear(gated, weights, "down_proj")


def _experts(config: PuzzleConfig, spec: dict[str, Any], x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Token by token: the experts whose router logits are highest, weighted by their share of the probability."""
    count = len(weights["gate.weight"])
    assert count == spec.get("num_experts", config.num_experts)
    active = min(spec.get("num_active_experts", config.num_experts_per_tok), count)
    output = torch.zeros_like(x)
    for row in range(x.shape[0]):
        for position in range(x.shape[1]):
            token = x[row, position]
            probabilities = (weights["gate.weight"] @ token).softmax(-1)
            chosen = sorted(range(count), key=lambda expert: -float(probabilities[expert]))[:active]
            total = float(probabilities[chosen].sum()) if config.norm_topk_prob else 1.0
            for expert in chosen:
                gate, up = (weights["experts.gate_up_proj"][expert] @ token).chunk(2)
                share = probabilities[expert] / total
                output[row, position] += share * (weights["experts.down_proj"][expert] @ (_act(config, gate) * up))
    return output
