"""bench.stream_timeline: copies beside compute, and gaps by cause, counted on traces whose sums are known."""

from __future__ import annotations

import json
import sys

import pytest

from bench import stream_timeline
from bench.stream_timeline import events_of, intersection, timeline, union


def kernel(start, end, name="gemm"):
    return {"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": end - start, "args": {"stream": 7}}


def copy(start, end, how="HtoD (Pinned -> Device)", size=1000):
    args = {"stream": 20, "bytes": size}
    return {"ph": "X", "cat": "gpu_memcpy", "name": f"Memcpy {how}", "ts": start, "dur": end - start, "args": args}


OTHERS = [
    {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 0, "dur": 9999},
    {"ph": "i", "cat": "kernel", "name": "instant", "ts": 5000},
    {"ph": "M", "name": "process_name"},
]


def counted(*events):
    return timeline(events_of({"traceEvents": [*OTHERS, *events]}))


def test_a_copy_that_ends_while_kernels_run_holds_nothing_up():
    found = counted(kernel(0, 1000), copy(200, 800, size=6_000_000), kernel(1000, 2000))
    assert (found.step, found.compute) == (2.0, 2.0)
    assert all(gap == (0.0, 0) for gap in found.gaps.values())
    assert found.copies == {"to GPU": (0.6, 6_000_000, 1.0)}


def test_a_kernel_that_starts_as_a_copy_ends_has_waited_for_it():
    found = counted(kernel(0, 1000), copy(500, 1500), kernel(1510, 2000))
    assert found.gaps["waiting for a copy"] == (pytest.approx(0.51), 1)
    assert found.gaps["launch"] == found.gaps["head"] == (0.0, 0)
    assert found.copies["to GPU"].beside_compute == 0.5


def test_a_gap_with_a_copy_that_goes_on_or_ended_long_before_is_of_the_launch():
    goes_on = counted(kernel(0, 1000), copy(500, 1900), kernel(1100, 2000))
    assert goes_on.gaps["launch"] == (pytest.approx(0.1), 1)
    ended = counted(kernel(0, 1000), copy(500, 1100), kernel(1400, 2000))
    assert ended.gaps["launch"] == (pytest.approx(0.4), 1)


def test_gaps_around_the_loss_are_of_the_head():
    loss = kernel(1100, 1200, "triton_red_fused__log_softmax_argmax_0")
    plain = [kernel(2000 + 20 * i, 2010 + 20 * i) for i in range(10)]
    found = counted(kernel(0, 1000), loss, *plain)
    # before the loss, after it, and between the three kernels that follow; the fourth gap after those is no longer near
    assert found.gaps["head"] == (pytest.approx(0.1 + 0.8 + 3 * 0.01), 5)
    assert found.gaps["launch"] == (pytest.approx(6 * 0.01), 6)


def test_kernels_on_two_streams_count_once_and_directions_apart():
    found = counted(
        kernel(0, 1000), kernel(500, 1500), copy(0, 500, "DtoH (Device -> Pinned)", 10), copy(1400, 1600, size=20),
        copy(0, 10, "DtoD (Device -> Device)"),
    )  # fmt: skip
    assert found.compute == 1.5 and found.step == 1.6
    assert found.copies["to host"] == (0.5, 10, 1.0)
    assert found.copies["to GPU"] == (pytest.approx(0.2), 20, pytest.approx(0.5))
    assert found.gaps["waiting for a copy"] == (pytest.approx(0.1), 1)  # the step ends with it


def test_gaps_and_kernels_add_up_to_the_step():
    found = counted(*(kernel(30 * i, 30 * i + 20) for i in range(50)), copy(100, 700), copy(705, 2000))
    assert found.compute + sum(ms for ms, _ in found.gaps.values()) == pytest.approx(found.step)


def test_sets_of_intervals():
    assert union([(5, 7), (1, 3), (2, 4), (4, 5)]) == [(1, 7)]
    assert intersection([(0, 4), (6, 9)], [(3, 7), (8, 20)]) == [(3, 4), (6, 7), (8, 9)]


def test_a_trace_is_printed_as_a_table(tmp_path, monkeypatch, capsys):
    trace = tmp_path / "trace.json"
    events = [kernel(0, 1000), copy(500, 1500, size=50_000_000), kernel(1510, 2000)]
    trace.write_text(json.dumps({"traceEvents": events}))
    monkeypatch.setattr(sys, "argv", ["stream_timeline", "--trace", str(trace)])
    stream_timeline.main()
    out = capsys.readouterr().out
    assert "| gaps: waiting for a copy | 0.5 | 25.5% | 1 gaps |" in out
    assert "| copies to GPU | 1.0 | 50.0% | 0.05 GB at 50.0 GB/s, 50.0% beside kernels |" in out
    monkeypatch.setattr(sys, "argv", ["stream_timeline", "8B"])
    with pytest.raises(SystemExit):
        stream_timeline.main()


def test_a_trace_without_a_gpu_is_refused():
    with pytest.raises(SystemExit, match="no kernel"):
        counted()
