"""The first part of a page: what came of the run, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from solotune.diagnosis.catalogue import FAULTS, SUSPECTS
from solotune.report_page.json_values import items, mapping, text, texts
from solotune.report_page.pages import Block, Callout, Culprit, Culprits, Section, Table, Tile, Tiles, Tone
from solotune.run.events import DeviceFailedEvent, DiagnosedEvent, NonFiniteEvent
from solotune.run.record import RunRecord, number_in
from solotune.units import format_bytes, format_duration, format_rate

HEADLINES: dict[str, tuple[Tone, str]] = {
    "better": ("good", "The tuned model is better than its base on held-out rows"),
    "worse": ("bad", "The tuned model is worse than its base on held-out rows"),
    "inside the noise": ("warn", "No clear difference between the tuned model and its base on held-out rows"),
}


NO_DIAGNOSIS = "No diagnosis was saved. solotune diagnose RUN looks for the cause of a bad run."
AT_ITS_END = "The run is diagnosed at its end. What is found before stands here at once."


def verdict_section(record: RunRecord, is_running: bool) -> Section:
    """What stopped the run, its faults, the verdict on held-out rows, then the key figures and what is left open."""
    diagnosis = record.diagnosis
    blocks: list[Block] = [*_state(record, is_running), *_found_so_far(record), *_faults(diagnosis), *_outcome(record)]
    blocks += [*_no_fault(diagnosis), Tiles(tuple(_tiles(record))), *_remarks(diagnosis)]
    missing = []
    if diagnosis is None:
        missing.append(AT_ITS_END if is_running else NO_DIAGNOSIS)
    return Section("verdict", "Verdict", tuple(blocks), tuple(missing))


def _state(record: RunRecord, is_running: bool) -> Iterator[Callout]:
    """How far the run came and what stopped it, unless it just finished."""
    done = f"{record.last_step:,}" if record.total_steps is None else f"{record.last_step:,} of {record.total_steps:,}"
    failed = tuple(_failure(event) for event in record.failures)
    if record.is_finished:
        if failed:
            yield Callout("warn", f"Finished all {done} steps, after failures", failed)
    elif is_running:
        yield Callout("plain", f"Running: {done} steps so far", failed)
    elif failed:
        yield Callout("bad", f"Stopped after {done} steps", failed)
    else:
        where = "before its first step" if not record.steps else f"after {done} steps"
        why = "No error was logged: it was killed or interrupted."
        yield Callout("warn", f"Unfinished: the run ended {where}", (why,))


def _found_so_far(record: RunRecord) -> Iterator[Callout]:
    """What the monitor has found in a run that has no diagnosis yet."""
    found = record.of(DiagnosedEvent) if record.diagnosis is None else ()
    lines = [
        (f"{event.code} {FAULTS[event.code].slug}: " if event.code in FAULTS else "") + event.says for event in found
    ]
    if lines:
        is_fault = any(event.kind != "remark" for event in found)
        yield Callout("warn" if is_fault else "plain", "Found while it trained", tuple(lines))


def _failure(event: NonFiniteEvent | DeviceFailedEvent) -> str:
    if isinstance(event, DeviceFailedEvent):
        return event.problem + (f" ({event.seen})" if event.seen else "")
    parts = [f"Step {event.step:,}: {event.seen or 'a value became NaN or infinite'}"]
    if event.tensors:
        parts.append(f"first in {', '.join(event.tensors[:3])}")
    if event.bad_rows or event.rows:
        parts.append(f"rows {', '.join((event.bad_rows or event.rows or [])[:4])}")
    return "; ".join(parts)


def _outcome(record: RunRecord) -> Iterator[Callout]:
    """The verdict on held-out rows."""
    evaluation = record.evaluation
    difference, stderr = number_in(evaluation, "difference", "loss"), number_in(evaluation, "difference", "stderr")
    if difference is None:
        return
    error = "" if stderr is None else f" ± {stderr:.4f}"
    change = f"Loss per token {'fell' if difference < 0 else 'rose'} by {abs(difference):.4f}{error}"
    p_value = number_in(evaluation, "difference", "p_value")
    change += "." if p_value is None else f" (paired test, p = {p_value:.2g})."
    verdict = text(evaluation, "verdict")
    if verdict in HEADLINES:
        tone, headline = HEADLINES[verdict]
        yield Callout(tone, headline, (change,))
    else:
        unknown = "The run recorded no paired test: an older version evaluated it. solotune evaluate RUN adds one."
        headline = f"Held-out loss is {'lower' if difference < 0 else 'higher'} than that of the base"
        yield Callout("plain", headline, (change, unknown))


def _tiles(record: RunRecord) -> Iterator[Tile]:
    base, tuned = (number_in(record.evaluation, side, "loss") for side in ("base", "tuned"))
    if base is not None and tuned is not None:
        yield Tile("Held-out loss", f"{tuned:.4f}", f"base {base:.4f}", "good" if tuned < base else "bad")
    elif record.steps:
        yield Tile("Training loss", f"{record.steps[-1].loss:.4f}", f"first {record.steps[0].loss:.4f}")
    hits, before = (number_in(record.evaluation, "scores", "exact_match", side) for side in ("tuned", "base"))
    if hits is not None and before is not None:
        yield Tile("Exact match", f"{hits:.1%}", f"base {before:.1%}")
    if record.steps:
        seconds = sum(event.step_seconds for event in record.steps if event.step_seconds == event.step_seconds)
        yield Tile("Training time", format_duration(seconds), _steps_done(record))
    if (rate := record.medians()["tokens_per_second"]) is not None:
        yield Tile("Speed", format_rate(rate, "").strip(), "tokens/s, median")
    if record.peak_bytes is not None:
        planned = number_in(record.plan, "predicted", "peak_bytes")
        yield Tile(
            "Peak memory", format_bytes(record.peak_bytes), f"planned {format_bytes(planned)}" if planned else ""
        )
    start = record.start
    if start is not None and start.trainable_parameters and start.parameters:
        share = start.trainable_parameters / start.parameters
        count = start.trainable_parameters
        yield Tile(
            "Trainable", f"{count / 1e6:.2f} M" if count >= 1e6 else f"{count:,}", f"{share:.2%} of the parameters"
        )


def _steps_done(record: RunRecord) -> str:
    whole = "" if record.total_steps in (None, record.last_step) else f" of {record.total_steps:,}"
    ranks = f" on {record.ranks[-1][1]} ranks" if len(record.ranks) == 1 and record.has_several_ranks else ""
    return f"{record.last_step:,}{whole} steps{ranks}"


def _faults(diagnosis: dict[str, Any] | None) -> Iterator[Block]:
    """The faults that the diagnosis names, or holds possible."""
    culprits = tuple(_culprit(one) for one in items(diagnosis, "culprits") if isinstance(one, dict))
    if not culprits:
        return
    if text(diagnosis, "verdict") == "fault":
        yield Callout("bad", f"Diagnosis: {len(culprits)} fault{'s' * (len(culprits) > 1)} found")
    else:
        yield Callout("warn", "Diagnosis: undecided; possible causes", (text(diagnosis, "next_experiment"),))
    yield Culprits(culprits)


def _no_fault(diagnosis: dict[str, Any] | None) -> Iterator[Callout]:
    if diagnosis is None or items(diagnosis, "culprits"):
        return
    if text(diagnosis, "verdict") == "healthy":
        so_far = " as far as was checked" if items(diagnosis, "not_checked") else ""
        yield Callout("good", f"Diagnosis: no fault found{so_far}")
    else:
        yield Callout("warn", "Diagnosis: undecided", (text(diagnosis, "next_experiment"),))


def _remarks(diagnosis: dict[str, Any] | None) -> Iterator[Table]:
    """What is true of the run without harm, and what was not checked."""
    remarks = [
        (_named(one), text(one, "says"), text(one, "fix"))
        for one in items(diagnosis, "remarks")
        if isinstance(one, dict)
    ]
    if remarks:
        yield Table("Remarks: true of the run, no harm measured", ("", "What", "Change if not meant"), tuple(remarks))
    reasons = sorted({why for why in mapping(diagnosis, "skipped").values() if isinstance(why, str)})
    if open_points := [(one,) for one in (*texts(diagnosis, "not_checked"), *reasons)]:
        yield Table("What the diagnosis did not check", (), tuple(open_points), folded="What was not checked")


def _culprit(found: dict[str, Any]) -> Culprit:
    fault = FAULTS.get(text(found, "fault"))
    suspect = SUSPECTS.get(text(found, "suspect"), "")
    confidence = number_in(found, "confidence")
    confirmed = text(found, "confirmed_by")
    return Culprit(
        headline=fault.title if fault else _named(found),
        where=", ".join(part for part in (_named(found), suspect) if part),
        confidence="" if confidence is None else f"{confidence:.0%} sure",
        evidence=texts(found, "evidence") + ((f"confirmed by experiment: {confirmed}",) if confirmed else ()),
        change=text(found, "fix"),
        expect=text(found, "expect"),
    )


def _named(found: dict[str, Any]) -> str:
    return f"{text(found, 'fault')} {text(found, 'slug')}".strip()
