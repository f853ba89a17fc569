"""Seconds and peak memory of the data door on a file of any size, made for it: more rows, or longer ones.

    python -m bench.data_memory MODEL_FOLDER --rows 2000000 --words 4
    python -m bench.data_memory MODEL_FOLDER --rows 40000 --words 25000 [key=value ...]

A process of its own prepares the rows and judges them (`solotune data`), with an empty cache beside the file, twice:
the second start takes the rows from the cache. Its memory is what stays resident at most, less what it has when the
tokenizer is loaded. New words are drawn for each row, so no two rows are alike.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

NUM_WORDS = 20_000


def write_chats(path: Path, num_rows: int, num_words: int) -> None:
    """Rows of one question and one answer of `num_words` words each, in letters as frequent as in English."""
    draw = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgkqjxz"
    words = ["".join(draw.choices(letters, range(26, 0, -1), k=draw.randint(2, 9))) for _ in range(NUM_WORDS)]
    with path.open("w") as file:
        for number in range(num_rows):
            texts = [" ".join(draw.choices(words, k=num_words)) for _ in range(2)]
            chat = [{"role": "user", "content": f"{number} {texts[0]}"}, {"role": "assistant", "content": texts[1]}]
            file.write(json.dumps({"messages": chat}) + "\n")


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def prepare_and_judge(model: str, path: str, overrides: list[str]) -> None:
    from solotune.config.load import load_config
    from solotune.dataset import load_tokenizer, prepare
    from solotune.diagnosis.data_checks import check_rows

    plain = {"model_name_or_path": model, "dataset": path, "validation_size": 0.01, "max_length": 2048}
    config = load_config(plain, overrides)
    tokenizer = load_tokenizer(config)
    before, started = peak_bytes(), time.monotonic()
    prepared = prepare(config, tokenizer)
    seconds, after = time.monotonic() - started, peak_bytes()
    check_rows(config, tokenizer, replace(prepared, key=None))  # asked, whatever the cache knows
    figures = {
        "rows": prepared.report.num_read,
        "tokens": prepared.report.num_tokens,
        "prepare_seconds": round(seconds, 1),
        "findings_seconds": round(time.monotonic() - started - seconds, 1),
        "loaded_bytes": before,
        "prepare_bytes": after - before,
        "findings_bytes": peak_bytes() - before,
        "bytes_per_row": round((peak_bytes() - before) / prepared.report.num_read),
    }
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--words", type=int, default=12, help="words per message")
    parser.add_argument("--folder", help="where file and cache are written; needs about four times the file's size")
    parser.add_argument("--file", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    if args.file:
        prepare_and_judge(args.model, args.file, args.overrides)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "chats.jsonl"
        write_chats(path, args.rows, args.words)
        print(json.dumps({"file_bytes": path.stat().st_size}), flush=True)
        command = [sys.executable, "-m", "bench.data_memory", args.model, "--file", str(path), *args.overrides]
        for _ in range(2):
            subprocess.run(command, check=True, env={**os.environ, "XDG_CACHE_HOME": folder})


if __name__ == "__main__":
    main()
