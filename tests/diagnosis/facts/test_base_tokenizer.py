"""The base's own tokenizer and template, for a run that may have others."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

from solotune.diagnosis.facts.base_tokenizer import changed_ids, with_base_tokenizer
from solotune.diagnosis.run_facts import RunFacts, Settings
from tests.dataset.conftest import tiny_tokenizer
from tests.diagnosis.probed_models import moved


def test_the_tokenizer_beside_the_base(tmp_path: Path) -> None:
    base = tiny_tokenizer("chatml")
    base.save_pretrained(tmp_path)
    own = copy.deepcopy(base)
    own.chat_template = "{{ messages[0].content }}"
    one = RunFacts("test", Settings({"model_name_or_path": str(tmp_path)}), own)
    found = with_base_tokenizer(one)
    assert found.base_template == base.chat_template
    changed_V = changed_ids(found)
    assert changed_V is not None and not changed_V.any()
    for settings in ({"model_name_or_path": str(tmp_path / "none")}, {}, {**one.settings.values, "tool": "solotune"}):
        assert with_base_tokenizer(replace(one, settings=Settings(settings))).base_tokenizer is None


def test_names_of_added_tokens_are_no_other_tokenizer() -> None:
    base, own = tiny_tokenizer("chatml"), moved(tiny_tokenizer("chatml"), 3)
    one = RunFacts("test", Settings({}), own, base_tokenizer=base)
    changed_V = changed_ids(one)
    assert changed_V is not None and changed_V.mean() > 0.9
    assert not changed_V[base.convert_tokens_to_ids("<|im_end|>")]
    assert changed_ids(replace(one, base_tokenizer=None)) is None
