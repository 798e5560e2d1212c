"""The checks of :mod:`puzzle.export.verify`, run as a script by it; knows nothing of ``puzzle``.

Reads EXPORT and REFERENCE.safetensors; writes the measured differences to RESULT.json.

    python -I verify_child.py EXPORT REFERENCE.safetensors RESULT.json NUM_THREADS
"""

# torch and transformers are typed in parts only.
# mypy: allow-untyped-calls

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# Where puzzle is installed, an export that imports it must fail as it would on a stranger's machine.
sys.modules["puzzle"] = None  # type: ignore[assignment]

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig  # noqa: E402

NUM_NEW_TOKENS = 8


def load(export_dir: str) -> Any:
    """The model in fp32, checked to be run by the code that the export names, with every tensor accounted for."""
    config = AutoConfig.from_pretrained(export_dir, trust_remote_code=True)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        export_dir, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    model, info = loaded
    has_own_code = "auto_map" in json.loads((Path(export_dir) / "config.json").read_text())
    expected = "transformers_modules." if has_own_code else "transformers.models."
    for kind in (type(config), type(model)):
        if not kind.__module__.startswith(expected):
            raise ImportError(f"{kind.__name__} was loaded from {kind.__module__}, not from {expected}…")
    if any(info.values()):
        raise ValueError(f"the weights do not fit the model: {info}")
    return model.eval()


def difference(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max())


def tokens_unlike_without_cache(model: Any, tokens: Tensor) -> float:
    """Of greedy generation."""
    # The checkpoint's own settings may sample or stop early; neither belongs here.
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0, max_new_tokens=NUM_NEW_TOKENS)
    mask = torch.ones_like(tokens)
    cached, plain = (model.generate(tokens, attention_mask=mask, use_cache=use_cache) for use_cache in (True, False))
    return float((cached != plain).sum()) if cached.shape == plain.shape else float("inf")


def chunked_difference(model: Any, tokens: Tensor) -> float:
    """Prefill in two chunks, then one token at a time, against all tokens at once."""
    num_tokens = tokens.shape[1]
    first, second = num_tokens // 3, num_tokens // 3
    sizes = [first, second, *[1] * (num_tokens - first - second)]
    cache, parts = None, []
    for chunk in tokens.split(sizes, dim=1):
        output = model(chunk, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    return difference(torch.cat(parts, dim=1), model(tokens).logits)


def left_padding_difference(model: Any, tokens: Tensor) -> float:
    """A batch in which the first sequence is shortened from the left, against that sequence alone."""
    num_padding = tokens.shape[1] // 3
    mask = torch.ones_like(tokens)
    mask[0, :num_padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = model(tokens * mask, attention_mask=mask, position_ids=positions).logits
    alone = model(tokens[:1, num_padding:]).logits
    rest = difference(padded[1:], model(tokens[1:]).logits) if len(tokens) > 1 else 0.0
    return max(difference(padded[:1, num_padding:], alone), rest)


@torch.no_grad()
def main(export_dir: str, reference_file: str, result_file: str, num_threads: str) -> None:
    torch.set_num_threads(int(num_threads))
    reference = load_file(reference_file)
    tokens = reference["input_ids"]
    model = load(export_dir)
    differences = {
        "max_logit_difference": difference(model(tokens, use_cache=False).logits, reference["logits"]),
        "chunked_difference": chunked_difference(model, tokens),
        "left_padding_difference": left_padding_difference(model, tokens),
        "tokens_unlike_without_cache": tokens_unlike_without_cache(model, tokens),
    }
    Path(result_file).write_text(json.dumps({"version": transformers.__version__, "differences": differences}))


if __name__ == "__main__":
    main(*sys.argv[1:])
