"""What a row says and its rendering leaves out is counted; a thought that no answer can have is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from solotune.dataset import prepare
from solotune.diagnosis.findings import Finding
from solotune.errors import InputError
from tests.dataset.conftest import CHATML, Writer, chat, config_of, tiny_tokenizer
from tests.diagnosis.rules.rows import find, with_template

QWEN3 = tiny_tokenizer("qwen3")
STRIPS = with_template("chatml", CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}"))
KEEPS_KEY = with_template(
    "chatml",
    CHATML.replace(
        "{{ m.content }}",
        "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
        "{{ m.content.split('</think>')[-1] }}",
    ),
)


def thought(number: int, tag: str = "think") -> str:
    return f"<{tag}>\n{number} and 1 make {number + 1}, by adding.\n</{tag}>\n\n{number + 1}"


def counted(write: Writer, tokenizer: PreTrainedTokenizerBase, *rows: Any, **keys: Any) -> dict[str, Any]:
    """`not_rendered` of data.json: (lost, total) of each kind."""
    found = findings_and_report(write, tokenizer, *rows, **keys)[1].to_json()["not_rendered"]
    return {kind: (counts["lost"], counts["total"]) for kind, counts in found.items()}


def findings_and_report(
    write: Writer, tokenizer: PreTrainedTokenizerBase, *rows: Any, **keys: Any
) -> tuple[list[Finding], Any]:
    given = [row if isinstance(row, dict) else {"messages": row} for row in rows]
    config = config_of(write("a.jsonl", *given), **keys)
    prepared = prepare(config, tokenizer, use_cache=False)
    return find(config, tokenizer, prepared.train, prepared.validation, prepared.report), prepared.report


@pytest.mark.parametrize("form", ["content", "reasoning_content"])
def test_thoughts_that_no_answer_can_have_are_refused(write: Writer, form: str) -> None:
    rows = [chat(f"{n} and 1?", thought(n)) for n in range(3)]
    if form == "reasoning_content":
        rows = [chat(f"{n} and 1?", f"{n + 1}") for n in range(3)]
        for messages in rows:
            messages[1]["reasoning_content"] = "one more than before"
    with pytest.raises(InputError, match=r"a.jsonl:1: message 2: the chat template leaves out the thoughts") as error:
        counted(write, STRIPS, *rows)
    assert error.value.exit_code == 2
    without = chat("Hello?", "Hello.")
    config = config_of(write("b.jsonl", *({"messages": m} for m in [*rows, without])), on_bad_row="drop")
    report = prepare(config, STRIPS, use_cache=False).report
    assert report.dropped == {"thoughts left out by the chat template": 3}


def test_the_ways_out_of_a_refusal_work(write: Writer) -> None:
    asked = chat("1 and 1?", "2")
    keyed = [asked[0], {**asked[1], "reasoning_content": "by adding"}]
    with pytest.raises(InputError, match="leaves out the thoughts") as error:
        counted(write, tiny_tokenizer("chatml"), keyed)
    assert "write them into content: <think>" in str(error.value.change)
    assert counted(write, tiny_tokenizer("chatml"), chat("1 and 1?", thought(1))) == {}
    with pytest.raises(InputError, match="leaves out the thoughts") as error:
        counted(write, KEEPS_KEY, chat("1 and 1?", thought(1)))
    assert "move them to a key of their own, reasoning_content" in str(error.value.change)
    assert counted(write, KEEPS_KEY, keyed) == {}


def test_thoughts_of_earlier_answers_are_counted_and_said(write: Writer) -> None:
    rows = [chat("0?", thought(n), "1?", thought(n + 1), "2?", thought(n + 2)) for n in range(4)]
    all_found, report = findings_and_report(write, QWEN3, *rows)
    (found,) = [one for one in all_found if one.code == "F13"]
    assert (found.severity, found.slug, found.signal) == ("info", "thoughts-dropped", None)
    assert "leaves out 8 of 12 thoughts" in found.message
    assert found.evidence["rows"] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]
    assert "one row per answer" in found.fix
    split = [messages[:end] for messages in rows for end in (2, 4, 6)]
    all_found, report = findings_and_report(write, QWEN3, *split, train_on_last_turn=True)
    assert "F13" not in [one.code for one in all_found]
    assert report.contents["thoughts"] == {"total": 12, "lost": 0, "rows": []}


def test_if_no_thought_of_the_data_is_rendered_the_run_is_refused(write: Writer) -> None:
    rows = [chat("0?", thought(n), "Thanks", f"Welcome {n}.") for n in range(4)]
    with pytest.raises(InputError, match="leaves out the thoughts of all 4 answers") as error:
        counted(write, QWEN3, *rows)
    assert "one row per answer" in str(error.value.change)
    assert counted(write, QWEN3, *rows, chat("0?", thought(9))) == {"thoughts": (4, 5)}


def test_thoughts_of_answers_that_are_context_only_are_no_loss(write: Writer) -> None:
    messages = chat("0?", thought(0), "1?", thought(1))
    messages[1]["weight"] = 0
    assert counted(write, QWEN3, messages) == {}


def test_text_around_thoughts_is_not_lost_in_silence(write: Writer) -> None:
    with pytest.raises(InputError, match="leaves out this answer or a part of it"):
        counted(write, QWEN3, chat("1 and 1?", "Let me see. " + thought(1)))


def test_other_tags_are_rendered_by_templates_that_do_not_know_them(write: Writer) -> None:
    assert counted(write, STRIPS, chat("1?", thought(1, "thinking")), chat("2?", thought(2, "reasoning"))) == {}
    strips = with_template("chatml", CHATML.replace("m.content", "m.content.split('</thinking>')[-1]"))
    with pytest.raises(InputError, match=r"<thinking>\.\.\.</thinking> in content"):
        counted(write, strips, chat("1?", thought(1, "thinking")))


# --- other content

LEAVES_OUT: dict[str, tuple[str, str]] = {
    "a second system message": ("{{ m.content }}", "{{ m.content if m.role != 'system' or loop.first }}"),
    "users": ("{{ m.content }}", "{{ m.content if m.role != 'user' }}"),
    "results": ("for m in messages", "for m in messages if m.role != 'tool'"),
    "all but the first line of a question": (
        "{{ m.content }}",
        "{{ m.content if m.role != 'user' else m.content.split('\\n')[0] }}",
    ),
}
CALL = {"role": "assistant", "content": "<tool_call>figs</tool_call>"}
TALK = [
    *chat("Which fruit is there?\nAnswer in a word.", "Figs.", system="You sell fruit."),
    {"role": "system", "content": "From now on, be rude."},
    *chat("And now?"),
    CALL,
    {"role": "tool", "content": '{"figs": 2, "place": "a\\nshelf"}'},
    {"role": "assistant", "content": "Go away."},
]


@pytest.mark.parametrize(
    ("what", "lost"),
    [
        ("a second system message", {"system": (3, 6)}),
        ("users", {"user": (6, 6)}),
        ("results", {"tool": (3, 3)}),
        ("all but the first line of a question", {"user": (3, 6)}),
    ],
)
def test_messages_that_the_template_leaves_out_are_counted(
    write: Writer, what: str, lost: dict[str, tuple[int, int]]
) -> None:
    tokenizer = with_template("chatml", CHATML.replace(*LEAVES_OUT[what]))
    rows = [[*TALK[:-1], {**TALK[-1], "content": f"Go away, {n}."}] for n in range(3)]
    found, report = findings_and_report(write, tokenizer, *rows)
    ((kind, counts),) = report.to_json()["not_rendered"].items()
    assert {kind: (counts["lost"], counts["total"])} == lost
    assert [one.code for one in found if one.code == "F13"] == ["F13"]
    assert counted(write, tiny_tokenizer("chatml"), *rows) == {}


def test_one_row_in_a_hundred_is_named_too(write: Writer) -> None:
    tokenizer = with_template("chatml", CHATML.replace(*LEAVES_OUT["a second system message"]))
    rows = [chat(f"{n}?", f"{n}.", system=f"Be kind to {n}.") for n in range(99)]
    found, _ = findings_and_report(write, tokenizer, *rows, TALK)
    (second,) = [one for one in found if one.code == "F13"]
    assert (second.severity, second.evidence["lost"], second.evidence["rows"]) == ("info", 1, ["a.jsonl:100"])


@pytest.mark.parametrize(
    "written",
    [
        "{{ m.content | trim }}",
        "{{ m.content | tojson }}",
        "{{ m.content | e if m.role != 'assistant' else m.content }}",
        "{{ m.content.split() | join(' ') if m.role != 'assistant' else m.content }}",
        "{{ m.content.replace('/no_think', '') }}",
    ],
)
def test_content_in_another_spelling_is_not_lost(write: Writer, written: str) -> None:
    written = (
        f"{{{{ m.content if m.role == 'assistant' else '' }}}}{{% if m.role != 'assistant' %}}{written}{{% endif %}}"
    )
    tokenizer = with_template("chatml", CHATML.replace("{{ m.content }}", written))
    messages = [dict(message) for message in TALK]
    messages[0]["content"] = 'You sell <b>fruit</b>,\n\n and say "yes".\n/no_think'
    assert counted(write, tokenizer, messages) == {}


def test_a_system_message_that_moves_to_the_last_question_is_there(write: Writer) -> None:
    template = (
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n"
        "{% if loop.last and false %}{% endif %}{% if m.role == 'user' and loop.index0 == messages | length - 3 %}"
        "{{ messages[0].content }}\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = with_template("chatml", template)
    assert counted(write, tokenizer, chat("a?", "b", "c?", "d", system="Sell fruit.")) == {}


TOOL = {"type": "function", "function": {"name": "stock", "description": "fruit in stock", "parameters": {}}}
CALLS = [{"type": "function", "function": {"name": "stock", "arguments": {"kind": "figs"}}}]
WITH_CALLS = CHATML.replace(
    "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
)


def called(question: str) -> dict[str, Any]:
    messages = [
        *chat(question),
        {"role": "assistant", "content": "", "tool_calls": CALLS},
        {"role": "tool", "name": "stock", "content": "stock: 2 figs"},
        {"role": "assistant", "content": "Two."},
    ]
    return {"messages": messages, "tools": [TOOL]}


@pytest.mark.parametrize("question", ["Any figs?", "Is there fruit, by stock?"])
def test_tools_are_not_taken_for_rendered_because_calls_name_them(write: Writer, question: str) -> None:
    rows = [called(question)]
    assert counted(write, with_template("chatml", WITH_CALLS), *rows) == {"tools": (1, 1)}
    names_only = "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}" + WITH_CALLS
    assert counted(write, with_template("chatml", names_only), *rows) == {}


def test_a_speakers_name_that_is_not_rendered_is_said(write: Writer) -> None:
    messages = chat("Hello?", "Hello.")
    messages[0]["name"] = "Zoë"
    found, report = findings_and_report(write, tiny_tokenizer("chatml"), messages)
    assert json.dumps(report.to_json()["not_rendered"]) == '{"name": {"total": 1, "lost": 1, "rows": ["a.jsonl:1"]}}'
    (said,) = [one for one in found if one.code == "F13"]
    assert (said.severity, "1 of 1 values of the key name" in said.message) == ("info", True)
    named = with_template("chatml", CHATML.replace("{{ m.role }}", "{{ m.role }}{{ ' ' + m.name if m.name }}"))
    assert counted(write, named, messages) == {}
