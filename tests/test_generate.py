"""Continuations: greedy ones are transformers' own, draws have the right distribution, rows leave others alone."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from puzzle.generate import Sampling, continuations, draw
from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM
from puzzle.teacher import freeze

PROMPTS = [[1], [1, 7, 9, 30], [1, 5], [1, 88, 4, 3, 60, 61, 62]]


@pytest.fixture(scope="module")
def model(tiny_llama: LlamaForCausalLM) -> PuzzleForCausalLM:
    model = PuzzleForCausalLM(PuzzleConfig.from_family(tiny_llama.config))
    model.load_state_dict(tiny_llama.state_dict())
    return freeze(model)


def numbers(rows: int, tokens: int) -> torch.Tensor:
    return torch.rand(rows, tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_greedy_continuations_are_those_of_transformers(tiny_llama: LlamaForCausalLM, model: PuzzleForCausalLM) -> None:
    found = continuations(model, PROMPTS, numbers(4, 12), Sampling(temperature=0.0), [])
    for prompt, own in zip(PROMPTS, found, strict=True):
        ids = tiny_llama.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=12,
            min_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
        )
        assert own == ids[0, len(prompt) :].tolist()


def test_a_row_does_not_depend_on_those_beside_it(model: PuzzleForCausalLM) -> None:
    of_all, sampling = numbers(4, 10), Sampling(1.3, 0.9)
    together = continuations(model, PROMPTS, of_all, sampling, [2])
    alone = [continuations(model, [one], of_all[row : row + 1], sampling, [2])[0] for row, one in enumerate(PROMPTS)]
    assert together == alone
    assert len({tuple(one) for one in together}) == 4


def test_it_ends_where_the_model_does(model: PuzzleForCausalLM) -> None:
    endless = continuations(model, PROMPTS, numbers(4, 10), Sampling(), [])
    ends = {endless[0][3], endless[2][6]}
    for own, whole in zip(continuations(model, PROMPTS, numbers(4, 10), Sampling(), ends), endless, strict=True):
        stop = next((place + 1 for place, token in enumerate(whole) if token in ends), len(whole))
        assert own == whole[:stop]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6), (2.0, 0.95), (1.0, 1e-9)])
def test_draws_have_the_distribution_that_was_asked_for(temperature: float, top_p: float) -> None:
    logits = torch.randn(7, generator=torch.Generator().manual_seed(1))
    probabilities = (logits.double() / temperature).softmax(-1)
    falling = probabilities.argsort(descending=True).tolist()
    kept, total = [], 0.0
    for token in falling:
        if total >= top_p:
            break
        kept.append(token)
        total += float(probabilities[token])
    expected = torch.zeros(7, dtype=torch.float64)
    expected[kept] = probabilities[kept] / total
    count = 20_000
    evenly = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens = draw(logits.expand(count, -1), evenly, Sampling(temperature, top_p))
    assert torch.allclose(tokens.bincount(minlength=7).double() / count, expected, atol=2 / count)
