"""Is block-wise distillation worth its price? With and without it, at three severities; and its modes compared.

On the bundled teacher; KL of the MIP's student on ``report``, before and after equal GKD.

    python benchmarks/bench_library.py severity    BLD against none, from the paper's starts and ours, at 85, 65, 45 %
                                                   of the layer bytes, 3 seeds (REFERENCE.md, claim 6)
    python benchmarks/bench_library.py modes       decoupled, nested, and coupled in full (every pair of every layer) on
                                                   a smaller space: quality, and what each costs (claim 8)
    python benchmarks/bench_library.py starts      mean local loss and KL per kind of variant, and the student's KL,
                                                   from the paper's starts and ours after 0 to 3M tokens of BLD, on
                                                   a smaller space (five kinds of variants to train)
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from demo_runs import Results, make_library, measure, solved

from puzzle import artifacts
from puzzle.run import Run
from puzzle.variants import variant_name

RESULTS = Path(__file__).parent / "results"
SHARES = (0.85, 0.65, 0.45)
STARTS = ("paper", "best")
TOKENS = (0, 50_000, 200_000, 800_000, 3_000_000)
MODES_SPACE = """\
attention: [keep, gqa-4, gqa-2, linear, skip]
ffn: [keep, narrow-75%, narrow-50%, narrow-25%, skip]
ffn_multiple_of: 32
"""
STARTS_SPACE = """\
attention: [keep, gqa-2, linear, skip]
ffn: [keep, narrow-50%, narrow-25%, linear, skip]
ffn_multiple_of: 32
"""


def severity(options: argparse.Namespace) -> None:
    """Processes with different ``--seeds`` or ``--starts`` may share the work: they write into one file."""
    results = Results(
        options.output or RESULTS / "bld_severity.json",
        {"bld_tokens": options.bld_tokens, "kd_tokens": options.kd_tokens},
    )
    for seed in options.seeds:
        for start in options.starts:
            for tokens in (0, options.bld_tokens):
                names = [f"{start}/{tokens}/{share}/{seed}" for share in SHARES]
                if all(name in results.figures for name in names):
                    continue
                run = make_library(
                    options.work,
                    f"seed={seed}",
                    f"init.start={start}",
                    f"distill.tokens={tokens}",
                    f"kd.tokens={options.kd_tokens}",
                )
                for share, name in zip(SHARES, names, strict=True):
                    results.once(name, lambda run=run, share=share: measure(run, solved(run, share), share))
    for start in options.starts:
        for share in SHARES:
            for when in ("before", "after"):
                without, with_bld = (
                    _values(results, f"{start}/{tokens}/{share}", when, options.seeds)
                    for tokens in (0, options.bld_tokens)
                )
                gains = [first - second for first, second in zip(without, with_bld, strict=True)]
                cells = f"without {_mean(without)}  with {_mean(with_bld)}  gain {_mean(gains)}"
                print(f"{start:<6} {share:.0%} {when:<7} {cells}")


def modes(options: argparse.Namespace) -> None:
    """One seed's libraries on one small space; coupled has 25 pairs a layer where decoupled has 5 + 5 variants."""
    options.work.mkdir(parents=True, exist_ok=True)
    spaces = {"single": MODES_SPACE, "pairs": MODES_SPACE + "pairs: true\n"}
    for name, text in spaces.items():
        (options.work / f"{name}.yaml").write_text(text)
    arms = {
        "decoupled": (f"space={options.work / 'single.yaml'}",),
        "nested": (f"space={options.work / 'single.yaml'}", "distill.nested=true"),
        "coupled": (f"space={options.work / 'pairs.yaml'}",),
    }
    results = Results(
        options.output or RESULTS / "bld_modes.json", {"bld_tokens": options.bld_tokens, "kd_tokens": options.kd_tokens}
    )
    for seed in options.seeds:
        for arm, settings in arms.items():
            names = {share: f"{arm}/{share}/{seed}" for share in SHARES}
            if f"{arm}/cost/{seed}" in results.figures and all(name in results.figures for name in names.values()):
                continue
            run = make_library(
                options.work,
                f"seed={seed}",
                f"distill.tokens={options.bld_tokens}",
                f"kd.tokens={options.kd_tokens}",
                *settings,
            )
            results.once(f"{arm}/cost/{seed}", lambda run=run: cost(run))
            for share, name in names.items():
                results.once(name, lambda run=run, share=share: measure(run, solved(run, share), share))
    for arm in arms:
        for share in SHARES:
            cells = [
                f"{when} {_mean(_values(results, f'{arm}/{share}', when, options.seeds))}"
                for when in ("before", "after")
            ]
            print(f"{arm:<10} {share:.0%}  {'  '.join(cells)}  {results.figures[f'{arm}/cost/{options.seeds[0]}']}")


