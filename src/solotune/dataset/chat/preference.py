"""Preference data: pairs of a chosen and a rejected answer, and answers with a verdict. Refused, with what works.

`train` learns every answer of a row as a good one. So a rejected answer beside it, or a verdict that it is bad (KTO's
`label: false`), would be learned in part or the wrong way round.

A number that grades an answer (`score: 4.5`) and the class of a text (`label: 3`) are no verdicts; they are named among
the unused keys. A verdict is true or false.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from solotune.dataset.chat.columns import plain_name
from solotune.dataset.chat.weights import truth_of
from solotune.dataset.readers.column_mapping import advised
from solotune.dataset.readers.row import Row, RowError, is_blank, once_per_shape, short
from solotune.errors import Advice

_VERDICT_KEYS = (
    "label",
    "kto_tag",
    "preference",
    "is_preferred",
    "is_chosen",
    "is_good",
    "is_desirable",
    "desirable",
    "accepted",
    "thumbs_up",
    "feedback",
    "rating",
    "score",
    "reward",
)
_VERDICT_NAMES = frozenset(map(plain_name, _VERDICT_KEYS))
_ALWAYS = ("ktotag", "preference")  # whatever their value
_WORDS = ("true", "false", "desirable", "undesirable", "thumbsup", "thumbsdown")
_QUESTIONS = ("instruction", "question", "query", "input")
_OF_OPENAI = ("preferredoutput", "nonpreferredoutput")


def refuse_preference(row: Row, format_name: str) -> None:
    """Refuse a row that says which of its answers is better, or whether its answer is good.

    Raises:
        RowError: with the `column_mapping` that trains on the good answers.
    """
    pairs, verdicts = preference_keys(row.values)
    if given := [key for key in pairs if _is_side(key, row.values[key])]:
        raise RowError(
            f"{row.where}: preference data, but solotune trains on every answer of a row, also a rejected one",
            reason="preference data",
            seen="the keys " + ", ".join(row.values),
            allowed="one answer a row",
            change=how_to_learn_the_chosen(row) or advised(row, _ignored(given), "leave the others out: "),
        )
    for key in verdicts if format_name != "text" else ():
        if _is_verdict(plain_name(key), row.values[key], format_name):
            raise _refused_verdict(row, key)


def preference_keys(values: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The keys of a row that belong to a pair of answers, and those that may hold a verdict on its answer."""
    return _preference_keys(tuple(values))


@once_per_shape
def _preference_keys(keys: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    names = [(key, plain_name(key)) for key in keys]
    verdicts = tuple(key for key, name in names if name in _VERDICT_NAMES)
    sides = ("chosen", "rejected")
    pairs = (key for key, name in names if name.startswith(sides) or name.endswith(sides) or name in _OF_OPENAI)
    return tuple(key for key in pairs if key not in verdicts), verdicts


def _is_verdict(name: str, value: Any, format_name: str) -> bool:
    if is_blank(value):
        return False
    if name in _ALWAYS or isinstance(value, bool):
        return True
    if isinstance(value, str) and not value.strip().replace(".", "").isdigit():
        return plain_name(value) in _WORDS
    # KTO's own shape; elsewhere 0 and 1 are classes or grades
    return name == "label" and format_name == "prompt-completion" and truth_of(value) is not None


def _refused_verdict(row: Row, key: str) -> RowError:
    left_out = advised(row, {key: "ignore"}, "if it says something else, set ")
    learn_good = advised(row, {key: "train"}, "to learn the good answers only, set ", f"; {left_out}")
    return RowError(
        f"{row.where}: preference data: {key} says whether the answer is good, but solotune trains on every answer",
        reason=f"preference data: {key}",
        seen=f"{key}: {short(row.values[key])}",
        allowed="rows with good answers, without a verdict",
        change=left_out if truth_of(row.values[key]) is None else learn_good,
    )


def is_preference(values: Mapping[str, Any]) -> bool:
    """Whether a row has a chosen or a rejected answer."""
    return any(_is_side(key, values[key]) for key in preference_keys(values)[0])


def _is_side(key: str, value: Any) -> bool:
    """Whether a value is a side of a pair; `score_chosen: 4.5` only grades one."""
    is_named_so = plain_name(key).startswith(("chosen", "rejected"))
    return not is_blank(value) and (is_named_so or isinstance(value, (str, list, dict)))


def how_to_learn_the_chosen(row: Row, before: str = "") -> Advice | None:
    """The `column_mapping` that trains on the chosen answers; None if no mapping can make a row of them.

    Args:
        before: words before it.
    """
    values, pairs = row.values, preference_keys(row.values)[0]
    name = next((key for key in pairs if plain_name(key) in ("chosen", "chosenmessages")), "chosen")
    chosen, others = values.get(name), _ignored(key for key in pairs if key != name)
    words = f"{before}to learn the chosen answers, set "
    if isinstance(chosen, list) and _begins_the_chat(chosen):
        # the whole chat; a list of messages and a prompt beside it hold a part of it
        rest = {key: "ignore" for key in ("prompt", "messages", "conversations") if key in values}
        return advised(row, {**rest, **others, name: "messages"}, words)
    question = next((key for key in ("prompt", "messages", "conversations", *_QUESTIONS) if key in values), None)
    if question is None or is_blank(chosen) or "completion" in values or "output" in values:
        return None
    if question == "instruction" and isinstance(chosen, str):
        return advised(row, {name: "output", **others}, words)
    is_chat = isinstance(values[question], list)
    if question != "prompt" and _has_answer(values[question]):
        return None
    if isinstance(chosen, (str, list, dict)) and is_chat == (not isinstance(chosen, str)):
        return advised(row, {question: "prompt", name: "completion", **others}, words)
    return None


def _begins_the_chat(messages: list[Any]) -> bool:
    first = messages[0] if messages else None
    role = first.get("role", first.get("from")) if isinstance(first, dict) else None
    return isinstance(role, str) and role.lower() in ("user", "human", "system")


def _has_answer(messages: Any) -> bool:
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and last.get("role", last.get("from")) in ("assistant", "gpt")


def _ignored(keys: Iterable[str]) -> dict[str, str]:
    return dict.fromkeys(keys, "ignore")
