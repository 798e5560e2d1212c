"""The library on disk: one immutable folder per unit, in ``library/{initial,trained}/UNIT/``.

Writes and reads ``weights.safetensors`` (names within a layer), in the dtype that the teacher's own weights are stored
in: the student's are rounded to it too, so what is scored is what is built. A unit is one item (``L003.ffn.linear``,
``L003.gqa-2+narrow-256``) or a nested FFN whose first channels are several (``L003.ffn.nested``). ``keep`` is the
teacher itself, ``skip`` has no weights; neither is stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from puzzle.blocks.nested import prefix
from puzzle.teacher import read_tensors
from puzzle.types import CorruptFileError, FfnSpec, Item

WEIGHTS = "weights.safetensors"


def write_weights(folder: Path, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    rounded = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in weights.items()}
    save_file(rounded, folder / WEIGHTS)


def read_weights(folder: Path, finite: bool = True) -> dict[str, Tensor]:
    """The tensors of one unit; CorruptFileError where they are unreadable or, if they should be ``finite``, are not."""
    weights = read_tensors(folder / WEIGHTS)
    for name, tensor in weights.items():
        if finite and not torch.isfinite(tensor).all():
            raise CorruptFileError(f"{folder / WEIGHTS}: {name} holds values that are not finite; delete {folder}")
    return weights


def item_view(weights: Mapping[str, Tensor], item: Item, sharing: Sequence[Item]) -> dict[str, Tensor]:
    """The item's part of a unit's weights: all of them, unless several items share the unit."""
    spec = item.specs[0]
    if len(sharing) == 1:
        return dict(weights)
    assert isinstance(spec, FfnSpec) and spec.intermediate_size is not None
    return prefix(weights, spec.intermediate_size)
