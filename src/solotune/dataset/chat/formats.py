"""Data formats: convert each supported shape of a row to a list of `{"role", "content"}` messages, or to a text.

| format | row |
|---|---|
| messages | `{"messages": [{"role": "user", "content": "..."}, ...]}` (also under `conversations`) |
| sharegpt | `{"conversations": [{"from": "human", "value": "..."}, ...]}`; a call is `from: function_call`, JSON text |
| alpaca | `{"instruction": "...", "input": "...", "output": "..."}` |
| prompt-completion | `{"prompt": "...", "completion": "..."}`, both texts or both messages |
| text | `{"text": "..."}`, all of it trained on |

Chats may have columns beside them: a system prompt, tools, Alpaca's `history`, reasoning (`columns.py`). What a row
holds besides is refused (`preference.py`: chosen and rejected answers) or counted (`unused_keys.py`).

The first row decides, and every other row must have the same shape: a file of two shapes is usually two files joined by
mistake, and detecting the shape row by row would hide that. A wrong row is an error with its place, or with
`on_bad_row: drop` is dropped and counted; then the most common shape decides, since the first row may be a bad one.
Always dropped, and counted, are a row whose answer is blank (real exports are full of them, they teach the model to
stop at once, and nothing in the row can be fixed) and a row with weight 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from solotune.dataset.chat import columns
from solotune.dataset.chat import messages as msg
from solotune.dataset.chat.format_hints import unknown_format
from solotune.dataset.chat.preference import refuse_preference
from solotune.dataset.chat.tool_calls import check_order
from solotune.dataset.chat.weights import check_switch, weight_of_row
from solotune.dataset.readers.column_mapping import IGNORE, advised
from solotune.dataset.readers.row import Row, RowError, is_blank, short
from solotune.errors import InputError

EMPTY_ANSWER = "empty answer"
WEIGHT_0 = "weight 0"


@dataclass(frozen=True, slots=True)
class Record:
    """One row in the common shape that all later steps use.

    `messages` is empty exactly for a row of plain text; then `text` is trained on, from `answer_start` on.
    `weights` has one number for each assistant message, 0 where it is context only; it is empty if all are
    1. `weight` is the row's, and multiplies them. `group` is the group that the row names; `groups.py`
    decides whether it counts, and what else joins rows. After the split it is the group that the row is in.
    """

    where: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    text: str = ""
    answer_start: int = 0
    weights: tuple[float, ...] = ()
    weight: float = 1.0
    group: str | None = None

    @property
    def is_chat(self) -> bool:
        """Whether the row goes through the model's chat template."""
        return bool(self.messages)


class Format(NamedTuple):
    """A supported format: its name, its required keys, and the function that converts a row."""

    name: str
    keys: tuple[str, ...]
    convert: Callable[[Row], Record]
    reads: frozenset[str]
    """Names that a `column_mapping` may give to columns of such rows."""
    meanings: tuple[str, ...] = ()
    """What else is read beside them, under several names (`columns.py`)."""


def recognise(rows: Iterable[Row], *, is_strict: bool = True) -> tuple[Format, str]:
    """Detect the format: strictly the first row's, which all rows must have; else the most common one.

    Args:
        rows: at least one; if strict, only the first is read.

    Returns: the format and, for `check_shape`, where it comes from.
    Raises:
        RowError: the first row (not strictly: each) has none of the known shapes.
    """
    first = next(iter(rows))
    if is_strict:
        found = _format_of(first.values)
    else:
        common = Counter(one for row in rows if (one := _format_of(row.values)) is not None).most_common(1)
        found = common[0][0] if common else None
    if found is None:
        raise unknown_format(first)
    return found, f"as in {first.where}" if is_strict else "as most rows"


def check_shape(row: Row, found: Format, why: str) -> None:
    """Refuse a row that lacks the keys of the format.

    Args:
        why: where the format comes from, for the message: `as in chats.jsonl:1`.
    """
    # None stands for a missing key in parquet and arrow
    missing = [key for key in found.keys if not _has(row.values, key)]
    if not missing:
        return
    other = _format_of(row.values)
    is_mixed = other is not None and other.name != found.name
    problem = f"mixed formats: this row is {other.name}" if other and is_mixed else f"{missing[0]} is missing"
    raise RowError(
        f"{row.where}: {problem}",
        reason=problem,
        seen="the keys " + ", ".join(key for key, value in row.values.items() if value is not None),
        allowed=f"{found.name} ({', '.join(found.keys)}), {why}",
        change="convert all rows to one format, or keep the rows of one format"
        if is_mixed
        else "add the key, or remove the row",
    )


