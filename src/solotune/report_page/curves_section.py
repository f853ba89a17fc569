"""The curves of a run: loss, learning rate, gradient norm; each with a table of the same figures."""

from __future__ import annotations

from typing import Any

from solotune.report_page.pages import Chart, Level, Line, Section, Table
from solotune.run.record import RunRecord, number_in
from solotune.units import format_bytes, format_step_time

TABLE_ROWS = 12
Series = dict[str, Any]


def curves_section(record: RunRecord, found: dict[str, Any]) -> Section:
    """Charts over the whole run.

    Args:
        found: the run's `curves`.
    """
    series = found["series"]
    if not series:
        return Section("curves", "Training curves", missing=("No step was logged in metrics.jsonl.",))
    clip = number_in(record.config, "max_grad_norm")
    wanted = (
        loss_chart(series),
        chart("learning_rate", "Learning rate", "rate", series),
        chart("grad_norm", "Gradient norm, before clipping", "plain", series,
              levels=(Level(clip, "max_grad_norm"),) if clip else (), can_be_log=True),
    )  # fmt: skip
    missing = []
    if "held_out" not in series:
        missing.append("Held-out loss was not measured during the run.")
    if found["non_finite"]:
        numbers = ", ".join(f"{step:,}" for step in found["non_finite"][:8])
        more = "..." if len(found["non_finite"]) > 8 else ""
        missing.append(f"NaN or infinite values at step {numbers}{more}: gaps in the curves, marked by red lines.")
    if found["resumed"]:
        missing.append(f"Resumed after step {', '.join(f'{step:,}' for step in found['resumed'])}: dashed lines.")
    intro = f"All {found['last_step']:,} steps. Drag to zoom, double-click for the whole run; with the keyboard: "
    intro += "arrows move, + and - zoom, 0 shows the whole run. The charts move together."
    return Section("curves", "Training curves", tuple(one for one in wanted if one), tuple(missing), intro)


def loss_chart(series: Series) -> Chart | None:
    """Training loss, its average, and held-out loss with the band of its standard error."""
    if "loss" not in series:
        return None
    lines = [Line("loss", "training loss", "faint"), Line("smoothed_loss", "smoothed", "main")]
    header = ["Step", "Training loss", "Smoothed"]
    loss, smooth = series["loss"], series["smoothed_loss"]
    rows = [
        [f"{loss['steps'][i]:,}", _plain(loss["values"][i]), _plain(smooth["values"][i])]
        for i in _places(len(loss["steps"]))
    ]
    summary = f"Training loss {_from_to(loss)}"
    held_out = series.get("held_out")
    if held_out:
        lines.append(Line("held_out", "held-out loss, band 95 %", "held_out"))
        header.append("Held-out")
        known = {step: i for i, step in enumerate(held_out["steps"])}
        wanted = {int(row[0].replace(",", "")): row for row in rows}
        for step, place in known.items():
            if step not in wanted and len(known) <= TABLE_ROWS:
                wanted[step] = [f"{step:,}", "", ""]
            if step in wanted:
                wanted[step].append(_with_error(held_out["values"][place], held_out["stderr"][place]))
        rows = [[*row, ""][: len(header)] for _, row in sorted(wanted.items())]
        summary += f"; held-out loss {_from_to(held_out)}"
    table = Table("Loss", tuple(header), tuple(tuple(row) for row in rows), numeric=True, folded="Loss as a table")
    return Chart("loss", "Loss per supervised token", "loss", tuple(lines), f"{summary}.", table, can_be_log=True)


def chart(
    key: str, title: str, unit: str, series: Series, levels: tuple[Level, ...] = (), can_be_log: bool = False
) -> Chart | None:
    """A chart of one curve; None if it was not logged."""
    if key not in series:
        return None
    shown = {"bytes": format_bytes, "seconds": format_step_time}.get(unit, _plain)
    one = series[key]
    rows = tuple(
        (f"{one['steps'][i]:,}", "NaN" if one["values"][i] is None else shown(one["values"][i]))
        for i in _places(len(one["steps"]))
    )
    table = Table(title, ("Step", title), rows, numeric=True, folded=f"{title} as a table")
    known = [value for value in one["values"] if value is not None]
    summary = f"{title}: from {shown(known[0])} to {shown(known[-1])}, at most {shown(max(known))}."
    name, lines = title.split(",")[0].lower(), (Line(key, title.split(",")[0].lower()),)
    if f"smoothed_{key}" in series:
        lines = (Line(key, name, "faint"), Line(f"smoothed_{key}", "smoothed"))
    return Chart(key, title, unit, lines, summary, table, levels, can_be_log)


def _places(count: int) -> list[int]:
    """Places of at most `TABLE_ROWS` points, evenly spread, the first and last among them."""
    if count <= TABLE_ROWS:
        return list(range(count))
    return [round(i * (count - 1) / (TABLE_ROWS - 1)) for i in range(TABLE_ROWS)]


def _plain(value: float | None) -> str:
    return "NaN" if value is None else f"{value:.4g}"


def _with_error(value: float | None, error: float | None) -> str:
    return _plain(value) if error is None else f"{_plain(value)} ± {error:.2g}"


def _from_to(one: dict[str, Any]) -> str:
    known = [value for value in one["values"] if value is not None]
    if not known:
        return "without a finite value"
    if len(known) == 1:
        return f"{_plain(known[0])}, a single value"
    return f"from {_plain(known[0])} to {_plain(known[-1])}, lowest {_plain(min(known))}"
