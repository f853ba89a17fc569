"""Entries of request and response logs become chats; what has no answer is a bad row with a way out."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from solotune.dataset.readers.api_logs import from_log
from solotune.dataset.readers.row import Row, RowError
from tests.dataset.conftest import Door

ASKED = [{"role": "user", "content": "2 + 2?"}]
ANSWER = {"role": "assistant", "content": "4"}
CHAT = [*ASKED, ANSWER]
REQUEST = {"model": "m", "messages": ASKED}
RESPONSE = {"id": "c1", "choices": [{"index": 0, "message": ANSWER, "finish_reason": "stop"}]}
REST = {"response.id": "c1", "response.index": 0, "response.finish_reason": "stop"}

LOGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "request and response": (
        {"custom_id": "0", "request": REQUEST, "response": RESPONSE},
        {"messages": CHAT, "custom_id": "0", "request.model": "m", **REST},
    ),
    "with bodies": (
        {"request": {"body": REQUEST, "url": "/v1"}, "response": {"status_code": 200, "body": RESPONSE}, "error": None},
        {"messages": CHAT, "error": None, "request.model": "m", "request.url": "/v1", "response.status_code": 200, **REST},
    ),
    "input of a batch with its response": (
        {"method": "POST", "body": {**REQUEST, "tools": [{"name": "f"}]}, "response": {"body": RESPONSE}},
        {"messages": CHAT, "tools": [{"name": "f"}], "method": "POST", "body.model": "m", **REST},
    ),
    "JSON texts": (
        {"request": json.dumps(REQUEST), "response": json.dumps(RESPONSE)},
        {"messages": CHAT, "request.model": "m", **REST},
    ),
    "messages beside the response": (
        {"messages": ASKED, "response": RESPONSE},
        {"messages": CHAT, **REST},
    ),
    "input and output": ({"input": REQUEST, "output": ANSWER}, {"messages": CHAT, "input.model": "m"}),
    "a text as response": ({"request": REQUEST, "response": "4"}, {"messages": CHAT, "request.model": "m"}),
    "completions": (
        {"request": {"model": "m", "prompt": "2 + 2 ="}, "response": {"choices": [{"text": " 4"}]}},
        {"prompt": "2 + 2 =", "completion": " 4", "request.model": "m"},
    ),
    "Anthropic": (
        {"request": {**REQUEST, "system": "Be brief."}, "response": {"role": "assistant", "content": [{"type": "text", "text": "4"}]}},
        {"messages": [{"role": "system", "content": "Be brief."}, *ASKED, {"role": "assistant", "content": [{"type": "text", "text": "4"}]}],
         "request.model": "m"},
    ),
    "several choices": (
        {"request": REQUEST, "response": {"choices": [{"message": ANSWER}, {"message": {"role": "assistant", "content": "5"}}]}},
        {"messages": CHAT, "request.model": "m", "response.choices[1:]": [{"message": {"role": "assistant", "content": "5"}}]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("log", LOGS)
def test_logs(log: str) -> None:
    values, wanted = LOGS[log]
    assert from_log(Row("a.jsonl:1", values)).values == wanted


@pytest.mark.parametrize(
    "values",
    [
        {"messages": CHAT},
        {"request": "a", "response": "b"},
        {"prompt": "a", "response": "b"},
        {"question": "a", "choices": ["b", "c"], "answer": 0},
        {"body": "a text", "text": "b"},
        {"body": {"a": 1}, "text": "b"},
        {"instruction": "a", "input": "{}", "output": "b"},
        {"messages": ASKED, "response": "4"},
        {"messages": CHAT, "request": {"messages": CHAT}},
    ],
)
def test_other_rows_stay_as_they_are(values: dict[str, Any]) -> None:
    row = Row("a.jsonl:1", values)
    assert from_log(row) is row


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"body": REQUEST}, "a request to an API without its response"),
        ({"response": {"body": RESPONSE}}, "a response of an API without its request"),
        (RESPONSE, "a response of an API without its request"),
        ({"request": REQUEST, "response": None, "error": {"code": 1}}, "the request to the API failed"),
        ({"request": REQUEST, "response": {"status_code": 429, "body": {}}}, "the request to the API failed"),
        ({"request": REQUEST, "response": {"choices": []}}, "the request to the API failed"),
        ({"request": REQUEST, "response": {"choices": [{"message": None}]}}, "the request to the API failed"),
        ({"request": REQUEST, "response": {"choices": [{"message": ANSWER, "finish_reason": "length"}]}}, "cut off"),
    ],
)
def test_what_has_no_answer_is_a_bad_row(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(RowError, match=problem) as caught:
        from_log(Row("a.jsonl:1", values))
    assert caught.value.change


def test_input_and_output_of_a_batch_are_joined_by_the_command_that_is_advised(door: Door) -> None:
    def write(name: str, rows: list[dict[str, Any]]) -> None:
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def one(n: int) -> dict[str, Any]:
        return {"choices": [{"message": {"role": "assistant", "content": f"it is {n}"}, "finish_reason": "stop"}]}

    asked = [[{"role": "user", "content": f"What is {n}?"}] for n in range(4)]
    write("input.jsonl", [{"custom_id": f"r{n}", "body": {"messages": asked[n]}} for n in range(4)])
    write("output.jsonl", [{"custom_id": f"r{n}", "response": {"body": one(n)}, "error": None} for n in (2, 0, 1, 3)])
    change = door("output.jsonl").content["error"]["change"]
    assert door("input.jsonl").content["error"]["change"] == change
    command = change.partition(": ")[2].rpartition(" > ")[0]
    done = subprocess.run([sys.executable, *shlex.split(command)[1:]], check=True, stdout=subprocess.PIPE)
    Path("chats.jsonl").write_bytes(done.stdout)
    found = door("chats.jsonl")
    assert found.content["rows"]["kept"] == 4
    assert "What is 2?" in str(found.content["shown"][0])
    assert "it is 2" in str(found.content["shown"][0])
