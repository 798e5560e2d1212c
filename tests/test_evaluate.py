"""What a model is worth by how much its predictions see, against sums over single tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from puzzle.data.batches import Batch
from puzzle.evaluate import evaluate
from puzzle.metrics import tokens_in_sight
from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM
from puzzle.types import mean_and_error


def make_model(llama: LlamaForCausalLM, seed: int) -> PuzzleForCausalLM:
    torch.manual_seed(seed)
    return PuzzleForCausalLM(PuzzleConfig.from_family(llama.config)).eval()


@pytest.mark.parametrize("length", [16, 17, 33, 40])
@torch.no_grad()
def test_quality_by_tokens_in_sight(length: int, tiny_llama: LlamaForCausalLM) -> None:
    """The second sequence has nothing that counts from its 16th token on."""
    student, teacher = make_model(tiny_llama, 1), make_model(tiny_llama, 2)
    ids = torch.randint(3, 128, (3, length), generator=torch.Generator().manual_seed(0))
    counted = torch.rand(3, length, generator=torch.Generator().manual_seed(1)) < 0.8
    counted[1, 16:], counted[:, -1] = False, torch.tensor([True, False, True])
    rows = evaluate(student, teacher, [Batch(ids[:2], counted[:2]), Batch(ids[2:], counted[2:])], 2.0).positions

    edges = {16: [1, 16], 17: [1, 16, 17], 33: [1, 16, 32, 33], 40: [1, 16, 32, 40]}[length]
    assert [(row.first, row.last + 1) for row in rows] == list(zip(edges, edges[1:], strict=False))
    log_p, log_q = (model(ids).logits[:, :-1].log_softmax(-1) for model in (teacher, student))
    values = {
        "ce_nats": -log_q.gather(2, ids[:, 1:, None])[..., 0],
        "teacher_ce_nats": -log_p.gather(2, ids[:, 1:, None])[..., 0],
        "kl_nats": (log_p.exp() * (log_p - log_q)).sum(-1),
    }
    for row in rows:
        at = range(row.first, row.last + 1)  # a token at place t is predicted from t tokens
        for name, of in values.items():
            means = [
                mean_and_error([of[one, t - 1].item() for t in at if counted[one, t]])[0]
                for one in range(3)
                if any(counted[one, t] for t in at)
            ]
            assert len(means) == (3 if row.last < 16 else 2)
            found = getattr(row, name)
            assert (found.mean, found.standard_error) == pytest.approx(mean_and_error(means), rel=1e-4)


def test_only_the_own_document_is_in_sight() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 1]], dtype=torch.int32)
    ids = torch.zeros(2, 6, dtype=torch.int64)
    assert tokens_in_sight(Batch(ids)).tolist() == [[1, 2, 3, 4, 5]] * 2
    assert tokens_in_sight(Batch(ids, documents=documents)).tolist() == [[1, 2, 3, 1, 2], [1, 1, 2, 3, 4]]
