"""The registry of variants as data: names, validity, parameters, bytes and FLOPs. Computes from shapes alone.

A variant is written ``kind[-size][@precision]``: ``keep``, ``gqa-2``, ``window-1024-sinks-4``, ``narrow-2816@fp8``.
What it means at one layer of the teacher, whose layers may have windows or experts of their own, is its *resolved* spec
(:func:`resolve`); parameters, bytes and FLOPs are those of resolved specs on the teacher's
:class:`~puzzle.types.ModelShape`. A site owns its norms, so all but ``skip`` count at least one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from puzzle.formats import number_bytes
from puzzle.types import AttentionSpec, ConfigError, FfnSpec, Item, ModelShape, Part, Site, Spec

SIZED = {
    "gqa": "num_kv_heads",
    "window": "window_tokens",
    "narrow": "intermediate_size",
    "experts": "num_experts",
    "active": "num_active_experts",
}
KINDS: dict[Part, tuple[str, ...]] = {
    "attention": ("keep", "gqa", "window", "linear", "skip"),
    "ffn": ("keep", "narrow", "experts", "active", "linear", "skip"),
}
WEIGHTLESS = ("keep", "skip")  # the teacher's own block, or none: nothing to store
_NAME = re.compile(
    r"(?P<kind>[a-z]+)(?:-(?P<size>\d+)(?P<percent>%)?)?(?:-sinks-(?P<sinks>\d+))?(?:@(?P<precision>[a-z0-9-]+))?"
)


def variant_name(spec: Spec) -> str:
    """``gqa-2``, ``narrow-256@fp8``: the inverse of :func:`parse_variant`; ``fused-3x512`` is made by fusion only."""
    name: str = spec.kind
    if isinstance(spec, FfnSpec) and spec.num_fused and spec.intermediate_size:
        name = f"fused-{spec.num_fused}x{spec.intermediate_size // spec.num_fused}"
    elif spec.kind in SIZED:
        name += f"-{getattr(spec, SIZED[spec.kind])}"
    if isinstance(spec, AttentionSpec) and spec.sink_tokens:
        name += f"-sinks-{spec.sink_tokens}"
    return name + (f"@{spec.precision}" if spec.precision else "")


def parse_variant(part: Part, name: str, shape: ModelShape, multiple_of: int = 1) -> Spec:
    """The spec that ``name`` means on ``shape``; ``narrow-50%`` is rounded to the nearest ``multiple_of``.

    Raises ConfigError for an unknown kind, a size that is missing or superfluous, or one that ``shape`` cannot have.
    """
    match = _NAME.fullmatch(name)
    if match is None or match["kind"] not in KINDS[part]:
        allowed = ", ".join(kind + ("-N" if kind in SIZED else "") for kind in KINDS[part])
        raise ConfigError(f"{name!r} is no {part} variant; allowed: {allowed}")
    kind, size = match["kind"], match["size"]
    if (size is None) == (kind in SIZED):
        raise ConfigError(
            f"{name!r}: {kind} {'needs a size, e.g. ' + kind + '-2' if kind in SIZED else 'takes no size'}"
        )
    if match["precision"]:
        raise ConfigError(f"{name!r}: precisions are not on offer yet; leave out @{match['precision']}")
    if match["sinks"] and kind != "window":
        raise ConfigError(f"{name!r}: only window keeps sinks")
    if match["percent"]:
        size = _of_percentage(name, kind, int(size), shape, multiple_of)
    if kind in SIZED and int(size) < 1:
        raise ConfigError(f"{name!r}: the size must be at least 1")
    sizes = {SIZED[kind]: int(size)} if kind in SIZED else {}
    if match["sinks"]:
        sizes["sink_tokens"] = int(match["sinks"])
    spec: Spec = AttentionSpec(kind, **sizes) if part == "attention" else FfnSpec(kind, **sizes)  # type: ignore[arg-type]
    check(spec, shape)
    return spec


def _of_percentage(name: str, kind: str, percent: int, shape: ModelShape, multiple_of: int) -> int:
    if kind == "narrow":
        return max(1, round(percent / 100 * shape.intermediate_size / multiple_of)) * multiple_of
    if kind == "experts":
        return max(1, round(percent / 100 * shape.num_experts))
    raise ConfigError(f"{name!r}: only narrow and experts take a percentage")


def block_part(spec: Spec) -> dict[str, Any]:
    """The spec as one part of an entry of ``PuzzleConfig.blocks``: its kind and, where it has them, its sizes."""
    part: dict[str, Any] = {"kind": spec.kind}
    if spec.kind in SIZED:
        part[SIZED[spec.kind]] = getattr(spec, SIZED[spec.kind])
    if isinstance(spec, AttentionSpec) and spec.sink_tokens:
        part["sink_tokens"] = spec.sink_tokens
    return part


def check(spec: Spec, shape: ModelShape) -> None:
    """Raises ConfigError where no layer of ``shape`` can take ``spec``."""
    name = variant_name(spec)
    if isinstance(spec, AttentionSpec):
        if spec.num_kv_heads and shape.num_kv_heads % spec.num_kv_heads:
            raise ConfigError(
                f"{name}: {spec.num_kv_heads} does not divide the teacher's {shape.num_kv_heads} KV heads"
            )
        if spec.kind == "window" and (spec.window_tokens or 0) >= shape.max_position_embeddings:
            raise ConfigError(f"{name}: the teacher takes at most {shape.max_position_embeddings} tokens anyway")
        return
    if (spec.intermediate_size or 0) > shape.intermediate_size:
        raise ConfigError(f"{name}: the teacher has only {shape.intermediate_size} channels")
    if spec.kind in ("experts", "active") and not shape.moe_layers:
        raise ConfigError(f"{name}: the teacher has no experts")
    if (spec.num_experts or 0) > shape.num_experts:
        raise ConfigError(f"{name}: the teacher has only {shape.num_experts} experts")
    if (spec.num_active_experts or 0) > shape.num_active_experts:
        raise ConfigError(f"{name}: the teacher uses only {shape.num_active_experts} experts per token")


def resolve(spec: Spec, shape: ModelShape, layer: int) -> Spec | None:
    """``spec`` with what it takes over from the teacher's ``layer``; None where that layer cannot have it."""
    if isinstance(spec, AttentionSpec):
        own_window = shape.window(layer)
        if spec.kind in ("keep", "gqa"):
            return replace(spec, window_tokens=own_window)
        wider = spec.kind == "window" and own_window is not None and (spec.window_tokens or 0) >= own_window
        return None if wider else spec
    has_experts = layer in shape.moe_layers
    if spec.kind == "narrow":
        return None if has_experts else spec
    if spec.kind not in ("keep", "experts", "active"):
        return spec
    if not has_experts:
        return spec if spec.kind == "keep" else None
    experts = spec.num_experts or shape.num_experts
    active = min(spec.num_active_experts or shape.num_active_experts, experts)
    return replace(spec, num_experts=experts, num_active_experts=active)


