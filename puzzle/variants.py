"""The registry of variants as data: names, validity, parameters, bytes and FLOPs. Computes from shapes alone.

A variant is written ``kind[-size][@precision]``: ``keep``, ``gqa-2``, ``narrow-2816@fp8``. Sizes hold for one layer of
the teacher's :class:`~puzzle.types.ModelShape`; a site owns its pre-norm, so all but ``skip`` count one norm.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from puzzle.types import AttentionSpec, ConfigError, FfnSpec, Item, ModelShape, Part, Site, Spec

DTYPE_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0}
SIZED = {"gqa": "num_kv_heads", "window": "window_tokens", "narrow": "intermediate_size"}
KINDS: dict[Part, tuple[str, ...]] = {
    "attention": ("keep", "gqa", "linear", "skip"),
    "ffn": ("keep", "narrow", "linear", "skip"),
}
_NAME = re.compile(r"(?P<kind>[a-z]+)(?:-(?P<size>\d+)(?P<percent>%)?)?(?:@(?P<precision>[a-z0-9-]+))?")


def variant_name(spec: Spec) -> str:
    """``gqa-2``, ``narrow-256@fp8``: the inverse of :func:`parse_variant`."""
    size = getattr(spec, SIZED[spec.kind]) if spec.kind in SIZED else None
    return spec.kind + (f"-{size}" if size is not None else "") + (f"@{spec.precision}" if spec.precision else "")


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
    if match["percent"]:
        if kind != "narrow":
            raise ConfigError(f"{name!r}: only narrow takes a percentage")
        size = max(1, round(int(size) / 100 * shape.intermediate_size / multiple_of)) * multiple_of
    if kind in SIZED and int(size) < 1:
        raise ConfigError(f"{name!r}: the size must be at least 1")
    sizes = {SIZED[kind]: int(size)} if kind in SIZED else {}
    spec: Spec = AttentionSpec(kind, **sizes) if part == "attention" else FfnSpec(kind, **sizes)  # type: ignore[arg-type]
    check(spec, shape)
    return spec


def block_part(spec: Spec) -> dict[str, Any]:
    """The spec as one part of an entry of ``PuzzleConfig.blocks``: its kind and, where it has one, its size."""
    return {"kind": spec.kind} | ({SIZED[spec.kind]: getattr(spec, SIZED[spec.kind])} if spec.kind in SIZED else {})


def check(spec: Spec, shape: ModelShape) -> None:
    """Raises ConfigError where ``shape`` cannot take ``spec``."""
    if isinstance(spec, AttentionSpec) and spec.num_kv_heads and shape.num_kv_heads % spec.num_kv_heads:
        raise ConfigError(
            f"{variant_name(spec)}: {spec.num_kv_heads} does not divide the teacher's {shape.num_kv_heads} KV heads"
        )
    if isinstance(spec, FfnSpec) and (spec.intermediate_size or 0) > shape.intermediate_size:
        raise ConfigError(f"{variant_name(spec)}: the teacher has only {shape.intermediate_size} channels")


@dataclass(frozen=True)
class SearchSpace:
    """The variants on offer at every layer; ``keep`` always among them. From a file in ``blocks/``."""

    attention: tuple[AttentionSpec, ...]
    ffn: tuple[FfnSpec, ...]

    @classmethod
    def parse(
        cls, attention: Iterable[str], ffn: Iterable[str], shape: ModelShape, multiple_of: int = 1
    ) -> SearchSpace:
        """From names; ``gqa-*`` is every proper divisor of the KV heads. Doubles and the full size fall away."""
        expanded = [
            name if name != "gqa-*" else f"gqa-{count}"
            for name in attention
            for count in (_proper_divisors(shape.num_kv_heads) if name == "gqa-*" else (0,))
        ]
        parsed_attention = [parse_variant("attention", name, shape) for name in expanded]
        parsed_ffn = [parse_variant("ffn", name, shape, multiple_of) for name in ffn]
        return cls(
            tuple(spec for spec in _unique("attention", parsed_attention, shape) if isinstance(spec, AttentionSpec)),
            tuple(spec for spec in _unique("ffn", parsed_ffn, shape) if isinstance(spec, FfnSpec)),
        )

    def specs(self, part: Part) -> tuple[Spec, ...]:
        return self.attention if part == "attention" else self.ffn

    def items(self, shape: ModelShape) -> tuple[Item, ...]:
        """Every single-site item, in the order of the sites."""
        return tuple(site_item(site, spec) for site in shape.sites for spec in self.specs(site.part))


def _unique(part: Part, specs: list[Spec], shape: ModelShape) -> list[Spec]:
    """``keep`` first, then each different shape once."""
    by_shape: dict[str, Spec] = {}
    for spec in specs:
        by_shape.setdefault(shape_id(spec, shape), spec)
    keep: Spec = AttentionSpec("keep") if part == "attention" else FfnSpec("keep")
    by_shape.pop(shape_id(keep, shape), None)
    return [keep, *by_shape.values()]


def _proper_divisors(number: int) -> tuple[int, ...]:
    return tuple(divisor for divisor in range(number // 2, 0, -1) if number % divisor == 0)


def site_item(site: Site, spec: Spec) -> Item:
    """The item of one variant at one site: ``L003.ffn.narrow-256``."""
    return Item(f"{site}.{variant_name(spec)}", (site,), (spec,))


def shape_id(spec: Spec, shape: ModelShape) -> str:
    """What costs are stored under: variants of equal shape share it (``keep`` is ``gqa-8`` of 8 heads)."""
    if isinstance(spec, AttentionSpec):
        resolved = f"gqa-{shape.num_kv_heads}" if spec.kind == "keep" else variant_name(spec)
        return f"attention.{resolved}"
    resolved = f"narrow-{shape.intermediate_size}" if spec.kind == "keep" else variant_name(spec)
    return f"ffn.{resolved}"


def num_kv_heads(spec: Spec, shape: ModelShape) -> int:
    """KV heads that the cache holds for this site; 0 where there is no attention."""
    if not isinstance(spec, AttentionSpec) or spec.kind in ("linear", "skip"):
        return 0
    return spec.num_kv_heads or shape.num_kv_heads


def params(spec: Spec, shape: ModelShape) -> int:
    """Parameters of the site with its pre-norm."""
    hidden = shape.hidden_size
    if spec.kind == "skip":
        return 0
    if spec.kind == "linear":
        return hidden * hidden + hidden
    if isinstance(spec, AttentionSpec):
        query, kv = shape.num_attention_heads * shape.head_dim, num_kv_heads(spec, shape) * shape.head_dim
        bias = (query + 2 * kv + hidden) if shape.attention_bias else 0
        return hidden * (query + 2 * kv) + query * hidden + bias + hidden
    width = spec.intermediate_size or shape.intermediate_size
    return 3 * hidden * width + ((2 * width + hidden) if shape.mlp_bias else 0) + hidden


def rest_params(shape: ModelShape) -> int:
    """Embedding (once if tied to the head), head and final norm: what no variant changes."""
    embedding = shape.vocab_size * shape.hidden_size
    return embedding * (1 if shape.tied_embeddings else 2) + shape.hidden_size


def weight_bytes(num_params: int, dtype: str) -> float:
    """Bytes of ``num_params`` weights stored as ``dtype`` (fp32, bf16, fp16, fp8)."""
    return num_params * dtype_bytes(dtype)


def dtype_bytes(dtype: str) -> float:
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"unknown dtype {dtype!r}; allowed: {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[dtype]


def kv_bytes_per_token(spec: Spec, shape: ModelShape, dtype: str, tp: int = 1) -> float:
    """K and V of one token of one sequence on one of ``tp`` GPUs: a head is never split, at least one is held."""
    heads = num_kv_heads(spec, shape)
    per_gpu = max(1.0, heads / tp) if heads else 0.0
    return 2 * per_gpu * shape.head_dim * dtype_bytes(dtype)


def flops_per_token(spec: Spec, shape: ModelShape, context_tokens: float) -> float:
    """Forward multiply-adds times two of one token that attends to ``context_tokens`` tokens."""
    if spec.kind == "skip":
        return 0.0
    matmuls = 2.0 * (params(spec, shape) - shape.hidden_size)
    attends = num_kv_heads(spec, shape) > 0
    return matmuls + (4.0 * shape.num_attention_heads * shape.head_dim * context_tokens if attends else 0.0)
