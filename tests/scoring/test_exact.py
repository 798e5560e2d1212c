"""Exact scores against the plain way: build the whole student, run it from the first layer on, compare logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from puzzle import metrics
from puzzle.build import build_student
from puzzle.data.batches import Batch
from puzzle.evaluate import evaluate
from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM
from puzzle.scoring.exact import exact_scores
from puzzle.space import PARTS
from puzzle.teacher import final_hidden, freeze, layers_of
from puzzle.types import AttentionSpec, FfnSpec, Item, Site, Spec
from puzzle.variants import layer_item, site_item
from tests.blocks.conftest import start_of

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
    return start_of(layers_of(teacher), item).weights  # type: ignore[return-value]


def items_of() -> list[Item]:
    single = [
        site_item(Site(layer, "attention" if isinstance(spec, AttentionSpec) else "ffn"), spec)
        for layer in range(4)
        for spec in SPECS
    ]
    narrow = FfnSpec("narrow", intermediate_size=48)
    pairs = [layer_item(1, AttentionSpec("gqa", num_kv_heads=1), narrow), layer_item(2, AttentionSpec("skip"), narrow)]
    return sorted([*single, *pairs], key=lambda item: item.sites[0].layer)


def keeps_beside(item: Item) -> list[Item]:
    sites = [Site(layer, part) for layer in range(4) for part in PARTS]
    keep: dict[str, Spec] = {"attention": AttentionSpec("keep"), "ffn": FfnSpec("keep")}
    return [site_item(site, keep[site.part]) for site in sites if site not in item.sites]


def test_scores_are_those_of_the_whole_student(teacher: PuzzleForCausalLM) -> None:
    torch.manual_seed(1)
    batches = [Batch(torch.randint(3, 128, (3, 20))), Batch(torch.randint(3, 128, (2, 20)))]
    counted = torch.rand(2, 20) < 0.5
    batches[1] = Batch(batches[1].ids, counted)
    items = items_of()
    by_layer = {layer: [item for item in items if item.sites[0].layer == layer] for layer in range(4)}
    found = dict(exact_scores(teacher, by_layer, lambda item: weights_of(teacher, item), batches))
    assert list(found) == items
    for item in items:
        student = build_student(teacher, [*keeps_beside(item), item], lambda chosen: weights_of(teacher, chosen))
        expected = {"kl": [], "ce_delta": [], "agreement": []}
        with torch.no_grad():
            for batch in batches:
                log_p, log_q = (
                    F.log_softmax(model(batch.ids).logits[:, :-1].double(), -1) for model in (teacher, student)
                )
                labels = batch.ids[:, 1:, None]
                each = {
                    "kl": (log_p.exp() * (log_p - log_q)).sum(-1),
                    "ce_delta": (log_p - log_q).gather(-1, labels).squeeze(-1),
                    "agreement": (log_p.argmax(-1) == log_q.argmax(-1)).double(),
                }
                counts = torch.ones_like(labels[..., 0]) if batch.counted is None else batch.counted[:, 1:]
                for metric, values in each.items():
                    expected[metric] += ((values * counts).sum(1) / counts.sum(1)).tolist()
        for metric, values in expected.items():
            assert found[item][metric].tolist() == pytest.approx(values, rel=1e-3, abs=1e-5), (item.id, metric)


def test_the_chunked_kl_and_its_gradient_are_the_plain_ones(
    teacher: PuzzleForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        reference = final_hidden(teacher, Batch(torch.randint(3, 128, (3, 21))))
    noise = 0.1 * torch.randn_like(reference)
    gradients, losses = [], []
    for chunk in (7, 10_000):
        monkeypatch.setattr(metrics, "CHUNK_TOKENS", chunk)
        student = (reference + noise).requires_grad_()
        loss = metrics.kl_loss(student, reference, (teacher.lm_head, teacher.lm_head), torch.ones(3, 21))
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
    batches = [Batch(torch.randint(3, 128, (4, 20)))]
    quality = evaluate(teacher, teacher, batches, bytes_per_token=2.0)
    assert quality.kl_nats.mean == pytest.approx(0.0, abs=1e-7)
    assert quality.agreement.mean == 1.0
    loss = teacher(batches[0].ids, labels=batches[0].ids).loss.item()
    assert quality.ce_nats.mean == pytest.approx(loss, rel=1e-5)
    assert quality.bits_per_byte.mean == pytest.approx(loss / 0.6931471805599453 / 2.0, rel=1e-5)
