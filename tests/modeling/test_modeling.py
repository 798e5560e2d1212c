"""The heterogeneous model against an independent torch reference, over every pair of kinds and over mixed models."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from puzzle.modeling import PuzzleConfig, PuzzleDecoderLayer, PuzzleForCausalLM

ATTENTION = {
    "keep": {"kind": "keep"},
    "gqa-2": {"kind": "gqa", "num_kv_heads": 2},
    "gqa-1": {"kind": "gqa", "num_kv_heads": 1},
    "linear": {"kind": "linear"},
    "skip": {"kind": "skip"},
}
FFN = {
    "keep": {"kind": "keep"},
    "narrow-40": {"kind": "narrow", "intermediate_size": 40},
    "linear": {"kind": "linear"},
    "skip": {"kind": "skip"},
}
# One "attention/ffn" per layer. Every pair fills a whole model, so that it is first and last, with and without a cache.
ARCHITECTURES: dict[str, list[str]] = {
    **{f"{a}/{f}": [f"{a}/{f}"] * 2 for a, f in itertools.product(ATTENTION, FFN)},
    "first layer without attention": ["skip/keep", "gqa-2/narrow-40", "keep/keep"],
    "first layers linear and empty": ["linear/keep", "skip/skip", "gqa-1/linear", "keep/skip"],
    "last layer empty": ["gqa-1/keep", "keep/linear", "skip/skip"],
    "attention in the middle only": ["skip/narrow-40", "gqa-2/skip", "linear/linear", "skip/keep"],
    "no attention at all": ["skip/keep", "linear/linear", "skip/skip"],
}


def make_blocks(layers: list[str]) -> list[dict[str, Any]]:
    parts = [layer.split("/") for layer in layers]
    return [{"attention": dict(ATTENTION[attention]), "ffn": dict(FFN[ffn])} for attention, ffn in parts]


def make_model(layers: list[str], **fields: Any) -> PuzzleForCausalLM:
    """Head dimension 8, not hidden / heads; llama3-scaled RoPE; norms that are not all ones."""
    torch.manual_seed(len(layers))
    config = PuzzleConfig(
        blocks=make_blocks(layers),
        **{
            "hidden_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "intermediate_size": 96,
            "vocab_size": 128,
            "initializer_range": 0.2,
            "max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
            **fields,
        },
    )
    model = PuzzleForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    return model


def make_tokens(batch_size: int, num_tokens: int) -> Tensor:
    return torch.randint(3, 128, (batch_size, num_tokens), generator=torch.Generator().manual_seed(num_tokens))


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=[name.replace(" ", "_") for name in ARCHITECTURES])
def model(request: pytest.FixtureRequest) -> PuzzleForCausalLM:
    return make_model(ARCHITECTURES[request.param])


# ---------------------------------------------------------------------------------------------- the reference


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def inverse_frequencies(config: PuzzleConfig) -> Tensor:
    """RoPE's frequencies, with the llama3 rule for long wavelengths written out per channel."""
    rope = config.rope_parameters
    values = []
    for channel in range(0, config.head_dim, 2):
        frequency = rope["rope_theta"] ** (-channel / config.head_dim)
        if rope["rope_type"] == "llama3":
            turns = rope["original_max_position_embeddings"] * frequency / (2 * torch.pi)
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            share = min(max((turns - low) / (high - low), 0.0), 1.0)
            frequency = share * frequency + (1 - share) * frequency / rope["factor"]
        values.append(frequency)
    return torch.tensor(values)


def rotate(x: Tensor, frequencies: Tensor) -> Tensor:
    """Turns the pair of channels (i, i + d/2) of every head by position times frequency; x is (B, H, T, d)."""
    angles = torch.arange(x.shape[2])[:, None] * frequencies  # (T, d/2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )


def attention(x: Tensor, weights: dict[str, Tensor], head_dim: int, frequencies: Tensor) -> Tensor:
    num_tokens = x.shape[1]

    def heads(name: str) -> Tensor:
        return (x @ weights[name].T).unflatten(-1, (-1, head_dim)).transpose(1, 2)

    query, key = rotate(heads("q_proj.weight"), frequencies), rotate(heads("k_proj.weight"), frequencies)
    group = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(group, dim=1) for part in (key, heads("v_proj.weight")))
    scores = query @ key.transpose(-1, -2) / head_dim**0.5
    future = torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(future, -torch.inf).softmax(-1) @ value  # (B, H, T, d)
    return mixed.transpose(1, 2).flatten(-2) @ weights["o_proj.weight"].T


