"""The heterogeneous model as a Hugging Face one: importing this package registers it with the auto classes.

With ``puzzle`` installed and this package imported, ``AutoModelForCausalLM`` loads an export without trusting remote
code; without it, the copies of its files in the export do the same.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from puzzle.modeling.configuration_puzzle import PuzzleConfig
from puzzle.modeling.families_puzzle import FAMILIES, Family, family_of, part_prefixes, stock_state
from puzzle.modeling.layers_puzzle import PuzzleDecoderLayer
from puzzle.modeling.modeling_puzzle import PuzzleForCausalLM, PuzzleModel
from puzzle.modeling.spans_puzzle import local_causal_mask

__all__ = [
    "FAMILIES",
    "Family",
    "PuzzleConfig",
    "PuzzleDecoderLayer",
    "PuzzleForCausalLM",
    "PuzzleModel",
    "family_of",
    "local_causal_mask",
    "part_prefixes",
    "stock_state",
]

AutoConfig.register(PuzzleConfig.model_type, PuzzleConfig, exist_ok=True)
AutoModel.register(PuzzleConfig, PuzzleModel, exist_ok=True)
AutoModelForCausalLM.register(PuzzleConfig, PuzzleForCausalLM, exist_ok=True)
