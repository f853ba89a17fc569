"""Rows of request and response logs of an API, as chats: the request's messages and the response's answer.

    {"request": {"model": "m", "messages": [...]}, "response": {"choices": [{"message": {...}}]}}
    ->  {"messages": [..., {"role": "assistant", ...}], "request.model": "m"}

Read are chat completions (`choices`), with or without the `body` of OpenAI's batches, their older form with `prompt`
and `text`, and Anthropic's messages (`system`, `content`). What else a log holds stays in the row under its dotted
name, and is listed with the keys that are not used. A request without a response, and a response without its
request (the input and the output of a batch are two files), is an error that says how to join them.
"""

from __future__ import annotations

from typing import Any

from solotune.dataset.readers.json_window import parse_json
from solotune.dataset.readers.row import Row, RowError, short

_MARKS = frozenset(("request", "response", "body", "choices"))
_REQUESTS, _RESPONSES = ("request", "body", "input", "kwargs"), ("response", "output", "completion")
_JOIN = """\
join the input and the output of the batch: python -c "import json; q = {r['custom_id']: r['body'] for r in \
map(json.loads, open('input.jsonl'))}; [print(json.dumps({'request': q[r['custom_id']], **r})) for r in \
map(json.loads, open('output.jsonl'))]" > chats.jsonl"""


def from_log(row: Row) -> Row:
    """The row as a chat, if it is an entry of a log; else the same object.

    Raises:
        RowError: the request failed, has no response or is missing, or the answer was cut off.
    """
    values = row.values
    if _MARKS.isdisjoint(values) and not isinstance(values.get("input"), dict):
        return row
    if "preferred_output" in values:  # OpenAI's preference data, which is refused as such
        return row
    request_key, request = _part(values, _REQUESTS, _is_request)
    response_key, response = _part(values, _RESPONSES, _is_response)
    if request_key is None and _is_request(values) and isinstance(response, dict):
        request_key, request = "", {key: one for key, one in values.items() if key != response_key}
    if request is None and response is None:
        if not _is_answer(values) or not isinstance(next(iter(values.get("choices") or ()), None), dict):
            return row
        response = values
    if values.get("error"):
        raise _without_answer(row, short(values["error"]), None)
    if request is None and not isinstance(response, dict):
        return row
    if request is None or response is None:
        if request is None and not _is_answer(response):
            return row
        if request is not None and _ends_with_answer(request):
            return row
        what = (
            "a response of an API without its request"
            if request is None
            else "a request to an API without its response"
        )
        raise RowError(f"{row.where}: {what}", reason=what, seen="the keys " + ", ".join(values), change=_JOIN)
    answer, rest = _answer(row, response)
    chat = _chat(request, answer)
    others = {key: one for key, one in values.items() if request_key and key not in (request_key, response_key)}
    request_rest = {
        key: one for key, one in request.items() if key not in ("messages", "prompt", "system", "tools", "functions")
    }
    for prefix, part in ((f"{request_key}.", request_rest), (f"{response_key}.", rest)):
        others |= {(prefix + key).lstrip("."): one for key, one in part.items()}
    return row._replace(values={**chat, **others})


def _part(values: dict[str, Any], keys: tuple[str, ...], is_meant: Any) -> tuple[str | None, Any]:
    """The key and the value of a request or a response, without the `body` around it; (None, None) if there is none."""
    for key in keys:
        one = values.get(key)
        if isinstance(one, str) and one.lstrip()[:1] == "{":
            try:
                one = parse_json(one)
            except ValueError:
                continue
        if isinstance(one, dict) and isinstance(one.get("body"), dict):
            rest = {name: value for name, value in one.items() if name != "body"}
            one = {**one["body"], **rest}
        if is_meant(one):
            return key, one
    return None, None


def _is_request(value: Any) -> bool:
    return isinstance(value, dict) and (
        isinstance(value.get("messages"), list) or ("model" in value and isinstance(value.get("prompt"), str))
    )


def _is_response(value: Any) -> bool:
    return isinstance(value, str) or _is_answer(value) or (isinstance(value, dict) and "status_code" in value)


def _is_answer(value: Any) -> bool:
    is_anthropic = isinstance(value, dict) and value.get("role") == "assistant" and "content" in value
    return is_anthropic or (isinstance(value, dict) and isinstance(value.get("choices"), list))


def _ends_with_answer(request: dict[str, Any]) -> bool:
    last = (request.get("messages") or [None])[-1]
    return isinstance(last, dict) and last.get("role") == "assistant"


def _answer(row: Row, response: Any) -> tuple[Any, dict[str, Any]]:
    """The answer as a message, or as a text, and what else the response holds."""
    if isinstance(response, str):
        return {"role": "assistant", "content": response}, {}
    rest = {key: one for key, one in response.items() if key not in ("choices", "role", "content")}
    status, reason = response.get("status_code"), response.get("stop_reason")
    if isinstance(status, int) and status >= 400:
        raise _without_answer(row, f"status_code {status}", "remove the row")
    if isinstance(response.get("choices"), list):
        if not response["choices"] or not isinstance(response["choices"][0], dict):
            raise _without_answer(row, short(response["choices"]), "remove the row")
        first = response["choices"][0]
        reason = first.get("finish_reason")
        answer = first.get("message", first.get("text"))
        rest |= {key: one for key, one in first.items() if key not in ("message", "text")}
        if others := response["choices"][1:]:
            rest["choices[1:]"] = others
    else:
        answer = {"role": "assistant", "content": response.get("content")}
    if answer is None:
        raise _without_answer(row, short(response), "remove the row")
    if reason in ("length", "max_tokens", "content_filter"):
        raise RowError(
            f"{row.where}: the API cut off this answer",
            reason="an answer that the API cut off",
            seen=f"finish_reason {reason}",
            allowed="complete answers: the model would learn to stop in the middle",
            change="remove the row, or ask again with a higher limit",
        )
    return answer, rest


def _without_answer(row: Row, seen: str, change: str | None) -> RowError:
    what = "the request to the API failed, so there is no answer"
    return RowError(f"{row.where}: {what}", reason=what, seen=seen, change=change or "remove the row")


def _chat(request: dict[str, Any], answer: Any) -> dict[str, Any]:
    if isinstance(answer, str) and "messages" not in request:
        return {"prompt": request["prompt"], "completion": answer}
    if isinstance(answer, str):
        answer = {"role": "assistant", "content": answer}
    messages = request.get("messages") or [{"role": "user", "content": request.get("prompt")}]
    system = request.get("system")
    before = [{"role": "system", "content": system}] if system else []
    tools = {key: request[key] for key in ("tools", "functions") if request.get(key)}
    return {"messages": [*before, *messages, answer], **tools}