def reference_logits(model: PuzzleForCausalLM, tokens: Tensor) -> Tensor:
    """Unpadded causal forward in plain torch, from the tensors and the config's numbers alone."""
    config, state = model.config, {name: tensor.detach() for name, tensor in model.state_dict().items()}
    eps, frequencies = config.rms_norm_eps, inverse_frequencies(config)
    x = state["model.embed_tokens.weight"][tokens]
    for index, block in enumerate(config.blocks):
        prefix = f"model.layers.{index}."
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        if block["attention"]["kind"] != "skip":
            normed = rms_norm(x, own["input_layernorm.weight"], eps)
            if block["attention"]["kind"] == "linear":
                x = x + normed @ own["self_attn.linear_attn.weight"].T
            else:
                weights = {name.removeprefix("self_attn."): tensor for name, tensor in own.items()}
                x = x + attention(normed, weights, config.head_dim, frequencies)
        if block["ffn"]["kind"] != "skip":
            normed = rms_norm(x, own["post_attention_layernorm.weight"], eps)
            if block["ffn"]["kind"] == "linear":
                x = x + normed @ own["mlp.linear_mlp.weight"].T
            else:
                gate = F.silu(normed @ own["mlp.gate_proj.weight"].T)
                x = x + (gate * (normed @ own["mlp.up_proj.weight"].T)) @ own["mlp.down_proj.weight"].T
    return rms_norm(x, state["model.norm.weight"], eps) @ state["lm_head.weight"].T


def predicted_params(config: PuzzleConfig) -> int:
    hidden, width = config.hidden_size, config.num_attention_heads * config.head_dim
    total = 2 * config.vocab_size * hidden + hidden
    for block in config.blocks:
        kv_heads = {"keep": config.num_key_value_heads, "gqa": block["attention"].get("num_kv_heads")}
        channels = {"keep": config.intermediate_size, "narrow": block["ffn"].get("intermediate_size")}
        kind = block["attention"]["kind"]
        if kind in kv_heads:
            total += hidden + 2 * hidden * width + 2 * hidden * kv_heads[kind] * config.head_dim
        total += hidden + hidden**2 if kind == "linear" else 0
        kind = block["ffn"]["kind"]
        if kind in channels:
            total += hidden + 3 * hidden * channels[kind]
        total += hidden + hidden**2 if kind == "linear" else 0
    return total


# ---------------------------------------------------------------------------- contract: every architecture


@torch.no_grad()
def test_logits_equal_the_reference(model: PuzzleForCausalLM) -> None:
    tokens = make_tokens(2, 23)
    expected = reference_logits(model, tokens)
    assert expected.std() > 0.1
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=3e-5)


def test_parameters_are_those_of_the_blocks(model: PuzzleForCausalLM) -> None:
    assert sum(parameter.numel() for parameter in model.parameters()) == predicted_params(model.config)


@torch.no_grad()
def test_generation_with_cache_equals_without(model: PuzzleForCausalLM) -> None:
    tokens = make_tokens(2, 7)
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 6, "do_sample": False}
    cached = model.generate(tokens, use_cache=True, **options)
    grown = tokens
    for _ in range(6):
        grown = torch.cat([grown, reference_logits(model, grown)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, grown)
    assert torch.equal(model.generate(tokens, use_cache=False, **options), grown)


@torch.no_grad()
def test_continuing_a_cache_in_chunks_equals_one_shot(model: PuzzleForCausalLM) -> None:
    tokens = make_tokens(2, 19)
    cache, parts = None, []
    for chunk in tokens.split([6, 9, 1, 1, 2], dim=1):
        output = model(chunk, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens).logits, rtol=0, atol=3e-5)


