"""What one forward of one shape computes and moves, kernel by kernel, on one of ``tp`` GPUs. Pure; from shapes alone.

FLOPs and weight bytes are exact (those of ``memory.weight_bytes``, norms included); of experts the expected number is
read that a batch touches. A site's kernels, as serving engines run them:

    attention   norm, q k v, rotary and cache write, attention, output, all-reduce
    FFN         norm, gate and up, activation, down, all-reduce
    experts     norm, router, dispatch, gate and up, activation, down, combine, all-reduce
    linear      norm, matrix (whole on every GPU, as in memory.py)
    rest        embedding, all-reduce, norm, head on one token per sequence, all-gather

Attention is causal and native in grouped heads: K and V of a KV head are read once for its whole group of queries, and
no more of them than the window and its sinks. Inputs of matrix products are in the weights' dtype (fp8 quantises them
where they are written), everything else between kernels in at least 16 bits. Routers and the rest are not quantised.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from puzzle import formats, variants
from puzzle.profiling.grid import GridPoint
from puzzle.profiling.hardware import Deployment
from puzzle.profiling.memory import shape_per_gpu, spec_per_gpu
from puzzle.types import AttentionSpec, FfnSpec, ModelShape, Spec

HALF = "bf16"


@dataclass(frozen=True)
class Kernel:
    """Bytes by what is read and written; ``dtype``: what is computed in.

    A collective has no work of its own but ``link_bytes`` to send, in ``link_steps`` messages.
    """

    name: str
    kind: Literal["matmul", "attention", "pointwise", "collective"]
    dtype: str
    flops: float = 0.0
    weight_bytes: float = 0.0
    kv_bytes: float = 0.0
    activation_bytes: float = 0.0
    link_bytes: float = 0.0
    link_steps: int = 0

    @property
    def memory_bytes(self) -> float:
        return self.weight_bytes + self.kv_bytes + self.activation_bytes


def site_kernels(spec: Spec, shape: ModelShape, point: GridPoint, deployment: Deployment) -> tuple[Kernel, ...]:
    """The kernels of one resolved spec, all of ``point``'s sequences together; none for skip."""
    if spec.kind == "skip":
        return ()
    forward = _Forward(point, shape.hidden_size, spec.precision or deployment.weights, deployment)
    local, local_shape = spec_per_gpu(spec, deployment.tp), shape_per_gpu(shape, deployment.tp)
    if spec.kind == "linear":
        matrix = forward.matmul("matrix", forward.rows, shape.hidden_size, shape.hidden_size)
        return (forward.norm("norm"), matrix)
    if isinstance(local, AttentionSpec):
        kernels = _attention(local, local_shape, forward)
    elif local.num_experts:
        assert isinstance(spec, FfnSpec)
        kernels = _experts(local, spec, shape, forward)
    else:
        kernels = _dense(local.intermediate_size or local_shape.intermediate_size, shape, forward)
    post_norm = (forward.norm("post norm"),) if shape.post_norms else ()
    return (forward.norm("norm"), *kernels, *forward.all_reduce(), *post_norm)


def rest_kernels(shape: ModelShape, point: GridPoint, deployment: Deployment) -> tuple[Kernel, ...]:
    """What no variant changes: embedding, final norm, head; never quantised."""
    forward = _Forward(point, shape.hidden_size, deployment.weights, deployment).unquantised
    vocabulary = shape_per_gpu(shape, deployment.tp).vocab_size
    embedding = forward.pointwise("embedding", shape.hidden_size, min(forward.rows, vocabulary) * shape.hidden_size)
    head = forward.matmul("head", point.batch_size, shape.hidden_size, vocabulary)
    logits = forward.all_gather(point.batch_size * shape.vocab_size)
    return (embedding, *forward.all_reduce(), forward.norm("norm"), head, *logits)


