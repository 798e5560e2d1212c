"""The heterogeneous model as a Hugging Face one: importing this package registers it with the auto classes.

With ``puzzle`` installed and this package imported, ``AutoModelForCausalLM`` loads an export without trusting remote
code; without it, the copies of its files in the export do the same.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from puzzle.modeling.configuration_puzzle import PuzzleConfig as PuzzleConfig
from puzzle.modeling.families_puzzle import FAMILIES as FAMILIES
from puzzle.modeling.families_puzzle import Family as Family
from puzzle.modeling.families_puzzle import family_of as family_of
from puzzle.modeling.families_puzzle import part_prefixes as part_prefixes
from puzzle.modeling.families_puzzle import stock_state as stock_state
from puzzle.modeling.layers_puzzle import PuzzleDecoderLayer as PuzzleDecoderLayer
from puzzle.modeling.modeling_puzzle import PuzzleForCausalLM as PuzzleForCausalLM
from puzzle.modeling.modeling_puzzle import PuzzleModel as PuzzleModel
from puzzle.modeling.spans_puzzle import local_causal_mask as local_causal_mask

AutoConfig.register(PuzzleConfig.model_type, PuzzleConfig, exist_ok=True)
AutoModel.register(PuzzleConfig, PuzzleModel, exist_ok=True)
AutoModelForCausalLM.register(PuzzleConfig, PuzzleForCausalLM, exist_ok=True)
