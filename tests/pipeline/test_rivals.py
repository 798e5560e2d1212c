"""What `puzzle compare` sets beside the search and needs a model for, against plain torch and by hand."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from puzzle.cli import main
from puzzle.formats import matrix_bytes
from puzzle.run import Run
from puzzle.stages.rivals import quantised, round_to_nearest
from puzzle.variants import keep_spec, matrices
from tests.pipeline.conftest import Project
from tests.tiny_families import make_kept, make_stock, shape_of


def rows_of(out: str) -> dict[str, list[str]]:
    """By the name of the way, what stands behind it."""
    names = ("MIP  ", "importance depth", "evolution, 12 evaluations", "evolution from the MIP", "teacher in fp8",
             "teacher in int4-g32")  # fmt: skip
    return {name: line[len(name) :].split() for line in out.splitlines() for name in names if line.startswith(name)}


def test_rivals_stand_beside_the_search(copy: Project, capsys: pytest.CaptureFixture[str]) -> None:
    (copy.folder / "limit.yaml").write_text("constraints: {params: 80%, layers_with_ffn: {min: 0}}\n")
    asked = ["compare", "--importance", str(copy.config), "--evolution", "12", "--quantised"]
    assert main(["--debug", *asked]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert len(rows) == 6
    predicted = [float(rows[name][0]) for name in ("MIP  ", "evolution from the MIP", "evolution, 12 evaluations")]
    assert predicted[0] == min(predicted)
    run = Run.open(copy.config)
    fp8, int4 = rows["teacher in fp8"], rows["teacher in int4-g32"]
    assert 0 < float(fp8[3]) < float(int4[3])  # behind ", 0.00002 GiB": the measured KL
    for row, dtype in ((fp8, "fp8"), (int4, "int4-g32")):
        stored = sum(
            one.count * matrix_bytes(one.fan_in, one.fan_out, dtype)
            for site in run.shape.sites
            for one in matrices(keep_spec(run.shape, site), run.shape)
        )
        others = 2 * (128 * 32 + 32 + 2 * 2 * 32)  # tied embedding, final norm, two norms a layer
        assert float(row[1]) == pytest.approx((stored + others) / 2**30, rel=1e-3)
    unit = (run.importance / "unit.json").read_bytes()
    assert main(["--debug", *asked[:3]]) == 0
    assert (run.importance / "unit.json").read_bytes() == unit
    assert main(["compare", str(copy.config), "--evolution", "0"]) == 2
    assert "expected at least 1 true evaluation, found 0" in capsys.readouterr().err


def test_block_importance_is_that_of_transformers_own_hidden_states(copy: Project) -> None:
    from puzzle.rivals import block_importance
    from puzzle.stages.common import sequences_of

    run = Run.open(copy.config)
    found = block_importance(run)
    model = AutoModelForCausalLM.from_pretrained(copy.folder / "teacher").eval()
    expected = torch.zeros(2, dtype=torch.float64)
    batches = sequences_of(run, "train", 8)
    layers: list[list[torch.Tensor]] = [[], []]
    with torch.no_grad():
        for batch in batches:
            streams: list[torch.Tensor] = []
            hooks = [
                layer.register_forward_hook(lambda _, args, out, into=streams: into.extend([args[0], _first(out)]))
                for layer in model.model.layers
            ]
            model(batch.ids)
            for hook in hooks:
                hook.remove()
            for place in range(2):
                before, after = streams[2 * place], streams[2 * place + 1]
                layers[place].append(torch.cosine_similarity(before, after, dim=-1).flatten())
    for place in range(2):
        expected[place] = 1 - torch.cat(layers[place]).double().mean()
    assert found == pytest.approx(expected.tolist(), abs=1e-6)
    assert json.loads((run.importance / "unit.json").read_text())["payload"]["importance"] == found


def _first(out: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


def test_rounding_by_hand() -> None:
    row = torch.tensor([[7.0, -3.4, 0.6, 0.0] + [0.0] * 28 + [0.7, 0.04]])
    found = round_to_nearest(row, "int4-g32")
    scale = torch.tensor(0.1).half().item()
    assert found[0, :4].tolist() == [7.0, -3.0, 1.0, 0.0]  # scale 1
    assert found[0, 32:].tolist() == pytest.approx([7 * scale, 0.0])  # a group of its own, of two
    eight = round_to_nearest(torch.tensor([[448.0, 17.0, 0.4], [1.0, 0.5, 0.0]]), "fp8")
    assert eight.tolist() == [[448.0, 16.0, 0.40625], [1.0, 0.5, 0.0]]  # three bits of mantissa; a scale each row
    for dtype in ("fp8", "int4-g32"):
        assert not round_to_nearest(torch.zeros(2, 40), dtype).any()
        assert round_to_nearest(torch.full((1, 1, 3), 1e-30), dtype).isfinite().all()


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_matrices_of_layers_are_rounded_and_nothing_else(family: str) -> None:
    """As many numbers change as variants.py counts in matrices: biases, norms, routers, embedding and head do not."""
    stock = make_stock(family)
    model, shape = make_kept(stock), shape_of(stock)
    rounded = quantised(model, "int4-g32")
    changed = {
        name: after
        for (name, before), after in zip(model.named_parameters(), rounded.parameters(), strict=True)
        if not torch.equal(before, after)
    }
    assert all(name.startswith("model.layers.") for name in changed)
    counted = [one for site in shape.sites for one in matrices(keep_spec(shape, site), shape)]
    expected = sum(one.count * one.fan_in * one.fan_out for one in counted)
    assert sum(after.numel() for after in changed.values()) == expected
    assert {after.shape[-1] for after in changed.values()} == {one.fan_in for one in counted}
    again = quantised(rounded, "int4-g32")
    for name, parameter in again.named_parameters():
        assert torch.allclose(parameter, dict(rounded.named_parameters())[name], atol=1e-3), name
