"""A finished run is sampled and chatted with in the format that it was trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import solotune
from solotune.dataset import render_prompt
from solotune.errors import InputError
from solotune.evaluation import generation

PAIRS = [{"prompt": f"twice {i}\nis:", "completion": f" it is {2 * i}"} for i in range(40)]
RENDERED = [
    {"text": f"<|im_start|>user\ntwice {i}<|im_end|>\n<|im_start|>assistant\nit is {2 * i}<|im_end|>\n"}
    for i in range(40)
]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The prompts that models were asked, as ids."""
    prompts: list[list[int]] = []
    generate = generation.generate

    def recorded(model: Any, prompt_ids: Any, *rest: Any, **keys: Any) -> list[int]:
        prompts.append(list(prompt_ids))
        return generate(model, prompt_ids, *rest, **keys)

    monkeypatch.setattr(generation, "generate", recorded)
    return prompts


@pytest.fixture
def trained(chat_config: dict[str, Any], tmp_path: Path) -> Callable[..., Any]:
    """Train on rows for two steps, in the folder `run`."""

    def train(rows: list[dict[str, Any]], **keys: Any) -> Any:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return solotune.train({**chat_config, "dataset": "rows.jsonl", "max_steps": 2, "num_samples": 2, **keys})

    return train


def test_prompt_and_completion_are_asked_without_a_template(trained: Any, asked: list[list[int]]) -> None:
    samples = trained(PAIRS).evaluation.samples
    assert json.loads(Path("run/data.json").read_text())["prompt_format"] == "text"
    assert [(s.prompt, s.reference) in [(p["prompt"], p["completion"]) for p in PAIRS] for s in samples] == [True] * 2
    asked.clear()
    session = solotune.chat("run")
    heard: list[str] = []
    answer = session.reply("twice 3\nis:", on_text=heard.append)
    session.reply("twice 3\nis:", base=True)
    session.reply("twice 4\nis:")
    texts = [session._tokenizer.decode(ids) for ids in asked]
    assert texts == ["twice 3\nis:", "twice 3\nis:", "twice 4\nis:"]  # no history
    assert ("".join(heard), session.history) == (answer, [])
    with pytest.raises(InputError, match="the prompt is empty"):
        session.reply("")


def test_a_run_that_did_not_record_its_format_is_asked_through_the_template(
    trained: Any, asked: list[list[int]]
) -> None:
    trained(PAIRS, num_samples=0)
    path = Path("run/data.json")
    data = json.loads(path.read_text())
    del data["prompt_format"]
    path.write_text(json.dumps(data))
    session = solotune.chat("run")
    session.reply("twice 3")
    assert asked == [render_prompt(session._tokenizer, [{"role": "user", "content": "twice 3"}])]
    path.unlink()
    assert solotune.chat("run").prompt_format == "chat"
    path.write_text("[]")
    with pytest.raises(InputError, match=r"data\.json: not a JSON object"):
        solotune.chat("run")
    path.write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        solotune.chat("run")


def test_rendered_texts_are_asked_through_the_template_that_rendered_them(trained: Any, asked: list[list[int]]) -> None:
    samples = trained(RENDERED).evaluation.samples
    assert all(sample.reference.startswith("it is ") for sample in samples)
    assert asked[0][-11:] == asked[2][-11:]  # <|im_start|>assistant\n
    asked.clear()
    session = solotune.chat("run")
    session.reply("twice 3")
    assert asked == [render_prompt(session._tokenizer, [{"role": "user", "content": "twice 3"}])]
    assert len(session.history) == 2
