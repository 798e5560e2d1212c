"""Candidates and the choice among them, for every family: fits by their optimality, the choice on tokens held out."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from puzzle.blocks import candidates, starts
from puzzle.blocks.candidates import Draft, Seen
from puzzle.blocks.channels import contribution_order, obs_order
from puzzle.blocks.layer import captured_calls, layer_with, part_state
from puzzle.blocks.loss import local_loss
from puzzle.blocks.moments import ridge
from puzzle.blocks.nested import prefix
from puzzle.blocks.starts import Start, best_starts, paper_nested_start, paper_starts
from puzzle.data.batches import Batch
from puzzle.modeling import PuzzleForCausalLM
from puzzle.modeling.modeling_puzzle import PuzzleDecoderLayer
from puzzle.teacher import LayerPass, attention_delta, freeze
from puzzle.types import AttentionSpec, FfnSpec, Spec, part_of
from tests.blocks.conftest import layer_passes
from tests.tiny_families import OWN, make_kept, make_stock, make_tokens

LAYER = 2  # of four: sees a window in some families, has experts in one
GQA_2, GQA_1 = AttentionSpec("gqa", num_kv_heads=2), AttentionSpec("gqa", num_kv_heads=1)
WINDOW = AttentionSpec("window", window_tokens=3)
LINEAR_ATTENTION, LINEAR_FFN = AttentionSpec("linear"), FfnSpec("linear")
NARROW = FfnSpec("narrow", intermediate_size=20)
FITTED: list[Spec] = [GQA_2, GQA_1, WINDOW, LINEAR_ATTENTION, NARROW, LINEAR_FFN]


class Passes:
    """One layer's passes over some batches, computed anew each time; counts how often."""

    def __init__(self, model: PuzzleForCausalLM, batches: list[Tensor]) -> None:
        self.model, self.batches, self.times = model, batches, 0

    def __iter__(self) -> Iterator[LayerPass]:
        self.times += 1
        for ids in self.batches:
            with torch.no_grad():
                yield layer_passes(self.model, Batch(ids), LAYER + 1)[LAYER]


@functools.lru_cache
def model_of(family: str) -> PuzzleForCausalLM:
    return freeze(make_kept(make_stock(family, num_attention_heads=8, num_key_value_heads=4)))


def passes_of(family: str) -> tuple[PuzzleDecoderLayer, Passes, Passes]:
    """The layer, its passes over 40 calibration sequences, and those over 8 others."""
    model, ids = model_of(family), make_tokens(48, 16)
    return model.model.layers[LAYER], Passes(model, list(ids[:40].split(10))), Passes(model, list(ids[40:].split(4)))


def specs_of(family: str) -> list[Spec]:
    return [spec for spec in FITTED if family != "qwen3_moe" or spec.kind != "narrow"]


@functools.lru_cache
def starts_of(family: str) -> dict[Spec, Start]:
    return dict(best_starts(*_arguments(family)))


def _arguments(family: str) -> tuple[PuzzleDecoderLayer, list[Spec], Passes, Passes]:
    layer, calibration, held_out = passes_of(family)
    return layer, specs_of(family), calibration, held_out


def loss(layer: PuzzleDecoderLayer, spec: Spec, weights: dict[str, Tensor], passes: Passes, loss_at: str) -> float:
    variant = layer_with(layer, {part_of(spec): spec}, weights)
    with torch.no_grad():
        losses = [local_loss(variant, (part_of(spec),), one, loss_at).item() for one in passes]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("family", OWN)
def test_the_start_is_the_candidate_of_lowest_loss_on_tokens_held_out(family: str) -> None:
    layer, _, held_out = passes_of(family)
    found = starts_of(family)
    assert list(found) == specs_of(family)
    for spec, start in found.items():
        assert start.losses[start.name] == min(start.losses.values())
        assert start.losses[start.name] <= start.losses.get("paper", torch.inf)
        assert loss(layer, spec, start.weights, held_out, "layer") == pytest.approx(start.losses[start.name], rel=1e-4)


@pytest.mark.parametrize("family", OWN)
def test_fitting_helps_every_variant_of_every_family(family: str) -> None:
    layer, calibration, _ = passes_of(family)
    for spec, of_spec in all_candidates(family).items():
        fitted = [name for name in of_spec if name != "paper"]
        at = {name: loss(layer, spec, weights, calibration, "site") for name, weights in of_spec.items()}
        assert all(at[name] < at.get("paper", 1.0) for name in fitted), (spec, at)


