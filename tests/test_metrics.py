"""Divergences of predictions: in chunks, and recomputed going backward, they are what the textbook says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from puzzle import metrics


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(-1)


TEXTBOOK: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward": kl,
    "reverse": lambda p, q: kl(q, p),
    "jsd": lambda p, q: (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2,
}


def test_every_divergence_is_tested() -> None:
    assert set(TEXTBOOK) == set(metrics.DIVERGENCES)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", TEXTBOOK)
@pytest.mark.parametrize("chunk", [7, 10_000])
def test_loss_and_gradient_are_the_textbooks(
    kind: str, temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "LOGIT_TOKENS", chunk)
    torch.manual_seed(1)
    heads = nn.Linear(12, 50, bias=False), nn.Linear(16, 50, bias=False)
    student, teacher = torch.randn(3, 21, 12, requires_grad=True), torch.randn(3, 21, 16)
    weights = torch.rand(3, 21).round(decimals=1)
    loss = metrics.divergence_loss(student, teacher, heads, weights, kind, temperature)
    found = torch.autograd.grad(loss, [student, heads[0].weight])
    p, q = ((head(of) / temperature).softmax(-1) for head, of in ((heads[1], teacher), (heads[0], student)))
    plain = temperature**2 * (TEXTBOOK[kind](p.detach(), q) * weights).sum() / weights.sum()
    expected = torch.autograd.grad(plain, [student, heads[0].weight])
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_tokens_drawn_from_the_teacher_estimate_kl_and_its_gradient_without_bias(temperature: float) -> None:
    """The mean over all single draws, each as often as the teacher gives it, is the divergence itself."""
    torch.manual_seed(3)
    heads = nn.Linear(6, 9, bias=False), nn.Linear(8, 9, bias=False)
    student, teacher = torch.randn(1, 4, 6, requires_grad=True), torch.randn(1, 4, 8)
    with torch.no_grad():
        p = (heads[1](teacher) / temperature).softmax(-1)  # (1, 4, 9)
        entropy = -(p * p.log()).sum(-1)
    expected = metrics.divergence_sum(student, teacher, heads, torch.ones(1, 4), "forward", temperature)
    found = torch.zeros(())
    for token in range(9):
        drawn = torch.full((1, 4, 1), token)
        found = found + metrics.sampled_kl_sum(student, heads[0], drawn, entropy, p[..., token], temperature)
    torch.testing.assert_close(found, expected)
    for own, other in zip(
        *(torch.autograd.grad(one, [student, heads[0].weight]) for one in (found, expected)), strict=True
    ):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)


def test_cross_entropy_in_chunks_is_the_textbooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "LOGIT_TOKENS", 5)
    torch.manual_seed(4)
    head, hidden = nn.Linear(6, 9, bias=False), torch.randn(2, 7, 6, requires_grad=True)
    labels, weights = torch.randint(9, (2, 7)), torch.rand(2, 7).round()
    found = metrics.cross_entropy_sum(hidden, head, labels, weights)
    expected = -(head(hidden).log_softmax(-1).gather(2, labels[..., None]).squeeze(2) * weights).sum()
    torch.testing.assert_close(found, expected)
    for own, other in zip(*(torch.autograd.grad(one, [hidden, head.weight]) for one in (found, expected)), strict=True):
        torch.testing.assert_close(own, other)
