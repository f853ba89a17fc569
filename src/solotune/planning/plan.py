"""`Plan`: the result of the planner, with what to change if nothing fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from solotune.config.run_config import Choice, RunConfig
from solotune.errors import CheckError
from solotune.model.adapter_coverage import AdapterCoverage
from solotune.planning.gpus import CARDS, Card
from solotune.planning.layer_profile import MemoryStrategy, Workload
from solotune.planning.peak_memory import PeakMemory
from solotune.planning.throughput import Seconds
from solotune.result_repr import ResultRepr, Table
from solotune.units import format_bytes, format_duration, format_rate, format_step_time

SAFETY = 1.02
"""Safety factor: the estimate may be this much too low, so the budget must hold the estimate times this."""
SHARE_OF_HOST = 0.9
"""The share of the host's free memory that a run may pin. Free is what the system has available, or what is left below
the limit of the container or job (`ram`), which counts pinned pages like all others. `cudaHostRegister` pins
through NVIDIA's driver, which does not ask for the limit of locked memory (`ulimit -l`, RLIMIT_MEMLOCK)."""
SHARE_OF_CARD = 0.94
"""The share of a card that is not in this machine which `memory_budget: auto` uses. The rest is for the desktop, other
processes and the driver."""


class Budget(NamedTuple):
    """`bytes` limits what torch allocates; `available_bytes` limits all memory of this process, context included."""

    bytes: int
    available_bytes: int
    because: str
    host_bytes: int | None = None  # free memory of the host; None: not known

    @property
    def pinnable_bytes(self) -> int | None:
        """Host memory that a run may pin; None: not known."""
        return None if self.host_bytes is None else int(SHARE_OF_HOST * self.host_bytes)

    def holds(self, used: PeakMemory) -> bool:
        return self.card_holds(used) and self.host_holds(used)

    def card_holds(self, used: PeakMemory) -> bool:
        return used.peak_bytes * SAFETY <= self.bytes and used.card_bytes * SAFETY <= self.available_bytes

    def host_holds(self, used: PeakMemory) -> bool:
        return not used.host_bytes or self.pinnable_bytes is None or used.host_bytes <= self.pinnable_bytes

    def lack(self, used: PeakMemory) -> tuple[bool, int]:
        """Orders what does not fit: lacking host memory alone comes first, then bytes."""
        return (False, used.host_bytes) if self.card_holds(used) else (True, used.peak_bytes)


@dataclass(frozen=True)
class Candidate:
    """One memory strategy with its memory and its time."""

    knobs: MemoryStrategy
    footprint: PeakMemory
    seconds: Seconds
    instead: Candidate | None = None  # the fastest that streams a base that this one shards, or the other way round


class Ranks(NamedTuple):
    """The ranks that share a step, one on each card."""

    size: int = 1
    local: int = 1  # on one machine
    micro_batch: tuple[int, int] = (1, 1)  # rows, and micro-batches of a step on each rank

    @classmethod
    def of(cls, work: Workload) -> Ranks:
        return cls(work.ranks, work.local_ranks, (work.rows, work.accumulation))

    @property
    def rows_per_step(self) -> int:
        rows, accumulation = self.micro_batch
        return rows * accumulation * self.size


ALONE = Ranks()


