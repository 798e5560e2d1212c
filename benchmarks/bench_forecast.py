"""How far to trust a forecast of global distillation from its first tenth: bundled teacher, predicted against true.

    python benchmarks/bench_forecast.py curves [--seeds 0 1 2] [--most N]
    python benchmarks/bench_forecast.py judge

``curves`` distils three students of different kinds, untrained, on several seeds, and keeps the KL of every step; with
``--most`` it stops after so many new ones, and goes on the next time. ``judge`` compares: the forecast after a tenth of
the steps, and what it calls its error, against the mean of the last steps; beside it two simpler guesses, the last
value seen and a power law without more.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from demo_runs import Results
from torch import Tensor

from puzzle import kd, pipeline
from puzzle.build import build_student
from puzzle.forecast import Beginning, Prior, Schedule, forecast, forecast_step, num_last
from puzzle.modeling import PuzzleForCausalLM
from puzzle.run import Run
from puzzle.stages.common import compute_of, teacher_of, tokens_of
from puzzle.types import AttentionSpec, FfnSpec, Item, Site, Spec, mean_and_error
from puzzle.variants import site_item

RESULTS = Path(__file__).parent / "results"
STEPS, WARMUP_STEPS, BATCH_SIZE, SEQUENCE_TOKENS = 300, 8, 2, 128
SETTINGS = {"steps": STEPS, "batch_size": BATCH_SIZE, "sequence_tokens": SEQUENCE_TOKENS}
LEAST_SD = 0.03  # of an exponent: fewer students than ten cannot vouch for less
CONFIG = "run: {folder}\nconstraints: half-memory\n"
KINDS: dict[str, Callable[[Site, int], Spec]] = {  # the spec at a site, given the FFN's width
    "half of the FFN": lambda site, width: (
        AttentionSpec("keep") if site.part == "attention" else FfnSpec("narrow", width // 2)
    ),
    "three attentions less": lambda site, _: (
        FfnSpec("keep") if site.part == "ffn" else AttentionSpec("skip" if site.layer in (2, 4, 6) else "keep")
    ),
    "three layers less": lambda site, _: (
        AttentionSpec("skip" if site.layer in (3, 4, 5) else "keep")
        if site.part == "attention"
        else FfnSpec("skip" if site.layer in (3, 4, 5) else "keep")
    ),
}


def student_of(teacher: PuzzleForCausalLM, kind: str) -> PuzzleForCausalLM:
    """Narrow FFNs keep the channels with the largest norms in the last matrix."""
    config = teacher.config
    sites = [Site(layer, part) for layer in range(config.num_hidden_layers) for part in ("attention", "ffn")]  # type: ignore[arg-type]
    items = [site_item(site, KINDS[kind](site, config.intermediate_size)) for site in sites]

    def weights(item: Item) -> Mapping[str, Tensor]:
        layer = teacher.model.layers[item.sites[0].layer]
        state = {
            name: tensor for name, tensor in layer.state_dict().items() if name.startswith(("mlp", "post_attention"))
        }
        kept = state["mlp.down_proj.weight"].norm(dim=0).topk(item.specs[0].intermediate_size).indices.sort().values
        cut = {"mlp.down_proj.weight": lambda of: of[:, kept]}
        return {
            name: cut.get(name, lambda of: of[kept])(tensor) if name.startswith("mlp") else tensor
            for name, tensor in state.items()
        }

    return build_student(teacher, items, weights)


def curve(run: Run, kind: str) -> dict[str, Any]:
    settings, tokens = run.config.kd, tokens_of(run)
    job = kd.Distillation(student_of(teacher_of(run), kind), teacher_of(run), settings, compute_of(run))
    batches = functools.partial(tokens.batch, run.config.seed, batch_size=settings.batch_size)
    losses: list[float] = []
    job.run(batches, STEPS, STEPS, losses.append)
    return {"kl": " ".join(f"{loss:.5f}" for loss in losses)}


def curves(options: argparse.Namespace, results: Results) -> None:
    new = 0
    for seed in options.seeds:
        config = options.work / "forecast.yaml"
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(CONFIG.format(folder=options.work / "forecast"))
        asked = [
            "kd.cosine_weight=0",
            f"kd.batch_size={BATCH_SIZE}",
            f"data.sequence_tokens={SEQUENCE_TOKENS}",
            f"kd.warmup_steps={WARMUP_STEPS}",
            f"seed={seed}",
        ]
        run = Run.open(config, asked)
        pipeline.run_stage(run, "data")
        for kind in KINDS:
            name = f"{kind}/{seed}"
            if name not in results.figures and new < options.most:
                results.once(name, lambda run=run, kind=kind: curve(run, kind))
                new += 1


def schedule() -> Schedule:
    return Schedule(STEPS, WARMUP_STEPS, 0.1)


def prior_of(curves: Sequence[Sequence[float]]) -> Prior:
    """What these students teach about others."""
    exponents, lags, errors = [], [], []
    for losses in curves:
        begun = Beginning.of(losses[: forecast_step(schedule())], schedule())
        exponents.append((begun.mean - math.log(end_of(losses)[0])) / begun.reach)
        lags.append(exponents[-1] + begun.slope)
        errors.append(begun.slope_variance)
    lag_variance = statistics.variance(lags) - statistics.fmean(errors)  # without that of the slopes themselves
    spreads = max(statistics.stdev(exponents), LEAST_SD), math.sqrt(max(lag_variance, LEAST_SD**2))
    return Prior(statistics.fmean(exponents), spreads[0], statistics.fmean(lags), spreads[1])


def end_of(losses: Sequence[float]) -> tuple[float, float]:
    """The mean of the last steps, and its standard error."""
    return mean_and_error(losses[-num_last(schedule()) :])


def judge(results: Results) -> None:
    """Every student by a prior from students of the other kinds."""
    curves = {name: [float(kl) for kl in found["kl"].split()] for name, found in results.figures.items()}
    first = forecast_step(schedule())
    print(f"{'student':<28}{'true':>8}{'forecast':>20}{'last value':>12}{'plain law':>12}{'z':>7}")
    off: dict[str, list[float]] = {"forecast": [], "last value": [], "plain law": []}
    scores = []
    for name, losses in curves.items():
        others = [own for other, own in curves.items() if other.split("/")[0] != name.split("/")[0]]
        found, (true, error) = forecast(losses[:first], schedule(), prior_of(others)), end_of(losses)
        begun = Beginning.of(losses[:first], schedule())
        guesses = {
            "forecast": found.mean,
            "last value": statistics.fmean(losses[first - 10 : first]),
            "plain law": math.exp(begun.mean + begun.slope * begun.reach),
        }
        scores.append((found.mean - true) / math.hypot(found.standard_error, error))
        for guess, value in guesses.items():
            off[guess].append(abs(math.log(value / true)))
        print(
            f"{name:<28}{true:>8.4f}{f'{found.mean:.4f} ± {found.standard_error:.4f}':>20}"
            f"{guesses['last value']:>12.4f}{guesses['plain law']:>12.4f}{scores[-1]:>7.2f}"
        )
    print({guess: f"{statistics.fmean(values):.1%} off" for guess, values in off.items()})
    rms = math.sqrt(statistics.fmean(score**2 for score in scores))
    print(f"errors over what they are said to be: root mean square {rms:.2f}, largest {max(map(abs, scores)):.2f}")
    print("of all students together:", prior_of(list(curves.values())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["curves", "judge"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--most", type=int, default=1000)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bench-forecast")
    parser.add_argument("--output", type=Path, default=RESULTS / "forecast.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "judge":
        judge(Results(options.output, SETTINGS))
        return
    results = Results(options.output, SETTINGS)
    curves(options, results)


if __name__ == "__main__":
    main()
