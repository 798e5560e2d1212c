"""Starting points: the paper's by their definition, the closed form by optimality."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from puzzle.blocks.distill import local_loss
from puzzle.blocks.importance import layer_importance
from puzzle.blocks.initialise import closed_form_start, paper_start
from puzzle.blocks.layer import part_state, variant_layer
from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM
from puzzle.modeling.modeling_puzzle import PuzzleDecoderLayer
from puzzle.teacher import LayerPass, freeze, stream_layers
from puzzle.types import AttentionSpec, FfnSpec, Part, Spec

SPECS: list[tuple[Part, Spec]] = [
    ("attention", AttentionSpec("gqa", num_kv_heads=2)),
    ("attention", AttentionSpec("gqa", num_kv_heads=1)),
    ("attention", AttentionSpec("linear")),
    ("ffn", FfnSpec("narrow", intermediate_size=48)),
    ("ffn", FfnSpec("linear")),
]


@pytest.fixture(scope="module")
def layer_and_passes(tiny_llama: LlamaForCausalLM) -> tuple[PuzzleDecoderLayer, list[LayerPass]]:
    model = PuzzleForCausalLM(PuzzleConfig.from_family(tiny_llama.config))
    model.load_state_dict(tiny_llama.state_dict())
    torch.manual_seed(0)
    batches = list(torch.randint(3, 128, (16, 32)).split(8))
    _, layer, passes = list(stream_layers(freeze(model), batches))[1]
    return layer, passes


def start(layer: PuzzleDecoderLayer, passes: list[LayerPass], part: Part, spec: Spec) -> dict[str, Tensor]:
    return paper_start(layer, part, spec, layer_importance(layer, passes).ffn_channels)


def site_error(
    layer: PuzzleDecoderLayer, passes: list[LayerPass], part: Part, spec: Spec, weights: dict[str, Tensor]
) -> float:
    variant = variant_layer(layer, part, spec, weights)
    with torch.no_grad():
        return sum(local_loss(variant, part, one, "site").item() for one in passes) / len(passes)


def test_the_contribution_of_a_channel_is_the_papers(
    layer_and_passes: tuple[PuzzleDecoderLayer, list[LayerPass]],
) -> None:
    layer, passes = layer_and_passes
    middle = torch.cat([one.middle for one in passes])[:, 1:]
    normed, mlp = layer.post_attention_layernorm(middle), layer.mlp
    gated = torch.nn.functional.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed)
    expected = gated.abs().mean((0, 1)) * mlp.down_proj.weight.norm(dim=0)
    assert torch.allclose(layer_importance(layer, passes).ffn_channels, expected, rtol=1e-4)


def test_narrow_keeps_the_channels_that_contribute_most(
    layer_and_passes: tuple[PuzzleDecoderLayer, list[LayerPass]],
) -> None:
    layer, passes = layer_and_passes
    kept = layer_importance(layer, passes).ffn_channels.argsort(descending=True)[:48].sort().values
    weights = start(layer, passes, "ffn", FfnSpec("narrow", intermediate_size=48))
    assert torch.equal(weights["mlp.up_proj.weight"], layer.mlp.up_proj.weight[kept])
    assert torch.equal(weights["mlp.down_proj.weight"], layer.mlp.down_proj.weight[:, kept])


def test_pooled_heads_are_means_of_neighbours(layer_and_passes: tuple[PuzzleDecoderLayer, list[LayerPass]]) -> None:
    layer, passes = layer_and_passes
    weights = start(layer, passes, "attention", AttentionSpec("gqa", num_kv_heads=2))
    values = layer.self_attn.v_proj.weight
    assert torch.allclose(weights["self_attn.v_proj.weight"][:16], (values[:16] + values[16:32]) / 2)
    assert torch.allclose(weights["self_attn.v_proj.weight"][16:], (values[32:48] + values[48:]) / 2)
    assert torch.equal(weights["self_attn.q_proj.weight"], layer.self_attn.q_proj.weight)


def test_linear_attention_starts_as_attending_to_oneself(
    layer_and_passes: tuple[PuzzleDecoderLayer, list[LayerPass]],
) -> None:
    layer, passes = layer_and_passes
    weights = start(layer, passes, "attention", AttentionSpec("linear"))
    first = passes[0].before[:, :1]  # the first token can attend to nothing but itself
    variant = variant_layer(layer, "attention", AttentionSpec("linear"), weights)
    teacher = layer.attention_delta(first, tuple(table[:, :1] for table in passes[0].position))
    assert torch.allclose(variant.attention_delta(first, None), teacher, atol=1e-5)


@pytest.mark.parametrize(("part", "spec"), SPECS)
def test_the_refit_is_better_than_the_papers_start(
    layer_and_passes: tuple[PuzzleDecoderLayer, list[LayerPass]], part: Part, spec: Spec
) -> None:
    layer, passes = layer_and_passes
    paper = start(layer, passes, part, spec)
    refitted = closed_form_start(layer, part, spec, paper, passes)
    assert refitted.keys() == paper.keys()
    assert sum(not torch.equal(refitted[name], paper[name]) for name in paper) == 1
    before, after = (site_error(layer, passes, part, spec, weights) for weights in (paper, refitted))
    assert after < 0.98 * before


@pytest.mark.parametrize(("part", "spec"), SPECS)
def test_no_small_step_away_from_the_refit_improves_it(
    layer_and_passes: tuple[PuzzleDecoderLayer, list[LayerPass]], part: Part, spec: Spec
) -> None:
    """It is the minimum, but for what the ridge of 1e-3 holds back."""
    layer, passes = layer_and_passes
    paper = start(layer, passes, part, spec)
    refitted = closed_form_start(layer, part, spec, paper, passes)
    (name,) = [name for name in paper if not torch.equal(refitted[name], paper[name])]
    best = site_error(layer, passes, part, spec, refitted)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        step = torch.randn(refitted[name].shape, generator=generator) * refitted[name].std() * 0.05
        assert site_error(layer, passes, part, spec, {**refitted, name: refitted[name] + step}) > best


def test_keep_is_the_teacher_and_skip_is_nothing(layer_and_passes: tuple[PuzzleDecoderLayer, list[LayerPass]]) -> None:
    layer, passes = layer_and_passes
    keep = start(layer, passes, "ffn", FfnSpec("keep"))
    assert all(torch.equal(keep[name], tensor) for name, tensor in part_state(layer, "ffn").items())
    assert start(layer, passes, "attention", AttentionSpec("skip")) == {}
    assert site_error(layer, passes, "ffn", FfnSpec("skip"), {}) == pytest.approx(1.0)


@pytest.mark.parametrize(("part", "spec"), SPECS)
def test_the_refit_knows_which_biases_the_variant_has(part: Part, spec: Spec) -> None:
    torch.manual_seed(5)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96}
    llama = LlamaForCausalLM(
        LlamaConfig(**sizes, vocab_size=128, attention_bias=True, mlp_bias=True, initializer_range=0.2)
    )
    for name, parameter in llama.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model = PuzzleForCausalLM(PuzzleConfig.from_family(llama.config))
    model.load_state_dict(llama.state_dict())
    _, layer, passes = next(stream_layers(freeze(model), [torch.randint(3, 128, (16, 32))]))
    paper = start(layer, passes, part, spec)
    refitted = closed_form_start(layer, part, spec, paper, passes)
    assert site_error(layer, passes, part, spec, refitted) < site_error(layer, passes, part, spec, paper)
    assert site_error(layer, passes, part, spec, refitted) < 0.6


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_pooling_equal_heads_loses_nothing(tiny_llama: LlamaForCausalLM, num_kv_heads: int) -> None:
    """Where the merged heads are the same, the variant computes what the teacher does."""
    model = PuzzleForCausalLM(PuzzleConfig.from_family(tiny_llama.config))
    model.load_state_dict(tiny_llama.state_dict())
    layer = freeze(model).model.layers[0]
    merged = 4 // num_kv_heads
    for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
        heads = projection.weight.data.view(num_kv_heads, merged, 16, 64)
        projection.weight.data = heads[:, :1].expand(-1, merged, -1, -1).reshape(64, 64).clone()
    _, layer, passes = next(stream_layers(model, [torch.randint(3, 128, (2, 12))]))
    spec = AttentionSpec("gqa", num_kv_heads=num_kv_heads)
    weights = paper_start(layer, "attention", spec, torch.zeros(96))
    assert site_error(layer, passes, "attention", spec, weights) < 1e-10
