"""Rows that change sides when rows are appended to the file: 10 % more, real texts, some of them near-duplicates.

    python -m bench.real_data FOLDER && python -m bench.split_stability FOLDER

A run that is repeated on a grown file should not train on what it held out before. Counted over several seeds: old rows
that move from held out to training (the harmful way), and the other way.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.duplicates import planted
from bench.machine import machine, table, write_result
from solotune.config.load import load_config
from solotune.dataset import load_tokenizer, prepare

COUNTS, SIZES, SEEDS, GROWTH = (1_000, 10_000), (0.05, 0.2), range(5), 0.1


def sides(model: Path, texts: list[str], folder: Path, size: float, seed: int) -> dict[str, str]:
    """The side of each row by its hash, as split.json has them."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    keys = {"model_name_or_path": str(model), "dataset": str(file), "validation_size": size, "seed": seed}
    config = load_config(keys)
    return prepare(config, load_tokenizer(config), use_cache=False).manifest["rows"]


def main(folder: Path) -> None:
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for count in COUNTS:
            texts, _ = planted(folder / "sharegpt.jsonl", count + round(GROWTH * count), 1)
            for size in SIZES:
                into_training, into_validation = [], []
                for seed in SEEDS:
                    model = folder / "tokenizers" / "llama3"
                    before = sides(model, texts[:count], Path(temporary), size, seed)
                    after = sides(model, texts, Path(temporary), size, seed)
                    moved = [side for row, side in before.items() if after[row] != side]
                    into_training.append(moved.count("validation"))
                    into_validation.append(moved.count("train"))
                results.append(
                    {
                        "rows": count,
                        "appended": round(GROWTH * count),
                        "validation_size": size,
                        "held_out": round(size * count),
                        "into_training_mean": statistics.mean(into_training),
                        "into_training_most": max(into_training),
                        "into_validation_mean": statistics.mean(into_validation),
                        "into_validation_most": max(into_validation),
                    }
                )
                print(results[-1], file=sys.stderr)
    write_result("split_stability", {"machine": machine("solotune"), "seeds": len(SEEDS), "cases": results})
    print(table(list(results[0]), [list(one.values()) for one in results]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
