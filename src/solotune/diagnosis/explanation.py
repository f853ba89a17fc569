"""What `solotune explain` says and what docs/faults.md is made of: the docstring of a fault's rule, and its entry.

explained("F17")    explained("pad-masks-terminator")    explained("S4")
"""

from __future__ import annotations

import inspect
import re
import textwrap
from dataclasses import dataclass, field
from typing import Any

from solotune.diagnosis import catalogue
from solotune.diagnosis.catalogue import FAULTS, SUSPECTS, Fault
from solotune.diagnosis.rules import rules

WIDTH = 80
_HEADING = re.compile(r"[A-Z][a-z ]+: ")


@dataclass(frozen=True)
class Explanation:
    """A fault, or a suspect with its faults."""

    code: str
    slug: str
    suspect: str
    title: str
    doc: str  # of the rule: Sees, Why, Not, Fix, Wrong when, Source
    fix: str = ""
    expect: str = ""
    prevented: str = ""
    faults: list[dict[str, str]] = field(default_factory=list)  # of a suspect

    @property
    def text(self) -> str:
        """For a terminal of 80 columns."""
        if self.faults:
            lines = [f"{fault['code']}  {fault['slug']:28}{fault['title']}" for fault in self.faults]
            wrapped = [textwrap.fill(line, WIDTH, subsequent_indent=" " * 33) for line in lines]
            return "\n".join([f"{self.code} {self.title}", "", *wrapped])
        parts = [
            f"{self.code} {self.slug} ({self.suspect}, {SUSPECTS[self.suspect]})",
            "",
            textwrap.fill(self.title, WIDTH),
            "",
        ]
        parts += [_hanging(paragraph) for paragraph in paragraphs(self.doc)]
        parts += [] if "\nFix: " in self.doc else [_hanging(f"Fix: {self.fix}.")]
        parts.append(_hanging(f"Then: {self.expect}."))
        if self.prevented:
            parts.append(_hanging(f"Trained by solotune it cannot happen: {self.prevented}."))
        return "\n".join(parts)

    def to_json(self) -> dict[str, Any]:
        names = ("code", "slug", "suspect", "title", "doc", "fix", "expect", "prevented", "faults")
        return {name: getattr(self, name) for name in names}


def explained(word: str) -> Explanation:
    """Raises:
    InputError: there is no such fault.
    """
    code = catalogue.find(word)
    if code in SUSPECTS:
        faults = [fault.to_json() for fault in faults_of(code)]
        return Explanation(code, "", code, SUSPECTS[code], "", faults=faults)
    fault = FAULTS[code]
    return Explanation(
        code, fault.slug, fault.suspect, fault.title, doc_of(code), fault.fix, fault.expect, fault.prevented
    )


def faults_of(suspect: str) -> list[Fault]:
    """The faults of a suspect, in order."""
    return [fault for fault in FAULTS.values() if fault.suspect == suspect]


def doc_of(code: str) -> str:
    """The docstring of the fault's first rule without its first line, which the title says; empty without a rule."""
    known = rules().get(code, ())
    text = inspect.cleandoc(known[0].doc) if known else ""
    _, _, rest = text.partition("\n")
    return rest.strip()


def paragraphs(doc: str) -> list[str]:
    """The docstring's headed paragraphs, one line each: `Sees: ...`, `Why: ...`."""
    found: list[str] = []
    for line in doc.splitlines():
        if _HEADING.match(line) or not found:
            found.append(line)
        elif line.strip():
            found[-1] += " " + line.strip()
    return [paragraph for paragraph in found if paragraph]


def _hanging(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="    ")
