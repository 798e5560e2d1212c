"""Exact scores against the plain way: build the whole student, run it from the first layer on, compare logits."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from puzzle import metrics
from puzzle.build import build_student
from puzzle.data.batches import Batch
from puzzle.evaluate import evaluate
from puzzle.modeling import PuzzleForCausalLM
from puzzle.scoring.context import ScoringContext
from puzzle.scoring.exact import Change, Scorer, Values, finals_of
from puzzle.space import PARTS
from puzzle.teacher import Compute, Teacher, final_hidden, load_model
from puzzle.types import AttentionSpec, FfnSpec, Item, Site, Spec
from puzzle.variants import has_weights, layer_item, run_item, site_item
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
def model(teacher_folder: Path) -> PuzzleForCausalLM:
    return load_model(teacher_folder, Compute(torch.device("cpu"), bf16=False))


def read_weights(teacher: Teacher, item: Item) -> dict[str, torch.Tensor]:
    if not has_weights(item):
        return {}
    layers = [teacher.layer(index) for index in range(4)]
    return start_of(layers, item).weights  # type: ignore[return-value]


@pytest.fixture(scope="module")
def context(teacher: Teacher) -> ScoringContext:
    return ScoringContext(teacher, functools.partial(read_weights, teacher))


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    """Of different sizes; of the second, only some tokens count."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 128, (rows, 20), generator=generator) for rows in (3, 2)]
    return [Batch(ids[0]), Batch(ids[1], torch.rand(2, 20, generator=generator) < 0.5)]


KEEP = AttentionSpec("keep")
NARROW = FfnSpec("narrow", intermediate_size=48)
GQA = AttentionSpec("gqa", num_kv_heads=1)


def changes_of() -> list[Change]:
    """Single items, pairs, runs of layers, whole architectures; in the order of the layers they begin at."""
    single = [
        site_item(Site(layer, "attention" if isinstance(spec, AttentionSpec) else "ffn"), spec)
        for layer in range(4)
        for spec in SPECS
    ]
    several = [layer_item(1, GQA, NARROW), layer_item(2, AttentionSpec("skip"), NARROW), run_item(0, 1), run_item(2, 3)]
    changes = [Change(item.id, (item,)) for item in (*single, *several)]
    far = (site_item(Site(3, "attention"), GQA), site_item(Site(0, "ffn"), NARROW), run_item(1, 1))
    changes.append(Change("architecture", far))
    return sorted(changes, key=lambda change: change.first_layer)


def measured(scorer: Scorer, changes: Sequence[Change]) -> dict[str, Values]:
    groups = itertools.groupby(changes, lambda change: change.first_layer)
    return {change.name: values for _, group in groups for change, values in scorer.scores(list(group))}


def keeps_beside(items: Sequence[Item]) -> list[Item]:
    taken = {site for item in items for site in item.sites}
    sites = [Site(layer, part) for layer in range(4) for part in PARTS]
    keep: dict[str, Spec] = {"attention": AttentionSpec("keep"), "ffn": FfnSpec("keep")}
    return [site_item(site, keep[site.part]) for site in sites if site not in taken]


def plain(teacher: PuzzleForCausalLM, student: PuzzleForCausalLM, batches: Sequence[Batch]) -> dict[str, list[float]]:
    """Every metric from whole logits, in fp64."""
    found: dict[str, list[float]] = {"kl": [], "ce_delta": [], "agreement": [], "hidden_distance": []}
    with torch.no_grad():
        for batch in batches:
            finals = [final_hidden(one, batch)[:, :-1].double() for one in (teacher, student)]
            log_p, log_q = (F.log_softmax(one(batch.ids).logits[:, :-1].double(), -1) for one in (teacher, student))
            labels = batch.ids[:, 1:, None]
            each = {
                "kl": (log_p.exp() * (log_p - log_q)).sum(-1),
                "ce_delta": (log_p - log_q).gather(-1, labels).squeeze(-1),
                "agreement": (log_p.argmax(-1) == log_q.argmax(-1)).double(),
                "hidden_distance": 1 - F.cosine_similarity(*finals, dim=-1),
            }
            counts = torch.ones_like(labels[..., 0]) if batch.counted is None else batch.counted[:, 1:]
            for metric, values in each.items():
                found[metric] += ((values * counts).sum(1) / counts.sum(1)).tolist()
    return found


def test_scores_are_those_of_the_whole_student(
    model: PuzzleForCausalLM, context: ScoringContext, batches: list[Batch]
) -> None:
    changes = changes_of()
    found = measured(Scorer(context, batches, finals_of(context, batches)), changes)
    assert list(found) == [change.name for change in changes]
    for change in changes:
        student = build_student(model, [*keeps_beside(change.items), *change.items], context.read_weights)
        for metric, values in plain(model, student, batches).items():
            assert found[change.name][metric].tolist() == pytest.approx(values, rel=1e-3, abs=1e-5), (change, metric)


