"""What scores are worth: the architectures they pick, and when sums lie. On BLD-trained libraries of the demo teacher.

    python benchmarks/bench_score_quality.py cheap | draws | objectives | additivity | context

``cheap``: exact, anchored and one-pass scores: rank, scale, and the true KL of what a search picks at three budgets,
against what they cost. ``draws``: the error that labels make in one-pass scores, measured, against what it is taken for
before (sampling.num_draws), and what more draws bring. ``objectives``: KL, CE and the distance of hidden states as the
score (REFERENCE.md, claim 5). ``additivity``: sums of scores, of scores of both parts of a layer together, and models
of the difference, against the truth; trained and untrained variants. ``context``: search, score changes to what was
found, search again, twice.

Costs are in forwards of the whole teacher over one sequence; figures are on ``report``, which nothing was chosen on.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from anchored import local_errors
from bench_scores import scored
from demo_runs import Results, make_library, problem_of

from puzzle.blocks.stream import Stream
from puzzle.run import Run
from puzzle.scoring.context import ScoringContext
from puzzle.scoring.design import singles
from puzzle.scoring.draws import draw
from puzzle.scoring.exact import Change, Scorer, Values, finals_of
from puzzle.scoring.interactions import KINDS, Evaluation, best_of, cross_validated, spearman
from puzzle.scoring.one_pass import one_pass_scores
from puzzle.scoring.sampling import RELATIVE_ERROR
from puzzle.search import mip
from puzzle.search.problem import Problem
from puzzle.stages.common import item_weights, sequences_of, streamed_teacher
from puzzle.tables import ScoreTable
from puzzle.types import Item, Score
from puzzle.variants import is_teacher, params

RESULTS = Path(__file__).parent / "results"
SHARES = (0.85, 0.65, 0.45)
DRAWS, SEQUENCES, FEW = 4, 32, 8
MANY_DRAWS, FIRST_DRAWS, DRAW_SEQUENCES = 16, 4, 16
CLOSE = math.log(1.3)
OBJECTIVES = ("kl", "ce_delta", "hidden_distance")


@dataclass(frozen=True)
class Library:
    """One run's library, and its exact scores by item and metric: (sequences,)."""

    run: Run
    context: ScoringContext
    items: tuple[Item, ...]
    exact: Mapping[str, Values]

    @classmethod
    def of(cls, options: argparse.Namespace, seed: int, tokens: int | None = None) -> Library:
        run = make_library(
            options.work,
            f"seed={seed}",
            "init.start=best",
            f"distill.tokens={options.bld_tokens if tokens is None else tokens}",
            "kd.tokens=262144",
            until="distill",
        )
        teacher = streamed_teacher(run, torch.float32, held=True)
        context = ScoringContext(teacher, functools.cache(functools.partial(item_weights, run)))
        items = tuple(item for item in run.items if not is_teacher(item))
        return cls(run, context, items, scored(scorer_of(run, context, "score", SEQUENCES), items))

    def mean(self, metric: str, sequences: int = SEQUENCES) -> dict[str, float]:
        return {name: float(values[metric][:sequences].mean()) for name, values in self.exact.items()}

    def truth(self, architectures: Sequence[Sequence[str]], split: str, sequences: int) -> list[Values]:
        """Of whole architectures, per sequence."""
        by_id = {item.id: item for item in self.items}
        changes = [
            Change(str(place), tuple(by_id[name] for name in chosen if name in by_id))
            for place, chosen in enumerate(architectures)
        ]
        scorer = scorer_of(self.run, self.context, split, sequences)
        groups = itertools.groupby(sorted(changes, key=lambda one: one.first_layer), lambda one: one.first_layer)
        found = {change.name: values for _, group in groups for change, values in scorer.scores(list(group))}
        return [found[change.name] for change in changes]

    def problem(self, scores: Mapping[str, float], share: float) -> Problem:
        """The search at ``share`` of the layers' parameters by these scores."""
        records = [Score(name, "teacher", "teacher", "kl", "score", (score,), 256) for name, score in scores.items()]
        return problem_of(self.run, share, ScoreTable.of(records))

    def pick(self, scores: Mapping[str, float], share: float) -> tuple[str, ...]:
        return mip.solve([self.problem(scores, share)], {}).solutions[0].items


