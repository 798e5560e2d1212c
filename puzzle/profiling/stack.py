"""What is measured: one forward of a model with random weights, and a stack that holds every distinct shape once.

Reads a teacher's PuzzleConfig and specs; makes modules and steps; writes nothing. The KV cache's memory is there before
the forward: prefill fills it, a decode step writes its token in place. Every forward starts from the same number of
cached tokens, so the same step can be repeated (and captured as a CUDA graph) as often as it must be timed. Only real
attention has a slot; slots are numbered as in PuzzleConfig.cache_idx, and hold what the model's own cache
(PuzzleModel.new_cache) does: of a window, the tokens in sight only.

Shapes: B batch, T new tokens, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicLayer

from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM
from puzzle.modeling.configuration_puzzle import Span
from puzzle.profiling.grid import GridPoint
from puzzle.profiling.hardware import device_name
from puzzle.profiling.table import COMPILED_ENGINE, ENGINE, SKIPPED
from puzzle.space import PARTS
from puzzle.types import ConfigError, CostSetting, ModelShape, Site, Spec, part_of
from puzzle.variants import block_part, keep_spec, resolve, shape_id

Dtype = Literal["fp32", "bf16"]
TORCH_DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
NUM_NEIGHBOURS = 2  # whole layers of the teacher around the sites
COMPILE_BACKEND, RECOMPILE_LIMIT = "inductor", 4096
NUM_EMPTY = 2  # layers without a site, whose time is what calling a layer costs


@dataclass(frozen=True)
class SiteStack:
    """A model with random weights that holds every distinct shape once, in a layer of its own; one per profile."""

    shape: ModelShape
    model: PuzzleForCausalLM
    device: str
    dtype: Dtype
    sites: Mapping[str, nn.Module]  # shape_id → the layer with that site alone
    neighbours: tuple[nn.Module, ...]
    neighbour_ids: tuple[str, str]  # shape_id of either part of a neighbour
    empty: tuple[nn.Module, ...]
    engine: str = ENGINE

    @property
    def setting(self) -> CostSetting:
        """What its times hold for."""
        return CostSetting(device_name(self.device), self.dtype, self.dtype, 1, self.engine)

    @classmethod
    def build(
        cls, shape: ModelShape, config: PuzzleConfig, specs: Iterable[Spec], device: str, dtype: Dtype, seed: int = 0
    ) -> SiteStack:
        """``config`` is the teacher's (its blocks do not matter); ``specs``, resolved, may repeat and need no keep."""
        typical = _typical_layer(shape)
        keep_specs = [keep_spec(shape, Site(typical, part)) for part in PARTS]
        by_shape = {shape_id(spec, shape): spec for spec in (*keep_specs, *specs)}
        distinct = {name: spec for name, spec in by_shape.items() if name not in SKIPPED}
        keep, skip = {"kind": "keep"}, {"kind": "skip"}
        blocks = [{"attention": keep, "ffn": keep}] * NUM_NEIGHBOURS
        blocks += [{"attention": skip, "ffn": skip, part_of(spec): block_part(spec)} for spec in distinct.values()]
        blocks += [{"attention": skip, "ffn": skip}] * NUM_EMPTY
        kinds = [typical] * NUM_NEIGHBOURS + [_layer_for(spec, shape) for spec in distinct.values()]
        model = random_model(config, blocks, device, dtype, seed, layers=kinds + [typical] * NUM_EMPTY)
        layers = tuple(model.model.layers)
        first_empty = NUM_NEIGHBOURS + len(distinct)
        sites = dict(zip(distinct, layers[NUM_NEIGHBOURS:first_empty], strict=True))
        del model.model.layers  # from now on a plain list, set anew for every forward
        attention, ffn = (shape_id(spec, shape) for spec in keep_specs)
        neighbours, empty = layers[:NUM_NEIGHBOURS], layers[first_empty:]
        return cls(shape, model, device, dtype, sites, neighbours, (attention, ffn), empty)

    def compiled(self) -> SiteStack:
        """The same with its layers under torch.compile, each compiled when it first runs at a point."""
        compile_layers([*self.sites.values(), *self.neighbours, *self.empty])
        return replace(self, engine=COMPILED_ENGINE)

    def step(self, point: GridPoint) -> ForwardStep:
        """The forward that sites are timed in. It makes the teacher's masks, so they are part of the rest; those of
        other windows, which layers share, would be counted for models that have none, so they are there already."""
        own = {(self.shape.window(layer), 0) for layer in range(self.shape.num_layers)}
        return ForwardStep(self.model, point, ready_spans=[span for span in self.model.model.slots if span not in own])

    def use_layers(self, layers: Sequence[Callable[..., torch.Tensor]]) -> None:
        """Makes the next forward run through ``layers`` in this order."""
        self.model.model.layers = list(layers)


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Compiles each of ``layers`` for the sizes that it will meet; from then on they are what it runs."""
    dynamo = torch._dynamo.config  # layers share their code: past the limit they would silently run as they were
    dynamo.recompile_limit = dynamo.accumulated_recompile_limit = RECOMPILE_LIMIT
    for layer in layers:
        layer.compile(dynamic=False, backend=COMPILE_BACKEND)


def _typical_layer(shape: ModelShape) -> int:
    """The first layer of the kind that the teacher has most of."""
    kinds = [(shape.window(layer), layer in shape.moe_layers) for layer in range(shape.num_layers)]
    return kinds.index(Counter(kinds).most_common(1)[0][0])


def _layer_for(spec: Spec, shape: ModelShape) -> int:
    """A layer of the teacher that can have ``spec``, which is resolved."""
    layers = [layer for layer in range(shape.num_layers) if resolve(spec, shape, layer) == spec]
    assert layers, f"{spec} is not resolved"
    return layers[0]


def random_model(
    config: PuzzleConfig,
    blocks: Sequence[Mapping[str, Any]],
    device: str,
    dtype: Dtype,
    seed: int = 0,
    layers: Sequence[int] | None = None,
) -> PuzzleForCausalLM:
    """A model of the teacher's sizes with ``blocks`` for layers and random weights, made on ``device``.

    ``layers``: of which of the teacher's layers the kind (window, experts) each block is; default: as they come.
    """
    if dtype not in TORCH_DTYPES:
        raise ConfigError(f"cannot measure with weights in {dtype!r}; allowed: {', '.join(TORCH_DTYPES)}")
    stack_config = config.with_layers(range(len(blocks)) if layers is None else layers, blocks)
    devices = [torch.device(device)] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(seed)
        model: PuzzleForCausalLM = AutoModelForCausalLM.from_config(
            stack_config, dtype=TORCH_DTYPES[dtype], attn_implementation="sdpa"
        )
    model.eval()  # type: ignore[no-untyped-call]
    return model


class ForwardStep:
    """One prefill or decode step of a whole model, repeatable: each call finds the cache as the first one did.

    Masks are made anew in every step, as in use, but for those of ``ready_spans``.
    """

    def __init__(
        self, model: PuzzleForCausalLM, point: GridPoint, seed: int = 0, ready_spans: Iterable[Span] = ()
    ) -> None:
        config, weight = model.config, model.lm_head.weight
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._model = model
        self.cache = PreallocatedCache(_slots(config), head_dim, point, weight, seed)
        generator = torch.Generator().manual_seed(seed)
        size = (point.batch_size, point.new_tokens)
        self._input_ids = torch.randint(config.vocab_size, size, generator=generator).to(weight.device)  # (B, T)
        positions = torch.arange(point.cached_tokens, point.total_tokens, device=weight.device)
        self._position_ids = positions.unsqueeze(0)  # (1, T)
        self._like = weight.new_empty(*size, 0)
        self._ready_masks = self._masks(ready_spans)
        self._made_spans = [span for span in model.model.slots if span not in self._ready_masks]

    def _masks(self, spans: Iterable[Span]) -> dict[Span, Any]:
        masks: dict[Span, Any] = self._model.model.masks(self._like, None, self.cache, self._position_ids, spans)
        return masks

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:  # (B, 1, V)
        output = self._model(
            input_ids=self._input_ids,
            attention_mask={**self._masks(self._made_spans), **self._ready_masks},
            position_ids=self._position_ids,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits
        return logits


def _slots(config: PuzzleConfig) -> list[Slot]:
    """The cache slots of the model, each as large as PuzzleModel.new_cache lets it become."""
    layers = range(config.num_hidden_layers)
    return [Slot(heads, *config.span(layer)) for layer in layers if (heads := config.kv_heads(layer)) is not None]


@dataclass(frozen=True)
class Slot:
    """The K and V that one attention caches: its heads, how far back it looks (None: over everything), its sinks."""

    num_kv_heads: int
    window_tokens: int | None = None
    sink_tokens: int = 0

    def held_tokens(self, cached_tokens: int) -> int:
        """Of ``cached_tokens`` seen, those that the next token looks at."""
        if self.window_tokens is None:
            return cached_tokens
        return min(cached_tokens, self.window_tokens - 1 + self.sink_tokens)


class PreallocatedLayer(DynamicLayer):
    """K and V of one attention: (B, Hkv, held + new tokens, head_dim), the first ``held_tokens`` of them fixed.

    They are the last of the ``cached_tokens`` that the sequence has had, behind its ``first_tokens`` if that is set:
    then masks are made as for a SpanSlot.
    """

    first_tokens: int

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, cached_tokens: int, held_tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys: torch.Tensor = keys
        self.values: torch.Tensor = values
        self.cached_tokens = cached_tokens
        self.held_tokens = held_tokens
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the new tokens (B, Hkv, T, head_dim) behind those held; gives all, held and new."""
        end = self.held_tokens + key_states.shape[2]
        self.keys[:, :, self.held_tokens : end].copy_(key_states)
        self.values[:, :, self.held_tokens : end].copy_(value_states)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        """Tokens seen before this forward: what transformers takes positions and masks from."""
        return self.cached_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many tokens a forward attends to, and which of the sequence the first of them is."""
        return self.held_tokens + query_length, self.cached_tokens - self.held_tokens


class PreallocatedCache(Cache):
    """One layer per slot; the held tokens are random numbers."""

    def __init__(
        self, slots: Sequence[Slot], head_dim: int, point: GridPoint, like: torch.Tensor, seed: int = 0
    ) -> None:
        generator = torch.Generator(device=like.device).manual_seed(seed)

        def tokens(slot: Slot, held: int) -> torch.Tensor:
            size = (point.batch_size, slot.num_kv_heads, held + point.new_tokens, head_dim)
            return torch.empty(size, dtype=like.dtype, device=like.device).normal_(generator=generator)

        self.slots = []
        for slot in slots:
            held = slot.held_tokens(point.cached_tokens)
            keys, values = tokens(slot, held), tokens(slot, held)
            self.slots.append(PreallocatedLayer(keys, values, point.cached_tokens, held))
            if slot.sink_tokens:
                self.slots[-1].first_tokens = slot.sink_tokens
        super().__init__(layers=list(self.slots))
