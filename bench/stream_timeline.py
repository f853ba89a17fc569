"""Timeline of one training step with streamed layers: copies beside compute, and the gaps between kernels by cause.

    python -m bench.stream_timeline 8B 4x2048 gradient_checkpointing=true base_offload=true [key=value ...]
    python -m bench.stream_timeline --trace trace.json            # a trace that torch.profiler has exported

The model has a shape of `bench.plan_cases` and random weights (`bench.made_weights`). The profiled step is the one
after `--steps` others, which compile and record. What is counted, from the GPU's own clock:

- compute: kernels, on any stream. Two at once count once.
- copies: between host and GPU, by direction; `beside compute` is the share of their time in which a kernel runs too.
- gaps: times without a kernel, each with one cause:
  - waiting for a copy: a copy runs in it, and the next kernel starts (or the step ends) as a copy ends
  - head: a kernel of the loss is among the four before it or the four after it
  - launch: all others
"""

from __future__ import annotations

import argparse
import bisect
import json
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bench.machine import table

Kind = Literal["compute", "to GPU", "to host"]
Interval = tuple[float, float]
CAUSES = ("waiting for a copy", "head", "launch")
HEAD_WORDS = re.compile(r"log_softmax|argmax|cross_entropy|nll_loss", re.IGNORECASE)
NEAR_HEAD = 4  # kernels on both sides of a gap
START_DELAY = 25.0  # microseconds between the end of a copy and the start of the kernel that waited for it


class GpuEvent(NamedTuple):
    """What ran on the GPU; times in microseconds."""

    kind: Kind
    name: str
    start: float
    end: float
    size: int = 0  # bytes of a copy


class Copies(NamedTuple):
    """All copies of one direction."""

    ms: float
    size: int
    beside_compute: float  # share of the time


class Timeline(NamedTuple):
    """One step; times in milliseconds."""

    step: float
    compute: float
    gaps: dict[str, tuple[float, int]]  # cause -> (time, how many)
    copies: dict[str, Copies]

    def to_markdown(self) -> str:
        def share(ms: float) -> str:
            return f"{ms / self.step:.1%}"

        rows = [["step", f"{self.step:.1f}", "", ""], ["kernels", f"{self.compute:.1f}", share(self.compute), ""]]
        rows += [
            [f"gaps: {cause}", f"{ms:.1f}", share(ms), f"{count:,} gaps"] for cause, (ms, count) in self.gaps.items()
        ]
        for direction, copies in self.copies.items():
            rate = copies.size / max(copies.ms, 1e-9) / 1e6
            what = f"{copies.size / 1e9:.2f} GB at {rate:.1f} GB/s, {copies.beside_compute:.1%} beside kernels"
            rows.append([f"copies {direction}", f"{copies.ms:.1f}", share(copies.ms), what])
        return table(["one step", "ms", "of the step", ""], rows)


def events_of(trace: dict[str, Any]) -> list[GpuEvent]:
    """The events of the GPU in a trace of torch.profiler, in order."""
    found = []
    for event in trace["traceEvents"]:
        if event.get("ph") != "X" or event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        kind: Kind = "compute"
        if event["cat"] == "gpu_memcpy" and (match := re.search("HtoD|DtoH", event["name"])):
            kind = "to GPU" if match[0] == "HtoD" else "to host"
        start = float(event["ts"])
        size = int(event.get("args", {}).get("bytes", 0))
        found.append(GpuEvent(kind, event["name"], start, start + float(event["dur"]), size))
    return sorted(found, key=lambda event: event.start)


def timeline(events: Sequence[GpuEvent]) -> Timeline:
    """Add up the events of one step.

    Raises:
        SystemExit: no kernel is among them.
    """
    kernels = [event for event in events if event.kind == "compute"]
    if not kernels:
        raise SystemExit("the trace has no kernel of a GPU")
    begin, end = min(event.start for event in events), max(event.end for event in events)
    busy = union((event.start, event.end) for event in kernels)
    copies = {}
    for direction in ("to GPU", "to host"):
        some = [event for event in events if event.kind == direction]
        if some:
            times = union((event.start, event.end) for event in some)
            beside = length(intersection(times, busy)) / max(length(times), 1e-9)
            copies[direction] = Copies(length(times) / 1e3, sum(event.size for event in some), beside)
    return Timeline((end - begin) / 1e3, length(busy) / 1e3, _gaps(events, kernels, busy, begin, end), copies)


