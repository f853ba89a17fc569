"""Two runs on one page: which is better on the held-out rows, their curves over each other, and where they differ.

Both runs were evaluated row by row. If they held out the same rows (the same tokens, by their fingerprint) and recorded
the loss of each row, the two tuned models are compared by the paired test that base and tuned are compared by. Else the
errors of the two losses are combined as if they were independent, and the page says so: of the same rows they are not,
so that test finds less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from solotune.evaluation.statistics import ratio_and_stderr, sign_flip_p, verdict
from solotune.report_page.evaluation_section import error_bars, p_text
from solotune.report_page.json_values import in_words, items, mapping, text
from solotune.report_page.pages import Block, Callout, Chart, Line, Section, Table, Tone
from solotune.report_page.settings_sections import sources_of
from solotune.run.record import RunRecord, number_in
from solotune.units import format_bytes, format_rate, format_step_time, plus_minus

Two = tuple[RunRecord, RunRecord]
Names = tuple[str, str]
NOT_COMPARED = {"output_dir", "resume_from_checkpoint"}  # of every run its own


def comparison_sections(records: Two, found: tuple[dict[str, Any], dict[str, Any]], names: Names) -> list[Section]:
    """The sections of the page of two runs.

    Args:
        found: the `curves` of each.
        names: of the runs, as they are shown.
    """
    return [_outcome(records, names), _curves(found, names), _config(records, names), _environment(records, names)]


# --- which is better


def _outcome(records: Two, names: Names) -> Section:
    blocks: list[Block] = [_verdict(records, names), _figures(records, names)]
    losses = [
        (name, number_in(record.evaluation, "tuned", "loss"), number_in(record.evaluation, "tuned", "stderr"))
        for record, name in zip(records, names, strict=True)
    ]
    if bars := error_bars("Held-out loss per token of the tuned models (lower is better)", losses):
        blocks.append(bars)
    missing = tuple(
        f"{name} has no evaluation: solotune evaluate {record.path} adds one."
        for record, name in zip(records, names, strict=True)
        if record.evaluation is None
    )
    return Section("verdict", "Verdict", tuple(blocks), missing)


def _verdict(records: Two, names: Names) -> Callout:
    """The second run's tuned model against the first's."""
    losses = [number_in(record.evaluation, "tuned", "loss") for record in records]
    if losses[0] is None or losses[1] is None:
        return Callout("plain", "The two tuned models cannot be compared", ("A held-out loss is missing.",))
    if not _same_rows(records):
        why = "The runs held out other rows, so their losses cannot be compared: set the same data, seed and split."
        return Callout("warn", "The two runs held out different rows", (why,))
    pairs = _paired_rows(records)
    if pairs is not None:
        differences, weights, groups = pairs
        difference, stderr = ratio_and_stderr(differences, weights, groups)
        p_value, test = sign_flip_p(differences, groups), f"paired test over {len(differences):,} rows"
    else:
        difference = losses[1] - losses[0]
        errors = [number_in(record.evaluation, "tuned", "stderr") for record in records]
        if errors[0] is None or errors[1] is None:
            return Callout(
                "plain", "The two losses have no errors", ("So nothing can be said about their difference.",)
            )
        stderr = math.hypot(errors[0], errors[1])
        p_value = math.erfc(abs(difference) / stderr / math.sqrt(2)) if stderr else float(difference == 0)
        test = "not paired, since a run recorded no losses by row: it finds less than a paired test"
    found = verdict(difference, p_value)
    tone: Tone = "warn" if found == "inside the noise" else "good"
    better, other = names if difference > 0 else names[::-1]
    headline = "No clear difference between the two tuned models"
    if found != "inside the noise":
        headline = f"{better} is better than {other} on the same held-out rows"
    if difference == 0:
        return Callout("plain", "The two tuned models have the same held-out loss")
    line = f"The loss per token of {better} is lower by {plus_minus(abs(difference), stderr)} "
    return Callout(tone, headline, (line + f"(p = {p_text(p_value)}; {test}).",))


def _same_rows(records: Two) -> bool:
    """Whether both held out the same tokens; a run of an older version may not say."""
    first, second = (text(record.fingerprints, "validation_rows") for record in records)
    return first == second


def _paired_rows(records: Two) -> tuple[list[float], list[float], list[str] | None] | None:
    """Second minus first loss of each held-out row, its weight, and its group; None if a run did not record them."""
    losses = [_numbers(record.evaluation, "tuned") for record in records]
    weights = _numbers(records[0].evaluation, "weights")
    if (
        losses[0] is None
        or losses[1] is None
        or weights is None
        or not len(losses[0]) == len(losses[1]) == len(weights)
    ):
        return None
    groups = [str(one) for one in items(records[0].evaluation, "row_losses", "groups")]
    differences = [after - before for before, after in zip(losses[0], losses[1], strict=True)]
    return differences, weights, groups if len(groups) == len(weights) else None


def _numbers(evaluation: Any, name: str) -> list[float] | None:
    """The finite numbers of each held-out row; None if one is missing, or all are."""
    found = [number_in(one) for one in items(evaluation, "row_losses", name)]
    known = [one for one in found if one is not None]
    return known if known and len(known) == len(found) else None


def _figures(records: Two, names: Names) -> Table:
    """The key figures of both."""
    rows: list[tuple[str, ...]] = [
        ("State", *("finished" if record.is_finished else "unfinished" for record in records)),
        ("Steps", *(f"{record.last_step:,}" for record in records)),
        *_ranks(records),
        ("Last training loss", *(_shown(record.steps[-1].loss if record.steps else None) for record in records)),
        ("Held-out loss, base", *(_loss(record, "base") for record in records)),
        ("Held-out loss, tuned", *(_loss(record, "tuned") for record in records)),
        *_score_rows(records),
        ("Peak memory", *(format_bytes(record.peak_bytes) if record.peak_bytes else "" for record in records)),
        ("Seconds per step", *(_median(record, "step_seconds", format_step_time) for record in records)),
        ("Tokens per second", *(_median(record, "tokens_per_second", _rate) for record in records)),
        ("Diagnosis", *(_diagnosis(record) for record in records)),
    ]
    return Table("Both runs", ("", *names), tuple(rows), numeric=True)


def _ranks(records: Two) -> list[tuple[str, ...]]:
    """Nothing if both ran on one."""
    several = any(record.has_several_ranks for record in records)
    return [("Ranks", *(record.ranks_in_words() for record in records))] if several else []


def _score_rows(records: Two) -> list[tuple[str, str, str]]:
    names = dict.fromkeys(name for record in records for name in mapping(record.evaluation, "scores"))
    rows = []
    for name in names:
        first, second = (number_in(record.evaluation, "scores", name, "tuned") for record in records)
        shown = ("" if value is None else f"{value:.1%}" for value in (first, second))
        rows.append((f"{name.replace('_', ' ').capitalize()}, tuned", *shown))
    return rows


def _loss(record: RunRecord, side: str) -> str:
    value = number_in(record.evaluation, side, "loss")
    return "" if value is None else plus_minus(value, number_in(record.evaluation, side, "stderr"))


def _median(record: RunRecord, name: str, shown: Any) -> str:
    value = record.medians()[name]
    return "" if value is None else shown(value)


def _rate(value: float) -> str:
    return format_rate(value, "").strip()


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _diagnosis(record: RunRecord) -> str:
    named = [text(one, "slug") for one in items(record.diagnosis, "culprits")]
    return ", ".join(part for part in (text(record.diagnosis, "verdict"), *named) if part) or "none saved"


# --- curves


def _curves(found: Sequence[dict[str, Any]], names: Names) -> Section:
    charts = (
        _chart("loss", "Training loss, smoothed", "loss", "smoothed_loss", found, names, can_be_log=True),
        _chart("held_out", "Held-out loss", "loss", "held_out", found, names, can_be_log=True),
        _chart("learning_rate", "Learning rate", "rate", "learning_rate", found, names),
        _chart("grad_norm", "Gradient norm, before clipping", "plain", "grad_norm", found, names, can_be_log=True),
    )
    known = tuple(one for one in charts if one)
    missing = () if known else ("Neither run logged a step.",)
    return Section("curves", "Curves", known, missing)


def _chart(
    name: str, title: str, unit: str, key: str, found: Sequence[dict[str, Any]], names: Names, can_be_log: bool = False
) -> Chart | None:
    lines, rows, parts = [], [], []
    for run, (one, of_run) in enumerate(zip(found, names, strict=True)):
        if key not in one["series"]:
            continue
        is_held_out = key == "held_out"
        style = ("held_out", "other_held_out")[run] if is_held_out else ("main", "other")[run]
        lines.append(Line(key, of_run, style, run))  # pyright: ignore[reportArgumentType]
        steps, values = one["series"][key]["steps"], one["series"][key]["values"]
        first, last = (_shown_short(value) for value in (values[0], values[-1]))
        rows.append((of_run, f"{steps[0]:,}", first, f"{steps[-1]:,}", last))
        parts.append(f"{of_run} from {first} to {last}")
    if not lines:
        return None
    header = ("Run", "First step", "Value", "Last step", "Value")
    table = Table(title, header, tuple(rows), numeric=True, folded=f"{title} as a table")
    return Chart(name, title, unit, tuple(lines), f"{'; '.join(parts)}.", table, can_be_log=can_be_log)


def _shown_short(value: float | None) -> str:
    return "NaN" if value is None else f"{value:.4g}"


# --- where they differ


def _config(records: Two, names: Names) -> Section:
    first, second = (record.config for record in records)
    title = "Config differences"
    if first is None or second is None:
        return Section("config", title, missing=("A config.yaml cannot be read.",))
    sources = [sources_of(record) for record in records]
    absent = object()
    rows = []
    for key in dict.fromkeys([*first, *second]):
        values = first.get(key, absent), second.get(key, absent)
        if values[0] == values[1] or key in NOT_COMPARED:
            continue
        shown = ["not there" if value is absent else in_words(value) for value in values]
        where = [of_run.get(key, "") for of_run in sources]
        rows.append((key, *shown, " / ".join(dict.fromkeys(one for one in where if one))))
    if not rows:
        return Section("config", title, (Callout("plain", "The two configs are the same"),))
    return Section(
        "config", title, (Table(f"{len(rows)} keys differ", ("Key", *names, "Source"), tuple(rows), code=True),)
    )


def _environment(records: Two, names: Names) -> Section:
    title = "Environment differences"
    found = [record.environment for record in records]
    if found[0] is None or found[1] is None:
        return Section("environment", title, missing=("An environment.json cannot be read.",))
    flat = [{**mapping(one, "versions"), **{key: one.get(key) for key in MACHINE}} for one in found if one]
    rows = [
        (key, *(in_words(one.get(key)) for one in flat))
        for key in dict.fromkeys([*flat[0], *flat[1]])
        if flat[0].get(key) != flat[1].get(key)
    ]
    data = [text(record.fingerprints, "train_rows") for record in records]
    if all(data):
        rows.append(("training rows", *(("the same", "the same") if data[0] == data[1] else ("differ", "differ"))))
    if not rows:
        return Section("environment", title, (Callout("plain", "The same machine and versions"),))
    return Section("environment", title, (Table("Machine, versions, rows", ("", *names), tuple(rows)),))


MACHINE = ("solotune", "os", "python", "cpu", "num_cpus", "gpu", "driver", "cuda_runtime")
