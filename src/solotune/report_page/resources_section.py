"""Memory and time of the steps, as planned and as measured."""

from __future__ import annotations

from typing import Any

from solotune.report_page.curves_section import chart
from solotune.report_page.json_values import mapping
from solotune.report_page.pages import Block, Level, Part, Section, Stack, Stacks, Table
from solotune.run.events import PreflightEvent
from solotune.run.record import RunRecord, number_in
from solotune.units import format_bytes, format_duration, format_rate, format_step_time


def resources_section(record: RunRecord, found: dict[str, Any]) -> Section:
    """What the plan said, what the preflight and the run measured, and the curves of both.

    Args:
        found: the run's `curves`.
    """
    title = "Memory and step time"
    series, planned = found["series"], mapping(record.plan, "predicted")
    measured = {"peak_bytes": record.peak_bytes, **record.medians()}
    if not planned and not record.steps:
        return Section("resources", title, missing=("Neither plan.json nor a step can be read.",))
    blocks: list[Block] = [_comparison(record, planned, measured)]
    if stacks := _memory(planned, record.peak_bytes):
        blocks.append(stacks)
    peak, seconds = number_in(planned, "peak_bytes"), number_in(planned, "seconds", "step")
    charts = (
        chart("step_seconds", "Seconds per step", "seconds", series, (Level(seconds, "planned"),) if seconds else ()),
        chart("peak_bytes", "Peak memory so far", "bytes", series, (Level(peak, "planned"),) if peak else ()),
    )
    blocks += [one for one in charts if one]
    missing = () if planned else ("plan.json cannot be read: nothing to compare with.",)
    return Section("resources", title, tuple(blocks), missing)


def _comparison(record: RunRecord, planned: dict[str, Any], measured: dict[str, float | None]) -> Table:
    preflight = (*record.of(PreflightEvent), None)[0]
    peak_bytes, step_seconds = measured["peak_bytes"], measured["step_seconds"]
    rate = measured["tokens_per_second"]
    total = sum(event.step_seconds for event in record.steps if event.step_seconds == event.step_seconds)
    of_one, of_all = (" of rank 0", " of all ranks") if record.has_several_ranks else ("", "")
    rows = [
        _row(f"Peak memory{of_one}", number_in(planned, "peak_bytes"), preflight.peak_bytes if preflight else None,
             peak_bytes, format_bytes),
        _row("Seconds per step, median", number_in(planned, "seconds", "step"),
             preflight.step_seconds if preflight else None, step_seconds, format_step_time),
        _row(f"Tokens per second{of_all}, median", number_in(planned, "tokens_per_second"), None, rate,
             lambda value: format_rate(value, "").strip()),
        _row("All steps", number_in(planned, "seconds", "total"), None, total or None, format_duration),
    ]  # fmt: skip
    budget = number_in(planned, "budget_bytes")
    if budget:
        rows.append(("Memory budget", format_bytes(budget), "", "", ""))
    header = ("", "Planned", "Preflight", "Measured", "Measured against planned")
    return Table("Planned and measured", header, tuple(rows), numeric=True)


def _row(name: str, planned: float | None, tried: float | None, measured: float | None, shown: Any) -> tuple[str, ...]:
    texts = ("" if value is None else shown(value) for value in (planned, tried, measured))
    change = "" if not planned or measured is None else f"{100 * (measured / planned - 1):+.1f} %"
    return (name, *texts, change)


def _memory(planned: dict[str, Any], measured: float | None) -> Stacks | None:
    """The planned peak by category above the measured one."""
    by_category = {name: size for name, size in mapping(planned, "by_category").items() if (number_in(size) or 0) > 0}
    total = sum(by_category.values())
    if not total:
        return None
    longest = max(total, measured or 0)
    parts = tuple(
        Part(name.replace("_", " "), format_bytes(size), round(100 * size / longest, 2))
        for name, size in sorted(by_category.items(), key=lambda one: -one[1])
    )
    stacks = [Stack("planned", format_bytes(total), parts)]
    if measured:
        share = round(100 * measured / longest, 2)
        stacks.append(Stack("measured", format_bytes(measured), (Part("in all", format_bytes(measured), share),)))
    return Stacks("Memory at the peak of a step", tuple(stacks))