@dataclass(frozen=True, repr=False)
class Plan(ResultRepr):
    """The result of `solotune plan`. If nothing fits: `changes` to the config that do, and the plan with them."""

    card: Card
    budget: Budget
    option: Candidate
    fits: bool
    choices: list[Choice]
    notes: list[str]
    changes: list[tuple[str, object]]
    changed: Plan | None
    resolved: RunConfig
    coverage: AdapterCoverage | None = None  # which parts of the model have adapters
    findings: list[dict[str, Any]] | None = None  # faults that are certain before the first step; None: not asked
    allowed: frozenset[str] = frozenset()  # codes of the faults in `allow_faults`
    ranks: Ranks = ALONE

    @property
    def is_fault(self) -> bool:
        """Whether a fault that `allow_faults` does not name would stop the run."""
        return any(finding["code"] not in self.allowed for finding in self.findings or ())

    @property
    def lacks_host_memory(self) -> bool:
        """Whether it would fit on the card, and only host memory is too small."""
        used = self.option.footprint
        return not self.fits and self.budget.card_holds(used) and not self.budget.host_holds(used)

    def figures(self) -> dict[str, object]:
        used, took = self.option.footprint, self.option.seconds
        return {
            "fits": self.fits,
            "card": self.card.name,
            "peak": format_bytes(used.peak_bytes),
            "budget": format_bytes(self.budget.bytes),
            "step_seconds": took.step,
            "tokens_per_second": round(took.tokens_per_second),
            "total": None if took.total is None else format_duration(took.total),
            "change": None if self.fits else self.suggestion(),
        }

    def times(self) -> dict[str, str]:
        """Predicted times in words, and the rate of the link if host memory is used."""
        took, card = self.option.seconds, self.card
        facts = {
            "load": format_duration(took.load),
            "first step": format_duration(took.first_step),
            "step": f"{format_step_time(took.step)}, {format_rate(took.tokens_per_second)} (predicted)",
        }
        facts |= self._times_of_ranks()
        if took.total is not None:
            facts["total"] = format_duration(took.total)
        if self.option.footprint.host_bytes:
            how = "measured" if card.link_is_measured else "as such cards have; solotune doctor measures it"
            facts["link"] = f"{card.link_bytes / 1e9:.1f} GB/s from host memory to the card, {how}"
        return facts

    def _times_of_ranks(self) -> dict[str, str]:
        """What several ranks give in all and on each card, and what their links take; nothing for one rank."""
        (size, _, (rows, accumulation)), took, card = self.ranks, self.option.seconds, self.card
        if size == 1:
            return {}
        one, rate = "rank" if card.is_cpu else "GPU", format_rate(took.tokens_per_second)
        facts = {
            "step": f"{format_step_time(took.step)}, {rate} on {size} {one}s (predicted)",
            f"each {one}": f"{format_rate(took.tokens_per_second / size)}, {rows} x {accumulation} "
            f"of the {self.ranks.rows_per_step:,} rows of a step",
        }
        way = "gloo" if card.is_cpu else f"{card.peer_link}, {card.all_reduce_bytes / 1e9:.0f} GB/s"
        facts["all-reduce"] = f"{1e3 * took.communication:.1f} ms a step, over {way} (predicted)"
        if self.option.footprint.peers_bytes and not card.is_cpu:
            copied = f"{format_bytes(self.option.footprint.peers_bytes)} of layers"
            facts["sharding"] = f"{copied} from the other GPUs in each pass, at {card.peer_bytes / 1e9:.0f} GB/s"
        return facts

    def host_memory(self) -> list[tuple[str, int]]:
        """(what, bytes) in pinned host memory, their sum and its limit; empty if nothing is there."""
        host = self.option.footprint.host
        if not sum(host):
            return []
        rows = [(f"{name} in host memory", size) for name, size in host._asdict().items() if size]
        rows.append(("pinned host memory", sum(host)))
        if self.ranks.local > 1:
            rows.append((f"pinned host memory of {self.ranks.local} ranks", self.ranks.local * sum(host)))
        most = self.budget.pinnable_bytes
        each = " by each rank" if self.ranks.local > 1 else ""
        return rows if most is None else [*rows, (f"host memory that may be pinned{each}", most)]

    def tables(self) -> list[Table]:
        used = self.option.footprint
        memory = [(name.replace("_", " "), format_bytes(size)) for name, size in used.by_category.items()]
        memory += [(f"peak of {name}", format_bytes(size)) for name, size in used.other_peaks()]
        memory += [(name, format_bytes(size)) for name, size in self.host_memory()]
        choices = [(choice.key, value_in_words(choice.value), choice.because) for choice in self.choices]
        findings = [(f"{one['code']} {one['slug']}", one["message"], one["fix"]) for one in self.findings or ()]
        return [
            Table(f"Memory at the peak ({used.moment})", (), memory),
            Table("Settings chosen for you", ("key", "value", "because"), choices),
            Table("Faults", ("", "what", "change"), findings),
            Table("Notes", (), [(note,) for note in self.notes]),
        ]

    def to_json(self) -> dict[str, Any]:
        """The JSON of plan.json."""
        used, took = self.option.footprint, self.option.seconds
        return {
            "fits": self.fits,
            "card": self.card.name,
            "peak_bytes": used.peak_bytes,
            "card_bytes": used.card_bytes,
            "peak_at": used.moment,
            "peaks": used.peaks._asdict(),
            "by_category": used.by_category,
            "budget_bytes": self.budget.bytes,
            "host_bytes": used.host_bytes,
            "host_by_category": used.host._asdict(),
            "host_budget_bytes": self.budget.pinnable_bytes,
            "link_bytes_per_second": self.card.link_bytes,
            "seconds": took.to_json(),
            "tokens_per_second": took.tokens_per_second,
            "choices": [choice._asdict() for choice in self.choices],
            "notes": self.notes,
            "changes": [{"key": key, "value": value} for key, value in self.changes],
            "adapters": self.coverage and self.coverage.to_json(),
            **({} if self.ranks.size == 1 else {"ranks": self._ranks_json()}),
            **({} if self.findings is None else {"findings": self.findings}),
        }

    def compared_with(self, alone: Plan, command: str) -> list[str]:
        """In words, what this plan for all GPUs of a machine gives beside that for one of them."""
        if not self.fits:
            return []
        count, rate = self.ranks.size, self.option.seconds.tokens_per_second
        gain = (
            f"{rate / alone.option.seconds.tokens_per_second:.2f} times as fast, " if alone.fits else "it fits there, "
        )
        return [f"on the {count} GPUs of this machine: {gain}{format_rate(rate)} (predicted): {command}"]

    def _ranks_json(self) -> dict[str, Any]:
        used, took, card = self.option.footprint, self.option.seconds, self.card
        return {
            "size": self.ranks.size,
            "on_one_machine": self.ranks.local,
            "rows_per_step": self.ranks.rows_per_step,
            "tokens_per_second_per_gpu": took.tokens_per_second / self.ranks.size,
            "communication_seconds": took.communication,
            "link": "gloo" if card.is_cpu else card.peer_link,
            "all_reduce_bytes_per_second": None if card.is_cpu else card.all_reduce_bytes,
            "copy_bytes_per_second": None if card.is_cpu else card.peer_bytes,
            "bytes_on_other_gpus": used.peers_bytes,
            "host_bytes_of_all": self.ranks.local * used.host_bytes,
        }

    def refusal(self) -> CheckError:
        """The error for a run that does not fit."""
        used = self.option.footprint
        if self.lacks_host_memory:
            each = f" for each of {self.ranks.local} ranks" if self.ranks.local > 1 else ""
            free = f"{format_bytes(self.budget.host_bytes or 0)} that are free{each}"
            return CheckError(
                "the run does not fit in host memory",
                seen=f"{used.host.in_words()} to pin{each}; the GPU would hold {format_bytes(used.peak_bytes)}",
                allowed=f"{format_bytes(self.budget.pinnable_bytes or 0)}: {SHARE_OF_HOST:.0%} of the {free}",
                change=self.suggestion(),
            )
        seen = f"a peak of {format_bytes(used.peak_bytes)} ({used.moment}), {format_bytes(used.card_bytes)} with "
        seen += f"the driver and the allocator, on {self.card.name}"
        return CheckError(
            "the run does not fit in memory",
            seen=seen,
            allowed=f"{format_bytes(self.budget.bytes)}: {self.budget.because}",
            change=self.suggestion(),
        )

    def suggestion(self) -> str:
        """The change that makes it fit: `max_length: 1024 (then 8.1 GiB, 900 tokens/s)`."""
        if self.changed is None and self.lacks_host_memory:
            needed = self.ranks.local * self.option.footprint.host_bytes / SHARE_OF_HOST
            return f"{format_bytes(needed)} of free host memory, a smaller model, or a larger card"
        if self.changed is None:
            least = self.option.footprint.card_bytes * SAFETY
            large = [c for c in CARDS.values() if c.memory_bytes * SHARE_OF_CARD >= least]
            cards = ", ".join(c.name for c in sorted(large, key=lambda c: c.memory_bytes)[:3])
            return f"a smaller model, or a card with {format_bytes(least / SHARE_OF_CARD)} ({cards or 'none known'})"
        words = [f"{key}: {value_in_words(value)}" for key, value in self.changes]
        after = self.changed.option
        speed = f"{after.seconds.tokens_per_second:,.0f} tokens/s"
        return f"{', '.join(words)} (then {format_bytes(after.footprint.peak_bytes)}, {speed})"


def value_in_words(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
