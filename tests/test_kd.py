"""Global distillation: the loss as the paper writes it, and a resume that is the uninterrupted run bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from puzzle import kd
from puzzle.build import build_student
from puzzle.config import KdConfig
from puzzle.data.batches import Batch
from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM
from puzzle.schedule import warmup_cosine
from puzzle.teacher import Compute, freeze
from puzzle.types import AttentionSpec, FfnSpec, Item, Site
from puzzle.variants import site_item

FP32 = Compute(torch.device("cpu"), bf16=False)


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_llama_tied"])
def teacher(request: pytest.FixtureRequest) -> PuzzleForCausalLM:
    llama: LlamaForCausalLM = request.getfixturevalue(request.param)
    model = PuzzleForCausalLM(PuzzleConfig.from_family(llama.config))
    model.load_state_dict(llama.state_dict())
    return freeze(model)


def student_of(teacher: PuzzleForCausalLM) -> PuzzleForCausalLM:
    items: list[Item] = [
        site_item(Site(layer, part), spec)  # type: ignore[arg-type]
        for layer in range(4)
        for part, spec in (("attention", AttentionSpec("skip" if layer == 1 else "keep")), ("ffn", FfnSpec("keep")))
    ]
    return build_student(teacher, items, lambda item: {})


def batches(step: int) -> Batch:
    return Batch(torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(step)))


def test_the_loss_is_the_papers(teacher: PuzzleForCausalLM) -> None:
    student, batch = student_of(teacher), batches(0)
    ids = batch.ids
    config = KdConfig(kl_weight=0.7, cosine_weight=0.3, lm_weight=0.2)
    loss = kd.distillation_loss(student, teacher, batch, config)
    seen: dict[str, list[Tensor]] = {"student": [], "teacher": []}
    for name, model in (("student", student), ("teacher", teacher)):
        for layer in model.model.layers:
            layer.register_forward_hook(lambda _, __, output, name=name: seen[name].append(output))
    logits = {name: model(ids).logits for name, model in (("student", student), ("teacher", teacher))}
    for model in (student, teacher):
        for layer in model.model.layers:
            layer._forward_hooks.clear()
    log_p, log_q = (F.log_softmax(logits[name], -1) for name in ("teacher", "student"))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    pairs = zip(seen["student"], seen["teacher"], strict=True)
    cosine = sum((1 - F.cosine_similarity(own, other, dim=-1)).mean() for own, other in pairs)
    lm = F.cross_entropy(logits["student"][:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx((0.7 * kl + 0.3 * cosine + 0.2 * lm).item(), rel=1e-4)


def test_only_predictions_that_count_are_distilled(teacher: PuzzleForCausalLM) -> None:
    """KL and CE are means over the positions whose next token counts."""
    student, ids = student_of(teacher), batches(0).ids
    counted = torch.zeros_like(ids, dtype=torch.bool)
    counted[0, 4:7] = True
    config = KdConfig(kl_weight=1.0, cosine_weight=0.0, lm_weight=1.0)
    loss = kd.distillation_loss(student, teacher, Batch(ids, counted), config)
    with torch.no_grad():
        log_p, log_q = (F.log_softmax(model(ids).logits[0, 3:6], -1) for model in (teacher, student))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    lm = F.nll_loss(log_q, ids[0, 4:7])
    assert loss.item() == pytest.approx((kl + lm).item(), rel=1e-4)
    nothing = kd.distillation_loss(student, teacher, Batch(ids, torch.zeros_like(counted)), config)
    assert nothing.item() == 0.0


def test_the_teacher_is_its_own_perfect_student(teacher: PuzzleForCausalLM) -> None:
    assert kd.distillation_loss(teacher, teacher, batches(0), KdConfig()).item() == pytest.approx(0.0, abs=1e-5)


def test_distilling_brings_the_student_closer(teacher: PuzzleForCausalLM) -> None:
    """On what it sees: a random teacher has nothing that would generalise from so few tokens."""
    config = KdConfig(tokens=24 * 30, batch_size=2, warmup_steps=2, learning_rate=2e-3)
    job = kd.Distillation(student_of(teacher), teacher, config, FP32)
    before = kd.distillation_loss(job.student, teacher, batches(0), config).item()
    losses: list[float] = []
    job.run(lambda step: batches(0), 30, 30, losses.append)
    assert len(losses) == job.step == 30
    assert losses[0] == pytest.approx(before, rel=1e-5)
    assert kd.distillation_loss(job.finish(), teacher, batches(0), config).item() < 0.5 * before


def test_a_resumed_run_is_the_uninterrupted_one(teacher: PuzzleForCausalLM, tmp_path: Path) -> None:
    config = KdConfig(tokens=24 * 6, batch_size=2, warmup_steps=2)
    straight = kd.Distillation(student_of(teacher), teacher, config, FP32)
    straight.run(batches, 6, 6, lambda _: None)
    stopped = kd.Distillation(student_of(teacher), teacher, config, FP32)
    stopped.run(batches, 4, 6, lambda _: None)
    payload = stopped.save(tmp_path)
    resumed = kd.Distillation(student_of(teacher), teacher, config, FP32)
    resumed.load(tmp_path, payload)
    resumed.run(batches, 6, 6, lambda _: None)
    for name, parameter in straight.parameters.items():
        assert torch.equal(parameter, resumed.parameters[name]), name


def test_the_rate_warms_up_and_decays_to_its_floor() -> None:
    rates = [warmup_cosine(step, 20, 4, floor=0.1) for step in range(21)]
    assert rates[0] == pytest.approx(0.25)
    assert max(rates) == rates[4] == 1.0
    assert rates[20] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_a_resume_knows_parameters_that_never_got_a_gradient(teacher: PuzzleForCausalLM, tmp_path: Path) -> None:
    config = KdConfig(kl_weight=0.0, tokens=24 * 2, batch_size=2, warmup_steps=1)
    job = kd.Distillation(student_of(teacher), teacher, config, FP32)
    job.run(batches, 1, 2, lambda _: None)
    payload = job.save(tmp_path)
    resumed = kd.Distillation(student_of(teacher), teacher, config, FP32)
    resumed.load(tmp_path, payload)
    for one in (job, resumed):
        one.run(batches, 2, 2, lambda _: None)
    for name, parameter in job.parameters.items():
        assert torch.equal(parameter, resumed.parameters[name]), name