@torch.no_grad()
def test_left_padding_changes_nothing(model: PuzzleForCausalLM) -> None:
    tokens, num_padding = make_tokens(2, 15), 6
    mask = torch.ones_like(tokens)
    mask[1, :num_padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = model(tokens.masked_fill(mask == 0, 0), attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(padded[:1], model(tokens[:1]).logits, rtol=0, atol=3e-5)
    torch.testing.assert_close(padded[1:, num_padding:], model(tokens[1:, num_padding:]).logits, rtol=0, atol=3e-5)


@torch.no_grad()
def test_saved_and_loaded_is_the_same_model(model: PuzzleForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, PuzzleForCausalLM)
    assert not any(info.values()), info
    assert loaded.config.blocks == model.config.blocks
    assert loaded.config.rope_parameters == model.config.rope_parameters
    state, expected = loaded.state_dict(), model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    tokens = make_tokens(2, 11)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@torch.no_grad()
def test_layers_alone_compose_to_the_model(model: PuzzleForCausalLM) -> None:
    tokens = make_tokens(2, 12)
    outputs = model(tokens, output_hidden_states=True)
    hidden = model.model.embed_tokens(tokens)
    positions = model.model.rotary(hidden, torch.arange(tokens.shape[1])[None])
    for index, layer in enumerate(model.model.layers):
        torch.testing.assert_close(hidden, outputs.hidden_states[index], rtol=0, atol=1e-5)
        alone = PuzzleDecoderLayer(model.config, index, 0)
        alone.load_state_dict(layer.state_dict(), strict=True)
        attention_delta = alone.attention_delta(hidden, positions)
        ffn_delta = alone.ffn_delta(hidden + attention_delta)
        assert attention_delta.shape == ffn_delta.shape == hidden.shape
        assert bool(attention_delta.any()) == (model.config.blocks[index]["attention"]["kind"] != "skip")
        assert bool(ffn_delta.any()) == (model.config.blocks[index]["ffn"]["kind"] != "skip")
        hidden = hidden + attention_delta + ffn_delta
    hidden = model.model.norm(hidden)
    torch.testing.assert_close(hidden, outputs.hidden_states[-1], rtol=0, atol=1e-5)
    assert len(outputs.hidden_states) == len(model.model.layers) + 1


# -------------------------------------------------------------------------------------------- the whole model

MIXED = ["skip/keep", "gqa-2/narrow-40", "linear/linear", "keep/keep", "skip/skip"]


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_llama_tied"])
@torch.no_grad()
def test_all_kept_is_the_stock_model(name: str, request: pytest.FixtureRequest) -> None:
    llama: LlamaForCausalLM = request.getfixturevalue(name)
    model = PuzzleForCausalLM(PuzzleConfig.from_family(llama.config)).eval()
    assert set(model.state_dict()) == set(llama.state_dict())
    model.load_state_dict(llama.state_dict(), strict=True)
    tokens = make_tokens(2, 21)
    assert torch.equal(model(tokens).logits, llama(tokens).logits)
    is_tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert is_tied == llama.config.tie_word_embeddings


def test_tied_weights_survive_saving(tiny_llama_tied: LlamaForCausalLM, tmp_path: Path) -> None:
    model = PuzzleForCausalLM(PuzzleConfig.from_family(tiny_llama_tied.config))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@torch.no_grad()
def test_attention_backend_can_be_changed_for_every_layer() -> None:
    model, tokens = make_model(MIXED), make_tokens(2, 17)
    before = model(tokens).logits
    layer = model.model.layers[1]
    hidden = model.model.embed_tokens(tokens)
    positions = model.model.rotary(hidden, torch.arange(17)[None])
    assert layer.attention_delta(hidden, positions).shape == hidden.shape
    model.set_attn_implementation("eager")
    assert layer.self_attn.config._attn_implementation == "eager"
    torch.testing.assert_close(model(tokens).logits, before, rtol=0, atol=3e-5)
    with pytest.raises(ValueError, match=r"layer 1.*'eager' is not causal without a mask"):
        layer.attention_delta(hidden, positions)


@torch.no_grad()
def test_casting_leaves_the_rotary_frequencies_exact() -> None:
    model, tokens = make_model(MIXED), make_tokens(2, 17)
    before = model(tokens).logits
    model.to(torch.bfloat16)
    assert model.dtype == model(tokens).logits.dtype == torch.bfloat16
    expected = inverse_frequencies(model.config)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected, rtol=1e-6, atol=0)
    assert not torch.equal(model.to(torch.float32)(tokens).logits, before)  # the weights were rounded, though
    torch.testing.assert_close(model(tokens).logits, reference_logits(model, tokens), rtol=0, atol=3e-5)


def test_cache_slots_are_numbered_over_attention_layers() -> None:
    model = make_model(MIXED)
    slots = [getattr(getattr(layer, "self_attn", None), "layer_idx", None) for layer in model.model.layers]
    assert slots == [None, 0, None, 1, None]
    assert [model.config.kv_heads(layer) for layer in range(5)] == [None, 2, None, 4, None]
    assert [model.config.ffn_width(layer) for layer in range(5)] == [96, 40, None, 96, None]


@torch.no_grad()
def test_layer_accepts_any_cache_with_update() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.shapes: dict[int, tuple[int, ...]] = {}

        def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any) -> tuple[Tensor, Tensor]:
            self.shapes[layer_idx] = tuple(key.shape)
            return key, value

    model, cache = make_model(MIXED), Recorder()
    hidden = torch.randn(2, 5, 48)
    positions = model.model.rotary(hidden, torch.arange(5)[None])
    for layer in model.model.layers:
        layer(hidden, position_embeddings=positions, past_key_values=cache)
    assert cache.shapes == {0: (2, 2, 5, 8), 1: (2, 4, 5, 8)}


def test_loss_is_the_shifted_cross_entropy() -> None:
    model, tokens = make_model(MIXED), make_tokens(2, 13)
    labels = tokens.clone()
    labels[0, :4] = -100
    output = model(tokens, labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)


