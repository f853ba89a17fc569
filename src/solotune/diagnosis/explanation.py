"""The text of `solotune explain` and docs/faults.md: the docstring of a fault's rule, and its catalogue entry.

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
from solotune.result_repr import ResultRepr, Table

WIDTH = 80
HEADINGS = {
    "Sees": "Symptoms",
    "Why": "Why it matters",
    "Not": "Do not confuse with",
    "Fix": "Fix",
    "Wrong when": "When this warning is wrong",
    "Then": "After the fix",
    "Source": "Source",
}
"""Headings of a rule's docstring -> what is printed, in this order."""
_HEADING = re.compile(rf"({'|'.join(HEADINGS)}): ")


@dataclass(frozen=True, repr=False)
class Explanation(ResultRepr):
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
        return "\n".join([*parts, *map(_hanging, self.sections)])

    @property
    def sections(self) -> list[str]:
        """The fault's paragraphs under their printed headings: `Symptoms: ...`, `Fix: ...`."""
        own = dict(paragraph.split(": ", 1) for paragraph in paragraphs(self.doc))
        own["Then"] = f"{self.expect}."
        lines = [f"{printed}: {own[heading]}" for heading, printed in HEADINGS.items() if heading in own]
        return lines + ([f"Not possible in solotune: {self.prevented}."] if self.prevented else [])

    def figures(self) -> dict[str, object]:
        return {"code": self.code, "slug": self.slug or None, "title": self.title}

    def tables(self) -> list[Table]:
        return [
            Table("", (), [tuple(section.split(": ", 1)) for section in self.sections] if not self.faults else []),
            Table("Faults", (), [(fault["code"], fault["slug"], fault["title"]) for fault in self.faults]),
        ]

    def to_json(self) -> dict[str, Any]:
        names = ("code", "slug", "suspect", "title", "doc", "fix", "expect", "prevented", "faults")
        return {name: getattr(self, name) for name in names}


def explained(word: str) -> Explanation:
    """Explain a fault or a suspect, by code or slug.

    Raises:
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
    """The docstring of the fault's first rule without its first line, which repeats the title; empty without a rule."""
    known = rules().get(code, ())
    text = inspect.cleandoc(known[0].doc) if known else ""
    _, _, rest = text.partition("\n")
    return rest.strip()


def paragraphs(doc: str) -> list[str]:
    """The docstring's paragraphs with their headings, one line each: `Sees: ...`, `Why: ...`."""
    found: list[str] = []
    for line in doc.splitlines():
        if _HEADING.match(line) or not found:
            found.append(line)
        elif line.strip():
            found[-1] += " " + line.strip()
    return [paragraph for paragraph in found if paragraph]


def _hanging(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="    ")
