"""Tiny random models for every test that needs one. Session-wide: whoever changes a model must copy it first."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from puzzle.teacher import Teacher

VOCAB_SIZE = 128

if "PYTEST_XDIST_WORKER" in os.environ:  # the processes share the cores, theirs and those they start
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def make_tiny_llama(tied: bool) -> LlamaForCausalLM:
    """Weights large enough that attention is far from uniform, and norms that are not all ones."""
    torch.manual_seed(7 + tied)
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=96,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="session")
def tiny_llama() -> LlamaForCausalLM:
    """Hidden 64, 4 layers, 4 heads and KV heads, FFN 96, vocabulary 128, head of its own."""
    return make_tiny_llama(tied=False)


@pytest.fixture(scope="session")
def tiny_llama_tied() -> LlamaForCausalLM:
    """As ``tiny_llama``, with the embedding matrix as its head."""
    return make_tiny_llama(tied=True)


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer with <pad>, <s>, </s> and the first 125 byte symbols, saved as a teacher's would be."""
    symbols = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())][:VOCAB_SIZE]
    model = models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[], unk_token="<pad>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("tokenizer")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teacher_folder(tiny_llama: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    tiny_llama.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teacher(teacher_folder: Path) -> Teacher:
    """Layers from disk, in fp32; nobody changes them."""
    return Teacher(teacher_folder, torch.device("cpu"), torch.float32)


@pytest.fixture
def tiny_pair(tmp_path: Path) -> Path:
    """A folder with ``teacher``, 4 layers of 32, and ``student``, 3 layers of 24 made of three of them; heads tied."""
    shared = {
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCAB_SIZE,
        "initializer_range": 0.2, "tie_word_embeddings": True,
    }  # fmt: skip
    for name, layers, width, ffn in (("teacher", 4, 32, 48), ("student", 3, 24, 40)):
        torch.manual_seed(layers)
        config = LlamaConfig(hidden_size=width, num_hidden_layers=layers, intermediate_size=ffn, **shared)
        if name == "student":
            config.layers_from = [0, 1, 3]
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
    return tmp_path
