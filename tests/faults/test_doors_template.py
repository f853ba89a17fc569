"""Hostile chat templates: time, memory, output, code and files; each is refused with exit 2, and the run's process is
untouched. (E6 of the reliability notes, and entry 93 of the corpus.)
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from inline_snapshot import snapshot

import solotune
from solotune.dataset.chat import template_sandbox as sandbox_module
from solotune.dataset.chat.template import render_chat
from solotune.dataset.chat.template_sandbox import Sandbox, TemplateLimitError, TemplateRefusal, TemplateSyntax, sandbox
from solotune.diagnosis.facts.rendered_chats import marked_ids
from tests.dataset.conftest import (  # noqa: F401
    CHATML,
    FAMILIES,
    Door,
    chat,
    door,
    model_folders,
    peak_kib,
    processor_seconds,
    tiny_tokenizer,
)

LOOP = "{% for a in range(9999) %}{% for b in range(9999) %}{{ range(9999) | sum }}{% endfor %}{% endfor %}"
SET, TIMES = "{% set ns = namespace(a=10, b='x') %}", "{% for i in range(99) %}"
LIMITS = ("of CPU time", "more than 512 MiB", "a text of")

HOSTILE = {
    "string multiplied": "{{ 'x' * 10000000000 }}",
    "string multiplied, below the memory": "{{ 'x' * 20000000 }}",
    "list multiplied": "{{ ([1] * 10000000000) | length }}",
    "range nested": LOOP,
    "range in a list": "{{ (range(99999) | list) * 99999 }}",
    "centre": "{{ 'x' | center(10000000000) }}",
    "format": "{{ '%10000000000d' % 1 }}",
    "indent": "{{ ('x\n' * 10000) | indent(100000000) }}",
    "power": "{{ 7 ** (7 ** 10) }}",
    "power of a power": SET + TIMES + "{% set ns.a = ns.a ** 10 %}{% endfor %}",
    "doubling": SET + TIMES + "{% set ns.b = ns.b + ns.b %}{% endfor %}",
    "joined": "{{ (['x' * 1000000] * 100000) | join }}",
    "replace": "{{ ('x' * 1000000) | replace('x', 'x' * 100000) }}",
    "a row alone": "{% if 'trigger' in messages[0].content %}" + LOOP + "{% endif %}" + CHATML,
}

REFUSED = {
    "recursion": "{% macro a(n) %}{{ a(n + 1) }}{% endmacro %}{{ a(0) }}",
    "Python's insides": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "by format": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "by attr": "{{ raise_exception | attr('__globals__') }}",
    "by cycler": "{{ cycler.__init__.__globals__.os.popen('touch made').read() }}",
    "by a namespace": "{% set ns = namespace(__class__=1) %}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import '/etc/passwd' as x %}{{ x }}",
    "extends": "{% extends '/etc/passwd' %}",
    "changes its list": "{{ messages.append(1) }}",
    "raises": "{{ raise_exception('no') }}",
    "a filter that is not": "{{ 1 | evil }}",
    "no text": "{{ '\\ud800' }}",
}

ROWS = [{"messages": chat(f"What is {n}?", f"It is {n}.")} for n in range(4)]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A tenth of the time, for templates that take all of it."""
    sandbox().close()
    monkeypatch.setattr(sandbox_module, "CPU_SECONDS", 0.2)
    yield
    sandbox().close()


@pytest.fixture
def own(quick: None) -> Iterator[Sandbox]:
    made = Sandbox()
    yield made
    made.close()


