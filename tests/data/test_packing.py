"""Packing: shares come true in any stretch of the file, which is a plain safetensors file, read through memory maps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from puzzle.data import packing
from puzzle.data.packing import apportioned, map_tensors, num_held_out, num_windows, pack, quotas, read_packed, shares
from puzzle.data.source import SPLITS
from puzzle.types import CorruptFileError

Arrays = dict[str, np.ndarray]


def shard(first_id: int, lengths: list[int], counted: bool | None = None) -> Arrays:
    """The same documents in every split: ids count up from ``first_id``; of masked ones every other token counts."""
    found: Arrays = {}
    total = sum(lengths)
    for split in SPLITS:
        found[f"{split}.ids"] = np.arange(first_id, first_id + total, dtype=np.int32)
        found[f"{split}.lengths"] = np.array(lengths, np.int64)
        found[f"{split}.bytes"] = 3 * np.array(lengths, np.int64)
        if counted:
            found[f"{split}.counted"] = np.arange(total) % 2 == 0
    return found


def everywhere(*counts: int) -> list[dict[str, int]]:
    return [dict.fromkeys(SPLITS, count) for count in counts]


def test_parts_add_up_and_are_in_proportion() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        weights = rng.uniform(0.01, 5, size=rng.integers(1, 8)).tolist()
        total = int(rng.integers(0, 100_000))
        parts = apportioned(total, weights)
        assert sum(parts) == total
        exact = total * np.array(weights) / sum(weights)
        assert np.abs(np.array(parts) - exact).max() <= 1


def test_quotas_are_shares_of_every_split() -> None:
    wanted = {"train": 1000, "score": 100, "select": 50, "report": 10}
    assert quotas(wanted, [3.0, 1.0]) == [
        {"train": 750, "score": 75, "select": 38, "report": 8},
        {"train": 250, "score": 25, "select": 12, "report": 2},
    ]
    assert quotas(wanted, [None]) == [wanted]


def test_without_amounts_the_scarcest_source_decides_and_without_weights_nothing_is_left() -> None:
    available = everywhere(100, 1000)
    assert shares(available, [None, None]) == available
    assert shares(available, [1.0, 3.0]) == everywhere(100, 300)
    assert shares(available, [0.75, 0.25]) == everywhere(100, 33)
    assert shares(everywhere(100), [0.3]) == everywhere(100)


def test_one_source_is_packed_as_it_is(tmp_path: Path) -> None:
    payload = pack([[shard(0, [3, 4]), shard(7, [5])]], everywhere(12), tmp_path)
    assert payload["num_tokens"] == dict.fromkeys(SPLITS, 12)
    assert payload["num_documents"] == dict.fromkeys(SPLITS, 3)
    assert payload["bytes_per_token"] == dict.fromkeys(SPLITS, 3.0)
    for packed in read_packed(tmp_path).values():
        assert packed.ids.tolist() == list(range(12))
        assert packed.starts.tolist() == [0, 3, 7]
        assert packed.counted is None


def test_what_is_too_much_is_cut_off(tmp_path: Path) -> None:
    payload = pack([[shard(0, [3, 4]), shard(7, [5])]], everywhere(5), tmp_path)
    assert read_packed(tmp_path)["train"].ids.tolist() == [0, 1, 2, 3, 4]
    assert payload["num_documents"]["train"] == 2
    assert payload["bytes_per_token"]["train"] == 3.0


def test_where_shards_end_makes_no_difference(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    lengths = [rng.integers(1, 30, 200).tolist(), rng.integers(1, 9, 300).tolist()]
    written = []
    for cuts in ([200, 300], [7, 20], [1, 1], [64, 299]):
        sources: list[list[Arrays]] = []
        for source, (cut, mine) in enumerate(zip(cuts, lengths, strict=True)):
            pieces = [mine[start : start + cut] for start in range(0, len(mine), cut)]
            firsts = np.cumsum([0, *map(sum, pieces)]) + 100_000 * source
            sources.append([shard(int(first), piece) for first, piece in zip(firsts, pieces, strict=False)])
        folder = tmp_path / str(cuts)
        folder.mkdir()
        pack(sources, everywhere(900, 1200), folder)
        written.append((folder / packing.TOKENS_FILE).read_bytes())
    assert written[1:] == written[:1] * 3


def test_every_stretch_of_a_mixture_holds_its_sources_in_their_shares(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    sources = [[shard(100_000 * index, rng.integers(1, size, 3000).tolist())] for index, size in enumerate((20, 60, 9))]
    taken = (20_000, 10_000, 10_000)
    pack(sources, everywhere(*taken), tmp_path)
    for packed in read_packed(tmp_path).values():
        owner = packed.ids // 100_000
        assert np.bincount(owner).tolist() == list(taken)
        for stretch in np.array_split(owner, 20):
            assert np.bincount(stretch, minlength=3) / len(stretch) == pytest.approx([0.5, 0.25, 0.25], abs=0.03)
        for index in range(3):  # each source in its own order, none of its tokens twice
            assert (np.diff(packed.ids[owner == index]) == 1).all()


def test_tokens_that_do_not_count_are_marked_in_all_of_a_mixture(tmp_path: Path) -> None:
    payload = pack([[shard(0, [4, 4], counted=True)], [shard(100, [8])]], everywhere(8, 8), tmp_path)
    packed = read_packed(tmp_path)["train"]
    assert packed.counted is not None
    assert packed.counted.dtype == bool
    expected = np.where(packed.ids < 100, packed.ids % 2 == 0, True)
    assert (packed.counted == expected).all()
    assert payload["bytes_per_token"]["train"] == 3 * 16 / 12


def test_documents_of_no_tokens_and_empty_shards_do_no_harm(tmp_path: Path) -> None:
    pack([[shard(0, []), shard(0, [2, 0, 3]), shard(5, [])]], everywhere(5), tmp_path)
    assert read_packed(tmp_path)["train"].ids.tolist() == [0, 1, 2, 3, 4]


def test_the_file_is_plain_safetensors_and_takes_no_memory_until_it_is_read(tmp_path: Path) -> None:
    pack([[shard(0, [5, 3, 9], counted=True)]], everywhere(17), tmp_path)
    path = tmp_path / packing.TOKENS_FILE
    mapped, loaded = map_tensors(path), load_file(path)
    assert set(mapped) == set(loaded)
    for name, array in mapped.items():
        assert isinstance(array, np.memmap)
        assert not array.flags.writeable
        assert array.flags.aligned
        assert array.dtype == loaded[name].dtype
        assert (array == loaded[name]).all()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    pack([[shard(0, [5])]], everywhere(5), tmp_path)
    path = tmp_path / packing.TOKENS_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(CorruptFileError, match="bytes where its header says"):
        read_packed(tmp_path)
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    header["train.words"] = header.pop("train.ids")
    path.write_bytes(whole[:8] + json.dumps(header).encode().ljust(size) + whole[8 + size :])
    with pytest.raises(CorruptFileError, match=r"unreadable \('train\.ids'\)"):
        read_packed(tmp_path)


def test_a_few_windows_of_train_are_held_out() -> None:
    assert [num_held_out(windows * 16, 16) for windows in (0, 1, 20, 21, 100, 10_000)] == [0, 1, 1, 2, 5, 64]
    counts = {"train": 1000 * 16 + 7, "score": 100 * 16 + 15}
    assert num_windows(counts, "train", 16) == 950
    assert num_windows(counts, "score", 16) == 100
