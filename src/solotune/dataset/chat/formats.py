"""Data formats: convert each supported shape of a row to a list of `{"role", "content"}` messages, or to a text.

| format | row |
|---|---|
| messages | `{"messages": [{"role": "user", "content": "..."}, ...]}` (also under `conversations`) |
| sharegpt | `{"conversations": [{"from": "human", "value": "..."}, ...]}`; a call is `from: function_call`, JSON text |
| alpaca | `{"instruction": "...", "input": "...", "output": "..."}` |
| prompt-completion | `{"prompt": "...", "completion": "..."}`, both texts or both messages |
| text | `{"text": "..."}`, all of it trained on |

The first row decides, and every other row must have the same shape: a file of two shapes is usually two files joined by
mistake, and detecting the shape row by row would hide that. A wrong row is an error with its place, or with
`on_bad_row: drop` is dropped and counted; then the most common shape decides, since the first row may be a bad one.
Always dropped, and counted, are a row whose answer is blank (real exports are full of them, they teach the model to
stop at once, and nothing in the row can be fixed) and a row with weight 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from solotune.dataset.chat import messages as msg
from solotune.dataset.chat.tool_calls import check_order, normal_calls
from solotune.dataset.readers.row import Row, RowError, short

EMPTY_ANSWER = "empty answer"
WEIGHT_0 = "weight 0"
_MEDIA_KEYS = ("images", "image", "videos", "video", "audios", "audio")
_ALLOWED = "messages, conversations, instruction + output, prompt + completion, or text"


@dataclass(frozen=True, slots=True)
class Record:
    """One row in the common shape that all later steps use.

    `messages` is empty exactly for a row of plain text; then `text` is trained on, from `answer_start` on.
    `weights` has one number for each assistant message, 0 where it is context only; it is empty if all are
    1. `weight` is the row's, and multiplies them. `group` is the group that the row names; `groups.py`
    decides whether it counts, and what else joins rows.
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
        raise _unknown(first)
    return found, f"as in {first.where}" if is_strict else "as most rows"


def check_shape(row: Row, found: Format, why: str) -> None:
    """Refuse a row that lacks the keys of the format.

    Args:
        why: where the format comes from, for the message: `as in chats.jsonl:1`.
    """
    # None stands for a missing key in parquet and arrow
    missing = [key for key in found.keys if row.values.get(key) is None]
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


def _unknown(row: Row) -> RowError:
    return RowError(
        f"{row.where}: not a known format",
        reason="not a known format",
        seen="the keys " + ", ".join(map(str, row.values)) if row.values else "no keys",
        allowed=_ALLOWED,
        change=_hint(row.values),
    )


def _format_of(values: dict[str, Any]) -> Format | None:
    """The first format, in this order, whose keys the row has: `messages` wins over a `prompt` beside it."""
    for found in _FORMATS:
        if all(values.get(key) is not None for key in found.keys):
            if found.name == "sharegpt" and not _is_sharegpt(values["conversations"]):
                continue
            return found
    return None


def _is_sharegpt(turns: Any) -> bool:
    first = turns[0] if isinstance(turns, list) and turns else {}
    return not (isinstance(first, dict) and "role" in first)


def _is_preference(values: dict[str, Any]) -> bool:
    return any(key.startswith("chosen") for key in values) and any(key.startswith("rejected") for key in values)


def _hint(values: dict[str, Any]) -> str | None:
    if _is_preference(values):
        mapping = "column_mapping: {chosen: completion}"
        is_split = "prompt" in values and "chosen" in values
        return "this is preference data, but fine-tuning uses one answer per row: " + (
            mapping if is_split else "put the prompt and the chosen answer under prompt and completion"
        )
    if "role" in values and "content" in values:
        return "each row is a single message; put all messages of a conversation into one row, as a list under messages"
    pairs = (("question", "answer"), ("input", "output"), ("query", "response"), ("prompt", "response"))
    for prompt, answer in pairs:
        if prompt in values and answer in values:
            return f"column_mapping: {{{prompt}: prompt, {answer}: completion}}"
    return "rename your columns, for example column_mapping: {your_column: text}" if values else None


def convert(row: Row, found: Format) -> Record | str:
    """Convert a row to a Record; or return the reason why it is dropped without being wrong.

    Raises:
        RowError: the row is wrong; names the row and the message in it.
    """
    record = found.convert(row)
    weight = msg.weight_of(row.where, row.values)
    if weight == 0:
        return WEIGHT_0
    record = replace(record, weight=weight)
    if not record.is_chat:
        return record if record.text[record.answer_start :].strip() else EMPTY_ANSWER
    _check_has_answer(record, row.values)
    _check_text_only(row)
    if record.weights and not any(record.weights):
        return WEIGHT_0
    if any(_is_blank(message) for message in record.messages if message["role"] == "assistant"):
        return EMPTY_ANSWER
    return record