def _has(values: dict[str, Any], key: str) -> bool:
    """Whether a row has a key of its format; an instruction may be null where the question is the input."""
    if values.get(key) is not None:
        return True
    return key == "instruction" and key in values and not is_blank(values.get("input"))


def _format_of(values: dict[str, Any]) -> Format | None:
    """The first format, in this order, whose keys the row has: `messages` wins over a `prompt` beside it."""
    for found in _FORMATS:
        if all(_has(values, key) for key in found.keys):
            if found.keys[0] in msg.LIST_KEYS:
                is_sharegpt = msg.is_sharegpt(msg.chat_list(values[found.keys[0]]), found.keys[0])
                if is_sharegpt != (found.name == "sharegpt"):
                    continue
            return found
    return None


def convert(row: Row, found: Format) -> Record | str:
    """Convert a row to a Record; or return the reason why it is dropped without being wrong.

    Raises:
        RowError: the row is wrong; names the row and the message in it.
        InputError: `column_mapping` gives a column a name that rows of this format do not have.
    """
    if row.renamed:
        _check_targets(row, found)
    refuse_preference(row, found.name)
    columns.refuse_template_arguments(row)
    record = found.convert(row)
    weight = weight_of_row(row.where, row.values)
    if weight == 0:
        return WEIGHT_0
    record = record if weight == 1 else replace(record, weight=weight)
    if not record.is_chat:
        if found.name != "text":
            _check_text_only(row)
        return record if record.text[record.answer_start :].strip() else EMPTY_ANSWER
    _check_has_answer(record)
    _check_text_only(row)
    if record.weights and not any(record.weights):
        return WEIGHT_0
    if any(_is_blank(message) for message in record.messages if message["role"] == "assistant"):
        return EMPTY_ANSWER
    return record


def _check_targets(row: Row, found: Format) -> None:
    """Refuse a `column_mapping` to a name that this format does not read: the user wants that column in the rows."""
    for column, name in row.renamed.items():
        if name == IGNORE or name not in row.values or name in found.reads:
            if name == "train" and not is_blank(row.values.get(name)):
                check_switch(row.where, column, row.values[name])
            continue
        is_pair = all(isinstance(row.values.get(key), str) for key in ("prompt", "completion"))
        change = advised(row, {name: IGNORE}, "to leave the column out, set ")
        if is_pair and name in _ALPACA_ONLY:
            chat = {"prompt": "instruction", "completion": "output"}
            change = advised(row, chat, "for a chat with all columns, set ", f"; {change}")
        raise InputError(
            f"{row.where}: column_mapping: {column} becomes {name}, which the format {found.name} does not have",
            seen="the keys " + ", ".join(row.values),
            allowed=", ".join(sorted(found.reads)),
            change=change,
        )


def _is_blank(message: dict[str, Any]) -> bool:
    return not message["content"].strip() and not message.get("tool_calls")


def _check_text_only(row: Row) -> None:
    if media := [key for key in sorted(msg.MEDIA_KEYS & row.values.keys()) if row.values[key]]:
        raise RowError(
            f"{row.where}: the row has {media[0]}, but only text can be trained on",
            reason=f"has {media[0]}",
            allowed="text only",
            change=advised(row, {media[0]: IGNORE}, "remove the row; if its text makes sense alone, "),
        )


def _check_has_answer(record: Record) -> None:
    roles = [message["role"] for message in record.messages]
    if "assistant" not in roles:
        raise RowError(
            f"{record.where}: no assistant message, so there is nothing to train on",
            reason="no assistant message",
            seen="the roles " + ", ".join(roles),
            allowed="at least one message with the role assistant",
            change="remove the row, or add the answer",
        )


# --- the formats


def _list_of(key: str) -> Callable[[Row], Record]:
    """The converter of rows whose chat is a list of messages under one key."""

    def convert_list(row: Row) -> Record:
        columns.refuse_history(row)
        found = msg.turns(row.where, row.values[key], key)
        check_order(found.places, found.messages)
        return _chat(row, found.messages, found.weights, found.tools)

    return convert_list


