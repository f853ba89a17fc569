"""Base against tuned on the held-out rows, and their answers side by side."""

from __future__ import annotations

from typing import Any

from solotune.report_page.json_values import items, mapping, text
from solotune.report_page.pages import Block, ErrorBars, Sample, Samples, Section, Table, Text, Whisker
from solotune.run.record import RunRecord, number_in
from solotune.units import plus_minus

Z_95 = 1.96
"""Standard errors on each side of a value that hold 95 % of a normal distribution."""


def evaluation_section(record: RunRecord) -> Section:
    """Losses with error bars, the scores, and the paired tests."""
    title, evaluation = "Base against tuned", record.evaluation
    if evaluation is None:
        return Section("evaluation", title, missing=(_why_missing(record),))
    rows = number_in(evaluation, "rows")
    groups = number_in(evaluation, "groups")
    units = f"{rows:,.0f} held-out rows" if rows is not None else "The held-out rows"
    units += f" in {groups:,.0f} group{'s' * (groups != 1)}" if groups else ""
    intro = f"{units}, the same for both models. ± is one standard error; the bars are 95\u00a0% intervals. "
    intro += "The tests are paired: they compare the two models row by row."
    blocks: list[Block] = []
    loss = [(name, *_loss(evaluation, side)) for name, side in (("base", "base"), ("tuned", "tuned"))]
    if bars := error_bars("Held-out loss per token (lower is better)", loss):
        blocks.append(bars)
    blocks.append(_score_table(evaluation))
    if tasks := _task_table(evaluation):
        blocks.append(tasks)
    named = [(name, score) for name, score in mapping(evaluation, "scores").items() if isinstance(score, dict)]
    for name, score in named:
        both = [(side, number_in(score, side), number_in(score, "stderr", side)) for side in ("base", "tuned")]
        if bars := error_bars(f"{_in_words(name)} (higher is better)", both, share=_is_share(score)):
            blocks.append(bars)
    return Section("evaluation", title, tuple(blocks), intro=intro)


def samples_section(record: RunRecord) -> Section:
    """Prompts with the reference and the answers of both models."""
    title = "Answers side by side"
    found = tuple(
        Sample(text(one, "where")[:200], *(Text.cut(text(one, key)) for key in ANSWERS))
        for one in items(record.evaluation, "samples")
        if isinstance(one, dict)
    )
    if not found:
        why = "No sample answers were generated (num_samples)." if record.evaluation else _why_missing(record)
        return Section("samples", title, missing=(why,))
    intro = "Held-out prompts, each asked in the format of the training, greedy decoding."
    return Section("samples", title, (Samples(found),), intro=intro)


ANSWERS = ("prompt", "reference", "base", "tuned")


def error_bars(
    caption: str, values: list[tuple[str, float | None, float | None]], share: bool = False
) -> ErrorBars | None:
    """Values with their 95 % intervals on one scale; None if a value is missing.

    Args:
        values: name, value and standard error.
        share: the values are shares, shown in percent from 0 to 100.
    """
    known = [(name, value, stderr or 0.0) for name, value, stderr in values if value is not None]
    if len(known) < len(values):
        return None
    low = min(value - Z_95 * error for _, value, error in known)
    high = max(value + Z_95 * error for _, value, error in known)
    padding = 0.06 * (high - low) or 0.5
    first, last = (0.0, 1.0) if share else (max(0.0, low - padding) if low >= 0 else low - padding, high + padding)

    def place(value: float) -> float:
        return round(100 * min(1.0, max(0.0, (value - first) / (last - first))), 2)

    whiskers = tuple(
        Whisker(
            name,
            f"{value:.1%}" if share else plus_minus(value, error),
            place(value),
            place(value - Z_95 * error),
            place(value + Z_95 * error),
        )
        for name, value, error in known
    )
    ends = (f"{end:.0%}" if share else f"{end:.3g}" for end in (first, last))
    return ErrorBars(caption, whiskers, *ends)


