"""What several stages need of a run: the device, the teacher, the tokens, an item's weights."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from puzzle import artifacts
from puzzle.blocks import library
from puzzle.blocks.fusion import fuse
from puzzle.data.batches import Batch, TokenData, read_tokens
from puzzle.memory_plan import Batches, Machine
from puzzle.modeling import PuzzleForCausalLM, part_prefixes
from puzzle.ranks import Ranks
from puzzle.run import Run
from puzzle.teacher import Compute, Shards, Teacher, load_config, load_model
from puzzle.types import GIB, Item
from puzzle.variants import has_weights, is_fused, made_of

BATCH_SEQUENCES = 8
HELD_OUT_SEQUENCES = 16
HOST_SHARE, GPU_SHARE = 0.6, 0.9  # of what is free, where the config names no budget: a host has others to serve


def compute_of(run: Run) -> Compute:
    return Compute.choose(run.config.device, run.config.dtype)


@functools.lru_cache(maxsize=1)
def _cached_model(folder: Path, fingerprint: str, compute: Compute) -> PuzzleForCausalLM:
    return load_model(folder, compute)


def teacher_of(run: Run) -> PuzzleForCausalLM:
    """The whole teacher, loaded once for consecutive stages of one process."""
    return _cached_model(run.teacher, run.teacher_fingerprint, compute_of(run))


def forget_teacher() -> None:
    """Makes room."""
    _cached_model.cache_clear()


def streamed_teacher(run: Run, dtype: torch.dtype, held: bool = False) -> Teacher:
    """The teacher one layer at a time."""
    return Teacher(run.teacher, compute_of(run).device, dtype, held)


def stored_dtype(run: Run) -> torch.dtype:
    """The dtype the teacher's weights are stored in: the library's and the student's too."""
    dtype: torch.dtype = getattr(torch, run.stored_dtype)
    return dtype


def machine_of(run: Run) -> Machine:
    """What this process may use of the machine, which it shares with other ranks, and of what the config allows."""
    device, sharing = compute_of(run).device, Ranks.current().count_here
    host = psutil.virtual_memory().available / sharing
    disk = psutil.disk_usage(str(run.folder)).free / sharing
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps for later counts as taken
    free = float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else host
    given = run.config.memory_budget_gib
    share = GPU_SHARE if device.type == "cuda" else HOST_SHARE
    return Machine(given * GIB if given is not None else share * free, HOST_SHARE * host, disk, device.type != "cuda")


def tokens_of(run: Run) -> TokenData:
    return read_tokens(artifacts.read_unit(run.data), run.config.data)


def num_batches(sequences: int) -> int:
    """That so many sequences make, read together."""
    return -(-sequences // BATCH_SEQUENCES)


def batch_sizes(run: Run, count: int, sequences: int) -> Batches:
    """Of ``count`` batches for scoring, where at most so many ``sequences`` are read at a time."""
    tokens = min(BATCH_SEQUENCES, sequences) * run.config.data.sequence_tokens
    return Batches(count, tokens, compute_of(run).dtype.itemsize)


def sequences_of(run: Run, split: str, count: int, first: int = 0) -> list[Batch]:
    """Batches on the device of sequences ``first`` to ``count``, in an order that the run's seed alone decides."""
    drawn = tokens_of(run).sequences(split, count, run.config.seed).rows(slice(first, count))
    return [batch.to(compute_of(run).device) for batch in drawn.split(BATCH_SEQUENCES)]


def held_out_of(run: Run) -> list[Batch]:
    """Batches of ``train`` that nothing is trained on: they choose between starts, and say when training stops."""
    tokens = tokens_of(run)
    held_out = tokens.held_out(min(HELD_OUT_SEQUENCES, tokens.num_held_out))
    return [batch.to(compute_of(run).device) for batch in held_out.split(BATCH_SEQUENCES)]


def write_unit(run: Run, weights: Mapping[str, Tensor], payload: Mapping[str, Any], aside: Path) -> Mapping[str, Any]:
    """Fills a unit of the library; for ``publish_folder``."""
    library.write_weights(aside, weights, stored_dtype(run))
    return payload


def item_weights(run: Run, item: Item) -> Mapping[str, Tensor]:
    """The trained weights of an item, by names within the layer; none for what is the teacher's, or nothing.

    They are finite, but for an item marked failed, which is never chosen.
    """
    if not has_weights(item):
        return {}
    if is_fused(item):
        fused = fuse([_ffn(run, ffn) for ffn in made_of(item, run.shape)])
        # rounded as the library and the student are, so what is scored is what is built
        return {name: tensor.to(stored_dtype(run)) for name, tensor in fused.items()}
    unit = run.unit_of(item)
    failed = "failed" in artifacts.read_unit(run.trained(unit)).payload
    return library.item_view(library.read_weights(run.trained(unit), finite=not failed), item, run.units[unit])


def _ffn(run: Run, item: Item) -> Mapping[str, Tensor]:
    """The weights of an FFN, trained or the teacher's own, by names within the layer."""
    if has_weights(item):
        return item_weights(run, item)
    config = load_config(run.teacher)
    shards, layer = Shards(run.teacher, config), f"model.layers.{item.layers[0]}."
    read = [shards.read(layer + own, torch.device("cpu"), torch.float32) for own in part_prefixes(config, "ffn")]
    return {name.removeprefix(layer): tensor for tensors in read for name, tensor in tensors.items()}
