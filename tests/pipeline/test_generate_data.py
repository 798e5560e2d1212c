"""`puzzle generate-data`: the same text whatever the batches and stops, in the splits of its prompts, taken by data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from puzzle.artifacts import read_unit
from puzzle.cli import main
from puzzle.config import SourceConfig
from puzzle.data.source import documents
from puzzle.stages import generate
from tests.pipeline.conftest import Project

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def generated(project: Project, *settings: str) -> dict[str, bytes]:
    asked = ["documents=70", "max_new_tokens=6", *settings]
    words = [word for one in asked for word in ("--set", f"generate.{one}")]
    assert main(["--debug", "generate-data", str(project.config), *words]) == 0
    return shards(project)


def shards(project: Project) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in sorted(project.run.glob("generated/*/text.jsonl"))}


def test_batches_and_stops_change_nothing(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = generated(project)
    assert "70 documents" in capsys.readouterr().out
    assert list(whole) == ["00000000-00000064", "00000064-00000070"]
    assert sum(text.count(b"\n") for text in whole.values()) == 70
    payload = read_unit(project.run / "generated" / "00000000-00000064").payload
    assert payload["sampling"]["temperature"] == 1.0 and payload["seed"] == 0
    assert payload["new_tokens"] <= 64 * 6 and payload["documents"] == 64
    # in other batches, and stopped after the first shard
    other = project.copy_to(project.folder.parent / "other")
    calls, real = [], generate.continuations

    def killed(*given: object) -> object:
        if len(calls) == 14:
            raise KeyboardInterrupt
        calls.append(0)
        return real(*given)  # type: ignore[arg-type]

    command = ["--set", "generate.documents=70", "--set", "generate.max_new_tokens=6", "--set", "generate.batch_size=5"]
    with monkeypatch.context() as patched:
        patched.setattr(generate, "continuations", killed)
        assert main(["generate-data", str(other.config), *command]) == 130
    assert list(shards(other)) == ["00000000-00000064"]
    assert generated(other, "batch_size=5") == whole
    # fewer and more of them are the same documents, and a last shard that was shorter goes
    assert list(generated(other, "documents=66")) == ["00000000-00000064", "00000064-00000066"]
    assert generated(other) == whole


def test_texts_go_on_in_the_split_that_they_are_from(project: Project) -> None:
    source = f"prompts={{path: {project.folder}/text.jsonl}}"
    whole = generated(project, "documents=24", source, "prompt_tokens=4")
    lines = [json.loads(line) for text in whole.values() for line in text.decode().splitlines()]
    given = list(documents(SourceConfig(path=str(project.folder / "text.jsonl"))))
    assert [line["split"] for line in lines] == [one.split for one in given]
    known = [one.content[:4].replace(" ", "").replace("\n", "") for one in given]  # to the tokenizer
    assert all(line["text"].startswith(begin) for line, begin in zip(lines, known, strict=True))
    mixed = (
        f"data.sources=[{{path: {project.folder}/text.jsonl, weight: 1}}, {{path: {project.run}/generated, weight: 1}}]"
    )
    assert main(["--debug", "data", str(project.config), "--set", "data.text=", "--set", mixed]) == 0
    first, second = read_unit(project.run / "data").payload["sources"]
    assert second["num_tokens"]["train"] > 0


def test_conversations_get_an_answer_of_the_teachers(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(project.folder / "teacher")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(project.folder / "teacher")
    chats = [
        [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "d"}],
        [{"role": "user", "content": "e"}],
    ]
    path = project.folder / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    prompts = f"prompts={{path: {path}, messages: messages}}"
    (text,) = generated(project, "documents=2", prompts).values()
    lines = [json.loads(line)["messages"] for line in text.decode().splitlines()]
    assert [line[:1] for line in lines] == [chat[:1] for chat in chats]
    assert [line[1]["role"] for line in lines] == ["assistant", "assistant"]
    assert "messages: messages, weight: 0.5" in capsys.readouterr().out
    words = ["--set", "generate.documents=3", "--set", "generate.max_new_tokens=6", "--set", f"generate.{prompts}"]
    assert main(["generate-data", str(project.config), *words]) == 2
    assert "ran out after 2 of the 3 documents asked for" in capsys.readouterr().err


def test_prompts_that_leave_no_room_are_left_out_and_counted(project: Project) -> None:
    path = Path(project.folder / "long.jsonl")
    path.write_text('{"text": "' + "a" * 80 + '"}\n{"text": "b"}\n')
    (text,) = generated(project, "documents=2", f"prompts={{path: {path}}}", "prompt_tokens=60").values()
    assert text.count(b"\n") == 1
    assert read_unit(next(project.run.glob("generated/*"))).payload["too_long"] == 1


def test_more_tokens_than_the_teacher_takes_are_refused(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate-data", str(project.config), "--set", "generate.max_new_tokens=64"]) == 2
    assert "the teacher takes at most 64 tokens" in capsys.readouterr().err
