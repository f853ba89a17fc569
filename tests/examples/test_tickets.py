"""The demo's data: reproducible, honest to split by shop, and every record derivable from its message."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
KEYS = ["intent", "item", "qty", "order", "city", "urgent"]
NUMBERS = "two three four five six seven eight nine ten eleven twelve".split()


@pytest.fixture(scope="module")
def tickets() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tickets", EXAMPLES / "tickets.py")
    assert spec
    assert spec.loader
    module = sys.modules["tickets"] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    lines = (EXAMPLES / "tickets.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def parts(row: dict) -> tuple[str, dict]:
    return row["messages"][1]["content"], json.loads(row["messages"][2]["content"])


def shared_by_shops(rows: list[dict], found_in) -> dict[str, set[str]]:
    """What ``found_in(row)`` finds in the rows of more than one shop."""
    shops = defaultdict(set)
    for row in rows:
        for thing in found_in(row):
            shops[thing].add(row["shop"])
    return {thing: owners for thing, owners in shops.items() if len(owners) > 1}


def test_generator_reproduces_the_committed_file(tmp_path: Path) -> None:
    out = tmp_path / "tickets.jsonl"
    subprocess.run([sys.executable, EXAMPLES / "tickets.py", out], check=True, capture_output=True)
    assert out.read_bytes() == (EXAMPLES / "tickets.jsonl").read_bytes()


def test_shops_are_even(rows: list[dict]) -> None:
    assert set(Counter(row["shop"] for row in rows).values()) == {60}
    assert set(Counter((row["shop"], parts(row)[1]["intent"]) for row in rows).values()) == {12}


def test_shops_share_no_entity(rows: list[dict], tickets: ModuleType) -> None:
    def entities(row: dict) -> list[str]:
        message, record = parts(row)
        names = [name for name in tickets.NAMES if re.search(rf"\b{name}\b", message)]
        codes = [record["order"], record["order"][:2]] if record["order"] else []
        return [*names, *codes, *record["item"].split(), *filter(None, [record["city"]])]

    assert shared_by_shops(rows, entities) == {}


def test_shops_share_no_sentence(rows: list[dict], tickets: ModuleType) -> None:
    def sentences(row: dict) -> list[str]:
        message, record = parts(row)
        fillers = dict.fromkeys(tickets.NAMES, "NAME")
        fillers |= {tickets.plural(record["item"]): "ITEM", record["item"]: "ITEM"}
        fillers |= {record[key]: key.upper() for key in ("order", "city") if record[key]}
        if record["qty"]:
            fillers |= {str(record["qty"]): "QTY", NUMBERS[record["qty"] - 2]: "QTY"}
        for filler, label in fillers.items():
            message = re.sub(rf"\b{filler}\b", label, message)
        return re.split(r"(?<=[.!?]) ", message)

    assert shared_by_shops(rows, sentences) == {}


def test_answers_are_strict_compact_json(rows: list[dict]) -> None:
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
        answer = row["messages"][2]["content"]
        record = json.loads(answer)
        assert list(record) == KEYS
        assert json.dumps(record, separators=(",", ":")) == answer
        assert record["intent"] in {"buy", "cancel", "refund", "replace", "status"}
        assert type(record["urgent"]) is bool
        assert type(record["item"]) is str
        for key, kind in (("qty", int), ("order", str), ("city", str)):
            assert record[key] is None or type(record[key]) is kind


def test_records_follow_from_the_message(rows: list[dict], tickets: ModuleType) -> None:
    number = "|".join([*NUMBERS, r"\d+"])
    for row in rows:
        message, record = parts(row)
        codes = re.findall(r"\b[A-Z]{2}-\d{4}\b", message)
        assert codes == ([record["order"]] if record["order"] else []), message
        cities = [city for city in tickets.CITIES if re.search(rf"\b{city}\b", message)]
        assert cities == ([record["city"]] if record["city"] else []), message
        forms = f"{tickets.plural(record['item'])}|{record['item']}"
        mentions = re.findall(rf"(?:\b({number}) )?\b(?:{forms})\b", message)
        assert len(mentions) == 1, message
        (word,) = mentions
        quantity = None if not word else NUMBERS.index(word) + 2 if word in NUMBERS else int(word)
        assert quantity == record["qty"], message


def test_urgency_follows_from_the_closing(rows: list[dict], tickets: ModuleType) -> None:
    for row in rows:
        message, record = parts(row)
        assert any(message.endswith(f" {closing}") for closing in tickets.URGENT) == record["urgent"], message
