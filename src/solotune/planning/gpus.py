"""A table of GPUs: memory, speed and features. Used to plan for a card that is not in this machine.

Memory is the total that CUDA shows (a few hundred MB below the name's round figure). Speeds are dense tensor-core rates
without sparsity and memory bandwidths, from NVIDIA's data sheets and architecture white papers: Ampere GA100 and GA102,
Ada AD102 to AD107, Hopper H100 and H200, Turing TU102/TU104, Blackwell GB202. Consumer cards' rates are those with
float32 accumulation, which training uses. A laptop's card has those of its usual boost clock; its power limit can lower
them.

Links: PCIe to the host (`PCIE_BYTES`), and to the other cards of a machine NVLink (`NVLINK_BYTES`) or PCIe again.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from typing import NamedTuple

from solotune.errors import InputError

GIB = 1 << 30


@dataclass(frozen=True)
class Card:
    """One GPU, or the CPU if `compute_capability` is None. Rates are from the data sheet, not measured."""

    name: str
    memory_bytes: int
    bf16_tflops: float  # float32 where there is no bf16
    fp8_tflops: float | None
    bandwidth_bytes: float  # a second
    compute_capability: tuple[int, int] | None
    link_bytes: float  # a second, from pinned host memory over PCIe
    shown_as: tuple[str, ...] = ()  # parts of the name that torch shows
    link_is_measured: bool = False
    nvlink_bytes: float = 0.0  # a second to all other cards, in each direction; 0: no NVLink
    has_peer_access: bool = False  # cards of one machine read each other's memory

    @property
    def has_bf16(self) -> bool:
        return self.compute_capability is not None and self.compute_capability >= (8, 0)

    @property
    def has_fp8(self) -> bool:
        """Tensor cores for e4m3: Ada (8.9), Hopper (9.0) and newer."""
        return self.fp8_tflops is not None

    @property
    def is_cpu(self) -> bool:
        return self.compute_capability is None

    @property
    def peer_link(self) -> str:
        """The way from card to card."""
        return "NVLink" if self.nvlink_bytes else "PCIe"

    @property
    def peer_bytes(self) -> float:
        """Bytes a second that a card copies from the memory of other cards."""
        return NVLINK_COPY_SHARE * self.nvlink_bytes or self.link_bytes

    @property
    def all_reduce_bytes(self) -> float:
        """Bytes a second that each card sends in NCCL's ring (the "bus bandwidth" of nccl-tests)."""
        return NVLINK_ALL_REDUCE_SHARE * self.nvlink_bytes or HOST_ALL_REDUCE_SHARE * self.link_bytes

    def beside(self, others: int) -> Card:
        """This card in a machine with so many others: they copy from the same host memory."""
        return replace(self, link_bytes=min(self.link_bytes, HOST_MEMORY_BYTES / (1 + others)))


class Cards(NamedTuple):
    """Equal cards of one machine."""

    card: Card
    count: int


PCIE_BYTES = {"3": 12.3e9, "4": 24.7e9, "4x8": 12.3e9, "5": 55e9}
"""Copies from pinned memory a second, by generation (16 lanes, or as named). The fifth was measured (54.9 GB/s, H200);
the others are what its share of the nominal rate gives."""


NVLINK_BYTES = {
    **{"v100-16": 150e9, "v100-32": 150e9, "a100-40": 300e9, "a100-80": 300e9},
    **{"h100": 450e9, "h200": 450e9, "b200": 900e9},
}
"""Nominal bytes a second in one direction, half of what the data sheets of the SXM cards give for both: NVLink 2 (V100,
300 GB/s), 3 (A100, 600), 4 (H100 and H200, 900) and 5 (B200, 1,800). Bridges that join pairs of PCIe cards are extras,
so they are not counted."""
NVLINK_COPY_SHARE, NVLINK_ALL_REDUCE_SHARE = 0.83, 0.69
"""Shares of it that copies from another card's memory and NCCL's all-reduce reach. Measured on two H200 (torch 2.11):
373 GB/s while both cards copy; all-reduces of 56 to 512 MB at 310 GB/s after a fixed time. Guesses for other cards."""
HOST_ALL_REDUCE_SHARE = 0.5
"""Share of `PCIE_BYTES` that an all-reduce reaches without NVLink: each byte goes to host memory and from there to the
next card. A guess."""
HOST_MEMORY_BYTES = 200e9
"""Bytes a second that all cards of a machine together copy from host memory: eight channels of DDR4-3200 (204.8 GB/s).
A server with two sockets of DDR5 has three times that, a desktop with two channels a quarter."""
MOST_CARDS = 16
"""Cards of one machine, at most (HGX-2)."""


