"""What a user of the ecosystem does with an exported student: LoRA, SFT and DPO with PEFT and TRL. Run by a test.

    python trains_on.py FOLDER sft|lora|dpo OUTPUT

Knows nothing of puzzle: model, tokenizer and modelling code come from the folder. Prints, as JSON, the losses, which
modules were trained, and how far the reloaded result is from the one in memory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

LORA = LoraConfig(
    r=4,
    lora_alpha=8,
    # attention and FFN by their names, and the single matrices that may stand in their places; a layer that lacks one
    # of them is passed over
    target_modules=[
        *("q_proj", "k_proj", "v_proj", "o_proj", "linear_attn"),
        *("gate_proj", "up_proj", "down_proj", "linear_mlp"),
    ],
    task_type="CAUSAL_LM",
)
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "max_steps": 12,
    "learning_rate": 3e-3,
    "logging_steps": 1,
    "max_length": 32,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def main(folder: Path, method: str, output: Path) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    if method == "dpo":
        pairs = [
            {"prompt": "ab", "chosen": "cdef", "rejected": "fedc"},
            {"prompt": "b", "chosen": "ce", "rejected": "ec"},
        ]
        data, settings = Dataset.from_list(pairs), DPOConfig(output_dir=str(output), **SETTINGS)
        trainer: Any = DPOTrainer(
            model, args=settings, train_dataset=data, processing_class=tokenizer, peft_config=LORA
        )
    else:
        data = Dataset.from_list([{"text": "abcdefgh" * 3}, {"text": "hgfedcba" * 2}])
        trainer = SFTTrainer(
            model,
            args=SFTConfig(output_dir=str(output), gradient_checkpointing=True, **SETTINGS),
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=LORA if method == "lora" else None,
        )
    trainer.train()
    trainer.save_model(str(output))
    trained = trainer.model.eval()
    load = AutoModelForCausalLM if method == "sft" else AutoPeftModelForCausalLM
    reloaded = load.from_pretrained(output, trust_remote_code=True).eval()
    ids = torch.tensor([[1, 5, 6, 7, 8, 9]])
    with torch.no_grad():
        difference = (reloaded(ids).logits - trained(ids).logits).abs().max().item()
        merged = reloaded if method == "sft" else reloaded.merge_and_unload()
        merged_difference = (merged(ids).logits - trained(ids).logits).abs().max().item()
    print(
        json.dumps(
            {
                "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
                "trained": [name for name, parameter in trained.named_parameters() if parameter.requires_grad],
                "difference": max(difference, merged_difference),
                "puzzle": sorted(name for name in sys.modules if name.split(".")[0] == "puzzle"),
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
