"""`solotune data`: the training rows token by token, the loss mask, and problems in the data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from solotune.api.python_config import config_of
from solotune.api.types import ConfigSource, Overrides
from solotune.display.notebook import showing
from solotune.display.progress import Display
from solotune.result_repr import Html, ResultRepr, Table, escaped
from solotune.runtime.library_noise import quiet_libraries

if TYPE_CHECKING:
    from solotune.dataset import DataReport


@dataclass(frozen=True, repr=False)
class ShownRow(ResultRepr):
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

    def figures(self) -> dict[str, object]:
        trained = sum(len(ids) for _, is_trained, ids in self.pieces if is_trained)
        return {"where": self.where, "tokens": len(self.tokens), "trained_tokens": trained}

    def tables(self) -> list[Table]:
        return [Table("", (), [(self.marked(),)])]

    def marked(self) -> Html:
        """The text, with what is trained on in bold and underlined."""
        parts = ((escaped(text), is_trained) for text, is_trained, _ in self.pieces)
        return Html("".join(f"<b><u>{text}</u></b>" if is_trained else text for text, is_trained in parts))


@dataclass(frozen=True, repr=False)
class DataPreview(ResultRepr):
    """Result of `data`: the report on all rows, and some rows in full."""

    report: DataReport
    shown: list[ShownRow]
    allowed: frozenset[str] = frozenset()  # codes of the faults in `allow_faults`

    @property
    def is_fault(self) -> bool:
        """Whether a finding is a fault that `allow_faults` does not name."""
        findings = self.report.findings or ()
        return any(one["severity"] == "error" and one["code"] not in self.allowed for one in findings)

    def figures(self) -> dict[str, object]:
        return self.report.figures()

    def tables(self) -> list[Table]:
        rows = [(row.where, row.marked()) for row in self.shown]
        title = "Rows as the model sees them; what it is trained on is bold and underlined"
        return [*self.report.tables(), Table(title, (), rows)]

    def to_json(self) -> dict[str, Any]:
        """The report as in data.json, and the shown rows."""
        return {**self.report.to_json(), "shown": [asdict(row) for row in self.shown]}


@quiet_libraries()
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
        CheckError: the held-out rows leak into training.
    """
    checked = config_of(config, overrides, keys)
    from solotune import dataset
    from solotune.diagnosis import certain_faults
    from solotune.diagnosis.data_checks import check_rows
    from solotune.diagnosis.sources import solotune_run
    from solotune.hub.model_files import resolve_model

    allowed = certain_faults.allowed_codes(checked)
    with showing(display) as chosen:
        model_files = resolve_model(checked)
        tokenizer = dataset.load_tokenizer(checked, model_files)
        chosen.phase("reading data")
        prepared = dataset.prepare(checked, tokenizer, progress=chosen.progress)
        chosen.phase("checking rows")
        found = check_rows(checked, tokenizer, prepared, model_files)
        certain = certain_faults.of_run(solotune_run.from_prepared(checked, tokenizer, prepared, found, model_files))
    known = {finding.code for finding in found}
    found = [*(finding for finding in certain if finding.code not in known), *found]
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
    return DataPreview(prepared.report, shown, allowed)
