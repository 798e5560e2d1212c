"""Fused FFNs from the space to the export: scored, priced, chosen where nothing else fits, built, reloaded."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from puzzle import artifacts, plans
from puzzle.cli import main
from puzzle.run import Run
from puzzle.stages.common import sequences_of, teacher_of
from puzzle.teacher import context_of, layers_of
from puzzle.variants import params, rest_params
from tests.pipeline.conftest import Project

FUSED = "L000-L001.fused-2x48"


@pytest.fixture
def fusing(project: Project) -> Project:
    with open(project.folder / "space.yaml", "a") as file:
        file.write("fusion: {max_layers: 2, ffn: [keep, narrow-50%]}\n")
    # as many parameters as all but one attention have, in one layer: there is no other way
    least = 128 * 32 + 4 * 32 * 32 + 2 * 3 * 32 * 48
    (project.folder / "limit.yaml").write_text(
        "workloads:\n  chat: {isl: 8, osl: 8, weights: fp32, kv: fp32, device: cpu}\nconstraints:\n"
        f"  params: {{min: {least}}}\n  layers_with_ffn: {{max: 1}}\n  layers_with_attention: {{max: 1}}\n"
    )
    return project


def test_a_fused_run_goes_all_the_way(fusing: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--debug", "run", str(fusing.config)]) == 0
    run = Run.open(fusing.config)
    chosen = {item.id: item for item in run.chosen_items()}
    assert FUSED in chosen and len(chosen) == 2
    assert not any("fused" in unit for unit in run.units)  # nothing was trained for it
    names = json.loads((run.solution / "architecture.json").read_text())
    assert names.items() >= {"L000.ffn": "fused-2x48", "L001.attention": "skip", "L001.ffn": "skip"}.items()
    evaluation = artifacts.read_unit(run.student / "evaluation.json").payload
    sizes = sum(params(spec, run.shape) for item in chosen.values() for spec in item.specs) + rest_params(run.shape)
    assert evaluation["params"]["student"] == sizes == run.solutions()[0].totals["params"]
    assert "layer 0, FFN: fused-2x48" in run.report.read_text()
    loaded = AutoModelForCausalLM.from_pretrained(run.student / "export" / "hf")
    assert loaded.config.ffn_width(0) == 2 * 48

    capsys.readouterr()
    assert main(["--debug", "explain", str(fusing.config), "--site", "L001.attention"]) == 0
    assert FUSED in capsys.readouterr().out
    for command in (["pareto"], ["compare"], ["show", "scores"], ["show", "costs"], ["constraints", "explain"]):
        assert main(["--debug", *command, str(fusing.config)]) == 0, command
    assert "fused" in capsys.readouterr().out
    assert main(["--debug", "shrink", str(fusing.config), str(fusing.folder / "p.yaml"), "--within", "10"]) == 0
    assert "fused" not in (fusing.folder / "p.yaml").read_text()
    assert main(["score", str(fusing.config), "--on", str(run.solution / "architecture.json")]) == 2
    assert "one FFN of a fused run cannot be changed alone" in capsys.readouterr().err


def test_its_score_is_the_divergence_of_the_sum(fusing: Project) -> None:
    """One-pass or exact, a fused run is measured; it is stale when an FFN that it is made of is."""
    settings = ("score.mode=one-pass", "distill.nested=true")
    for stage in ("data", "init", "distill", "score"):
        assert main(["--debug", stage, str(fusing.config), "--set", settings[0], "--set", settings[1]]) == 0
    run = Run.open(fusing.config, settings)
    table = run.read_scores()
    score = table.score(FUSED, "kl")
    assert (score.method, table.score("L000.ffn.narrow-24", "kl").method) == ("exact", "one-pass")
    teacher, found = teacher_of(run), []
    first, second = layers_of(teacher)
    with torch.no_grad():
        for batch in sequences_of(run, "score", 4):
            x = teacher.model.embed_tokens(batch.ids)
            context = context_of(teacher.model, batch, torch.float32)
            x = x + first.attention_delta(x, context.position)
            x = x + first.ffn_delta(x) + second.ffn_delta(x)
            log_q = F.log_softmax(teacher.lm_head(teacher.model.norm(x)), -1)[:, :-1]
            log_p = F.log_softmax(teacher(batch.ids).logits, -1)[:, :-1]
            found += (log_p.exp() * (log_p - log_q)).sum(-1).mean(1).tolist()
    assert list(score.per_sequence) == pytest.approx(found, rel=1e-3, abs=1e-5)
    (narrow,) = [item for item in run.items if item.id == "L000-L001.fused-2x24"]
    (keep,) = [item for item in run.items if item.id == FUSED]
    before = {item.id: plans.scored_from(run, [item], False)["library"] for item in (narrow, keep)}
    weights = run.trained("L001.ffn.nested") / artifacts.MARKER
    weights.write_text(weights.read_text().replace('"content": "', '"content": "0'))
    after = {item.id: plans.scored_from(run, [item], False)["library"] for item in (narrow, keep)}
    assert after[narrow.id] != before[narrow.id] and after[keep.id] == before[keep.id]
