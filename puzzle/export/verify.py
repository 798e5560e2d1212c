"""Checks an exported folder the way a stranger would use it: in a new process that cannot import ``puzzle``.

Reads the export and a reference (safetensors: ``input_ids``, ``logits`` of the model in memory, fp32); computes, in
fp32 on the CPU, how far the reloaded model is from the reference and from itself under a cache and under padding;
writes nothing that stays.

    python -m puzzle.export.verify EXPORT REFERENCE.safetensors
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from puzzle.types import ConfigError, CorruptFileError

LOGIT_TOLERANCE = 1e-5
CHUNKED_TOLERANCE = 1e-4
LEFT_PADDING_TOLERANCE = 1e-4
_CHILD = Path(__file__).with_name("verify_child.py")


@dataclass(frozen=True)
class Verification:
    """Largest absolute differences between logits; ``passed`` follows from the other fields."""

    max_logit_difference: float
    cache_matches: bool
    chunked_difference: float
    left_padding_difference: float
    passed: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "passed", not self.failures)

    @property
    def failures(self) -> tuple[str, ...]:
        """What is wrong, in words; empty when the export passed."""
        numbers = (
            ("the reloaded logits differ from the model in memory", self.max_logit_difference, LOGIT_TOLERANCE),
            ("continuing a cache in chunks differs from one shot", self.chunked_difference, CHUNKED_TOLERANCE),
            ("left padding changes the logits", self.left_padding_difference, LEFT_PADDING_TOLERANCE),
        )
        # Not "difference > tolerance": a NaN must fail.
        words = [f"{what}: by {found:.2e}, allowed {most:.0e}" for what, found, most in numbers if not found <= most]
        if not self.cache_matches:
            words.append("greedy generation with the cache differs from generation without it")
        return tuple(words)


@torch.no_grad()
def write_reference(model: PreTrainedModel, path: Path, batch_size: int = 2, num_tokens: int = 24) -> None:
    """Writes the logits of ``model`` on random tokens to ``path``, computed in fp32 on a CPU copy of it."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (batch_size, num_tokens), generator=generator)
    twin: Any = copy.deepcopy(model)
    twin = twin.to(device="cpu", dtype=torch.float32).eval()
    logits = twin(input_ids=tokens, use_cache=False).logits
    save_file({"input_ids": tokens, "logits": logits.contiguous()}, path)


def verify_hf(export_dir: Path, reference_file: Path) -> Verification:
    """Reloads ``export_dir`` in a clean process and compares it with ``reference_file`` and with itself.

    Runs the code in the export, if it has any. Raises ConfigError where a path is missing, CorruptFileError where the
    export cannot be loaded, or not by the code it carries.
    """
    for path in (export_dir / "config.json", reference_file):
        if not path.is_file():
            raise ConfigError(f"{path}: no such file")
    with tempfile.TemporaryDirectory(prefix="puzzle-verify-") as folder:
        result_file = Path(folder) / "result.json"
        paths = (export_dir, reference_file, result_file)
        # -I: neither PYTHONPATH, nor the working folder, nor the script's own folder is on the path.
        command = [sys.executable, "-I", str(_CHILD), *(str(path.resolve()) for path in paths)]
        # As many threads as here, so that sums are taken in the same order; a private cache for the copied code.
        command.append(str(torch.get_num_threads()))
        environment = {**os.environ, "HF_HOME": folder, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        for name in ("HF_MODULES_CACHE", "HF_HUB_CACHE", "TRANSFORMERS_CACHE"):
            environment.pop(name, None)  # would take precedence over HF_HOME
        run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if run.returncode != 0:
            lines = run.stderr.strip().splitlines() or [f"exit code {run.returncode}"]
            raise CorruptFileError(f"{export_dir}: could not be checked in a clean process: {lines[-1]}")
        return Verification(**json.loads(result_file.read_text()))


def main(arguments: list[str] | None = None) -> int:
    """Prints the verdict; 0 if the export passed, 1 if not, otherwise the error's exit code."""
    parser = argparse.ArgumentParser(prog="python -m puzzle.export.verify", description=__doc__.splitlines()[0])
    parser.add_argument("export", type=Path, help="the exported folder")
    parser.add_argument("reference", type=Path, help="safetensors file with input_ids and logits")
    options = parser.parse_args(arguments)
    try:
        verification = verify_hf(options.export, options.reference)
    except (ConfigError, CorruptFileError) as error:
        print(error, file=sys.stderr)
        return error.exit_code
    for failure in verification.failures:
        print(f"FAILED: {failure}")
    if verification.passed:
        print(f"passed: logits within {verification.max_logit_difference:.1e} of the model in memory")
    return 0 if verification.passed else 1


if __name__ == "__main__":
    sys.exit(main())
