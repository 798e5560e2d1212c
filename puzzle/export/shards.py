"""Writes tensors as they come into safetensors files of a limited size, with the index that all readers know.

Holds one file's tensors at a time. One file is called ``model.safetensors``, several
``model-00001-of-00003.safetensors`` and so on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"


def write_sharded(tensors: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes ``tensors`` into ``folder``; a file holds at most ``shard_bytes`` unless a single tensor is larger."""
    held: dict[str, Tensor] = {}
    held_bytes, total = 0, 0
    written: list[tuple[str, ...]] = []

    def flush() -> None:
        save_file(held, folder / f"part-{len(written)}", metadata={"format": "pt"})
        written.append(tuple(held))
        held.clear()

    for name, tensor in tensors:
        if held and held_bytes + tensor.nbytes > shard_bytes:
            flush()
            held_bytes = 0
        held[name] = tensor.contiguous()
        held_bytes += tensor.nbytes
        total += tensor.nbytes
    flush()

    count = len(written)
    files = [
        f"model-{index + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
        for index in range(count)
    ]
    for index, file in enumerate(files):
        (folder / f"part-{index}").rename(folder / file)
    if count > 1:
        places = {name: file for file, names in zip(files, written, strict=True) for name in names}
        index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=1)
        (folder / INDEX).write_text(index_text + "\n")
