"""Any text is a valid constraint file or an error, a line per mistake; ``benchmarks/fuzz_constraints.py`` goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzzing import GOOD, check, read, texts
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from puzzle import yamlfiles
from puzzle.config import ConstraintFile

BOUNDED = settings(
    max_examples=300,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],  # shrinking takes minutes; the script does it
)


@BOUNDED
@given(texts)
def test_any_text_is_a_valid_file_or_a_clear_error(text: str) -> None:
    check(text)


def test_so_are_any_bytes(tmp_path: Path) -> None:
    path = tmp_path / "bytes.yaml"

    @settings(BOUNDED, max_examples=100)
    @given(st.binary(max_size=60))
    def as_file(content: bytes) -> None:
        path.write_bytes(content)
        read(lambda: yamlfiles.load(ConstraintFile, path), path)

    as_file()


def test_undamaged_files_are_valid() -> None:
    assert all(check(text, solve=True) for text in GOOD)


@pytest.mark.parametrize("text", ['{"constraints":{},"solver":{"time_limit_s":86400000000000}}', ":\n: 0\u20280"])
def test_what_hours_of_it_found_is_an_error_now(text: str) -> None:
    assert not check(text, solve=True)