@functools.lru_cache
def all_candidates(family: str) -> dict[Spec, dict[str, dict[str, Tensor]]]:
    layer, specs, calibration, _ = _arguments(family)
    with torch.no_grad():
        seen = starts.look(layer, {"attention", "ffn"}, calibration)
        drafts = {spec: candidates.drafts(seen[part_of(spec)], spec) for spec in specs}
        return starts.refitted(layer, drafts, calibration)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])  # biases on every matrix; norms behind the blocks
@pytest.mark.parametrize("spec", FITTED)
def test_no_small_step_away_from_a_fit_improves_it(family: str, spec: Spec) -> None:
    """Each fit is the minimum over its last matrix, but for what the ridge holds back."""
    layer, calibration, _ = passes_of(family)
    generator = torch.Generator().manual_seed(0)
    for name, weights in all_candidates(family)[spec].items():
        if name == "paper":
            continue
        (last,) = (
            one
            for one in weights
            if one.split(".")[1] in ("o_proj", "down_proj", "linear_attn", "linear_mlp") and one.endswith("weight")
        )
        best = squared_error(layer, spec, weights, calibration)
        for _ in range(3):
            step = torch.randn(weights[last].shape, generator=generator) * weights[last].std() * 0.1
            assert squared_error(layer, spec, {**weights, last: weights[last] + step}, calibration) > best


def squared_error(layer: PuzzleDecoderLayer, spec: Spec, weights: dict[str, Tensor], passes: Passes) -> float:
    """What a fit minimises: the error of the block's output relative to its size, token by token where a norm follows
    (only a linear variant is fitted behind it)."""
    part = part_of(spec)
    variant, total = layer_with(layer, {part: spec}, weights), 0.0
    block = "self_attn" if part == "attention" else "mlp"
    for one in passes:
        with torch.no_grad(), outputs_of(getattr(variant, block)) as ours, outputs_of(getattr(layer, block)) as theirs:
            deltas = [
                attention_delta(each, one.before, one.context) if part == "attention" else each.ffn_delta(one.middle)
                for each in (variant, layer)
            ]
        found, wanted = (ours[0], theirs[0]) if spec.kind != "linear" else deltas
        error = (found - wanted)[:, 1:].square()
        normed = spec.kind != "linear" and layer.post_norm_of(part) is not None
        total += (error / wanted[:, 1:].square().mean(-1, keepdim=True) if normed else error).sum().item()
    return total


