"""What streaming should reach on cards that nobody here has: tokens a second and memory, by the plan's model alone.

    python -m bench.stream_predictions            # the table of bench/results/stream_predictions.md

Llama 3.1 8B and Llama 3 70B shapes, NF4, r=16 on q, k, v and o, full rows of 2,048 tokens, 32 rows a step, a host with
128 GiB free, all other settings left to the plan. Needs no GPU and no weights, and half a minute for two shapes.
Nothing here was measured: rates are those of data sheets, the share of them that is reached was fitted to one H100,
links are those of the card's PCIe generation with 16 lanes (8 where the card has 8).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.machine import table
from bench.plan_cases import of
from bench.plan_runs import config_of
from solotune.config.run_config import RunConfig
from solotune.hardware.machine import probe, resolve_for_machine
from solotune.planning import planner
from solotune.planning.gpus import CARDS
from solotune.planning.plan import Plan
from solotune.planning.plan_inputs import for_card, shapes_of
from solotune.units import gib

NAMES = {"8B": ("4060-laptop", "3070", "3090", "4090", "h100"), "70B": ("3090", "4090", "a6000", "h100")}
HOST_BYTES = 128 << 30
HEAD = ["base", "card", "the base is", "GPU GiB", "pinned host GiB", "tokens/s", "micro-batch", "layers recomputed"]


def plan_on(config: RunConfig, card: str, shapes: planner.Shapes) -> Plan:
    resolved, _ = resolve_for_machine(config, for_card(card, probe()))

    def work(config: RunConfig) -> Any:
        return planner.full_rows(config.batches)

    return planner.make_plan(
        resolved, shapes, CARDS[card], work(resolved), None, host_free_bytes=HOST_BYTES, workloads=work
    )


def rows(folder: Path) -> Iterator[list[Any]]:
    """Each model on each card: with the base on the card, and with all layers streamed."""
    shapes = shapes_of()
    for model, cards in NAMES.items():
        for card in cards:
            for name, words in (("on the card", "base_offload=false"), ("streamed", "base_offload=true")):
                config = config_of(of(model, "4x2048", words, rows_are_open=True), folder)
                yield [model, card, name, *cells_of(plan_on(config, card, shapes))]


def cells_of(plan: Plan) -> list[str]:
    if not plan.fits:
        return ["does not fit", "", "", "", ""]
    used, resolved = plan.option.footprint, plan.resolved
    micro_batch = f"{resolved.per_device_train_batch_size} x {resolved.max_length:,}"
    sizes = [gib(used.card_bytes), gib(used.host_bytes) if used.host_bytes else ""]
    return [
        *sizes,
        f"{plan.option.seconds.tokens_per_second:,.0f}",
        micro_batch,
        str(plan.option.knobs.num_checkpointed),
    ]


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="stream-predictions-") as folder:
        print(table(HEAD, list(rows(Path(folder)))), flush=True)


if __name__ == "__main__":
    main()
