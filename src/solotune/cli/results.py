"""Print the results of the verbs for people, one function per verb.

Everything fits 60 columns and is clear without colour (signs, brackets and words carry the meaning). Text from data and
models is escaped (`units.escape_terminal`). Scripts use `--json` instead.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from solotune.cli.task_table import print_tasks
from solotune.diagnosis import message
from solotune.diagnosis.findings import SEVERITY_WORDS
from solotune.display.progress import print_choices, print_columns
from solotune.errors import program
from solotune.run.run_dir import REPORT
from solotune.units import escape_terminal, format_bytes, plus_minus

if TYPE_CHECKING:
    from solotune.api.data import DataPreview, ShownRow
    from solotune.api.train import TrainResult
    from solotune.api.watch import WatchedRun
    from solotune.dataset import DataReport
    from solotune.diagnosis.evidence import Diagnosis
    from solotune.evaluation.compare import Evaluation, Sample
    from solotune.evaluation.metrics import MetricScore
    from solotune.hardware.doctor import DoctorReport
    from solotune.planning.plan import Plan
    from solotune.training.verify_run import Verification

SIGNS = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "fail": ("✗", "bold red")}
SEVERITY_SIGNS = {"error": SIGNS["fail"], "warning": SIGNS["warn"], "info": ("·", "dim")}
MIN_COLUMNS_FOR_BESIDE = 72  # on narrower terminals base and tuned are printed one below the other
MAX_COLUMNS = 120  # longer lines are hard to read
TOKEN_CELL = 20  # four tokens with their ids in 80 columns
_VISIBLE_BLANKS = str.maketrans(" \n\t", "␣↵⇥")


def print_doctor(report: DoctorReport, console: Console) -> None:
    """One line per check, with its fix below it."""
    width = max(len(check.name) for check in report.checks)
    for check in report.checks:
        sign, style = SIGNS[check.status]
        _signed(sign, style, f"{check.name:{width}}", check.found, check.fix, console)
    counts = {status: sum(check.status == status for check in report.checks) for status in SIGNS}
    verdict = f"{_count(counts['fail'], 'check')} failed" if counts["fail"] else "ready"
    warnings = f", {_count(counts['warn'], 'warning')}" if counts["warn"] else ""
    console.print()
    console.print(Text(verdict + warnings, "bold red" if counts["fail"] else "bold green"))


def print_data(preview: DataPreview, console: Console, with_ids: bool = False) -> None:
    """Print rows as the model sees them, with trained tokens marked; then facts and problems of the data.

    Args:
        with_ids: show each token of the rows with its id.
    """
    for row in preview.shown:
        _print_row(row, console, with_ids)
    facts = {key: value for key, value in _data_facts(preview.report).items() if value}
    _print_facts(facts, console)
    _print_findings(preview.report.findings or (), preview.allowed, console)
    _print_rows_verdict(preview, console)


def _print_rows_verdict(preview: DataPreview, console: Console) -> None:
    """The last line of `data`: whether `train` would start."""
    findings = preview.report.findings or ()
    console.print()
    if preview.is_fault:
        faults = (one["code"] for one in findings if one["severity"] == "error" and one["code"] not in preview.allowed)
        _print_stop(list(dict.fromkeys(faults)), console)
        return
    remarks = sum(one["severity"] == "warning" for one in findings)
    but = " but those in allow_faults" if any(one["severity"] == "error" for one in findings) else ""
    more = f", {_count(remarks, SEVERITY_WORDS['warning'])}" if remarks else ""
    console.print(Text(f"no fault found in the rows{but}{more}", "bold green"))


def _print_stop(codes: Sequence[str], console: Console) -> None:
    """That `train` refuses to start, and what to do about it."""
    change = f"change what is said above, or set allow_faults: [{', '.join(codes)}]"
    _signed(*SIGNS["fail"], "train stops before step 1:", change, None, console)


def _print_findings(findings: Sequence[Mapping[str, Any]], allowed: Collection[str], console: Console) -> None:
    """Each finding with its fix; `allowed`: codes of faults that do not stop a run."""
    for finding in findings:
        sign, style = SEVERITY_SIGNS[finding["severity"]]
        word = SEVERITY_WORDS[finding["severity"]]
        message, fix = f"{word} {finding['code']} {finding['slug']}: {finding['message']}", f"→ {finding['fix']}"
        fix += " (allowed by allow_faults)" if finding["code"] in allowed else ""
        console.print()
        print_columns([(sign, message), ("", fix)], (style, ""), console)


def _data_facts(report: DataReport) -> dict[str, str]:
    from solotune.dataset.packing import in_words  # `solotune runs` needs no data libraries

    share = report.num_supervised / report.num_tokens if report.num_tokens else 0.0
    cut, split = f"{report.num_truncated:,} truncated to max_length", f"{report.num_split:,} split"
    too_long = [
        *([f"{cut}; {report.num_answers_cut:,} of them lose tokens to train on"] if report.num_truncated else []),
        *([f"{split} into several, {report.num_added_by_split:,} rows more"] if report.num_split else []),
    ]
    alike = {"group": report.num_groups, "near-duplicate": report.num_near_duplicates}
    weighted = ""
    if report.num_weighted_answers:
        answers, rows = _count(report.num_weighted_answers, "answer"), _count(report.num_weighted_rows, "row")
        weighted = f"{answers} in {rows} {'has' if report.num_weighted_answers == 1 else 'have'} a weight other than 1"
        weighted += f"; the sum over the loss tokens is {round(report.total_weight, 6):,}"
    return {
        "format": report.format,
        "rows": f"{report.num_read:,} read, {report.num_kept:,} kept",
        "dropped": ", ".join(f"{number:,} {reason}" for reason, number in sorted(report.dropped.items()) if number),
        **report.notes(),
        "too long": "; ".join(too_long),
        "tokens": f"{report.num_tokens:,}, of which {report.num_supervised:,} ({share:.1%}) are trained on",
        "weights": weighted,
        "split": f"{report.num_train:,} training rows, {report.num_validation:,} held out; "
        + ", ".join(_count(number, word) for word, number in alike.items()),
        "packing": in_words(report.packing) if report.packing else "",
    }


def _print_row(row: ShownRow, console: Console, with_ids: bool) -> None:
    total = len(row.tokens)
    num_trained = sum(len(ids) for _, supervised, ids in row.pieces if supervised)
    legend = "shown in green" if _has_colour(console) else "shown in ⟦ ⟧"
    _print_rule(f"{row.where} · {total:,} tokens, {num_trained:,} trained on, {legend}", console)
    if with_ids:
        _print_tokens(row, console)
    else:
        text = Text()
        weights = row.weights or [1.0] * len(row.pieces)
        for (piece, supervised, _), weight in zip(row.pieces, weights, strict=True):
            text.append(_marked(escape_terminal(piece).replace("\n", "↵\n"), supervised, console))
            text.append(f"×{weight:g}" if supervised and weight != 1 else "", "green")
        console.print(text, soft_wrap=not console.is_terminal)
    console.print()


def _print_tokens(row: ShownRow, console: Console) -> None:
    """Print `id token` in cells of equal width, in reading order; a long token takes several cells."""
    ids = [(index, supervised) for _, supervised, piece in row.pieces for index in piece]
    id_width = max((len(str(index)) for index, _ in ids), default=0)
    columns = min(console.width, MAX_COLUMNS) // TOKEN_CELL * TOKEN_CELL
    text, used = Text(), 0
    for (index, supervised), token in zip(ids, row.tokens, strict=True):
        cell = Text(f"{index:>{id_width}} ")
        cell.append(_marked(escape_terminal(token).translate(_VISIBLE_BLANKS), supervised, console))
        cell.append(" " * (-(cell.cell_len + 1) % TOKEN_CELL + 1))
        if used and used + cell.cell_len > columns:
            text.append("\n")
            used = 0
        text.append(cell)
        used += cell.cell_len
    console.print(text, soft_wrap=not console.is_terminal)


def _marked(text: str, supervised: bool, console: Console) -> Text:
    if not supervised:
        return Text(text, "dim")
    return Text(text if _has_colour(console) else f"⟦{text}⟧", "bold green")


def _has_colour(console: Console) -> bool:
    """False in a pipe, and with NO_COLOR."""
    return console.color_system is not None and not console.no_color


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Base compared with tuned: a table of figures, then the two answers to each sample side by side."""
    base, tuned = evaluation.base, evaluation.tuned
    points, style = 100 * (tuned.exact_match - base.exact_match), _STYLES[evaluation.verdict]
    rows = [
        ("held-out rows", "base", "tuned", "change"),
        (
            "loss per token",
            *(plus_minus(score.loss, score.stderr) for score in (base, tuned)),
            Text(f"{tuned.loss - base.loss:+.4f}", style),
        ),
        (
            "exact match",
            *(f"{score.exact_match:.1%} ± {100 * score.exact_match_stderr:.1f}" for score in (base, tuned)),
            Text(f"{points:+.1f} points", _STYLES[evaluation.exact_match_verdict]),
        ),
    ]
    if console.width < MIN_COLUMNS_FOR_BESIDE:
        rows = list(zip(*rows, strict=True))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for number, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)
    if evaluation.metrics:
        console.print(_metric_table(evaluation.metrics))
    what = f"{evaluation.units}, {tuned.tokens:,} loss tokens; ± is one standard error"
    console.print(Text(what, "dim"))
    console.print(Text(evaluation.verdict_in_words, f"bold {style}".strip()), soft_wrap=not console.is_terminal)
    for line in evaluation.answers_in_words:
        console.print(Text(line, "dim"), soft_wrap=not console.is_terminal)
    if evaluation.tasks:
        print_tasks(evaluation.tasks, console)
    for number, sample in enumerate(evaluation.samples, start=1):
        _print_sample(number, sample, console)


