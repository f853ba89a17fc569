"""Explanations of the faults: their headings, and fixes that can be done."""

from __future__ import annotations

import inspect
import re

import pytest

from solotune.config.run_config import RunConfig
from solotune.diagnosis.catalogue import FAULTS, SUSPECTS
from solotune.diagnosis.explanation import HEADINGS, doc_of, explained, paragraphs
from solotune.diagnosis.rules import rules

_KEY = re.compile(r"\b([a-z]+(?:_[a-z0-9]+)+): ")
_OTHER_TOOLS = ("TRL", "PEFT", "transformers", "other tools")


@pytest.mark.parametrize("code", FAULTS)
def test_sections_have_their_printed_headings_in_order(code: str) -> None:
    headings = [section.split(": ")[0] for section in explained(code).sections]
    expected = list(HEADINGS.values()) + ["Not possible in solotune"] * bool(FAULTS[code].prevented)
    assert headings == expected


@pytest.mark.parametrize("code", FAULTS)
def test_fixes_have_keys_of_solotune_or_name_the_other_tool(code: str) -> None:
    explained_fix = next(section for section in paragraphs(explained(code).doc) if section.startswith("Fix: "))
    for fix in (FAULTS[code].fix, explained_fix):
        foreign = set(_KEY.findall(fix)) - set(RunConfig.model_fields)
        assert not foreign or any(tool in fix for tool in _OTHER_TOOLS), (fix, foreign)


def test_the_docstrings_read_from_source_are_those_of_the_first_rules() -> None:
    for code in FAULTS:
        known = rules().get(code, ())
        doc = inspect.cleandoc(known[0].doc).partition("\n")[2].strip() if known else ""
        assert doc_of(code) == doc, code


def test_without_a_code_the_suspects_are_listed() -> None:
    found = explained()
    lines = found.text.splitlines()
    assert [line.split()[0] for line in lines[2:17]] == list(SUSPECTS)
    assert found.to_json()["suspects"] == SUSPECTS
