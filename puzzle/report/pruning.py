"""What a pruning comes to before anything runs: the student's sizes, parameters and costs, and what its distillation
takes. Pure; reads the run's config, and of the teacher ``config.json`` alone.

    FLOPs of a token = 6 * active parameters of the student + 2 * those of the teacher
    GPU-hours        = FLOPs * tokens / (rate of the data sheet * share of it that is reached) / 3600

forward and backward for the student, forward for the teacher that distils it; attention's own FLOPs are left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from puzzle.profiling.hardware import HARDWARE, hardware
from puzzle.pruning import SIZES, num_dropped, predicted, pruned_shape
from puzzle.search.constraints import workloads
from puzzle.types import ModelShape
from puzzle.variants import active_params, keep_spec, model_params, rest_params

if TYPE_CHECKING:
    from puzzle.run import Run

EFFICIENCY = 0.4  # of the matmul rate that a whole training step reaches; for estimates only
DEVICE = "h100"  # of GPU-hours where no workload names another that is known
SHOWN = ("memory_gib", "kv_cache_gib", "ttft_ms", "tpot_ms", "output_tok_per_s")


def plan_text(run: Run) -> str:
    """A table of teacher and student, or of the students that compete, which layers go, and GPU-hours."""
    students = [pruned_shape(one.pruning, run.shape) for one in run.contenders]
    shapes = (run.shape, *students)
    names = ("teacher", *(["student"] if len(students) == 1 else [f"student {n}" for n in range(1, len(shapes))]))
    rows = [(label, *(f"{getattr(shape, name):,}" for shape in shapes)) for name, label in SIZES.items()]
    rows.append(("head size", *(f"{shape.head_dim:,}" for shape in shapes)))
    rows.append(("parameters", *(f"{model_params(shape):,}" for shape in shapes)))
    totals = [predicted(shape, run.constraint_file) for shape in shapes]
    for workload in workloads(run.constraint_file, run.shape):
        for name in (f"{workload.name}.{metric}" for metric in SHOWN):
            if name in totals[0]:
                rows.append((name, *(f"{of[name]:,.4g}" for of in totals)))
    lines = [f"{name:<28}{''.join(f'{cell:>18}' for cell in cells)}" for name, *cells in (("", *names), *rows)]
    going = dict.fromkeys(_layers(one) for one in run.contenders)
    return "\n".join([*lines, *going, _hours(run, max(students, key=_active))])


def _layers(run: Run) -> str:
    listed, count = run.pruning.layers_by, num_dropped(run.pruning, run.shape)
    if not count:
        return "no layer goes"
    if isinstance(listed, tuple):
        return f"layers that go: {', '.join(map(str, sorted(listed)))}"
    return f"{count} layers go, chosen by {listed}"


def _hours(run: Run, student: ModelShape) -> str:
    served = [one.device for one in workloads(run.constraint_file, run.shape) if one.device in HARDWARE]
    sheet, tokens = hardware((served or [DEVICE])[0]), run.config.kd.tokens
    flops = 6 * _active(student) + 2 * _active(run.distilling.shape)
    rate = sheet.matmul_flops_per_s("bf16")
    hours = flops * tokens / (rate * EFFICIENCY) / 3600
    return (
        f"distillation: {tokens:,} tokens * (6 * student + 2 * teacher) = {flops * tokens:.3g} FLOPs; "
        f"at {EFFICIENCY:.0%} of {rate / 1e12:,.0f} TFLOP/s (bf16, {sheet.device}) {hours:,.0f} GPU-hours"
    )


def _active(shape: ModelShape) -> int:
    """Parameters that one token is multiplied with: of the embedding and the head, the head."""
    layers = sum(active_params(keep_spec(shape, site), shape) for site in shape.sites)
    return layers + rest_params(shape) - (0 if shape.tied_embeddings else shape.vocab_size * shape.hidden_size)
