"""JSON Schema of the files that users write, for editors: completion, descriptions, mistakes while typing.

Computes dictionaries from the models in config and what is said of the metrics below; writes nothing. The schema
knows single values; what values mean together (workloads and their bounds, the teacher's sizes) only `puzzle validate`
knows.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel

from puzzle.config import OBJECTIVES, ConstraintFile, GridFile, RunConfig, SpaceFile
from puzzle.search.metrics import METRICS

Kind = Literal["constraints", "config", "space", "grid"]
FILES: dict[Kind, type[BaseModel]] = {
    "constraints": ConstraintFile,
    "config": RunConfig,
    "space": SpaceFile,
    "grid": GridFile,
}

METRIC_DESCRIPTIONS = {
    "memory_gib": "weights, KV cache at isl + osl tokens and workspace on one GPU, in GiB; a bare number is a maximum",
    "weights_gib": "weights on one GPU, in GiB (bf16 where the file has no workload)",
    "kv_cache_gib": "KV cache of the whole batch at isl + osl tokens on one GPU, in GiB",
    "ttft_ms": "milliseconds until the first token of the whole batch",
    "tpot_ms": "milliseconds per further token, the mean over the generation",
    "e2e_ms": "milliseconds of whole requests: ttft + (osl - 1) * tpot",
    "output_tok_per_s": "generated tokens per second over the batch; a bare number is a minimum",
    "total_tok_per_s": "prompt and generated tokens per second over the batch; a bare number is a minimum",
    "req_per_s": "requests per second; a bare number is a minimum",
    "params": "parameters, embeddings included",
    "active_params": "parameters that one token meets: of experts, the active ones",
    "layers_with_attention": "layers that keep real attention; a bare number is a minimum",
    "layers_with_ffn": "layers that keep a real FFN; a bare number is a minimum",
    "kv_heads_total": "KV heads, summed over the layers",
    "kl_nats": "sum of the variants' KL to the teacher, nats per token",
    "ce_delta_nats": "sum of the variants' cross-entropy over the teacher's, nats per token",
    "hidden_distance": "sum of the variants' distances of the final hidden states",
}


def schema(kind: Kind) -> dict[str, Any]:
    """The JSON Schema (2020-12) of one kind of file."""
    found = FILES[kind].model_json_schema()
    if kind == "constraints":
        constraints = found["properties"]["constraints"]
        limit = constraints["additionalProperties"]  # anything else: scores of the user's own
        constraints["properties"] = {
            name: {"description": METRIC_DESCRIPTIONS[name], **limit} for name in (*METRICS, *OBJECTIVES)
        }
        of_workloads = [name for name, metric in METRICS.items() if metric.workload != "none"]
        constraints["patternProperties"] = {
            rf"\.{re.escape(name)}$": {"description": METRIC_DESCRIPTIONS[name], **limit} for name in of_workloads
        }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found, "title": f"puzzle {kind} file"}
