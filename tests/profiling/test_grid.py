"""Points of the grid, their names, and the shipped grids."""

from __future__ import annotations

from dataclasses import replace

import pytest

from puzzle.config import GridFile
from puzzle.profiling.grid import GridPoint, grid_points
from puzzle.types import ConfigError, ModelShape
from puzzle.yamlfiles import load, locate


def grid(prefill: tuple[int, ...], decode: tuple[int, ...]) -> GridFile:
    return GridFile(batch_sizes=(8, 1, 8), prefill_tokens=prefill, decode_context_tokens=decode)


def test_every_batch_size_with_every_length_once(shape: ModelShape) -> None:
    points = grid_points(grid((64, 16), (63, 63)), shape)
    assert [point.id for point in points] == [
        "prefill.b1.t16",
        "prefill.b1.t64",
        "prefill.b8.t16",
        "prefill.b8.t64",
        "decode.b1.t63",
        "decode.b8.t63",
    ]


def test_tokens_of_a_forward() -> None:
    prefill, decode = GridPoint("prefill", 8, 128), GridPoint("decode", 1, 64)
    assert (prefill.cached_tokens, prefill.new_tokens, prefill.total_tokens) == (0, 128, 128)
    assert (decode.cached_tokens, decode.new_tokens, decode.total_tokens) == (64, 1, 65)


def test_points_longer_than_the_models_positions_are_refused(shape: ModelShape) -> None:
    with pytest.raises(ConfigError, match="prefill_tokens contains 65, but the model has 64 positions; at most 64"):
        grid_points(grid((65,), (63,)), shape)
    with pytest.raises(ConfigError, match="decode_context_tokens contains 64, .*at most 63"):
        grid_points(grid((64,), (64,)), shape)


def test_an_empty_grid_is_refused(shape: ModelShape) -> None:
    with pytest.raises(ConfigError, match="empty"):
        grid_points(grid((), ()), shape)


@pytest.mark.parametrize(("name", "positions"), [("demo", 512), ("serving", 131072)])
def test_shipped_grids(name: str, positions: int, shape: ModelShape) -> None:
    file = load(GridFile, locate("grid", name))
    points = grid_points(file, replace(shape, max_position_embeddings=positions))
    assert len(points) == len(file.batch_sizes) * (len(file.prefill_tokens) + len(file.decode_context_tokens))
    assert len({point.id for point in points}) == len(points)