@pytest.mark.parametrize(("together", "chunk", "held"), [(1, 9, True), (3, 1, False), (100, 2, True)])
def test_how_much_is_under_way_at_once_changes_no_bit(
    teacher_folder: Path, context: ScoringContext, batches: list[Batch], together: int, chunk: int, held: bool
) -> None:
    finals = finals_of(context, batches)
    expected = measured(Scorer(context, batches, finals), changes_of())
    other = ScoringContext(Teacher(teacher_folder, torch.device("cpu"), torch.float32, held), context.read_weights)
    found = measured(Scorer(other, batches, finals, together, chunk), changes_of())
    for name, values in expected.items():
        assert all(torch.equal(found[name][metric], column) for metric, column in values.items()), name


def test_a_context_is_what_changes_are_made_to(
    model: PuzzleForCausalLM, context: ScoringContext, batches: list[Batch]
) -> None:
    """The context's own values, a change beside it, and one in the place of what it has there: back to the teacher."""
    narrow, gqa = site_item(Site(1, "ffn"), NARROW), site_item(Site(2, "attention"), GQA)
    compressed = ScoringContext(context.teacher, context.read_weights, (narrow, gqa))
    scorer = Scorer(compressed, batches, finals_of(context, batches))
    own = build_student(model, [*keeps_beside([narrow, gqa]), narrow, gqa], context.read_weights)
    kl = plain(model, own, batches)["kl"]
    assert scorer.context_values()["kl"].tolist() == pytest.approx(kl, rel=1e-3, abs=1e-5)
    linear, kept = site_item(Site(1, "attention"), AttentionSpec("linear")), site_item(Site(2, "attention"), KEEP)
    beside, back = measured(scorer, [Change("beside", (linear,)), Change("back", (kept,))]).values()
    more = build_student(model, [*keeps_beside([narrow, gqa, linear]), narrow, gqa, linear], context.read_weights)
    assert beside["kl"].tolist() == pytest.approx(plain(model, more, batches)["kl"], rel=1e-3, abs=1e-5)
    less = build_student(model, [*keeps_beside([narrow]), narrow], context.read_weights)
    assert back["kl"].tolist() == pytest.approx(plain(model, less, batches)["kl"], rel=1e-3, abs=1e-5)


def test_the_teacher_in_its_own_place_costs_nothing(context: ScoringContext, batches: list[Batch]) -> None:
    values = Scorer(context, batches, finals_of(context, batches)).context_values()
    assert values["kl"].abs().max() < 1e-6
    assert values["hidden_distance"].abs().max() < 1e-6
    assert values["agreement"].min() == 1.0


def test_a_task_of_the_users_own(context: ScoringContext, batches: list[Batch]) -> None:
    def surprise_at_last(final: torch.Tensor, head: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(head(final[:, -2]), batch.ids[:, -1], reduction="none")

    scorer = Scorer(context, batches, finals_of(context, batches), tasks={"last": surprise_at_last})
    (found,) = measured(scorer, [Change("none", (run_item(0, 3),))]).values()
    norm, head, finals = context.teacher.top.model.norm, context.teacher.top.lm_head, finals_of(context, batches)
    expected = [
        surprise_at_last(norm(context.teacher.embed(one)), head, one) - surprise_at_last(finals.read(place), head, one)
        for place, one in enumerate(batches)
    ]
    torch.testing.assert_close(found["last"].float(), torch.cat(expected))


def test_the_chunked_kl_and_its_gradient_are_the_plain_ones(
    model: PuzzleForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        reference = final_hidden(model, Batch(torch.randint(3, 128, (3, 21))))
    noise = 0.1 * torch.randn_like(reference)
    gradients, losses = [], []
    for chunk in (7, 10_000):
        monkeypatch.setattr(metrics, "LOGIT_TOKENS", chunk)
        student = (reference + noise).requires_grad_()
        loss = metrics.kl_loss(student, reference, (model.lm_head, model.lm_head), torch.ones(3, 21))
        loss.backward()
        losses.append(loss.item())
        gradients.append(student.grad)
    student = (reference + noise).requires_grad_()
    log_q, log_p = F.log_softmax(model.lm_head(student), -1), F.log_softmax(model.lm_head(reference), -1)
    plain = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    plain.backward()
    assert losses == pytest.approx([plain.item()] * 2, rel=1e-5)
    for gradient in gradients:
        assert torch.allclose(gradient, student.grad, atol=1e-7)


def test_evaluating_the_teacher_against_itself(model: PuzzleForCausalLM) -> None:
    batches = [Batch(torch.randint(3, 128, (4, 20)))]
    quality = evaluate(model, model, batches, bytes_per_token=2.0)
    assert quality.kl_nats.mean == pytest.approx(0.0, abs=1e-7)
    assert quality.agreement.mean == 1.0
    loss = model(batches[0].ids, labels=batches[0].ids).loss.item()
    assert quality.ce_nats.mean == pytest.approx(loss, rel=1e-5)
    assert quality.bits_per_byte.mean == pytest.approx(loss / 0.6931471805599453 / 2.0, rel=1e-5)