def _gaps(
    events: Sequence[GpuEvent], kernels: Sequence[GpuEvent], busy: Sequence[Interval], begin: float, end: float
) -> dict[str, tuple[float, int]]:
    """Time without a kernel and the number of such gaps, by cause."""
    copies = [event for event in events if event.kind != "compute"]
    starts = [kernel.start for kernel in kernels]
    edges = [begin, *(edge for interval in busy for edge in interval), end]
    found: dict[str, tuple[float, int]] = dict.fromkeys(CAUSES, (0.0, 0))
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        if stop <= start:
            continue
        after = bisect.bisect_left(starts, stop)
        near = kernels[max(0, after - NEAR_HEAD) : after + NEAR_HEAD]
        if any(copy.start < stop and stop - START_DELAY <= copy.end <= stop and copy.end > start for copy in copies):
            cause = "waiting for a copy"
        else:
            cause = "head" if any(HEAD_WORDS.search(kernel.name) for kernel in near) else "launch"
        ms, count = found[cause]
        found[cause] = ms + (stop - start) / 1e3, count + 1
    return found


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The intervals without overlaps, in order."""
    joined: list[Interval] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((start, end))
    return joined


def intersection(one: Sequence[Interval], two: Sequence[Interval]) -> list[Interval]:
    """What is in both; each is ordered and without overlaps."""
    found, i, j = [], 0, 0
    while i < len(one) and j < len(two):
        start, end = max(one[i][0], two[j][0]), min(one[i][1], two[j][1])
        if start < end:
            found.append((start, end))
        if one[i][1] < two[j][1]:
            i += 1
        else:
            j += 1
    return found


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def profiled_step(words: Sequence[str], steps: int, folder: Path) -> Path:
    """Train a case's model for `steps` steps, and profile the next; the file of the trace."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from bench.made_weights import make_weights_here
    from bench.plan_cases import of
    from bench.plan_runs import plan_of, random_rows
    from solotune.dataset.collate import collate
    from solotune.hardware import machine as environment
    from solotune.model.loading import load_model
    from solotune.planning import plan_inputs
    from solotune.training import loop
    from solotune.training.forward_backward import MicroBatchRunner
    from solotune.training.optimizer import make_optimizer

    case = of(words[0], words[1], *words[2:])
    config = plan_of(case, folder, plan_inputs.shapes_of(), None).resolved
    make_weights_here()
    device = torch.device("cuda")
    model = load_model(config, device, getattr(torch, environment.dtype_of(config.bf16)))
    optimizer = make_optimizer(config.optimizer, [model.flat_params])
    model.module.train()
    size, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    rows = random_rows(case, size * accumulation)
    batches = [collate(rows[i * size : (i + 1) * size], device) for i in range(accumulation)]
    runner = MicroBatchRunner(model, config.takes_graphs)

    def step(number: int) -> None:
        loop.train_step(model, batches, optimizer, config.max_grad_norm, (0, number), runner)
        torch.cuda.synchronize()

    for number in range(steps):
        step(number)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step(steps)
    profiler.export_chrome_trace(str(folder / "trace.json"))
    return folder / "trace.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="MODEL ROWSxTOKENS key=value ...")
    parser.add_argument("--trace", type=Path, help="a trace instead of a run")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="where the trace is kept")
    args = parser.parse_intermixed_args()
    if args.trace is None and len(args.words) < 2:
        parser.error("a model of bench.plan_cases and rows (8B 4x2048), or --trace FILE")
    with tempfile.TemporaryDirectory(prefix="stream-timeline-") as folder:
        path = args.trace or profiled_step(args.words, args.steps, Path(folder))
        text = path.read_text(encoding="utf-8")
        if args.keep:
            args.keep.write_text(text, encoding="utf-8")
    print(" ".join(args.words) or args.trace)
    print(timeline(events_of(json.loads(text))).to_markdown(), flush=True)


if __name__ == "__main__":
    main()
