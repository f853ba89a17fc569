"""Differences that a known lack of the engine explains, found by asking again without such text; the user's rows decide."""

from __future__ import annotations

import unicodedata
from dataclasses import replace
from typing import Any

import numpy as np
from tokenizers import normalizers

from solotune.dataset import Example
from solotune.exporters.conversations import Conversation
from solotune.exporters.engine_lacks import Lacking, explained, judged, lacks_of, ollama_lacks, texts_of
from solotune.exporters.template_parity import Difference


class Composing:
    """A tokenizer that composes characters."""

    class backend_tokenizer:
        normalizer = normalizers.NFC()


LACKS = lacks_of(Composing())  # pyright: ignore[reportArgumentType]


def asked(name: str, text: str) -> Conversation:
    return Conversation(name, [{"role": "user", "content": text}], None, {"add_generation_prompt": True})


def composing(one: Conversation) -> list[int]:
    """A training that composes characters and strips all white space."""
    return [ord(character) for character in unicodedata.normalize("NFC", one.messages[0]["content"].strip())]


def plain(one: Conversation) -> list[int]:
    """An engine that does neither, ends at </s>, and cannot say `bug`."""
    text = one.messages[0]["content"].strip(" \n")
    return [0 if character == "b" else ord(character) for character in text.replace("</s>", "\0")]


def sorted_out(*conversations: Conversation) -> tuple[list[str], list[Lacking]]:
    differences = [Difference(one.name, 0, "a", "b", "") for one in conversations if composing(one) != plain(one)]
    return explained(differences, conversations, composing, plain, LACKS)


def test_what_the_engine_lacks_is_counted_apart() -> None:
    problems, lacking = sorted_out(
        asked("accent", "e\u0301"), asked("edge", "\u00a0x"), asked("end", "a</s>"), asked("same", "x")
    )
    assert problems == []
    assert [(one.count, one.of, one.first and one.first.conversation) for one in lacking] == [
        (1, 4, "accent"), (1, 4, "end"), (1, 4, "edge")
    ]  # fmt: skip


def test_a_difference_that_stays_without_it_is_a_problem() -> None:
    """A conversation in which both are wrong is not excused by one of them."""
    problems, lacking = sorted_out(asked("accent and bug", "e\u0301 bug"), asked("bug", "bug"))
    assert len(problems) == 2 and "'accent and bug'" in problems[0] and lacking == []


def row(*contents: str, **more: Any) -> Example:
    messages = [{"role": "user", "content": content, **more} for content in contents]
    return Example(np.array([1], np.int32), np.array([True]), "rows.jsonl:1", messages)


def test_rows_that_the_engine_reads_otherwise_make_it_a_problem_with_the_first_token() -> None:
    _, lacking = sorted_out(asked("accent", "e\u0301"), asked("edge", "\u00a0x"), asked("same", "x"))
    rows = [row("caf\u00e9", "e\u0301"), row("x\u3000y"), row(" x "), row("x", tool_calls=[{"name": "n\u0303"}])]
    problems, notes = judged(lacking, texts_of([rows[:1], rows[1:]]))
    assert len(problems) == len(notes) == 1
    assert "2 of the 4 rows have text in decomposed form: send it text in NFC" in problems[0]
    assert "conversation 'accent', token 0: a in training, b here" in problems[0]
    assert "none of the 4 rows has other white space around a message" in notes[0] and "'edge'" in notes[0]


def test_without_such_rows_or_without_texts_it_is_a_note() -> None:
    _, lacking = sorted_out(asked("accent", "e\u0301"))
    for rows, said in (([row("plain")], "none of the 1 rows has"), ([row()], "is not known here"), ([], "not known")):
        problems, notes = judged(lacking, texts_of([rows]))
        assert problems == [] and said in notes[0] and "1 of 1 conversations" in notes[0]


def test_rows_are_not_read_where_nothing_differs() -> None:
    def unread() -> Any:
        raise AssertionError
        yield

    assert judged([], unread()) == ([], [])


def test_what_ollama_lacks_is_judged_without_a_conversation() -> None:
    (lacking,) = ollama_lacks(Composing())  # pyright: ignore[reportArgumentType]
    assert judged([lacking], [["caf\u00e9"]]) == ([], [f"{lacking}; none of the 1 rows has text in decomposed form"])
    assert str(lacking) == "Ollama does not compose characters as this tokenizer does (NFC)"
    assert ollama_lacks(object()) == []  # pyright: ignore[reportArgumentType]


def test_one_row_is_one_row() -> None:
    _, lacking = sorted_out(asked("end", "a</s>"))
    (problem,), _ = judged(lacking, [["see </s>"], ["x"]])
    assert "1 of the 2 rows has such a spelling" in problem
    assert replace(lacking[0].lack, change=str).affects(["</s>"]) is False