def keep_spec(shape: ModelShape, site: Site) -> Spec:
    """The teacher's own block at ``site``, resolved."""
    keep: Spec = AttentionSpec("keep") if site.part == "attention" else FfnSpec("keep")
    resolved = resolve(keep, shape, site.layer)
    assert resolved is not None
    return resolved


def site_item(site: Site, spec: Spec) -> Item:
    """The item of one variant at one site: ``L003.ffn.narrow-256``."""
    return Item(f"{site}.{variant_name(spec)}", (site,), (spec,))


def layer_item(layer: int, attention: AttentionSpec, ffn: FfnSpec) -> Item:
    """The item of both parts of a layer, trained and scored together: ``L003.gqa-2+narrow-256``."""
    sites = (Site(layer, "attention"), Site(layer, "ffn"))
    return Item(f"L{layer:03d}.{variant_name(attention)}+{variant_name(ffn)}", sites, (attention, ffn))


def run_item(first: int, last: int) -> Item:
    """The item that leaves out layers ``first`` to ``last`` whole: ``L003-L005.skip``."""
    sites = tuple(Site(layer, part) for layer in range(first, last + 1) for part in KINDS)
    specs = tuple(AttentionSpec("skip") if site.part == "attention" else FfnSpec("skip") for site in sites)
    return Item(f"L{first:03d}-L{last:03d}.skip", sites, specs)


