"""Rows that look odd but are right: no rule reports them."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from tests.dataset.conftest import CHATML, FAMILIES, chat, tiny_tokenizer
from tests.diagnosis.rules.rows import Bench, answered, each, sentence, talk, with_template


@pytest.mark.parametrize("family", [f for f, (t, *_) in FAMILIES.items() if t and f not in ("glm", "deepseek")])
@pytest.mark.parametrize("turns", [1, 3])
def test_every_family_is_silent(bench: Bench, family: str, turns: int) -> None:
    assert bench.codes(talk(turns=turns), family, chat_template_path="my.jinja") == []
    if family not in ("gemma", "mistral"):
        assert bench.codes(talk(turns=turns, system=sentence(random.Random(7), 30)), family) == []


def test_pad_is_eos_and_padding_on_the_left(bench: Bench, smollm2: PreTrainedTokenizerBase) -> None:
    assert smollm2.pad_token_id == smollm2.eos_token_id
    tokenizer = copy.deepcopy(smollm2)
    tokenizer.padding_side = "left"
    assert bench.codes(talk(), tokenizer, model_name_or_path=str(smollm2.name_or_path)) == []


def test_a_base_model_with_a_format_of_its_own(bench: Bench) -> None:
    words = (
        "{% for m in messages %}{% if m.role == 'user' %}### User: {{ m.content }}\n### Answer:"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    zephyr = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    for template in (words, zephyr):
        assert bench.codes(talk(turns=2), with_template("gpt2", template), chat_template_path="my.jinja") == []


_WORLD = [
    "今天天气很好,我们去公园散步吧。",
    "ما هي عاصمة فرنسا؟ باريس هي العاصمة.",
    "Сегодня хорошая погода, пойдём гулять.",
    "Was für ein schöner Tag! »Großer Spaß« – ja…",
    "São João é amanhã, não é? À noite há música.",
    "नमस्ते, आप कैसे हैं? 👩‍👩‍👧‍👦🎉🇫🇷",
    "오늘은 날씨가 좋네요. ありがとうございます。",
    "Tiếng Việt: Đây là một câu hỏi rất hay. ALLÉ» É«",
]


def test_other_languages(bench: Bench, smollm2: PreTrainedTokenizerBase) -> None:
    rows = [
        {"messages": chat(_WORLD[n % 8] + f" {n} " + _WORLD[n % 7], f"{_WORLD[n % 5]} {n * n} " + _WORLD[(n + 3) % 8])}
        for n in range(40)
    ]
    for tokenizer in (tiny_tokenizer("chatml"), tiny_tokenizer("mistral"), smollm2):
        # the rows do repeat themselves
        assert set(bench.codes(rows, tokenizer)) <= {"F39", "F44"}


def test_training_on_all_tokens_on_purpose(bench: Bench) -> None:
    for family in ("chatml", "llama3", "gemma"):
        assert bench.codes(talk(turns=2), family, assistant_only_loss=False) == []


@pytest.mark.parametrize("share", [2, 20])
def test_two_labels(bench: Bench, share: int) -> None:
    rows = answered(talk(120), lambda n, text: "positive" if n % share else "negative")
    assert bench.codes(rows) == []
    rows = answered(talk(120), lambda n, text: f"The mood of this text is {'good' if n % share else 'bad'}.")
    assert bench.codes(rows) == []


def test_unanswerable_and_the_class_none(bench: Bench) -> None:
    assert bench.codes(answered(talk(), lambda n, text: "No answer." if n % 3 == 0 else text)) == []
    assert bench.codes(answered(talk(), lambda n, text: ("none", "null", "bug", "wish")[n % 4])) == []


def test_a_row_truncated_after_a_space_is_not_a_row_without_an_end(bench: Bench) -> None:
    """max_length is at one of the line breaks that fill every answer."""
    rows = answered(talk(120), lambda n, text: text + " \n\n" * (100 * (n in (5, 50, 90, 100))))
    assert bench.codes(rows, max_length=300, on_bad_row="error") == []


def test_rows_that_fit_exactly(bench: Bench) -> None:
    rows = [{"messages": chat(f"Q{n}?", f"{n * 7}.")} for n in range(500, 600)]
    rows = [row for row in rows if "22" not in str(row)]  # one token
    (length,) = {len(e.input_ids) for e in bench.prepared(rows, tiny_tokenizer("chatml"))[1].train}
    assert bench.codes(rows, max_length=length, assistant_only_loss=False) == []


def test_a_few_long_rows(bench: Bench) -> None:
    rows = answered(talk(120), lambda n, text: text * (1 + 6 * (n in (5, 50, 90))))
    tokens = sorted(len(e.input_ids) for e in bench.prepared(rows, tiny_tokenizer("chatml"))[1].train)
    assert bench.codes(rows, max_length=tokens[-6] + 1) == []


def test_rows_in_parts(bench: Bench) -> None:
    assert bench.codes(talk(turns=4), max_length=200, overflow="split") == []


def test_code(bench: Bench) -> None:
    snippets = [
        'print("a\\nb\\nc", end="\\n\\n")',
        '```c\nprintf("%d\\n\\t\\x00", x[0] ^ ~y);\n```',
        "regex: `\\n+\\r\\n` matches <br/> and \\u00e9",
        "for (;;) { s += '\\n' + \"\\n\"; } // <|x|> [INST] ###",
    ]
    rows = answered(talk(), lambda n, text: f"{text} {snippets[n % 4]}")
    assert bench.codes(rows) == []


@pytest.mark.parametrize("count", [2, 4, 12])
def test_a_small_data_set(bench: Bench, count: int) -> None:
    assert bench.codes(talk(count), validation_size=1) == []
    assert bench.codes(answered(talk(count), lambda n, text: "yes"), validation_size=1) == [] or count == 12


def test_thinking_and_tools(bench: Bench) -> None:
    think = answered(talk(turns=2), lambda n, text: f"<think>\n{sentence(random.Random(n))}\n</think>\n\n{text}")
    (said,) = bench.find(think, "qwen3")  # the thoughts of the first turns: a remark
    assert (said.slug, said.signal) == ("thoughts-dropped", None)
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "get_weather", "arguments": {"city": "Paris"}}}]}
    told = {"role": "tool", "content": "It is 22 degrees."}
    assert bench.codes(each(talk(), lambda n, m: [m[0], call, told, told, m[1]]), "qwen3") == []

    # a call is what the row is for
    def called(n: int) -> dict[str, Any]:
        return {
            "role": "assistant",
            "tool_calls": [{"name": f"get_{n}", "arguments": f'{{"city": "{sentence(random.Random(n))}"}}'}],
        }

    assert bench.codes(each(talk(), lambda n, m: [*m, m[0], called(n)]), "qwen3") == []


def test_thoughts_may_repeat_the_question(bench: Bench) -> None:
    def think(n: int, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [messages[0], {**messages[1], "reasoning_content": f"The user says: {messages[0]['content']}"}]

    template = CHATML.replace("{{ m.content }}", "{{ m.reasoning_content }}{{ m.content }}")
    assert bench.codes(each(talk(), think), with_template("chatml", template)) == []


def test_intended_orders_of_turns(bench: Bench) -> None:
    greeting = {"role": "assistant", "content": "Hello, how are you?"}
    assert bench.codes(each(talk(), lambda n, m: [{**greeting, "content": f"Hello, {n}!"}, *m])) == []
    asks = each(talk(), lambda n, m: [{**m[0], "content": m[1]["content"]}, {**m[1], "content": m[0]["content"]}])
    assert bench.codes(asks) == []
    assert bench.codes(each(talk(), lambda n, m: [*m, {"role": "user", "content": f"Thanks {n}!"}])) == []
    assert bench.codes(talk(turns=3), train_on_last_turn=True) == []


def test_one_instruction_for_all_rows(bench: Bench) -> None:
    instruction = sentence(random.Random(1), 20)
    rows = each(talk(), lambda n, m: [{**m[0], "content": f"{instruction}\n\n{m[0]['content']}"}, m[1]])
    assert [c for c in bench.codes(rows) if c != "F39"] == []
    assert bench.codes(talk(system=sentence(random.Random(2), 200))) == []


def test_sorted_rows(bench: Bench) -> None:
    """Neighbouring rows on one topic: a prompt shares words with its own answer and with those of its neighbours."""
    rows = talk(60)
    rows = each(rows, lambda n, m: [{**x, "content": x["content"] + f" topic{n // 3}"} for x in m])
    assert bench.codes(rows) == []


def test_documents_for_a_chat_model(bench: Bench) -> None:
    assert bench.codes([{"text": sentence(random.Random(n), 80)} for n in range(40)]) == []


def test_padded_embedding_and_several_stop_ids(bench: Bench) -> None:
    tokenizer = tiny_tokenizer("llama3")
    eos = tokenizer.eos_token_id
    model = bench.model(
        config={"vocab_size": len(tokenizer) + 40, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": [1, 2, eos]},
        generation_config={"eos_token_id": [1, 2, eos]},
    )
    assert bench.codes(talk(), tokenizer, model_name_or_path=model) == []
