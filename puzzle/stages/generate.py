"""The command that lets the teacher write text to distil on.

Reads the teacher and, if asked for, prompts from a source; writes ``generated/FIRST-STOP/text.jsonl``, so many
documents a unit, which a config takes as a source (``data.sources: [{path: …/generated, weight: 0.5}]``). Of a text
the first tokens are given, of a conversation all up to the assistant's last answer, by the chat template; without
prompts the teacher begins with its own first token. A document falls into the split of the text that it goes on from,
so that nothing passes from one split to another. A document's random numbers follow from the run's seed and its number:
what is written does not depend on batches, but for rounding, nor on ranks and stops.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from puzzle import artifacts
from puzzle.config import GenerateConfig
from puzzle.data.encode import check_template, render_prompt
from puzzle.data.source import Conversation, check_source, documents
from puzzle.generate import Sampling, continuations
from puzzle.plans import Planned, plan_generate, rows_of_shard
from puzzle.progress import Progress
from puzzle.ranks import Ranks, shares
from puzzle.run import Run
from puzzle.stages.common import compute_of, teacher_of
from puzzle.teacher import load_tokenizer
from puzzle.types import ConfigError

FILE = "text.jsonl"
STREAM = 0x67656E  # of random numbers, apart from those that batches and scores are drawn by


@dataclass(frozen=True)
class _Prompt:
    """What a document begins with, and its split, if it has one already."""

    row: int
    ids: Sequence[int]
    turns: Conversation | None = None
    split: str | None = None


def make_generate(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    """Ranks share the shards."""
    ranks, writer = Ranks.current(), _Writer.of(run)
    if ranks.first:
        planned = {unit.path for unit in plan_generate(run)}
        for path in run.generated.glob("*-*"):
            if path not in planned:  # a last one that was shorter, or more than are asked for now
                artifacts.remove(path)
    names = {unit.path.name: 1.0 for unit in missing}
    own = set(shares(names, ranks.count, 1)[ranks.rank].pieces)
    for unit in missing:
        if unit.path.name in own:
            rows = rows_of_shard(unit.path)
            artifacts.publish_folder(unit.path, unit.inputs, functools.partial(writer.write, rows))
            progress.done(unit.path.name)


@dataclass(frozen=True)
class _Writer:
    """What all shards are written with."""

    run: Run
    tokenizer: Any
    first: int  # token of a text
    ends: frozenset[int]

    @classmethod
    def of(cls, run: Run) -> _Writer:
        settings, most = run.config.generate, run.shape.max_position_embeddings
        if settings.max_new_tokens >= most:
            raise ConfigError(
                f"generate.max_new_tokens is {settings.max_new_tokens}, but the teacher takes at most {most} tokens, "
                "and the first is given; lower it"
            )
        tokenizer, source = load_tokenizer(run.teacher), settings.prompts
        if source is not None:
            check_source(source)
            if source.messages is not None:
                check_template(tokenizer, source.label)
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if first is None:
            raise ConfigError(f"{run.teacher}: the tokenizer has no token that begins or ends a text")
        return cls(run, tokenizer, first, _end_tokens(run.teacher, tokenizer))

    @property
    def settings(self) -> GenerateConfig:
        return self.run.config.generate

    def write(self, rows: range, aside: Path) -> dict[str, Any]:
        """Fills a shard; its marker's payload says how its text was drawn, and how many tokens there are."""
        settings, most = self.settings, self.run.shape.max_position_embeddings
        prompts = list(self._prompts(rows))
        fitting = [one for one in prompts if len(one.ids) + settings.max_new_tokens <= most]
        counts = {
            "documents": 0,
            "prompt_tokens": 0,
            "new_tokens": 0,
            "ended": 0,
            "too_long": len(prompts) - len(fitting),
        }
        with open(aside / FILE, "w", encoding="utf-8") as lines:
            for first in range(0, len(fitting), settings.batch_size):
                batch = fitting[first : first + settings.batch_size]
                for prompt, new in zip(batch, self._continued(batch), strict=True):
                    lines.write(json.dumps(self._record(prompt, new), ensure_ascii=False) + "\n")
                    ended = new[-1] in self.ends
                    added = {"documents": 1, "prompt_tokens": len(prompt.ids), "new_tokens": len(new), "ended": ended}
                    counts = {name: count + added.get(name, 0) for name, count in counts.items()}
        sampling = settings.model_dump(exclude={"documents", "batch_size"})
        return {**counts, "sampling": sampling, "seed": self.run.config.seed, "teacher": self.run.teacher_name}

    def _continued(self, prompts: Sequence[_Prompt]) -> list[list[int]]:
        settings, model = self.settings, teacher_of(self.run)
        seed, length = self.run.config.seed, settings.max_new_tokens
        numbers = np.stack([np.random.default_rng([seed, STREAM, one.row]).random(length) for one in prompts])
        sampling = Sampling(settings.temperature, settings.top_p)
        with compute_of(self.run).autocast():
            ids = [one.ids for one in prompts]
            return continuations(model, ids, torch.from_numpy(numbers), sampling, self.ends)

    def _prompts(self, rows: range) -> Iterator[_Prompt]:
        source, head = self.settings.prompts, [self.first]
        if source is None:
            yield from (_Prompt(row, head) for row in rows)
            return
        found = list(islice(documents(source, rows.start), len(rows)))
        if len(found) < len(rows):
            raise ConfigError(
                f"generate.prompts: {source.label} ran out after {rows.start + len(found):,} of the "
                f"{self.settings.documents:,} documents asked for; lower generate.documents, or give more prompts"
            )
        for row, document in zip(rows, found, strict=True):
            if isinstance(document.content, str):
                ids = self.tokenizer(document.content, add_special_tokens=False)["input_ids"]
                yield _Prompt(row, [*head, *ids[: self.settings.prompt_tokens]], split=document.split)
            else:
                turns = document.content[:-1] if document.content[-1]["role"] == "assistant" else document.content
                ids = render_prompt(self.tokenizer, turns, document.where)
                yield _Prompt(row, ids, turns, document.split)

    def _record(self, prompt: _Prompt, new: Sequence[int]) -> Mapping[str, Any]:
        split = {} if prompt.split is None else {"split": prompt.split}
        said = [token for token in new if token not in self.ends]
        if prompt.turns is not None:
            answer = {"role": "assistant", "content": self.tokenizer.decode(said, skip_special_tokens=True)}
            return {"messages": [*prompt.turns, answer], **split}
        return {"text": self.tokenizer.decode([*prompt.ids, *said], skip_special_tokens=True), **split}


def _end_tokens(teacher: Path, tokenizer: Any) -> frozenset[int]:
    """Where the teacher stops: as its own settings for generation say, its config, its tokenizer."""
    found: set[int] = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        ends = artifacts.read_json(teacher / name).get("eos_token_id") if (teacher / name).exists() else None
        found |= set(ends) if isinstance(ends, list) else set() if ends is None else {ends}
    return frozenset(found)
