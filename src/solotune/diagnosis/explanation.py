"""The text of `solotune explain` and docs/faults.md: the docstring of a fault's rule, and its catalogue entry.

explained("F17")    explained("pad-masks-terminator")    explained("S4")    explained()

The docstrings are read from the source files: importing the rules imports torch, which takes seconds.
"""

from __future__ import annotations

import ast
import re
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from solotune.diagnosis import catalogue
from solotune.diagnosis.catalogue import FAULTS, SUSPECTS, Fault
from solotune.regular_files import read_bytes
from solotune.result_repr import ResultRepr, Table

WIDTH = 80
RULES = Path(__file__).with_name("rules")
MAX_SOURCE_BYTES = 1 << 20
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
LIST_ENDS = (
    "solotune explain S4    the faults of a suspect",
    "solotune explain F17   a fault: symptoms, causes, fix",
)
_HEADING = re.compile(rf"({'|'.join(HEADINGS)}): ")


@dataclass(frozen=True, repr=False)
class Explanation(ResultRepr):
    """A fault, a suspect with its faults, or all suspects."""

    code: str
    slug: str
    suspect: str
    title: str
    doc: str  # of the rule: Sees, Why, Not, Fix, Wrong when, Source
    fix: str = ""
    expect: str = ""
    prevented: str = ""
    faults: list[dict[str, str]] = field(default_factory=list)  # of a suspect
    suspects: dict[str, str] = field(default_factory=dict)  # number -> what it is; only of the list of all

    @property
    def text(self) -> str:
        """For a terminal of 80 columns."""
        return self.wrapped(WIDTH)

    def wrapped(self, width: int) -> str:
        """For a terminal of `width` columns."""
        if self.suspects:
            lines = [f"{number:5}{what}" for number, what in self.suspects.items()]
            return "\n".join([f"{self.title}:", "", *lines, "", *LIST_ENDS])
        if self.faults:
            lines = [f"{fault['code']}  {fault['slug']:28}{fault['title']}" for fault in self.faults]
            indent = " " * (33 if width >= WIDTH else 5)
            wrapped = [textwrap.fill(line, width, subsequent_indent=indent) for line in lines]
            return "\n".join([f"{self.code} {self.title}", "", *wrapped])
        parts = [
            f"{self.code} {self.slug} ({self.suspect}, {SUSPECTS[self.suspect]})",
            "",
            textwrap.fill(self.title, width),
            "",
        ]
        return "\n".join([*parts, *(textwrap.fill(one, width, subsequent_indent="    ") for one in self.sections)])

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
        names = ("code", "slug", "suspect", "title", "doc", "fix", "expect", "prevented", "faults", "suspects")
        return {name: getattr(self, name) for name in names}


def explained(word: str | None = None) -> Explanation:
    """Explain a fault or a suspect, by code or slug; without one, list the suspects.

    Raises:
        InputError: there is no such fault.
    """
    if word is None:
        return Explanation("", "", "", "The fifteen suspects: where fine-tuning goes wrong", "", suspects=SUSPECTS)
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
    mark = f'@rule("{code}"'
    for path in sorted(RULES.glob("*.py")):
        text = read_bytes(path, MAX_SOURCE_BYTES).decode()
        if mark not in text or path.stem == "__init__":
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and any(_is_rule(one, code) for one in node.decorator_list):
                return (ast.get_docstring(node) or "").partition("\n")[2].strip()
    return ""


def _is_rule(decorator: ast.expr, code: str) -> bool:
    return isinstance(decorator, ast.Call) and [ast.unparse(one) for one in decorator.args[:1]] == [repr(code)]


def paragraphs(doc: str) -> list[str]:
    """The docstring's paragraphs with their headings, one line each: `Sees: ...`, `Why: ...`."""
    found: list[str] = []
    for line in doc.splitlines():
        if _HEADING.match(line) or not found:
            found.append(line)
        elif line.strip():
            found[-1] += " " + line.strip()
    return [paragraph for paragraph in found if paragraph]
