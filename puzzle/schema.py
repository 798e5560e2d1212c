"""JSON Schema of the files that users write, for editors: completion, descriptions, mistakes while typing.

Computes dictionaries from the models in config.py and the descriptions below; writes nothing. The schema knows single
values; what values mean together (workloads and their bounds, the teacher's sizes) only `puzzle validate` knows.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel

from puzzle.config import OBJECTIVES, ConstraintFile, GridFile, RunConfig, SpaceFile
from puzzle.search.metrics import METRICS

__all__ = ["FILES", "schema"]

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

# By model and field; a test holds that none is missing.
DESCRIPTIONS: dict[str, dict[str, str]] = {
    "ConstraintFile": {
        "workloads": "what is served, by names of your own",
        "constraints": "bounds: metric, or workload.metric; a number, a percentage of the teacher's own value (75%), "
        "{min, max, eq}, or {values: [...]} for one search each. Without a workload: every workload",
        "serve_on": "only variants that all these runtimes can load",
        "objective": "the score whose sum is made as small as possible; or a cost such as chat.e2e_ms, while "
        "constraints bound such a sum",
        "solutions": "how many different answers",
    },
    "WorkloadFile": {
        "isl": "prompt tokens of a request",
        "osl": "generated tokens of a request",
        "batch_size": "requests at once; of a list the search takes the best",
        "weights": "dtype of the weights: fp32, bf16, fp16, fp8, int8, int4-g32, int4-g128",
        "kv": "dtype of the KV cache",
        "device": "where the times are measured or estimated for, e.g. h100",
        "tp": "GPUs that share the model (tensor parallelism); memory is per GPU",
        "runtime": "the serving program",
    },
    "BoundFile": {"min": "at least", "max": "at most", "eq": "exactly; of whole numbers only"},
    "ValuesFile": {"values": "one search for each"},
    "SolutionsFile": {
        "count": "how many",
        "min_difference": "share of the sites in which each differs from every other",
    },
    "SpaceFile": {
        "attention": "variants of every attention: keep, gqa-K, gqa-*, window-W, window-W-sinks-S, linear, skip",
        "ffn": "variants of every FFN: keep, narrow-N, narrow-50%, experts-N, active-K, linear, skip",
        "ffn_multiple_of": "what percentages of the FFN's width are rounded to (default: what hardware likes)",
        "layers": "other variants for single layers, by their numbers from 0",
        "pairs": "attention and FFN of a layer are trained, scored and chosen together",
        "runs": "offer leaving out up to so many consecutive layers whole, scored as one",
    },
    "LayerSpaceFile": {"attention": "this layer's attention variants", "ffn": "this layer's FFN variants"},
    "GridFile": {
        "batch_sizes": "every one of them is measured",
        "prefill_tokens": "prompt lengths, at every batch size",
        "decode_context_tokens": "tokens in the KV cache when one more is made, at every batch size",
        "repeats": "rounds of timing",
    },
    "RunConfig": {
        "run": "the folder that everything is written to",
        "teacher": "a Hugging Face folder, a hub id, org/name@revision, or demo",
        "constraints": "what the student must fit: a file, or the name of a shipped one",
        "space": "the variants on offer: a file, or the name of a shipped one",
        "seed": "of all that is random",
        "device": "what computes",
        "dtype": "what trains and scores: bf16 where it is fast, unless said otherwise",
        "memory_budget_gib": "what init, distill and score may take on the device (default: most of what is free)",
        "data": "the text",
        "init": "starting points of the variants",
        "distill": "block-wise local distillation",
        "score": "how much worse the model gets with each variant",
        "additivity": "puzzle additivity",
        "profile": "where times come from",
        "refine": "the search past sums of scores",
        "kd": "global distillation of the student",
        "evaluate": "the final comparison",
    },
    "DataConfig": {
        "text": "demo, a file (.txt, .md, .py, .jsonl, .parquet) or a folder",
        "sources": "several, mixed by weight, in the place of text",
        "tokens": "how many to take for each split (default: all there are)",
        "sequence_tokens": "length of a training or scoring sequence",
        "within_documents": "attention does not cross from one document to the next",
    },
    "SourceConfig": {
        "path": "a file or folder of documents, or demo",
        "dataset": "a data set that the datasets library can stream",
        "name": "the data set's configuration",
        "split": "the data set's split",
        "revision": "the data set's revision",
        "data_files": "the data set's files",
        "column": "the column of text (default text)",
        "messages": "the column of chat messages, in the place of text",
        "weight": "share of the tokens",
    },
    "TokensConfig": {
        "train": "tokens to train on",
        "score": "tokens to score variants on",
        "select": "tokens to choose between candidates on",
        "report": "tokens for the figures at the end",
    },
    "InitConfig": {
        "start": "the best of all starting points on held-out windows, or the paper's",
        "sequences": "how many of train they are made from",
    },
    "DistillConfig": {
        "tokens": "per variant; 0 leaves the starting points as they are",
        "batch_size": "sequences in a step",
        "learning_rate": "at its highest",
        "weight_decay": "of AdamW",
        "warmup_fraction": "share of the steps until the rate is at its highest",
        "loss_at": "the layer's output (the paper's), or what the site adds",
        "loss": "between activations",
        "patience": "stop a variant after so many checks without getting better; null trains all to the end",
        "nested": "one FFN per site holds all its narrow variants",
        "residual": "where the teacher's activations between layers are kept",
    },
    "ScoreConfig": {
        "mode": "measure every variant, or estimate in one pass and measure what decides; auto: exact up to 30 layers",
        "sequences": "how many of score",
        "until_se": "add sequences until a site's variants are told apart, or so close (nats)",
        "tasks": "scores of your own: name to module:function",
    },
    "AdditivityConfig": {"architectures": "how many are evaluated truly"},
    "RefineConfig": {
        "evaluations": "whole architectures that are evaluated truly; 0: the search's answer is taken as it is",
        "seed": "of what is random in it",
    },
    "VllmConfig": {
        "python": "the interpreter of vLLM's own environment",
        "tp": "tensor parallelism",
        "num_layers": "of the models that are measured; default the teacher's",
        "max_batched_tokens": "of all prompts in one forward",
        "kv_cache_gib": "default: as much as vLLM takes",
    },
    "ProfileConfig": {
        "backend": "measured here, in vllm, estimated from a data sheet (roofline), or imported from table",
        "grid": "what is measured: a file, or the name of a shipped one",
        "weights": "the dtype that is timed",
        "compile": "under torch.compile; workloads then name runtime transformers-compiled",
        "vllm": "where vLLM is, and how it is started",
        "table": "CSV or JSON of costs: imported, or what estimates are fitted to",
        "stand_in": "devices or dtypes whose times are taken from another's, e.g. {h100: h200}",
        "fit_models": "how many random models puzzle fit-costs measures beside the teacher",
        "safety": "standard errors of predicted times that the search keeps clear of limits",
    },
    "KdConfig": {
        "tokens": "0 leaves the student as it was built",
        "batch_size": "sequences in a step",
        "learning_rate": "at its highest",
        "min_learning_rate": "at the end",
        "warmup_steps": "until the rate is at its highest",
        "weight_decay": "of AdamW",
        "kl_weight": "of KL between the logits",
        "cosine_weight": "of 1 - cos, summed over the layers",
        "lm_weight": "of the language model's cross-entropy",
        "checkpoint_steps": "how often it can be continued from",
    },
    "EvaluateConfig": {"sequences": "how many of report"},
}


def schema(kind: Kind) -> dict[str, Any]:
    """The JSON Schema (2020-12) of one kind of file."""
    found = FILES[kind].model_json_schema()
    for name, model in {FILES[kind].__name__: found, **found.get("$defs", {})}.items():
        for field, description in DESCRIPTIONS[name].items():
            model["properties"][field]["description"] = description
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