@torch.no_grad()
def test_logits_to_keep() -> None:
    model, tokens = make_model(MIXED), make_tokens(2, 13)
    full = model(tokens).logits
    torch.testing.assert_close(model(tokens, logits_to_keep=3).logits, full[:, -3:])
    torch.testing.assert_close(model(tokens, logits_to_keep=torch.tensor([1, 5])).logits, full[:, [1, 5]])
    embeds = model.get_input_embeddings()(tokens)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, full)
    as_tuple = model(tokens, use_cache=False, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], full)


def test_gradient_checkpointing_keeps_the_gradients() -> None:
    model, tokens = make_model(MIXED), make_tokens(2, 13)
    model.train()
    model(tokens, labels=tokens).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    # The method has a new name in newer releases, and the old one warns there.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    calls = []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model(tokens, labels=tokens).loss.backward()
    assert len(calls) == 2
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


@torch.no_grad()
def test_beam_search_runs_where_cache_slots_are_fewer_than_layers() -> None:
    model, tokens = make_model(MIXED), make_tokens(2, 6)
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    assert torch.equal(model.generate(tokens, **options), model.generate(tokens, use_cache=False, **options))


# ------------------------------------------------------------------------------------------------- the config


@pytest.mark.parametrize(
    ("part", "spec", "message"),
    [
        (
            "attention",
            {"kind": "sparse"},
            "layer 1, attention: unknown kind 'sparse'.*allowed: keep, gqa, window, linear, skip",
        ),
        ("ffn", {"kind": "gqa", "num_kv_heads": 2}, "layer 1, ffn: unknown kind 'gqa'"),
        ("attention", {"kind": "gqa"}, "layer 1, attention: kind 'gqa' has the fields .*num_kv_heads"),
        ("attention", {"kind": "keep", "num_kv_heads": 2}, "layer 1, attention: kind 'keep' has the fields"),
        ("attention", {"kind": "gqa", "num_kv_heads": 3}, "layer 1, attention: num_kv_heads = 3 .*4 heads"),
        ("attention", {"kind": "gqa", "num_kv_heads": 0}, "layer 1, attention: .*positive integer, found 0"),
        ("ffn", {"kind": "narrow", "intermediate_size": 2.5}, "layer 1, ffn: .*positive integer, found 2.5"),
        ("ffn", None, "layer 1, ffn: unknown kind None"),
    ],
)
def test_impossible_blocks_are_refused(part: str, spec: Any, message: str) -> None:
    blocks = make_blocks(["keep/keep"] * 2)
    blocks[1][part] = spec
    with pytest.raises(ValueError, match=message):
        PuzzleConfig(blocks=blocks, hidden_size=48, num_attention_heads=4)


def test_other_impossible_configs_are_refused() -> None:
    with pytest.raises(ValueError, match="2 blocks for num_hidden_layers = 3"):
        PuzzleConfig(blocks=make_blocks(["keep/keep"] * 2), num_hidden_layers=3)
    with pytest.raises(ValueError, match="layer 0: a block has the keys attention and ffn"):
        PuzzleConfig(blocks=[{"attention": {"kind": "keep"}}])
    with pytest.raises(ValueError, match="'no-such-model' is not a model_type"):
        PuzzleConfig(family="no-such-model")
    with pytest.raises(ValueError, match="'gpt2' is not supported; supported: llama, mistral, "):
        PuzzleForCausalLM(PuzzleConfig(family="gpt2", blocks=[]))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 123456.0},
        {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
    ],
)
def test_config_round_trip_is_loss_free_and_speaks_old_rope(rope: dict[str, Any], tmp_path: Path) -> None:
    teacher = LlamaConfig(
        hidden_size=48, num_attention_heads=4, num_hidden_layers=2, rope_parameters=dict(rope), dtype="bfloat16"
    )
    teacher.head_dim, teacher.mlp_bias, teacher.eos_token_id = 20, True, [5, 6]
    config = PuzzleConfig.from_family(teacher, make_blocks(["gqa-2/skip", "keep/linear"]))
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, PuzzleConfig)
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
    expected = {**teacher.to_dict(), "model_type": "puzzle"}  # eos as a list, a head size of its own, and all else
    assert {name: config.to_dict()[name] for name in expected} == expected
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_parameters"] == rope
    assert written["rope_theta"] == rope["rope_theta"]
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    assert written["rope_scaling"] == (None if rope["rope_type"] == "default" else scaling)


def test_old_rope_alone_is_understood_and_inputs_are_left_alone() -> None:
    blocks = make_blocks(["keep/keep"])
    given = {"rope_theta": 777.0, "rope_scaling": {"rope_type": "linear", "factor": 3.0}, "blocks": blocks}
    before = copy.deepcopy(given)
    config = PuzzleConfig(**given)
    assert config.rope_parameters == {"rope_type": "linear", "factor": 3.0, "rope_theta": 777.0}
    assert given == before
