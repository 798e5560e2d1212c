"""The registry of variants: names, what they mean at a layer, and what they cost; what models really hold is compared
in test_families.py."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from puzzle import variants
from puzzle.modeling import part_prefixes
from puzzle.types import AttentionSpec, ConfigError, FfnSpec, ModelShape, Part, Site, Spec
from tests.tiny_families import make_stock, make_student, shape_of

SHAPE = ModelShape("llama", 3, 64, 4, 4, 16, 96, 128, 256, tied_embeddings=True)
# every second layer has a window, every third experts
MIXED = replace(
    SHAPE,
    num_layers=6,
    windows=(8, None) * 3,
    moe_layers=(0, 3),
    num_experts=8,
    num_active_experts=4,
    moe_intermediate_size=24,
)
NAMES: dict[Part, list[str]] = {
    "attention": ["keep", "gqa-2", "gqa-1", "window-4", "window-4-sinks-2", "linear", "skip"],
    "ffn": ["keep", "narrow-48", "narrow-1", "experts-3", "active-2", "linear", "skip"],
}
ALL = [(part, name) for part, names in NAMES.items() for name in names]


@pytest.mark.parametrize("kind", [(part, kind) for part, kinds in variants.KINDS.items() for kind in kinds])
def test_every_kind_in_the_registry_is_tested_here(kind: tuple[Part, str]) -> None:
    assert any(name.split("-")[0] == kind[1] for name in NAMES[kind[0]])


@pytest.mark.parametrize(("part", "name"), ALL)
def test_a_name_reads_back_as_itself(part: Part, name: str) -> None:
    spec = variants.parse_variant(part, name, MIXED)
    assert variants.variant_name(spec) == name
    assert variants.block_part(spec)["kind"] == name.split("-")[0]
    for layer in range(MIXED.num_layers):
        resolved = variants.resolve(spec, MIXED, layer)
        if resolved is not None:  # what it takes over from the layer is not in its name, nor in the model's config
            assert variants.variant_name(resolved) == name
            assert variants.block_part(resolved) == variants.block_part(spec)


def resolved(name: str, layer: int, part: Part) -> Spec | None:
    return variants.resolve(variants.parse_variant(part, name, MIXED), MIXED, layer)


def test_what_a_layer_has_of_its_own_becomes_part_of_the_spec() -> None:
    assert resolved("keep", 0, "attention") == AttentionSpec("keep", window_tokens=8)
    assert resolved("gqa-2", 1, "attention") == AttentionSpec("gqa", num_kv_heads=2)
    assert resolved("gqa-2", 2, "attention") == AttentionSpec("gqa", num_kv_heads=2, window_tokens=8)
    assert resolved("window-7", 0, "attention") == AttentionSpec("window", window_tokens=7)
    assert resolved("window-8", 0, "attention") is None and resolved("window-9", 2, "attention") is None
    assert resolved("window-9", 1, "attention") == AttentionSpec("window", window_tokens=9)
    assert resolved("keep", 0, "ffn") == FfnSpec("keep", num_experts=8, num_active_experts=4)
    assert resolved("keep", 1, "ffn") == FfnSpec("keep")
    assert resolved("experts-3", 3, "ffn") == FfnSpec("experts", num_experts=3, num_active_experts=3)
    assert resolved("experts-6", 3, "ffn") == FfnSpec("experts", num_experts=6, num_active_experts=4)
    assert resolved("active-2", 3, "ffn") == FfnSpec("active", num_experts=8, num_active_experts=2)
    assert resolved("narrow-48", 0, "ffn") is None and resolved("experts-3", 1, "ffn") is None
    assert resolved("linear", 0, "ffn") == FfnSpec("linear")
    assert variants.keep_spec(MIXED, Site(2, "attention")) == AttentionSpec("keep", window_tokens=8)


def test_shapes_are_told_apart_by_what_they_cost() -> None:
    ids = {
        ("keep", 0): "attention.gqa-4-window-8",
        ("keep", 1): "attention.gqa-4",
        ("gqa-2", 2): "attention.gqa-2-window-8",
        ("window-4-sinks-2", 1): "attention.gqa-4-window-4-sinks-2",
        ("skip", 0): "attention.skip",
    }
    for (name, layer), shape_id in ids.items():
        spec = resolved(name, layer, "attention")
        assert spec is not None and variants.shape_id(spec, MIXED) == shape_id
    ids = {
        ("keep", 0): "ffn.experts-8-active-4",
        ("keep", 1): "ffn.narrow-96",
        ("experts-3", 0): "ffn.experts-3-active-3",
        ("active-2", 3): "ffn.experts-8-active-2",
        ("narrow-48", 2): "ffn.narrow-48",
        ("linear", 3): "ffn.linear",
    }
    for (name, layer), shape_id in ids.items():
        spec = resolved(name, layer, "ffn")
        assert spec is not None and variants.shape_id(spec, MIXED) == shape_id


FAMILIES_WITHOUT_BIAS = ("mistral", "ministral", "gemma3_text", "qwen3_moe")
COUNTED: list[tuple[Part, str]] = [
    *(("attention", name) for name in ("keep", "gqa-1", "linear", "skip")),
    *(("ffn", name) for name in ("keep", "narrow-24", "experts-3", "active-1", "linear", "skip")),
]


@functools.cache
def shape_of_family(family: str) -> ModelShape:
    return shape_of(make_stock(family))


@pytest.mark.parametrize("family", FAMILIES_WITHOUT_BIAS)
@pytest.mark.parametrize(("part", "name"), COUNTED)
def test_flops_are_those_that_torch_counts(family: str, part: Part, name: str) -> None:
    """Over as many tokens as the narrowest window has: of wider contexts torch counts what masks hide, too."""
    shape, num_tokens = shape_of_family(family), 5
    layer = 0 if name.split("-")[0] in ("experts", "active") else 1
    if name.startswith(("experts", "active")) and layer not in shape.moe_layers:
        with pytest.raises(ConfigError, match="the teacher has no experts"):
            variants.parse_variant(part, name, shape)
        return
    spec = variants.resolve(variants.parse_variant(part, name, shape), shape, layer)
    assert spec is not None
    keep = {"attention": {"kind": "keep"}, "ffn": {"kind": "keep"}}
    blocks = [{**keep, part: variants.block_part(spec)} if index == layer else keep for index in range(4)]
    model = make_student(make_stock(family), blocks)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    hidden = torch.randn(1, num_tokens, 48)
    rotary = model.model.rotary(hidden, torch.arange(num_tokens)[None])
    mask, module = torch.zeros(1, 1, num_tokens, num_tokens), model.model.layers[layer]
    with FlopCounterMode(display=False) as counter:
        module.attention_delta(hidden, rotary, mask) if part == "attention" else module.ffn_delta(hidden)
    assert counter.get_total_flops() == num_tokens * variants.flops_per_token(spec, shape, num_tokens)


def test_flops_stop_growing_where_the_window_ends() -> None:
    keep, window = AttentionSpec("keep"), AttentionSpec("window", window_tokens=4, sink_tokens=2)
    assert variants.tokens_in_sight(window, 5) == 5 and variants.tokens_in_sight(window, 100) == 6
    per_token = 4 * SHAPE.num_attention_heads * SHAPE.head_dim
    for context in (3, 6, 50):
        difference = variants.flops_per_token(keep, SHAPE, context) - variants.flops_per_token(window, SHAPE, context)
        assert difference == per_token * max(0, context - 6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("part", "name"), [case for case in ALL if not case[1].startswith(("experts", "active", "narrow-48"))]
)
def test_biases_are_counted(part: Part, name: str, bias: bool) -> None:
    stock = make_stock("llama", attention_bias=bias, mlp_bias=bias, num_key_value_heads=4)
    shape = shape_of(stock)
    spec = variants.parse_variant(part, name, shape)
    keep = {"attention": {"kind": "keep"}, "ffn": {"kind": "keep"}}
    model = make_student(stock, [keep, {**keep, part: variants.block_part(spec)}, keep, keep])
    layer = model.model.layers[1]
    own = [p for name, p in layer.named_parameters() if name.startswith(part_prefixes(model.config, part))]
    assert sum(parameter.numel() for parameter in own) == variants.params(spec, shape)


def test_an_untied_head_counts_twice() -> None:
    tied, untied = (make_stock("qwen2", tie_word_embeddings=is_tied) for is_tied in (True, False))
    for stock in (tied, untied):
        model = make_student(stock, [{"attention": {"kind": "skip"}, "ffn": {"kind": "skip"}}] * 4)
        assert variants.rest_params(shape_of(stock)) == sum(parameter.numel() for parameter in model.parameters())


def test_kv_heads_are_never_split_over_gpus() -> None:
    one_head = variants.kv_bytes_per_token(AttentionSpec("gqa", num_kv_heads=1), SHAPE, "bf16")
    assert one_head == 2 * 16 * 2
    assert variants.kv_bytes_per_token(AttentionSpec("gqa", num_kv_heads=2), SHAPE, "bf16", tp=4) == one_head
    assert variants.kv_bytes_per_token(AttentionSpec("skip"), SHAPE, "bf16", tp=4) == 0


def test_active_parameters_are_those_that_a_token_meets() -> None:
    keep, fewer = FfnSpec("keep", num_experts=8, num_active_experts=4), FfnSpec("active", None, 8, 1)
    expert = 3 * 64 * 24
    assert variants.params(keep, MIXED) == variants.params(fewer, MIXED) == 8 * (expert + 64) + 64
    assert variants.active_params(keep, MIXED) == 4 * expert + 8 * 64 + 64
    assert variants.active_params(fewer, MIXED) == expert + 8 * 64 + 64
    assert variants.active_params(AttentionSpec("linear"), MIXED) == 64 * 64 + 64


@pytest.mark.parametrize(
    ("part", "name", "message"),
    [
        ("attention", "gqa-3", "3 does not divide the teacher's 4 KV heads"),
        ("attention", "narrow-8", "is no attention variant"),
        ("attention", "gqa", "needs a size"),
        ("attention", "skip-2", "takes no size"),
        ("attention", "window-256", "the teacher takes at most 256 tokens anyway"),
        ("attention", "window-0", "the size must be at least 1"),
        ("attention", "gqa-2-sinks-4", "only window keeps sinks"),
        ("ffn", "narrow-97", "the teacher has only 96 channels"),
        ("ffn", "narrow-8@fp8", "precisions are not on offer yet"),
        ("ffn", "experts-2", "the teacher has no experts"),
        ("ffn", "active-2", "the teacher has no experts"),
        ("attention", "gqa-50%", "only narrow and experts take a percentage"),
        ("ffn", "Narrow 8", "is no ffn variant"),
    ],
)
def test_variants_that_cannot_be(part: Part, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        variants.parse_variant(part, name, SHAPE)


@pytest.mark.parametrize(
    ("name", "message"),
    [("experts-9", "the teacher has only 8 experts"), ("active-5", "the teacher uses only 4 experts per token")],
)
def test_no_more_experts_than_there_are(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        variants.parse_variant("ffn", name, MIXED)
    assert variants.parse_variant("ffn", "experts-25%", MIXED) == FfnSpec("experts", num_experts=2)
