"""S3, begin of text and prompts of serving: each fault is found, and no other."""

from __future__ import annotations

import copy
import random
from typing import Any

from transformers import PreTrainedTokenizerBase

from solotune.diagnosis.rules import ask_all
from solotune.diagnosis.run_facts import RunFacts, Settings
from tests.dataset.conftest import CHATML, FAMILIES, tiny_tokenizer
from tests.diagnosis.rules.rows import Bench, answered, sentence, talk, with_own_template, with_template


def test_f08_bos_twice(bench: Bench) -> None:
    template = "{{ bos_token }}" + str(FAMILIES["llama3"][0])
    found = bench.only("F08", talk(), with_template("llama3", template), chat_template_path="my.jinja")
    assert (found.fix, found.severity) == ("write <|begin_of_text|> once in my.jinja", "error")
    some = [{"text": "<s><s>" * (n % 4 == 0) + sentence(random.Random(n))} for n in range(40)]
    assert (rest := bench.only("F08", some, "mistral")).severity == "warning"  # of another source
    assert rest.affected is not None and 0.1 < rest.affected < 0.5
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
    assert found.severity == "error"
    assert bench.codes(talk(), tokenizer) == []  # the model's own, then served without it too
    assert bench.codes(talk(), adding_bos("llama3", template), chat_template_path="my.jinja") == []


def test_f09_a_template_file_without_what_the_models_own_begins_with(bench: Bench) -> None:
    model = with_own_template(bench, copy.deepcopy(tiny_tokenizer("llama3")), "<|eot_id|>")
    without = with_template("llama3", str(FAMILIES["llama3"][0]).replace("{{ bos_token }}", ""))
    keys = {"model_name_or_path": model, "chat_template_path": "my.jinja"}
    assert "the model's own template begins with" in bench.only("F09", talk(), without, **keys).message
    assert bench.codes(talk(), "llama3", **keys) == []


def test_f09_a_model_whose_own_template_writes_none(bench: Bench) -> None:
    """The tokenizer adds one to plain text, and no chat of this model ever had one (Zephyr)."""
    template = str(FAMILIES["llama3"][0]).replace("{{ bos_token }}", "")
    model = with_own_template(bench, adding_bos("llama3", template), "<|eot_id|>")
    keys = {"model_name_or_path": model, "chat_template_path": "my.jinja"}
    assert bench.codes(talk(), adding_bos("llama3", template + "{# mine #}"), **keys) == []


def test_f09_of_a_family_that_always_begins_with_it(bench: Bench) -> None:
    """Gemma's own template, edited: its tokenizer still starts every text with it. Control: another family."""
    template = str(FAMILIES["gemma"][0]).replace("{{ bos_token }}", "")
    without = adding_bos("gemma", template)
    for family, codes in (("gemma2", ["F09"]), ("llama", [])):
        model = bench.model(config={"model_type": family, "vocab_size": len(without)})
        assert bench.codes(talk(), without, model_name_or_path=model) == codes


def test_f16_the_generation_prompt_opens_what_answers_do_not_have(bench: Bench) -> None:
    found = bench.only("F16", talk(), "deepseek")
    assert found.evidence["template_differs"] == found.evidence["rows_read"]
    assert "<think>" in found.message
    assert found.severity == "warning"  # the model's own template does so


def test_f16_a_prompt_that_ends_inside_a_token(bench: Bench) -> None:
    pairs = [[sentence(random.Random(seed + n)) for seed in (0, 1000)] for n in range(40)]
    rows = [{"prompt": f"Q: {question} A: ", "completion": f"the {answer}"} for question, answer in pairs]
    assert tiny_tokenizer("gpt2").tokenize(": the")[-1] == "Ġthe"
    found = bench.only("F16", rows, "gpt2")
    assert found.fix == "move the space from the end of the prompts to the start of the completions"
    assert (found.severity, found.affected) == ("error", 1.0)
    moved = [{"prompt": r["prompt"].rstrip(), "completion": " " + r["completion"]} for r in rows]
    assert bench.codes(moved, "gpt2") == []


def test_f16_a_header_that_ends_in_a_blank(bench: Bench) -> None:
    template = CHATML.replace("assistant\n{% endif", "assistant: {% endif").replace("role }}\n", "role }}: ")
    rows = answered(talk(), lambda n, text: f"the {text}" if n % 3 == 0 else text)
    found = bench.only("F16", rows, with_template("chatml", template))
    assert found.severity == "error"  # of the template, though not every answer joins
    assert found.affected is not None and 0 < found.affected < 0.5


def texts(begin: str, tool: str | None = None, **keys: Any) -> list[tuple[str, str]]:
    """What the rules say of texts that another trainer tokenized."""
    template = str(FAMILIES["llama3"][0])
    said = {
        "texts": [begin + sentence(random.Random(n)) for n in range(8)],
        "missing": {"batches": "not saved"},
        **keys,
    }
    one = RunFacts("test", Settings({"tool": tool}), tokenizer=adding_bos("llama3", template), **said)
    return [(signal.code, signal.kind) for signal in ask_all(one)[0] if signal.code == "F08"]


def test_f08_texts_that_the_tokenizer_begins_again() -> None:
    begin = "<|begin_of_text|>"
    assert texts(begin) == texts(begin, "transformers") == [("F08", "measured")]
    assert texts(begin, "llama-factory") == [("F08", "remark")]  # leaves the second one out
    assert texts("") == texts(begin, missing={}) == []  # the rows are known, and judged themselves


def test_f09_a_template_that_another_trainer_has_set(bench: Bench) -> None:
    """Without a template file: the tokenizer's template is another than that of the base's files."""
    model = with_own_template(bench, copy.deepcopy(tiny_tokenizer("llama3")), "<|eot_id|>")
    without = with_template("llama3", str(FAMILIES["llama3"][0]).replace("{{ bos_token }}", ""))
    assert bench.codes(talk(), without, model_name_or_path=model) == ["F09"]
    assert bench.codes(talk(), "llama3", model_name_or_path=model) == []
