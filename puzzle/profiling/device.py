"""Names of devices as cost tables and workloads write them: ``cpu``, ``mps``, ``h200``. Asks torch for a GPU's name.

A PCIe or NVL board is a device of its own (``h100-pcie``): an H100 PCIe has 60 % of the bandwidth of an H100 SXM, which
is the plain ``h100``, so a table of the one must not answer for the other.
"""

from __future__ import annotations

import re

_VENDORS = {"nvidia", "tesla", "geforce", "quadro", "amd", "instinct", "radeon", "intel"}
# memory sizes, and the form factors that a plain name means; a MIG slice (1g.10gb) is another device
_BOARD = re.compile(r"\d+gb|hbm\d?e?|sxm\d?|oam")


def device_slug(marketing_name: str) -> str:
    """``NVIDIA H100 80GB HBM3`` → ``h100``, ``NVIDIA H100 PCIe`` → ``h100-pcie``, ``… RTX 4090`` → ``rtx-4090``."""
    words = [word for word in re.split(r"[\s-]+", marketing_name.lower()) if word]
    kept = [word for word in words if word not in _VENDORS and not _BOARD.fullmatch(word)]
    return "-".join(kept or words)


def device_name(device: str) -> str:
    """The name of a torch device (``cpu``, ``mps``, ``cuda``, ``cuda:1``) in cost tables."""
    if not device.startswith("cuda"):
        return device
    import torch

    return device_slug(torch.cuda.get_device_name(device))
