"""A whole search in a fresh interpreter loads nothing of the torch lane, and what is slow only where it is used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, logging, sys
sys.path.insert(0, sys.argv[1])
from search_factories import make_costs, make_file, make_items, make_scores, make_shape
from puzzle.search import problems, search
from puzzle import tables
shape = make_shape()
items = make_items(shape)
file = make_file(
    workloads={"chat": {"isl": 128, "osl": 64, "batch_size": 4}},
    constraints={"params": "70%", "chat.e2e_ms": "75%"},
    solutions={"count": 10, "min_difference": 1.0},
)
found = search(shape, items, make_scores(items), make_costs(shape), file, {"scores": "abc"})
after_search = sorted(sys.modules)
from puzzle.search import pareto
front = pareto.front(problems(shape, items, make_scores(items), make_costs(shape), file)[0], "params")
print(json.dumps({"found": len(found), "points": len(front), "modules": after_search, "later": sorted(sys.modules)}))
"""


def test_search_loads_no_torch_and_no_pandas() -> None:
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(here)], cwd=here.parents[1], capture_output=True, text=True, check=True
    )
    told = json.loads(done.stdout)
    assert told["points"] > told["found"] > 0
    assert "ortools" in told["modules"]
    for name in ("torch", "transformers", "pandas", "matplotlib"):
        assert name not in told["modules"]
    assert "torch" not in told["later"]
    assert "solutions: no further one fits" in done.stderr  # the note reaches a user who configured no logging
