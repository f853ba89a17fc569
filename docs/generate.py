"""Write the pages generated from the code: config.md, config.schema.json and faults.md. A test compares them.

python docs/generate.py
"""

from __future__ import annotations

import json
from pathlib import Path

from solotune.config.describe import allowed_values, field_help, section_of
from solotune.config.key_aliases import FOREIGN_KEYS
from solotune.config.run_config import SECTIONS, RunConfig
from solotune.diagnosis.catalogue import EQUIVALENT, EXPLAINS, FAULTS, SUSPECTS
from solotune.diagnosis.explanation import explained, faults_of
from solotune.diagnosis.rules import rules
from solotune.errors import EXIT_CODES
from solotune.training.resume import BATCH, CLASSES

HERE = Path(__file__).parent
RESUMED = {
    "frozen": f"refused (exit code 5), but `{BATCH[0]}` and `{BATCH[1]}` may change if their product stays the same",
    "inexact": "continues, and log and metrics.jsonl say that it is not exact; so for another version or device",
    "free": "free; base and rows are compared by their content, not by their location",
}


def config_page() -> str:
    """Every key: default, allowed values, help; then the names in other tools, then the exit codes."""
    lines = [
        "# The config",
        "",
        "One YAML file (version 1.2: `2e-4` is a number), or `key=value` on the command line, or a dict in Python.",
        "Unknown keys, wrong types and duplicate keys are errors, all reported at once with their lines.",
        "Generated from `src/solotune/config/run_config.py`; editors can use [config.schema.json](config.schema.json).",
    ]
    for section in SECTIONS:
        lines += ["", f"## {section}", "", "| key | default | allowed | what it does |", "|---|---|---|---|"]
        for key, field in RunConfig.model_fields.items():
            if section_of(key) == section:
                default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
                lines.append(f"| `{key}` | {default} | {allowed_values(key)} | {field_help(key)} |")
    lines += ["", "## Coming from another tool", "", "These names are refused; the message gives the name to use:", ""]
    for ours in dict.fromkeys(FOREIGN_KEYS.values()):
        theirs = ", ".join(f"`{foreign}`" for foreign, key in FOREIGN_KEYS.items() if key == ours)
        lines.append(f"- `{ours}`: {theirs}")
    lines += [
        "",
        "## What may change before `--resume`",
        "",
        "A resumed run must give the result of an uninterrupted one.",
        "",
    ]
    for kind, rule in RESUMED.items():
        keys = ", ".join(f"`{key}`" for key in RunConfig.model_fields if CLASSES[key] == kind)
        lines.append(f"- {rule}: {keys}")
    lines += ["", "## Exit codes", "", "| code | meaning |", "|---|---|"]
    lines += [f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items()]
    return "\n".join(lines) + "\n"


def config_schema() -> str:
    """The JSON schema, for editors."""
    schema = RunConfig.model_json_schema()
    return json.dumps({**schema, "title": "solotune run config", "description": "A run of solotune."}, indent=2) + "\n"


def faults_page() -> str:
    """Every suspect, its faults, and the explanation of each fault."""
    lines = [
        "# Faults",
        "",
        f"The {len(SUSPECTS)} parts of fine-tuning that you set up (suspects), and {len(FAULTS)} faults that they can "
        "have. `solotune diagnose` finds them, `solotune explain F17` prints an entry. Generated from "
        "`src/solotune/diagnosis/`.",
        "",
        "| suspect | faults |",
        "|---|---|",
    ]
    for suspect, name in SUSPECTS.items():
        linked = ", ".join(f"[{f.code} {f.slug}](#{f.code.lower()}-{f.slug})" for f in faults_of(suspect))
        lines.append(f"| {suspect} {name} | {linked} |")
    for suspect, name in SUSPECTS.items():
        lines += ["", f"## {suspect}: {name}"]
        for fault in faults_of(suspect):
            lines += ["", f"### {fault.code} {fault.slug}", "", fault.title, ""]
            lines += [f"- {section}" for section in explained(fault.code).sections]
    lines += ["", "## Reported together", "", "The evidence can be the same; a diagnosis says what tells them apart:"]
    lines += ["", *(f"- {' or '.join(sorted(group))}" for group in EQUIVALENT)]
    lines += [
        "",
        "## Causes and consequences",
        "",
        "If the first fault is found, the others are reported as its consequences, not as causes:",
    ]
    lines += ["", *(f"- {cause}: {', '.join(sorted(effects))}" for cause, effects in sorted(EXPLAINS.items()))]
    unruled = sorted(set(FAULTS) - set(rules()))
    lines += ["", f"Without a rule: {', '.join(unruled) or 'none'}."]
    return "\n".join(lines) + "\n"


PAGES = {"config.md": config_page, "config.schema.json": config_schema, "faults.md": faults_page}

if __name__ == "__main__":
    for name, make in PAGES.items():
        (HERE / name).write_text(make(), encoding="utf-8")
