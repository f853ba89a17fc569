"""Questions and answers in plain text."""

from __future__ import annotations

import pytest

from solotune.diagnosis.facts.labelled_turns import labelled_turns, starts_with_label

CHATS = {
    "USER: Why? ASSISTANT: Because.</s>": ("Why?", "Because."),
    "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3": ("Add.\n1 2", "3"),
    "Human: Who?\n\nAssistant: Me.": ("Who?", "Me."),
    "Q: who\nA: me": ("who", "me"),
    "**User:** hi\n**Assistant:** yo": ("hi", "yo"),
    "<|im_start|>system\nx<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n": (
        "hi",
        "yo",
    ),
    "[INST] hi [/INST] yo</s>": ("hi", "yo"),
    "### Instruction:\nhi<|im_end|>### Response:\nyo<|im_end|>": ("hi", "yo"),
    "Human: hi</s>Assistant: yo</s>": ("hi", "yo"),
    "<bos>### Instruction:\nhi\n\n### Response:\nyo<eos>": ("hi", "yo"),
    "### Frage:\nhi\n\n### Antwort:\nyo": ("hi", "yo"),
    "\u95ee\uff1ahi\n\u7b54\uff1ayo": ("hi", "yo"),
    "<question>hi\n<answer>yo</s>": ("hi", "yo"),
}


@pytest.mark.parametrize("text", CHATS)
def test_turns_are_found(text: str) -> None:
    turns = labelled_turns(text)
    assert turns is not None
    assert [turn["role"] for turn in turns] == ["user", "assistant"]
    assert tuple(turn["content"] for turn in turns) == CHATS[text]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "She told the user: wait. Then the assistant: nothing.",
        "Input: 3\nOutput: 4",  # of a program
        "<form><input>3\n<output>4",
        "Answer: yes\nQuestion: why",
        "Title\n\nThe model: a description.",
        "Q: a question without an answer",
    ],
)
def test_other_texts_have_none(text: str) -> None:
    assert labelled_turns(text) is None


def test_a_text_that_begins_with_a_label() -> None:
    assert starts_with_label("Human: hello")
    assert starts_with_label("[INST] hello")
    assert not starts_with_label("Hello, human: it is me")
    assert not starts_with_label("<question>Who?</question>"), "a tag of the user's own"