def _chat(
    row: Row,
    messages: list[dict[str, Any]],
    weights: Sequence[float] = (),
    tools: Sequence[columns.Tools] = (),
) -> Record:
    is_plain = all(weight == 1 for weight in weights)
    messages = columns.with_thought(row, columns.with_system(row, messages))
    return Record(
        row.where,
        messages=messages,
        tools=columns.tools_of(row, tools),
        weights=() if is_plain else tuple(weights),
    )


def _alpaca(row: Row) -> Record:
    values = row.values
    instruction = _paragraphs(row, "instruction")
    extra = _paragraphs(row, "input")
    if context := columns.given(row, "context"):
        extra = _with_context(row, extra, context[0])
    answer = msg.text(row.where, values["output"], "output")
    before, weights, tools = columns.earlier_turns(row, msg.turns)
    messages = [
        *before,
        {"role": "user", "content": "\n\n".join(part for part in (instruction, extra) if part.strip())},
        {"role": "assistant", "content": answer},
    ]
    return _chat(row, messages, [*weights, 1.0], tools)


def _paragraphs(row: Row, key: str) -> str:
    """A text, or the passages of a list with a blank line between them; empty if there are none."""
    value = row.values.get(key)
    if is_blank(value):
        return ""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return "\n\n".join(part for part in value if part.strip())
    return msg.text(row.where, value, key)


def _with_context(row: Row, extra: str, key: str) -> str:
    """The context if there is no input, else the input, which has to hold the context already."""
    context = _paragraphs(row, key)
    if not extra.strip():
        return context
    if context not in extra:
        raise RowError(
            f"{row.where}: input and {key} are both given",
            reason=f"input and {key}",
            seen=f"{short(extra)} and {short(row.values[key])}",
            allowed="one of them; it follows the instruction in the prompt",
            change=advised(row, {key: IGNORE}, "write both into input; or leave one out: "),
        )
    return extra


def _prompt_completion(row: Row) -> Record:
    prompt, completion = msg.as_list(row.values["prompt"]), msg.as_list(row.values["completion"])
    if isinstance(prompt, list) or isinstance(completion, list):
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        completion = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        columns.refuse_history(row)
        before, after = msg.turns(row.where, prompt, "prompt"), msg.turns(row.where, completion, "completion")
        messages = before.messages + after.messages
        check_order([f"{row.where}: message {number}" for number in range(1, len(messages) + 1)], messages)
        # only the completion is trained on: an answer in the prompt is context
        weights = [*(0.0 for _ in before.weights), *after.weights]
        return _chat(row, messages, weights, before.tools + after.tools)
    prompt, completion = msg.text(row.where, prompt, "prompt"), msg.text(row.where, completion, "completion")
    columns.refuse_beside_text(row, prompt + completion, is_pair=True)
    return Record(row.where, text=prompt + completion, answer_start=len(prompt))


def _plain(row: Row) -> Record:
    text = msg.text(row.where, row.values["text"], "text")
    columns.refuse_beside_text(row, text, is_pair=False)
    return Record(row.where, text=text)


_COMMON = frozenset(("id", "conversation_id", "parent_id", "weight", "train"))
_CHAT = _COMMON | {"system", "tools", "reasoning_content"}
_ALPACA_ONLY = frozenset(("input", "history"))
_BESIDE = ("system", "tools", "thought")
_FORMATS = (
    Format("messages", ("messages",), _list_of("messages"), _CHAT | {"messages"}, _BESIDE),
    Format("sharegpt", ("messages",), _list_of("messages"), _CHAT | {"messages"}, _BESIDE),
    Format("sharegpt", ("conversations",), _list_of("conversations"), _CHAT | {"conversations"}, _BESIDE),
    Format("messages", ("conversations",), _list_of("conversations"), _CHAT | {"conversations"}, _BESIDE),
    Format(
        "prompt-completion", ("prompt", "completion"), _prompt_completion, _CHAT | {"prompt", "completion"}, _BESIDE
    ),
    Format(
        "alpaca",
        ("instruction", "output"),
        _alpaca,
        _CHAT | _ALPACA_ONLY | {"instruction", "output"},
        (*_BESIDE, "history", "context"),
    ),
    Format("text", ("text",), _plain, _COMMON | {"text"}),
)