def fused_item(first: int, last: int, ffn: FfnSpec, shape: ModelShape) -> Item:
    """The item of layers ``first`` to ``last`` whose FFNs, all ``ffn`` (keep or narrow), run in parallel as a single
    one: ``L003-L005.fused-3x512``. y = x + sum_j FFN_j(norm_j(x)), x after the first layer's attention.

    It begins with the first layer's FFN; later layers have nothing left (FFN Fusion, arXiv 2503.18908).
    """
    count, width = last - first + 1, ffn.intermediate_size or shape.intermediate_size
    sites = [Site(layer, part) for layer in range(first, last + 1) for part in KINDS][1:]
    rest = [AttentionSpec("skip") if site.part == "attention" else FfnSpec("skip") for site in sites[1:]]
    fused = FfnSpec("narrow", count * width, num_fused=count)
    return Item(f"L{first:03d}-L{last:03d}.{variant_name(fused)}", tuple(sites), (fused, *rest))


def is_fused(item: Item) -> bool:
    """Whether the item is a :func:`fused_item`."""
    return isinstance(item.specs[0], FfnSpec) and item.specs[0].num_fused is not None


def made_of(item: Item, shape: ModelShape) -> tuple[Item, ...]:
    """The items whose blocks make up this one: of a fused run the FFNs of its layers, of any other itself."""
    spec = item.specs[0]
    if not isinstance(spec, FfnSpec) or spec.num_fused is None or spec.intermediate_size is None:
        return (item,)
    width = spec.intermediate_size // spec.num_fused
    ffn = FfnSpec("keep") if width == shape.intermediate_size else FfnSpec("narrow", width)
    return tuple(site_item(site, ffn) for site in item.sites if site.part == "ffn")


def is_teacher(item: Item) -> bool:
    """Whether the item leaves the teacher as it is."""
    return all(spec.kind == "keep" and spec.precision is None for spec in item.specs)


def has_weights(item: Item) -> bool:
    """Whether the item has weights of its own: some block is neither the teacher's nor nothing."""
    return any(spec.kind not in WEIGHTLESS for spec in item.specs)


def shape_id(spec: Spec, shape: ModelShape) -> str:
    """What costs are stored under: variants of equal shape share it (``keep`` is ``gqa-8`` of 8 heads)."""
    if isinstance(spec, AttentionSpec):
        if spec.kind in ("linear", "skip"):
            return f"attention.{spec.kind}"
        window = f"-window-{spec.window_tokens}" if spec.window_tokens else ""
        sinks = f"-sinks-{spec.sink_tokens}" if spec.sink_tokens else ""
        return f"attention.gqa-{num_kv_heads(spec, shape)}{window}{sinks}"
    if spec.num_experts:
        return f"ffn.experts-{spec.num_experts}-active-{spec.num_active_experts}"
    if spec.kind == "keep":
        return f"ffn.narrow-{shape.intermediate_size}"
    return f"ffn.{variant_name(replace(spec, num_fused=None))}"


def num_kv_heads(spec: Spec, shape: ModelShape) -> int:
    """KV heads that the cache holds for this site; 0 where there is no attention."""
    if not isinstance(spec, AttentionSpec) or spec.kind in ("linear", "skip"):
        return 0
    return spec.num_kv_heads or shape.num_kv_heads


@dataclass(frozen=True)
class Matrix:
    """``count`` equal matrices of a site, (fan_out, fan_in) each."""

    fan_in: int
    fan_out: int
    count: int = 1


