"""Makes ``search_factories`` importable however pytest was started, and gives the model shape that the tests share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from puzzle.types import ModelShape

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def shape() -> ModelShape:
    """Three layers, hidden 64, 4 heads and KV heads of 16, FFN 96, vocabulary 128, head of its own."""
    from search_factories import make_shape

    return make_shape()
