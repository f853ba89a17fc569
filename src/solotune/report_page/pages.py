"""What a page shows, as dataclasses without HTML: a page has sections, a section has blocks.

Each kind of block has one macro of its name in `templates/blocks.html`. Texts are plain texts: the templates escape
them. Numbers that people read are texts already, formatted once, where their unit is known.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

Tone = Literal["good", "bad", "warn", "plain"]
MAX_TEXT = 4_000  # characters of one text; a training row can have megabytes


@dataclass(frozen=True)
class Text:
    """A text out of data, cut where it is long, with a note that says so."""

    text: str
    note: str = ""

    @classmethod
    def cut(cls, text: str, longest: int = MAX_TEXT) -> Text:
        if len(text) <= longest:
            return cls(text)
        return cls(text[:longest], f"the first {longest:,} of {len(text):,} characters")


@dataclass(frozen=True)
class Callout:
    """A sentence that stands out, with lines below it."""

    kind: ClassVar[str] = "callout"
    tone: Tone
    headline: str
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tile:
    """One key figure."""

    name: str
    value: str
    detail: str = ""
    tone: Tone = "plain"


@dataclass(frozen=True)
class Tiles:
    kind: ClassVar[str] = "tiles"
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Culprit:
    """One fault that a diagnosis names."""

    headline: str
    where: str
    confidence: str
    evidence: tuple[str, ...]
    change: str
    expect: str


@dataclass(frozen=True)
class Culprits:
    kind: ClassVar[str] = "culprits"
    culprits: tuple[Culprit, ...]


@dataclass(frozen=True)
class Table:
    """A table; the first column names the row."""

    kind: ClassVar[str] = "table"
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: bool = False  # the columns after the first are numbers
    code: bool = False  # the first two columns are keys and values of a config
    folded: str = ""  # shown on demand, under this label


@dataclass(frozen=True)
class Whisker:
    """A value with its error, as places on a scale from 0 to 100."""

    name: str
    value: str
    at: float
    low: float
    high: float


@dataclass(frozen=True)
class ErrorBars:
    kind: ClassVar[str] = "error_bars"
    caption: str
    whiskers: tuple[Whisker, ...]
    first: str  # the ends of the scale
    last: str


@dataclass(frozen=True)
class Part:
    """A part of a stacked bar; `share` is percent of the longest bar."""

    name: str
    value: str
    share: float


@dataclass(frozen=True)
class Stack:
    name: str
    total: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Stacks:
    kind: ClassVar[str] = "stacks"
    caption: str
    stacks: tuple[Stack, ...]


@dataclass(frozen=True)
class Bin:
    label: str
    count: int
    height: float  # percent of the highest


@dataclass(frozen=True)
class Histogram:
    kind: ClassVar[str] = "histogram"
    caption: str
    axis: str
    bins: tuple[Bin, ...]
    summary: str


@dataclass(frozen=True)
class Line:
    """One line of a chart: a curve of a run, by its key in `curves`."""

    key: str
    label: str
    style: Literal["main", "faint", "held_out", "other", "other_held_out"] = "main"
    run: int = 0


@dataclass(frozen=True)
class Level:
    """A horizontal line: what was planned, or a limit."""

    value: float
    label: str


@dataclass(frozen=True)
class Chart:
    """Curves over the steps of a run; `table` has the same figures for who does not see the drawing."""

    kind: ClassVar[str] = "chart"
    name: str
    title: str
    unit: str  # loss, rate, plain, seconds or bytes: how the script writes a value
    lines: tuple[Line, ...]
    summary: str
    table: Table
    levels: tuple[Level, ...] = ()
    can_be_log: bool = False

    def to_json(self) -> dict[str, Any]:
        """What the script needs to draw it."""
        return {
            "name": self.name,
            "title": self.title,
            "unit": self.unit,
            "lines": [{"key": one.key, "label": one.label, "style": one.style, "run": one.run} for one in self.lines],
            "levels": [{"value": one.value, "label": one.label} for one in self.levels],
        }


@dataclass(frozen=True)
class Sample:
    """One held-out prompt with the answers of both models."""

    where: str
    prompt: Text
    reference: Text
    base: Text
    tuned: Text


@dataclass(frozen=True)
class Samples:
    kind: ClassVar[str] = "samples"
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Piece:
    """Tokens of a row that the loss takes alike."""

    text: str
    supervised: bool
    num_tokens: int
    weight: str = ""  # if the data has weights


@dataclass(frozen=True)
class TokenRow:
    """A row as the model sees it."""

    where: str
    pieces: tuple[Piece, ...]
    summary: str
    note: str = ""


@dataclass(frozen=True)
class TokenRows:
    kind: ClassVar[str] = "token_rows"
    rows: tuple[TokenRow, ...]


Block = Callout | Tiles | Culprits | Table | ErrorBars | Stacks | Histogram | Chart | Samples | TokenRows


@dataclass(frozen=True)
class Section:
    """A part of the page under its own heading. `missing` says in words what the run does not have."""

    name: str
    title: str
    blocks: tuple[Block, ...] = ()
    missing: tuple[str, ...] = ()
    intro: str = ""


@dataclass(frozen=True)
class Page:
    """A whole page."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]
    version: str
    written: str  # when
    curves: tuple[dict[str, Any], ...] = field(default=())  # of each run: see `curves.curves`
