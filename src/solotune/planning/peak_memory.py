"""The peak of a run by category, by phase, and what is in host memory: the result of `memory.footprint`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from solotune.units import gib

CATEGORIES = (
    "weights",
    "quantization_state",
    "adapters",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "workspace",
)


class HostMemory(NamedTuple):
    """Bytes of pinned host memory."""

    layers: int = 0  # frozen weights of streamed layers
    embedding: int = 0  # token embedding
    activations: int = 0  # inputs of checkpointed layers

    def in_words(self) -> str:
        """`4.5 GiB (3.5 of frozen layers, 1.0 of the embedding)`."""
        names = ("of frozen layers", "of the embedding", "of activations")
        parts = [f"{gib(size)} {name}" for size, name in zip(self, names, strict=True) if size]
        return f"{gib(sum(self))} GiB" + (f" ({', '.join(parts)})" if len(parts) > 1 else "")


PHASES = {"training": "a training step", "evaluation": "an evaluation", "answers": "generated answers"}


class Peaks(NamedTuple):
    """The peak of each phase of a run, in bytes of the allocator; 0: the run has no such phase."""

    training: int
    evaluation: int
    answers: int


@dataclass(frozen=True)
class PeakMemory:
    """Bytes at the peak."""

    by_category: dict[str, int]
    moment: str  # when the peak is: forward, head, backward or step of training; evaluation; answers
    paged_bytes: int  # paged optimizer state, outside the allocator
    outside_bytes: int  # CUDA context, NCCL and fragmentation
    host: HostMemory
    peaks: Peaks
    peers_bytes: int = 0  # of frozen layers that are on the other cards

    @property
    def host_bytes(self) -> int:
        """Pinned host memory."""
        return sum(self.host)

    @property
    def is_of_evaluation(self) -> bool:
        """Whether an evaluation or its answers need more than a training step."""
        return self.moment in ("evaluation", "answers")

    def other_peaks(self) -> list[tuple[str, int]]:
        """(what, bytes) of the phases that need less than the peak."""
        this = self.moment if self.is_of_evaluation else "training"
        return [(PHASES[name], size) for name, size in self.peaks._asdict().items() if size and name != this]

    @property
    def peak_bytes(self) -> int:
        """The value that `torch.cuda.max_memory_allocated` will show (on the CPU: the largest resident set)."""
        return sum(self.by_category.values()) - self.paged_bytes

    @property
    def card_bytes(self) -> int:
        """The memory that the card must have."""
        return sum(self.by_category.values()) + self.outside_bytes
