"""README and the pages of the documentation, as a reader and a test of their commands see them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    *sorted(path for path in DOCS.rglob("*.md") if "migrate" not in path.parts),
]


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str
    line: int
    file: str | None
    """The name of the file that the block shows: the sentence above begins or ends with it."""


def blocks(page: Path) -> Iterator[Block]:
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    for place, token in enumerate(tokens):
        if token.type != "fence":
            continue
        above = tokens[place - 2].content if place >= 2 and tokens[place - 1].type == "paragraph_close" else ""
        named = re.match(r"`([\w-]+\.\w+)`[,;:]", above) or re.search(r"`([\w-]+\.\w+)`:$", above)
        file = named[1] if named and token.info in ("json", "yaml", "text") else None
        yield Block(token.info, token.content, (token.map or [0])[0] + 1, file)


def commands(block: Block) -> Iterator[tuple[int, str, str]]:
    """(line, command, comment) of each line of a shell block; lines of a console block begin with `$`."""
    for number, line in enumerate(block.text.splitlines(), start=block.line + 1):
        if block.language == "console":
            if not line.startswith("$ "):
                continue
            line = line[2:]
        command, _, comment = line.partition("  #")
        if command.strip() and not command.startswith("#"):
            yield number, command.strip(), comment.strip()


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    headings = [tokens[place + 1].content for place, token in enumerate(tokens) if token.type == "heading_open"]
    plain = (re.sub(r"`|\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


@cache
def links(page: Path) -> set[Path]:
    """The pages that a page links to."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#:\s]+\.md)(?:#[^)]*)?\)", text)
    return {(page.parent / target).resolve() for target in targets}
