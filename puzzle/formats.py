"""How numbers are stored: bytes of a weight, and of the scales that quantised weights share. Pure data.

Only matrices of layers are quantised. Norms, biases, routers, the embedding and the head stay in 16 bits, as serving
engines and quantisers leave them unless told otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from puzzle.types import ConfigError

HALF_BYTES = 2.0


@dataclass(frozen=True)
class Format:
    """``scale_bytes`` of one scale, for ``group`` weights of a row (None: the whole row); none where not quantised.

    ``compute``: the dtype that matrix products run in.
    """

    weight_bytes: float
    compute: str
    scale_bytes: float = 0.0
    group: int | None = None


FORMATS: dict[str, Format] = {
    "fp32": Format(4.0, "fp32"),
    "bf16": Format(2.0, "bf16"),
    "fp16": Format(2.0, "fp16"),
    "fp8": Format(1.0, "fp8", 4.0),  # a fp32 scale per output channel
    "int8": Format(1.0, "int8", 4.0),
    "int4-g32": Format(0.5, "bf16", 2.0, 32),  # weight only: a 16-bit scale per group, dequantised as they are read
    "int4-g128": Format(0.5, "bf16", 2.0, 128),
}


def format_of(dtype: str) -> Format:
    """ConfigError listing the known ones."""
    if dtype not in FORMATS:
        raise ConfigError(f"unknown dtype {dtype!r}; allowed: {', '.join(FORMATS)}")
    return FORMATS[dtype]


def number_bytes(dtype: str) -> float:
    """Bytes of one number, without scales: of a KV cache, of what a product reads."""
    return format_of(dtype).weight_bytes


def activation_bytes(dtype: str) -> float:
    """Bytes of one number between the layers of a model whose weights are stored as ``dtype``."""
    return max(HALF_BYTES, number_bytes(dtype))


def matrix_bytes(fan_in: int, fan_out: int, dtype: str) -> float:
    """Bytes of a matrix of a layer with its scales."""
    stored = format_of(dtype)
    scales_per_row = math.ceil(fan_in / (stored.group or fan_in)) if fan_in else 0
    return fan_out * (fan_in * stored.weight_bytes + scales_per_row * stored.scale_bytes)


def unquantised_bytes(num_params: int, dtype: str) -> float:
    """Bytes of what is not quantised in a model whose matrices are stored as ``dtype``."""
    return num_params * activation_bytes(dtype)