def _metric_table(metrics: Mapping[str, MetricScore]) -> Table:
    """Scores of answers with their standard errors; the change has the colour of its verdict."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("scores of answers", overflow="fold")
    for name in ("base", "tuned", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, score in metrics.items():
        sides = ((score.base, score.base_stderr), (score.tuned, score.tuned_stderr))
        values = (f"{value:.3f} ± {error:.3f}" for value, error in sides)
        table.add_row(name, *values, Text(f"{score.tuned - score.base:+.3f}", _STYLES[score.verdict]))
    return table


_STYLES = {"better": "green", "worse": "red", "inside the noise": ""}


def _print_sample(number: int, sample: Sample, console: Console) -> None:
    console.print()
    _print_rule(f"sample {number} · {sample.where}", console)
    _print_facts({"prompt": sample.prompt, "reference": sample.reference}, console)
    is_equal = sample.tuned.strip() == sample.reference.strip()
    answers = {
        "base": Text(escape_terminal(sample.base) or "(nothing)"),
        "tuned, equal to the reference" if is_equal else "tuned": Text(
            escape_terminal(sample.tuned) or "(nothing)", "green" if is_equal else ""
        ),
    }
    width = min(console.width, MAX_COLUMNS)
    if width < MIN_COLUMNS_FOR_BESIDE:
        for name, answer in answers.items():
            console.print(Text(name, "bold"))
            console.print(Padding(answer, (0, 0, 0, 2)))
        return
    table = Table(box=box.MINIMAL, pad_edge=False, show_edge=False, header_style="bold", width=width)
    for name in answers:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*answers.values())
    console.print(table)


def print_plan(plan: Plan, console: Console) -> None:
    """Bytes by category, seconds, the settings chosen and why, and whether the run fits."""
    memory = plan.option.footprint
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    each = f"each of {plan.ranks.size} " if plan.ranks.size > 1 else ""
    table.add_column(f"peak memory on {each}{plan.card.name}", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    for name, size in memory.by_category.items():
        table.add_row(name.replace("_", " "), format_bytes(size, digits=2))
    if memory.paged_bytes:
        table.add_row("paged optimizer state (in host memory)", f"-{format_bytes(memory.paged_bytes, digits=2)}")
    table.add_section()
    table.add_row(Text(f"peak ({memory.moment})", "bold"), Text(format_bytes(memory.peak_bytes, digits=2), "bold"))
    for name, size in memory.other_peaks():
        table.add_row(f"peak of {name}", format_bytes(size, digits=2))
    table.add_row("budget", format_bytes(plan.budget.bytes, digits=2))
    if host := plan.host_memory():
        table.add_section()
        for name, size in host:
            table.add_row(name, format_bytes(size, digits=2))
    console.print(table)
    _print_facts(plan.times(), console)
    if plan.choices:
        console.print()
        print_choices(plan.choices, console)
    if notes := [*(plan.coverage.in_words() if plan.coverage else ()), *plan.notes]:
        console.print()
        print_columns([("·", note) for note in notes], ("dim", ""), console)
    _print_findings(plan.findings or (), plan.allowed, console)
    console.print()
    if plan.fits:
        console.print(Text("fits", "bold green"))
    else:
        _signed(
            *SIGNS["fail"],
            "does not fit:",
            f"{'change' if plan.changes else 'take'} {plan.suggestion()}",
            None,
            console,
        )
    if plan.is_fault:
        _print_stop([finding["code"] for finding in plan.findings or ()], console)


def print_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """What was found of another trainer's run, culprits, remarks, what was ruled out, and what was not checked."""
    if diagnosis.found:
        lines = [f"{part}: {where}" for part, where in diagnosis.found.items()]
        print_columns([("found" if i == 0 else "", line) for i, line in enumerate(lines)], ("bold", ""), console)
        console.print()
    sign, style = {"fault": SIGNS["fail"], "undecided": SIGNS["warn"], "healthy": SIGNS["ok"]}[diagnosis.verdict]
    for place, culprit in enumerate(diagnosis.culprits):
        fault = message.told(culprit)
        doubt = "perhaps: " if diagnosis.verdict == "undecided" else ""
        console.print(
            Text(escape_terminal(f"{sign} {doubt}{fault.headline}"), style), soft_wrap=not console.is_terminal
        )
        _indented(f"{fault.where}; {culprit.confidence:.0%} sure", console)
        rows = [("  ·", line) for line in fault.evidence[: None if place == 0 else 1]]
        rows += [("  →", fault.change), *([("", f"then {fault.expect}")] if place == 0 else [])]
        print_columns(rows, ("dim", ""), console)
        if fault.also:
            _indented(f"the same evidence fits {fault.also}", console)
        console.print()
    for remark in diagnosis.remarks:
        sign, sign_style = SIGNS["warn"]
        said = f"remark {remark.fault} {remark.slug}: {remark.says}"
        print_columns([(sign, said), ("", f"→ {remark.fix}")], (sign_style, ""), console)
        console.print()
    if near := message.ruled_out_nearby(diagnosis):
        _print_facts({"ruled out": near}, console)
    if open_lines := message.left_open(diagnosis):
        print_columns(
            [("not checked" if i == 0 else "", line) for i, line in enumerate(open_lines)], ("bold", ""), console
        )
    if diagnosis.next_experiment:
        _print_facts({"next": diagnosis.next_experiment}, console)
    verdict = Text(escape_terminal(message.summary(diagnosis)), f"bold {style.removeprefix('bold ')}")
    console.print(verdict, soft_wrap=not console.is_terminal)