@dataclass(frozen=True)
class _Forward:
    """Makes kernels of one forward: ``rows`` tokens, matrices of layers stored as ``dtype``."""

    point: GridPoint
    hidden_size: int
    dtype: str
    deployment: Deployment

    @property
    def rows(self) -> int:
        return self.point.batch_size * self.point.new_tokens

    @property
    def activation_bytes(self) -> float:
        """Of one number between kernels."""
        return formats.activation_bytes(self.dtype)

    @property
    def compute(self) -> str:
        """The dtype of matrix products."""
        return formats.format_of(self.dtype).compute

    @property
    def unquantised(self) -> _Forward:
        """The same with matrices that are never quantised."""
        is_quantised = formats.number_bytes(self.dtype) < formats.HALF_BYTES
        return replace(self, dtype=HALF) if is_quantised else self

    def matmul(
        self, name: str, rows: float, fan_in: int, fan_out: int, bias: bool = False, num_matrices: float = 1.0
    ) -> Kernel:
        """``rows`` rows in all, each through one of ``num_matrices`` matrices that are read."""
        matrix_bytes = formats.matrix_bytes(fan_in, fan_out, self.dtype)
        input_bytes = formats.number_bytes(self.compute)
        return Kernel(
            name,
            "matmul",
            self.compute,
            flops=2.0 * rows * fan_in * fan_out,
            weight_bytes=num_matrices * (matrix_bytes + formats.unquantised_bytes(fan_out * bias, self.dtype)),
            activation_bytes=rows * (fan_in * input_bytes + fan_out * self.activation_bytes),
        )

    def pointwise(self, name: str, numbers_per_row: float, num_weights: int = 0, kv_bytes: float = 0) -> Kernel:
        """``numbers_per_row``: activations that are read or written, per token."""
        return Kernel(
            name,
            "pointwise",
            self.dtype,
            weight_bytes=num_weights * self.activation_bytes,
            kv_bytes=kv_bytes,
            activation_bytes=self.rows * numbers_per_row * self.activation_bytes,
        )

    def norm(self, name: str) -> Kernel:
        """With the residual addition: reads what is added and the residual stream, writes the stream and its norm."""
        return self.pointwise(name, 4 * self.hidden_size, num_weights=self.hidden_size)

    def all_reduce(self) -> tuple[Kernel, ...]:
        """Of the site's output, in a ring: every GPU sends 2 (tp - 1) / tp of it."""
        sent = self.rows * self.hidden_size * self.activation_bytes
        return self._collective("all-reduce", sent, rounds=2)

    def all_gather(self, numbers: float) -> tuple[Kernel, ...]:
        """Of ``numbers`` in all, in a ring: every GPU sends (tp - 1) / tp of them."""
        return self._collective("all-gather", numbers * self.activation_bytes, rounds=1)

    def _collective(self, name: str, num_bytes: float, rounds: int) -> tuple[Kernel, ...]:
        tp = self.deployment.tp
        if tp == 1:
            return ()
        steps = rounds * (tp - 1)
        return (Kernel(name, "collective", self.dtype, link_bytes=num_bytes * steps / tp, link_steps=steps),)


def _attention(spec: AttentionSpec, shape: ModelShape, forward: _Forward) -> tuple[Kernel, ...]:
    point = forward.point
    query = shape.num_attention_heads * shape.head_dim
    kv = 2 * variants.num_kv_heads(spec, shape) * shape.head_dim
    kv_token_bytes = kv * formats.number_bytes(forward.deployment.kv)
    qk_norms = 2 * shape.head_dim * shape.qk_norm
    attention = Kernel(
        "attention",
        "attention",
        HALF if formats.number_bytes(forward.compute) < formats.HALF_BYTES else forward.compute,
        flops=4.0 * query * point.batch_size * _pairs(spec, point),
        kv_bytes=point.batch_size * _tokens_read(spec, point) * kv_token_bytes,
        activation_bytes=forward.rows * 2 * query * forward.activation_bytes,
    )
    written = forward.rows * kv_token_bytes
    return (
        forward.matmul("q k v", forward.rows, shape.hidden_size, query + kv, bias=shape.qkv_bias),
        forward.pointwise("rotary", 2 * query + kv, num_weights=qk_norms, kv_bytes=written),
        attention,
        forward.matmul("output", forward.rows, query, shape.hidden_size, bias=shape.output_bias),
    )


def _pairs(spec: AttentionSpec, point: GridPoint) -> float:
    """Pairs of a query and a key it sees, in one sequence."""
    return _pairs_up_to(spec, point.total_tokens) - _pairs_up_to(spec, point.cached_tokens)


def _pairs_up_to(spec: AttentionSpec, tokens: int) -> float:
    """The sum of the tokens in sight over the first ``tokens`` positions."""
    span = variants.tokens_in_sight(spec, tokens)  # the last one's; every one before sees as many, or all there are
    return span * (span + 1) / 2 + (tokens - span) * span


def _tokens_read(spec: AttentionSpec, point: GridPoint) -> float:
    """Tokens of one sequence whose K and V some new token sees."""
    return min(point.total_tokens, variants.tokens_in_sight(spec, point.total_tokens) + point.new_tokens - 1)


def _dense(channels: int, shape: ModelShape, forward: _Forward) -> tuple[Kernel, ...]:
    hidden, rows = shape.hidden_size, forward.rows
    return (
        forward.matmul("gate and up", rows, hidden, 2 * channels, bias=shape.mlp_bias),
        forward.pointwise("activation", 3 * channels),
        forward.matmul("down", rows, channels, hidden, bias=shape.mlp_bias),
    )


def _experts(local: FfnSpec, whole: FfnSpec, shape: ModelShape, forward: _Forward) -> tuple[Kernel, ...]:
    """Experts are shared out whole; tokens choose theirs evenly and independently of one another."""
    assert local.num_experts and whole.num_experts and whole.num_active_experts
    hidden, channels, rows = shape.hidden_size, shape.moe_intermediate_size, forward.rows
    share_active = whole.num_active_experts / whole.num_experts
    touched = local.num_experts * (1 - (1 - share_active) ** rows)
    chosen = rows * share_active * local.num_experts  # pairs of a token and an expert on this GPU
    per_row = chosen / rows
    return (
        forward.unquantised.matmul("router", rows, hidden, local.num_experts),
        forward.pointwise("dispatch", (1 + per_row) * hidden),
        forward.matmul("gate and up", chosen, hidden, 2 * channels, num_matrices=touched),
        forward.pointwise("activation", 3 * per_row * channels),
        forward.matmul("down", chosen, channels, hidden, num_matrices=touched),
        forward.pointwise("combine", (per_row + 1) * hidden),
    )