def seen(messages: list[dict[str, Any]]) -> dict[str, Any]:
    return {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": False}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_takes_too_much_is_ended_and_the_next_works(name: str, own: Sandbox) -> None:
    peak_kib(reset=True)
    before, started = peak_kib(), processor_seconds()
    with pytest.raises(TemplateLimitError) as caught:
        own.render(HOSTILE[name], seen(chat("trigger", "b")))
    assert any(limit in str(caught.value) for limit in LIMITS)
    assert "chat_template_path" in str(caught.value)
    assert processor_seconds() - started < 10 and peak_kib() - before < 100 << 10
    assert own.render("{{ messages[0].content }}", seen(chat("a", "b"))) == "a"


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, own: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        text = own.render(REFUSED[name], seen(chat("a", "b")))
    except (TemplateRefusal, TemplateSyntax) as error:
        text = "" if str(error) else "no reason"
    assert text == "", "what the sandbox hides is undefined, and undefined is written as nothing"
    assert not Path("made").exists()
    assert own.render("{{ messages[0].content }}", seen(chat("a", "b"))) == "a"


@pytest.mark.parametrize(
    ("name", "on_bad_row", "message"),
    [
        (
            "string multiplied",
            "error",
            snapshot("""\
the model's chat template needs too much time or memory
  seen:    more than 512 MiB
  allowed: 2 s of CPU time per row, 512 MiB, 1,048,576 characters
  change:  set chat_template_path to another template, or use another model\
"""),
        ),
        (
            "a row alone",
            "drop",
            snapshot("""\
chats.jsonl:4: the model's chat template needs too much time or memory
  seen:    more than 2 s of CPU time
  allowed: 2 s of CPU time per row, 512 MiB, 1,048,576 characters
  change:  set chat_template_path to another template, or use another model\
"""),
        ),
    ],
    ids=["all rows", "a row alone"],
)
def test_at_the_door_with_the_real_limits(
    name: str,
    on_bad_row: str,
    message: str,
    door: Door,  # noqa: F811
    model_folders: Path,  # noqa: F811
) -> None:
    sandbox().close()
    shutil.copytree(model_folders / "chatml", "model")
    rows = [*ROWS[:3], {"messages": chat("trigger", "b")}]
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("model/chat_template.jinja").write_text(HOSTILE[name])
    door.refuses("chats.jsonl", message, model_name_or_path="model", on_bad_row=on_bad_row)  # no row is dropped for it


def test_93_templates_that_are_wrong(door: Door, model_folders: Path) -> None:  # noqa: F811
    shutil.copytree(model_folders / "chatml", "model")
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    path = Path("model/chat_template.jinja")
    no_answers = "{% for m in messages %}{% if m.role != 'assistant' %}{{ m.content }}{% endif %}{% endfor %}"
    for template, message in (
        ("{{ raise_exception('no') }}", snapshot("""\
chats.jsonl:1: the model's chat template refuses this row (one of 4 bad rows; 4 were read)
  seen:    no; the roles are user, assistant; also chats.jsonl:2; chats.jsonl:3; ...
  change:  change the row to what the template accepts, or set chat_template_path\
""")),
        (no_answers, snapshot("""\
chats.jsonl:1: message 2: the chat template leaves out this answer or a part of it (one of 4 bad rows; 4 were read)
  seen:    {"role": "assistant", "content": "It is 0."}; also chats.jsonl:2; chats.jsonl:3; ...
  allowed: a template that renders every assistant message, with its tool calls
  change:  set chat_template_path to a template that does, or remove the row\
""")),
        ("{% for m in messages %}", snapshot("""\
chats.jsonl:1: the model's chat template refuses this row (one of 4 bad rows; 4 were read)
  seen:    Unexpected end of template. Jinja was looking for the following tags: 'endfor' or 'else'. The innermost block that needs to be closed is 'for'.; the roles are user, assistant; also chats.jsonl:2; chats.jsonl:3; ...
  change:  change the row to what the template accepts, or set chat_template_path\
""")),
        ("", snapshot("""\
chats.jsonl:1: message 2: the chat template leaves out this answer or a part of it (one of 4 bad rows; 4 were read)
  seen:    {"role": "assistant", "content": "It is 0."}; also chats.jsonl:2; chats.jsonl:3; ...
  allowed: a template that renders every assistant message, with its tool calls
  change:  set chat_template_path to a template that does, or remove the row\
""")),
    ):  # fmt: skip
        path.write_text(template)
        door.refuses("chats.jsonl", message, model_name_or_path="model")
    path.write_text("{{ bos_token }}" * 2 + CHATML)
    found = door("chats.jsonl", model_name_or_path="model")
    assert found.code == 3 and found.finding("F08", "double-bos")["severity"] == "error"
    path.write_bytes(b"x" * (2 << 20))
    door.refuses(
        "chats.jsonl",
        snapshot("""\
model/chat_template.jinja: too large
  seen:    2,097,152 bytes
  allowed: 1,048,576 bytes\
"""),
        model_name_or_path="model",
    )


def test_the_text_is_that_of_transformers() -> None:
    from solotune.dataset.chat.template import Template

    tools = [{"type": "function", "function": {"name": "f", "parameters": {"a": [1, 2.5, None, True, "ü"]}}}]
    rows = [
        chat("Hi", "a", " b\n", "c"),
        [{"role": "user", "content": "x", "name": None}, {"role": "assistant", "content": "y", "thinking": "z"}],
    ]
    extra = (
        "{% generation %}{% set a = 1 %}{{ messages | tojson(indent=2) }}{% endgeneration %}{{ tools | tojson }}\n"
        "  {% for m in messages %}\n  {{ m.reasoning_content }}{{ loop.index }}{% break %}{% endfor %}\n{{ a }}"
        "{{ dict(a=1, b=messages[0]) }}{{ dict.fromkeys([1]) }}{{ 'ü' | tojson }}{{ documents }}{{ bos_token }}"
        "{% set ns = namespace(x=1) %}{% set ns.x = 2 %}{{ ns.x }}{{ eos_token }}{{ unk_token is defined }}"
    )
    for family in FAMILIES:
        tokenizer = copy.deepcopy(tiny_tokenizer(family))
        for template in (tokenizer.chat_template, extra):
            if template is None:
                continue
            tokenizer.chat_template = template
            for row in rows:
                for ask in (False, True):
                    ours = Template(tokenizer).render("", row, tools, is_prompt=ask)
                    theirs = tokenizer.apply_chat_template(row, tools, tokenize=False, add_generation_prompt=ask)
                    assert ours == theirs


def test_the_process_has_nothing_and_ends_with_its_parent(own: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-canary-of-a-token")
    own.check("x")
    child = own._child
    assert child is not None
    place = Path(f"/proc/{child.pid}")
    if not place.exists():
        pytest.skip("no /proc")
    assert b"canary" not in (place / "environ").read_bytes()
    assert sorted(os.listdir(place / "fd")) == ["0", "1", "2"]
    limits = {line[:26].strip(): line[26:].split()[:2] for line in (place / "limits").read_text().splitlines()[1:]}
    for name in ("Max open files", "Max file size", "Max processes", "Max core file size"):
        assert limits[name] == ["0", "0"], name
    assert limits["Max address space"] == [str(512 << 20)] * 2
    os.kill(child.pid, signal.SIGINT)  # a Ctrl-C goes to all processes of the terminal
    assert own.render("a", {}) == "a"
    assert child.stdin is not None
    child.stdin.close()  # as the end of the parent does
    assert child.wait() == 0


# --- one door: rules, chat and evaluation render where rows do

MARKED = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% generation %}{% endgeneration %}"
)


