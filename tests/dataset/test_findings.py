"""Every rule fires on its fault, alone, and none on what only looks like one."""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from solotune.dataset import Example, Prepared, findings_facts, prepare
from solotune.dataset.findings import RULES, Finding, find
from tests.dataset.conftest import CHATML, FAMILIES, Writer, chat, config_of, tiny_tokenizer

Rows = list[dict[str, Any]]
Change = Callable[[list[Example]], list[Example]]

_SYLLABLES = "ba de fi go lu ma ne pi ro su ta ve wi zo ka".split()


def word(rng: random.Random) -> str:
    return "".join(rng.choices(_SYLLABLES, k=rng.randint(2, 4)))


def sentence(rng: random.Random, count: int = 12, *more: str) -> str:
    words = [word(rng) for _ in range(count)] + list(more)
    rng.shuffle(words)
    return " ".join(words).capitalize() + "."


def talk(count: int = 40, *, turns: int = 1, system: str | None = None, seed: int = 0) -> Rows:
    """Chats about something: each answer takes up a word of its question."""
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
    """The rows with other answers."""

    def change(number: int, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**m, "content": answer(number, m["content"])} if m["role"] == "assistant" else m for m in messages]

    return each(rows, change)


def with_template(family: str, template: str) -> PreTrainedTokenizerBase:
    tokenizer = copy.deepcopy(tiny_tokenizer(family))
    tokenizer.chat_template = template
    return tokenizer


def with_pad(family: str) -> PreTrainedTokenizerBase:
    """With a padding token of its own, which no row needs."""
    tokenizer = copy.deepcopy(tiny_tokenizer(family))
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer


class Bench:
    """Rows -> findings, through the data door; `change` breaks the examples of both sides behind it."""

    def __init__(self, write: Writer, folder: Path) -> None:
        self._write, self._folder = write, folder

    def model(self, **files: dict[str, Any]) -> str:
        """A model folder with config.json (`config`) and generation_config.json (`generation_config`)."""
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
        return find(config, tokenizer, change(result.train), change(result.validation), result.report)

    def codes(self, *args: Any, **keys: Any) -> list[str]:
        return [finding.code for finding in self.find(*args, **keys)]

    def only(self, code: str, *args: Any, **keys: Any) -> Finding:
        """The finding, which must be the only one."""
        found = self.find(*args, **keys)
        assert [finding.code for finding in found] == [code], [(f.code, f.message) for f in found]
        return found[0]


@pytest.fixture
def bench(write: Writer, tmp_path: Path) -> Bench:
    folder = tmp_path / "model"
    folder.mkdir()
    return Bench(write, folder)


def masked(which: Callable[[Example], np.ndarray]) -> Change:
    """Examples with another mask."""
    return lambda rows: [replace(row, supervised=which(row)) for row in rows]


# --- S2: tokenizer


def test_f04_the_models_special_ids_are_words(bench: Bench) -> None:
    model = bench.model(config={"vocab_size": 500, "eos_token_id": 300, "bos_token_id": 301})
    found = bench.only("F04", talk(), model_name_or_path=model)
    assert found.severity == "error"
    assert set(found.evidence["model_special_ids"]) == {"300", "301"}
    assert "tokenizer files of the same model" in found.fix


def test_f04_the_vocabulary_is_of_another_size(bench: Bench) -> None:
    size = len(tiny_tokenizer("chatml"))
    assert bench.only("F04", talk(), model_name_or_path=bench.model(config={"vocab_size": 3 * size}))
    assert bench.codes(talk(), model_name_or_path=bench.model(config={"vocab_size": size + 64})) == []


def test_f04_text_that_the_tokenizer_cannot_spell(bench: Bench) -> None:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(
        models.BPE({c: i for i, c in enumerate(["<unk>", *"abcdefghijklmnopqrstuvwxyz?."])}, [], unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} {{ eos_token if m.role == 'assistant' }}{% endfor %}"
    )
    rows = answered(talk(), lambda n, text: text.lower() + " очень хорошо")
    found = bench.only("F04", each(rows, lambda n, m: [{**x, "content": x["content"].lower()} for x in m]), tokenizer)
    assert "unknown" in found.message
    assert found.evidence["rows"][0].startswith("a.jsonl:")


