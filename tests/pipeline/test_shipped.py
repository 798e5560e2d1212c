"""Every limit and grid we ship goes through the real command line (search spaces: tests/test_config.py)."""

from __future__ import annotations

import json

import pytest

from puzzle.cli import main
from puzzle.yamlfiles import shipped_inputs
from tests.pipeline.conftest import Project


def names(folder: str) -> list[str]:
    return sorted(path.stem for path in (shipped_inputs() / folder).glob("*.yaml"))


@pytest.mark.parametrize("grid", names("profiling"))
@pytest.mark.parametrize("limit", names("search"))
def test_a_shipped_limit_and_grid_on_a_teacher_with_room_for_them(
    project: Project, capsys: pytest.CaptureFixture[str], limit: str, grid: str
) -> None:
    """A limit for a device that is not here is told from a mistake."""
    path = project.folder / "teacher" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 32768}))
    settings = ["data.sequence_tokens=4352", f"constraints={limit}", f"profile.grid={grid}"]
    code = main(["validate", str(project.config), *(word for one in settings for word in ("--set", one))])
    if limit in ("chat-latency", "nemotron-51b"):
        assert code == 4
        assert "nothing was measured on device h100" in capsys.readouterr().err
    elif limit == "half-memory":  # beside this teacher's workspace its weights and its cache are little
        assert code == 3
        assert "cannot be met: the smallest possible is" in capsys.readouterr().err
    else:
        assert code == 0
