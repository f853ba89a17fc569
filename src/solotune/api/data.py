"""`solotune data`: the training rows token by token, the loss mask, and problems in the data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from solotune.api.python_config import config_of
from solotune.api.types import ConfigSource, Overrides
from solotune.display.progress import Display, SilentDisplay

if TYPE_CHECKING:
    from solotune.dataset import DataReport


@dataclass(frozen=True)
class ShownRow:
    """One training row as the model sees it.

    Attributes:
        where: file and line.
        pieces: (text, whether it is trained on, token ids).
        tokens: the text of each token id, over all pieces.
        weights: the loss weight of each piece; empty if all are 1.
    """

    where: str
    pieces: list[tuple[str, bool, list[int]]]
    tokens: list[str]
    weights: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class DataPreview:
    """Result of `data`: the report on all rows, and some rows in full."""

    report: DataReport
    shown: list[ShownRow]

    def to_json(self) -> dict[str, Any]:
        """The report as in data.json, and the shown rows."""
        return {**self.report.to_json(), "shown": [asdict(row) for row in self.shown]}


def data(
    config: ConfigSource, overrides: Overrides = (), show: int = 1, display: Display | None = None, **keys: Any
) -> DataPreview:
    """Read, split, render and mask the data as training does, and check it.

        preview = solotune.data("run.yaml", show=3)
        for finding in preview.report.findings:
            print(finding["code"], finding["message"], finding["fix"])

    Args:
        show: number of training rows to return in full.
        keys: keys of the config, as in `solotune.train`.

    Raises:
        InputError: config, model folder or rows cannot be used.
    """
    checked = config_of(config, overrides, keys)
    from solotune import dataset
    from solotune.diagnosis.data_checks import check_rows
    from solotune.hub.model_files import resolve_model

    display = display or SilentDisplay()
    model_files = resolve_model(checked)
    tokenizer = dataset.load_tokenizer(checked, model_files)
    display.phase("reading data")
    prepared = dataset.prepare(checked, tokenizer, progress=display.progress)
    display.phase("checking rows")
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