def _score_table(evaluation: dict[str, Any]) -> Table:
    base, tuned = _loss(evaluation, "base"), _loss(evaluation, "tuned")
    difference = number_in(evaluation, "difference", "loss")
    error = number_in(evaluation, "difference", "stderr")
    change = "" if difference is None else f"{'+' * (difference >= 0)}{plus_minus(difference, error)}"
    losses = ("" if value is None else plus_minus(value, stderr) for value, stderr in (base, tuned))
    rows = [("Loss per token", *losses, change, p_text(number_in(evaluation, "difference", "p_value")))]
    for name, score in mapping(evaluation, "scores").items():
        before, after = number_in(score, "base"), number_in(score, "tuned")
        change = ""
        if before is not None and after is not None:
            change = f"{100 * (after - before):+.1f} points" if _is_share(score) else f"{after - before:+.3g}"
        values = (_value(score, side) for side in ("base", "tuned"))
        rows.append((_in_words(name), *values, change, p_text(number_in(score, "p_value"))))
    return Table("Scores", ("", "Base", "Tuned", "Change", "p (paired)"), tuple(rows), numeric=True)


def _task_table(evaluation: dict[str, Any]) -> Table | None:
    """Scores on standard tasks of lm_eval; None without any."""
    rows = []
    for score in items(evaluation, "tasks"):
        before, after = number_in(score, "base"), number_in(score, "tuned")
        if not isinstance(score, dict) or before is None or after is None:
            continue
        filter_name = text(score, "filter")
        name = f"{text(score, 'task')} {text(score, 'metric')}" + (f" ({filter_name})" if filter_name != "none" else "")
        error, number = number_in(score, "stderr", "difference"), number_in(score, "rows")
        if score.get("is_share") is True:
            values = [_value(score, side) for side in ("base", "tuned")]
            change = f"{100 * (after - before):+.1f} points"
        else:
            values = [
                plus_minus(value, number_in(score, "stderr", side))
                for side, value in (("base", before), ("tuned", after))
            ]
            change = f"{'+' * (after >= before)}{plus_minus(after - before, error)}"
        p_value = number_in(score, "p_value")
        test = "not tested" if p_value is None else f"{p_text(p_value)}, {text(score, 'verdict')}"
        rows.append((name[:200], "" if number is None else f"{number:,.0f}", *values, change, test))
    header = ("", "Documents", "Base", "Tuned", "Change", "p (paired)")
    return Table("Standard tasks (lm_eval)", header, tuple(rows), numeric=True) if rows else None


def p_text(p_value: float | None) -> str:
    """A p-value as text; empty if there is none."""
    if p_value is None:
        return "not recorded"
    return "< 0.0001" if p_value < 0.0001 else f"{p_value:.4f}" if p_value < 0.01 else f"{p_value:.2f}"


def _is_share(score: Any) -> bool:
    """Whether both values are shares: a metric of the user's own may give any number."""
    return all(0 <= (number_in(score, side) or 0) <= 1 for side in ("base", "tuned"))


def _value(score: Any, side: str) -> str:
    value, error = number_in(score, side), number_in(score, "stderr", side)
    if value is None:
        return ""
    if not _is_share(score):
        return f"{value:.3g}" if error is None else plus_minus(value, error)
    return f"{value:.1%}" if error is None else f"{value:.1%} ± {100 * error:.1f}"


def _loss(evaluation: dict[str, Any], side: str) -> tuple[float | None, float | None]:
    return number_in(evaluation, side, "loss"), number_in(evaluation, side, "stderr")


def _why_missing(record: RunRecord) -> str:
    if not record.is_finished:
        return "The run has not reached its evaluation: base and tuned are compared after the last step."
    return "There is no evaluation.json that can be read. solotune evaluate RUN compares base and tuned."


def _in_words(name: str) -> str:
    return name.replace("_", " ").capitalize()
