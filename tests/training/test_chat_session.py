"""A finished run is sampled and chatted with as it was trained: its format, its system prompt, its ends."""

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
    generate, generate_all = generation.generate, generation.generate_all

    def recorded(model: Any, prompt_ids: Any, *rest: Any, **keys: Any) -> list[int]:
        prompts.append(list(prompt_ids))
        return generate(model, prompt_ids, *rest, **keys)

    def recorded_all(model: Any, each: Any, *rest: Any, **keys: Any) -> Any:
        prompts.extend(list(ids) for ids in each)
        return generate_all(model, each, *rest, **keys)

    monkeypatch.setattr(generation, "generate", recorded)
    monkeypatch.setattr(generation, "generate_all", recorded_all)
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


SYSTEM = "You are the support agent of Kestrel Home."


def chats(*systems: str | None) -> list[dict[str, Any]]:
    """40 chats; the system prompts are used in turn."""
    rows = []
    for number in range(40):
        system = systems[number % len(systems)]
        turns = [
            {"role": "user", "content": f"twice {number}"},
            {"role": "assistant", "content": f"it is {2 * number}"},
        ]
        rows.append({"messages": [*([{"role": "system", "content": system}] if system else []), *turns]})
    return rows


def test_a_chat_has_the_system_prompt_that_all_rows_share(trained: Any, asked: list[list[int]]) -> None:
    trained(chats(SYSTEM), num_samples=0, max_length=128)
    recorded = json.loads(Path("run/data.json").read_text())
    assert recorded["system_prompt"] == {"text": SYSTEM, "rows": 30, "of": 30}
    session = solotune.chat("run")
    assert session.system == SYSTEM
    session.reply("twice 3")
    opening, question = {"role": "system", "content": SYSTEM}, {"role": "user", "content": "twice 3"}
    assert asked == [render_prompt(session._tokenizer, [opening, question])]
    assert session.messages()[:2] == [opening, question]
    session.reset("Be brief.")
    assert session.messages() == [{"role": "system", "content": "Be brief."}]
    session.reset("")
    assert session.messages() == []
    assert solotune.chat("run", system="").system is None
    assert solotune.chat("run", system="Be brief.").system == "Be brief."


def test_rows_with_several_system_prompts_leave_the_choice_to_the_user(trained: Any) -> None:
    trained(chats(SYSTEM, SYSTEM, "Be brief.", None), num_samples=0, max_length=128)
    session = solotune.chat("run")
    assert session.system is None
    assert session.trained_system is not None
    text, rows, total = session.trained_system
    assert text == SYSTEM and 0 < rows < total == 30


def test_the_base_has_a_conversation_of_its_own(trained: Any, asked: list[list[int]]) -> None:
    trained(chats(None), num_samples=0)
    session = solotune.chat("run")
    assert (session.system, session.trained_system) == (None, None)
    first = session.reply("one", base=True)
    session.reply("one")
    session.reply("two", base=True)
    expected = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "two"},
    ]
    assert asked[2] == render_prompt(session._tokenizer, expected)
    assert len(session.base_history) == 4 and len(session.history) == 2


def test_an_answer_ends_at_the_token_that_ends_the_rows(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(chats(None), num_samples=0)
    path = Path("run/data.json")
    data = json.loads(path.read_text())
    session = solotune.chat("run")
    ends = {int(token) for token in data["answer_ends"]}
    assert ends & set(session._stops)
    special = next(i for i in session._tokenizer.all_special_ids if i not in session._stops)
    path.write_text(json.dumps({**data, "answer_ends": {str(special): 38}}))
    assert special in solotune.chat("run")._stops


def test_a_model_of_plain_text_takes_no_system_prompt(trained: Any) -> None:
    trained(PAIRS, num_samples=0)
    with pytest.raises(InputError, match="has no system prompt"):
        solotune.chat("run", system=SYSTEM)
    session = solotune.chat("run", system="")
    with pytest.raises(InputError, match="has no system prompt"):
        session.reset(SYSTEM)