def print_trained(result: TrainResult, console: Console) -> None:
    """The result of a run: base compared with tuned, where the files are, and what to do next."""
    if result.evaluation is not None:
        print_evaluation(result.evaluation, console)
    console.print()
    facts = {"run": str(result.run_dir), "adapter": f"{result.run_dir}/adapter (loads with PEFT)"}
    if (page := result.run_dir / REPORT).is_file():
        facts["report"] = f"{page} (open it in a browser)"
    commands = {"next": f"{program()} chat {result.run_dir} --base", "export": f"{program()} export {result.run_dir}"}
    _print_facts({**facts, **commands}, console)


def print_watched(found: WatchedRun, console: Console) -> None:
    """How a watched run ended: its figures, and how to go on."""
    console.print()
    _print_facts(found.facts(), console)


def print_verification(found: Verification, console: Console) -> None:
    """Each changed file with its problem, and a last line that says whether the run is unchanged."""
    for file, problem in found.problems:
        _signed(*SIGNS["fail"], file, problem, None, console)
    for note in found.notes:
        _signed(*SIGNS["warn"], "note", note, None, console)
    size = f"({format_bytes(found.num_bytes)}, {_count(found.num_checkpoints, 'checkpoint')})"
    files = _count(found.num_files, "file")
    verdict = f"{_count(len(found.problems), 'problem')} in {files} {size}"
    if not found.problems:
        verdict = f"OK: {f'{files} is' if found.num_files == 1 else f'all {files} are'} unchanged {size}"
    console.print(Text(verdict, "bold red" if found.problems else "bold green"))


def _signed(sign: str, style: str, head: str, text: str, fix: str | None, console: Console) -> None:
    """Print `✓ head  text`, wrapped, and `→ fix` below the text."""
    rows = [(sign, head, text), *([("", "", f"→ {fix}")] if fix else [])]
    print_columns(rows, (style, "bold", ""), console)


def _print_facts(facts: Mapping[str, str], console: Console) -> None:
    """Print `name  value` lines, with the values wrapped in their own column."""
    print_columns(list(facts.items()), ("bold", ""), console)


def _indented(text: str, console: Console) -> None:
    if console.is_terminal:
        console.print(Padding(Text(escape_terminal(text), "dim"), (0, 0, 0, 2)))
    else:
        console.print(Text(escape_terminal(f"  {text}")), soft_wrap=True)


def _print_rule(title: str, console: Console) -> None:
    width = min(console.width, MAX_COLUMNS)
    text = Text(escape_terminal(title))
    is_long = console.is_terminal and text.cell_len > width - 4  # a rule would cut it
    console.print(text if is_long else Rule(text, align="left", style="dim"), width=width)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"