def _card(name: str, gib: float, bf16: float, fp8: float | None, gbs: float, sm: str, pcie: str, *shown: str) -> Card:
    major, minor = sm.split(".")
    nvlink = NVLINK_BYTES.get(name, 0.0)
    return Card(
        name, int(gib * GIB), bf16, fp8, gbs * 1e9, (int(major), int(minor)), PCIE_BYTES[pcie], shown,
        nvlink_bytes=nvlink, has_peer_access=nvlink > 0,
    )  # fmt: skip


CARDS = {
    card.name: card
    for card in (
        _card("t4", 14.56, 8.1, None, 320, "7.5", "3", "Tesla T4"),
        _card("v100-16", 15.77, 15.7, None, 900, "7.0", "3", "V100-SXM2-16GB", "V100-PCIE-16GB"),
        _card("v100-32", 31.73, 15.7, None, 900, "7.0", "3", "V100-SXM2-32GB", "V100-PCIE-32GB"),
        _card("a100-40", 39.39, 312, None, 1555, "8.0", "4", "A100-SXM4-40GB", "A100-PCIE-40GB"),
        _card("a100-80", 79.15, 312, None, 2039, "8.0", "4", "A100-SXM4-80GB", "A100 80GB PCIe"),
        _card("a10g", 22.06, 70, None, 600, "8.6", "4", "A10G"),
        _card("a10", 22.06, 125, None, 600, "8.6", "4", "NVIDIA A10"),
        _card("a6000", 47.43, 155, None, 768, "8.6", "4", "RTX A6000"),
        _card("3060", 11.75, 25.5, None, 360, "8.6", "4", "RTX 3060"),
        _card("3070", 7.79, 40.6, None, 448, "8.6", "4", "RTX 3070"),
        _card("3090", 23.69, 71, None, 936, "8.6", "4", "RTX 3090"),
        _card("4060ti-16", 15.7, 44.1, 88.2, 288, "8.9", "4x8", "RTX 4060 Ti"),
        _card("4060-laptop", 7.62, 23.2, 46.4, 256, "8.9", "4x8", "RTX 4060 Laptop"),
        _card("4060", 7.62, 30.2, 60.5, 272, "8.9", "4x8", "RTX 4060"),
        _card("4070", 11.7, 58.3, 116.6, 504, "8.9", "4", "RTX 4070"),
        _card("4080", 15.7, 97.5, 194.9, 717, "8.9", "4", "RTX 4080"),
        _card("4090", 23.64, 165, 330, 1008, "8.9", "4", "RTX 4090"),
        _card("l4", 22.03, 121, 242, 300, "8.9", "4", "NVIDIA L4"),
        _card("l40s", 44.4, 362, 733, 864, "8.9", "4", "L40S"),
        _card("6000-ada", 47.4, 364, 728, 960, "8.9", "4", "RTX 6000 Ada"),
        _card("5090", 31.36, 210, 419, 1792, "12.0", "5", "RTX 5090"),
        _card("h100-pcie", 79.1, 756, 1513, 2039, "9.0", "5", "H100 PCIe"),
        _card("h100", 79.11, 989, 1979, 3352, "9.0", "5", "H100 80GB HBM3", "H100 SXM"),
        _card("h200", 139.8, 989, 1979, 4800, "9.0", "5", "H200"),
        _card("b200", 178.3, 2250, 4500, 8000, "10.0", "5", "B200"),
    )
}
ALIASES = {"a100": "a100-80", "a100-40gb": "a100-40", "a100-80gb": "a100-80", "h100-80": "h100", "v100": "v100-16"}