def scorer_of(run: Run, context: ScoringContext, split: str, sequences: int) -> Scorer:
    batches = sequences_of(run, split, sequences)
    return Scorer(context, batches, finals_of(context, batches), 16)


def anchored_scores(library: Library, sequences: int) -> dict[str, float]:
    """KL(skip) times the local error."""
    context, batches = library.context, sequences_of(library.run, "score", sequences)
    stream, errors = Stream.of(context.teacher, batches, torch.float32), {}
    for index in range(context.teacher.num_layers):
        here = [item for item in library.items if item.sites[0].layer == index]
        errors |= local_errors(context, here, stream.passes(context.layer(index)))
        stream.advance(context.layer(index))
    anchor = {item.id: library.exact[f"{item.sites[0]}.skip"]["kl"][:sequences] for item in library.items}
    return {item.id: float((anchor[item.id] * errors[item.id]).mean()) for item in library.items}


def one_pass(library: Library, sequences: int, draws: int) -> dict[str, float]:
    by_layer = [[one for one in library.items if one.sites[0].layer == layer] for layer in range(8)]
    found = one_pass_scores(library.context, by_layer, sequences_of(library.run, "score", sequences), draws, 0)
    return {name: float(values.mean()) for name, values in found.items()}


def rescored(library: Library, cheap: Mapping[str, float], share: float) -> tuple[dict[str, float], set[str]]:
    """Cheap scores, and exact ones of what the three best architectures are made of, until that changes nothing."""
    scores, exact, measured = dict(cheap), library.mean("kl"), set[str]()
    while True:
        solutions = mip.solve([library.problem(scores, share)], {}, 3).solutions
        wanted = {name for one in solutions for name in one.items if name in exact} - measured
        if not wanted:
            return scores, measured
        measured |= wanted
        scores |= {name: exact[name] for name in wanted}


def forwards(library: Library, items: Sequence[Item]) -> float:
    """Of the teacher that exact scores of ``items`` take, on one sequence."""
    layers = library.run.shape.num_layers
    return sum((layers - item.sites[0].layer) / layers for item in items)


def cheap(options: argparse.Namespace) -> None:
    results = Results(options.output or RESULTS / "scores_cheap.json", {"bld_tokens": options.bld_tokens})
    for seed in range(options.seeds):
        if f"{seed}/picks" not in results.figures:
            one_library(results, Library.of(options, seed), seed)
    for method in results.figures["0/agreement"]:
        rows = [results.figures[f"{seed}/agreement"][method] for seed in range(options.seeds)]
        means = {key: round(statistics.fmean(row[key] for row in rows), 4) for key in rows[0]}
        print(f"{method:<20}", means)
    for method, share in itertools.product(results.figures["0/agreement"], SHARES):
        rows = [results.figures[f"{seed}/picks"][f"{method}/{share}"] for seed in range(options.seeds)]
        print(f"{method:<20} {share}", _cells(rows))


def _cells(rows: Sequence[Mapping[str, float]]) -> list[str]:
    return [f"{row['kl']:.4f} ({row['excess']:+.4f} ± {row['excess_se']:.4f})" for row in rows]


