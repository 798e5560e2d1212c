"""Throws texts at the constraint parser for as long as asked, until one is neither a valid file nor a clear error.

    python benchmarks/fuzz_constraints.py --minutes 60

What is tried and what must hold is in tests/search/fuzzing.py; a short, fixed part of it is in the test suite. Valid
files are searched under, too. Writes benchmarks/results/fuzz_constraints.json; a failure is printed with its text.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "search")]

from environment import environment  # noqa: E402
from fuzzing import check, texts  # noqa: E402
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402

EXAMPLES_PER_ROUND = 500  # each with a seed of its own
SLOW_SECONDS = 5.0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the first round; every round takes the next")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "fuzz_constraints.json")
    options = parser.parse_args()
    warnings.simplefilter("error")
    logging.getLogger("puzzle").setLevel(logging.ERROR)
    until, counts, slowest = time.monotonic() + 60 * options.minutes, Counter[str](), 0.0
    round_seed = options.seed
    while time.monotonic() < until:

        @seed(round_seed)
        @settings(
            max_examples=EXAMPLES_PER_ROUND,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        )
        @given(texts)
        def one_round(text: str) -> None:
            nonlocal slowest
            if time.monotonic() > until:
                return
            started = time.process_time()  # others may load this machine
            valid = check(text, solve=True)
            took = time.process_time() - started
            slowest = max(slowest, took)
            assert took < SLOW_SECONDS, f"took {took:.1f} s"
            counts["valid" if valid else "refused"] += 1

        one_round()
        round_seed += 1
    result = {
        "minutes": options.minutes,
        "seeds": [options.seed, round_seed - 1],
        "texts": counts.total(),
        **counts,
        "slowest_seconds": round(slowest, 2),
        "failures": 0,
        "environment": environment(),
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
