"""Pruned layers and models against slow and obvious ones: tensors picked index by index, transformers' own forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from puzzle.blocks.prune import Kept, choose_heads, folded, pruned_ends, pruned_layer, student_config
from puzzle.blocks.refit import SideBySide
from puzzle.checkpoint import read_shape
from puzzle.data.batches import Batch
from puzzle.modeling import PuzzleForCausalLM
from puzzle.teacher import Teacher, layers_of
from puzzle.types import ModelShape
from puzzle.variants import model_params
from tests.exporting import export_hf
from tests.tiny_families import COMMON, OWN, make_kept, make_stock, make_tokens, shape_of

LAYERS = (0, 2, 3)
HIDDEN = [i for i in range(48) if i % 3]  # 32 of 48
CHANNELS = [i for i in range(40) if i % 5 < 3]  # 24 of 40
HEADS, KV_HEADS = [1, 3], [0, 1]  # one head of each of two groups
GROUP_HEADS, GROUP_KV = [2, 3], [1]  # one whole group


def kept_of(family: str, heads: Sequence[int], kv_heads: Sequence[int]) -> Kept:
    channels = None if family == "qwen3_moe" else torch.tensor(CHANNELS)
    return Kept(torch.tensor(HIDDEN), torch.tensor(heads), torch.tensor(kv_heads), channels)


def shape_for(shape: ModelShape, kept: Kept) -> ModelShape:
    assert kept.hidden is not None and kept.heads is not None and kept.kv_heads is not None
    width = shape.intermediate_size if kept.channels is None else len(kept.channels)
    return replace(
        shape,
        num_layers=len(LAYERS),
        hidden_size=len(kept.hidden),
        num_attention_heads=len(kept.heads),
        num_kv_heads=len(kept.kv_heads),
        intermediate_size=width,
        windows=(),
        moe_layers=(),
    )


def pruned_model(teacher: PuzzleForCausalLM, shape: ModelShape, kept: Kept) -> PuzzleForCausalLM:
    config = student_config(teacher.config, shape_for(shape, kept), LAYERS)
    state: dict[str, Tensor] = {}
    for place, layer in enumerate(LAYERS):
        own = pruned_layer(layers_of(teacher)[layer], config, place, kept)
        state |= {f"model.layers.{place}.{name}": tensor for name, tensor in own.state_dict().items()}
    rest = {name: tensor for name, tensor in teacher.state_dict().items() if not name.startswith("model.layers.")}
    if config.tie_word_embeddings:
        rest.pop("lm_head.weight")
    state |= pruned_ends(rest, teacher.config, config, kept)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    student = PuzzleForCausalLM(config).eval()
    student.load_state_dict(state, strict=True)
    return student


def rows(tensor: Tensor, picked: Sequence[int], size: int = 1) -> Tensor:
    """Some of the rows; those of whole heads where ``size`` is a head's."""
    return torch.stack([tensor[index * size + offset] for index in picked for offset in range(size)])


def columns(tensor: Tensor, picked: Sequence[int], size: int = 1) -> Tensor:
    return rows(tensor.T, picked, size).T


