"""Makes the bundled teacher: corpus, tokenizer, training, figures. Run once by the authors, kept so that anyone can.

Reads the source of Python's standard library (the running interpreter's, or ``--stdlib``). Writes, into puzzle/demo,
``text.jsonl.gz`` (the library without its tests, one record ``{path, split, text}`` a file), ``teacher/`` (a Hugging
Face Llama checkpoint in bf16 with its tokenizer), ``training_log.jsonl`` and ``TEACHER.json`` (final figures).

The split is by file, a function of the path alone: 6 % ``report``, 4 % ``score``, 4 % ``select``, the rest ``train``.
The teacher sees ``train`` and the library's tests (never bundled), so held-out figures are held out. Generated files
are left out everywhere: code pages are near-copies of one another and would leak between splits, and the help topics,
a manual's prose in one string, would be half of ``select``.

Training: next-token cross-entropy in bf16 autocast, Muon for the matrices (Jordan et al. 2024) and AdamW for embedding
and norms, warm-up, constant rate, linear decay to zero. Batch ``step`` is a pure function of ``(seed, step)``; a
checkpoint every 100 steps makes a killed run continue where it was.

    python benchmarks/make_teacher.py corpus
    python benchmarks/make_teacher.py train
    python benchmarks/make_teacher.py finish
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import os
import platform
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np

from puzzle.checkpoint import DEMO_TEACHER as TEACHER
from puzzle.data.source import DEMO_TEXT as TEXT

LOG, CARD = (TEACHER.parent / name for name in ("training_log.jsonl", "TEACHER.json"))
VOCAB_SIZE, SEQUENCE_TOKENS, SEED = 2048, 512, 0
BATCH_TOKENS, MICRO_BATCH_TOKENS = 8192, 2048
# from which step on windows of how many tokens: short ones cost a third less, the final decay learns the full length
WINDOW_SCHEDULE = ((0, 512), (500, 256), (1170, 512))
NUM_STEPS, WARMUP_STEPS, DECAY_FRACTION, MUON_LR, ADAM_LR, WEIGHT_DECAY = 1800, 100, 0.35, 0.02, 3e-3, 0.05
CHECKPOINT = "checkpoint.safetensors"
SKIP_WINDOWS = 64  # held-out windows on which the cost of skipping each site is taken
GENERATED = (
    "encodings/cp",
    "encodings/mac_",
    "encodings/iso8859",
    "encodings/koi8",
    "encodings/kz1048",
    "encodings/hp_",
    "pydoc_data/topics",
)


def split_of(path: str) -> str:
    """The split a file belongs to, from its path relative to the library alone."""
    bucket = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big") % 100
    return "report" if bucket < 6 else "score" if bucket < 10 else "select" if bucket < 14 else "train"


def is_test(path: str) -> bool:
    return "/test/" in f"/{path}" or "/tests/" in f"/{path}" or "/idle_test/" in path


def library_files(stdlib: Path) -> dict[str, str]:
    """Path to text of every hand-written source file of the library, in sorted order."""
    files: dict[str, str] = {}
    for file in sorted(stdlib.rglob("*.py")):
        path = file.relative_to(stdlib).as_posix()
        if "site-packages/" in path or "config-" in path or path.startswith(("_sysconfigdata", *GENERATED)):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a handful of tests are written in other encodings on purpose
            continue
        if text.strip():
            files[path] = text
    return files


def make_corpus(stdlib: Path) -> None:
    """Writes the bundled text and trains the tokenizer on its ``train`` split."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    files = {path: text for path, text in library_files(stdlib).items() if not is_test(path)}
    with open(TEXT, "wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=9, mtime=0, filename="") as out:
        for path, text in files.items():
            out.write((json.dumps({"path": path, "split": split_of(path), "text": text}) + "\n").encode())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for path, text in files.items() if split_of(path) == "train"), trainer)
    end = "<|endoftext|>"
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token="<|pad|>", model_max_length=SEQUENCE_TOKENS
    )
    wrapped.save_pretrained(TEACHER)
    print(f"{TEXT.name}: {len(files)} files, {TEXT.stat().st_size / 1e6:.2f} MB")