class outputs_of:
    """Collects what a module returns."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module, self.found = module, []

    def __enter__(self) -> list[Tensor]:
        def keep(_: object, __: object, output: object) -> None:
            self.found.append(output[0] if isinstance(output, tuple) else output)

        self.handle = self.module.register_forward_hook(keep)
        return self.found

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def test_calibration_is_run_once_for_the_teacher_and_once_for_what_sees_something_else() -> None:
    layer, calibration, held_out = passes_of("llama")
    found = best_starts(layer, [NARROW, LINEAR_FFN, LINEAR_ATTENTION], calibration, held_out, ("layer", "mse"))
    assert len(list(found)) == 3 and calibration.times == 1 and held_out.times == 3
    layer, calibration, held_out = passes_of("llama")
    list(best_starts(layer, [NARROW, GQA_1, GQA_2, WINDOW], calibration, held_out, ("site", "mse")))
    assert calibration.times == 2 and held_out.times == 4


def test_channels_are_cut_by_contribution_and_by_obs() -> None:
    layer, calibration, _ = passes_of("llama")
    found, state = all_candidates("llama")[NARROW], part_state(layer, "ffn")
    down = layer.mlp.down_proj
    with captured_calls(down) as seen, torch.no_grad():
        for one in calibration:
            layer.ffn_delta(one.middle)
    activations = torch.cat([inputs for inputs, _ in seen])[:, 1:].flatten(0, 1).double()
    kept = contribution_order(activations.abs().sum(0), down.weight)[:20].sort().values
    for name in ("paper", "refit"):
        assert torch.equal(found[name]["mlp.up_proj.weight"], state["mlp.up_proj.weight"][kept])
        assert torch.equal(found[name]["mlp.gate_proj.bias"], state["mlp.gate_proj.bias"][kept])
        assert torch.equal(found[name]["mlp.down_proj.bias"], state["mlp.down_proj.bias"])
    assert torch.equal(found["paper"]["mlp.down_proj.weight"], state["mlp.down_proj.weight"][:, kept])
    order = obs_order(activations.T @ activations, down.weight, ridge(40, len(activations)))
    assert torch.equal(found["obs"]["mlp.gate_proj.weight"], state["mlp.gate_proj.weight"][order[:20].sort().values])


def test_the_experts_that_count_are_kept_with_their_router_rows() -> None:
    """Every token goes to 1 or 3, and half of them to 4 as well; what else a token goes to hardly counts."""
    model = copy.deepcopy(model_of("qwen3_moe"))
    mlp, generator = model.model.layers[LAYER].mlp, torch.Generator().manual_seed(0)
    with torch.no_grad():
        way, other = torch.randn(2, mlp.gate.weight.shape[1], generator=generator)
        mlp.gate.weight.zero_()
        mlp.gate.weight[1], mlp.gate.weight[3], mlp.gate.weight[4] = 5 * way, -5 * way, 3 * other
    ids, spec = make_tokens(48, 16), FfnSpec("experts", num_experts=3, num_active_experts=2)
    calibration, held_out = Passes(model, list(ids[:40].split(10))), Passes(model, list(ids[40:].split(4)))
    ((_, start),) = best_starts(model.model.layers[LAYER], [spec], calibration, held_out)
    state = part_state(model.model.layers[LAYER], "ffn")
    for name in ("mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"):
        assert torch.equal(start.weights[name], state[name][[1, 3, 4]])
    assert start.losses["reap"] < 0.001  # of other triples the best has 0.005


def test_every_prefix_of_a_nested_ffn_in_the_papers_order_is_the_papers_start() -> None:
    layer, calibration, _ = passes_of("llama")
    nested = paper_nested_start(layer, 32, calibration)
    one = next(iter(calibration))
    for width in (8, 20, 32):
        spec = FfnSpec("narrow", intermediate_size=width)
        ((_, start),) = paper_starts(layer, [spec], calibration)
        found, expected = (
            layer_with(layer, {"ffn": spec}, weights).ffn_delta(one.middle)
            for weights in (prefix(nested, width), start.weights)
        )
        torch.testing.assert_close(found, expected)


def test_a_linear_attention_begins_as_attending_to_oneself() -> None:
    layer, calibration, _ = passes_of("mistral")
    weights = all_candidates("mistral")[LINEAR_ATTENTION]["paper"]
    one = next(iter(calibration))
    first = {kind: (cos[:, :1], sin[:, :1]) for kind, (cos, sin) in one.context.position.items()}
    teacher = layer.attention_delta(one.before[:, :1], first)  # the first token can attend to nothing but itself
    variant = layer_with(layer, {"attention": LINEAR_ATTENTION}, weights)
    assert torch.allclose(variant.attention_delta(one.before[:, :1], None), teacher, atol=1e-5)


def test_keep_is_the_teacher_and_skip_is_nothing() -> None:
    layer, calibration, held_out = passes_of("qwen3")
    specs: list[Spec] = [
        AttentionSpec("keep", window_tokens=6),
        AttentionSpec("skip"),
        FfnSpec("keep"),
        FfnSpec("skip"),
    ]
    found = dict(best_starts(layer, specs, calibration, held_out, ("site", "mse")))
    assert [start.name for start in found.values()] == ["teacher", "nothing"] * 2
    losses = [start.losses[start.name] for start in found.values()]
    assert losses == pytest.approx([0, 1, 0, 1], abs=1e-6)
    assert found[FfnSpec("skip")].weights == {}
    assert all(torch.equal(found[FfnSpec("keep")].weights[name], one) for name, one in part_state(layer, "ffn").items())


def test_a_candidate_that_is_not_finite_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    original = candidates.CANDIDATES["linear"]

    def broken(seen: Seen, spec: Spec) -> dict[str, Draft]:
        good = next(iter(original(seen, spec).values()))
        return {"broken": Draft({name: tensor * torch.nan for name, tensor in good.weights.items()}), "good": good}

    layer, calibration, held_out = passes_of("mistral")
    monkeypatch.setattr(candidates, "CANDIDATES", {"linear": broken})
    ((_, start),) = best_starts(layer, [LINEAR_FFN], calibration, held_out, ("layer", "mse"))
    assert start.name == "good"


def test_an_equal_choice_of_specs_gives_equal_starts() -> None:
    """Nothing of one variant depends on which others are asked for."""
    layer, calibration, held_out = passes_of("qwen2")
    ((_, alone),) = best_starts(layer, [GQA_1], calibration, held_out, ("layer", "mse"))
    together = starts_of("qwen2")[GQA_1]
    assert alone.losses == together.losses
    assert all(torch.equal(alone.weights[name], tensor) for name, tensor in together.weights.items())
