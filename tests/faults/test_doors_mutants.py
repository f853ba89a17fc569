"""The list of mutants is up to date: each protection is still there, once, and so is the test that kills its mutant."""

from __future__ import annotations

import re

import pytest

from tests.faults.mutants_doors import MUTANTS, ROOT, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_protection_and_its_test_are_there(mutant: Mutant) -> None:
    source = (ROOT / "src" / "solotune" / mutant.file).read_text(encoding="utf-8")
    assert source.count(mutant.old) == 1
    path, _, test = mutant.killed_by.partition("::")
    assert f"def {re.split(r'[^a-z0-9_]', test, maxsplit=1)[0]}(" in (ROOT / path).read_text(encoding="utf-8")
