"""The mask marks exactly what the assistant wrote, whatever way the template allows to find out."""

from __future__ import annotations

import random
from typing import Any

import pytest
from transformers import AutoTokenizer

from puzzle.checkpoint import DEMO_TEACHER
from puzzle.data.encode import check_template, conversation_tokens
from puzzle.data.source import Conversation
from puzzle.types import ConfigError, CorruptFileError
from tests.data.factories import FORGETFUL_TEMPLATE, MARKED_TEMPLATE, PLAIN_TEMPLATE, byte_tokenizer, chat

TWO_TURNS = [{"role": "system", "content": "Be brief."}, *chat("Why?", "So: é."), *chat("And?", "Because")]


def counted_text(template: str, conversation: Conversation) -> tuple[str, str]:
    """The whole text, and that of the counted tokens."""
    tokenizer = byte_tokenizer(template)
    ids, counted = conversation_tokens(tokenizer, conversation, "here")
    assert ids.shape == counted.shape
    return tokenizer.decode(ids), tokenizer.decode(ids[counted])


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, MARKED_TEMPLATE], ids=["by difference", "marked"])
def test_the_assistants_tokens_count_and_no_others(template: str) -> None:
    whole, counted = counted_text(template, TWO_TURNS)
    assert whole == ("[system]Be brief.</s>[user]Why?</s>[assistant]So: é.</s>[user]And?</s>[assistant]Because</s>")
    assert counted == "So: é.</s>Because</s>"


def test_both_ways_agree_on_words_and_special_tokens() -> None:
    """ChatML on a tokenizer with merges. A token may reach over a turn's border (two newlines): then it counts."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_TEACHER)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    head, tail = "{{ '<|im_start|>' + m['role'] + '\\n' }}", "{{ m['content'] + '<|im_end|>\\n' }}"
    prompt = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    marked = "{% if m['role'] == 'assistant' %}{% generation %}TAIL{% endgeneration %}{% else %}TAIL{% endif %}"
    templates = [
        "{% for m in messages %}" + head + turn + "{% endfor %}" + prompt
        for turn in (tail, marked.replace("TAIL", tail))
    ]
    rng = random.Random(0)
    for _ in range(50):
        turns = [
            {"role": role, "content": "".join(rng.choice(["def ", "self", "\n", " ", "é", "x"]) for _ in range(9))}
            for role in ("user", "assistant") * rng.randrange(1, 4)
        ]
        found = []
        for template in templates:
            tokenizer.chat_template = template
            found.append(conversation_tokens(tokenizer, turns, "here"))
        assert all((one == other).all() for one, other in zip(*found, strict=True))
        counted = tokenizer.decode(found[0][0][found[0][1]])
        answers = [turn["content"] + "<|im_end|>" for turn in turns if turn["role"] == "assistant"]
        assert counted.replace("\n", "") == "".join(answers).replace("\n", "")


def test_a_turn_that_answers_nothing_does_not_count() -> None:
    greeting = {"role": "assistant", "content": "Hello"}
    assert counted_text(PLAIN_TEMPLATE, [greeting, *chat("Why?", "So")])[1] == "So</s>"
    with pytest.raises(CorruptFileError, match=r"row 3: nothing in it is an answer .*\(roles: assistant\)"):
        conversation_tokens(byte_tokenizer(PLAIN_TEMPLATE), [greeting], "row 3")


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    tokenizer = byte_tokenizer(FORGETFUL_TEMPLATE)
    with pytest.raises(ConfigError, match="row 7: the chat template renders earlier turns otherwise"):
        conversation_tokens(tokenizer, TWO_TURNS, "row 7")
    with pytest.raises(ConfigError, match="renders earlier turns otherwise"):
        conversation_tokens(tokenizer, chat("Why?", "So"), "row 8")


def test_a_conversation_without_an_assistant_is_named_with_its_roles() -> None:
    turns = [{"role": "human", "content": "Why?"}, {"role": "gpt", "content": "So"}]
    with pytest.raises(CorruptFileError, match=r"row 1: nothing in it is an answer .*\(roles: human, gpt\)"):
        conversation_tokens(byte_tokenizer(PLAIN_TEMPLATE), turns, "row 1")
    with pytest.raises(CorruptFileError, match="roles: human, gpt"):
        conversation_tokens(byte_tokenizer(MARKED_TEMPLATE), turns, "row 1")


def test_what_the_template_refuses_is_named() -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(CorruptFileError, match=r"row 2: refused by the chat template \(roles must alternate\)"):
        conversation_tokens(byte_tokenizer(template), chat("Why?", "So"), "row 2")


def test_no_template_and_a_tokenizer_without_offsets_are_refused() -> None:
    with pytest.raises(ConfigError, match="chats: the teacher's tokenizer has no chat template"):
        check_template(byte_tokenizer(), "chats")
    check_template(byte_tokenizer(PLAIN_TEMPLATE), "chats")

    class Slow:
        chat_template = PLAIN_TEMPLATE

        def __init__(self) -> None:
            self.fast = byte_tokenizer(PLAIN_TEMPLATE)

        def get_chat_template(self) -> str:
            return PLAIN_TEMPLATE

        def apply_chat_template(self, conversation: Conversation, **settings: Any) -> Any:
            return self.fast.apply_chat_template(conversation, **settings)

        def __call__(self, text: str, **settings: Any) -> Any:
            raise NotImplementedError("return_offset_mapping is not available")

    with pytest.raises(ConfigError, match="does not tell where its tokens lie"):
        conversation_tokens(Slow(), chat("Why?", "So"), "row 1")