def matrices(spec: Spec, shape: ModelShape) -> tuple[Matrix, ...]:
    """The site's matrices, without the router of experts."""
    hidden = shape.hidden_size
    if spec.kind == "skip":
        return ()
    if spec.kind == "linear":
        return (Matrix(hidden, hidden),)
    if isinstance(spec, AttentionSpec):
        query, kv = shape.num_attention_heads * shape.head_dim, num_kv_heads(spec, shape) * shape.head_dim
        return Matrix(hidden, query), Matrix(hidden, kv, 2), Matrix(query, hidden)
    width, count = spec.intermediate_size or shape.intermediate_size, 1
    if spec.num_experts:
        width, count = shape.moe_intermediate_size, spec.num_experts
    return Matrix(hidden, width, 2 * count), Matrix(width, hidden, count)


def params(spec: Spec, shape: ModelShape) -> int:
    """Parameters of the site with its norms."""
    return sum(matrix.fan_in * matrix.fan_out * matrix.count for matrix in matrices(spec, shape)) + others(spec, shape)


def others(spec: Spec, shape: ModelShape) -> int:
    """Parameters of the site that are in none of its :func:`matrices`: norms, biases, the router of experts."""
    hidden = shape.hidden_size
    if spec.kind in ("skip", "linear"):
        return hidden * (spec.kind == "linear")
    norms = hidden * (2 if shape.post_norms else 1)
    if isinstance(spec, AttentionSpec):
        query, kv = shape.num_attention_heads * shape.head_dim, num_kv_heads(spec, shape) * shape.head_dim
        bias = (query + 2 * kv) * shape.qkv_bias + hidden * shape.output_bias
        return bias + norms + 2 * shape.head_dim * shape.qk_norm
    if spec.num_experts:
        return spec.num_experts * hidden + norms
    return (2 * (spec.intermediate_size or shape.intermediate_size) + hidden) * shape.mlp_bias + norms


def active_params(spec: Spec, shape: ModelShape) -> int:
    """Parameters that one token meets: of experts, the active ones and the router."""
    if isinstance(spec, FfnSpec) and spec.num_experts:
        idle = spec.num_experts - (spec.num_active_experts or spec.num_experts)
        return params(spec, shape) - idle * 3 * shape.hidden_size * shape.moe_intermediate_size
    return params(spec, shape)


def rest_params(shape: ModelShape) -> int:
    """Embedding (once if tied to the head), head and final norm: what no variant changes."""
    embedding = shape.vocab_size * shape.hidden_size
    return embedding * (1 if shape.tied_embeddings else 2) + shape.hidden_size


def model_params(shape: ModelShape) -> int:
    """Parameters of the whole model of this shape."""
    return sum(params(keep_spec(shape, site), shape) for site in shape.sites) + rest_params(shape)


def kv_bytes_per_token(spec: Spec, shape: ModelShape, dtype: str, tp: int = 1) -> float:
    """K and V of one token of one sequence on one of ``tp`` GPUs: a head is never split, at least one is held."""
    heads = num_kv_heads(spec, shape)
    per_gpu = max(1.0, heads / tp) if heads else 0.0
    return 2 * per_gpu * shape.head_dim * number_bytes(dtype)


def tokens_in_sight(spec: Spec, context_tokens: float) -> float:
    """How many of ``context_tokens`` the attention looks at, and the KV cache must hold."""
    if not isinstance(spec, AttentionSpec) or spec.window_tokens is None:
        return context_tokens
    return min(context_tokens, spec.window_tokens + (spec.sink_tokens or 0))


def flops_per_token(spec: Spec, shape: ModelShape, context_tokens: float) -> float:
    """Forward multiply-adds times two of one token that attends to what it sees of ``context_tokens``."""
    if spec.kind == "skip":
        return 0.0
    norms = shape.hidden_size * (2 if shape.post_norms and spec.kind != "linear" else 1)
    attends = num_kv_heads(spec, shape) > 0
    matmuls = 2.0 * (active_params(spec, shape) - norms - (2 * shape.head_dim * shape.qk_norm if attends else 0))
    seen = tokens_in_sight(spec, context_tokens)
    return matmuls + (4.0 * shape.num_attention_heads * shape.head_dim * seen if attends else 0.0)