def cost(run: Run) -> dict[str, float]:
    """What the library took: units, parameters stored, and the seconds of distilling and scoring."""
    events = artifacts.read_events(run.events)
    spent = {event["stage"]: event["seconds"] for event in events if event["event"] == "finished"}
    return {
        "units": len(run.units),
        "params": sum(run.unit_params(unit) for unit in run.units),
        "distill_s": spent["distill"],
        "score_s": spent["score"],
    }


def starts(options: argparse.Namespace) -> None:
    """Two processes, each with one of ``--starts``, may share the work: they write into one file."""
    options.work.mkdir(parents=True, exist_ok=True)
    space = options.work / "starts.yaml"
    space.write_text(STARTS_SPACE)
    results = Results(
        options.output or RESULTS / "starts.json",
        {"share": options.share, "kd_tokens": options.kd_tokens, "space": STARTS_SPACE},
    )
    for tokens in options.tokens:
        for start in options.starts:
            names = [f"{start}/{tokens}/library", f"{start}/{tokens}/student"]
            if all(name in results.figures for name in names):
                continue
            run = make_library(
                options.work,
                "seed=0",
                f"space={space}",
                f"init.start={start}",
                f"distill.tokens={tokens}",
                f"kd.tokens={options.kd_tokens}",
            )
            results.once(names[0], lambda run=run: by_variant(run))
            results.once(names[1], lambda run=run: measure(run, solved(run, options.share), options.share))
    kinds = list(results.figures[f"{options.starts[0]}/{options.tokens[0]}/library"])
    for tokens in options.tokens:
        for start in options.starts:
            library, student = (results.figures[f"{start}/{tokens}/{what}"] for what in ("library", "student"))
            cells = "  ".join(f"{kind} {library[kind]['kl']:.4f}" for kind in kinds)
            print(
                f"{tokens:>9} {start:<6} {cells}  student {student['before']['kl']:.4f} -> {student['after']['kl']:.4f}"
            )


def by_variant(run: Run) -> dict[str, dict[str, float]]:
    """Means over layers, by part and variant: local loss on held-out tokens, KL where it alone replaces the block."""
    scores = run.read_scores()
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for unit, items in run.units.items():
        losses = artifacts.read_unit(run.trained(unit)).payload["after"]
        for item in items:
            kind = f"{item.sites[0].part}.{variant_name(item.specs[0])}"
            found[kind]["loss"].append(losses[item.id])
            found[kind]["kl"].append(scores.score(item.id, "kl").mean)
    return {kind: {figure: statistics.mean(values) for figure, values in of.items()} for kind, of in found.items()}


def _values(results: Results, arm: str, when: str, seeds: Sequence[int]) -> list[float]:
    return [results.figures[f"{arm}/{seed}"][when]["kl"] for seed in seeds]


def _mean(values: Sequence[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.4f} ± {spread:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["severity", "modes", "starts"])
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--starts", choices=STARTS, nargs="+", default=STARTS, help="which starting points")
    parser.add_argument("--share", type=float, default=0.65)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="of BLD, for starts")
    parser.add_argument("--bld-tokens", type=int, default=131072)
    parser.add_argument("--kd-tokens", type=int, default=262144)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bench-library")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    commands: dict[str, Any] = {"severity": severity, "modes": modes, "starts": starts}
    commands[options.what](options)


if __name__ == "__main__":
    main()
