"""What a stranger does with an exported student, where puzzle cannot be imported. Run by a test.

    python stranger.py MIXED UNIFORM EXPECTED.safetensors OUTPUT

Everything comes from the folders, MIXED with the code that it carries, UNIFORM without. Prints, as JSON, how far each
way of running them is from the student they were made of: logits by their largest difference, generated tokens by how
many are others.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "linear_attn", "gate_proj", "up_proj", "down_proj", "linear_mlp"]
NEW_TOKENS = 6


def load(folder: str, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


def generated(model: Any, tokens: Tensor, mask: Tensor, **options: Any) -> Tensor:
    own: Tensor = model.generate(
        tokens, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, **options
    )
    return own[:, tokens.shape[1] :]


def ways_to_generate(folder: str, tokens: Tensor) -> dict[str, float]:
    """Against what follows without a cache, each sequence alone."""
    plain = load(folder)
    padding = tokens.shape[1] // 2
    mask = torch.ones_like(tokens)
    mask[0, :padding] = 0
    whole = torch.cat([generated(plain, row[None], torch.ones_like(row)[None], use_cache=False) for row in tokens])
    short = generated(plain, tokens[:1, padding:], mask[:1, padding:], use_cache=False)
    padded = torch.cat([short, whole[1:]])
    found = {}
    for backend in ("sdpa", "eager"):
        model = load(folder, attn_implementation=backend)
        for cache in ("dynamic", "static"):
            options = {"cache_implementation": cache} if cache == "static" else {}
            ways = {
                "": (torch.ones_like(tokens), whole, {}),
                ", padded on the left": (mask, padded, {}),
                ", prefilled in chunks": (torch.ones_like(tokens), whole, {"prefill_chunk_size": 5}),
            }
            for name, (seen, expected, more) in ways.items():
                own = generated(model, tokens, seen, **options, **more)
                found[f"tokens: {backend}, {cache}{name}"] = float((own != expected).sum())
    return found


def continued(model: Any, tokens: Tensor, expected: Tensor) -> float:
    """A cache filled in chunks, by the logits of each."""
    cache, parts = None, []
    for chunk in tokens.split([5, 1, 6, 1, tokens.shape[1] - 13], dim=1):
        output = model(chunk, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    return off(torch.cat(parts, 1), expected)


def checkpointed(model: Any, tokens: Tensor) -> float:
    """The largest difference between gradients, relative to the largest gradient."""
    model.train()
    model(tokens, labels=tokens).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    calls: list[int] = []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model(tokens, labels=tokens).loss.backward()
    worst = max(off(parameter.grad, expected[name]) for name, parameter in model.named_parameters())
    recomputed = len(calls) == 2
    return worst / max(float(one.abs().max()) for one in expected.values()) if recomputed else float("inf")


def adapted(model: Any, tokens: Tensor, expected: Tensor) -> dict[str, Any]:
    lora = get_peft_model(model, LoraConfig(r=4, target_modules=NAMES, task_type="CAUSAL_LM"))
    before = off(lora(tokens).logits, expected)
    trained = [parameter for parameter in lora.parameters() if parameter.requires_grad]
    optimiser, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(6):
        loss = lora(tokens, labels=tokens).loss
        losses.append(loss.item())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    with torch.no_grad():
        after = lora(tokens).logits
        merged = off(lora.merge_and_unload()(tokens).logits, after)
    return {"lora, before": before, "lora, merged": merged, "lora, losses": losses, "lora, moved": off(after, expected)}


def main(mixed: str, uniform: str, expected_file: str, output: str) -> None:
    expected = load_file(expected_file)
    tokens, logits = expected["tokens"], expected["mixed"]
    model = load(mixed)
    found: dict[str, Any] = {
        "puzzle": importlib.util.find_spec("puzzle") is not None,
        "code": [type(model).__module__.split(".")[0], type(model).__name__],
        "text": AutoTokenizer.from_pretrained(mixed, trust_remote_code=True)("def f(x):").input_ids,
    }
    with torch.no_grad():
        found["reload"] = off(model(tokens).logits, logits)
        found["chunks"] = continued(model, tokens, logits)
        found["compiled"] = off(torch.compile(model, backend="eager")(tokens, use_cache=False).logits, logits)
        # the first layers fit, and the rest is read from the disk as it is needed
        spread = load(mixed, device_map="auto", max_memory={"cpu": 5_000_000}, offload_folder=f"{output}/offload")
        found["devices"] = sorted({str(device) for device in spread.hf_device_map.values()})
        found["device_map"] = off(spread(tokens).logits, logits)
        found |= ways_to_generate(mixed, tokens)
    found["checkpointing"] = checkpointed(load(mixed), tokens)
    found |= adapted(load(mixed), tokens, logits)
    model.save_pretrained(f"{output}/saved")
    with torch.no_grad():
        found["saved"] = off(load(f"{output}/saved")(tokens).logits, logits)
        plain = AutoModelForCausalLM.from_pretrained(uniform).eval()
        found["uniform"] = off(plain(tokens).logits, expected["uniform"])
    found["uniform, code"] = [type(plain).__module__.split(".")[0], type(plain).__name__]
    found["uniform, python files"] = [path.name for path in Path(uniform).glob("*.py")]
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
