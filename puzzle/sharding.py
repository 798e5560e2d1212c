"""Models that no rank holds whole: FSDP2 (`torch.distributed.fsdp.fully_shard`), one layer at a time.

Reads a checkpoint folder as :func:`puzzle.teacher.load_model` does, but each layer is cut among the ranks before the
next is read. What is outside the layers (embedding, norm, head) is cut, too, and whole on every rank from the forward
pass on until gradients are there: logits are computed in chunks, also going backward. Gradients are sums over
the ranks.

It is called as FSDP's own function, not through accelerate, which without a GPU leaves models whole and says nothing.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from puzzle.modeling import PuzzleForCausalLM, PuzzleModel
from puzzle.teacher import Shards, freeze, layers_of, load_config, load_state, without_layers


def mesh_of(device: torch.device, num_ranks: int) -> DeviceMesh | None:
    """All ranks in a row; None for one alone."""
    return init_device_mesh(device.type, (num_ranks,)) if num_ranks > 1 else None


def load_sharded(folder: Path, mesh: DeviceMesh, dtype: torch.dtype, trained: bool) -> PuzzleForCausalLM:
    """The model in ``folder`` with its layers sharded; what is outside them is whole until :func:`shard_root`."""
    config = load_config(folder)
    shards, device = Shards(folder, config), torch.device(mesh.device_type)
    with torch.device("meta"):
        model = PuzzleForCausalLM(config)
    freeze(model).requires_grad_(trained)
    for index, layer in enumerate(layers_of(model)):
        prefix = f"model.layers.{index}."
        state = shards.read(prefix, device, dtype)
        load_state(layer, {name.removeprefix(prefix): tensor for name, tensor in state.items()}, f"{folder}, {prefix}")
        _shard(layer, mesh, reshard_after_forward=True)
    rest: dict[str, Tensor] = {}
    for prefix in ("model.embed_tokens.", "model.norm.", "lm_head."):
        rest |= shards.read(prefix, device, dtype)
    if config.tie_word_embeddings:
        rest["lm_head.weight"] = rest["model.embed_tokens.weight"]
    in_layers = [name for name in model.state_dict() if name.startswith("model.layers.")]
    load_state(model, rest, str(folder), present=in_layers)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    for name, buffer in PuzzleModel(without_layers(config)).named_buffers():
        owner, _, own_name = name.rpartition(".")
        setattr(model.model.get_submodule(owner), own_name, buffer.to(device))
    return model


def shard_root(root: nn.Module, mesh: DeviceMesh) -> None:
    """Shards what of ``root`` is not sharded yet. Its forward must be what computes with it."""
    _shard(root, mesh, reshard_after_forward=False)
    assert all(isinstance(parameter, DTensor) for parameter in root.parameters()), "FSDP left a parameter whole"


def _shard(module: nn.Module, mesh: DeviceMesh, reshard_after_forward: bool) -> None:
    if any(True for _ in module.parameters()):
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard_after_forward)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)  # sums: each rank's loss is divided by what the whole step counts
        module.set_force_sum_reduction_for_comms(True)


def whole(tensor: Tensor) -> Tensor:
    """The tensor with all its parts; every rank must ask for the same ones in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """A ``tensor`` that every rank has whole, on the device of ``like`` and cut as it is."""
    moved = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return moved
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)
