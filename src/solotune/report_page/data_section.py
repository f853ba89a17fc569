"""The rows: how long, what of them is trained on, which were dropped and why, and some as the model sees them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from solotune.report_page.json_values import in_words, items, mapping, text
from solotune.report_page.pages import (
    MAX_TEXT,
    Bin,
    Block,
    Histogram,
    Piece,
    Section,
    Table,
    Tile,
    Tiles,
    TokenRow,
    TokenRows,
)
from solotune.run.record import RunRecord, number_in

COUNTED = {  # of data.json's rows: key -> in words
    "truncated": "Truncated at max_length",
    "answers_cut": "Rows with an answer that is cut",
    "cut_as_text": "Cut before tokenizing, far longer than max_length",
    "split": "Split into several",
    "parts_without_label": "Parts of split rows without a trained token",
    "with_control_tokens_as_text": "With control tokens spelled in their text",
}
SPLIT = {
    "exact_duplicates": "Exact copies removed",
    "near_duplicates": "Near-duplicates kept on one side",
    "close_to_training": "Held-out rows close to a training row",
}


def data_section(record: RunRecord) -> Section:
    """Counts, reasons, findings, distributions and examples of data.json."""
    data = record.data
    if data is None:
        return Section("data", "Data", missing=("There is no data.json that can be read.",))
    blocks: list[Block] = [Tiles(tuple(_tiles(data)))]
    blocks += _tables(data)
    blocks += _histograms(data)
    section = Section("data", "Data", tuple(blocks))
    rows = tuple(token_row(one) for one in items(data, "examples") if isinstance(one, dict))
    if not rows:
        return Section(section.name, section.title, section.blocks, ("data.json has no example rows.",))
    return Section(section.name, section.title, (*blocks, TokenRows(rows)))


def _tiles(data: dict[str, Any]) -> Iterator[Tile]:
    read, kept = number_in(data, "rows", "read"), number_in(data, "rows", "kept")
    if read is not None and kept is not None:
        dropped = read - kept
        detail = f"{dropped:,.0f} of {read:,.0f} dropped" if dropped else "all that were read"
        yield Tile("Rows kept", f"{kept:,.0f}", detail, "warn" if dropped else "plain")
    total, supervised = number_in(data, "tokens", "total"), number_in(data, "tokens", "supervised")
    if total is not None and supervised is not None:
        share = f"{supervised / total:.0%} of {total:,.0f}" if total else ""
        yield Tile("Tokens trained on", f"{supervised:,.0f}", share)
    train, held_out = number_in(data, "split", "train"), number_in(data, "split", "validation")
    if train is not None and held_out is not None:
        groups = number_in(data, "split", "groups")
        detail = f"{held_out:,.0f} held out" + (f", {groups:,.0f} groups" if groups else "")
        yield Tile("Training rows", f"{train:,.0f}", detail)
    if text(data, "format"):
        yield Tile("Format", text(data, "format"), text(data, "prompt_format"))


def _tables(data: dict[str, Any]) -> Iterator[Table]:
    counted = [(f"Dropped: {reason}", f"{count:,}") for reason, count in _counts(mapping(data, "rows", "dropped"))]
    rows, split = _counts(mapping(data, "rows")), _counts(mapping(data, "split"))
    counted += [(COUNTED[name], f"{count:,}") for name, count in rows if name in COUNTED and count]
    counted += [(SPLIT[name], f"{count:,}") for name, count in split if name in SPLIT and count]
    if counted:
        yield Table("What happened to rows", ("", "Rows"), tuple(counted), numeric=True)
    unused = [(key, f"{count:,}") for key, count in _counts(mapping(data, "unused_keys"))]
    if unused:
        yield Table("Keys of the rows that nothing reads", ("Key", "Rows"), tuple(unused), numeric=True)
    findings = [
        (f"{text(one, 'code')} {text(one, 'slug')}", text(one, "severity"), text(one, "message"), text(one, "fix"))
        for one in items(data, "findings")
        if isinstance(one, dict)
    ]
    if findings:
        header = ("", "Severity", "What", "Change if not meant")
        yield Table("Findings on rows", header, tuple(findings))
    if system_prompt := text(data, "system_prompt", "text"):
        of = f"{in_words(number_in(data, 'system_prompt', 'rows'))} rows"
        yield Table("System prompt of the training rows", ("Rows", "Text"), ((of, system_prompt[:MAX_TEXT]),))


def _counts(found: dict[str, Any]) -> list[tuple[str, int]]:
    return [(name, count) for name, count in found.items() if isinstance(count, int) and not isinstance(count, bool)]


def _histograms(data: dict[str, Any]) -> Iterator[Histogram]:
    kinds = (
        ("row_tokens", "Length of the rows", "tokens in a row", "{:,.0f}"),
        ("supervised_share", "Share of a row that is trained on", "share of the tokens", "{:.0%}"),
    )
    for name, caption, axis, shown in kinds:
        found = mapping(data, "histograms", name)
        edges = [value for edge in items(found, "edges") if (value := number_in(edge)) is not None]
        counts = [int(value) for count in items(found, "counts") if (value := number_in(count)) is not None]
        if not counts or len(edges) != len(counts) + 1 or not any(counts):
            continue
        bins = tuple(
            Bin(f"{shown.format(low)} to {shown.format(high)}", count, round(100 * count / max(counts), 1))
            for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
        )
        most = max(bins, key=lambda one: one.count)
        summary = f"{sum(counts):,} rows, {bins[0].label.split(' to ')[0]} to {bins[-1].label.split(' to ')[1]} {axis}"
        yield Histogram(caption, axis, bins, f"{summary}; most rows ({most.count:,}) have {most.label}.")


def token_row(example: dict[str, Any]) -> TokenRow:
    """A row of data.json as pieces with their loss weight, cut where it is long."""
    pieces, room, length = [], MAX_TEXT, 0
    for one in items(example, "pieces"):
        whole = text(one, "text")
        length += len(whole)
        if room > 0 and isinstance(one, dict):
            weight = number_in(one, "weight")
            shown, room = whole[:room], room - len(whole)
            is_trained = one.get("supervised") is True
            pieces.append(Piece(shown, is_trained, len(items(one, "ids")), "" if weight is None else f"{weight:g}"))
    num_tokens = sum(len(items(one, "ids")) for one in items(example, "pieces"))
    trained = sum(len(items(one, "ids")) for one in items(example, "pieces") if mapping(one).get("supervised") is True)
    note = f"the first {MAX_TEXT:,} of {length:,} characters" if length > MAX_TEXT else ""
    return TokenRow(
        text(example, "where")[:200], tuple(pieces), f"{trained:,} of {num_tokens:,} tokens trained on", note
    )
