"""NVIDIA's own replace-one-block scoring (puzzletron in ``nvidia-modelopt`` 0.47) on CPU: what ours is compared with.

Run by the PYTHON of an environment of its own, which holds that package (its extra ``puzzletron``) and not ours:

    PYTHON benchmarks/incumbent_scorer.py FOLDER --out scores.json [--batch-size 1] [--shared-metrics]

Reads from FOLDER
    teacher/                            a stock Hugging Face Llama checkpoint
    tokens.safetensors                  ``ids`` (N, T) int64; the models read the first T-1 and predict the last T-1
    variants/NAME/variant.json          the layer and what replaces its attention, its FFN, or both, in their own terms:
                                        {"layer": 3, "attention": {"num_key_value_heads": 2} or {"no_op": true},
                                                     "ffn": {"intermediate_size": 96} or {"no_op": true}}
    variants/NAME/model.safetensors     every tensor of a replaced part, its norm included, under the teacher's names;
                                        no file where all that is replaced is a no-op

Their converter splits teacher and variants into sub-blocks; then their driver loads, runs and compares as it would on a
GPU: per variant the whole model from disk, a full forward of every batch, their metrics. Writes each metric per
sequence and the seconds of each variant. Their code is called, never copied; ``Float32Llama`` and ``run_on_cpu`` are
all that is changed in it. Linear replacements are not scored: their Llama has none, though their configuration does.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import modelopt.torch.puzzletron.tools.validate_puzzle_with_multi_replacements as driver
import modelopt.torch.puzzletron.utils.validate_runtime_pipeline as pipeline
import modelopt.torch.puzzletron.utils.validation as validation
import modelopt.torch.utils.distributed as dist
import torch
from modelopt.torch.puzzletron.anymodel import convert_model
from modelopt.torch.puzzletron.anymodel.converter import ConverterFactory
from modelopt.torch.puzzletron.anymodel.model_descriptor import ModelDescriptorFactory
from modelopt.torch.puzzletron.anymodel.models.llama import LlamaModelDescriptor
from modelopt.torch.puzzletron.block_config import AttentionConfig, BlockConfig, FFNConfig
from modelopt.torch.puzzletron.tools.checkpoint_utils import load_model_config
from safetensors.torch import load_file
from torch import nn

PARTS = {"attention": AttentionConfig, "ffn": FFNConfig}


class Float32Llama(LlamaModelDescriptor):
    """Their Llama in fp32: their loader casts every model to bf16, with which nothing could be equal to 1e-4."""

    @staticmethod
    def uses_autocast() -> bool:
        return False  # it is CUDA's, to bf16

    @staticmethod
    def init_rotary_embedding(model: nn.Module, runtime: SimpleNamespace) -> None:
        runtime.dtype = torch.float32  # the loader calls this right before it casts the model to ``runtime.dtype``
        LlamaModelDescriptor.init_rotary_embedding(model, runtime)


def run_on_cpu(batches: list[dict[str, torch.Tensor]]) -> None:
    """Changes what in their code demands a GPU, or text of its own to tokenise."""
    dist.local_rank = lambda: "cpu"  # the loader takes a rank's number for its device
    nn.Module.cuda = lambda self, device=None: self  # the driver moves every model to its GPU
    torch.cuda.synchronize = lambda device=None: None  # raises without a GPU; the driver calls it after every model
    driver.validate_model.prepare_dataloader = lambda args, tokenizer: batches  # the same tokens as ours
    ModelDescriptorFactory.register(llama_float32=Float32Llama)


def leave_out_other_metrics() -> None:
    """Spares them the metrics that ours does not compute: KL, lm loss, cosine and the top-k agreements remain."""

    def left_out_of_batch(ours: torch.Tensor, _: torch.Tensor) -> list[float]:
        return [math.nan] * len(ours)

    def left_out_of_sample(**_: Any) -> float:
        return math.nan

    validation.mse_loss = validation.mae_loss = validation.normalized_mse_loss = left_out_of_batch
    validation.js_div = validation.tv_dist = left_out_of_sample


def watched(owner: Any, name: str) -> list[tuple[float, float]]:
    """When each call of ``owner.name`` from here on began and ended, in seconds: filled as they are made."""
    spans, function = [], getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        spans.append((start, time.perf_counter()))
        return result

    setattr(owner, name, timed)
    return spans


def replacement(layer: int, config: BlockConfig, checkpoints: dict[str, Path]) -> dict[str, Any]:
    """An entry of their library: one layer, its parts from ``checkpoints``."""
    files = [
        str(checkpoint / "subblocks_safetensors" / f"block_{layer}_{part}.safetensors")
        for part, checkpoint in checkpoints.items()
        if not getattr(config, part).no_op
    ]
    return {"parent_layer_indices": [layer], "child_block_configs": [config.to_dict()], "weight_paths": files}


def split_variant(variant: Path, work: Path, teacher: list[dict[str, Any]]) -> dict[str, Any]:
    """Writes the variant's tensors in their format; its layer as an entry of their library."""
    description = json.loads((variant / "variant.json").read_text())
    layer, changes, own = description.pop("layer"), description, work / "variants" / variant.name
    if not changes or changes.keys() - PARTS.keys():
        raise ValueError(f"{variant}/variant.json: besides layer it may hold {', '.join(PARTS)}, not {list(changes)}")
    if (variant / "model.safetensors").exists():
        converter = ConverterFactory.get("llama")
        converter.copy_checkpoint_files(work / "teacher", own)
        converter.convert_model_weights(variant, own, LlamaModelDescriptor, len(teacher))
    parts = {part: config(**changes[part]) for part, config in PARTS.items() if part in changes}
    config = BlockConfig(**{**teacher[layer]["child_block_configs"][0], **parts})
    return replacement(layer, config, {part: own if part in changes else work / "teacher" for part in PARTS})