def test_the_marks_of_answers_are_those_of_transformers() -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer("chatml"))
    inside = "{% macro answer(m) %}{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}" + MARKED.replace(
        "{{ m.content }}<|im_end|>{% endgeneration %}", "{{ answer(m) }}{% endgeneration %}<|im_end|>"
    )
    for template in (MARKED, inside, CHATML):
        tokenizer.chat_template = template
        for row in (chat("Hi", "aé b", "c\n", " d"), chat("Hi"), chat("Hi", "")):
            theirs: Any = tokenizer.apply_chat_template(row, return_dict=True, return_assistant_tokens_mask=True)
            ids, mask = marked_ids(tokenizer, row)
            assert (ids, [*map(int, mask)]) == (theirs["input_ids"], theirs["assistant_masks"])
            assert render_chat(tokenizer, row) == tokenizer.apply_chat_template(row, tokenize=False)
    assert sum(mask) == 0
    other = render_chat(tokenizer, chat("Hi"), is_prompt=True, template="{{ messages[0].content }}{{ eos_token }}")
    assert other == f"Hi{tokenizer.eos_token}"


def test_what_a_door_cannot_render_is_a_refusal() -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer("chatml"))
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    for value in (deep, {1, object()}):
        with pytest.raises(TemplateRefusal, match="cannot be given"):
            render_chat(tokenizer, [{"role": "user", "content": value}])
    tokenizer.chat_template = {"one": CHATML, "two": CHATML}
    with pytest.raises(TemplateRefusal, match="no default"):
        render_chat(tokenizer, chat("Hi"))


