"""Kinds of values in the files that users write."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
)

Positive = Annotated[int, Field(gt=0, strict=True)]
Size = Annotated[int, Field(gt=0, le=10**9, strict=True)]  # of a workload
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Natural = Annotated[int, Field(ge=0)]
LARGEST = 1e18  # of any amount in a constraint file: beyond what any model or machine has
PERCENTAGE = re.compile(r"\d+(\.\d+)?\s*%", re.ASCII)


def _printable(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ValueError("give a name, in printable characters")
    return text


Name = Annotated[str, AfterValidator(_printable)]


def one_or_more(item: dict[str, Any]) -> tuple[BeforeValidator, WithJsonSchema]:
    """What takes one item, or a list of them; ``item`` is its schema."""
    schema = {"anyOf": [item, {"type": "array", "items": item}]}
    return BeforeValidator(lambda given: [given] if isinstance(given, str) else given), WithJsonSchema(schema)


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
