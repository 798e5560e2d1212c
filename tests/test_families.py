"""The contract of model families and block kinds: every family with every variant that it can have.

A model of the family with the variant wherever a layer can have it must compute what an independent implementation
computes, with and without a cache, hold what the registry of variants predicts, and survive saving and exporting.
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

from puzzle import variants
from puzzle.build import write_model
from puzzle.modeling import FAMILIES, PuzzleForCausalLM, part_prefixes, stock_state
from puzzle.teacher import Compute, load_model
from puzzle.types import AttentionSpec, ModelShape, Part, Site, Spec
from tests import tiny_families
from tests.exporting import export_hf
from tests.tiny_families import OWN, make_kept, make_stock, make_student, make_tokens, reference_logits

ATTENTION = ("keep", "gqa-1", "window-3", "window-1", "window-3-sinks-2", "linear", "skip")
FFN = ("keep", "narrow-24", "experts-3", "active-1", "linear", "skip")
NAMES: list[tuple[Part, str]] = [*(("attention", name) for name in ATTENTION), *(("ffn", name) for name in FFN)]
# All kinds in one model, "attention/ffn" per layer; what a layer cannot have is kept.
MIXED = ("skip/keep", "window-3-sinks-2/narrow-24", "gqa-1/experts-3", "window-4/active-1")
TOLERANCE = 2e-5


@functools.cache
def stock_model(family: str) -> PreTrainedModel:
    return make_stock(family)


@functools.cache
def shape_of(family: str) -> ModelShape:
    return tiny_families.shape_of(stock_model(family))


def spec_at(family: str, site: Site, name: str) -> Spec | None:
    """The resolved spec, None where the layer cannot have it."""
    shape = shape_of(family)
    try:
        return variants.resolve(variants.parse_variant(site.part, name, shape), shape, site.layer)
    except variants.ConfigError:  # no layer of the family can
        return None


def specs_of(family: str, layers: tuple[str, ...]) -> dict[Site, Spec]:
    """The specs of an architecture given as "attention/ffn" per layer."""
    shape, specs = shape_of(family), {}
    for layer, names in enumerate(layers):
        for part, name in zip(("attention", "ffn"), names.split("/"), strict=True):
            site = Site(layer, part)  # type: ignore[arg-type]
            specs[site] = spec_at(family, site, name) or variants.keep_spec(shape, site)
    return specs


@functools.cache
def student(family: str, layers: tuple[str, ...]) -> PuzzleForCausalLM:
    specs = specs_of(family, layers)
    blocks = [
        {part: variants.block_part(specs[Site(layer, part)]) for part in ("attention", "ffn")}  # type: ignore[arg-type]
        for layer in range(len(layers))
    ]
    return make_student(stock_model(family), blocks)


def everywhere(part: Part, name: str) -> tuple[str, ...]:
    return (f"{name}/keep" if part == "attention" else f"keep/{name}",) * 4


def can_have(family: str, part: Part, name: str) -> bool:
    return any(spec_at(family, Site(layer, part), name) is not None for layer in range(4))


CASES = [
    pytest.param(family, everywhere(part, name), id=f"{family}-{part}-{name}")
    for family in FAMILIES
    for part, name in NAMES
    if can_have(family, part, name)
] + [pytest.param(family, MIXED, id=f"{family}-mixed") for family in FAMILIES]
every_case = pytest.mark.parametrize(("family", "layers"), CASES)
every_family = pytest.mark.parametrize("family", FAMILIES)


def close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def in_chunks(model: Any, tokens: Tensor, cache: Any = None) -> Tensor:
    """Logits of chunks on top of one another's cache, some longer than the windows."""
    parts = []
    for chunk in tokens.split([2, 9, 1, 1, tokens.shape[1] - 13], dim=1):
        output = model(chunk, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    return torch.cat(parts, dim=1)


def generated(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    mask = options.pop("attention_mask", torch.ones_like(tokens))
    found: Tensor = model.generate(tokens, attention_mask=mask, max_new_tokens=9, do_sample=False, **options)
    return found


def left_padded(tokens: Tensor, num_padding: int) -> tuple[Tensor, Tensor]:
    """The tokens with the second sequence shortened from the left, and their mask."""
    mask = torch.ones_like(tokens)
    mask[1, :num_padding] = 0
    return tokens * mask, mask


def test_every_family_is_tested_with_windows_experts_and_biases() -> None:
    assert set(OWN) == set(FAMILIES)
    assert {family for family in OWN if any(shape_of(family).windows)} == set(OWN) - {"llama"}
    assert [family for family in OWN if shape_of(family).moe_layers] == ["qwen3_moe"]
    assert {name.split("-")[0] for _, name in NAMES} == {kind for kinds in variants.KINDS.values() for kind in kinds}


# ------------------------------------------------------------------------------------------ all kept: the stock model


@every_family
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_all_kept_is_the_stock_model(family: str, implementation: str) -> None:
    stock, kept = make_stock(family), make_kept(stock_model(family))
    stock.set_attn_implementation(implementation)
    kept.set_attn_implementation(implementation)
    assert set(kept.state_dict()) == set(stock.state_dict())
    tokens = make_tokens(2, 21)
    expected = stock(tokens).logits
    assert expected.std() > 0.5
    close(kept(tokens).logits, expected, 1e-5)
    close(in_chunks(kept, tokens), in_chunks(stock, tokens), 1e-5)
    padded, mask = left_padded(tokens, 8)
    close(kept(padded, attention_mask=mask).logits, stock(padded, attention_mask=mask).logits, 1e-5)


@every_family
@torch.no_grad()
def test_all_kept_is_the_stock_model_in_bf16(family: str) -> None:
    stock, kept = make_stock(family), make_kept(stock_model(family)).to(torch.bfloat16)
    for parameter in stock.parameters():  # as from_pretrained does it: RoPE's frequencies stay exact
        parameter.data = parameter.to(torch.bfloat16)
    tokens = make_tokens(2, 21)
    expected = stock(tokens).logits
    assert expected.dtype == torch.bfloat16
    assert torch.equal(kept(tokens).logits, expected)


@every_family
@pytest.mark.parametrize("cache", [None, "static"])
def test_all_kept_generates_what_the_stock_model_does(family: str, cache: str | None) -> None:
    stock, kept = stock_model(family), make_kept(stock_model(family))
    tokens, mask = left_padded(make_tokens(2, 11), 4)
    options = {"cache_implementation": cache} if cache else {}
    expected = generated(stock, tokens, attention_mask=mask, **options)
    assert torch.equal(generated(kept, tokens, attention_mask=mask, **options), expected)
    assert torch.equal(generated(kept, tokens, attention_mask=mask, use_cache=False), expected)


@every_family
def test_checkpoints_on_disk_are_read(family: str, tmp_path: Path) -> None:
    stock, kept = stock_model(family), make_kept(stock_model(family))
    stock.save_pretrained(tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    state = stock_state(kept.config, on_disk)
    expected = {name: tensor for name, tensor in kept.state_dict().items() if name in state}
    assert set(kept.state_dict()) - set(state) == ({"lm_head.weight"} if kept.config.tie_word_embeddings else set())
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    wrapped = {f"language_model.{name}": tensor for name, tensor in on_disk.items()}
    for given in (state, wrapped):  # what is ours already stays as it is; a wrapper's prefix goes
        again = stock_state(kept.config, given)
        assert set(again) == set(state) and all(torch.equal(again[name], state[name]) for name in state)


def test_a_missing_expert_is_named() -> None:
    config = make_kept(stock_model("qwen3_moe")).config
    with tempfile.TemporaryDirectory() as folder:
        stock_model("qwen3_moe").save_pretrained(folder)
        state = load_file(Path(folder) / "model.safetensors")
    layer = {name: tensor for name, tensor in state.items() if name.startswith("model.layers.2.")}
    assert set(stock_state(config, layer)) < set(make_kept(stock_model("qwen3_moe")).state_dict())
    del layer["model.layers.2.mlp.experts.5.up_proj.weight"]
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.experts\.5\.up_proj\.weight is missing"):
        stock_state(config, layer)


@every_family
def test_the_shape_read_without_torch_is_the_model_s(family: str) -> None:
    shape, model = shape_of(family), make_kept(stock_model(family))
    config, layers = model.config, range(4)
    assert [shape.window(layer) for layer in layers] == [config.own_window(layer) for layer in layers]
    assert [shape.window(layer) for layer in layers] == [layer.span[0] for layer in model.model.layers]
    assert shape.moe_layers == tuple(layer for layer in layers if config.has_experts(layer))
    state = model.state_dict()
    assert shape.qk_norm == any("q_norm" in name for name in state)
    assert shape.qkv_bias == any("q_proj.bias" in name for name in state)
    assert shape.output_bias == any("o_proj.bias" in name for name in state)
    assert shape.head_dim == state["model.layers.0.self_attn.k_proj.weight"].shape[0] // shape.num_kv_heads
    assert shape.tied_embeddings == (model.lm_head.weight is model.model.embed_tokens.weight)


# ------------------------------------------------------------------------------------------- every family and variant


@every_case
@torch.no_grad()
def test_logits_are_those_of_the_reference(family: str, layers: tuple[str, ...]) -> None:
    model, tokens = student(family, layers), make_tokens(2, 17)
    expected = reference_logits(model, stock_model(family), tokens)
    assert expected.std() > 0.1
    close(model(tokens).logits, expected)


@every_case
@torch.no_grad()
def test_a_cache_changes_nothing(family: str, layers: tuple[str, ...]) -> None:
    model, tokens = student(family, layers), make_tokens(2, 19)
    expected = model(tokens, use_cache=False).logits
    for cache in (
        None,
        DynamicCache(),
        DynamicCache(config=model.config),
        StaticCache(config=model.config, max_cache_len=24),
    ):
        close(in_chunks(model, tokens, cache), expected)


@every_case
@torch.no_grad()
def test_generation_with_a_cache_is_generation_without(family: str, layers: tuple[str, ...]) -> None:
    model = student(family, layers)
    tokens, mask = left_padded(make_tokens(2, 9), 3)
    expected = generated(model, tokens, attention_mask=mask, use_cache=False)
    assert torch.equal(generated(model, tokens, attention_mask=mask), expected)
    static = generated(model, tokens, attention_mask=mask, cache_implementation="static")
    assert torch.equal(static, expected)
    assert torch.equal(generated(model, tokens[1:, 3:]), expected[1:, 3:])


@every_case
@torch.no_grad()
def test_left_padding_changes_nothing(family: str, layers: tuple[str, ...]) -> None:
    model, tokens = student(family, layers), make_tokens(2, 19)
    padded, mask = left_padded(tokens, 8)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = model(padded, attention_mask=mask, position_ids=positions).logits
    close(found[:1], model(tokens[:1]).logits)
    close(found[1:, 8:], model(tokens[1:, 8:]).logits)


@every_case
@torch.no_grad()
def test_layers_alone_compose_to_the_model(family: str, layers: tuple[str, ...]) -> None:
    model, tokens = student(family, layers), make_tokens(2, 12)
    hidden = model.model.embed_tokens(tokens)
    rotary = model.model.rotary(hidden, torch.arange(12)[None])
    for layer in model.model.layers:
        assert layer.rope in rotary
        middle = hidden + layer.attention_delta(hidden, rotary)
        hidden = middle + layer.ffn_delta(middle)
    close(model.lm_head(model.model.norm(hidden)), model(tokens).logits)


@every_case
def test_parameters_are_as_predicted(family: str, layers: tuple[str, ...]) -> None:
    model, shape, specs = student(family, layers), shape_of(family), specs_of(family, layers)
    for site, spec in specs.items():
        prefixes = part_prefixes(model.config, site.part)
        own = [p for name, p in model.model.layers[site.layer].named_parameters() if name.startswith(prefixes)]
        assert sum(parameter.numel() for parameter in own) == variants.params(spec, shape), site
    total = sum(variants.params(spec, shape) for spec in specs.values()) + variants.rest_params(shape)
    assert total == sum(parameter.numel() for parameter in model.parameters())


@every_case
@torch.no_grad()
def test_the_cache_holds_what_is_predicted(family: str, layers: tuple[str, ...]) -> None:
    """Between two steps a window holds one token less than it shows: the next comes in its place."""
    model, shape, num_tokens = student(family, layers), shape_of(family), 9
    cache = model(make_tokens(2, num_tokens), use_cache=True).past_key_values
    held = [slot.keys.nbytes + slot.values.nbytes for slot in cache.layers if slot.is_initialized]
    expected = []
    for site, spec in specs_of(family, layers).items():
        if variants.num_kv_heads(spec, shape):
            assert isinstance(spec, AttentionSpec)
            seen = variants.tokens_in_sight(spec, num_tokens)
            tokens = num_tokens if spec.window_tokens is None else seen - 1
            expected.append(2 * tokens * variants.kv_bytes_per_token(spec, shape, "fp32"))
            assert model.model.layers[site.layer].span == (spec.window_tokens, spec.sink_tokens or 0)
    assert held == expected


@every_case
@torch.no_grad()
def test_exported_and_loaded_is_the_same_model(
    family: str, layers: tuple[str, ...], tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    model, tokens = student(family, layers), make_tokens(2, 19)
    export_hf(model, tiny_tokenizer_dir, tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == (family if is_plain(family, layers) else "puzzle")
    assert isinstance(loaded, PuzzleForCausalLM) == (config["model_type"] == "puzzle")
    close(loaded(tokens).logits, model(tokens).logits, 1e-5)
    close(in_chunks(loaded, tokens), model(tokens).logits)
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert any(".experts.0." in name for name in names) == (config["model_type"] == "qwen3_moe")


def is_plain(family: str, layers: tuple[str, ...]) -> bool:
    """Whether transformers' own model of the family can be this one. The same window in every layer it can be, but in
    Llama, which has no windows at all, and in Gemma 3, where a window means other rotary tables, too; transformers
    fails with a window of one token."""
    attention, ffn = layers[0].split("/")
    if layers == MIXED or {"linear", "skip", "window-1"} & {attention, ffn} or "sinks" in attention:
        return False
    return not attention.startswith("window") or family not in ("llama", "gemma3_text")


def test_a_model_of_no_blocks_at_all_is_read_back(tmp_path: Path) -> None:
    model = make_student(stock_model("llama"), [{"attention": {"kind": "skip"}, "ffn": {"kind": "skip"}}] * 4)
    write_model(model, tmp_path, torch.float32)
    again = load_model(tmp_path, Compute(torch.device("cpu"), bf16=False))
    tokens = make_tokens(2, 5)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
