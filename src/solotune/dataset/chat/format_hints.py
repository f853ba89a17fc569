"""The error for a row of no known format, with the `column_mapping` that reads it, where there is one.

The names are those that public datasets use. A mapping keeps what stands beside question and answer: with a passage, a
system prompt or a reasoning the target is Alpaca's format, which has a place for each.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from solotune.dataset.chat.columns import given, plain_name
from solotune.dataset.chat.preference import how_to_learn_the_chosen, is_preference
from solotune.dataset.readers.column_mapping import advised
from solotune.dataset.readers.row import Row, RowError
from solotune.errors import Advice

_ALLOWED = "messages, conversations, instruction + output, prompt + completion, or text"
_QUESTIONS = (
    "instruction", "question", "prompt", "query", "problem", "input", "user", "human", "source", "article", "document",
    "input_text", "user_message", "question_text", "title",
)  # fmt: skip
_ANSWERS = (
    "output", "completion", "answer", "response", "solution", "target", "assistant", "gpt", "summary", "reply", "label",
    "output_text", "target_text", "assistant_message", "answers", "generation", "code", "sql", "answer_text",
)  # fmt: skip
_PASSAGES = ("context", "passage", "document", "article", "background", "input", "schema", "knowledge", "evidence")
_REASONINGS = ("complex_cot", "cot", "chain_of_thought")
_CHATS = (
    "messages",
    "conversations",
    "conversation",
    "dialog",
    "dialogue",
    "dialogs",
    "chat",
    "chats",
    "turns",
    "contents",
)
_OF_TEXTS = (
    "{} is a list of texts, which does not say who speaks: write each as "
    '{{"role": "user" or "assistant", "content": "..."}}, under messages'
)
_TEXTS = ("text", "content", "body", "document", "article", "code", "story", "sentence")


def unknown_format(row: Row) -> RowError:
    """The error for a row of no known format."""
    return RowError(
        f"{row.where}: not a known format",
        reason="not a known format",
        seen="the keys " + ", ".join(map(str, row.values)) if row.values else "no keys",
        allowed=_ALLOWED,
        change=_hint(row),
    )


def _hint(row: Row) -> str | Advice | None:
    values = row.values
    if is_preference(values):
        said = "this is preference data, but fine-tuning uses one answer per row: "
        return how_to_learn_the_chosen(row, said) or (
            f"{said}put the prompt and the chosen answer under prompt and completion"
        )
    if "role" in values and "content" in values:
        return "each row is a single message; put all messages of a conversation into one row, as a list under messages"
    if (chat := _first(values, _CHATS, list)) is not None:
        return advised(row, {chat: "messages"}) if _is_chat(values[chat]) else _OF_TEXTS.format(chat)
    request, reply = _first(values, _QUESTIONS, list), _first(values, _ANSWERS, (str, list))
    if request is not None and reply is not None and _is_chat(values[request]):
        return advised(row, {request: "prompt", reply: "completion"})
    question = _first(values, _QUESTIONS, str)
    answer = _first(values, _ANSWERS, str, question)
    if question is not None and answer is not None:
        return _pair(row, question, answer)
    if (text := _first(values, _TEXTS, str)) is not None:
        return advised(row, {text: "text"})
    return _without_names(row) if values else None


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _without_names(row: Row) -> str | Advice:
    """What to change where no column has a name that says what it holds."""
    nested = [str(key) for key, value in row.values.items() if isinstance(value, (dict, list))]
    if nested:
        return (
            f"write what {', '.join(nested)} {'hold' if len(nested) > 1 else 'holds'} as texts, for example under "
            'prompt and completion, or as messages: [{"role": "user", "content": "..."}, ...]'
        )
    texts = [key for key, value in row.values.items() if isinstance(value, str) and not value.strip().isdigit()]
    example = {texts[0]: "prompt", texts[1]: "completion"} if len(texts) == 2 else {"your_column": "text"}
    is_table = row.where.rpartition(":")[0].lower().endswith((".csv", ".tsv"))
    header = "; if the file has no header line, add one: prompt,completion" * is_table
    return advised(row, example, "rename your columns, for example ", header)


def _pair(row: Row, question: str, answer: str) -> Advice:
    """The mapping for a question and its answer, with what stands beside them."""
    beside: dict[str, str] = {}
    passage = _first(row.values, _PASSAGES, (str, list), question, answer)
    reasoning = _first(row.values, _REASONINGS, str, question, answer)
    if passage is not None:
        beside[passage] = "input"
    if reasoning is not None:
        beside[reasoning] = "reasoning_content"
    has_more = any(given(row, meaning) for meaning in ("system", "tools", "history", "thought"))
    if beside or has_more or plain_name(question) == "instruction" or plain_name(answer) == "output":
        return advised(row, {question: "instruction", **beside, answer: "output"})
    return advised(row, {question: "prompt", answer: "completion"})


def _first(values: dict[str, Any], names: Iterable[str], kind: Any, *taken: str | None) -> str | None:
    """The first key of the row with one of these names, in this order, and with a value of this kind."""
    keys = {plain_name(key): key for key, value in values.items() if isinstance(value, kind) and key not in taken}
    return next((keys[name] for name in map(plain_name, names) if name in keys), None)