def one_library(results: Results, library: Library, seed: int) -> None:
    everything = forwards(library, library.items)
    anchors = forwards(library, [item for item in library.items if item.specs[0].kind == "skip"])
    own = len(library.items) / 2 / library.run.shape.num_layers
    methods = {
        "exact": (library.mean("kl"), SEQUENCES * everything),
        f"exact, {FEW} sequences": (library.mean("kl", FEW), FEW * everything),
        "exact, 2 sequences": (library.mean("kl", 2), 2 * everything),
        "anchored": (anchored_scores(library, SEQUENCES), SEQUENCES * (anchors + own)),
        f"anchored, {FEW} sequences": (anchored_scores(library, FEW), FEW * (anchors + own)),
        "one-pass": (one_pass(library, SEQUENCES, DRAWS), SEQUENCES * (2 + DRAWS + own)),
        "one-pass, 1 draw": (one_pass(library, SEQUENCES, 1), SEQUENCES * (2 + 1 + own)),
        f"one-pass, {FEW} sequences": (one_pass(library, FEW, DRAWS), FEW * (2 + DRAWS + own)),
    }
    exact = library.mean("kl")
    found = {name: {**agreement(exact, scores, library), "forwards": cost} for name, (scores, cost) in methods.items()}
    arms = itertools.product(methods, SHARES)
    picks = {f"{name}/{share}": library.pick(methods[name][0], share) for name, share in arms}
    by_id = {item.id: item for item in library.items}
    for name in ("anchored", "one-pass", f"one-pass, {FEW} sequences"):
        more = []
        for share in SHARES:
            scores, measured = rescored(library, methods[name][0], share)
            picks[f"{name}, rescored/{share}"] = library.pick(scores, share)
            more.append(SEQUENCES * forwards(library, [by_id[item_id] for item_id in measured]))
        found[f"{name}, rescored"] = {"forwards": methods[name][1] + statistics.fmean(more)}
    different = list(dict.fromkeys(picks.values()))
    truth = dict(zip(different, library.truth(different, "report", 128), strict=True))
    of_exact = {share: picks[f"exact/{share}"] for share in SHARES}
    results.once(f"{seed}/agreement", lambda: found)
    figures = {name: against(truth, chosen, of_exact[float(name.rpartition("/")[2])]) for name, chosen in picks.items()}
    results.once(f"{seed}/picks", lambda: figures)


def against(
    truth: Mapping[tuple[str, ...], Values], chosen: tuple[str, ...], other: tuple[str, ...]
) -> dict[str, float]:
    """The true KL of a pick, and its excess over another's, paired over sequences."""
    difference = truth[chosen]["kl"] - truth[other]["kl"]
    return {
        "kl": float(truth[chosen]["kl"].mean()),
        "ce_gap": float(truth[chosen]["ce_delta"].mean()),
        "excess": float(difference.mean()),
        "excess_se": float(difference.std() / math.sqrt(len(difference))),
    }


def agreement(exact: Mapping[str, float], scores: Mapping[str, float], library: Library) -> dict[str, float]:
    """Rank correlation, close pairs of different sites ranked rightly, ratio to the exact score and its spread."""
    items = [item for item in library.items if item.specs[0].kind != "skip"]
    log_ratio = [math.log(scores[item.id] / exact[item.id]) for item in items]
    right = [
        (scores[a.id] > scores[b.id]) == (exact[a.id] > exact[b.id])
        for a, b in itertools.combinations(items, 2)
        if a.sites != b.sites and abs(math.log(exact[a.id] / exact[b.id])) < CLOSE
    ]
    first, second = (torch.tensor([of[item.id] for item in items]).double().numpy() for of in (scores, exact))
    return {
        "spearman": spearman(first, second),
        "close_pairs_right": statistics.fmean(right),
        "ratio": math.exp(statistics.fmean(log_ratio)),
        "spread": statistics.pstdev(log_ratio),
    }


def draws(options: argparse.Namespace) -> None:
    results = Results(options.output or RESULTS / "scores_draws.json", {"bld_tokens": options.bld_tokens})
    if not results.figures:
        library = Library.of(options, 0)
        columns = {item.id: [] for item in library.items}
        for seed in range(MANY_DRAWS):
            by_layer = [[one for one in library.items if one.sites[0].layer == layer] for layer in range(8)]
            batches = sequences_of(library.run, "score", DRAW_SEQUENCES)
            for name, kl in one_pass_scores(library.context, by_layer, batches, 1, seed).items():
                columns[name].append(kl)
        found = {name: torch.stack(of) for name, of in columns.items()}  # (draws, sequences)
        results.once("errors", lambda: of_draws(found))
        exact = library.mean("kl", DRAW_SEQUENCES)
        for count in (1, 2, 4, 8, MANY_DRAWS):
            parts = range(0, MANY_DRAWS, count)
            each = [
                agreement(exact, {name: float(of[part : part + count].mean()) for name, of in found.items()}, library)
                for part in parts
            ]
            means = {key: statistics.fmean(one[key] for one in each) for key in each[0]}
            results.once(f"{count} draws", lambda means=means: means)
    for name, row in results.figures.items():
        print(f"{name:<10}", {key: round(value, 4) for key, value in row.items()})


