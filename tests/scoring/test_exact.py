"""Exact scores against the plain way: build the whole student, run it from the first layer on, compare logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from puzzle import metrics
from puzzle.blocks.initialise import paper_start
from puzzle.build import build_student
from puzzle.evaluate import evaluate
from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM
from puzzle.scoring.exact import exact_scores
from puzzle.teacher import final_hidden, freeze, layers_of
from puzzle.types import AttentionSpec, FfnSpec, Item, Spec
from puzzle.variants import SearchSpace, site_item
from tests.test_variants import SHAPE

SPECS: list[Spec] = [
    AttentionSpec("gqa", num_kv_heads=1),
    AttentionSpec("linear"),
    AttentionSpec("skip"),
    FfnSpec("narrow", intermediate_size=48),
    FfnSpec("linear"),
    FfnSpec("skip"),
]


@pytest.fixture(scope="module")
def teacher(tiny_llama: LlamaForCausalLM) -> PuzzleForCausalLM:
    model = PuzzleForCausalLM(PuzzleConfig.from_family(tiny_llama.config))
    model.load_state_dict(tiny_llama.state_dict())
    return freeze(model)


def weights_of(teacher: PuzzleForCausalLM, item: Item) -> dict[str, torch.Tensor]:
    return paper_start(layers_of(teacher)[item.sites[0].layer], item.sites[0].part, item.specs[0], torch.arange(96.0))


def test_scores_are_those_of_the_whole_student(teacher: PuzzleForCausalLM) -> None:
    torch.manual_seed(1)
    batches = [torch.randint(3, 128, (3, 20)), torch.randint(3, 128, (2, 20))]
    sites = SearchSpace.parse(["keep"], ["keep"], SHAPE).items(SHAPE)
    layers = 4
    items = [
        site_item(type(sites[0].sites[0])(layer, "attention" if isinstance(spec, AttentionSpec) else "ffn"), spec)
        for layer in range(layers)
        for spec in SPECS
    ]
    by_layer = {layer: [item for item in items if item.sites[0].layer == layer] for layer in range(layers)}
    found = dict(exact_scores(teacher, by_layer, lambda item: weights_of(teacher, item), batches))
    assert list(found) == items
    for item in items:
        keeps = [
            site_item(
                type(item.sites[0])(layer, part), AttentionSpec("keep") if part == "attention" else FfnSpec("keep")
            )
            for layer in range(layers)
            for part in ("attention", "ffn")
            if (layer, part) != (item.sites[0].layer, item.sites[0].part)
        ]
        student = build_student(teacher, [*keeps, item], lambda chosen: weights_of(teacher, chosen))
        expected = {"kl": [], "ce_delta": [], "agreement": []}
        with torch.no_grad():
            for ids in batches:
                log_p, log_q = (F.log_softmax(model(ids).logits[:, :-1].double(), -1) for model in (teacher, student))
                labels = ids[:, 1:, None]
                expected["kl"] += (log_p.exp() * (log_p - log_q)).sum(-1).mean(1).tolist()
                expected["ce_delta"] += (log_p - log_q).gather(-1, labels).squeeze(-1).mean(1).tolist()
                expected["agreement"] += (log_p.argmax(-1) == log_q.argmax(-1)).double().mean(1).tolist()
        for metric, values in expected.items():
            assert found[item][metric].tolist() == pytest.approx(values, rel=1e-3, abs=1e-5), (item.id, metric)


def test_the_chunked_kl_and_its_gradient_are_the_plain_ones(
    teacher: PuzzleForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(3, 128, (3, 21))
    with torch.no_grad():
        reference = final_hidden(teacher, ids)
    noise = 0.1 * torch.randn_like(reference)
    gradients, losses = [], []
    for chunk in (7, 10_000):
        monkeypatch.setattr(metrics, "CHUNK_TOKENS", chunk)
        student = (reference + noise).requires_grad_()
        loss = metrics.kl_loss(student, reference, (teacher.lm_head, teacher.lm_head))
        loss.backward()
        losses.append(loss.item())
        gradients.append(student.grad)
    student = (reference + noise).requires_grad_()
    log_q, log_p = F.log_softmax(teacher.lm_head(student), -1), F.log_softmax(teacher.lm_head(reference), -1)
    plain = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    plain.backward()
    assert losses == pytest.approx([plain.item()] * 2, rel=1e-5)
    for gradient in gradients:
        assert torch.allclose(gradient, student.grad, atol=1e-7)


def test_evaluating_the_teacher_against_itself(teacher: PuzzleForCausalLM) -> None:
    batches = [torch.randint(3, 128, (4, 20))]
    quality = evaluate(teacher, teacher, batches, bytes_per_token=2.0)
    assert quality.kl_nats.mean == pytest.approx(0.0, abs=1e-7)
    assert quality.agreement.mean == 1.0
    loss = teacher(batches[0], labels=batches[0]).loss.item()
    assert quality.ce_nats.mean == pytest.approx(loss, rel=1e-5)
    assert quality.bits_per_byte.mean == pytest.approx(loss / 0.6931471805599453 / 2.0, rel=1e-5)