def test_f05_a_token_beyond_the_embedding(bench: Bench) -> None:
    size = len(tiny_tokenizer("chatml"))
    # the last three tokens of the vocabulary are <|endoftext|>, <|im_end|> and <|im_start|>
    found = bench.only("F05", talk(), model_name_or_path=bench.model(config={"vocab_size": size - 1}))
    assert (found.severity, found.evidence["largest_id"], found.evidence["embedding_rows"]) == (
        "error",
        size - 1,
        size - 1,
    )


@pytest.mark.parametrize(
    ("family", "spellings", "severity"),
    [
        ("chatml", ("im_start", "im_begin"), "warning"),  # answers still end with a token
        ("chatml", ("im_", "chat_"), "error"),  # nothing to stop on
        ("llama3", ("header_id", "head"), "warning"),
    ],
)
def test_f07_markers_without_tokens(bench: Bench, family: str, spellings: tuple[str, str], severity: str) -> None:
    template = FAMILIES[family][0]
    assert template
    found = bench.only(
        "F07", talk(), with_template(family, template.replace(*spellings)), chat_template_path="my.jinja"
    )
    assert found.severity == severity
    assert found.fix.startswith("remove `chat_template_path: my.jinja`")
    assert all(number > 1 for number in found.evidence["ids_per_marker"].values())


def test_f07_a_base_model_with_chatml(bench: Bench) -> None:
    assert bench.only("F07", talk(), with_template("gpt2", CHATML)).severity == "error"


# --- S3: template


def test_f08_bos_twice(bench: Bench) -> None:
    template = "{{ bos_token }}" + str(FAMILIES["llama3"][0])
    found = bench.only("F08", talk(), with_template("llama3", template), chat_template_path="my.jinja")
    assert found.fix == "write <|begin_of_text|> once in my.jinja"
    assert bench.only("F08", [{"text": "<s><s>" + sentence(random.Random(n))} for n in range(40)], "mistral")


def adding_bos(family: str, template: str) -> PreTrainedTokenizerBase:
    from tokenizers import processors

    tokenizer = with_template(family, template)
    bos = (str(tokenizer.bos_token), tokenizer.bos_token_id)
    backend: Any = tokenizer
    backend.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos[0]} $A", pair=f"{bos[0]} $A $B", special_tokens=[bos]
    )
    return tokenizer


def test_f09_no_bos(bench: Bench) -> None:
    template = str(FAMILIES["llama3"][0])
    tokenizer = adding_bos("llama3", template.replace("{{ bos_token }}", ""))
    found = bench.only("F09", talk(), tokenizer, chat_template_path="my.jinja")
    assert "<|begin_of_text|>" in found.message
    assert bench.codes(talk(), tokenizer) == []  # the model's own, then served without it too
    assert bench.codes(talk(), adding_bos("llama3", template), chat_template_path="my.jinja") == []


@pytest.mark.parametrize(
    ("family", "end"), [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("mistral", "eos_token")]
)
def test_f10_answers_without_an_end(bench: Bench, family: str, end: str) -> None:
    template = str(FAMILIES[family][0])
    if family == "mistral":
        template = template.replace("{{ eos_token }}", "")
    else:  # only the assistant's
        after = template.index(end)
        template = template[:after] + "{{ '" + end + "' if m.role != 'assistant' }}" + template[after + len(end) :]
    found = bench.only("F10", talk(), with_template(family, template), chat_template_path="my.jinja")
    assert (found.severity, found.suspect) == ("error", "S3")
    assert "my.jinja" in found.fix
    assert found.evidence["answers_without"] == len(talk()) * 3 // 4


def test_f10_is_a_warning_where_the_models_own_template_ends_no_turn(bench: Bench) -> None:
    assert bench.only("F10", talk(), "glm").severity == "warning"


def test_f10_two_rows_are_a_pattern_where_they_are_all(bench: Bench) -> None:
    assert bench.only("F10", talk(3), "glm", validation_size=1).evidence["rows_with"] == 2


