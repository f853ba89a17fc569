"""Which base to merge into: SmolLM2-135M tuned in 4 bits, merged into each, against the model that was trained.

    python -m bench.quality --prepare chats.jsonl                    # with a network: the chats to tune on
    python -m bench.merge --chats chats.jsonl [--runs FOLDER] [--rows 60]

Two tasks, as in `bench.quality`: `demo` (the recipe of examples/demo.yaml) and `chats`. A run that is in FOLDER already
is not trained again, nor exported again. Each is measured on up to `--rows` held-out rows by what `solotune export`
itself uses (`exporters.merge_choice`), and exported: the artifacts are those of its export.json.

    original       the adapter added to the 16-bit weights
    dequantized    added to the 4-bit codes that it was trained on, dequantised
    requantized    the latter in NF4 again, as PEFT's merge on a 4-bit base does, or who loads a merged model in 4 bits

KL is KL(trained || merged) in nats per answer token; loss in nats per answer token, ± one standard error over rows.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.machine import RESULTS, machine, table, write_result
from examples import smollm2

ROOT = Path(__file__).parent.parent
QUIET = {"eval_strategy": "no", "eval_steps": None, "save_strategy": "no", "save_steps": None, "num_samples": 0}
TASKS: dict[str, dict[str, Any]] = {
    "demo": {"dataset": str(ROOT / "examples/tickets.jsonl"), "max_steps": 60},
    "chats": {"split_by": None, "validation_size": 40, "max_steps": 25, "learning_rate": 1e-3},
}
ORDER = ("trained", "original", "dequantized", "requantized")


def train(task: str, folder: Path, chats: Path | None) -> float:
    """Train the run of a task with the demo's recipe; seconds."""
    import solotune

    started = time.perf_counter()
    own = {**TASKS[task], **({"dataset": str(chats)} if task == "chats" else {})}
    keys = {
        **QUIET,
        **own,
        "model_name_or_path": str(smollm2.ensure(smollm2.DEFAULT_FOLDER)),
        "output_dir": str(folder),
    }
    solotune.train(ROOT / "examples/demo.yaml", keys)
    return time.perf_counter() - started


def measure(run: Path, num_rows: int) -> dict[str, Any]:
    """The candidates of a run, and its merged model once written and loaded again."""
    import solotune
    from solotune.exporters.base_tensors import BaseTensors
    from solotune.exporters.merge_choice import choose, measure_trained
    from solotune.exporters.source import MAX_TOKENS, cut, open_source

    source = open_source(run)
    assert source.tuned_run is not None
    held_out = source.tuned_run.prepare().validation
    source.rows = [cut(held_out[place], MAX_TOKENS) for place in range(min(num_rows, len(held_out)))]
    started = time.perf_counter()
    tensors = BaseTensors.of(source.base, source.config)
    trained = measure_trained(source, lambda *_: None)
    choice = choose(source, tensors, trained, "bf16", None, lambda *_: None)
    seconds = time.perf_counter() - started
    del trained
    if not (run / "export").exists():
        solotune.export(run)
    artifacts = json.loads((run / "export/export.json").read_text())["artifacts"]
    return {"rows": len(source.rows), "seconds": round(seconds, 1), **choice.to_json(), "artifacts": artifacts}


def markdown(result: dict[str, Any]) -> str:
    """bench/results/merge.md."""
    lines = ["# Which base to merge into", "", "```", (__doc__ or "").strip(), "```", ""]
    lines += [", ".join(f"{key} {value}" for key, value in result["machine"].items()) + ".", ""]
    head = ["task", "rows", "merged into", "mean KL", "max KL", "same top token", "loss", "exact match"]
    rows = []
    for task, found in result["tasks"].items():
        for name in ORDER:
            fit = found["measured"][name]
            rows.append([task, found["rows"], name, f"{fit['mean_kl']:.1e}", f"{fit['max_kl']:.1e}",
                         f"{fit['top1_agreement']:.2%}", f"{fit['loss']:.4f} ± {fit['stderr']:.4f}",
                         f"{fit['exact_match']:.0%}"])  # fmt: skip
    lines += [table(head, rows), "", "Written, and loaded again:", ""]
    written = [
        [task, one["kind"], parity["engine"], f"{parity['mean_kl']:.1e}", f"{parity['top1_agreement']:.2%}",
         f"{one['bytes'] / 2**20:.0f} MiB", f"{one['seconds']:.1f} s"]
        for task, found in result["tasks"].items() for one in found["artifacts"] for parity in one["parity"]
        if parity["mean_kl"] is not None
    ]  # fmt: skip
    lines += [table(["task", "artifact", "engine", "mean KL", "same top token", "size", "time"], written), ""]
    lines += [f"Peak memory of all: {result['peak_gib']:.1f} GiB."]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats", type=Path, metavar="FILE", help="needed for the task chats")
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="where the runs are, or are trained")
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    args = parser.parse_args()
    folder = args.runs or Path(tempfile.mkdtemp(prefix="solotune-merge-"))
    found: dict[str, Any] = {}
    for task in args.tasks:
        run = folder / task
        seconds = None if (run / "manifest.json").is_file() else round(train(task, run, args.chats), 1)
        found[task] = {"train_seconds": seconds, **measure(run, args.rows)}
        print(json.dumps({name: fit["mean_kl"] for name, fit in found[task]["measured"].items()}), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    result = {"machine": machine("torch", "transformers", "bitsandbytes", "peft"), "peak_gib": peak, "tasks": found}
    write_result("merge", result)
    (RESULTS / "merge.md").write_text(markdown(result))
    print(markdown(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
