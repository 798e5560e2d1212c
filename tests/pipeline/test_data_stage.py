"""The data stage as a user meets it: mixtures of everything, what is wrong with them, and disks that fill up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from puzzle import artifacts
from puzzle.cli import main
from puzzle.data import packing, tokenise
from puzzle.run import Run
from tests.data.factories import chat, text_file, texts, write_jsonl
from tests.pipeline.conftest import CONFIG, Project

TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MIXTURE = """\
data:
  sources:
    - {{path: {folder}/texts, weight: 0.3}}
    - {{dataset: parquet, data_files: {folder}/rows.parquet, column: body, weight: 0.5}}
    - {{path: {folder}/chats.jsonl, messages: turns, weight: 0.2}}
  tokens: {{train: 4000, score: 400, select: 300, report: 200}}
  sequence_tokens: 16
"""


@pytest.fixture
def mixed(project: Project) -> Project:
    """The project on a mixture of a folder, a streamed Parquet file and chats."""
    (project.folder / "texts").mkdir()
    text_file(project.folder / "texts" / "a.jsonl", texts("a", 600))
    (project.folder / "texts" / "b.md").write_text("\n".join(texts("b", 20)))
    parquet.write_table(pa.table({"body": texts("r", 900)}), project.folder / "rows.parquet", row_group_size=100)
    records = ({"turns": chat(f"q{index}?", f"a{index}.")} for index in range(600))
    write_jsonl(project.folder / "chats.jsonl", records)
    (project.folder / "teacher" / "chat_template.jinja").write_text(TEMPLATE)
    lines = project.config.read_text().splitlines(keepends=True)
    section = MIXTURE.format(folder=project.folder)
    project.config.write_text("".join(section if line.startswith("data:") else line for line in lines))
    return project


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def data_files(project: Project) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (project.run / "data").iterdir()}


def test_a_mixture_is_made_once_and_read_at_any_length(mixed: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--debug", "validate", str(mixed.config)]) == 0
    assert main(["--debug", "data", str(mixed.config)]) == 0
    first = data_files(mixed)
    payload = json.loads(first["unit.json"])["payload"]
    assert payload["num_tokens"] == {"train": 4000, "score": 400, "select": 300, "report": 200}
    assert [source["num_tokens"]["train"] for source in payload["sources"]] == [1200, 2000, 800]
    assert not (mixed.run / "shards").exists()
    capsys.readouterr()
    for change in ("data.sequence_tokens=32", "data.within_documents=true"):
        assert main(["--debug", "data", str(mixed.config), "--set", change]) == 0
    assert main(["--debug", "data", str(mixed.run)]) == 0  # by the configuration that the run itself wrote down
    assert capsys.readouterr().err == ""  # nothing was left to do
    assert data_files(mixed) == first


def test_another_mixture_is_refused_until_it_is_redone(mixed: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--debug", "data", str(mixed.config)]) == 0
    edit(mixed.config, "weight: 0.3", "weight: 0.4")
    assert main(["data", str(mixed.config)]) == 6
    assert "(changed: mixing); run again with --redo data" in capsys.readouterr().err
    assert main(["--debug", "data", str(mixed.config), "--redo"]) == 0
    with open(mixed.folder / "chats.jsonl", "a") as more:
        more.write(json.dumps({"turns": chat("Why?", "So")}) + "\n")
    assert main(["data", str(mixed.config)]) == 6
    assert "(changed: text)" in capsys.readouterr().err


def test_a_whole_run_on_a_mixture_within_documents(mixed: Project) -> None:
    edit(mixed.config, "sequence_tokens: 16", "sequence_tokens: 16\n  within_documents: true")
    assert main(["--debug", "run", str(mixed.config)]) == 0
    assert Run.open(mixed.config).report.is_file()


def runs_out(project: Project) -> None:
    edit(project.config, "select: 300", "select: 30000")


def too_short_to_pack(project: Project) -> None:
    project.config.write_text(CONFIG.format(folder=project.folder).replace("text.jsonl", "short.txt"))
    (project.folder / "short.txt").write_text("Too short.")


def too_short_for_a_window(project: Project) -> None:
    edit(project.config, "train: 4000, score: 400", "train: 4000, score: 10")


def unknown_column(project: Project) -> None:
    edit(project.config, "column: body", "column: txet")


def unreadable_parquet(project: Project) -> None:
    (project.folder / "rows.parquet").write_bytes(b"PAR1 damaged PAR1")


def unreadable_parquet_in_a_folder(project: Project) -> None:
    shutil.copy(project.folder / "rows.parquet", project.folder / "texts" / "c.parquet")
    (project.folder / "texts" / "c.parquet").write_bytes(b"PAR1 damaged PAR1")
    edit(project.config, "train: 4000", "train: 90000")


def record_without_text(project: Project) -> None:
    lines = (project.folder / "texts" / "a.jsonl").read_text().splitlines(keepends=True)
    (project.folder / "texts" / "a.jsonl").write_text("".join([*lines[:4], '{"title": "x"}\n', *lines[4:]]))


def no_chat_template(project: Project) -> None:
    (project.folder / "teacher" / "chat_template.jinja").unlink()


def template_that_rewrites(project: Project) -> None:
    template = TEMPLATE.replace("m['content']", "(m['content'] if loop.last else '')")
    (project.folder / "teacher" / "chat_template.jinja").write_text(template)


def conversation_of_others(project: Project) -> None:
    edit(project.folder / "chats.jsonl", '"assistant"', '"gpt"')


def missing_data_files(project: Project) -> None:
    (project.folder / "rows.parquet").unlink()


def empty_folder(project: Project) -> None:
    shutil.rmtree(project.folder / "texts")
    (project.folder / "texts").mkdir()


def ids_beyond_the_vocabulary(project: Project) -> None:
    path = project.folder / "teacher" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["a"] = 999
    path.write_text(json.dumps(tokenizer))


def endless(project: Project) -> None:
    text = project.config.read_text()
    project.config.write_text("".join(line for line in text.splitlines(keepends=True) if "tokens: {train" not in line))


def no_weights(project: Project) -> None:
    for weight in ("0.3", "0.5", "0.2"):
        edit(project.config, f", weight: {weight}", "")


def some_weights(project: Project) -> None:
    edit(project.config, ", weight: 0.3", "")


def text_and_sources(project: Project) -> None:
    edit(project.config, "  sources:", "  text: demo\n  sources:")


def neither_text_nor_sources(project: Project) -> None:
    project.config.write_text(CONFIG.format(folder=project.folder).replace(f"{project.folder}/text.jsonl", "''"))


def two_places(project: Project) -> None:
    edit(project.config, "dataset: parquet", "path: x, dataset: parquet")


def revision_of_a_path(project: Project) -> None:
    edit(project.config, "texts, weight", "texts, revision: abc, weight")


def column_and_messages(project: Project) -> None:
    edit(project.config, "messages: turns", "messages: turns, column: text")


CASES: list[tuple[Callable[[Project], None], int, tuple[str, ...]]] = [
    (runs_out, 2, ("texts ran out", "split 'select', where 9,000 were asked", "lower data.tokens")),
    (too_short_to_pack, 2, ("short.txt: too little text", "no document falls into the split")),
    (too_short_for_a_window, 2, ("score.sequences is 4, but split 'score' holds 0 sequences of 16 tokens",)),
    (unknown_column, 2, ("rows.parquet", "no column 'txet'; columns: body")),
    (unreadable_parquet, 5, ("dataset parquet", "rows.parquet): cannot be opened (Parquet file size is")),
    (unreadable_parquet_in_a_folder, 5, ("c.parquet: unreadable Parquet",)),
    (record_without_text, 5, ("a.jsonl:5", 'a "text" that is a string', "found the keys title")),
    (no_chat_template, 2, ("chats.jsonl: the teacher's tokenizer has no chat template",)),
    (template_that_rewrites, 2, ("chats.jsonl:", "renders earlier turns otherwise", "generation")),
    (conversation_of_others, 5, ("chats.jsonl:1", "roles: user, gpt")),
    (missing_data_files, 2, ("dataset parquet", "rows.parquet", "cannot be opened")),
    (empty_folder, 2, ("texts: no text in this folder",)),
    (ids_beyond_the_vocabulary, 2, ("gives the id 999", "ids below 128 only")),
    (endless, 2, ("config.yaml:7: data", "say how much to take")),
    (no_weights, 2, ("config.yaml:7: data", "with tokens, give every source a weight")),
    (some_weights, 2, ("config.yaml:7: data", "every source a weight, or none")),
    (text_and_sources, 2, ("config.yaml:7: data", "text or sources, not both")),
    (neither_text_nor_sources, 2, ("config.yaml:7: data", "give text or sources")),
    (two_places, 2, ("config.yaml:10: data.sources.1", "give one of path, dataset")),
    (revision_of_a_path, 2, ("config.yaml:9: data.sources.0", "are for a dataset")),
    (column_and_messages, 2, ("config.yaml:11: data.sources.2", "give one of column, messages")),
]


@pytest.mark.parametrize(("spoil", "code", "words"), CASES, ids=[case[0].__name__ for case in CASES])
def test_one_clear_line_and_the_right_exit_code(
    mixed: Project,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Project], None],
    code: int,
    words: tuple[str, ...],
) -> None:
    spoil(mixed)
    assert main(["run", str(mixed.config)]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("puzzle: ")]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0]
    assert not list(mixed.folder.rglob(".aside-*"))


@pytest.fixture
def reference(mixed: Project, tmp_path: Path) -> dict[str, bytes]:
    """The data made without any mishap."""
    whole = tmp_path / "whole"
    assert main(["--debug", "data", str(mixed.config), "--set", f"run={whole}"]) == 0
    return {path.name: path.read_bytes() for path in (whole / "data").iterdir()}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise, "SHARD_TOKENS", 500)
    monkeypatch.setattr(tokenise, "BATCH_CHARACTERS", 300)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("most_bytes", [1500, 12_000], ids=["in a shard", "in the packed file"])
def test_a_disk_that_takes_no_more_in_mid_write(
    mixed: Project, reference: dict[str, bytes], capsys: pytest.CaptureFixture[str], most_bytes: int
) -> None:
    """The kernel itself stops the write, through a limit on the size of files."""
    resource = pytest.importorskip("resource", reason="needs limits on the size of files")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    try:
        assert main(["data", str(mixed.config)]) == 5
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert error.startswith("puzzle: ")
    assert error.count("\n") == 1
    assert "File too large" in error
    assert not (mixed.run / "data").exists()
    assert not list(mixed.run.rglob(".aside-*"))
    assert main(["--debug", "data", str(mixed.config)]) == 0
    assert data_files(mixed) == reference


@pytest.mark.usefixtures("small_shards")
def test_a_full_disk_keeps_what_is_tokenised(
    mixed: Project, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fills_up(*_: Any) -> Iterator[Any]:
        raise OSError(28, "No space left on device")
        yield

    with monkeypatch.context() as patched:
        patched.setattr(packing, "_ids", fills_up)
        assert main(["data", str(mixed.config)]) == 5
    assert "No space left on device; free some space and run the same command again" in capsys.readouterr().err
    before = sorted((mixed.run / "shards").rglob("unit.json"))
    assert len(before) >= 10

    def no_shard(*_: Any) -> Any:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(tokenise, "_next_shard", no_shard)
    assert main(["--debug", "data", str(mixed.config)]) == 0
    assert data_files(mixed) == reference


@pytest.mark.usefixtures("small_shards")
def test_killed_between_any_two_shards_the_data_is_the_same(
    mixed: Project, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    killed: set[str] = set()

    def kill_once(operation: str, path: Path) -> None:
        if operation == "rename" and str(path) not in killed:
            killed.add(str(path))
            raise Killed

    monkeypatch.setattr(artifacts, "_before", kill_once)
    while True:
        try:
            assert main(["--debug", "data", str(mixed.config)]) == 0
            break
        except Killed:
            continue
    assert len([path for path in killed if "shards" in path]) > 10
    assert data_files(mixed) == reference


def test_a_source_whose_commit_is_unknown_is_said_to_be(
    mixed: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    from puzzle.data import streamed

    class Stream:
        def skip(self, start: int) -> Iterator[dict[str, str]]:
            return ({"body": text} for text in texts("r", 900)[start:])

    monkeypatch.setattr(streamed, "newest_commit", lambda source: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Stream())
    edit(mixed.config, f"dataset: parquet, data_files: {mixed.folder}/rows.parquet", "dataset: some/thing")
    assert main(["--debug", "data", str(mixed.config)]) == 0
    assert "some/thing: read at an unknown commit; name one as its revision" in " ".join(
        capsys.readouterr().err.split()
    )