def card_named(name: str, count: str = "") -> Card:
    """Find the card of `--gpu NAME`.

    Args:
        count: what the user has written behind it, such as `x2`.

    Raises:
        InputError: the card is not in the table.
    """
    key = _key_of(name)
    if key in CARDS:
        return CARDS[key]
    near = difflib.get_close_matches(key, CARDS, 1)
    raise InputError(
        "command line, --gpu: this card is not in the table",
        seen=name + count,
        allowed=", ".join(CARDS),
        change=f"--gpu {near[0]}{count}" if near else None,
    )


def cards_named(text: str) -> Cards:
    """The cards of `--gpu h100`, or of `--gpu h100x2`: two of them in one machine.

    Raises:
        InputError: the card is not in the table, or no machine has so many.
    """
    if _key_of(text) in CARDS:
        return Cards(card_named(text), 1)
    turned = re.fullmatch(r"(\d+)\s*[xX]\s*(.+)", text.strip())
    if turned and _key_of(turned[2]) in CARDS:  # 2xh100
        raise _not_a_count(text, card_named(turned[2]), turned[1])
    found = re.fullmatch(r"(.+?)\s*[xX]\s*(-?\d*)", text.strip())
    if found is None:
        return Cards(card_named(text), 1)
    card, count = card_named(found[1], f"x{found[2]}"), found[2]
    if not count.isdecimal() or not 1 <= int(count) <= MOST_CARDS:
        raise _not_a_count(text, card, "2")
    return Cards(card, int(count))


def _not_a_count(text: str, card: Card, count: str) -> InputError:
    return InputError(
        "command line, --gpu: not a number of GPUs in one machine",
        seen=text,
        allowed=f"a card, then x1 to x{MOST_CARDS}",
        change=f"--gpu {card.name}x{count}",
    )


def _key_of(name: str) -> str:
    key = name.lower().strip().removeprefix("nvidia").strip(" -").removeprefix("rtx").strip(" -").replace(" ", "-")
    return ALIASES.get(key, key)


def card_of(name: str, memory_bytes: int, compute_capability: tuple[int, int]) -> Card:
    """The card with the name that torch shows, and with its real memory.

    A card that is not in the table gets the rates of the nearest one, by architecture and memory.
    """
    known = next((card for card in CARDS.values() if any(part in name for part in card.shown_as)), None)
    if known is None:

        def distance(card: Card) -> tuple[int, float]:
            same = abs((card.compute_capability or (0, 0))[0] - compute_capability[0])
            return same, abs(card.memory_bytes - memory_bytes)

        known = min(CARDS.values(), key=distance)
    # a bridge between PCIe cards cannot be seen from here
    nvlink = 0.0 if "PCIE" in name.upper() else known.nvlink_bytes
    return Card(
        known.name if any(part in name for part in known.shown_as) else f"{name} (rates of {known.name})",
        memory_bytes,
        known.bf16_tflops,
        known.fp8_tflops if compute_capability >= (8, 9) else None,
        known.bandwidth_bytes,
        compute_capability,
        known.link_bytes,
        nvlink_bytes=nvlink,
        has_peer_access=nvlink > 0,
    )


def cpu_card(memory_bytes: int, gflops: float) -> Card:
    """This machine's CPU as a card: float32 products at the measured `gflops`, and a fixed memory bandwidth."""
    return Card("cpu", memory_bytes, gflops / 1e3, None, CPU_BANDWIDTH_BYTES, None, CPU_BANDWIDTH_BYTES)


CPU_BANDWIDTH_BYTES = 10e9
"""Measured on two cores of a virtual machine, on one-pass element-wise work."""
