"""What mlx-lm makes of a folder; a script that knows nothing of ``puzzle``.

Reads EXPORT and REFERENCE.safetensors; writes the measured differences to RESULT.json, computed in fp32.

    python -I verify_mlx.py EXPORT REFERENCE.safetensors RESULT.json NUM_THREADS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

NOT_INSTALLED = 3
try:
    import mlx.core as mx
    import mlx_lm
    import numpy as np
    from mlx_lm.utils import load_model
    from safetensors.numpy import load_file
except ImportError as error:
    print(error, file=sys.stderr)
    sys.exit(NOT_INSTALLED)


def main(export_dir: str, reference_file: str, result_file: str, _num_threads: str) -> None:
    reference = load_file(reference_file)
    model, _ = load_model(Path(export_dir))
    model.set_dtype(mx.float32)
    tokens = mx.array(reference["input_ids"])
    whole = np.array(model(tokens))
    cache, parts = model.make_cache(), []
    for position in range(tokens.shape[1]):
        parts.append(np.array(model(tokens[:, position : position + 1], cache=cache)))
    differences = {
        "max_logit_difference": float(np.abs(whole - reference["logits"]).max()),
        "chunked_difference": float(np.abs(np.concatenate(parts, axis=1) - whole).max()),
    }
    if "greedy_ids" in reference:
        ids, count = reference["greedy_ids"].tolist(), int(reference["num_greedy"])
        cache, grown = model.make_cache(), ids[:-count]
        logits = model(mx.array([grown]), cache=cache)
        for _ in range(count):
            grown.append(int(logits[0, -1].argmax()))
            logits = model(mx.array([grown[-1:]]), cache=cache)
        differences["greedy_tokens_unlike"] = float(sum(a != b for a, b in zip(grown, ids, strict=True)))
    Path(result_file).write_text(json.dumps({"version": mlx_lm.__version__, "differences": differences}))


if __name__ == "__main__":
    main(*sys.argv[1:])
