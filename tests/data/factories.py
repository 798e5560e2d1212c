"""Tokenizers of single characters, sources of known documents, and the stage's steps in one call."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from puzzle import artifacts
from puzzle.config import DataConfig
from puzzle.data.batches import TokenData, read_tokens
from puzzle.data.encode import Encoder
from puzzle.data.inputs import data_inputs, pinned_sources
from puzzle.data.tokenise import pack_all, tokenise_all

VOCAB_SIZE = 259
TURNS = "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '</s>' }}{% endfor %}"
PLAIN_TEMPLATE = TURNS + "{% if add_generation_prompt %}[assistant]{% endif %}"
MARKED_TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '</s>' }}{% endgeneration %}{% else %}{{ m['content'] + '</s>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
FORGETFUL_TEMPLATE = (  # only the last turn is rendered in full
    "{% for m in messages %}{{ '[' + m['role'] + ']' + (m['content'] if loop.last else m['content'][:1]) }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_tokenizer(template: str | None = None) -> Any:
    """One token a byte, and <pad>, <s>, </s> before them."""
    symbols = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    model = models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


def texts(prefix: str, count: int, length: int = 40) -> list[str]:
    """Texts that differ from one another, each of ``length`` bytes."""
    return [f"{prefix}{index}:".ljust(length, prefix) for index in range(count)]


def write_jsonl(path: Path, records: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def text_file(path: Path, contents: Iterable[str]) -> Path:
    return write_jsonl(path, ({"text": text} for text in contents))


def chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


class Silent:
    """Progress that nobody watches."""

    def total(self, total: int, done: int) -> None: ...

    def fraction(self, share: float, what: str = "") -> None: ...


def make_unit(settings: DataConfig, run_dir: Path, tokenizer: Any = None) -> artifacts.Unit:
    """The data unit in ``run_dir/data``, as the stage makes it."""
    tokenizer = tokenizer or byte_tokenizer()
    encoder = Encoder(tokenizer, len(tokenizer))
    run_dir.mkdir(exist_ok=True)
    inputs, shards = data_inputs(settings, run_dir), run_dir / "shards"
    tokenise_all(settings, pinned_sources(settings, run_dir), encoder, shards, inputs, Silent())  # type: ignore[arg-type]
    return artifacts.publish_folder(run_dir / "data", inputs, lambda aside: pack_all(settings, shards, inputs, aside))


def make_tokens(settings: DataConfig, run_dir: Path, tokenizer: Any = None) -> TokenData:
    unit = make_unit(settings, run_dir, tokenizer)
    return read_tokens(unit, settings)
