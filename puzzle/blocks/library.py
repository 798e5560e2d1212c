"""The library on disk: one immutable unit per trained variant, in ``library/{initial,trained}/ITEM/``.

Writes and reads ``weights.safetensors`` (fp32, names within a layer). ``keep`` is the teacher itself, ``skip`` has no
weights; neither is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from puzzle.teacher import read_tensors
from puzzle.types import CorruptFileError

WEIGHTS = "weights.safetensors"


def write_weights(folder: Path, weights: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of one unit; CorruptFileError where they are unreadable or not finite."""
    weights = read_tensors(folder / WEIGHTS)
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise CorruptFileError(f"{folder / WEIGHTS}: {name} holds values that are not finite; delete {folder}")
    return weights
