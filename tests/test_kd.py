"""Global distillation: the loss as the paper writes it, and a resume that is the uninterrupted run bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from puzzle import kd
from puzzle.blocks.prune import student_config
from puzzle.build import build_student
from puzzle.config import KdConfig
from puzzle.data.batches import Batch
from puzzle.kd.losses import EMBEDDING, layer_pairs
from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM
from puzzle.schedule import warmup_cosine
from puzzle.teacher import Compute, freeze
from puzzle.types import AttentionSpec, ConfigError, FfnSpec, Item, ModelShape, Site
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


def small(num_layers: int, hidden_size: int, **fields: Any) -> PuzzleForCausalLM:
    """A random model with the vocabulary of the others."""
    torch.manual_seed(num_layers)
    shared: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 128}
    config = LlamaConfig(
        hidden_size=hidden_size, num_hidden_layers=num_layers, intermediate_size=40, initializer_range=0.2, **shared
    )
    for name, value in fields.items():
        setattr(config, name, value)
    return PuzzleForCausalLM(PuzzleConfig.from_family(config)).eval()


def stream_of(model: PuzzleForCausalLM, ids: Tensor) -> list[Tensor]:
    """As transformers tells it: the embedding's output, then every layer's, before the last norm."""
    seen: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, __, output: seen.append(output)) for layer in model.model.layers]
    model(ids)
    for hook in hooks:
        hook.remove()
    return [model.model.embed_tokens(ids), *seen]


@pytest.mark.parametrize(("made_of", "pairs"), [(None, [1, 2, 4]), ([0, 1, 4], [0, 1, 4])])
def test_layers_and_embedding_of_a_narrower_and_shallower_student(made_of: list[int] | None, pairs: list[int]) -> None:
    """Of 3 layers out of 5; every distance as its formula says, through the learned map."""
    teacher, student = small(5, 32), small(3, 24, **({"layers_from": made_of} if made_of else {}))
    ids = batches(0).ids
    config = KdConfig(kl_weight=0, cosine_weight=0.5, mse_weight=0.25, match_embedding=True, balance="fixed")
    loss = kd.distillation_loss(student, teacher, Batch(ids), config)
    own, others = stream_of(student, ids), stream_of(teacher, ids)
    embeddings = [model.model.embed_tokens.weight.detach().double() for model in (student, teacher)]
    to_teacher = torch.linalg.lstsq(*embeddings).solution.float()  # (24, 32)
    expected = torch.zeros(())
    for left, right in zip(own, [others[0], *(others[layer + 1] for layer in pairs)], strict=True):
        mapped = left @ to_teacher
        expected = expected + 0.5 * (1 - F.cosine_similarity(mapped, right, dim=-1)).mean()
        expected = expected + 0.25 * ((mapped - right).square().sum(-1) / right.square().sum(-1)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)


def test_layers_are_compared_with_those_they_were_made_of_by_however_many_steps() -> None:
    """12 layers, of which 6 stay, and of those 3."""
    shape = ModelShape("llama", 0, 32, 4, 2, 8, 48, 128, 64, True)
    first = small(12, 32).config
    middle = student_config(first, replace(shape, num_layers=6), [0, 1, 2, 5, 10, 11])
    last = student_config(middle, replace(shape, num_layers=3), [1, 3, 4])
    assert (last.layers_from, last.layers_of) == ([1, 5, 10], 12)
    assert [layer for _, layer in layer_pairs(last, middle, False)] == [1, 3, 4]
    assert [layer for _, layer in layer_pairs(last, first, False)] == [1, 5, 10]
    assert layer_pairs(middle, middle, True) == ((EMBEDDING, EMBEDDING), *((layer, layer) for layer in range(6)))
    # of another line: those as deep, 2/12, 6/12 and 11/12 of 24 layers
    assert [layer for _, layer in layer_pairs(last, small(24, 32).config, False)] == [3, 11, 21]
    assert layer_pairs(small(4, 32).config, small(2, 32).config, False) == ((0, 0), (1, 0), (2, 1), (3, 1))


def test_layers_that_the_teacher_has_not_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"layers_from .* \[0, 5\]; it must name one of the teacher's 4 layers"):
        kd.distillation_loss(small(2, 32, layers_from=[0, 5]), small(4, 32), batches(0), KdConfig())


def test_the_map_between_widths_is_trained_and_saved_but_is_not_the_students(tmp_path: Path) -> None:
    teacher = freeze(small(2, 32))
    config = KdConfig(batch_size=2, warmup_steps=1, learning_rate=1e-2)
    job = kd.Distillation(small(2, 24), teacher, config, FP32)
    start = job.parameters["to_teacher"].detach().clone()
    job.run(batches, 3, 5, lambda _: None)
    assert not torch.equal(job.parameters["to_teacher"], start)
    payload = job.save(tmp_path)
    resumed = kd.Distillation(small(2, 24), teacher, config, FP32)
    resumed.load(tmp_path, payload)
    for one in (job, resumed):
        one.run(batches, 5, 5, lambda _: None)
    assert torch.equal(job.parameters["to_teacher"], resumed.parameters["to_teacher"])
    assert set(job.finish().state_dict()) == set(small(2, 24).state_dict())


def test_a_dynamic_balance_makes_the_layers_part_as_large_as_the_predictions() -> None:
    """With the same batch at every step and a rate of almost nothing, both halves of the loss are the same."""
    teacher = freeze(small(4, 32))
    config = KdConfig(cosine_weight=3.0, balance="dynamic", learning_rate=1e-12, min_learning_rate=0.0)
    job = kd.Distillation(student_of(teacher), teacher, config, FP32)
    job.run(lambda step: batches(0), 2, 2, lambda _: None)
    assert job.last is not None
    assert job.last.loss == pytest.approx(2 * job.last.parts["kl"], rel=1e-4)
    assert job.last.balance * 3.0 * job.last.parts["cosine"] == pytest.approx(job.last.parts["kl"], rel=1e-4)


def test_pieces_and_recomputed_activations_change_nothing() -> None:
    teacher = freeze(small(4, 32))

    def batch(step: int) -> Batch:
        random = torch.Generator().manual_seed(step)
        ids = torch.randint(3, 128, (5, 12), generator=random)
        return Batch(ids, torch.rand(5, 12, generator=random) < 0.5)

    logged: list[list[float]] = []
    for settings in ({}, {"micro_batch_size": 2, "checkpoint_activations": True}):
        config = KdConfig(lm_weight=0.3, balance="dynamic", batch_size=5, warmup_steps=1, **settings)
        job = kd.Distillation(student_of(teacher), teacher, config, FP32)
        logged.append([])
        job.run(batch, 3, 3, logged[-1].append)
        assert job.last is not None
        logged[-1].append(job.last.gradient_norm)
        assert "forward" not in vars(job.finish().model.layers[0])
    assert logged[1] == pytest.approx(logged[0], rel=1e-4)


def test_the_language_models_loss_alone_needs_no_teacher() -> None:
    teacher = freeze(small(4, 32))
    config = KdConfig(kl_weight=0, cosine_weight=0, lm_weight=1, batch_size=2, warmup_steps=1)
    student = student_of(teacher)
    ids = batches(0).ids
    expected = F.cross_entropy(student(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    job = kd.Distillation(student, None, config, FP32)
    losses: list[float] = []
    job.run(batches, 2, 2, losses.append)
    assert losses[0] == pytest.approx(expected, rel=1e-5)


def test_a_loss_that_is_no_number_leaves_the_weights_as_they_were() -> None:
    teacher = freeze(small(4, 32))
    job = kd.Distillation(student_of(teacher), teacher, KdConfig(batch_size=2), FP32)
    with torch.no_grad():
        job.parameters["model.norm.weight"].fill_(float("inf"))
    before = {name: parameter.detach().clone() for name, parameter in job.parameters.items()}
    with pytest.raises(kd.DivergedError, match="the loss is not finite at step 1; lower kd.learning_rate"):
        job.run(batches, 2, 2, lambda _: None)
    assert job.step == 0
    assert all(torch.equal(parameter, before[name]) for name, parameter in job.parameters.items())