def _is_blank(message: dict[str, Any]) -> bool:
    return not message["content"].strip() and not message.get("tool_calls")


def _check_text_only(row: Row) -> None:
    if media := [key for key in _MEDIA_KEYS if row.values.get(key)]:
        raise RowError(
            f"{row.where}: the row has {media[0]}, but only text can be trained on",
            reason=f"has {media[0]}",
            allowed="text only",
            change=f"remove the row; if its text makes sense alone, column_mapping: {{{media[0]}: ignore}}",
        )


def _check_has_answer(record: Record, values: dict[str, Any]) -> None:
    roles = [message["role"] for message in record.messages]
    if "assistant" not in roles:
        raise RowError(
            f"{record.where}: no assistant message, so there is nothing to train on",
            reason="no assistant message",
            seen="the roles " + ", ".join(roles),
            allowed="at least one message with the role assistant",
            change="this is preference data; add the chosen answer to the messages"
            if _is_preference(values)
            else "remove the row, or add the answer",
        )


# --- the formats


def _messages(row: Row) -> Record:
    return _checked(row, *msg.turns(row.where, row.values["messages"], "messages"))


def _conversations(row: Row) -> Record:
    return _checked(row, *msg.turns(row.where, row.values["conversations"], "conversations"))


def _checked(row: Row, messages: list[dict[str, Any]], weights: tuple[float, ...]) -> Record:
    check_order([f"{row.where}: message {number}" for number in range(1, len(messages) + 1)], messages)
    return _chat(row, messages, weights)


def _chat(row: Row, messages: list[dict[str, Any]], weights: tuple[float, ...] = ()) -> Record:
    is_plain = all(weight == 1 for weight in weights)
    return Record(row.where, messages=messages, tools=msg.tools(row), weights=() if is_plain else weights)


def _with_system(row: Row, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A `system` column as the first message, unless the messages begin with one."""
    system = row.values.get("system")
    if not isinstance(system, str) or not system.strip() or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _sharegpt(row: Row) -> Record:
    turns = row.values["conversations"]
    msg.check_list(row.where, turns, "conversations")
    places = [f"{row.where}: turn {number}" for number in range(1, len(turns) + 1)]
    messages = []
    for place, turn in zip(places, turns, strict=True):
        if not isinstance(turn, dict):
            raise msg.not_an_object(place, turn, '{"from": "human", "value": "..."}')
        role = turn.get("from")
        if not isinstance(role, str) or role not in msg.SHAREGPT_ROLES:
            raise RowError(
                f"{place}: unknown speaker",
                reason="unknown speaker",
                seen=short(role),
                allowed=", ".join(msg.SHAREGPT_ROLES),
            )
        if role == "function_call":
            calls = normal_calls(place, turn.get("value"), "function_call")
            messages.append({"role": "assistant", "content": "", "tool_calls": calls})
        else:
            messages.append({"role": msg.SHAREGPT_ROLES[role], "content": msg.text(place, turn.get("value"), "value")})
    check_order(places, messages)
    return _chat(row, _with_system(row, messages), msg.answer_weights(places, turns, messages))


def _alpaca(row: Row) -> Record:
    values = row.values
    instruction = msg.text(row.where, values["instruction"], "instruction")
    extra = msg.text(row.where, values.get("input") or "", "input")
    answer = msg.text(row.where, values["output"], "output")
    messages = [
        {"role": "user", "content": f"{instruction}\n\n{extra}" if extra.strip() else instruction},
        {"role": "assistant", "content": answer},
    ]
    return _chat(row, _with_system(row, messages))


def _prompt_completion(row: Row) -> Record:
    prompt, completion = row.values["prompt"], row.values["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        before, in_prompt = msg.turns(row.where, prompt, "prompt")
        after, weights = msg.turns(row.where, completion, "completion")
        # only the completion is trained on: an answer in the prompt is context
        return _checked(row, before + after, (*(0.0 for _ in in_prompt), *weights))
    prompt, completion = msg.text(row.where, prompt, "prompt"), msg.text(row.where, completion, "completion")
    return Record(row.where, text=prompt + completion, answer_start=len(prompt))


def _plain(row: Row) -> Record:
    return Record(row.where, text=msg.text(row.where, row.values["text"], "text"))


_FORMATS = (
    Format("messages", ("messages",), _messages),
    Format("sharegpt", ("conversations",), _sharegpt),
    Format("messages", ("conversations",), _conversations),
    Format("prompt-completion", ("prompt", "completion"), _prompt_completion),
    Format("alpaca", ("instruction", "output"), _alpaca),
    Format("text", ("text",), _plain),
)
