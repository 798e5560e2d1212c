"""A teacher as a puzzle model with every block kept: whole, or one layer at a time from its shards.

Reads a Hugging Face folder; computes the residual stream between layers, which distillation, scoring and evaluation
work on. Shapes: ids (B, T) int64; hidden states (B, T, D).
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from puzzle.artifacts import read_json
from puzzle.checkpoint import tensor_files
from puzzle.data.batches import Batch
from puzzle.export.nemotron_nas import MODEL_TYPE, puzzle_fields
from puzzle.modeling import (
    PuzzleConfig,
    PuzzleDecoderLayer,
    PuzzleForCausalLM,
    PuzzleModel,
    local_causal_mask,
    stock_state,
)
from puzzle.types import ConfigError, CorruptFileError


@dataclass(frozen=True)
class Compute:
    """Where and how to compute: training runs under bf16 autocast where ``bf16`` is set."""

    device: torch.device
    bf16: bool

    @classmethod
    def choose(cls, device: str, dtype: str) -> Compute:
        """``auto`` takes CUDA, then MPS, then CPU, and bf16 where the device multiplies it faster than fp32."""
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu"
        name = device if device != "auto" else best
        if (name == "cuda" and not torch.cuda.is_available()) or (name == "mps" and not torch.mps.is_available()):
            raise ConfigError(f"device: {name} is not available here; use --device cpu or auto")
        return cls(torch.device(name), dtype == "bf16" or (dtype == "auto" and _fast_bf16(name)))

    @property
    def dtype(self) -> torch.dtype:
        """Of frozen weights, and of the residual stream between two layers, while variants are trained."""
        return torch.bfloat16 if self.bf16 else torch.float32

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if not self.bf16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


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

    path = folder / "config.json"
    settings = read_json(path)
    foreign = puzzle_fields(settings, path) if settings.get("model_type") == MODEL_TYPE else None
    try:
        config = AutoConfig.from_pretrained(folder) if foreign is None else PuzzleConfig(**foreign)
    except Exception as error:  # every family's configuration class refuses in its own way
        raise ConfigError(f"{path}: refused by transformers ({' '.join(str(error).split())})") from None
    config = config if isinstance(config, PuzzleConfig) else PuzzleConfig.from_family(config)
    config._attn_implementation = "sdpa"  # standalone layers need a causal kernel
    config._experts_implementation = "eager"  # the only one that autocast reaches
    return config


class Shards:
    """The tensors of a checkpoint folder under our modules' names, read from their files when asked for."""

    def __init__(self, folder: Path, config: PuzzleConfig) -> None:
        self._config = config
        self._files = tensor_files(folder)
        if not any(name.startswith("model.") for name in self._files):
            raise CorruptFileError(f"{folder}: no tensor is called model.…; not a checkpoint of this family")

    def read(self, prefix: str, device: torch.device, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """Those whose names begin with ``prefix``, by their full names, in ``dtype`` (None: as they are)."""
        names = [name for name in self._files if name.startswith(prefix)]
        state: dict[str, Tensor] = {}
        for file in sorted({self._files[name] for name in names}):
            wanted = [name for name in names if self._files[name] == file]
            try:
                with safe_open(file, framework="pt") as tensors:
                    # copied: what is mapped would count as memory for as long as it is held
                    found = {name: tensors.get_tensor(name) for name in wanted}
                    state.update({name: one.to(device, dtype or one.dtype, copy=True) for name, one in found.items()})
            except (SafetensorError, OSError) as error:
                raise CorruptFileError(f"{file}: unreadable ({error}); make or fetch it again") from None
        return stock_state(self._config, state)


class Teacher:
    """The layers of a checkpoint, each loaded, frozen, when it is asked for; ``held`` keeps them from then on."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, held: bool = False) -> None:
        self.config = load_config(folder)
        self.device, self.dtype = device, dtype
        self._folder, self._shards, self._held = folder, Shards(folder, self.config), held
        self._layers: dict[int, PuzzleDecoderLayer] = {}
        self._last: PuzzleDecoderLayer | None = None  # often asked for several times in a row
        self._stem = nn.Module.to(PuzzleModel(without_layers(self.config)), device)
        name = "model.embed_tokens.weight"
        embedding = self._shards.read(name, device, dtype).get(name)
        if embedding is None or embedding.shape != (self.config.vocab_size, self.config.hidden_size):
            found = "missing" if embedding is None else f"of shape {tuple(embedding.shape)}"
            raise CorruptFileError(f"{folder}: {name} is {found}; the tensors do not fit the configuration")
        self._stem.embed_tokens.weight = nn.Parameter(embedding, requires_grad=False)
        self._top: PuzzleForCausalLM | None = None

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """What every computation with its layers must run under."""
        return Compute(self.device, self.dtype == torch.bfloat16).autocast()

    @property
    def num_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    def layer(self, index: int) -> PuzzleDecoderLayer:
        """Layer ``index``, frozen. CorruptFileError where its tensors are missing or do not fit."""
        if index in self._layers:
            return self._layers[index]
        if self._last is not None and self._last.layer_idx == index:
            return self._last
        self._last = None  # before the next is read
        prefix = f"model.layers.{index}."
        state = self._shards.read(prefix, self.device, self.dtype)
        with torch.device("meta"):
            layer = PuzzleDecoderLayer(self.config, index, index)
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        load_state(layer, own, f"{self._folder}, layer {index}")
        layer.requires_grad_(False)
        layer.eval()
        if self._held:
            self._layers[index] = layer
        else:
            self._last = layer
        return layer

    @torch.no_grad()
    def embed(self, batch: Batch) -> Tensor:
        """The residual stream (B, T, D) at the first layer's input."""
        return embed(self._stem, batch.to(self.device), self.dtype)

    def context(self, batch: Batch) -> Context:
        """What the layers need beside the residual stream."""
        return context_of(self._stem, batch.to(self.device), self.dtype)

    @property
    def top(self) -> PuzzleForCausalLM:
        """The final norm and the head in fp32, in a model without layers: not to be run under autocast."""
        if self._top is None:
            config = without_layers(self.config)
            config.vocab_size = self.config.vocab_size
            with torch.device("meta"):
                top = PuzzleForCausalLM(config)
            norm = self._shards.read("model.norm.", self.device, torch.float32)
            head = self._shards.read("lm_head.", self.device, torch.float32)
            if not head:
                head = {"lm_head.weight": self._stem.embed_tokens.weight.float()}
            load_state(top.model.norm, {n.removeprefix("model.norm."): t for n, t in norm.items()}, str(self._folder))
            load_state(top.lm_head, {n.removeprefix("lm_head."): t for n, t in head.items()}, str(self._folder))
            self._top = freeze(top)
        return self._top


def without_layers(config: PuzzleConfig) -> PuzzleConfig:
    """For a model whose layers are all empty, and whose embedding is a single row until it gets its weights."""
    layers = range(config.num_hidden_layers)
    empty = config.with_layers(layers, [{"attention": {"kind": "skip"}, "ffn": {"kind": "skip"}}] * len(layers))
    empty.vocab_size, empty.pad_token_id, empty.bos_token_id, empty.eos_token_id = 1, None, None, None
    return empty


def load_model(folder: Path, compute: Compute) -> PuzzleForCausalLM:
    """The whole model in ``folder``, frozen, in fp32 on the device: a family's checkpoint with every block kept."""
    config = load_config(folder)
    state = Shards(folder, config).read("", torch.device("cpu"), torch.float32)
    model = PuzzleForCausalLM(config)
    if config.tie_word_embeddings:
        state.setdefault("lm_head.weight", state.get("model.embed_tokens.weight", torch.empty(0)))
    load_state(model, state, str(folder))
    return freeze(nn.Module.to(model, compute.device))


def load_state(module: nn.Module, state: Mapping[str, Tensor], source: str, present: Collection[str] = ()) -> None:
    """``load_state_dict`` that says in one line what is missing, superfluous or of another shape.

    Parameters without memory take over the tensors given; ``present`` are names that the module has already.
    """
    on_meta = any(parameter.is_meta for parameter in module.parameters())
    try:
        missing, unexpected = module.load_state_dict(dict(state), strict=False, assign=on_meta)
    except RuntimeError as error:
        raise CorruptFileError(f"{source}: {' '.join(str(error).split())[:300]}") from None
    missing = [name for name in missing if name not in present]
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

    # without one it would ask whether to run the code of a config class that transformers does not know
    config = {"config": load_config(folder)} if (folder / "config.json").is_file() else {}
    try:
        return AutoTokenizer.from_pretrained(folder, **config)
    except Exception as error:  # tokenizer libraries raise all sorts; all mean the same to the user
        raise ConfigError(f"{folder}: no usable tokenizer ({type(error).__name__}: {error})".splitlines()[0]) from None


class _DocumentMasks(dict[Any, Tensor]):
    """Masks by the span of an attention, made when first asked for: causal, and within one document."""

    def __init__(self, documents: Tensor) -> None:
        super().__init__()
        self._documents = documents

    def __missing__(self, span: Any) -> Tensor:
        documents = self._documents
        self[span] = local_causal_mask(documents.shape[1], span, documents.device, documents)
        return self[span]


@dataclass(frozen=True)
class Context:
    """What layers need beside the residual stream of one batch.

    ``position``: rotary tables by the layer's rope, each (cos, sin) of (1, T, head_dim); ``masks``: by the layer's
    span, None where attention may cross documents; ``weights`` (B, T): what each token counts in local
    losses. Every one but the first does, also where only some count as predictions: later ones attend to them.
    """

    position: Mapping[str, tuple[Tensor, Tensor]]
    masks: Mapping[Any, Tensor] | None
    weights: Tensor


def embed(model: PuzzleModel, batch: Batch, dtype: torch.dtype) -> Tensor:
    """The residual stream (B, T, D) at the first layer's input; ``batch`` on the model's device."""
    return model.embed_tokens(batch.ids).to(dtype)  # type: ignore[no-any-return]


def context_of(model: PuzzleModel, batch: Batch, dtype: torch.dtype) -> Context:
    """What the layers need beside it; rotary tables in ``dtype``."""
    positions = torch.arange(batch.ids.shape[1], device=batch.ids.device).unsqueeze(0)
    masks = None if batch.documents is None else _DocumentMasks(batch.documents)
    weights = torch.ones(batch.ids.shape, device=batch.ids.device)
    weights[:, 0] = 0  # its massive activations are an artefact that would drown the rest
    like = torch.empty(0, dtype=dtype, device=batch.ids.device)
    return Context(model.rotary(like, positions), masks, weights)


def layers_of(model: PuzzleForCausalLM) -> list[PuzzleDecoderLayer]:
    return list(model.model.layers)


@dataclass(frozen=True)
class LayerPass:
    """One layer's pass over one batch: input, after attention, output; each (B, T, D)."""

    before: Tensor
    middle: Tensor
    after: Tensor
    context: Context


def attention_delta(layer: PuzzleDecoderLayer, hidden: Tensor, context: Context) -> Tensor:
    """What the layer's attention adds to ``hidden``."""
    return layer.attention_delta(hidden, context.position, context.masks)


def run_layer(layer: PuzzleDecoderLayer, hidden: Tensor, context: Context) -> LayerPass:
    hidden = hidden.float()  # what a site adds is a small difference of large numbers
    middle = hidden + attention_delta(layer, hidden, context)
    return LayerPass(hidden, middle, middle + layer.ffn_delta(middle), context)


def residual_stream(model: PuzzleForCausalLM, batch: Batch) -> Iterator[Tensor]:
    """(B, T, D) after each layer, one after the other."""
    hidden, context = embed(model.model, batch, model.dtype), context_of(model.model, batch, model.dtype)
    for layer in layers_of(model):
        hidden = layer(hidden, position_embeddings=context.position, attention_mask=context.masks)
        yield hidden


def final_hidden(model: PuzzleForCausalLM, batch: Batch) -> Tensor:
    """(B, T, D) after the last norm: what the head reads."""
    (last,) = collections.deque(residual_stream(model, batch), maxlen=1)
    return model.model.norm(last)  # type: ignore[no-any-return]
