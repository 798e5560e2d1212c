"""Loads a teacher as a puzzle model with every block kept, and runs it layer by layer.

Reads a Hugging Face folder; computes the residual stream between layers, which distillation, scoring and evaluation
work on. Shapes: ids (B, T) int64; hidden states (B, T, D); ``position`` the rotary (cos, sin), each (1, T, head_dim).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from puzzle.checkpoint import weight_files
from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM
from puzzle.modeling.modeling_puzzle import PuzzleDecoderLayer
from puzzle.types import ConfigError, CorruptFileError

Position = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Compute:
    """Where and how to compute. Weights are held in fp32; training runs under bf16 autocast where ``bf16`` is set."""

    device: torch.device
    bf16: bool

    @classmethod
    def choose(cls, device: str, dtype: str) -> Compute:
        """``auto`` takes CUDA, then MPS, then CPU, and bf16 where the device multiplies it faster than fp32."""
        name = device if device != "auto" else _best_device()
        if (name == "cuda" and not torch.cuda.is_available()) or (name == "mps" and not torch.mps.is_available()):
            raise ConfigError(f"device: {name} is not available here; use --device cpu or auto")
        return cls(torch.device(name), dtype == "bf16" or (dtype == "auto" and _fast_bf16(name)))

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if not self.bf16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu"


def _fast_bf16(device: str) -> bool:
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    if device == "cpu":
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("amx_tile"))
    return False


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CorruptFileError(f"{path}: unreadable ({error}); make or fetch it again") from None


def load_config(folder: Path) -> PuzzleConfig:
    """The configuration in ``folder``, a family's as one that keeps every block."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # every family's configuration class refuses in its own way
        raise ConfigError(
            f"{folder / 'config.json'}: refused by transformers ({' '.join(str(error).split())})"
        ) from None
    config = config if isinstance(config, PuzzleConfig) else PuzzleConfig.from_family(config)
    config._attn_implementation = "sdpa"  # standalone layers need a causal kernel
    return config


def load_model(folder: Path, compute: Compute) -> PuzzleForCausalLM:
    """The model in ``folder``, frozen, in fp32 on the device: a family's checkpoint with every block kept."""
    config = load_config(folder)
    state: dict[str, Tensor] = {}
    for file in weight_files(folder):
        state.update(read_tensors(file))
    model = PuzzleForCausalLM(config)
    if config.tie_word_embeddings:
        state.setdefault("lm_head.weight", state.get("model.embed_tokens.weight", torch.empty(0)))
    load_state(model, {name: tensor.float() for name, tensor in state.items()}, str(folder))
    return freeze(nn.Module.to(model, compute.device))


def load_state(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """``load_state_dict`` that says in one line what is missing, superfluous or of another shape."""
    try:
        missing, unexpected = module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise CorruptFileError(f"{source}: {' '.join(str(error).split())[:300]}") from None
    unexpected = [name for name in unexpected if "rotary_emb" not in name]  # buffers that old checkpoints carry
    if missing or unexpected:
        named = f"missing {missing[:3]}" if missing else f"unexpected {unexpected[:3]}"
        raise CorruptFileError(f"{source}: the tensors do not fit the configuration ({named})")


def freeze(model: PuzzleForCausalLM) -> PuzzleForCausalLM:
    model.requires_grad_(False)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizer libraries raise all sorts; all mean the same to the user
        raise ConfigError(f"{folder}: no usable tokenizer ({type(error).__name__}: {error})".splitlines()[0]) from None


def embed(model: PuzzleForCausalLM, ids: Tensor) -> tuple[Tensor, Position]:
    """The residual stream at the first layer's input, and the rotary tables for its positions."""
    hidden = model.model.embed_tokens(ids)
    positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    return hidden, model.model.rotary_emb(hidden, positions)


def layers_of(model: PuzzleForCausalLM) -> list[PuzzleDecoderLayer]:
    return list(model.model.layers)


@dataclass(frozen=True)
class LayerPass:
    """One layer's pass over one batch: input, after attention, output; each (B, T, D)."""

    before: Tensor
    middle: Tensor
    after: Tensor
    position: Position


def run_layer(layer: PuzzleDecoderLayer, hidden: Tensor, position: Position) -> LayerPass:
    middle = hidden + layer.attention_delta(hidden, position)
    return LayerPass(hidden, middle, middle + layer.ffn_delta(middle), position)


def run_layers(model: PuzzleForCausalLM, ids: Tensor, num_layers: int) -> list[LayerPass]:
    """The passes of the first ``num_layers`` layers over one batch."""
    hidden, position = embed(model, ids)
    passes: list[LayerPass] = []
    for layer in layers_of(model)[:num_layers]:
        passes.append(run_layer(layer, passes[-1].after if passes else hidden, position))
    return passes


@torch.no_grad()
def stream_layers(
    model: PuzzleForCausalLM, batches: list[Tensor]
) -> Iterator[tuple[int, PuzzleDecoderLayer, list[LayerPass]]]:
    """Layer by layer, the passes over all ``batches``: what lies before a layer is computed once, and then let go."""
    hidden = [embed(model, ids) for ids in batches]
    for index, layer in enumerate(layers_of(model)):
        passes = [run_layer(layer, states, position) for states, position in hidden]
        yield index, layer, passes
        hidden = [(one.after, one.position) for one in passes]


def run_suffix(model: PuzzleForCausalLM, hidden: Tensor, position: Position, first_layer: int) -> Tensor:
    """(B, T, D) after the last norm, from the residual stream at the input of ``first_layer``."""
    for layer in layers_of(model)[first_layer:]:
        hidden = layer(hidden, position_embeddings=position)
    return model.model.norm(hidden)  # type: ignore[no-any-return]


def final_hidden(model: PuzzleForCausalLM, ids: Tensor) -> Tensor:
    """(B, T, D) after the last norm: what the head reads."""
    hidden, position = embed(model, ids)
    return run_suffix(model, hidden, position, 0)