def of_draws(found: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Over items: a draw's variance over a squared normal's, the error of a score, and draws that bring it to 10 %."""
    kurtosis, error, wanted, few = [], [], [], []
    for values in found.values():
        variance, mean = values.var(0), values.mean(0)
        kurtosis.append(float(variance.sum() / (2 * (mean**2 - variance / len(values)).sum())))
        error.append(float(variance.sum().sqrt() / mean.sum()))  # of one draw on each sequence
        wanted.append(error[-1] ** 2 / RELATIVE_ERROR**2)
        starts = range(0, len(values), FIRST_DRAWS)
        parts = [values[start : start + FIRST_DRAWS] for start in starts]
        few += [float(of.var(0).sum() / of.mean(0).sum() ** 2) / RELATIVE_ERROR**2 for of in parts]
    assumed = math.sqrt(2 / DRAW_SEQUENCES)
    ways = {"variance_over_normal": kurtosis, "error_of_a_draw": error, "draws_wanted": wanted, "by_the_first": few}
    quantiles = {
        f"{way}_{place}": torch.tensor(of).quantile(place / 100).item()
        for way, of in ways.items()
        for place in (10, 50, 90)
    }
    return {"assumed_error": assumed, "assumed_draws": (assumed / RELATIVE_ERROR) ** 2, **quantiles}


def objectives(options: argparse.Namespace) -> None:
    results = Results(options.output or RESULTS / "scores_objectives.json", {"bld_tokens": options.bld_tokens})
    counts = (4, FEW, SEQUENCES)
    for seed in range(options.seeds):
        if str(seed) in results.figures:
            continue
        library = Library.of(options, seed)
        arms = list(itertools.product(OBJECTIVES, counts, SHARES))
        picks = {arm: library.pick(library.mean(arm[0], arm[1]), arm[2]) for arm in arms}
        different = list(dict.fromkeys(picks.values()))
        truth = dict(zip(different, library.truth(different, "report", 128), strict=True))
        found = {
            f"{metric}/{count}/{share}": against(truth, picks[metric, count, share], picks["kl", count, share])
            for metric, count, share in arms
        }
        results.once(str(seed), lambda found=found: found)
    for metric, count, share in itertools.product(OBJECTIVES, counts, SHARES):
        rows = [results.figures[str(seed)][f"{metric}/{count}/{share}"] for seed in range(options.seeds)]
        ce_gap = statistics.fmean(row["ce_gap"] for row in rows)
        print(f"{metric:<16} {count:>3} sequences {share:.0%}", _cells(rows), f"CE gap {ce_gap:.4f}")


def additivity(options: argparse.Namespace) -> None:
    results = Results(options.output or RESULTS / "scores_additivity.json", {"architectures": options.architectures})
    for tokens in (options.bld_tokens, 0):
        if str(tokens) not in results.figures:
            library = Library.of(options, 0, tokens)
            results.once(str(tokens), lambda library=library: of_sums(library, options.architectures))
    for tokens, found in results.figures.items():
        for name, row in found.items():
            print(f"{tokens:>7} {name:<44}", {key: round(value, 4) for key, value in row.items()})


def of_sums(library: Library, count: int) -> dict[str, dict[str, float]]:
    """Cross-validated figures of every model, on single scores and on scores of both parts of a layer together."""
    sizes = {item.id: sum(params(spec, library.run.shape) for spec in item.specs) for item in library.run.items}
    scores = {item.id: 0.0 for item in library.run.items} | library.mean("kl")
    drawn = draw(library.run.items, scores, sizes, count)
    truth = [values["kl"] for values in library.truth([one.items for one in drawn], "score", SEQUENCES)]
    layers = [by_layer(library, one.items) for one in drawn]
    wanted = sorted({pair for of in layers for pair in of}, key=lambda pair: pair[0].sites[0].layer)
    changes = [Change(name_of(pair), pair) for pair in wanted]
    scorer = scorer_of(library.run, library.context, "score", SEQUENCES)
    groups = itertools.groupby(changes, lambda change: change.first_layer)
    pairs = {change.name: float(v["kl"].mean()) for _, group in groups for change, v in scorer.scores(list(group))}
    as_items = [
        Item(name_of(pair), tuple(one.sites[0] for one in pair), tuple(one.specs[0] for one in pair)) for pair in wanted
    ]
    changed = [tuple(name for name in one.items if name in library.exact) for one in drawn]
    ways = {
        "singles": (singles(library.items, library.mean("kl")), changed),
        "pairs": (singles(as_items, pairs), [tuple(map(name_of, of)) for of in layers]),
    }
    found: dict[str, dict[str, float]] = {}
    regimes = {"all": lambda _: True, "mild": lambda one: one.size == "mild", "hard": lambda one: one.size == "hard"}
    for (way, (parts, names)), (regime, chosen) in itertools.product(ways.items(), regimes.items()):
        known = [
            Evaluation(items, float(kl.mean()), float(kl.std() / math.sqrt(len(kl))))
            for one, items, kl in zip(drawn, names, truth, strict=True)
            if chosen(one) and len(items) > 1
        ]
        fits = [cross_validated(kind, known, parts) for kind in KINDS]
        for fit in fits:
            row = {key: getattr(fit, key) for key in ("spread", "bias", "spearman", "coverage", "measuring_error")}
            mark = " (best)" if fit is best_of(fits) else ""
            found[f"{regime}/{way}/{fit.model.kind}{mark}"] = {"architectures": len(known), **row}
    return found


def context(options: argparse.Namespace) -> None:
    settings = {"bld_tokens": options.bld_tokens, "sequences": options.context_sequences}
    results = Results(options.output or RESULTS / "scores_context.json", settings)
    for seed in range(options.seeds):
        if all(f"{seed}/{share}" in results.figures for share in SHARES):
            continue
        library = Library.of(options, seed)
        for share in SHARES:
            found = functools.partial(rounds, library, share, options.context_sequences)
            results.once(f"{seed}/{share}", found)
    for name, found in results.figures.items():
        print(name, _cells(found.values()), [f"predicted {row['predicted']:.4f}" for row in found.values()])


def rounds(library: Library, share: float, sequences: int) -> dict[str, dict[str, float]]:
    """What each search finds: the first with scores of changes to the teacher, the others to what was found before."""
    scores, paid = library.mean("kl", sequences), 0.0
    picks, predicted = [], []
    for left in reversed(range(3)):
        problem = library.problem(scores, share)
        picks.append(mip.solve([problem], {}).solutions[0].items)
        predicted.append(paid + float(problem.objective_of(picks[-1])))
        if left:
            scores, paid = on_top(library, picks[-1], sequences)
    truth = dict(zip(dict.fromkeys(picks), library.truth(list(dict.fromkeys(picks)), "report", 128), strict=True))
    return {
        str(place): {**against(truth, chosen, picks[0]), "predicted": predicted[place]}
        for place, chosen in enumerate(picks)
    }


def on_top(library: Library, chosen: Sequence[str], sequences: int) -> tuple[dict[str, float], float]:
    """By item, what putting it into the architecture changes; and what the architecture itself costs."""
    in_place = tuple(item for item in library.items if item.id in set(chosen))
    context = ScoringContext(library.context.teacher, library.context.read_weights, in_place)
    batches = sequences_of(library.run, "score", sequences)
    scorer = Scorer(context, batches, finals_of(library.context, batches), 16)
    own = float(scorer.context_values()["kl"].mean())
    touched = {item.sites for item in in_place}
    others = [
        item for item in library.run.items if item not in in_place and (item.sites in touched or not is_teacher(item))
    ]
    found = {name: float(values["kl"].mean()) - own for name, values in scored(scorer, others).items()}
    return found | {item.id: 0.0 for item in in_place}, own


def by_layer(library: Library, chosen: Sequence[str]) -> list[tuple[Item, ...]]:
    """What an architecture changes, layer by layer."""
    changed = [item for item in library.items if item.id in set(chosen)]
    return [tuple(group) for _, group in itertools.groupby(changed, lambda item: item.sites[0].layer)]


def name_of(pair: Sequence[Item]) -> str:
    return " ".join(item.id for item in pair)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cheap", "draws", "objectives", "additivity", "context"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bld-tokens", type=int, default=131072)
    parser.add_argument("--context-sequences", type=int, default=16, help="of the split that scores are taken on")
    parser.add_argument("--architectures", type=int, default=120)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bench-library")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    commands: dict[str, Any] = {
        "cheap": cheap, "draws": draws, "objectives": objectives, "additivity": additivity, "context": context,
    }  # fmt: skip
    commands[options.what](options)


if __name__ == "__main__":
    main()
