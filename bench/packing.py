"""Fill of packed sequences on real chats, by `max_length` and `overflow`, compared with padding to the longest of four.

    python -m bench.real_data FOLDER && python -m bench.packing FOLDER

Rows are rendered once, whole; what `overflow` makes of those that are too long is repeated here on their lengths.
`bound` is the fill that no packing can exceed: as many sequences as the tokens need. `padded_to_longest_of_4` is the
share of real tokens without packing, in batches of four rows in random order.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.machine import machine, table, write_result
from solotune.config.load import load_config
from solotune.dataset import Example, load_tokenizer, prepare
from solotune.dataset.packing import account

LENGTHS, OVERFLOWS, FILES = (2048, 4096, 8192), ("truncate", "split", "drop"), ("chats.jsonl", "chitchat.jsonl")
WHOLE = 1 << 20


def lengths_after(rows: Sequence[Example], max_length: int, overflow: str) -> list[int]:
    """Tokens of the examples that `overflow` makes of the rows; those in which nothing is learned are dropped."""
    lengths = []
    for row in rows:
        size = len(row.input_ids)
        if size <= max_length:
            lengths.append(size)
        elif overflow == "truncate" and row.loss_mask[:max_length].any():
            lengths.append(max_length)
        elif overflow == "split":
            for start in range(0, size - 1, max_length - 1):
                if row.loss_mask[start + (start > 0) : start + max_length].any():
                    lengths.append(min(max_length, size - start))
    return lengths


def padded_share(lengths: Sequence[int], rows_per_batch: int = 4) -> float:
    """Real tokens of all places, where each batch is padded to its longest row."""
    order = random.Random(0).sample(lengths, len(lengths))
    batches = [order[i : i + rows_per_batch] for i in range(0, len(order), rows_per_batch)]
    return sum(lengths) / sum(max(batch) * len(batch) for batch in batches)


def measured(rows: Sequence[Example], max_length: int, overflow: str) -> dict[str, Any]:
    lengths = lengths_after(rows, max_length, overflow)
    started = time.perf_counter()
    found = account(lengths, max_length)
    seconds = time.perf_counter() - started
    bound = sum(lengths) / (-(-sum(lengths) // max_length) * max_length)
    shares = {"bound": round(bound, 4), "padded_to_longest_of_4": round(padded_share(lengths), 4)}
    return {"overflow": overflow, **found, **shares, "seconds": round(seconds, 2)}


def main(folder: Path) -> None:
    results: list[dict[str, Any]] = []
    for file in FILES:
        keys = {"model_name_or_path": str(folder / "tokenizers" / "llama3"), "dataset": str(folder / file)}
        config = load_config({**keys, "max_length": WHOLE, "on_bad_row": "drop"})
        rows = prepare(config, load_tokenizer(config)).train
        results += [{"file": file, **measured(rows, length, how)} for length in LENGTHS for how in OVERFLOWS]
    write_result("packing", {"machine": machine("solotune"), "tokenizer": "llama3", "cases": results})
    print(table(list(results[0]), [list(one.values()) for one in results]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
