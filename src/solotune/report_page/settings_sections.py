"""The config of this run with the source and reason of each value, its environment, and its exports."""

from __future__ import annotations

from typing import Any

from solotune.config.describe import field_help
from solotune.config.run_config import RunConfig
from solotune.regular_files import read_text
from solotune.report_page.json_values import in_words, items, mapping, text, texts
from solotune.report_page.pages import Block, Callout, Section, Table
from solotune.run.record import MAX_JSON_BYTES, RunRecord, json_object, number_in
from solotune.run.run_dir import EXPORT, EXPORT_JSON
from solotune.units import format_bytes

CONFIG = "config.yaml"


def config_section(record: RunRecord) -> Section:
    """Every key of config.yaml: what was set by somebody first, the defaults on demand."""
    title = "Config of this run"
    if record.config is None:
        return Section("config", title, missing=(f"There is no {CONFIG} that can be read.",))
    reasons = {text(one, "key"): text(one, "because") for one in _choices(record)}
    sources = sources_of(record)
    chosen, defaults = [], []
    for key, value in record.config.items():
        source = sources.get(key, "not recorded")
        shown = (key, in_words(value), source, reasons.get(key) or _help(key))
        (defaults if source == "default" else chosen).append(shown)
    header = ("Key", "Value", "Source", "Reason, or what it sets")
    blocks: list[Block] = []
    if chosen:
        blocks.append(Table("Set for this run", header, tuple(chosen), code=True))
    if defaults:
        folded = f"{len(defaults)} keys at their defaults"
        blocks.append(Table("Defaults", header, tuple(defaults), code=True, folded=folded))
    return Section("config", title, tuple(blocks))


def sources_of(record: RunRecord) -> dict[str, str]:
    """Where each value came from: the comment at the end of its line in config.yaml."""
    try:
        lines = read_text(record.path / CONFIG, MAX_JSON_BYTES).splitlines()
    except (OSError, ValueError):
        return {}
    found = {}
    for line in lines:
        key, colon, rest = line.partition(": ")
        value, mark, source = rest.rpartition("  # ")
        if colon and mark and value:
            found[key] = source
    return found


def _choices(record: RunRecord) -> list[Any]:
    return [*items(record.environment, "choices"), *items(record.plan, "predicted", "choices")]


def _help(key: str) -> str:
    return field_help(key) if key in RunConfig.model_fields else "not a key of this version"


def environment_section(record: RunRecord) -> Section:
    """Machine and versions."""
    title, found = "Environment", record.environment
    if found is None:
        return Section("environment", title, missing=("There is no environment.json that can be read.",))
    gpu = text(found, "gpu")
    memory = number_in(found, "gpu_bytes")
    ram, free = number_in(found, "ram_bytes"), number_in(found, "ram_free_bytes")
    share = " for each rank" if record.ranks[-1][1] > 1 else ""
    machine = [
        ("solotune", in_words(found.get("solotune"))),
        ("System", text(found, "os")),
        ("Python", text(found, "python")),
        ("CPU", f"{text(found, 'cpu')}, {in_words(found.get('num_cpus'))} cores"),
        ("Memory", "" if ram is None else format_bytes(ram) + (f", {format_bytes(free)} free" if free else "") + share),
        ("GPU", (gpu + (f", {format_bytes(memory)}" if memory else "")) if gpu else "none"),
        ("Ranks", record.ranks_in_words() if record.has_several_ranks else ""),
        ("Driver", text(found, "driver")),
        ("CUDA", text(found, "cuda_runtime")),
    ]
    versions = [(name, in_words(version)) for name, version in mapping(found, "versions").items()]
    blocks = [Table("Machine", ("", ""), tuple(row for row in machine if row[1]))]
    if versions:
        blocks.append(Table("Versions", ("Package", "Version"), tuple(versions)))
    return Section("environment", title, tuple(blocks))


def export_section(record: RunRecord) -> Section | None:
    """Each exported artifact with its parity; None if nothing was exported."""
    found = json_object(record.path / EXPORT / EXPORT_JSON)
    artifacts = [one for one in items(found, "artifacts") if isinstance(one, dict)]
    if not artifacts:
        return None
    problems = tuple(f"{text(one, 'kind')}: {problem}" for one in artifacts for problem in texts(one, "problems"))
    verdict = (
        Callout("bad", "An export differs from what was trained", problems)
        if problems
        else Callout("good", "Exported as it was trained")
    )
    rows = []
    for one in artifacts:
        for parity in items(one, "parity") or [{"engine": "not measured"}]:
            size, ids = number_in(one, "bytes"), mapping(parity).get("token_ids_equal")
            kl, top = number_in(parity, "mean_kl"), number_in(parity, "top1_agreement")
            rows.append((
                text(one, "kind"),
                "" if size is None else format_bytes(size),
                text(parity, "engine"),
                {True: "equal", False: "DIFFER"}.get(ids, "") if isinstance(ids, bool) else "",
                "" if kl is None else f"{kl:.1e}",
                "" if top is None else f"{top:.1%}",
            ))  # fmt: skip
    header = ("Artifact", "Size", "Engine", "Token ids", "Mean KL", "Top-1 agreement")
    table = Table("Parity with the trained model", header, tuple(rows), numeric=True)
    notes = tuple((text(one, "kind"), note) for one in artifacts for note in texts(one, "notes"))
    blocks: list[Block] = [verdict, table]
    if notes:
        blocks.append(Table("Notes", ("", ""), notes, folded="Notes"))
    return Section("export", "Exports", tuple(blocks))
