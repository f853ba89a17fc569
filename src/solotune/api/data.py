"""`solotune data`: what training would learn, token by token, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from solotune.api.types import ConfigSource
from solotune.config.load import load_config
from solotune.display.progress import Display, SilentDisplay

if TYPE_CHECKING:
    from solotune.dataset import DataReport


@dataclass(frozen=True)
class ShownRow:
    """One training row as the model sees it: text pieces, each with whether it is learned and its token ids.

    `tokens` holds the text of each id, for all pieces one after the other; `weights` that of each piece, and nothing
    where all are 1.
    """

    where: str
    pieces: list[tuple[str, bool, list[int]]]
    tokens: list[str]
    weights: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class DataPreview:
    report: DataReport
    shown: list[ShownRow]

    def to_json(self) -> dict[str, Any]:
        """The design's data shape and the shown rows."""
        return {**self.report.to_json(), "shown": [asdict(row) for row in self.shown]}


def data(
    config: ConfigSource, overrides: Iterable[str] = (), show: int = 1, display: Display | None = None
) -> DataPreview:
    """Reads, splits, renders and masks the data as training would; says what is wrong with it and shows some rows."""
    from solotune import dataset
    from solotune.diagnosis.data_checks import check_rows
    from solotune.hub.model_files import resolve_model

    checked = load_config(config, overrides)
    model_files = resolve_model(checked)
    tokenizer = dataset.load_tokenizer(checked, model_files)
    prepared = dataset.prepare(checked, tokenizer, progress=(display or SilentDisplay()).progress)
    found = check_rows(checked, tokenizer, prepared, model_files)
    prepared = prepared.with_findings(finding.to_json() for finding in found)
    shown = [
        ShownRow(
            row.where,
            [(p["text"], p["supervised"], p["ids"]) for p in row.pieces(tokenizer)],
            dataset.token_texts(tokenizer, row.input_ids),
            [] if row.weights is None else [p["weight"] for p in row.pieces(tokenizer)],
        )
        for row in prepared.train[:show]
    ]
    return DataPreview(prepared.report, shown)