def reference(stock: PreTrainedModel, family: str, heads: Sequence[int], kv_heads: Sequence[int]) -> PreTrainedModel:
    """Transformers' own model of the small sizes, its tensors picked by hand."""
    head_dim = getattr(stock.config, "head_dim", None) or 48 // 4
    fields: dict[str, Any] = {**COMMON, **OWN[family], "hidden_size": 32, "head_dim": head_dim}
    fields |= {"num_attention_heads": len(heads), "num_key_value_heads": len(kv_heads), "num_hidden_layers": 3}
    fields["rms_norm_eps"] = stock.config.rms_norm_eps * 48 / 32
    if getattr(stock.config, "layer_types", None) is not None:
        fields["layer_types"] = [stock.config.layer_types[layer] for layer in LAYERS]
    if family == "qwen3_moe":
        fields["mlp_only_layers"] = []  # layer 1 is not there
    else:
        fields["intermediate_size"] = len(CHANNELS)
    model: Any = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**fields), attn_implementation="sdpa")
    gemma, factor = family == "gemma3_text", (48 / 32) ** 0.5
    state: dict[str, Tensor] = {}
    for name, tensor in stock.state_dict().items():
        parts = name.split(".")
        if "layers" in parts:
            if int(parts[2]) not in LAYERS:
                continue
            parts[2] = str(LAYERS.index(int(parts[2])))
        last, kind = ".".join(parts[-2:]), parts[-2]
        if kind in ("q_norm", "k_norm"):
            new = tensor
        elif kind.endswith("norm"):
            new = rows(tensor, HIDDEN)
            new = (1 + new) * factor - 1 if gemma else new * factor
        elif last in ("embed_tokens.weight", "lm_head.weight", "gate.weight"):
            new = columns(tensor, HIDDEN)
        elif kind in ("q_proj", "k_proj", "v_proj"):
            new = rows(tensor, heads if kind == "q_proj" else kv_heads, head_dim)
            new = columns(new, HIDDEN) if last.endswith("weight") else new
        elif kind == "o_proj":
            new = rows(tensor, HIDDEN)
            new = columns(new, heads, head_dim) if last.endswith("weight") else new
        elif last == "experts.gate_up_proj":
            new = torch.stack([columns(one, HIDDEN) for one in tensor])
        elif last == "experts.down_proj":
            new = torch.stack([rows(one, HIDDEN) for one in tensor])
        elif kind in ("gate_proj", "up_proj"):
            new = rows(tensor, CHANNELS)
            new = columns(new, HIDDEN) if last.endswith("weight") else new
        else:
            assert kind == "down_proj"
            new = rows(tensor, HIDDEN)
            new = columns(new, CHANNELS) if last.endswith("weight") else new
        state[".".join(parts)] = new
    if gemma:  # its embedding is scaled by the root of the hidden size, and its head is the embedding
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            state[name] = state[name] * factor
        state["model.norm.weight"] = (1 + state["model.norm.weight"]) / factor - 1
    model.load_state_dict(state, strict=True)
    found: PreTrainedModel = model.eval()
    return found


