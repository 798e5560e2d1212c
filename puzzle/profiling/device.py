"""Names of devices as cost tables and workloads write them: ``cpu``, ``mps``, ``h200``. Asks torch for a GPU's name."""

from __future__ import annotations

import re

_VENDORS = {"nvidia", "tesla", "geforce", "quadro", "amd", "instinct", "radeon", "intel"}
# memory sizes and form factors: an H100 is an H100 on whatever board, a MIG slice of it (1g.10gb) is not
_BOARD = re.compile(r"\d+gb|hbm\d?e?|sxm\d?|pcie|nvl|oam")


def device_slug(marketing_name: str) -> str:
    """``NVIDIA H100 80GB HBM3`` → ``h100``, ``NVIDIA GeForce RTX 4090`` → ``rtx-4090``."""
    words = [word for word in re.split(r"[\s-]+", marketing_name.lower()) if word]
    kept = [word for word in words if word not in _VENDORS and not _BOARD.fullmatch(word)]
    return "-".join(kept or words)


def device_name(device: str) -> str:
    """The name of a torch device (``cpu``, ``mps``, ``cuda``, ``cuda:1``) in cost tables."""
    if not device.startswith("cuda"):
        return device
    import torch

    return device_slug(torch.cuda.get_device_name(device))
