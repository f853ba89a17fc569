"""What an export wrote, and how near it is to the trained model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from solotune.config.run_config import Choice
from solotune.result_repr import ResultRepr, Table
from solotune.units import format_bytes, plus_minus


@dataclass(frozen=True)
class Parity:
    """How near an artifact is to the model that was trained; None: not measured.

    The divergence is KL(trained || artifact) in nats, per predicted token.
    """

    engine: str
    """What ran the artifact: `transformers`, `peft`, `llama.cpp`; or `files`: only its files were checked."""
    token_ids_equal: bool | None = None
    conversations: int = 0
    """Number of conversations whose token ids were compared."""
    differing: int = 0
    """How many of these have other token ids; the artifact's problems and notes say why."""
    mean_kl: float | None = None
    max_kl: float | None = None
    top1_agreement: float | None = None
    max_logprob_diff: float | None = None
    positions: int = 0
    """Number of predicted tokens that the four figures are over."""


@dataclass(frozen=True)
class Compared:
    """What came of comparing something that was written with the trained model."""

    parity: list[Parity] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What differs from the trained model by more than its format allows, in words. Empty: it holds."""
    notes: list[str] = field(default_factory=list)
    """What was not measured, and why; what to do before it runs elsewhere."""


@dataclass(frozen=True)
class Artifact:
    """One thing that was written."""

    kind: str
    path: Path
    bytes: int
    sha256: str
    """Of the file; of a folder, of its manifest."""
    seconds: float
    parity: list[Parity] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """As in `Compared`."""
    notes: list[str] = field(default_factory=list)
    """As in `Compared`."""
    next_commands: list[str] = field(default_factory=list)
    """Commands that run it, to be shown."""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


@dataclass(frozen=True, repr=False)
class Export(ResultRepr):
    """The result of `solotune export`, and the content of export.json."""

    folder: Path
    artifacts: list[Artifact]
    choices: list[Choice]
    merge: dict[str, Any] | None = None
    """What was measured of each base that the adapter can be merged into: see `merge_choice.MergeChoice`."""
    adapter_sha256: str = ""
    """Of the adapter that the artifacts were made of: see `export_folder.sha256_of`."""

    @property
    def ok(self) -> bool:
        """Whether every artifact is what was trained, within the bounds of its format."""
        return not any(artifact.problems for artifact in self.artifacts)

    def figures(self) -> dict[str, object]:
        return {"folder": self.folder, "ok": self.ok, "artifacts": ", ".join(one.kind for one in self.artifacts)}

    def tables(self) -> list[Table]:
        header = ("artifact", "size", "engine", "token ids", "mean KL", "top-1")
        return [
            Table("Artifacts", header, self.parity_rows()),
            Table("Merged into", ("base", "mean KL", "top-1", "loss", "exact match"), self.merge_rows()),
        ]

    def parity_rows(self) -> list[tuple[str, ...]]:
        """One row for each artifact and engine: kind, size, engine, token ids, mean KL, top-1 agreement."""
        rows: list[tuple[str, ...]] = []
        for one in self.artifacts:
            for p in one.parity or [Parity("not measured")]:
                size = format_bytes(one.bytes)
                rows.append((one.kind, size, p.engine, _token_ids(p), _short(p.mean_kl), _share(p.top1_agreement)))
        return rows

    def merge_rows(self) -> list[tuple[str, ...]]:
        """One row for each base: name, mean KL, top-1 agreement, loss with its error, exact match."""
        return [
            (
                name,
                _short(fit["mean_kl"]),
                _share(fit["top1_agreement"]),
                "" if fit["loss"] is None else plus_minus(fit["loss"], fit["stderr"]),
                _share(fit["exact_match"]),
            )
            for name, fit in (self.merge["measured"] if self.merge else {}).items()
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "ok": self.ok,
            "artifacts": [one.to_json() for one in self.artifacts],
            "choices": [choice._asdict() for choice in self.choices],
            "merge": self.merge,
            "adapter_sha256": self.adapter_sha256,
        }


def _token_ids(parity: Parity) -> str:
    if parity.token_ids_equal is None:
        return ""
    return "equal" if parity.token_ids_equal else f"{parity.differing} of {parity.conversations} differ"


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
