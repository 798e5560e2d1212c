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


def main(export_dir: str, reference_file: str, result_file: str, num_threads: str) -> None:
    reference = load_file(reference_file)
    (file,) = Path(export_dir).glob("*.gguf")
    tokens = reference["input_ids"]
    model = llama_cpp.Llama(
        str(file),
        n_ctx=tokens.shape[1],
        n_threads=int(num_threads),
        n_gpu_layers=0,
        logits_all=True,
        type_k=F32,
        type_v=F32,
        flash_attn=False,
        verbose=False,
    )
    difference = 0.0
    for row, expected in zip(tokens, reference["logits"], strict=True):
        model.reset()
        model.eval([int(token) for token in row])
        difference = max(difference, float(np.abs(model.scores[: len(row)] - expected).max()))
    text, ids = bytes(reference["text"]), [int(token) for token in reference["text_ids"]]
    found = model.tokenize(text, add_bos=False, special=False)
    unlike = sum(one != other for one, other in zip(found, ids, strict=False)) + abs(len(found) - len(ids))
    differences = {"max_logit_difference": difference, "tokens_of_text_unlike": float(unlike)}
    # products with weights in 16 bits are of activations in 16 bits
    rounds = model.metadata.get("general.file_type") != ALL_F32
    result = {"version": llama_cpp.__version__, "differences": differences, "rounds": rounds}
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
