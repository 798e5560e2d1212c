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