def test_f10_texts(bench: Bench) -> None:
    def without_eos(rows: list[Example]) -> list[Example]:
        return [replace(r, input_ids=r.input_ids[:-1], supervised=r.supervised[:-1]) for r in rows]

    rows = [
        {"prompt": sentence(random.Random(n)) + "\n", "completion": sentence(random.Random(1000 + n))}
        for n in range(40)
    ]
    assert bench.only("F10", rows, "gpt2", without_eos).fix == "end the texts with <|endoftext|>"


FOREIGN = "### Human: {}\n### Assistant: {}"


def test_f12_texts_in_another_format(bench: Bench) -> None:
    rows = [{"text": FOREIGN.format(*(m["content"] for m in row["messages"]))} for row in talk()]
    found = bench.only("F12", rows)
    assert "### Human" in found.message
    assert found.evidence["expected"] == "<|im_end|>\n<|im_start|>assistant"
    assert bench.codes(rows, "gpt2") == []  # a base model
    tokenizer = copy.deepcopy(tiny_tokenizer("chatml"))
    tokenizer.eos_token = "<|endoftext|>"  # a base model that carries a template (Qwen)
    assert bench.codes(rows, tokenizer) == []


def test_f12_prompt_and_completion_of_a_chat_model(bench: Bench) -> None:
    pairs = [[m["content"] for m in row["messages"]] for row in talk()]
    assert bench.only("F12", [{"prompt": q + "\n", "completion": a} for q, a in pairs])
    own = [{"text": f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>"} for q, a in pairs]
    assert bench.codes(own) == []


def test_f12_messages_that_were_rendered_before(bench: Bench) -> None:
    rows = each(talk(), lambda n, m: [{**x, "content": f"<|im_start|>{x['role']}\n{x['content']}"} for x in m])
    assert "once more" in bench.only("F12", rows).message
    rows = each(talk(), lambda n, m: [{**m[0], "content": "Human: " + m[0]["content"]}, m[1]])
    assert bench.only("F12", rows, "llama3")


def with_own_template(bench: Bench, own: PreTrainedTokenizerBase, eos: str) -> str:
    """A model's folder whose tokenizer has a template of its own, and whose generation ends at `eos`."""
    folder = bench.model(generation_config={"eos_token_id": own.convert_tokens_to_ids(eos)})
    own.save_pretrained(folder)
    return folder


def test_f12_a_template_file_that_is_another_models(bench: Bench) -> None:
    model = with_own_template(bench, copy.deepcopy(tiny_tokenizer("chatml")), "<|im_end|>")
    foreign = "{% for m in messages %}{{ '### ' + m.role + ':\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    foreign += "{% if add_generation_prompt %}### assistant:\n{% endif %}"
    keys = {"model_name_or_path": model, "chat_template_path": "my.jinja"}
    found = bench.only("F12", talk(), with_template("chatml", foreign), **keys)
    assert "my.jinja" in found.message and found.evidence["with_the_template"] == 0
    assert bench.codes(talk(), "chatml", **keys) == []  # the model's own, copied
    base = copy.deepcopy(tiny_tokenizer("chatml"))
    base.eos_token = "<|endoftext|>"  # a base model that carries a template
    with_own_template(bench, base, "<|endoftext|>")
    base.chat_template = foreign
    assert "F12" not in bench.codes(talk(), base, **keys)


def test_f09_a_template_file_without_what_the_models_own_begins_with(bench: Bench) -> None:
    model = with_own_template(bench, copy.deepcopy(tiny_tokenizer("llama3")), "<|eot_id|>")
    without = with_template("llama3", str(FAMILIES["llama3"][0]).replace("{{ bos_token }}", ""))
    keys = {"model_name_or_path": model, "chat_template_path": "my.jinja"}
    assert "the model's own template begins with" in bench.only("F09", talk(), without, **keys).message
    assert bench.codes(talk(), "llama3", **keys) == []


@pytest.mark.parametrize("role", ["system", "tool"])
def test_f13_a_role_is_dropped(bench: Bench, role: str) -> None:
    def change(n: int, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        told = {"role": role, "content": sentence(random.Random(1000 + n))}
        call = {"role": "assistant", "content": f'<tool_call>{{"name": "f{n}"}}</tool_call>'}
        return [told, *messages] if role == "system" else [messages[0], call, told, messages[1]]

    template = CHATML.replace("for m in messages", f"for m in messages if m.role != '{role}'")
    found = bench.only("F13", each(talk(), change), with_template("chatml", template))
    assert (found.severity, found.evidence["rows_without"]) == ("error", {role: 30})
    assert bench.codes(each(talk(), change)) == []


def test_f13_and_f16_do_not_look_at_rows_that_were_cut_behind_a_stop(bench: Bench) -> None:
    """Every row ends in the end of its first turn, so it looks whole, and its second turn was cut off."""
    same = chat("Are you there?", "I am. What is it?")
    rows = each(talk(), lambda n, m: [*same, *m])
    (whole,) = {
        len(e.input_ids)
        for e in bench.prepared([{"messages": same}], tiny_tokenizer("chatml"), validation_size=0)[1].train
    }
    num_newline = 1
    found = bench.codes(rows, max_length=whole - num_newline)
    assert not {"F13", "F16"} & set(found), found


def test_f13_a_result_that_the_template_quotes_is_there(bench: Bench) -> None:
    """Llama 3.1 puts a tool's text through `tojson`."""

    def change(n: int, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        call = {"role": "assistant", "content": f'<tool_call>{{"name": "f{n}"}}</tool_call>'}
        return [
            messages[0],
            call,
            {"role": "tool", "content": f'{{"temperature": "{n}", "wind": "none"}}'},
            messages[1],
        ]

    template = CHATML.replace("{{ m.content }}", "{{ m.content | tojson if m.role == 'tool' else m.content }}")
    assert bench.codes(each(talk(), change), with_template("chatml", template)) == []


def test_f13_tools_are_dropped(bench: Bench) -> None:
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]
    found = bench.only("F13", [{**row, "tools": tools} for row in talk()])
    assert "tools definitions" in found.message
    template = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}" + CHATML
    assert bench.codes([{**row, "tools": tools} for row in talk()], with_template("chatml", template)) == []


def test_f14_generation_stops_elsewhere(bench: Bench) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer("chatml"))
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    eos, end = (int(tokenizer.convert_tokens_to_ids(t)) for t in ("<|endoftext|>", "<|im_end|>"))
    model = bench.model(config={"vocab_size": 500}, generation_config={"eos_token_id": eos})
    found = bench.only("F14", talk(), tokenizer, model_name_or_path=model)
    assert found.fix.startswith(f"add {end} to eos_token_id")
    bench.model(generation_config={"eos_token_id": [eos, end]})
    assert bench.codes(talk(), tokenizer, model_name_or_path=model) == []


def test_f15_no_generation_prompt(bench: Bench) -> None:
    found = bench.only("F15", talk(), with_template("chatml", CHATML.partition("{% if add_generation")[0]))
    assert found.evidence["answers_with"] == 30
    assert "<|im_start|>" in found.message


def test_f16_the_generation_prompt_opens_what_answers_do_not_have(bench: Bench) -> None:
    found = bench.only("F16", talk(), "deepseek")
    assert found.evidence["template_differs"] == found.evidence["rows_read"]
    assert "<think>" in found.message


def test_f16_a_prompt_that_ends_inside_a_token(bench: Bench) -> None:
    pairs = [[sentence(random.Random(seed + n)) for seed in (0, 1000)] for n in range(40)]
    rows = [{"prompt": f"Q: {question} A: ", "completion": f"the {answer}"} for question, answer in pairs]
    assert tiny_tokenizer("gpt2").tokenize(": the")[-1] == "Ġthe"
    found = bench.only("F16", rows, "gpt2")
    assert found.fix == "move the blank from the end of the prompts to the beginning of the completions"
    moved = [{"prompt": r["prompt"].rstrip(), "completion": " " + r["completion"]} for r in rows]
    assert bench.codes(moved, "gpt2") == []


# --- S4: labels


def without_ends(tokenizer: PreTrainedTokenizerBase) -> Change:
    special = list(tokenizer.all_special_ids) + [i for i, t in tokenizer.added_tokens_decoder.items() if t.special]
    return masked(lambda row: row.supervised & ~np.isin(row.input_ids, special))


@pytest.mark.parametrize("family", ["chatml", "llama3", "mistral"])
def test_f17_the_pad_id_is_masked(bench: Bench, family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    by_id = masked(lambda row: row.supervised & (row.input_ids != tokenizer.pad_token_id))
    found = bench.only("F17", talk(), tokenizer, by_id)
    assert found.evidence["pad_id"] == tokenizer.pad_token_id
    assert found.severity == "error"


@pytest.mark.parametrize("family", ["chatml", "llama3", "gemma", "mistral", "qwen3"])
def test_f19_the_end_of_turn_is_not_learned(bench: Bench, family: str) -> None:
    tokenizer = with_pad(family)
    found = bench.only("F19", talk(turns=2), tokenizer, without_ends(tokenizer))
    assert found.severity == "error"
    assert found.evidence["answers_with"] == 60


@pytest.mark.parametrize("family", ["chatml", "llama3", "gemma", "mistral"])
def test_f20_prompts_are_learned(bench: Bench, family: str) -> None:
    found = bench.only("F20", talk(), family, masked(lambda row: np.arange(len(row.supervised)) > 0))
    assert found.evidence["rows_with"] == found.evidence["rows_read"] == 30


def test_f20_thinking_that_repeats_the_question(bench: Bench) -> None:
    template = CHATML.replace("{{ m.content }}", "{{ m.reasoning_content }}{{ m.content }}")
    rows = each(talk(), lambda n, m: [m[0], {**m[1], "reasoning_content": f"They ask: {m[0]['content']} Well."}])
    assert bench.codes(rows, with_template("chatml", template)) == []


def test_f20_only_the_end_of_the_prompt(bench: Bench) -> None:
    def early(row: Example) -> np.ndarray:
        learned = row.supervised.copy()
        first = int(np.flatnonzero(learned)[0])
        learned[first - 35 : first] = True
        return learned

    assert bench.only("F20", talk(), change=masked(early))


@pytest.mark.parametrize("family", ["chatml", "llama3", "gemma", "mistral"])
def test_f23_the_mask_is_inverted(bench: Bench, family: str) -> None:
    found = bench.only("F23", talk(), family, masked(lambda row: ~row.supervised))
    assert found.evidence["rows_with"] == 30


def test_f21_rows_without_labels(bench: Bench) -> None:
    def some(rows: list[Example]) -> list[Example]:
        return [replace(r, supervised=np.zeros_like(r.supervised)) if n % 3 == 0 else r for n, r in enumerate(rows)]

    found = bench.only("F21", talk(), change=some)
    assert (found.severity, found.evidence["rows_without_labels"]) == ("warning", 10)


# --- S5, S6: length and padding


def test_f24_answers_are_cut(bench: Bench) -> None:
    long = answered(talk(), lambda n, text: text * (4 if n % 2 else 1))
    tokens = sorted(len(e.input_ids) for e in bench.prepared(long, tiny_tokenizer("chatml"))[1].train)
    found = bench.only("F24", long, max_length=tokens[20])
    whole = int(found.fix.removeprefix("max_length: ").split()[0])
    assert tokens[-1] - 64 <= whole <= tokens[-1] + 64
    assert bench.codes(long, max_length=whole) == []
    assert bench.codes(long, max_length=tokens[20], overflow="split") == []
    assert "and dropped" in bench.only("F24", long, max_length=tokens[20], overflow="drop").message


def test_f25_the_prompt_fills_the_window(bench: Bench) -> None:
    rows = each(talk(), lambda n, m: [{**m[0], "content": m[0]["content"] * (9 if n % 4 == 0 else 1)}, m[1]])
    longest = max(len(e.input_ids) for e in bench.prepared(talk(), tiny_tokenizer("chatml"))[1].train)
    found = bench.only("F25", rows, max_length=longest + 20)
    assert found.evidence["dropped"] == 10
    assert found.fix.startswith(f"max_length: {2 * (longest + 20)}")


def test_f29_padding_in_the_texts(bench: Bench) -> None:
    rows = [{"text": sentence(random.Random(n)) + "<|endoftext|>" * (n % 7)} for n in range(40)]
    assert bench.only("F29", rows, "gpt2").evidence["rows_with"] >= 10
    tokenizer = with_pad("gpt2")
    rows = [{"text": sentence(random.Random(n)) + "<|endoftext|>" + "<pad>" * (n % 3)} for n in range(40)]
    assert "<pad>" in bench.only("F29", rows, tokenizer).message


# --- S8: rows


def test_f34_empty_answers(bench: Bench) -> None:
    found = bench.only("F34", answered(talk(), lambda n, text: "  " if n % 3 == 0 else text))
    assert found.evidence["dropped_as_empty"] == 14
    invisible = answered(talk(), lambda n, text: "\u200b" * (1 + n) if n % 3 == 0 else text)
    assert bench.codes(invisible) == ["F34", "F37"]  # both are true
    assert bench.only("F34", answered(talk(), lambda n, text: "nan" if n % 5 == 0 else text))


def test_f35_one_answer_for_all(bench: Bench) -> None:
    assert bench.only("F35", answered(talk(), lambda n, text: "Yes.")).severity == "error"
    refusal = "I am sorry, but I cannot help with that request."
    found = bench.only("F35", answered(talk(), lambda n, text: refusal if n % 3 == 0 else text))
    assert found.severity == "warning"
    assert "I am sorry" in found.message


def test_f36_turns(bench: Bench) -> None:
    twice = each(talk(), lambda n, m: [*m, m[0], {**m[0], "content": f"And {n}?"}, m[1]] if n % 4 == 0 else m)
    assert "same role" in bench.only("F36", twice).message
    swap = {"user": "assistant", "assistant": "user"}
    swapped = each(talk(turns=2), lambda n, m: [{**x, "role": swap[x["role"]]} for x in m])
    assert "swapped" in bench.only("F36", swapped).message


def test_f37_encoding(bench: Bench) -> None:
    french = answered(talk(), lambda n, text: text + " Été à la forêt, déjà “vu”.")
    assert bench.codes(french) == []
    for encoding in ("latin-1", "cp1252"):
        broken = answered(
            talk(), lambda n, text, e=encoding: text + " Été à forêt €".encode().decode(e, "ignore") if n % 4 else text
        )
        assert "Latin-1" in bench.only("F37", broken).message
    assert (
        "U+FFFD" in bench.only("F37", answered(talk(), lambda n, text: text + (" d�j�" if n % 5 == 0 else ""))).message
    )
    escaped = answered(talk(), lambda n, text: text.replace(" ", "\\n", 3))
    assert "line break" in bench.only("F37", escaped).message


HIDDEN = {
    "control": "a\0b \x1b[31m",
    "bidi": "\u202edrow\u202c",
    "zero_width": "pass\u200bword \ufeff \U000e0041",
    "look_alikes": "p\u0430ypal",  # a Cyrillic a
}
NOT_HIDDEN = {
    "blanks": "\f\v",
    "a joined emoji": "👩\u200d👩\u200d👧",
    "England": "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "Persian": "می\u200cخواهم",
    "Hebrew with marks": "א\u200f\u200e",
    "Thai": "ไทย\u200bไทย",
    "Russian": "это оса и paypal, USB\u0448ный iPhone'\u0430",
    "Greek": "Ελλάδα 5 kΩ",
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_f37_hidden_characters(bench: Bench, kind: str) -> None:
    rows = answered(talk(), lambda n, text: text + (" " + HIDDEN[kind] if n % 5 == 0 else ""))
    found = bench.only("F37", rows)
    assert found.severity == "warning"
    assert [name for name in HIDDEN if found.evidence[name]] == [kind]
    rows = answered(talk(), lambda n, text: text + HIDDEN[kind] * (n == 7))
    one = next(f for f in bench.find(rows, validation_size=0) if f.slug == "hidden-characters")
    assert (one.severity, one.evidence[kind], one.evidence["rows"]) == ("info", 1, ["a.jsonl:8"])


@pytest.mark.parametrize("script", NOT_HIDDEN)
def test_f37_characters_that_scripts_need(bench: Bench, script: str) -> None:
    assert bench.codes(answered(talk(), lambda n, text: f"{text} {NOT_HIDDEN[script]}")) == []


@pytest.mark.parametrize("shift", [-1, 1])
def test_f38_answers_of_the_neighbour(bench: Bench, shift: int) -> None:
    rows = each(talk(60), lambda n, m: [{**x, "content": "Please, " + x["content"]} for x in m])  # no rare word
    answers = [row["messages"][1]["content"] for row in rows]
    found = bench.only("F38", answered(rows, lambda n, text: answers[(n + shift) % 60]))
    assert found.evidence["matches_own"] < found.evidence["rows_compared"] / 4
    assert ("previous" if shift == -1 else "next") in found.message


def test_f39_duplicates(bench: Bench) -> None:
    rows = [
        {"text": sentence(random.Random(n // 2), 150) + sentence(random.Random(100 + n), 150), "pair": n // 2}
        for n in range(40)
    ]
    found = bench.find(rows, "gpt2", max_length=200, split_by="pair")
    assert [f.code for f in found] == ["F24", "F39"]  # both are true
    assert found[1].evidence["equal_after_truncation"] == 15
    assert bench.only("F39", talk(30) + talk(30)[:14]).severity == "info"
    assert bench.only("F39", talk(30) * 4).severity == "warning"


# --- S9: split


def test_f43_validation_rows_of_training(bench: Bench) -> None:
    config, result = bench.prepared(talk(), tiny_tokenizer("chatml"))
    found = find(config, tiny_tokenizer("chatml"), result.train, result.train[:10], result.report)
    assert [(f.code, f.severity) for f in found] == [("F43", "error")]
    assert bench.only("F43", talk(), validation_size=0).severity == "info"


def test_f44_passages_on_both_sides(bench: Bench) -> None:
    rng = random.Random(3)
    passages = [sentence(rng, 40) for _ in range(20)]
    turns = [(sentence(rng, 9), f"{passages[n // 2]} {sentence(rng, 9)}", *talk(1, seed=n)) for n in range(40)]
    rows = [
        {"messages": chat(asked, told) + more["messages"], "doc": n // 2} for n, (asked, told, more) in enumerate(turns)
    ]
    found = bench.only("F44", rows)
    assert found.evidence["rows_with"] >= 4
    assert "split_by" in found.fix
    assert bench.codes(rows, split_by="doc") == []
    # ids that say it, and ids that do not
    assert bench.codes([{**row, "id": f"c0DE{n // 2:02}_{n % 2}"} for n, row in enumerate(rows)]) == []
    assert bench.only("F44", [{**row, "id": f"2024_{n:02}"} for n, row in enumerate(rows)])


def test_one_document_under_several_questions(bench: Bench) -> None:
    rng = random.Random(3)
    documents = [sentence(rng, 40) for _ in range(20)]
    rows = [{"messages": chat(f"{documents[n // 2]} {sentence(rng, 40)}?", sentence(rng, 20))} for n in range(40)]
    assert bench.codes(rows) == []


def test_f47_other_labels_in_validation(bench: Bench) -> None:
    tokenizer = tiny_tokenizer("chatml")
    config, result = bench.prepared(talk(), tokenizer)
    everything = masked(lambda row: np.arange(len(row.supervised)) > 0)
    found = find(config, tokenizer, result.train, everything(result.validation), result.report)
    assert [f.code for f in found] == ["F47"]
    assert found[0].evidence["validation_rows_with_prompt"] == 10


def test_f48_three_validation_rows(bench: Bench) -> None:
    assert bench.only("F48", talk(120), validation_size=3).fix == "validation_size: 20"


def test_f48_validation_of_another_kind(bench: Bench, write: Writer) -> None:
    own = write("own.jsonl", *answered(talk(40, seed=9), lambda n, text: f"Yes {n}."))
    found = bench.only("F48", talk(), eval_dataset=str(own), validation_size=0)
    assert "another kind" in found.message


# --- controls: nothing is found


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


def test_all_tokens_when_asked_for(bench: Bench) -> None:
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


def test_a_row_cut_behind_a_blank_is_no_row_without_an_end(bench: Bench) -> None:
    """max_length falls on the line breaks that every answer is full of."""
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
    assert bench.codes(think, "qwen3") == []
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


def test_orders_of_turns_that_are_meant(bench: Bench) -> None:
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
    """Neighbours on one topic: their answers share words with the prompt, its own as well."""
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


# --- the list itself


def test_the_shape_of_a_finding(bench: Bench) -> None:
    found = bench.find(answered(talk(), lambda n, text: "Yes."), "glm", validation_size=0)
    assert [finding.severity for finding in found] == sorted(
        (f.severity for f in found), key="error warning info".split().index
    )
    for finding in found:
        shape = json.loads(json.dumps(finding.to_json()))
        assert list(shape) == ["code", "slug", "suspect", "severity", "message", "evidence", "fix"]
        assert finding.message.endswith(".")
        assert finding.fix


def test_every_rule_says_when_it_is_wrong() -> None:
    for rule in RULES:
        assert rule.__doc__
        for part in ("Sees:", "Why:", "Not:", "Fix:", "Wrong when:"):
            assert part in rule.__doc__, (rule.__name__, part)


def test_five_thousand_rows_in_seconds(bench: Bench) -> None:
    rows = talk(50, turns=4)
    config, result = bench.prepared(rows, tiny_tokenizer("chatml"))
    many = [replace(row, where=f"a.jsonl:{n}") for n, row in enumerate([*result.train] * 135)]
    started = time.process_time()
    find(config, tiny_tokenizer("chatml"), many[:5000], result.validation, result.report)
    assert time.process_time() - started < 10


# --- large data: a sample


def test_of_large_data_a_sample_is_judged_and_says_so(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings_facts, "NUM_READ", 32)
    rows = talk(400)
    shifted = answered(rows, lambda n, text: rows[(n + 1) % 400]["messages"][1]["content"])  # is seen by neighbours
    found = bench.only("F38", shifted)
    assert (found.evidence["rows_judged"], found.evidence["training_rows"]) == (32, 300)
    assert bench.codes(rows) == []
    blank = answered(rows, lambda n, text: text if n % 4 else " ")
    found = bench.only("F34", blank)
    # a quarter is dropped: of 225 + 75 + 100 rows, or as many of those that are judged
    assert found.evidence["dropped_as_empty"] == 100 * 32 // 225


def test_what_one_row_makes_wrong_is_asked_of_all_rows(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings_facts, "NUM_READ", 16)
    tokenizer = tiny_tokenizer("chatml")
    config, result = bench.prepared(talk(100), tokenizer)
    train, validation = [*result.train], [*result.validation]
    in_sample = {row.where for row in findings_facts.judged(train)}
    outside = next(row for row in train if row.where not in in_sample)
    assert len(in_sample) == 16

    leaked = find(config, tokenizer, train, validation[:3] + train[40:60], result.report)
    assert "F43" in [f.code for f in leaked]
    copies = find(config, tokenizer, train + [outside] * 10, validation, result.report)
    assert [f.evidence["equal_after_truncation"] for f in copies if f.code == "F39"] == [10]
    config = config.replaced("test", model_name_or_path=bench.model(config={"vocab_size": 1000}))
    odd = replace(outside, input_ids=np.append(outside.input_ids[:-1], 1234).astype(np.int32))
    beyond = find(config, tokenizer, [odd if row is outside else row for row in train], validation, result.report)
    assert [f.evidence["rows"] for f in beyond if f.code == "F05"] == [[outside.where]]


def test_passages_are_looked_for_in_all_rows(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings_facts, "NUM_READ", 16)
    rng = random.Random(3)
    passages = [sentence(rng, 40) for _ in range(60)]
    told = [f"{passages[n % 60]} {sentence(rng, 9)}" for n in range(120)]
    rows = [{"messages": chat(sentence(rng, 9), one)} for one in told]
    found = [f for f in bench.find(rows) if f.code == "F44"]
    assert found[0].evidence["rows_with"] >= 5
