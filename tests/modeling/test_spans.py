"""What attention sees: masks with windows, sinks and documents, whichever kernel is in use and whoever makes them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from puzzle.modeling import FAMILIES, PuzzleConfig, PuzzleForCausalLM, local_causal_mask
from puzzle.modeling.configuration_puzzle import Span
from puzzle.modeling.spans_puzzle import SpanSlot
from tests.tiny_families import make_kept, make_stock, make_student, make_tokens

CPU = torch.device("cpu")
KEEP = {"kind": "keep"}
SINKS = {"kind": "window", "window_tokens": 3, "sink_tokens": 2}
WINDOW = {"kind": "window", "window_tokens": 4}


def windowed(family: str, *attention: dict[str, Any]) -> PuzzleForCausalLM:
    blocks = [{"attention": dict(kind), "ffn": dict(KEEP)} for kind in attention]
    return make_student(make_stock(family, num_hidden_layers=len(blocks), layer_types=None, mlp_only_layers=[]), blocks)


def sees(query: int, key: int, span: Span, document: list[int] | None) -> bool:
    window, sinks = span
    begin = 0
    if document is not None:
        if document[query] != document[key]:
            return False
        begin = document.index(document[query])
    return key <= query and (window is None or key > query - window or key < begin + sinks)


@pytest.mark.parametrize("span", [(None, 0), (1, 0), (3, 0), (3, 2), (4, 1), (20, 3)])
@pytest.mark.parametrize("documents", [None, [[0] * 9, [0, 0, 1, 1, 1, 1, 1, 2, 3]], [[5, 5, 4, 4, 4, 4, 4, 4, 4]]])
def test_the_mask_is_true_where_a_token_sees(span: Span, documents: list[list[int]] | None) -> None:
    mask = local_causal_mask(9, span, CPU, None if documents is None else torch.tensor(documents))
    rows = documents or [None]
    expected = [[[sees(query, key, span, row) for key in range(9)] for query in range(9)] for row in rows]
    assert mask.dtype == torch.bool and mask.tolist() == [[one] for one in expected]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_documents_do_not_see_each_other(family: str) -> None:
    """Given masks by span, with positions that begin anew, the model computes each document as if it were alone."""
    model, tokens = windowed(family, KEEP, SINKS, WINDOW, KEEP), make_tokens(2, 16)
    lengths = (7, 9)
    documents = torch.tensor([[0] * 7 + [1] * 9] * 2)
    masks = {span: local_causal_mask(16, span, CPU, documents) for span in model.model.slots}
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    together = model(tokens, attention_mask=masks, position_ids=positions, use_cache=False).logits
    apart = torch.cat([model(part, use_cache=False).logits for part in tokens.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(together, apart, rtol=0, atol=2e-5)
    model.set_attn_implementation("eager")  # which would take bools for numbers to add
    together = model(tokens, attention_mask=masks, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(together, apart, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_documents_are_found_by_their_positions(family: str) -> None:
    """Transformers' convention for packed sequences."""
    model, tokens, lengths = windowed(family, KEEP, WINDOW), make_tokens(2, 16), (7, 9)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    together = model(tokens, position_ids=positions, use_cache=False).logits
    apart = torch.cat([model(part, use_cache=False).logits for part in tokens.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(together, apart, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_backend_keeps_the_windows(family: str) -> None:
    model, tokens = windowed(family, KEEP, SINKS, WINDOW, KEEP), make_tokens(2, 16)
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    before = model(tokens, attention_mask=mask).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(tokens, attention_mask=mask).logits[mask.bool()], before[mask.bool()])


@pytest.mark.filterwarnings("ignore")  # of torch, about how transformers calls it
@torch.no_grad()
def test_flex_attention_keeps_the_windows() -> None:
    model, tokens = windowed("gemma3_text", KEEP, SINKS, WINDOW, KEEP), make_tokens(2, 16)
    before = model(tokens).logits
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(model(tokens).logits, before, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_kernels_that_take_no_mask_are_told_the_window(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As flash attention is: transformers gives it no mask, so the window must come along on its own."""
    told = []

    def kernel(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, sliding_window: Any = None, **kwargs: Any
    ) -> Any:
        assert mask is None
        told.append(sliding_window)
        visible = local_causal_mask(query.shape[2], (sliding_window, 0), query.device)
        return sdpa_attention_forward(module, query, key, value, visible, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "probed_flash", kernel)
    model, tokens = windowed(family, KEEP, WINDOW, KEEP), make_tokens(2, 16)
    expected = model(tokens).logits
    model.config._attn_implementation_internal = "probed_flash"
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=2e-5)
    assert told == [window for window, _ in model.model.slots]
    hidden = model.model.embed_tokens(tokens)
    model.model.layers[1].attention_delta(hidden, model.model.rotary(hidden, torch.arange(16)[None]))
    assert told[-1] == 4
    with_sinks = windowed(family, KEEP, SINKS)
    with_sinks.config._attn_implementation_internal = "probed_flash"
    with pytest.raises(ValueError, match="probed_flash cannot keep first tokens visible"):
        with_sinks(tokens)


@torch.no_grad()
def test_a_layer_alone_says_when_it_needs_a_mask() -> None:
    model = windowed("llama", WINDOW, KEEP)
    hidden = model.model.embed_tokens(make_tokens(2, 8))
    rotary = model.model.rotary(hidden, torch.arange(8)[None])
    layer = model.model.layers[0]
    delta = layer.attention_delta(hidden, rotary)
    mask = local_causal_mask(8, (4, 0), CPU)
    assert torch.equal(delta, layer.attention_delta(hidden, rotary, {(4, 0): mask, (None, 0): None}))
    assert torch.equal(delta, layer.attention_delta(hidden, rotary, mask))
    with pytest.raises(ValueError, match="layer 0: a window on top of a cache, or with sinks, needs a mask"):
        layer.attention_delta(hidden, rotary, past_key_values=model.model.new_cache())
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="layer 0: attention 'flex_attention' is not causal without a mask"):
        layer.attention_delta(hidden, rotary)


def test_what_would_ignore_the_windows_is_refused() -> None:
    model, tokens = windowed("llama", WINDOW, KEEP), make_tokens(1, 6)
    with pytest.raises(ValueError, match="continuous batching is not available"):
        model(tokens, cache=object())
    assert not getattr(model, "supports_context_parallel", False)


def test_masks_made_under_inference_mode_serve_training() -> None:
    model = windowed("llama", {"kind": "window", "window_tokens": 5})
    hidden = model.model.embed_tokens(make_tokens(1, 11)).detach()
    rotary = model.model.rotary(hidden, torch.arange(11)[None])
    with torch.inference_mode():
        model.model.layers[0].attention_delta(hidden, rotary)
    model.model.layers[0].attention_delta(hidden, rotary).sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copied_model_reads_its_own_config(family: str) -> None:
    model = make_kept(make_stock(family))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.set_attn_implementation("eager")
        layer = twin.model.layers[1]
        assert layer.self_attn.config._attn_implementation == "eager"
        assert layer.self_attn.config.shared is twin.config
    assert model.model.layers[1].self_attn.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_each_slot_keeps_what_its_window_needs() -> None:
    model = windowed("qwen3", {"kind": "skip"}, WINDOW, KEEP, SINKS, {"kind": "gqa", "num_kv_heads": 1})
    assert model.model.slots == ((4, 0), (None, 0), (3, 2), (None, 0))
    own = model(make_tokens(2, 9), use_cache=True).past_key_values
    assert [slot.keys.shape[1:3] for slot in own.layers] == [(2, 3), (2, 9), (2, 4), (1, 9)]
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    generated = model.generate(make_tokens(2, 9), **options)  # type: ignore[arg-type]
    assert [slot.keys.shape[2] for slot in generated.past_key_values.layers] == [3, 11, 4, 11]


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_every_way_of_generating_gives_the_same(family: str) -> None:
    """Chunked prefill, beams, prompt lookup, a conversation that goes on, a compiled step."""
    model, tokens = (
        windowed(family, {"kind": "skip"}, WINDOW, {"kind": "gqa", "num_kv_heads": 1}, SINKS),
        make_tokens(2, 11),
    )

    def generate(given: Tensor = tokens, **options: Any) -> Tensor:
        found: Tensor = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=8, do_sample=False, **options
        )
        return found

    expected = generate(use_cache=False)
    begun = model.model.new_cache()
    model.generate(tokens[:, :6], past_key_values=begun, max_new_tokens=1, do_sample=False)
    compiled = CompileConfig(backend="eager", fullgraph=True, mode=None)
    compiled._compile_all_devices = True
    for options in (
        {"prefill_chunk_size": 4},
        {"prefill_chunk_size": 4, "cache_implementation": "static"},
        {"cache_implementation": "static", "compile_config": compiled},
        {"past_key_values": begun},
    ):
        assert torch.equal(generate(**options), expected), options
    assert torch.equal(generate(num_beams=3), generate(num_beams=3, use_cache=False))
    if hasattr(DynamicSlidingWindowLayer, "activate_past_recording"):  # older releases fail with any window
        assert torch.equal(generate(tokens[:1], prompt_lookup_num_tokens=2), expected[:1])


@pytest.mark.parametrize("chunk", [1, 2, 4, 20])
@torch.no_grad()
def test_sinks_lie_behind_the_padding_however_it_comes(chunk: int) -> None:
    """Padding of several chunks: its end, and so the sinks, show only when the last row has begun."""
    model, tokens, num_padding = windowed("qwen3", SINKS, KEEP, SINKS), make_tokens(3, 20), (0, 9, 4)
    mask = torch.ones_like(tokens)
    for row, count in enumerate(num_padding):
        mask[row, :count] = 0
    positions, cache, parts = (mask.cumsum(-1) - 1).clamp(min=0), model.model.new_cache(), []
    for start in range(0, 20, chunk):
        part = slice(start, start + chunk)
        output = model(
            tokens[:, part],
            attention_mask=mask[:, : start + chunk],
            position_ids=positions[:, part],
            past_key_values=cache,
            use_cache=True,
        )
        parts.append(output.logits)
    found = torch.cat(parts, dim=1)
    for row, count in enumerate(num_padding):
        alone = model(tokens[row : row + 1, count:], use_cache=False).logits[0]
        torch.testing.assert_close(found[row, count:], alone, rtol=0, atol=2e-5)
    assert [slot.keys.shape[2] for slot in cache.layers] == [2 + 9 + 2, 20, 2 + 9 + 2]


def test_a_slot_gives_back_what_was_added_and_starts_anew() -> None:
    slot, states = SpanSlot((3, 1)), torch.arange(12.0).view(1, 1, 12, 1)
    slot.update(states[:, :, :3], states[:, :, :3])
    slot.crop(-1)
    assert slot.get_seq_length() == 2
    held, _ = slot.update(states[:, :, 2:9], states[:, :, 2:9])
    assert held.flatten().tolist() == list(range(9)) and slot.keys.flatten().tolist() == [0, 7, 8] and slot.gap == 6
    with pytest.raises(ValueError, match="cannot be brought back"):
        slot.crop(-1)
    slot.activate_past_recording()
    slot.update(states[:, :, 9:], states[:, :, 9:])
    slot.crop(10)  # as releases before 5.23 ask for it
    assert slot.keys.flatten().tolist() == [0, 7, 8, 9] and slot.get_seq_length() == 10
    slot.reset()
    assert slot.get_seq_length() == 0 and not slot.is_initialized


def test_experts_kernels_can_be_chosen() -> None:
    model, tokens = make_kept(make_stock("qwen3_moe")), make_tokens(2, 9)
    assert model.config._experts_implementation == "grouped_mm"  # transformers' own default
    expected = model(tokens).logits
    expected.sum().backward()
    grad = model.model.layers[0].mlp.experts.gate_up_proj.grad.clone()
    assert bool(grad.any()) and bool(model.model.layers[0].mlp.gate.weight.grad.any())
    for implementation in ("eager", "batched_mm"):
        model.zero_grad()
        model.set_experts_implementation(implementation)
        assert model.model.layers[0].mlp.experts.config._experts_implementation == implementation
        found = model(tokens).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
        found.sum().backward()
        torch.testing.assert_close(model.model.layers[0].mlp.experts.gate_up_proj.grad, grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_models_are_initialised_as_the_stock_ones(family: str) -> None:
    """Nothing is left as it was found in memory; norms do nothing; what is not saved with the weights is there."""
    stock = make_stock(family, tie_word_embeddings=False)
    model = PuzzleForCausalLM(PuzzleConfig.from_family(stock.config))
    for name, tensor in model.state_dict().items():
        assert bool(tensor.isfinite().all())
        if name.endswith("norm.weight"):
            assert bool((tensor == (0 if family == "gemma3_text" else 1)).all())
        elif name.endswith(".weight") or ".experts." in name:
            assert 0.15 < float(tensor.std()) < 0.25, name
    with torch.device("meta"):
        empty = PuzzleForCausalLM(model.config)
    empty.to_empty(device="cpu")
    for module in empty.modules():
        empty._init_weights(module)
    found, expected = dict(empty.named_buffers()), dict(model.named_buffers())
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)
