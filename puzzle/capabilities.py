"""What each target runtime makes of each variant: loads it, needs it lowered (exactly) to something else, refuses it.

Pure data and its look-up; the search offers only what every target in ``serve_on`` can have, the exporters lower what
is to be lowered. ``transformers`` and ``vllm-plugin`` (vLLM with :mod:`puzzle.vllm_plugin`) read our own Hugging Face
export. The others read *nemotron-nas* checkpoints, which are Llama-shaped. The rows were established by running the
readers against plain torch (vLLM 0.32, llama.cpp through llama-cpp-python 0.3.36, mlx-lm 0.32;
``benchmarks/verify_runtimes.py``); those of TensorRT-LLM and SGLang by reading their source. A loader's silence
means nothing: llama.cpp drops attention without a word where a layer has no FFN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from puzzle.types import (
    Architecture,
    AttentionSpec,
    Capability,
    ConfigError,
    Conflict,
    FfnSpec,
    Format,
    Item,
    ModelShape,
    Site,
    Spec,
    Target,
)
from puzzle.variants import layer_item, variant_name

FORMAT_OF: Mapping[Target, Format] = {  # the export that each reads
    "transformers": "hf",
    "vllm-plugin": "hf",
    "vllm": "nemotron-nas",
    "sglang": "nemotron-nas",
    "tensorrt-llm": "nemotron-nas",
    "llama.cpp": "gguf",
    "mlx-lm": "mlx",
}
LLAMA_SHAPED = ("llama", "mistral")  # the same tensors under the same names; Mistral without its windows
WIDTH_MULTIPLE = 256  # every reader of nemotron-nas rounds FFN widths up to it; a GGUF file says them as they are
ZERO_WIDTH = 32  # of an FFN of zeros, where a reader insists on one
ZERO_FFN = FfnSpec("narrow", intermediate_size=ZERO_WIDTH)

Feature = Literal[
    "attention", "window", "sinks", "linear attention", "no attention", "no attention at layer 0",
    "ffn", "experts", "linear ffn", "no ffn",
    "attention without ffn", "nothing", "nothing in the last layer",
]  # fmt: skip
Row = Mapping[Target, tuple[str, str] | str]  # a reason to refuse; (what it is lowered to, why); nothing: as it is

NEMOTRON: tuple[Target, ...] = ("vllm", "sglang", "tensorrt-llm", "llama.cpp", "mlx-lm")
PADDING: tuple[Target, ...] = ("vllm", "sglang", "tensorrt-llm", "mlx-lm")
_LINEAR_FAILS = "nemotron-nas's linear blocks fail to load (TypeError)"
_LAYER_0 = "a first layer without attention crashes"
_IGNORED = "windows of single layers are ignored: the layer would see everything"
_NO_SINKS = "no reader of nemotron-nas knows of sinks"
_NO_EXPERTS = "nemotron-nas has no experts"
_OTHER_NAME = "the reader's name for it"

MATRIX: Mapping[Feature, Row] = {
    "attention": {},
    "window": {
        "vllm": ("layer_types and one sliding_window for all layers", "it takes windows of one size only"),
        "sglang": _IGNORED,
        "tensorrt-llm": _IGNORED,
        "llama.cpp": _IGNORED,
        "mlx-lm": _IGNORED,
    },
    "sinks": {
        **dict.fromkeys(NEMOTRON, _NO_SINKS),
        "vllm-plugin": "vLLM's attention keeps no first tokens visible beyond a window",
    },
    "linear attention": {
        "vllm": _LINEAR_FAILS,
        "sglang": _LINEAR_FAILS,
        "mlx-lm": ("tensors named self_attn.linear", _OTHER_NAME),
    },
    "no attention": {},
    "no attention at layer 0": {
        "vllm": _LAYER_0,
        "sglang": _LAYER_0,
        "llama.cpp": ("a linear attention of zeros", "a first layer without attention is not loaded"),
    },
    "ffn": {},
    "experts": dict.fromkeys(NEMOTRON, _NO_EXPERTS),
    "linear ffn": {
        "vllm": _LINEAR_FAILS,
        "sglang": _LINEAR_FAILS,
        "llama.cpp": ("a further layer of linear attention, with an FFN of zeros", "its converter knows no linear FFN"),
        "mlx-lm": ("tensors named mlp.linear", _OTHER_NAME),
    },
    "no ffn": {},
    "attention without ffn": {
        "llama.cpp": (f"an FFN of zeros, {ZERO_WIDTH} wide", "it drops the attention of a layer without FFN"),
    },
    "nothing": {},
    "nothing in the last layer": {"llama.cpp": ("no layer at all", "a last layer of nothing aborts")},
}


def capability(target: Target, spec: Spec, layer: int, shape: ModelShape, windows: Iterable[int] = ()) -> Capability:
    """What ``target`` makes of one variant at ``layer``; ``windows`` are all sizes that other layers may have."""
    found = [_entry(target, feature) for feature in _features(spec, layer)]
    if target == "vllm" and isinstance(spec, AttentionSpec) and spec.window_tokens is not None:
        sizes = sorted({spec.window_tokens, *windows})
        if len(sizes) > 1:
            reason = f"it takes windows of one size only, and on offer are {', '.join(map(str, sizes))}"
            found.append(Capability(target, "refused", reason))
    if isinstance(spec, FfnSpec) and spec.kind in ("keep", "narrow") and target in PADDING:
        width = spec.intermediate_size or shape.intermediate_size
        if (padded := stored_width(width)) != width:
            lowered_to = f"{padded} channels, those past {width} zeros"
            found.append(Capability(target, "lowered", f"widths are multiples of {WIDTH_MULTIPLE}", lowered_to))
    return _worst(found)


def stored_width(width: int) -> int:
    """Channels that a reader of nemotron-nas takes an FFN of ``width`` to have: those beyond ``width`` are zeros."""
    return math.ceil(width / WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def together(target: Target, attention: AttentionSpec, ffn: FfnSpec, layer: int, num_layers: int) -> Capability:
    """What ``target`` makes of the two blocks of a layer beside each other; each alone: :func:`capability`."""
    features: list[Feature] = []
    if ffn.kind == "skip":
        features.append("nothing" if attention.kind == "skip" else "attention without ffn")
    if features == ["nothing"] and layer == num_layers - 1:
        features.append("nothing in the last layer")
    return _worst([_entry(target, feature) for feature in features] or [Capability(target, "supported", "")])


def _features(spec: Spec, layer: int) -> list[Feature]:
    if isinstance(spec, FfnSpec):
        kind: Feature = "linear ffn" if spec.kind == "linear" else "no ffn" if spec.kind == "skip" else "ffn"
        return ["experts"] if spec.num_experts else [kind]
    if spec.kind == "skip":
        return ["no attention", "no attention at layer 0"] if layer == 0 else ["no attention"]
    if spec.kind == "linear":
        return ["linear attention"]
    features: list[Feature] = ["attention"]
    if spec.window_tokens is not None:
        features.append("window")
    if spec.sink_tokens:
        features.append("sinks")
    return features


def _entry(target: Target, feature: Feature) -> Capability:
    said = MATRIX[feature].get(target)
    if said is None:
        return Capability(target, "supported", "")
    if isinstance(said, str):
        return Capability(target, "refused", said)
    lowered_to, reason = said
    return Capability(target, "lowered", reason, lowered_to)


def _worst(found: Sequence[Capability]) -> Capability:
    order = ("refused", "lowered", "supported")
    return min(found, key=lambda one: order.index(one.status))


@dataclass(frozen=True)
class Finding:
    """What a target makes of an item because of ``spec`` at ``site``, where that is not just to load it."""

    item: Item
    site: Site
    spec: Spec
    capability: Capability


@dataclass(frozen=True)
class Offer:
    """``items``: what all targets can load; ``conflicts`` between some of them; why others are not on offer.

    ``lowered``: what must be written otherwise for a target. Its costs are those of :func:`served_as`.
    """

    items: tuple[Item, ...]
    conflicts: tuple[Conflict, ...] = ()
    refused: tuple[Finding, ...] = ()
    lowered: tuple[Finding, ...] = ()


def offer(items: Sequence[Item], targets: Sequence[Target], shape: ModelShape) -> Offer:
    """The items that every target can load. ConfigError where one cannot read the teacher, or a site has none left."""
    for target in targets:
        if target in NEMOTRON and (reason := _not_llama_shaped(shape)):
            raise ConfigError(f"serve_on: {target} reads nemotron-nas, which is Llama-shaped, but {reason}")
    sizes = {spec.window_tokens for item in items for spec in item.specs if isinstance(spec, AttentionSpec)}
    windows = frozenset(size for size in sizes if size is not None)
    found = [one for item in items for target in targets for one in _findings(item, target, shape, windows)]
    refused = [one for one in found if one.capability.status == "refused"]
    gone = {one.item.id for one in refused}
    kept = tuple(item for item in items if item.id not in gone)
    covered = {site for item in kept for site in item.sites}
    for site in shape.sites:
        if site not in covered and (reasons := told(one for one in refused if site in one.item.sites)):
            raise ConfigError(
                f"serve_on: nothing is left for {site}: {'; '.join(reasons)}; add a variant to the search space"
            )
    lowered = tuple(one for one in found if one.item.id not in gone)
    return Offer(kept, tuple(_conflicts(kept, targets, shape)), tuple(refused), lowered)


def findings(target: Target, layers: Architecture, shape: ModelShape) -> tuple[Finding, ...]:
    """What ``target`` does not simply load of a whole model."""
    sizes = frozenset(attention.window_tokens for attention, _ in layers if attention.window_tokens is not None)
    items = [layer_item(layer, *specs) for layer, specs in enumerate(layers)]
    return tuple(one for item in items for one in _findings(item, target, shape, sizes))


def served_as(item: Item, target: Target, shape: ModelShape) -> tuple[Spec, ...]:
    """The blocks that ``target`` runs in the place of the item's, whose costs add up to its own.

    An FFN that is left out costs the zeros that its attention may need; only an item of both parts can know better.
    """
    at = item.at
    found: list[Spec] = []
    for site, spec in at.items():
        beside = at.get(Site(site.layer, "attention"))
        if isinstance(spec, FfnSpec) and spec.kind in ("keep", "narrow") and target in PADDING:
            width = stored_width(spec.intermediate_size or shape.intermediate_size)
            found.append(replace(spec, kind="narrow", intermediate_size=width))
        elif target == "llama.cpp" and spec.kind == "skip" and site == Site(0, "attention"):
            found.append(AttentionSpec("linear"))
        elif target == "llama.cpp" and spec.kind == "linear" and site.part == "ffn":
            # its matrix takes a layer of its own, whose FFN is zeros; so is that of an attention left behind
            found += [spec, ZERO_FFN] if beside == AttentionSpec("skip") else [spec, ZERO_FFN, ZERO_FFN]
        elif target == "llama.cpp" and spec.kind == "skip" and site.part == "ffn" and beside != AttentionSpec("skip"):
            found.append(ZERO_FFN)
        else:
            found.append(spec)
    return tuple(found)


def told(findings: Iterable[Finding]) -> tuple[str, ...]:
    """One line for each thing that a target makes of a variant, with all layers where it does."""
    layers: dict[tuple[Capability, str], list[int]] = {}
    for one in findings:
        layers.setdefault((one.capability, f"{one.site.part} {variant_name(one.spec)}"), []).append(one.site.layer)
    return tuple(
        f"{one.target} {'refuses' if one.status == 'refused' else 'needs'} {name}"
        f"{f' as {one.lowered_to}' if one.lowered_to else ''} at {_spans(at)}: {one.reason}"
        for (one, name), at in layers.items()
    )


def _spans(layers: Iterable[int]) -> str:
    """``layers 0-3, 7``."""
    spans: list[list[int]] = []
    for layer in sorted(set(layers)):
        if spans and layer == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], layer]
        else:
            spans.append([layer])
    words = ", ".join("-".join(map(str, span)) for span in spans)
    return f"layer{'s' if len(spans) > 1 or len(spans[0]) > 1 else ''} {words}"


def _not_llama_shaped(shape: ModelShape) -> str | None:
    if shape.family not in LLAMA_SHAPED:
        return f"the teacher is a {shape.family}"
    if shape.qkv_bias or shape.output_bias or shape.mlp_bias:
        return "the teacher has biases"
    return None


def _findings(item: Item, target: Target, shape: ModelShape, windows: frozenset[int]) -> Iterable[Finding]:
    """What is not simply loaded of the item: its blocks alone, and beside each other where it has both of a layer."""
    at = item.at
    for site, spec in at.items():
        found = [capability(target, spec, site.layer, shape, windows)]
        attention = at.get(Site(site.layer, "attention"))
        if isinstance(spec, FfnSpec) and isinstance(attention, AttentionSpec):
            found.append(together(target, attention, spec, site.layer, shape.num_layers))
        yield from (Finding(item, site, spec, one) for one in found if one.status != "supported")


def _conflicts(items: Sequence[Item], targets: Sequence[Target], shape: ModelShape) -> Iterable[Conflict]:
    """Two items, one of each part of a layer, that a target can load, but not beside each other."""
    single = {site: [item for item in items if item.sites == (site,)] for site in shape.sites}
    for layer in range(shape.num_layers):
        for first in single[Site(layer, "attention")]:
            for second in single[Site(layer, "ffn")]:
                attention, ffn = first.specs[0], second.specs[0]
                assert isinstance(attention, AttentionSpec) and isinstance(ffn, FfnSpec)
                for target in targets:
                    both = together(target, attention, ffn, layer, shape.num_layers)
                    if both.status == "refused":
                        yield Conflict(
                            (first.id, second.id), f"{target} refuses {first.id} with {second.id}: {both.reason}"
                        )
