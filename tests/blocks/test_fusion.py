"""Fused FFNs against the slow and obvious sum, in every family that can have them: alone, in a student, exported."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from puzzle import variants
from puzzle.blocks.fusion import fuse
from puzzle.blocks.layer import block_of, config_with, part_state
from puzzle.build import build_student
from puzzle.modeling import FAMILIES, PuzzleDecoderLayer, PuzzleForCausalLM
from puzzle.types import AttentionSpec, FfnSpec, Item, ModelShape, Site
from puzzle.variants import fused_item, made_of, site_item
from tests import tiny_families
from tests.exporting import export_hf
from tests.tiny_families import make_kept, make_stock, make_tokens

DENSE = [family for family in FAMILIES if family not in ("gemma3_text", "qwen3_moe")]
WIDTH = 24
NARROW, SKIP = FfnSpec("narrow", WIDTH), AttentionSpec("skip")
every_family = pytest.mark.parametrize("family", DENSE)
every_ffn = pytest.mark.parametrize("ffn", [FfnSpec("keep"), NARROW], ids=variants.variant_name)


@functools.cache
def teacher(family: str) -> PuzzleForCausalLM:
    """Some of its gains are 0."""
    model = make_kept(make_stock(family))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.norm_of("ffn").weight[::7] = 0
    return model


@functools.cache
def shape_of(family: str) -> ModelShape:
    return tiny_families.shape_of(make_stock(family))


def ffn_weights(model: PuzzleForCausalLM, item: Item) -> dict[str, Tensor]:
    """Of one FFN: the teacher's own, or its first channels."""
    state = part_state(model.model.layers[item.sites[0].layer], "ffn")
    if item.specs[0].kind == "keep":
        return state
    cut = {name: tensor[:WIDTH] for name, tensor in state.items() if "gate_proj" in name or "up_proj" in name}
    return {**state, **cut, "mlp.down_proj.weight": state["mlp.down_proj.weight"][:, :WIDTH]}


def fused_weights(model: PuzzleForCausalLM, item: Item) -> dict[str, Tensor]:
    return fuse([ffn_weights(model, part) for part in made_of(item, shape_of(model.config.family))])


def layer_of(model: PuzzleForCausalLM, index: int, ffn: FfnSpec, weights: dict[str, Tensor]) -> PuzzleDecoderLayer:
    """Layer ``index`` without attention, in fp64."""
    config = config_with(model.config, index, block_of(AttentionSpec("skip"), ffn))
    layer = PuzzleDecoderLayer(config, index, index).double()
    layer.load_state_dict({name: tensor.double() for name, tensor in weights.items()}, strict=True)
    return layer


@every_family
@every_ffn
@pytest.mark.parametrize(("first", "last"), [(0, 1), (1, 3)])
@torch.no_grad()
def test_a_fused_ffn_is_the_sum(family: str, ffn: FfnSpec, first: int, last: int) -> None:
    model, item = teacher(family), fused_item(first, last, ffn, shape_of(family))
    hidden = torch.randn(2, 5, 48, dtype=torch.float64)
    parts = [
        (part.sites[0].layer, {name: tensor.double() for name, tensor in ffn_weights(model, part).items()})
        for part in made_of(item, shape_of(family))
    ]
    assert [layer for layer, _ in parts] == list(range(first, last + 1))
    slow = sum(layer_of(model, layer, ffn, weights).ffn_delta(hidden) for layer, weights in parts)
    fused = fuse([weights for _, weights in parts])
    found = layer_of(model, first, item.specs[0], fused).ffn_delta(hidden)  # type: ignore[arg-type]
    assert isinstance(slow, Tensor) and slow.std() > 0.1
    torch.testing.assert_close(found, slow, rtol=1e-12, atol=1e-12)
    assert any("down_proj.bias" in name for name in fused) == (family == "llama")


def student(family: str, ffn: FfnSpec) -> tuple[PuzzleForCausalLM, list[Item]]:
    """Layers 1 and 2 fused; all else is the teacher's, with what windows, biases and norms it has."""
    model, shape = teacher(family), shape_of(family)
    fused = fused_item(1, 2, ffn, shape)
    kept = [site for site in shape.sites if site not in fused.sites]
    items = [*(site_item(site, variants.keep_spec(shape, site)) for site in kept), fused]
    return build_student(model, items, functools.partial(fused_weights, model)), items


@every_family
@every_ffn
@torch.no_grad()
def test_a_student_with_a_fused_run_computes_the_sum(family: str, ffn: FfnSpec) -> None:
    """With a cache and without; its parameters and its cache are as predicted."""
    model, tokens = teacher(family), make_tokens(2, 17)
    found, items = student(family, ffn)
    hidden = model.model.embed_tokens(tokens)
    rotary = model.model.rotary(hidden, torch.arange(17)[None])
    first, second = (ffn_weights(model, site_item(Site(layer, "ffn"), ffn)) for layer in (1, 2))
    for index in (0, 1, 3):
        layer = model.model.layers[index]
        hidden = hidden + layer.attention_delta(hidden, rotary)
        if index == 1:
            deltas = [layer_of(model, at, ffn, own).ffn_delta(hidden.double()) for at, own in ((1, first), (2, second))]
            hidden = hidden + (deltas[0] + deltas[1]).float()
        else:
            hidden = hidden + layer.ffn_delta(hidden)
    expected = model.lm_head(model.model.norm(hidden))
    assert (expected - model(tokens).logits).abs().max() > 0.1
    torch.testing.assert_close(found(tokens, use_cache=False).logits, expected, rtol=0, atol=1e-5)
    cache, parts = None, []
    for part in tokens.split([9, 1, 7], dim=1):
        output = found(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=2e-5)

    shape, specs = shape_of(family), [spec for item in items for spec in item.specs]
    predicted = sum(variants.params(spec, shape) for spec in specs) + variants.rest_params(shape)
    assert predicted == sum(parameter.numel() for parameter in found.parameters())
    assert len(cache.layers) == sum(variants.num_kv_heads(spec, shape) > 0 for spec in specs) == 3


@every_family
@torch.no_grad()
def test_it_is_exported_and_loaded(family: str, tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    model, _ = student(family, NARROW)
    export_hf(model, tiny_tokenizer_dir, tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(loaded(make_tokens(2, 9)).logits, model(make_tokens(2, 9)).logits, rtol=0, atol=1e-5)
    assert [loaded.config.ffn_width(layer) for layer in range(4)] == [40, 2 * WIDTH, None, 40]


def test_what_a_fused_run_is_made_of() -> None:
    shape = shape_of("llama")
    assert [item.id for item in made_of(fused_item(1, 3, NARROW, shape), shape)] == [
        f"L00{layer}.ffn.narrow-{WIDTH}" for layer in (1, 2, 3)
    ]
    assert [item.id for item in made_of(fused_item(0, 1, FfnSpec("keep"), shape), shape)] == [
        "L000.ffn.keep",
        "L001.ffn.keep",
    ]
    others = (site_item(Site(1, "ffn"), NARROW), variants.run_item(1, 2), site_item(Site(1, "attention"), SKIP))
    assert all(made_of(item, shape) == (item,) for item in others)
