"""How block-wise distillation and scoring are laid out to stay within a memory budget. Pure arithmetic on sizes.

What BLD holds at once: the teacher's layers of the current group; for every unit under training 16 bytes a parameter
(fp32 weight, gradient, two moments), its start, its best weights and a bf16 copy; one batch's activations; and the
residual stream of all training batches, in memory, in a file, or not at all (see blocks/stream.py). Nothing grows with
the number of layers, so the need is that of a layer:

    bytes = layer + Σ_units 26 · params + activations(batch) + [residual: batches · B · T · D · bytes of the dtype]

Scoring holds the teacher, or one layer of it, the head with one chunk of logits, and for every change under way its
own layer and its residual streams in fp32; in the host's memory, or in files, two streams more for all sequences that
may come to be asked for, the context's and the teacher's last:

    bytes = (teacher | layer) + 4 · V · D + 16 · min(1024, B · T) · V + changes · 4 · (params + batches · B · T · D)

One-pass scores hold, beside the teacher and the head, one batch's activations and gradients, and a group of variants;
in the host's memory what enters every layer and the gradients of the batches that a pass takes:

    bytes = (teacher | layer) + 4 · V · D + 20 · min(1024, B · T) · V + 16 · draws · B · T · D + Σ_variants 4 · params

Starting points (``init``) cannot be laid out in another way, only refused: see :func:`init_bytes`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from puzzle.types import GIB, AttentionSpec, ConfigError, FfnSpec, ModelShape, Spec
from puzzle.variants import keep_spec, params, rest_params

BYTES_PER_TRAINED_PARAM = 26  # weight, gradient, two moments: 16; start and best: 8; copy in bf16: 2
RESIDUAL_SHARE = 0.5  # of the budget that a residual stream in memory may take
MOST_TOGETHER = 16  # changes; more would share little more
MOST_DRAWS = 16  # of labels a sequence, for one-pass scores
LOGIT_TOKENS = 1024  # whose logits are held at once
NUM_FITS = {"gqa": 2, "window": 1}  # an attention's candidates whose last matrix is fitted, all in one pass
NUM_COPIES = {"narrow": 8, "experts": 2, "active": 1, "linear": 4}  # of an FFN's weights while candidates are compared
Residual = Literal["memory", "disk", "recompute"]


@dataclass(frozen=True)
class Unit:
    """What is trained as one piece."""

    name: str
    layer: int
    num_params: int


@dataclass(frozen=True)
class Machine:
    """``budget_bytes`` for the stage on its device; ``host_bytes`` of memory and ``disk_bytes`` free beside it."""

    budget_bytes: float
    host_bytes: float
    disk_bytes: float
    shared: bool  # the device is the host: the residual stream counts against the budget


@dataclass(frozen=True)
class BldPlan:
    """``groups`` of unit names train together; ``chunk`` batches are recomputed together, from a ``hold_teacher``."""

    residual: Residual
    hold_teacher: bool
    chunk: int
    groups: tuple[tuple[str, ...], ...]
    needed_bytes: float  # of the largest group, with all it needs


@dataclass(frozen=True)
class Batches:
    """The training batches: how many, their size, and bytes of one value of the residual stream."""

    count: int
    tokens: int
    dtype_bytes: int


def plan_bld(
    shape: ModelShape, units: Sequence[Unit], batches: Batches, machine: Machine, wanted: Residual | None = None
) -> BldPlan:
    """The fewest groups that fit. ConfigError where not even one unit at a time does."""
    layer_bytes = batches.dtype_bytes * max(_layer_params(shape, layer) for layer in range(shape.num_layers))
    one_batch = batches.tokens * shape.hidden_size * batches.dtype_bytes
    residual_bytes = float(one_batch * batches.count)
    room = machine.budget_bytes if machine.shared else machine.host_bytes
    residual = wanted or (
        "memory"
        if residual_bytes <= RESIDUAL_SHARE * room
        else "disk"
        if residual_bytes <= RESIDUAL_SHARE * machine.disk_bytes
        else "recompute"
    )
    teacher_bytes = layer_bytes * shape.num_layers
    hold = residual == "recompute" and teacher_bytes <= RESIDUAL_SHARE * machine.budget_bytes
    spare = RESIDUAL_SHARE * room - (teacher_bytes if hold and machine.shared else 0)
    chunk = 1 if hold or residual != "recompute" else int(max(1, min(batches.count, spare / 2 // one_batch)))
    fixed = activation_bytes(shape, batches.tokens) + (teacher_bytes if hold else 0.0)
    if machine.shared:
        fixed += {"memory": residual_bytes, "disk": 0.0, "recompute": float(chunk * one_batch)}[residual]
    groups, needed = _groups(units, machine.budget_bytes - fixed, layer_bytes)
    if needed + fixed > machine.budget_bytes:
        advice = "or lower distill.batch_size or data.sequence_tokens"
        raise _too_much("distill: one unit at a time needs", needed + fixed, machine, advice)
    return BldPlan(residual, hold, chunk, groups, needed + fixed)


@dataclass(frozen=True)
class ScorePlan:
    """``together`` changes are under way at once, on ``chunk`` batches at a time.

    What changes begin from is in memory for the first ``in_memory`` batches, in files for those of further rounds.
    """

    hold_teacher: bool
    together: int
    chunk: int
    in_memory: int


def plan_scores(shape: ModelShape, batches: Batches, machine: Machine, most: int, wider: int = 0) -> ScorePlan:
    """The most changes at once that fit, up to 16. ConfigError where not even one does, with one batch at a time.

    ``batches`` are those that scores begin with, ``most`` how many there are if all further rounds are asked for.
    ``wider``: channels that the widest FFN to score has more than the teacher's.
    """
    one_batch = 4.0 * batches.tokens * shape.hidden_size
    in_memory = _batches_in_memory(one_batch, most, machine)
    kept = 2 * one_batch * in_memory if machine.shared else 0.0
    hold = _holds_teacher(shape, batches, machine, kept)
    fixed = _standing_bytes(shape, batches, hold) + 16.0 * min(LOGIT_TOKENS, batches.tokens) * shape.vocab_size + kept
    fixed += 20.0 * wider * batches.tokens  # activations, as in activation_bytes
    own = 4.0 * (_largest_layer(shape) + 2 * 3 * shape.hidden_size * wider)  # fused beside what it is fused from
    room = machine.budget_bytes - fixed
    together = int(min(MOST_TOGETHER, room // (own + one_batch * batches.count)))
    if together >= 1:
        return ScorePlan(hold, together, batches.count, in_memory)
    chunk = int((room - own) // one_batch)
    if chunk < 1:
        advice = "or lower score.sequences or data.sequence_tokens"
        raise _too_much("score: one change on one batch needs", fixed + own + one_batch, machine, advice)
    return ScorePlan(hold, 1, chunk, in_memory)


def _batches_in_memory(one_batch: float, most: int, machine: Machine) -> int:
    """Of how many batches two streams take up to half of the room; ConfigError where files have none for the rest."""
    room = RESIDUAL_SHARE * (machine.budget_bytes if machine.shared else machine.host_bytes)
    in_memory = int(min(most, room // (2 * one_batch)))
    on_disk = 2 * one_batch * (most - in_memory)
    if on_disk > RESIDUAL_SHARE * machine.disk_bytes:
        raise ConfigError(
            f"score: the streams of {most} batches take {2 * one_batch * most / GIB:.2f} GiB, of which memory has room "
            f"for {room / GIB:.2f} GiB and the disk for {RESIDUAL_SHARE * machine.disk_bytes / GIB:.2f} GiB; lower "
            "score.sequences, or leave out score.until_se, with which all sequences of the split may be asked for"
        )
    return in_memory


def check_init(shape: ModelShape, specs: Mapping[int, Collection[Spec]], batches: Batches, machine: Machine) -> None:
    """ConfigError where the starting points of some layer, whose variants are ``specs``, do not fit in the budget."""
    stream = batches.count * batches.tokens * shape.hidden_size * batches.dtype_bytes if machine.shared else 0
    needed = stream + max(init_bytes(shape, layer, of_layer, batches.tokens) for layer, of_layer in specs.items())
    if needed > machine.budget_bytes:
        advice = "lower data.sequence_tokens, or set init.start: paper"
        raise _too_much("init: the starting points of one layer need", needed, machine, advice)


def init_bytes(shape: ModelShape, layer: int, specs: Collection[Spec], tokens: int) -> float:
    """The most that ``init`` holds for the variants ``specs`` of a layer, on batches of ``tokens``. An upper bound.

    All along the layer and its starts in fp32, and the moments in fp64; beside them the largest of: a product that is
    added to the moments; the attention's fits; the solutions for an FFN; the candidates of one variant, as weights and
    as modules.
    """
    size, heads = shape.hidden_size + 1, shape.num_attention_heads * shape.head_dim
    ffns = [spec for spec in specs if isinstance(spec, FfnSpec)]
    num_fits = sum(NUM_FITS.get(spec.kind, 0) for spec in specs if isinstance(spec, AttentionSpec))
    width = shape.intermediate_size if ffns and layer not in shape.moe_layers else 0
    joint = (width + size) ** 2 if width else 0
    attention, activations = params(AttentionSpec("keep"), shape), activation_bytes(shape, tokens)
    held = 4 * (_layer_params(shape, layer) + sum(params(spec, shape) for spec in specs)) + 8 * (joint + 4 * size**2)
    looking = 12 * joint + activations
    fit = 4 * (attention + heads * size) + 8 * heads * (heads + size)
    fitting = num_fits * 4 * attention + max(32 * attention, num_fits * fit + activations)
    fitted = num_fits * 4 * (attention + heads * size)
    solving = _solving_bytes(size, width, max((spec.intermediate_size or 0 for spec in ffns), default=0))
    choosing = 4 * max((NUM_COPIES[spec.kind] * params(spec, shape) for spec in ffns), default=0) + activations
    return held + max(looking, fitting, fitted + max(solving, choosing))


def _solving_bytes(size: int, width: int, narrow: int) -> float:
    """In fp64 for ``narrow`` of ``width`` channels (blocks/channels.py), the last two beside
    candidates in fp32."""
    if not narrow:
        return 0
    ordering = 3 * width**2 + 2 * width * size
    refitting = 3 * narrow**2 + narrow * width + 6 * narrow * size
    factoring, mixing = 3 * narrow**2 + 2 * narrow * size, narrow**2 + 4 * narrow * size + 10 * size**2
    mixing = (2 * width + 3 * size + narrow) * size + max(factoring, mixing)
    return max(8 * ordering, 28 * narrow * size + 8 * max(refitting, mixing))


@dataclass(frozen=True)
class OnePassPlan:
    """``chunk`` batches go through the teacher and back together; of a layer's variants ``variant_bytes`` are held."""

    chunk: int
    variant_bytes: float

    def groups(self, num_params: Sequence[int]) -> list[range]:
        """Places in ``num_params``, variants of one layer, as many together as fit; each fits alone."""
        starts, held = [0], 0.0
        for place, size in enumerate(num_params):
            if held and held + 4.0 * size > self.variant_bytes:
                starts.append(place)
                held = 0.0
            held += 4.0 * size
        return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(num_params)], strict=True)]


