"""Data report: rows read, kept, dropped and truncated, and how many of their tokens are trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from solotune.dataset.chat.rendered_text import OWN
from solotune.dataset.token_counts import LabelBudget
from solotune.result_repr import ResultRepr, Table

EXACT_DUPLICATE = "exact duplicate"
NOTHING_TO_LEARN = "no supervised token"
ANSWER_PAST_MAX_LENGTH = "answer beyond max_length"
MOST_UNUSED = 12  # keys that the line names
LONGER_THAN_MAX_LENGTH = "longer than max_length"
MOST_NAMED = 20
MOST_SYSTEM_PROMPTS = 50
"""Different system prompts that are counted; a chat uses one only if all rows share it."""
MOST_ANSWER_ENDS = 5
NUM_PLACES = 3
PLAIN = "plain"


@dataclass(slots=True, repr=False)
class DataReport(ResultRepr):
    """Counts of rows: read = kept + dropped, and examples = kept + added by splitting."""

    format: str
    num_read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    num_train: int = 0
    num_validation: int = 0
    num_tokens: int = 0
    num_supervised: int = 0
    total_weight: float = 0.0
    """Sum of the weights of the loss tokens; their number if all weights are 0 or 1."""
    num_weighted_rows: int = 0
    """Kept rows in which a loss token has a weight other than 1."""
    num_weighted_answers: int = 0
    num_groups: int = 0
    num_exact_duplicates: int = 0
    """Copies of an earlier row that were removed."""
    num_copies_kept: int = 0
    """Copies of an earlier row that were kept, with `dataset_exact_deduplication: false`."""
    num_near_duplicates: int = 0
    num_close_rows: int = 0
    """Rows of `eval_dataset` that are close to a training row, as the training rows are to each other."""
    num_truncated: int = 0
    num_answers_cut: int = 0
    """Truncated rows that lost loss tokens."""
    num_cut_as_text: int = 0
    """Rows of which only the beginning was tokenised, since the rest is certainly beyond `max_length`."""
    num_split: int = 0
    num_added_by_split: int = 0
    """Examples beyond one per row."""
    num_parts_without_label: int = 0
    """Parts of split rows that were left out because they have no loss token."""
    num_with_forged_tokens: int = 0
    contents: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What the chats say, and how often the rendering leaves it out: kind (`rendered_content.Part`) -> `total`, `lost`
    and up to three `rows` with a loss."""
    text_formats: Counter[str] = field(default_factory=Counter)
    """Rows of plain text by the prompt format in them: `OWN`, a known one, or `PLAIN`."""
    system_prompts: Counter[str] = field(default_factory=Counter)
    """System prompt -> training rows that begin with it, "" for none; the first `MOST_SYSTEM_PROMPTS` of them."""
    answer_ends: Counter[int] = field(default_factory=Counter)
    """Id of the last loss token -> training rows that end with it."""
    train_sha256: str = ""
    validation_sha256: str = ""
    rendered_on: str = ""
    """The date (ISO 8601) that templates see as today."""
    labels: LabelBudget = field(default_factory=LabelBudget)
    examples: list[dict[str, Any]] = field(default_factory=list)
    """A few complete training rows: their place, and pieces of text with whether they are trained on."""
    packing: dict[str, Any] | None = None
    """With `packing: true`: statistics of the packed training rows, see `packing.account`."""
    schema_nulls: Counter[str] = field(default_factory=Counter)
    """Place in the rows -> nulls that the schema of a parquet or arrow file forced there; they were left out."""
    beside_rows: Counter[str] = field(default_factory=Counter)
    """What a file holds beside its rows, which nothing reads -> how many of it."""
    unused: list[dict[str, Any]] = field(default_factory=list)
    """Keys of rows, messages, content parts and tool calls that nothing reads, see `UnusedKeys.to_json`."""
    findings: list[dict[str, Any]] | None = None
    """Findings of the rules on rows; None if the rules did not run."""

    @property
    def num_kept(self) -> int:
        """Number of rows in the files that are trained or evaluated on."""
        return self.num_train + self.num_validation - self.num_added_by_split

    @property
    def day(self) -> date | None:
        """`rendered_on` as a date."""
        return date.fromisoformat(self.rendered_on) if self.rendered_on else None

    @classmethod
    def from_json_fields(cls, values: dict[str, Any]) -> DataReport:
        """Rebuild the report from its fields after a JSON round trip (which turns keys into strings)."""
        labels = dict(values["labels"])
        labels["leading_bos"] = Counter({int(number): rows for number, rows in labels["leading_bos"].items()})
        names = ("dropped", "schema_nulls", "beside_rows", "text_formats", "system_prompts")
        counters = {name: Counter(values[name]) for name in names}
        ends = Counter({int(token): rows for token, rows in values["answer_ends"].items()})
        return cls(**{**values, **counters, "answer_ends": ends, "labels": LabelBudget(**labels)})

    @property
    def prompt_format(self) -> str:
        """How the model of a run on these rows is to be asked: `chat` (through the chat template) or `text`."""
        is_rendered = 2 * self.text_formats[OWN] >= self.text_formats.total()
        return "chat" if is_rendered else "text"  # without a row of text, too

    @property
    def shared_system_prompt(self) -> str | None:
        """The system prompt that all training rows have; None if they differ or have none."""
        found = self._system_prompt()
        return found["text"] if found and found["rows"] >= found["of"] else None

    def count_training_row(self, messages: Sequence[Mapping[str, Any]], last_loss_token: int | None) -> None:
        """Count how a training row is asked (its system prompt), and where its last answer ends."""
        if last_loss_token is not None:
            self.answer_ends[last_loss_token] += 1
        if messages:
            first = messages[0]
            system = str(first["content"]) if first["role"] in ("system", "developer") else ""
            if system in self.system_prompts or len(self.system_prompts) < MOST_SYSTEM_PROMPTS:
                self.system_prompts[system] += 1

    def count_content(self, where: str, kind: str, is_lost: bool) -> None:
        """Count a part of a row's content."""
        counts = self.contents.setdefault(kind, {"total": 0, "lost": 0, "rows": []})
        counts["total"] += 1
        if is_lost:
            counts["lost"] += 1
            if len(counts["rows"]) < NUM_PLACES and where not in counts["rows"]:
                counts["rows"].append(where)

    def reasons(self) -> str:
        """Describe the dropped rows in one line."""
        return "dropped: " + (", ".join(f"{reason} {n}" for reason, n in sorted(self.dropped.items())) or "none")

    def notes(self) -> dict[str, str]:
        """What was left out of the rows or of the files, in a line each, by a short name."""
        found: dict[str, str] = {}
        if self.num_exact_duplicates:
            found["copies"] = (
                f"{_copies(self.num_exact_duplicates)} removed; if they are meant, set "
                "dataset_exact_deduplication: false, or give the row a higher weight"
            )
        elif self.num_copies_kept:
            found["copies"] = f"{_copies(self.num_copies_kept)} kept, on the side of the first"
        if self.num_close_rows:
            found["close rows"] = (
                f"{self.num_close_rows:,} of {self.num_validation:,} validation rows are close to training rows, as "
                "those are to each other"
            )
        if self.num_cut_as_text:
            found["very long"] = (
                f"{self.num_cut_as_text:,} row{'s' * (self.num_cut_as_text != 1)} tokenised only at the beginning, "
                "since the rest is beyond max_length; the tokens of the rest are not counted"
            )
        if self.schema_nulls:
            places = ", ".join(f"{number:,} in {place}" for place, number in self.schema_nulls.most_common())
            total = self.schema_nulls.total()
            found["nulls"] = f"{total:,} nulls dropped, which the file's schema adds to rows without the key: {places}"
        if self.beside_rows:
            names = list(self.beside_rows)
            more = f", and {len(names) - MOST_NAMED:,} more" if len(names) > MOST_NAMED else ""
            found["not read"] = "parts of the file that are not rows: " + ", ".join(names[:MOST_NAMED]) + more
        if self.unused:
            found["not used"] = self.unused_in_words()
        return found

    def unused_in_words(self) -> str:
        """`thinking_time in 24 of 24 assistant messages, category in 24 of 24 rows`."""
        named = [f"{one['key']} in {one['count']:,} of {one['of']:,} {one['in']}" for one in self.unused[:MOST_UNUSED]]
        num_more = len(self.unused) - len(named)
        return ", ".join([*named, *([f"and {num_more:,} more keys"] if num_more else [])])

    def figures(self) -> dict[str, object]:
        return {
            "format": self.format,
            "rows_read": self.num_read,
            "rows_kept": self.num_kept,
            "train": self.num_train,
            "validation": self.num_validation,
            "truncated": self.num_truncated or None,
            "tokens": self.num_tokens,
            "trained_tokens": self.num_supervised,
            "findings": None if self.findings is None else len(self.findings),
        }

    def tables(self) -> list[Table]:
        dropped = [(reason, number) for reason, number in sorted(self.dropped.items()) if number]
        findings = [(f"{one['code']} {one['slug']}", one["message"], one["fix"]) for one in self.findings or ()]
        notes = Table("Notes", (), list(self.notes().items()))
        return [Table("Dropped rows", (), dropped), notes, Table("Findings", ("", "what", "change"), findings)]

    def to_json(self) -> dict[str, Any]:
        """Return the content of `data.json`."""
        share = self.num_supervised / self.num_tokens if self.num_tokens else 0.0
        without_label = self.dropped[NOTHING_TO_LEARN] + self.dropped[ANSWER_PAST_MAX_LENGTH]
        return {
            "format": self.format,
            "prompt_format": self.prompt_format,
            "rows": {
                "read": self.num_read,
                "kept": self.num_kept,
                "dropped": {reason: number for reason, number in sorted(self.dropped.items()) if number},
                "truncated": self.num_truncated,
                "answers_cut": self.num_answers_cut,
                "cut_as_text": self.num_cut_as_text,
                "split": self.num_split,
                "added_by_split": self.num_added_by_split,
                "parts_without_label": self.num_parts_without_label,
                "without_label": without_label,
                "with_control_tokens_as_text": self.num_with_forged_tokens,
            },
            "system_prompt": self._system_prompt(),
            "answer_ends": {str(token): rows for token, rows in self.answer_ends.most_common(MOST_ANSWER_ENDS)},
            "unused_keys": self._num_unused(),
            "unused": self.unused,
            "text_formats": {name: number for name, number in sorted(self.text_formats.items()) if number},
            "not_rendered": {kind: counts for kind, counts in sorted(self.contents.items()) if counts["lost"]},
            "tokens": {
                "total": self.num_tokens,
                "supervised": self.num_supervised,
                "supervised_share": round(share, 4),
            },
            "weights": {
                "rows": self.num_weighted_rows,
                "answers": self.num_weighted_answers,
                "sum": round(self.total_weight, 6),
            },
            "labels": self.labels.to_json(),
            "split": {
                "train": self.num_train,
                "validation": self.num_validation,
                "groups": self.num_groups,
                "exact_duplicates": self.num_exact_duplicates,
                "copies_kept": self.num_copies_kept,
                "near_duplicates": self.num_near_duplicates,
                "close_to_training": self.num_close_rows,
            },
            "rendered_on": self.rendered_on,
            "schema_nulls": dict(sorted(self.schema_nulls.items())),
            "beside_rows": dict(self.beside_rows),
            **({"packing": self.packing} if self.packing is not None else {}),
            "sha256": {"train": self.train_sha256, "validation": self.validation_sha256},
            "histograms": self.labels.histograms(),
            "examples": self.examples,
            "findings": self.findings or [],
            "checked": self.findings is not None,
        }

    def _system_prompt(self) -> dict[str, Any] | None:
        """The most frequent system prompt with its number of rows; None if most rows have none."""
        if not self.system_prompts or not (most := self.system_prompts.most_common(1)[0])[0]:
            return None
        return {"text": most[0], "rows": most[1], "of": self.num_train}

    def _num_unused(self) -> dict[str, int]:
        """For each key that is not read, how often it occurs, in whichever place."""
        numbers: Counter[str] = Counter()
        for one in self.unused:
            numbers[one["key"]] += one["count"]
        return dict(numbers)


def _copies(number: int) -> str:
    return "1 exact copy of a row" if number == 1 else f"{number:,} exact copies of rows"
