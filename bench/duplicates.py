"""Near-duplicates planted into real texts: recall, false pairs and cost, compared with libraries.

    python -m bench.real_data FOLDER
    python -m venv LIBS && LIBS/bin/pip install numpy datasketch==2.0.0 rensa==0.5.0
    python -m bench.duplicates FOLDER --libraries LIBS/bin/python

Rows are stretches of ShareGPT answers of 12 to 400 words (median 60). One row in twenty is an edited copy of another:
words replaced, marks changed, a sentence appended, halves swapped. The true Jaccard index of every pair, planted or
reported, is recomputed here from sets of strings. A planted pair counts as found if both rows end in one group. The
crowd: rows made from one pattern, all alike, where an index that returns every neighbour takes quadratic time.

All three use 128 hashes in 32 bands and check candidates exactly until four are confirmed; each is a process of its
own.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

THRESHOLD, NUM_HASHES, NUM_BANDS, MAX_PARTNERS = 0.7, 128, 32, 4
SIZES, CROWD = (20_000, 200_000), 10_000
EDGES = (0.7, 0.75, 0.85, 0.95, 1.0)
TIMEOUT_SECONDS = 900

# --- the three


def by_solotune(texts: list[str]) -> Iterator[tuple[int, int]]:
    from solotune.dataset.split.near_duplicates import near_duplicates

    return near_duplicates(texts)


def by_datasketch(texts: list[str]) -> Iterator[tuple[int, int]]:
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(num_perm=NUM_HASHES, params=(NUM_BANDS, NUM_HASHES // NUM_BANDS))
    empty = MinHash(NUM_HASHES, seed=0)
    for row, text in enumerate(texts):
        triples = triples_of(text)
        if triples:
            sketch = empty.copy()
            sketch.update_batch([triple.encode() for triple in triples])
            for other in confirmed(index.query(sketch), triples, texts):
                yield other, row
            index.insert(row, sketch, check_duplication=False)


def by_rensa(texts: list[str]) -> Iterator[tuple[int, int]]:
    import rensa

    index = rensa.RMinHashLSH(threshold=THRESHOLD, num_perm=NUM_HASHES, num_bands=NUM_BANDS)
    for start in range(0, len(texts), 2000):
        sets = {row: triples_of(texts[row]) for row in range(start, min(start + 2000, len(texts)))}
        sets = {row: triples for row, triples in sets.items() if triples}
        sketches = rensa.RMinHash.from_token_sets(list(sets.values()), NUM_HASHES, 0)
        for row, sketch in zip(sets, sketches, strict=True):
            for other in confirmed(index.query(sketch), sets[row], texts):
                yield other, row
            index.insert(row, sketch)


def confirmed(candidates: Iterable[int], triples: set[str], texts: list[str]) -> Iterator[int]:
    """The first few candidates that are near-duplicates indeed: one is enough, and a crowd has thousands."""
    true = (other for other in candidates if jaccard(triples_of(texts[other]), triples) >= THRESHOLD)
    return islice(true, MAX_PARTNERS)


CONTENDERS: dict[str, Callable[[list[str]], Iterator[tuple[int, int]]]] = {
    "solotune": by_solotune,
    "datasketch": by_datasketch,
    "rensa": by_rensa,
}


def triples_of(text: str) -> set[str]:
    words = re.findall(r"\w+", text)
    return {" ".join(words[i : i + 3]) for i in range(len(words) - 2)} if len(words) >= 5 else set()


def jaccard(a: set[str], b: set[str]) -> float:
    return len(a & b) / max(len(a | b), 1)


def one_run(name: str, file: str) -> dict[str, Any]:
    """In a process of its own: pairs, seconds and memory of one contender."""
    texts = json.loads(Path(file).read_text())
    memory, started, cpu_started = peak_mib(), time.perf_counter(), time.process_time()
    pairs = list(CONTENDERS[name](texts))
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu_started, 1),
        "peak_mib": peak_mib(),
        "texts_mib": memory,
        "pairs": pairs,
    }


def peak_mib() -> int:
    """Of this process alone; getrusage would count what its parent held when it was started."""
    (line,) = [one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmHWM")]
    return int(line.split()[1]) // 1024


# --- rows, planted pairs, and what was found of them


def stretches(source: Path, count: int, chance: random.Random) -> list[list[str]]:
    """Rows of real words; ASCII alone, so that words are what is between blanks."""
    rows: list[list[str]] = []
    with source.open(encoding="utf-8") as file:
        for line in file:
            for said in json.loads(line)["conversations"]:
                words = said["value"].casefold().split() if said["value"].isascii() else []
                while len(words) >= 12 and len(rows) < count:
                    length = min(max(int(chance.lognormvariate(4.1, 0.6)), 12), 400)
                    rows.append(words[:length])
                    words = words[length:]
    if len(rows) < count:
        raise SystemExit(f"only {len(rows)} rows")
    return rows


def edited(words: list[str], kind: str, chance: random.Random, stock: list[str]) -> list[str]:
    words = list(words)
    if kind == "words replaced":
        for _ in range(chance.randint(1, max(1, len(words) // 16))):
            words[chance.randrange(len(words))] = chance.choice(stock)
    elif kind == "marks changed":
        words = [word.rstrip(".,;:!?") + chance.choice(["", "", ".", "!"]) for word in words]
    elif kind == "sentence appended":
        words += chance.choices(stock, k=max(3, int(len(words) * chance.uniform(0.02, 0.35))))
    else:  # halves swapped
        words = words[len(words) // 2 :] + words[: len(words) // 2]
    return words


KINDS = ("words replaced", "marks changed", "sentence appended", "halves swapped")


def planted(source: Path, count: int, seed: int) -> tuple[list[str], list[tuple[int, int, str]]]:
    """Texts in random order, and the pairs (row, row, kind) among them that are edits of one another."""
    chance = random.Random(seed)
    num_edits = count // 20
    rows = stretches(source, count - num_edits, chance)
    stock = [word for row in rows[:2000] for word in row]
    kinds = [KINDS[i % len(KINDS)] for i in range(num_edits)]
    originals = chance.sample(range(len(rows)), num_edits)
    rows += [edited(rows[i], kind, chance, stock) for i, kind in zip(originals, kinds, strict=True)]
    order = chance.sample(range(count), count)
    place = {row: position for position, row in enumerate(order)}
    pairs = [
        (place[original], place[count - num_edits + number], kind)
        for number, (original, kind) in enumerate(zip(originals, kinds, strict=True))
    ]
    return [" ".join(rows[row]) for row in order], pairs


def crowd(count: int) -> list[str]:
    """Rows of one pattern that differ in one number."""
    pattern = "please write a short and friendly answer to the customer with the number {} who waits for a parcel"
    return [
        pattern.format(number) + " that was sent last week from our store in the old town" for number in range(count)
    ]


def judged(texts: list[str], pairs: list[tuple[int, int, str]], found: list[tuple[int, int]]) -> dict[str, Any]:
    """Recall of the planted pairs by true Jaccard index and kind, and the reported pairs that are none."""
    group = list(range(len(texts)))

    def root(row: int) -> int:
        while group[row] != row:
            group[row] = group[group[row]]
            row = group[row]
        return row

    for a, b in found:
        group[root(b)] = root(a)
    by_index: dict[str, list[bool]] = {}
    by_kind: dict[str, list[bool]] = {}
    for a, b, kind in pairs:
        true = jaccard(triples_of(texts[a]), triples_of(texts[b]))
        if true >= THRESHOLD:
            low = max(edge for edge in EDGES if edge <= true)
            for counts, key in ((by_index, f"{low:.2f}"), (by_kind, kind)):
                counts.setdefault(key, []).append(root(a) == root(b))
    num_false = sum(jaccard(triples_of(texts[a]), triples_of(texts[b])) < THRESHOLD for a, b in found)
    is_found = [one for flags in by_kind.values() for one in flags]
    return {
        "planted": len(is_found),
        "found": sum(is_found),
        "recall": round(sum(is_found) / len(is_found), 5),
        "recall_by_jaccard_from": {key: f"{sum(f)}/{len(f)}" for key, f in sorted(by_index.items())},
        "recall_by_kind": {key: f"{sum(f)}/{len(f)}" for key, f in by_kind.items()},
        "reported_pairs": len(found),
        "false_pairs": num_false,
    }


def run(name: str, python: str, file: Path) -> dict[str, Any]:
    command = [python, "-m", "bench.duplicates", "--one", name, str(file)]
    try:
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return {"seconds": f"stopped after {TIMEOUT_SECONDS}", "peak_mib": None, "pairs": []}
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--libraries", help="a Python that has datasketch and rensa; default: measure solotune only")
    args = parser.parse_args()
    from bench.machine import machine, table, write_result

    names = list(CONTENDERS) if args.libraries else ["solotune"]
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "texts.json"
        cases = {f"{size:,}": planted(args.folder / "sharegpt.jsonl", size, 0) for size in SIZES}
        for case, (texts, pairs) in {**cases, f"crowd of {CROWD:,}": (crowd(CROWD), [])}.items():
            file.write_text(json.dumps(texts))
            for name in names:
                one = run(name, sys.executable if name == "solotune" else args.libraries, file)
                found = [tuple(pair) for pair in one.pop("pairs")]
                figures = judged(texts, pairs, found) if pairs else {"reported_pairs": len(found)}
                results.append({"rows": len(texts), "case": case, "who": name, **one, **figures})
                print(json.dumps(results[-1]), file=sys.stderr)
    write_result("duplicates", {"machine": machine("solotune", "numpy"), "cases": results})
    keys = ["case", "who", "planted", "found", "recall", "false_pairs", "seconds", "cpu_seconds", "peak_mib"]
    print(table(keys, [[one.get(key, "-") for key in keys] for one in results]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one_run(*sys.argv[2:])))
    else:
        main()
