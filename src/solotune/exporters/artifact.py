"""What an export wrote, and how near it is to the trained model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from solotune.config.run_config import Choice
from solotune.result_repr import ResultRepr, Table
from solotune.units import gib


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
    mean_kl: float | None = None
    max_kl: float | None = None
    top1_agreement: float | None = None
    max_logprob_diff: float | None = None
    positions: int = 0
    """Number of predicted tokens that the four figures are over."""


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
    """What differs from the trained model by more than its format allows, in words. Empty: it holds."""
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

    @property
    def ok(self) -> bool:
        """Whether every artifact is what was trained, within the bounds of its format."""
        return not any(artifact.problems for artifact in self.artifacts)

    def figures(self) -> dict[str, object]:
        return {"folder": self.folder, "ok": self.ok, "artifacts": ", ".join(one.kind for one in self.artifacts)}

    def tables(self) -> list[Table]:
        header = ("artifact", "size", "engine", "token ids", "mean KL", "top-1")
        rows = [
            (one.kind, gib(one.bytes), p.engine, p.token_ids_equal, p.mean_kl, p.top1_agreement)
            for one in self.artifacts
            for p in one.parity
        ]
        return [Table("Artifacts", header, rows)]

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "ok": self.ok,
            "artifacts": [one.to_json() for one in self.artifacts],
            "choices": [asdict(choice) for choice in self.choices],
        }
