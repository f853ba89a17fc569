"""Merging an 8B shape on the CPU: peak memory, and time beside a plain copy of the same bytes.

    python -m bench.merge_8b --model /tmp/m8b [--out FOLDER] [--into original dequantized]

The model is any folder in safetensors, random weights will do; the adapter is random, of rank 16 on every linear layer.
Each merge and the copy run in a process of their own, so that each has its own peak memory. The weight files are read
once before, so that all find them in the page cache, or none does where they are larger than memory. The copy is synced
to the disk, as the merged files are; these are also hashed, and read back and hashed again before the folder appears.
Needs as much free disk as the model takes, in FOLDER.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.machine import RESULTS, machine, table, write_result

RANK = 16
READ_BYTES = 16 << 20


def peak_gib() -> float:
    """Peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def copy(model: Path, target: Path) -> dict[str, Any]:
    """Copy the weight files and sync them."""
    target.mkdir()
    started, size = time.perf_counter(), 0
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as source, (target / path.name).open("wb") as copied:
            shutil.copyfileobj(source, copied, READ_BYTES)
            copied.flush()
            os.fsync(copied.fileno())
            size += copied.tell()
    return {"seconds": time.perf_counter() - started, "bytes": size, "peak_gib": peak_gib()}


def merge(model: Path, target: Path, into: str) -> dict[str, Any]:
    """Merge a random adapter into a model's weights."""
    import torch

    from solotune.config.run_config import RunConfig
    from solotune.exporters.base_tensors import BaseTensors
    from solotune.exporters.merge import Merge, write_weights
    from solotune.hub.model_files import ModelFiles
    from solotune.run.atomic_io import whole_folder

    keys = {"model_name_or_path": str(model), "dataset": "none", "base_precision": "nf4", "max_length": 512}
    config = RunConfig.validated(keys, {}, "bench")
    tensors = BaseTensors.of(ModelFiles(str(model), "main", model, True), config)
    adapter, cpu = random_adapter(tensors), torch.device("cpu")
    before = peak_gib()
    started = time.perf_counter()
    with whole_folder(target) as folder:
        how = Merge(adapter, config.precision, torch.bfloat16, cpu, into, torch.bfloat16)
        write_weights(tensors, folder, how, lambda *_: None)
    seconds = time.perf_counter() - started
    files = sorted(target.glob("*.safetensors"))
    return {
        "seconds": seconds,
        "bytes": sum(path.stat().st_size for path in files),
        "largest_shard": max(path.stat().st_size for path in files),
        "peak_gib": peak_gib(),
        "before_gib": before,
        "threads": torch.get_num_threads(),
    }


def random_adapter(tensors: Any) -> Any:
    """Rank RANK on every linear layer."""
    import torch

    from solotune.model.adapter import Adapter, tensor_key

    torch.manual_seed(0)
    factors = {}
    for weight in tensors.weights:
        out, into = weight.entry.shape[::-1] if weight.is_transposed else weight.entry.shape
        factors[tensor_key(weight.layer, "lora_A")] = 0.01 * torch.randn(RANK, into)
        factors[tensor_key(weight.layer, "lora_B")] = 0.01 * torch.randn(out, RANK)
    return Adapter({"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK}, factors)


def alone(function: Any, *arguments: Any) -> dict[str, Any]:
    """Run a function in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def markdown(result: dict[str, Any]) -> str:
    """bench/results/merge_8b.md."""
    lines = ["# Memory and time of a merge", "", "```", (__doc__ or "").strip(), "```", ""]
    lines += [", ".join(f"{key} {value}" for key, value in result["machine"].items()) + ".", ""]
    plain = result["copy"]
    rows = [
        [
            "plain copy",
            f"{plain['bytes'] / 1e9:.1f} GB",
            f"{plain['seconds']:.0f} s",
            "1.0",
            f"{plain['peak_gib']:.1f} GiB",
        ]
    ]
    for into, one in result["merges"].items():
        rows.append(
            [
                f"merged into {into}",
                f"{one['bytes'] / 1e9:.1f} GB",
                f"{one['seconds']:.0f} s",
                f"{one['x_a_copy']:.2f}",
                f"{one['peak_gib']:.1f} GiB",
            ]
        )
    lines += [table(["", "written", "time", "x a copy", "peak memory"], rows), ""]
    largest = max(one["largest_shard"] for one in result["merges"].values())
    threads = " and ".join(str(one["threads"]) for one in result["merges"].values())
    lines += [f"The largest shard has {largest / 2**30:.1f} GiB. Threads of torch: {threads}."]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("/tmp/m8b"))
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="a folder on the disk to write to; default: beside MODEL"
    )
    parser.add_argument("--into", nargs="+", choices=["original", "dequantized"], default=["original", "dequantized"])
    parser.add_argument("--name", default="merge_8b", help="of the result file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.out or args.model.parent) as folder:
        for path in sorted(args.model.glob("*.safetensors")):  # read once
            with path.open("rb") as file:
                while file.read(READ_BYTES):
                    pass
        result: dict[str, Any] = {"copy": alone(copy, args.model, Path(folder) / "copy"), "merges": {}}
        result["machine"] = machine("torch", "bitsandbytes")
        shutil.rmtree(Path(folder) / "copy")
        print(json.dumps({"copy": result["copy"]}), flush=True)
        for into in args.into:
            one = alone(merge, args.model, Path(folder) / into, into)
            result["merges"][into] = {**one, "x_a_copy": one["seconds"] / result["copy"]["seconds"]}
            shutil.rmtree(Path(folder) / into)
            print(json.dumps({into: result["merges"][into]}), flush=True)
            write_result(args.name, result)  # what is measured stays, if the next one is stopped
            (RESULTS / f"{args.name}.md").write_text(markdown(result))
    print(markdown(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
