"""vLLM's plugin for ``hf`` exports: vLLM finds it by its entry point where both are installed, and then serves them
(``vllm serve FOLDER``) without remote code. Importing this package imports nothing of vLLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from puzzle.modeling import PuzzleConfig


def register() -> None:
    """Tells vLLM of the model's class, and transformers of its configuration; vLLM calls this in each process."""
    from vllm import ModelRegistry

    import puzzle.modeling  # noqa: F401  (registers the configuration)

    ModelRegistry.register_model("PuzzleForCausalLM", "puzzle.vllm_plugin.model:PuzzleForCausalLM")


def check(config: PuzzleConfig, tensor_parallel: int) -> None:
    """Raises ValueError, naming the layer, for what vLLM cannot run."""
    layers = range(config.num_hidden_layers)
    counts = [config.kv_heads(layer) for layer in layers]
    if not any(counts):
        raise ValueError("no layer has attention: search with layers_with_attention: {min: 1}")
    for layer, count in enumerate(counts):
        if count is None:
            continue
        if sinks := config.span(layer)[1]:
            raise ValueError(
                f"layer {layer}: a window with {sinks} sinks, and vLLM's attention keeps no first tokens visible; "
                "search with serve_on: [vllm-plugin]"
            )
        if count % tensor_parallel and tensor_parallel % count:
            raise ValueError(
                f"layer {layer}: {count} KV heads do not divide among {tensor_parallel} devices; serve it on as "
                "many as divide all layers' heads, or search a space with gqa-K that they divide"
            )