def tokenise(texts: list[str]) -> np.ndarray:
    """``<|endoftext|>`` and each text's tokens, concatenated."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TEACHER / "tokenizer.json"))
    pieces = [np.array([0, *encoding.ids], np.uint16) for encoding in tokenizer.encode_batch(texts)]
    return np.concatenate(pieces)


def training_tokens(stdlib: Path, work: Path) -> np.ndarray:
    cached = work / "train_tokens.npy"
    if not cached.exists():
        files = library_files(stdlib)
        tokens = tokenise([text for path, text in files.items() if is_test(path) or split_of(path) == "train"])
        with open(aside := cached.with_suffix(".tmp"), "wb") as out:
            np.save(out, tokens)
        aside.rename(cached)
    return np.load(cached)  # type: ignore[no-any-return]


def held_out() -> tuple[np.ndarray, int]:
    """Tokens of the ``report`` split and the bytes of text they stand for."""
    with gzip.open(TEXT, "rt", encoding="utf-8") as lines:
        texts = [record["text"] for record in map(json.loads, lines) if record["split"] == "report"]
    return tokenise(texts), sum(len(text.encode()) for text in texts)


def batch(tokens: np.ndarray, step: int) -> np.ndarray:
    """(rows, window): BATCH_TOKENS tokens in windows whose order is shuffled, and offset drawn, anew for each epoch."""
    window = next(size for first, size in reversed(WINDOW_SCHEDULE) if step >= first)
    per_epoch, num_rows = len(tokens) // window - 1, BATCH_TOKENS // window
    rows = []
    for index in range(step * num_rows, (step + 1) * num_rows):
        epoch, place = divmod(index, per_epoch)
        rng = np.random.default_rng([SEED, epoch])
        offset, order = rng.integers(window), rng.permutation(per_epoch)
        start = offset + order[place] * window
        rows.append(tokens[start : start + window])
    return np.stack(rows).astype(np.int64)


def learning_rate_factor(step: int, num_steps: int) -> float:
    decay_steps = int(num_steps * DECAY_FRACTION)
    return min(1.0, (step + 1) / WARMUP_STEPS, (num_steps - step) / decay_steps)


def new_model() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=SEQUENCE_TOKENS,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
        )
    )


def train(stdlib: Path, work: Path, num_steps: int) -> None:
    """Trains to ``num_steps`` of 8192 tokens, continuing from its checkpoint where there is one."""
    import torch

    work.mkdir(parents=True, exist_ok=True)
    tokens, (test_tokens, _) = training_tokens(stdlib, work), held_out()
    model = new_model()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimisers = [
        torch.optim.Muon(matrices, lr=MUON_LR, momentum=0.95, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    checkpoint, first = work / CHECKPOINT, 0
    if checkpoint.exists():
        first = load_state(checkpoint, model, optimisers)
    started = time.monotonic()
    for step in range(first, num_steps):
        factor = learning_rate_factor(step, num_steps)
        for optimiser, peak in zip(optimisers, (MUON_LR, ADAM_LR), strict=True):
            optimiser.param_groups[0]["lr"] = peak * factor
        ids = torch.from_numpy(batch(tokens, step))
        micro_batches = ids.split(MICRO_BATCH_TOKENS // ids.shape[1])
        mean_loss = 0.0
        for rows in micro_batches:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(rows, labels=rows, use_cache=False).loss / len(micro_batches)
            loss.backward()
            mean_loss += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        if (step + 1) % 20 == 0:
            rate = (step + 1 - first) * BATCH_TOKENS / (time.monotonic() - started)
            record = {"step": step + 1, "train_ce_nats": round(mean_loss, 4), "tokens_per_s": round(rate)}
            if (step + 1) % 200 == 0:
                record["held_out_ce_nats"] = round(
                    cross_entropy(model, test_tokens[: SKIP_WINDOWS * SEQUENCE_TOKENS])[0], 4
                )
            with open(work / "log.jsonl", "a") as log:
                log.write(json.dumps(record) + "\n")
        if (step + 1) % 100 == 0 or step + 1 == num_steps:
            save_state(checkpoint, step + 1, model, optimisers)


def save_state(path: Path, step: int, model: Any, optimisers: list[Any]) -> None:
    """Weights, optimiser states and the step, in one safetensors file."""
    from safetensors.torch import save_file

    tensors = {f"model/{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for index, optimiser in enumerate(optimisers):
        for place, state in optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser/{index}/{place}/{key}": value for key, value in state.items()}
    save_file(tensors, aside := path.with_suffix(".tmp"), metadata={"step": str(step)})
    os.replace(aside, path)


def load_state(path: Path, model: Any, optimisers: list[Any]) -> int:
    """Restores what :func:`save_state` wrote; returns the step."""
    import torch
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model/{name}"])
    for index, optimiser in enumerate(optimisers):
        states: dict[int, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            if name.startswith(f"optimiser/{index}/"):
                place, key = name.split("/")[2:]
                states.setdefault(int(place), {})[key] = tensor
        optimiser.load_state_dict({**optimiser.state_dict(), "state": states})
    return step


def cross_entropy(model: Any, tokens: np.ndarray) -> tuple[float, float]:
    """Mean nats per predicted token over disjoint windows, and the standard error over windows."""
    import torch

    windows = torch.from_numpy(tokens[: len(tokens) // SEQUENCE_TOKENS * SEQUENCE_TOKENS].astype(np.int64))
    model.eval()
    with torch.no_grad():
        losses = [model(ids, labels=ids).loss.item() for ids in windows.view(-1, 1, SEQUENCE_TOKENS)]
    model.train()
    return float(np.mean(losses)), float(np.std(losses, ddof=1) / math.sqrt(len(losses)))


def ngram_baselines(train_tokens: np.ndarray, test_tokens: np.ndarray) -> tuple[float, float]:
    """Held-out nats per token of a unigram and an interpolated bigram model counted on the training tokens."""
    unigram = np.bincount(train_tokens, minlength=VOCAB_SIZE) + 1.0
    unigram /= unigram.sum()
    pairs = np.bincount(
        train_tokens[:-1].astype(np.int64) * VOCAB_SIZE + train_tokens[1:], minlength=VOCAB_SIZE**2
    ).reshape(VOCAB_SIZE, VOCAB_SIZE)
    first, second = test_tokens[:-1].astype(np.int64), test_tokens[1:]
    bigram = (pairs[first, second] + 50 * unigram[second]) / (pairs[first].sum(1) + 50)
    return float(-np.log(unigram[second]).mean()), float(-np.log(bigram).mean())


def finish(stdlib: Path, work: Path) -> None:
    """Writes the checkpoint in bf16, its log, and the figures measured on the bf16 weights."""
    import torch
    import transformers

    model = new_model()
    step = load_state(work / CHECKPOINT, model, [])
    model.to(torch.bfloat16).save_pretrained(TEACHER)
    model.float()
    train_tokens, (test_tokens, test_bytes) = training_tokens(stdlib, work), held_out()
    ce, se = cross_entropy(model, test_tokens)
    unigram, bigram = ngram_baselines(train_tokens, test_tokens)
    some = test_tokens[: SKIP_WINDOWS * SEQUENCE_TOKENS]
    base, skip_costs = cross_entropy(model, some)[0], {}
    for index, layer in enumerate(model.model.layers):
        for site, weight in (("attention", layer.self_attn.o_proj.weight), ("ffn", layer.mlp.down_proj.weight)):
            kept = weight.data.clone()
            weight.data.zero_()
            skip_costs[f"L{index:03d}.{site}"] = round(cross_entropy(model, some)[0] - base, 4)
            weight.data.copy_(kept)
    card = {
        "params": sum(p.numel() for p in model.parameters()),
        "train_tokens_unique": len(train_tokens),
        "train_tokens_seen": step * BATCH_TOKENS,
        "held_out_tokens": len(test_tokens),
        "held_out_ce_nats": round(ce, 4),
        "held_out_ce_se": round(se, 4),
        "held_out_bits_per_byte": round(ce / math.log(2) * len(test_tokens) / test_bytes, 4),
        "unigram_ce_nats": round(unigram, 4),
        "bigram_ce_nats": round(bigram, 4),
        "ratio_to_unigram": round(ce / unigram, 4),
        "skip_ce_delta_nats": skip_costs,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }
    CARD.write_text(json.dumps(card, indent=2) + "\n")
    LOG.write_bytes((work / "log.jsonl").read_bytes())
    print(json.dumps(card, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["corpus", "train", "finish"])
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_paths()["stdlib"]))
    parser.add_argument("--work", type=Path, default=Path("teacher-work"))
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    args = parser.parse_args()
    if args.stage == "corpus":
        make_corpus(args.stdlib)
    elif args.stage == "train":
        train(args.stdlib, args.work, args.steps)
    else:
        finish(args.stdlib, args.work)


if __name__ == "__main__":
    main()