@pytest.mark.parametrize("heads", [(HEADS, KV_HEADS), (GROUP_HEADS, GROUP_KV)], ids=["within groups", "whole groups"])
@pytest.mark.parametrize("family", OWN)
def test_a_pruned_student_is_what_index_by_index_gives(
    family: str, heads: tuple[list[int], list[int]], tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    """In memory and, once a family, as a stranger loads it from a plain checkpoint."""
    stock = make_stock(family)
    student = pruned_model(make_kept(stock), shape_of(stock), kept_of(family, *heads))
    tokens = make_tokens(2, 12)
    with torch.no_grad():
        expected = reference(stock, family, *heads)(tokens).logits
        assert torch.allclose(student(tokens).logits, expected, atol=1e-4)
        if heads == (HEADS, KV_HEADS):
            return
        export_hf(student, tiny_tokenizer_dir, tmp_path / "out")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        assert torch.allclose(loaded(tokens).logits, expected, atol=1e-4)
    shape = read_shape(tmp_path / "out")
    assert shape.family == family
    assert (shape.hidden_size, shape.num_layers, shape.num_attention_heads) == (32, 3, 2)
    assert model_params(shape) == sum(parameter.numel() for parameter in student.parameters())


def silence(stock: PreTrainedModel, kept: Kept) -> None:
    """Makes what is not kept zero: channels of the stream, of the FFNs, heads' outputs; drops nothing else."""
    assert kept.hidden is not None and kept.heads is not None
    gone = [i for i in range(48) if i not in kept.hidden.tolist()]
    idle = [] if kept.channels is None else [i for i in range(40) if i not in kept.channels.tolist()]
    head_dim = getattr(stock.config, "head_dim", None) or 12
    deaf = [h * head_dim + i for h in range(4) if h not in kept.heads.tolist() for i in range(head_dim)]
    gemma = stock.config.model_type == "gemma3_text"
    with torch.no_grad():
        for name, tensor in stock.named_parameters():
            if name.endswith("embed_tokens.weight"):
                tensor[:, gone] = 0
            elif "o_proj" in name or "mlp.down_proj" in name:
                tensor[gone] = 0
                if name.endswith("weight"):
                    tensor[:, deaf if "o_proj" in name else idle] = 0
            elif name.endswith("experts.down_proj"):
                tensor[:, gone] = 0
            elif gemma and ("post_attention" in name or "post_feedforward" in name):
                tensor[gone] = -1


@pytest.mark.parametrize("family", OWN)
def test_what_is_zero_can_go_and_a_refit_changes_nothing_then(family: str, tmp_path: Path) -> None:
    """Layers that add nothing may go, too: here all stay but for their silent channels."""
    stock = make_stock(family)
    kept = kept_of(family, HEADS, KV_HEADS)
    silence(stock, kept)
    stock.save_pretrained(tmp_path)
    teacher = Teacher(tmp_path, torch.device("cpu"), torch.float32)
    shape = replace(shape_for(shape_of(stock), kept), num_layers=4)
    config = student_config(teacher.config, shape, range(4))
    tokens = make_tokens(6, 24)
    both = SideBySide(teacher, [Batch(part) for part in tokens.split(2)], kept.hidden)
    cut, refitted = dict[str, Tensor](), dict[str, Tensor]()
    for index in range(4):
        layer = pruned_layer(teacher.layer(index), config, index, kept)
        cut |= {f"model.layers.{index}.{name}": tensor.clone() for name, tensor in layer.state_dict().items()}
        both.enter(teacher.layer(index))
        both.refit(layer, teacher.layer(index), kept)
        refitted |= {f"model.layers.{index}.{name}": tensor for name, tensor in layer.state_dict().items()}
    rest = {name: one for name, one in make_kept(stock).state_dict().items() if not name.startswith("model.layers.")}
    tied = config.tie_word_embeddings
    ends = pruned_ends({n: t for n, t in rest.items() if not (tied and "lm_head" in n)}, teacher.config, config, kept)
    student = PuzzleForCausalLM(config).eval()
    norm = student.model.norm
    norm.load_state_dict({"weight": ends["model.norm.weight"]})
    with torch.no_grad():
        expected = stock(tokens).logits
        for state, last in ((cut, ends), (refitted, both.refit_ends(ends, norm.requires_grad_(False)))):
            head = {"lm_head.weight": last["model.embed_tokens.weight"]} if tied else {}
            student.load_state_dict({**state, **last, **head}, strict=True)
            assert torch.allclose(student(tokens).logits, expected, atol=1e-4 * expected.abs().max().item())


def test_groups_are_chosen_by_their_best_heads() -> None:
    shape = ModelShape("llama", 1, 64, 8, 4, 8, 96, 128, 256, tied_embeddings=True)
    scores = torch.tensor([1.0, 9, 2, 2, 7, 1, 0, 3])
    kept = choose_heads(scores, shape, replace(shape, num_attention_heads=2, num_kv_heads=2))
    assert kept.heads is not None and kept.kv_heads is not None
    assert kept.heads.tolist() == [1, 4]
    assert kept.kv_heads.tolist() == [0, 2]
    kept = choose_heads(scores, shape, replace(shape, num_attention_heads=4, num_kv_heads=2))
    assert kept.heads is not None
    assert kept.heads.tolist() == [0, 1, 4, 5]
    assert choose_heads(scores, shape, shape) == Kept()


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_heads_that_go_are_folded_as_in_the_paper(kv_heads: int) -> None:
    """Ranked 2, 0, 3, 1 with two that stay: 0 gets 3, 2 gets 1; under GQA of the queries alone."""
    torch.manual_seed(0)
    state = {f"self_attn.{one}_proj.weight": torch.randn(3 * (4 if one == "q" else kv_heads), 5) for one in "qkv"}
    found = folded(state, torch.tensor([0, 2]), torch.tensor([2, 0, 3, 1]), 3)
    assert set(found) == {f"self_attn.{one}_proj.weight" for one in ("qkv" if kv_heads == 4 else "q")}
    for name, tensor in found.items():
        old, new = state[name].unflatten(0, (-1, 3)), tensor.unflatten(0, (-1, 3))
        assert torch.equal(new[0], 2 * old[0] - old[3])
        assert torch.equal(new[2], 2 * old[2] - old[1])
