"""Thoughts in an answer's text, with the tags that people's files have."""

from __future__ import annotations

import pytest

from solotune.dataset.chat.reasoning_tags import split_thoughts


@pytest.mark.parametrize(
    ("opening", "closing"),
    [
        ("<think>", "</think>"),
        ("<thinking>", "</thinking>"),
        ("<Thought>", "</Thought>"),
        ("<reasoning>", "</reasoning>"),
        ("[THINK]", "[/THINK]"),
        ("<|begin_of_thought|>", "<|end_of_thought|>"),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        ("◁think▷", "◁/think▷"),
        ("<seed:think>", "</seed:think>"),
    ],
)
def test_a_thought_is_split_from_the_answer(opening: str, closing: str) -> None:
    thoughts, pieces = split_thoughts(f"{opening}\nhm, 9 - 1\n{closing}\n\n8")
    assert thoughts == [("hm, 9 - 1", opening, closing)]
    assert pieces == ["8"]


def test_several_thoughts_and_what_stands_between_them() -> None:
    thoughts, pieces = split_thoughts("First <think>a</think> then <thinking>b</thinking>last")
    assert [thought.text for thought in thoughts] == ["a", "b"]
    assert pieces == ["First", "then", "last"]


def test_a_prompt_may_open_the_thought() -> None:
    thoughts, pieces = split_thoughts("hm\n</think>\n\n8 </think>")
    assert [thought.text for thought in thoughts] == ["hm"]
    assert pieces == ["8 </think>"]


@pytest.mark.parametrize("content", ["", "8", "<p>8</p>", "<|im_end|> [/INST]", "I think </b>"])
def test_other_texts_have_no_thoughts(content: str) -> None:
    assert split_thoughts(content) == ([], [content] if content else [])