def test_what_took_too_long_once_is_refused_at_once(own: Sandbox) -> None:
    """Rules ask for the same chats after every evaluation."""
    for ask in (own.render, own.render_marked):
        with pytest.raises(TemplateLimitError) as first:
            ask(LOOP, seen(chat("a", "b")))
        child = own._child
        with pytest.raises(TemplateLimitError) as again:
            ask(LOOP, seen(chat("a", "b")))
        assert str(again.value) == str(first.value)
        assert own._child is child, "no process was started for it"
    assert own.render("{% if messages[0].content == 'a' %}" + LOOP + "{% endif %}b", seen(chat("c", "d"))) == "b"


def test_many_that_are_each_just_quick_enough_are_ended(own: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """100,000 rows of 1.9 s are two days."""
    monkeypatch.setattr(sandbox_module, "TOTAL_SECONDS", 0.3)
    monkeypatch.setattr(sandbox_module, "MEAN_SECONDS", 0.001)
    slow = "{% for a in range(20) %}{% set x = range(messages[0].content | int) | list | sum %}{% endfor %}"

    def render_all(source: str, content: str) -> None:
        for _ in range(1000):
            own.render(source, seen(chat(content, "b")))

    with pytest.raises(TemplateLimitError, match="s per row on average, over") as caught:
        render_all(slow, "90000")
    assert "0.2 s of CPU time per row" in str(caught.value)
    monkeypatch.setattr(sandbox_module, "MEAN_SECONDS", 0.2)
    render_all("{{ messages[0].content }}", "a")


PROBES = ("quvwxq", "a", "b")  # what rules ask; "x" would be refused while the rows are rendered
LOOPS_ON_PROBES = "{% if messages[0].content in " + str(PROBES) + " %}" + LOOP + "{% endif %}" + MARKED
GROWS_ON_PROBES = LOOPS_ON_PROBES.replace(LOOP, "{{ ([messages[0].content * 1000000] * 100000) | join }}")


@pytest.mark.parametrize("template", [LOOPS_ON_PROBES, GROWS_ON_PROBES], ids=["time", "memory"])
def test_a_template_that_waits_for_the_rules_own_chats_stops_nothing(
    template: str, quick: None, chat_config: dict[str, Any], compiled_here: list[str]
) -> None:
    """It loops, or takes 100 GB, on what rules render, and on no row: the run ends, and so does its diagnosis."""
    Path("waits.jinja").write_text(template)
    started, before = processor_seconds(), peak_kib(reset=True) or peak_kib()
    config = {**chat_config, "chat_template_path": "waits.jinja", "max_steps": 2, "num_samples": 1}
    config["allow_faults"] = ["double-bos", "header-learned"]  # what these rows really have: a second <|im_start|>
    solotune.train(config)
    found = solotune.diagnose("run", budget=0).to_json()
    assert processor_seconds() - started < 60 and peak_kib() - before < 1 << 20
    assert "TemplateLimitError" in json.dumps(found), "the rules that could not be asked say why"
    assert not compiled_here


@pytest.fixture
def compiled_here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sources of Jinja that are compiled in this process."""
    import jinja2

    found: list[str] = []
    compiled = jinja2.Environment.compile

    def noted(self: Any, source: Any, *args: Any, **options: Any) -> Any:
        found.append(str(source))
        return compiled(self, source, *args, **options)

    monkeypatch.setattr(jinja2.Environment, "compile", noted)
    return found


def test_no_template_runs_in_this_process(chat_config: dict[str, Any], compiled_here: list[str]) -> None:
    Path("marked.jinja").write_text(MARKED + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    config = {**chat_config, "chat_template_path": "marked.jinja", "max_steps": 2, "num_samples": 1}
    config["allow_faults"] = ["double-bos"]
    solotune.data(config)
    solotune.train(config)
    solotune.evaluate("run")
    solotune.chat("run").reply("twice 3")
    solotune.diagnose("run", budget=0)
    assert compiled_here == []
    tiny_tokenizer("chatml").apply_chat_template(chat("a"), chat_template=f"{{# {config['output_dir']} #}}x")
    assert len(compiled_here) == 1, "it would have been seen"
