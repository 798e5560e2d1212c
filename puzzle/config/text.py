"""The text that a run reads, and what its teacher may write: sections of the run configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from puzzle.config.fields import Model, NonNegative, Positive, PositiveFloat, one_or_more


class SourceConfig(Model):
    """One source of documents."""

    path: str | None = Field(
        None, description="a .txt, .md, .py, .jsonl, .parquet file (.gz too), a folder of them, or demo"
    )
    dataset: str | None = Field(None, description="a data set that the datasets library can stream")
    name: str | None = Field(None, description="the data set's configuration")
    split: str | None = Field(None, description="the data set's split")
    revision: str | None = Field(None, description="the data set's revision")
    data_files: Annotated[tuple[str, ...], *one_or_more({"type": "string"})] = Field(
        (), description="the data set's files"
    )
    column: str | None = Field(None, description="the column of text (default text)")
    messages: str | None = Field(
        None, description="the column of chat messages [{role, content}, …], in the place of text"
    )
    weight: PositiveFloat | None = Field(None, description="share of the tokens")

    @model_validator(mode="after")
    def _one_place(self) -> SourceConfig:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give one of path, dataset")
        if self.path is not None and (self.name or self.split or self.revision or self.data_files):
            raise ValueError("name, split, revision and data_files are for a dataset, not for a path")
        if self.column is not None and self.messages is not None:
            raise ValueError("give one of column, messages")
        return self

    @property
    def label(self) -> str:
        """For people: the file's name, or the data set's with its configuration."""
        name = Path(self.path).name if self.path is not None else "/".join(filter(None, (self.dataset, self.name)))
        return f"{name} ({', '.join(self.data_files)})" if self.data_files else name


class TokensConfig(Model):
    """How many tokens to take for each split."""

    train: Positive = Field(description="tokens to train on")
    score: Positive = Field(description="tokens to score variants on")
    select: Positive = Field(description="tokens to choose between candidates on")
    report: Positive = Field(description="tokens for the figures at the end")


class DataConfig(Model):
    """``sequence_tokens`` and ``within_documents`` act when tokens are read: changing them tokenises nothing anew."""

    text: str = Field("demo", description="demo, a file (.txt, .md, .py, .jsonl, .parquet) or a folder")
    sources: tuple[SourceConfig, ...] = Field(
        (), description="several, mixed by weight (shares of tokens, in every split), in the place of text"
    )
    tokens: TokensConfig | None = Field(
        None, description="how many to take for each split (default: all there are, as far as weights allow)"
    )
    sequence_tokens: Positive = Field(256, description="length of a training or scoring sequence")
    within_documents: bool = Field(False, description="attention does not cross from one document to the next")

    @model_validator(mode="before")
    @classmethod
    def _text_or_sources(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("sources"):
            if given.get("text"):
                raise ValueError("give text or sources, not both")
            return {**given, "text": ""}
        return given

    @model_validator(mode="after")
    def _enough_said(self) -> DataConfig:
        if not self.text and not self.sources:
            raise ValueError("give text or sources")
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise ValueError("give every source a weight, or none of them")
        if self.tokens is not None and len(self.sources) > 1 and not any(weighted):
            raise ValueError("with tokens, give every source a weight: its share of them")
        if self.tokens is None and any(source.dataset is not None for source in self.sources):
            raise ValueError("a dataset is streamed and may never end; say how much to take: tokens: {train: …, …}")
        return self

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        """``sources``, or ``text`` as the only one."""
        return self.sources or (SourceConfig(path=self.text),)

    @property
    def label(self) -> str:
        """For people: what the text is."""
        return ", ".join(source.label for source in self.all_sources)


class GenerateConfig(Model):
    """`puzzle generate-data`: text of the teacher's own, to distil on."""

    documents: Positive = Field(1024, description="how many the teacher writes")
    prompts: SourceConfig | None = Field(
        None, description="texts or conversations that it goes on from; null: it begins with its first token"
    )
    prompt_tokens: Positive = Field(32, description="of each text, from its beginning, that are given")
    max_new_tokens: Positive = Field(512, description="that it writes, unless it ends before")
    temperature: NonNegative = Field(1.0, description="that its logits are divided by; 0: always the likeliest token")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="share of the probability that may be drawn")
    batch_size: Positive = Field(32, description="documents written at a time")

    @field_validator("prompts")
    @classmethod
    def _unweighted(cls, prompts: SourceConfig | None) -> SourceConfig | None:
        if prompts is not None and prompts.weight is not None:
            raise ValueError("prompts are a single source; leave out its weight")
        return prompts
