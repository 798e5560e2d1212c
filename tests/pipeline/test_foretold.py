"""GKD says after a tenth of its steps what it will come to; when it goes on from later than that, at once."""

from __future__ import annotations

import pytest

from puzzle import training_log
from puzzle.cli import main
from puzzle.forecast import Schedule, forecast
from puzzle.kd import Distillation
from puzzle.run import Run
from tests.pipeline.conftest import Project

LONGER = [
    "--set",
    "kd.tokens=1440",
    "--set",
    "kd.checkpoint_steps=22",
]  # 45 steps: a forecast after the least there may be


def test_what_gkd_comes_to_is_told_after_a_tenth(
    copy: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Distillation.run

    def stopped(self: Distillation, *given: object) -> None:
        if self.step == 22:
            raise KeyboardInterrupt
        whole(self, *given)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(Distillation, "run", stopped)
        assert main(["kd", str(copy.config), *LONGER, "--redo"]) == 130
    run = Run.open(copy.config)
    kl = [line["kl"] for line in training_log.read_log(run.student / training_log.NAME)][:20]
    found = forecast(kl, Schedule(45, 1, 0.1))
    told = f"forecast from 44% of the tokens: KL {found.mean:.4f} ± {found.standard_error:.4f} at the end"
    assert " ".join(capsys.readouterr().err.split()).count(told) == 1
    assert main(["--debug", "kd", str(copy.config), *LONGER]) == 0
    assert " ".join(capsys.readouterr().err.split()).count(told) == 1
