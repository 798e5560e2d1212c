"""The registry of variants: a contract that every entry must keep, against models that are really built."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from puzzle import variants
from puzzle.blocks.layer import block_of, part_parameters
from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM
from puzzle.types import AttentionSpec, ConfigError, FfnSpec, ModelShape, Part, Site
from puzzle.variants import SearchSpace

SHAPE = ModelShape("llama", 3, 64, 4, 4, 16, 96, 128, 256, tied_embeddings=True)
NAMES: dict[Part, list[str]] = {
    "attention": ["keep", "gqa-2", "gqa-1", "linear", "skip"],
    "ffn": ["keep", "narrow-48", "narrow-1", "linear", "skip"],
}
ALL = [(part, name) for part, names in NAMES.items() for name in names]


def model_with(attention: AttentionSpec, ffn: FfnSpec, bias: bool = False, tied: bool = True) -> PuzzleForCausalLM:
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=96,
        vocab_size=128,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        attention_bias=bias,
        mlp_bias=bias,
        pad_token_id=None,
    )
    keep = block_of(AttentionSpec("keep"), FfnSpec("keep"))
    return PuzzleForCausalLM(PuzzleConfig.from_family(config, [keep, block_of(attention, ffn), keep]))


@pytest.mark.parametrize("kind", [(part, kind) for part, kinds in variants.KINDS.items() for kind in kinds])
def test_every_kind_in_the_registry_is_tested_here(kind: tuple[Part, str]) -> None:
    assert any(name.split("-")[0] == kind[1] for name in NAMES[kind[0]])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("part", "name"), ALL)
def test_predicted_parameters_are_those_of_the_built_model(part: Part, name: str, bias: bool) -> None:
    shape = ModelShape("llama", 3, 64, 4, 4, 16, 96, 128, 256, True, attention_bias=bias, mlp_bias=bias)
    spec = variants.parse_variant(part, name, shape)
    attention = spec if isinstance(spec, AttentionSpec) else AttentionSpec("keep")
    ffn = spec if isinstance(spec, FfnSpec) else FfnSpec("keep")
    model = model_with(attention, ffn, bias)
    layer = model.model.layers[1]
    assert variants.params(spec, shape) == sum(p.numel() for p in part_parameters(layer, part))
    keep = variants.params(AttentionSpec("keep"), shape) + variants.params(FfnSpec("keep"), shape)
    changed = variants.params(attention, shape) + variants.params(ffn, shape)
    assert 2 * keep + changed + variants.rest_params(shape) == sum(p.numel() for p in model.parameters())


def test_an_untied_head_counts_twice() -> None:
    shape = ModelShape("llama", 3, 64, 4, 4, 16, 96, 128, 256, tied_embeddings=False)
    model = model_with(AttentionSpec("keep"), FfnSpec("keep"), tied=False)
    layers = sum(p.numel() for p in model.model.layers.parameters())
    assert variants.rest_params(shape) == sum(p.numel() for p in model.parameters()) - layers


@pytest.mark.parametrize(("part", "name"), ALL)
def test_kv_bytes_are_those_the_cache_holds(part: Part, name: str) -> None:
    spec = variants.parse_variant(part, name, SHAPE)
    model = model_with(*((spec, FfnSpec("keep")) if isinstance(spec, AttentionSpec) else (AttentionSpec("keep"), spec)))
    cache = model(torch.randint(3, 100, (2, 7)), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)
    others = 2 if part == "attention" else 3
    own = variants.kv_bytes_per_token(spec, SHAPE, "fp32") if part == "attention" else 0.0
    keep = variants.kv_bytes_per_token(AttentionSpec("keep"), SHAPE, "fp32")
    assert held == (others * keep + own) * 2 * 7


@pytest.mark.parametrize(("part", "name"), ALL)
def test_flops_are_those_that_torch_counts(part: Part, name: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    spec = variants.parse_variant(part, name, SHAPE)
    model = model_with(*((spec, FfnSpec("keep")) if isinstance(spec, AttentionSpec) else (AttentionSpec("keep"), spec)))
    model.set_attn_implementation("eager")
    layer, hidden = model.model.layers[1], torch.randn(1, 8, 64)
    position = model.model.rotary_emb(hidden, torch.arange(8)[None])
    mask = torch.zeros(1, 1, 8, 8)
    with FlopCounterMode(display=False) as counter:
        layer.attention_delta(hidden, position, mask) if part == "attention" else layer.ffn_delta(hidden)
    assert counter.get_total_flops() == 8 * variants.flops_per_token(spec, SHAPE, 8)


@pytest.mark.parametrize(("part", "name"), ALL)
def test_a_name_reads_back_as_itself(part: Part, name: str) -> None:
    assert variants.variant_name(variants.parse_variant(part, name, SHAPE)) == name


def test_kv_heads_are_never_split_over_gpus() -> None:
    one_head = variants.kv_bytes_per_token(AttentionSpec("gqa", num_kv_heads=1), SHAPE, "bf16")
    assert one_head == 2 * 16 * 2
    assert variants.kv_bytes_per_token(AttentionSpec("gqa", num_kv_heads=2), SHAPE, "bf16", tp=4) == one_head
    assert variants.kv_bytes_per_token(AttentionSpec("skip"), SHAPE, "bf16", tp=4) == 0


def test_a_space_expands_divisors_rounds_percentages_and_drops_doubles() -> None:
    space = SearchSpace.parse(["gqa-*", "skip", "gqa-4"], ["narrow-50%", "narrow-48", "narrow-100%"], SHAPE, 16)
    assert [variants.variant_name(spec) for spec in space.attention] == ["keep", "gqa-2", "gqa-1", "skip"]
    assert [variants.variant_name(spec) for spec in space.ffn] == ["keep", "narrow-48"]
    items = space.items(SHAPE)
    assert len(items) == 3 * (4 + 2)
    assert items[0].id == "L000.attention.keep"
    assert items[-1].sites == (Site(2, "ffn"),)


@pytest.mark.parametrize(
    ("part", "name", "message"),
    [
        ("attention", "gqa-3", "3 does not divide the teacher's 4 KV heads"),
        ("attention", "narrow-8", "is no attention variant"),
        ("attention", "gqa", "needs a size"),
        ("attention", "skip-2", "takes no size"),
        ("ffn", "narrow-97", "the teacher has only 96 channels"),
        ("ffn", "narrow-8@fp8", "precisions are not on offer yet"),
        ("attention", "gqa-50%", "only narrow takes a percentage"),
        ("ffn", "Narrow 8", "is no ffn variant"),
    ],
)
def test_variants_that_cannot_be(part: Part, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        variants.parse_variant(part, name, SHAPE)
