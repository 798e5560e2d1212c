"""The residual stream: three stores, one result, and that of the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from puzzle.blocks.stream import InMemory, OnDisk, Store, Stream
from puzzle.data.batches import Batch
from puzzle.teacher import Compute, Teacher, load_model
from tests.blocks.conftest import batch, layer_passes

CPU = torch.device("cpu")


def streams(folder: Path, scratch: Path, dtype: torch.dtype) -> dict[str, Stream]:
    stores: dict[str, tuple[Store | None, int, bool]] = {
        "memory": (InMemory(), 1, False),
        "disk": (OnDisk(scratch / "residual"), 1, False),
        "recompute": (None, 1, True),
        "recompute, three together": (None, 3, False),
    }
    return {
        name: Stream(Teacher(folder, CPU, dtype, held), batch, 5, store, chunk)
        for name, (store, chunk, held) in stores.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_store_gives_the_same_stream(teacher_folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    found = streams(teacher_folder, tmp_path, dtype)
    reference = found.pop("memory")
    for layer in range(4):
        for index in (4, 0, 2):  # in any order
            expected = reference.hidden(index)
            assert expected.dtype == dtype
            for name, stream in found.items():
                assert torch.equal(stream.hidden(index), expected), name
        for stream in (reference, *found.values()):
            stream.advance(stream.teacher.layer(layer))


def test_the_stream_is_the_whole_models(teacher_folder: Path, teacher: Teacher) -> None:
    model = load_model(teacher_folder, Compute(CPU, bf16=False))
    stream = Stream.of(teacher, [batch(0), batch(1)])
    for layer, expected in enumerate(layer_passes(model, batch(1), 4)):
        one = list(stream.passes(teacher.layer(layer)))[1]
        torch.testing.assert_close(one.after, expected.after)
        torch.testing.assert_close(one.middle, expected.middle)
        stream.advance(teacher.layer(layer))


def test_a_streamed_teacher_holds_no_layer_that_nobody_uses(
    teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = Teacher(teacher_folder, CPU, torch.float32)
    first = teacher.layer(0)
    assert teacher.layer(0) is first
    teacher.layer(1)
    assert teacher.layer(0) is not first
    held = Teacher(teacher_folder, CPU, torch.float32, held=True)
    assert held.layer(0) is held.layer(0)


def test_documents_keep_to_themselves(teacher: Teacher) -> None:
    """Two documents in one window give what each gives alone."""
    ids = batch(0).ids[:1]
    documents = torch.cat([torch.zeros(1, 7), torch.ones(1, 9)], 1).int()
    together = Stream.of(teacher, [Batch(ids, None, documents)])
    alone = Stream.of(teacher, [Batch(ids[:, 7:], None, None)])
    for layer in range(4):
        for stream in (together, alone):
            stream.advance(teacher.layer(layer))
    torch.testing.assert_close(together.hidden(0)[:, 7:], alone.hidden(0), rtol=1e-4, atol=1e-5)


def test_the_first_token_does_not_count(teacher: Teacher) -> None:
    context = teacher.context(batch(0))
    assert context.weights[:, 0].sum() == 0
    assert context.weights[:, 1:].min() == 1


def test_a_shard_that_shrank_is_named(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    from puzzle.types import CorruptFileError

    tiny_llama.save_pretrained(tmp_path, max_shard_size="100kB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    with open(shards[1], "r+b") as file:
        file.truncate(shards[1].stat().st_size - 10)
    with pytest.raises(CorruptFileError, match=shards[1].name):
        Teacher(tmp_path, CPU, torch.float32)
    shards[1].unlink()
    with pytest.raises(CorruptFileError, match="missing"):
        Teacher(tmp_path, CPU, torch.float32)


def test_a_layer_without_its_tensors_is_named(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from puzzle.types import CorruptFileError

    tiny_llama.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.2.mlp.up_proj.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    teacher = Teacher(tmp_path, CPU, torch.float32)
    teacher.layer(1)
    with pytest.raises(CorruptFileError, match=r"layer 2.*mlp\.up_proj\.weight"):
        teacher.layer(2)


def test_on_disk_the_last_batch_may_be_smaller(tmp_path: Path) -> None:
    store = OnDisk(tmp_path / "stream")
    for scale in (1.0, 2.0):
        for index, rows in enumerate((4, 4, 1)):
            store.write(index, scale * torch.full((rows, 3, 2), float(index)))
    assert [store.read(index).shape[0] for index in range(3)] == [4, 4, 1]
    assert [float(store.read(index).mean()) for index in range(3)] == [0.0, 2.0, 4.0]