def plan_one_pass(shape: ModelShape, batches: Batches, draws: int, machine: Machine, hold_teacher: bool) -> OnePassPlan:
    """The most batches a pass, up to half of the host's room, and then the most variants of a layer at once.

    ConfigError where not even one of either fits.
    """
    one_batch, own = 4.0 * batches.tokens * shape.hidden_size, 4.0 * _largest_layer(shape)
    fixed = _standing_bytes(shape, batches, hold_teacher) + 4 * draws * one_batch
    fixed += 20.0 * min(LOGIT_TOKENS, batches.tokens) * shape.vocab_size
    held = one_batch * (shape.num_layers + 1 + draws)
    least = fixed + own + (held if machine.shared else 0.0)
    if least > machine.budget_bytes:
        advice = "or lower data.sequence_tokens"
        raise _too_much("score: one variant on one batch needs", least, machine, advice)
    if machine.shared:
        room = min(RESIDUAL_SHARE * machine.budget_bytes, machine.budget_bytes - fixed - own)
        chunk = int(min(batches.count, max(1, room // held)))
        return OnePassPlan(chunk, machine.budget_bytes - fixed - chunk * held)
    room = RESIDUAL_SHARE * machine.host_bytes
    if held > room:
        raise ConfigError(
            f"score: one batch needs {held / GIB:.2f} GiB of the host's memory where {room / GIB:.2f} GiB may be used; "
            "lower data.sequence_tokens"
        )
    return OnePassPlan(int(min(batches.count, room // held)), machine.budget_bytes - fixed)


def _holds_teacher(shape: ModelShape, batches: Batches, machine: Machine, kept: float) -> bool:
    """Whether scoring keeps all layers: where they fit in half of the budget, and one change beside them."""
    teacher = batches.dtype_bytes * _largest_layer(shape) * shape.num_layers
    one_batch = 4.0 * batches.tokens * shape.hidden_size
    exact = one_batch + kept
    one_pass = one_batch * (4 * MOST_DRAWS + (shape.num_layers + 1 + MOST_DRAWS if machine.shared else 0))
    least = _standing_bytes(shape, batches, hold=True) + 4.0 * _largest_layer(shape) + max(exact, one_pass)
    least += 20.0 * min(LOGIT_TOKENS, batches.tokens) * shape.vocab_size
    return teacher <= RESIDUAL_SHARE * machine.budget_bytes and least <= machine.budget_bytes


def _standing_bytes(shape: ModelShape, batches: Batches, hold: bool) -> float:
    """What scoring holds on the device in any case: the teacher or a layer, the head, one batch's activations."""
    layers = batches.dtype_bytes * _largest_layer(shape) * (shape.num_layers if hold else 1)
    return layers + 4.0 * rest_params(shape) + activation_bytes(shape, batches.tokens)


def _too_much(what: str, needed: float, machine: Machine, advice: str) -> ConfigError:
    allowed = f"where {machine.budget_bytes / GIB:.2f} GiB may be used; raise memory_budget_gib, {advice}"
    return ConfigError(f"{what} {needed / GIB:.2f} GiB {allowed}")


def activation_bytes(shape: ModelShape, tokens: int) -> float:
    """fp32 activations of one unit's forward and backward, and of the teacher's pass over its layer. An upper bound."""
    widest = max(shape.intermediate_size, shape.num_active_experts * shape.moe_intermediate_size)
    heads = (shape.num_attention_heads + 2 * shape.num_kv_heads) * shape.head_dim
    return 4.0 * tokens * (14 * shape.hidden_size + 5 * max(widest, heads))


def _groups(units: Sequence[Unit], room: float, layer_bytes: float) -> tuple[tuple[tuple[str, ...], ...], float]:
    """Consecutive units by layer, as many as fit in ``room`` bytes; and what the largest group takes."""
    groups: list[list[Unit]] = []
    for unit in sorted(units, key=lambda unit: unit.layer):
        if groups and _group_bytes([*groups[-1], unit], layer_bytes) <= room:
            groups[-1].append(unit)
        else:
            groups.append([unit])
    largest = max((_group_bytes(group, layer_bytes) for group in groups), default=0.0)
    return tuple(tuple(unit.name for unit in group) for group in groups), largest


def _group_bytes(group: Sequence[Unit], layer_bytes: float) -> float:
    layers = group[-1].layer - group[0].layer + 1
    return layers * layer_bytes + BYTES_PER_TRAINED_PARAM * sum(unit.num_params for unit in group)


def _largest_layer(shape: ModelShape) -> int:
    return max(_layer_params(shape, layer) for layer in range(shape.num_layers))


def _layer_params(shape: ModelShape, layer: int) -> int:
    return sum(params(keep_spec(shape, site), shape) for site in shape.sites if site.layer == layer)
