"""Test rows: chats with content, changes to them, and the findings of the rules on them."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from solotune.dataset import Example, Prepared, prepare
from solotune.diagnosis.facts.row_facts import RowFacts
from solotune.diagnosis.findings import Finding
from solotune.diagnosis.rules import judge
from tests.dataset.conftest import Writer, chat, config_of, tiny_tokenizer

Rows = list[dict[str, Any]]
Change = Callable[[list[Example]], list[Example]]

_SYLLABLES = "ba de fi go lu ma ne pi ro su ta ve wi zo ka".split()


def find(config: Any, tokenizer: PreTrainedTokenizerBase, train: Any, validation: Any, report: Any) -> list[Finding]:
    """Run the rules on rows."""
    return judge(RowFacts.of_config(config, tokenizer, train, validation, report))


def word(rng: random.Random) -> str:
    return "".join(rng.choices(_SYLLABLES, k=rng.randint(2, 4)))


def sentence(rng: random.Random, count: int = 12, *more: str) -> str:
    words = [word(rng) for _ in range(count)] + list(more)
    rng.shuffle(words)
    return " ".join(words).capitalize() + "."


def talk(count: int = 40, *, turns: int = 1, system: str | None = None, seed: int = 0) -> Rows:
    """Chats with content: each answer repeats a word of its question."""
    rng = random.Random(seed)
    rows: Rows = []
    for _ in range(count):
        contents = []
        for _ in range(turns):
            topic = word(rng) + word(rng)
            contents += [sentence(rng, 9, topic)[:-1] + "?", sentence(rng, 14, topic)]
        rows.append({"messages": chat(*contents, system=system)})
    return rows


def each(rows: Rows, change: Callable[[int, list[dict[str, Any]]], list[dict[str, Any]]]) -> Rows:
    return [{"messages": change(number, row["messages"])} for number, row in enumerate(rows)]


def answered(rows: Rows, answer: Callable[[int, str], str]) -> Rows:
    """The rows with changed answers."""

    def change(number: int, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**m, "content": answer(number, m["content"])} if m["role"] == "assistant" else m for m in messages]

    return each(rows, change)


def with_template(family: str, template: str) -> PreTrainedTokenizerBase:
    tokenizer = copy.deepcopy(tiny_tokenizer(family))
    tokenizer.chat_template = template
    return tokenizer


def id_of(family: str, token: str) -> int:
    """The id of a token in the tiny tokenizer of a family."""
    backend: Any = tiny_tokenizer(family)
    return int(backend.convert_tokens_to_ids(token))


def with_pad(family: str) -> PreTrainedTokenizerBase:
    """A tokenizer with a separate padding token, which no row uses."""
    tokenizer = copy.deepcopy(tiny_tokenizer(family))
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer


class Bench:
    """Rows -> findings, through `prepare`; `change` damages the prepared examples of both sides."""

    def __init__(self, write: Writer, folder: Path) -> None:
        self._write, self._folder = write, folder

    def model(self, **files: dict[str, Any]) -> str:
        """Write a model folder with config.json (`config`) and generation_config.json (`generation_config`)."""
        for name, content in files.items():
            (self._folder / f"{name}.json").write_text(json.dumps(content))
        return str(self._folder)

    def prepared(self, rows: Rows, tokenizer: PreTrainedTokenizerBase, **keys: Any) -> tuple[Any, Prepared]:
        config = config_of(self._write("a.jsonl", *rows), **{"validation_size": 0.25, **keys})
        return config, prepare(config, tokenizer)

    def find(
        self,
        rows: Rows,
        tokenizer: PreTrainedTokenizerBase | str = "chatml",
        change: Change = list,
        **keys: Any,
    ) -> list[Finding]:
        if isinstance(tokenizer, str):
            tokenizer = tiny_tokenizer(tokenizer)
        config, result = self.prepared(rows, tokenizer, **keys)
        return find(config, tokenizer, change(list(result.train)), change(list(result.validation)), result.report)

    def codes(self, *args: Any, **keys: Any) -> list[str]:
        return [finding.code for finding in self.find(*args, **keys)]

    def only(self, code: str, *args: Any, **keys: Any) -> Finding:
        """The only finding."""
        found = self.find(*args, **keys)
        assert [finding.code for finding in found] == [code], [(f.code, f.message) for f in found]
        return found[0]


def masked(which: Callable[[Example], np.ndarray]) -> Change:
    """Replace the mask of examples."""
    return lambda rows: [replace(row, loss_mask=which(row)) for row in rows]


def with_own_template(bench: Bench, own: PreTrainedTokenizerBase, eos: str) -> str:
    """A model folder whose tokenizer has its own template, and whose generation stops at `eos`."""
    folder = bench.model(generation_config={"eos_token_id": own.convert_tokens_to_ids(eos)})
    own.save_pretrained(folder)
    return folder