def write_library(folder: Path, work: Path, names: list[str]) -> None:
    """Writes what their driver reads: the teacher in their format, the library, a solution for each variant."""
    convert_model(folder / "teacher", work / "teacher", "llama")
    configs = load_model_config(work / "teacher").block_configs
    teacher = [
        replacement(layer, config, dict.fromkeys(PARTS, work / "teacher")) for layer, config in enumerate(configs)
    ]
    variants = [split_variant(folder / "variants" / name, work, teacher) for name in names]
    solutions = []
    for variant in variants:
        [layer] = variant["parent_layer_indices"]
        solutions.append({"chosen_replacements": [*teacher[:layer], variant, *teacher[layer + 1 :]]})
    (work / "library.json").write_text(json.dumps(teacher + variants))
    (work / "solutions.json").write_text(json.dumps(solutions))


def driver_arguments(work: Path, num_sequences: int, batch_size: int) -> SimpleNamespace:
    """What their YAML files would say."""
    none = "tokenizer_name model_name_or_path solutions_to_validate sort_solutions_by activations_log_dir"
    no = "bigger_is_better skip_validation save_models calc_losses_on_cpu write_results"
    return SimpleNamespace(
        **dict.fromkeys(none.split()),
        **dict.fromkeys(no.split(), False),
        descriptor="llama_float32",
        teacher_dir=work / "teacher",
        replacement_library_path=work / "library.json",
        solutions_path=work / "solutions.json",
        output_dir=work / "scores",
        eval_samples=num_sequences,
        micro_batch_size=batch_size,
    )


def metrics_of(result: Path) -> dict[str, list[float]]:
    """Each metric per sequence, from a result file of theirs."""
    values = {name: value for name, value in json.loads(result.read_text()).items() if isinstance(value, dict)}
    return {name: v["per_sample"] for name, v in values.items() if "per_sample" in v and "left_out" not in name}


def scores(folder: Path, work: Path, batch_size: int) -> dict[str, Any]:
    """Every variant in FOLDER as their driver scores it."""
    names = sorted(path.name for path in (folder / "variants").iterdir())
    write_library(folder, work, names)
    ids = load_file(folder / "tokens.safetensors")["ids"]
    batches = [{"input_ids": part[:, :-1], "targets": part[:, 1:]} for part in ids.split(batch_size)]
    run_on_cpu(batches)
    prepared = watched(driver, "validate_model_and_extract_hidden_states")
    loaded = watched(driver.ReplacementLibrary, "load_model")
    evaluated = watched(driver, "validate_model_with_teacher_similarity_metrics")
    compared = watched(pipeline, "calculate_batch_outputs")
    start = time.perf_counter()
    driver.validate_puzzle_solutions(driver_arguments(work, len(ids), batch_size))
    end = time.perf_counter()

    variants = {}
    next_loads = [begin for begin, _ in loaded[1:]] + [end]
    for index, (name, load, evaluation, until) in enumerate(zip(names, loaded, evaluated, next_loads, strict=True)):
        first = (index + 1) * len(batches)  # the teacher's come before
        seconds = {"load": load[1] - load[0]}
        seconds["metrics"] = sum(stop - begin for begin, stop in compared[first : first + len(batches)])
        seconds["forward"] = evaluation[1] - evaluation[0] - seconds["metrics"]  # with the teacher's head, run anew
        seconds["total"] = until - load[0]  # the rest collects garbage
        variants[name] = {"metrics": metrics_of(work / "scores" / f"solution_{index}.json"), "seconds": seconds}
    return {
        "versions": {name: metadata.version(name) for name in ("nvidia-modelopt", "torch", "transformers")},
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
        "num_sequences": len(ids),
        "predicted_tokens_per_sequence": ids.shape[1] - 1,
        "seconds": end - start,
        "teacher": {"metrics": metrics_of(work / "scores/teacher.json"), "seconds": prepared[0][1] - prepared[0][0]},
        "variants": variants,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences per forward; their examples say 1")
    parser.add_argument("--shared-metrics", action="store_true", help="leave out JS, TV, MSE and MAE")
    options = parser.parse_args()
    if options.shared_metrics:
        leave_out_other_metrics()
    with tempfile.TemporaryDirectory() as work:
        result = scores(options.folder.resolve(), Path(work).resolve(), options.batch_size)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
