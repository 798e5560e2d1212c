"""What llama.cpp makes of a GGUF file, through llama-cpp-python; a script that knows nothing of ``puzzle``.

Reads EXPORT and REFERENCE.safetensors; writes the measured differences to RESULT.json. The KV cache is fp32 and flash
attention off: with the defaults, logits are 1e-3 away for reasons that are not the file's.

    python -I verify_llama_cpp.py EXPORT REFERENCE.safetensors RESULT.json NUM_THREADS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

NOT_INSTALLED = 3
try:
    import llama_cpp
    import numpy as np
    from safetensors.numpy import load_file
except ImportError as error:
    print(error, file=sys.stderr)
    sys.exit(NOT_INSTALLED)

F32 = 0  # ggml's number of it
ALL_F32 = "0"  # llama.cpp's number of such a file


def surprise(logits: np.ndarray, tokens: np.ndarray) -> float:
    """Cross-entropy of each token after the first, on average, in nats."""
    shifted = logits[:-1].astype(np.float64) - logits[:-1].max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return float(-log_p[np.arange(len(log_p)), tokens[1:]].mean())


def greedy_tokens_unlike(model: llama_cpp.Llama, reference: dict[str, np.ndarray]) -> float:
    """Of a text that is continued greedily, one token at a time."""
    ids, count = [int(token) for token in reference["greedy_ids"]], int(reference["num_greedy"])
    model.reset()
    model.eval(ids[:-count])
    found = []
    for _ in range(count):
        found.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(found[-1:])
    return float(sum(one != other for one, other in zip(found, ids[-count:], strict=True)))


def main(export_dir: str, reference_file: str, result_file: str, num_threads: str) -> None:
    reference = load_file(reference_file)
    (file,) = Path(export_dir).glob("*.gguf")
    tokens = reference["input_ids"]
    model = llama_cpp.Llama(
        str(file),
        n_ctx=max(tokens.shape[1], len(reference.get("greedy_ids", ()))),
        n_threads=int(num_threads),
        n_gpu_layers=0,
        logits_all=True,
        type_k=F32,
        type_v=F32,
        flash_attn=False,
        verbose=False,
    )
    difference, surprises = 0.0, []
    for row, expected in zip(tokens, reference["logits"], strict=True):
        model.reset()
        model.eval([int(token) for token in row])
        logits = model.scores[: len(row)]
        difference = max(difference, float(np.abs(logits - expected).max()))
        surprises.append(surprise(logits, row) - surprise(expected, row))
    text, ids = bytes(reference["text"]), [int(token) for token in reference["text_ids"]]
    found = model.tokenize(text, add_bos=False, special=False)
    unlike = sum(one != other for one, other in zip(found, ids, strict=False)) + abs(len(found) - len(ids))
    differences = {
        "max_logit_difference": difference,
        "tokens_of_text_unlike": float(unlike),
        "ce_change_nats": float(np.mean(surprises)),
    }
    if "greedy_ids" in reference:
        differences["greedy_tokens_unlike"] = greedy_tokens_unlike(model, reference)
    # products with weights in 16 bits are of activations in 16 bits
    rounds = model.metadata.get("general.file_type") != ALL_F32
    result = {"version": llama_cpp.__version__, "differences": differences, "rounds": rounds}
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
