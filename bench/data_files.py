"""`solotune data` on real files: what it reads, keeps, drops and finds; seconds and peak memory of the whole process.

    python -m bench.real_data FOLDER && python -m bench.data_files FOLDER

Each file goes through the command in a process of its own, with no cache, once for each tokenizer; a file that is
refused once more with `on_bad_row: drop`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.machine import machine, table, write_result

PLAIN = ("sharegpt-cut.json", "sharegpt.jsonl", "chats.jsonl", "chitchat.jsonl")


def measured(model: Path, file: Path, overrides: list[str]) -> dict[str, Any]:
    """One run of `solotune data FILE --json`, as figures."""
    with tempfile.TemporaryDirectory() as folder:
        config, out = Path(folder) / "c.yaml", Path(folder) / "out.json"
        config.write_text(f"model_name_or_path: {model}\ndataset: {file}\n")
        command = [sys.executable, "-m", "solotune", "data", str(config), "--show", "0", "--json", *overrides]
        environment = {**os.environ, "XDG_CACHE_HOME": folder, "HF_HUB_OFFLINE": "1"}
        started = time.perf_counter()
        with out.open("w") as stream:
            child = subprocess.Popen(command, stdout=stream, stderr=subprocess.DEVNULL, env=environment)
            _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - started
        found = json.loads(out.read_text())
    return {
        "file": file.name,
        "tokenizer": model.name,
        "exit": os.waitstatus_to_exitcode(status),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mib": usage.ru_maxrss // 1024,
        **_figures(found),
    }


def _figures(found: dict[str, Any]) -> dict[str, Any]:
    if "error" in found:
        return {"error": found["error"]}
    return {
        "format": found["format"],
        **{key: found["rows"][key] for key in ("read", "kept", "dropped", "truncated", "answers_cut")},
        **{key: found["tokens"][key] for key in ("total", "supervised")},
        "supervised_share": found["tokens"]["supervised_share"],
        "train": found["split"]["train"],
        "validation": found["split"]["validation"],
        "near_duplicates": found["split"]["near_duplicates"],
        "findings": [f"{one['severity']} {one['code']} {one['slug']}: {one['message']}" for one in found["findings"]],
    }


def readable(results: list[dict[str, Any]]) -> str:
    """Two tables: what was read, and what was refused."""
    kept = [
        [
            one["file"],
            one["tokenizer"],
            one["format"],
            one["read"],
            one["kept"],
            ", ".join(f"{n:,} {reason}" for reason, n in one["dropped"].items()) or "-",
            f"{one['supervised_share']:.1%}",
            " ".join(text.split()[1] for text in one["findings"]) or "-",
            one["seconds"],
            one["cpu_seconds"],
            one["peak_mib"],
        ]
        for one in results
        if "error" not in one
    ]
    head = "file,tokenizer,format,read,kept,dropped,supervised,findings,seconds,CPU s,peak MiB".split(",")
    refused = [
        [one["file"], f"{one['error']['problem']}; seen: {one['error']['seen']}", one["cpu_seconds"]]
        for one in results
        if "error" in one and one["tokenizer"] == results[0]["tokenizer"]
    ]
    return table(head, kept) + "\n\n" + table(["refused", "because", "CPU s"], refused)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="only files whose name contains this")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
    files = [path for path in sorted((args.folder / "llamafactory").iterdir()) if "demo" in path.name]
    files = [path for path in [*files, args.folder / "llamafactory" / "identity.json"] if path.suffix != ".yaml"]
    files += [args.folder / name for name in PLAIN]
    models = sorted((args.folder / "tokenizers").iterdir())
    results = []
    for file in (file for file in files if args.only in file.name):
        for model in models:
            results.append(measured(model, file, args.overrides))
            if "error" in results[-1] and model == models[0]:  # what is left without the rows that are refused?
                dropping = measured(model, file, [*args.overrides, "on_bad_row=drop"])
                results += [{**dropping, "file": f"{file.name}, on_bad_row: drop"}] if "error" not in dropping else []
            print(json.dumps(results[-1], ensure_ascii=False), file=sys.stderr)
    if not args.only:
        write_result("data_files", {"machine": machine("solotune", "tokenizers", "transformers"), "files": results})
    print(readable(results))


if __name__ == "__main__":
    main()
