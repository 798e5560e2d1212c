"""Where and when a result was obtained: the header of every result file."""

from __future__ import annotations

import datetime
import os
import platform
from importlib import metadata

import torch


def environment(device: str = "cpu") -> dict[str, object]:
    names = ("torch", "transformers", "ortools", "numpy")
    machine = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in names},
    }
