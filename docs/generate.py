"""Write the pages generated from the code; a test compares them.

python docs/generate.py

config.md, config.schema.json    from the keys of the config
faults.md                        from the catalogue and the rules
commands/*.md                    from the command line's help
python.md                        from signatures and docstrings
coming_from.md                   from the tables that translate keys, and the configs in migrate/
faq.md                           from questions.yaml
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import tempfile
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

import solotune
from solotune.cli import commands
from solotune.config.describe import allowed_values, field_help, section_of
from solotune.config.foreign_keys import CONVERTED
from solotune.config.key_aliases import FOREIGN_KEYS, NOT_HERE, REFUSED_KEYS
from solotune.config.run_config import SECTIONS, RunConfig
from solotune.config.settings import MICRO_BATCH
from solotune.config.translate import translated
from solotune.config.write import yaml_value
from solotune.config.yaml_reader import read_mapping
from solotune.diagnosis.catalogue import EQUIVALENT, EXPLAINS, FAULTS, SUSPECTS
from solotune.diagnosis.explanation import explained, faults_of
from solotune.diagnosis.rules import rules
from solotune.errors import EXIT_CODES, InterruptedRunError, SolotuneError
from solotune.training.resume import CLASSES

HERE = Path(__file__).parent
RESUMED = {
    "frozen": "refused (exit code 5), but `{}` and `{}` may change if their product stays the same".format(
        *MICRO_BATCH
    ),
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
    lines += [
        "",
        "## Coming from another tool",
        "",
        "Names of other tools are refused, and the message gives the name to use. All names of TRL, Unsloth, Axolotl",
        "and LLaMA-Factory are in [coming_from.md](coming_from.md#all-names-that-are-translated).",
    ]
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


VERBS = commands.solotune.commands


MORE = {
    "doctor": "[install](../install.md)",
    "init": "[tutorial](../tutorial.md#3-your-own-chats), [coming from another tool](../coming_from.md)",
    "data": "[data formats](../data.md)",
    "plan": "[recipes](../recipes.md), [several GPUs](../several-gpus.md), "
    "[how far to trust a plan](../../bench/results/plan.md)",
    "train": "[tutorial](../tutorial.md#5-train-on-a-rented-gpu), [config](../config.md), "
    "[what may change before a resume](../config.md#what-may-change-before---resume)",
    "watch": "[watch a run](../trackers.md)",
    "evaluate": "[is it better?](../evaluation.md), "
    "[tuned is worse than base](../troubleshooting.md#tuned-is-worse-than-base)",
    "diagnose": "[by symptom](../troubleshooting.md), [faults](../faults.md), "
    "[how often it is right](../../bench/results/diagnose.md)",
    "explain": "[faults](../faults.md)",
    "chat": "[use the adapter elsewhere](../adapter.md)",
    "report": "[the report of a run](../report.md)",
    "export": "[which base to merge into](../merging.md), [use the adapter elsewhere](../adapter.md)",
    "serve": "[use the adapter elsewhere](../adapter.md#serve-it-on-this-machine)",
    "verify": "[crashes](../../bench/results/faults.md)",
    "runs": "[tutorial](../tutorial.md#6-is-it-better)",
}
"""The pages to read with that of a verb."""


def command_page(verb: str) -> str:
    """The help of a verb, its example, and its function in Python."""
    command = VERBS[verb]
    group = click.Context(commands.solotune, info_name="solotune", **commands.solotune.context_settings)
    context = click.Context(command, parent=group, info_name=verb, terminal_width=80, max_content_width=80)
    shown = command.get_help(context)
    body, _, rest = shown.partition("\n  Example:\n")
    example, _, options = rest.partition("\n\n")
    return "\n".join(
        [
            f"# solotune {verb}",
            "",
            command.get_short_help_str(200),
            "",
            "```sh",
            textwrap.dedent(example),
            "```",
            "",
            "```text",
            f"{body.rstrip()}\n\n{options.strip()}",
            "```",
            "",
            f"In Python: [`solotune.{verb}`](../python.md#{verb}). Exit codes: [config.md](../config.md#exit-codes).",
            "",
            f"More: {MORE[verb]}.",
            "",
        ]
    )


def commands_page() -> str:
    """All verbs, in the order of work."""
    lines = ["# Commands", "", "```sh", "solotune --help", "```", ""]
    lines += [f"- [solotune {verb}]({verb}.md): {command.get_short_help_str(200)}" for verb, command in VERBS.items()]
    lines += [
        "",
        "Every command takes `--json`: one object on stdout, everything else on stderr. Commands with a CONFIG take",
        "`key=value` overrides. RUN is a folder, a name in `runs/`, or `latest`. All keys and exit codes:",
        "[config.md](../config.md).",
    ]
    return "\n".join(lines) + "\n"


def python_page() -> str:
    """Every function and what it returns, then the exceptions."""
    lines = [
        "# Python API",
        "",
        "Each command is a function of the same name. They print nothing, return a result, and raise the exceptions",
        "below. Keys of the config are arguments. `import solotune` alone imports nothing heavy.",
        "",
        "```python",
        "import solotune",
        "",
        'result = solotune.train("solotune.yaml", learning_rate=1e-4)  # dataset= takes rows or a datasets.Dataset too',
        'print(result.evaluation.to_json()["tuned"]["loss"])',
        "```",
        "",
    ]
    results: dict[str, type] = {}
    for verb in VERBS:
        function = getattr(solotune, verb)
        lines += [f"## {verb}", "", "```text", _signature(verb, function), "```", "", *_documented(function), ""]
        if result := _result_of(function):
            lines += [f"Returns [{result.__name__}](#{result.__name__.lower()}).", ""]
            results[result.__name__] = result
    lines += ["## load_config", "", "```text", _signature("load_config", solotune.load_config), "```", ""]
    lines += [*_documented(solotune.load_config), "", "## What they return", ""]
    for name, result in results.items():
        lines += [f"### {name}", "", *_documented(result), ""]
        names = [f"`{field}`" for field in getattr(result, "__dataclass_fields__", {})]
        members = inspect.getmembers(result, lambda member: inspect.isfunction(member) or isinstance(member, property))
        lines += [f"Fields: {', '.join(names)}.", ""] if names else []
        for member, value in members:
            if not member.startswith("_") and (text := inspect.getdoc(value)):
                call = "" if isinstance(value, property) else "()"
                lines.append(f"- `{member}{call}`: {_words(text.split(chr(10) * 2)[0])}")
        lines += [""] if lines[-1] else []
    lines += ["## Exceptions", "", "All are `solotune.errors.SolotuneError`, whose `exit_code` is the command's.", ""]
    lines += ["| exception | exit code | when |", "|---|---|---|"]
    for kind in [kind for kind in SolotuneError.__subclasses__() if kind.__module__ == "solotune.errors"]:
        shown = "128 + signal" if kind is InterruptedRunError else kind.exit_code
        lines.append(f"| `{kind.__name__}` | {shown} | {_words((inspect.getdoc(kind) or '').split(chr(10) * 2)[0])} |")
    return "\n".join(lines) + "\n"


def _words(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", r"\|")


def _signature(name: str, function: Callable[..., Any]) -> str:
    parameters = []
    for one in inspect.signature(function).parameters.values():
        stars = {one.VAR_POSITIONAL: "*", one.VAR_KEYWORD: "**"}.get(one.kind, "")
        default = "" if one.default is one.empty else f" = {one.default!r}"
        parameters.append(f"{stars}{one.name}: {one.annotation}{default}")
    if not parameters:
        return f"solotune.{name}()"
    return f"solotune.{name}(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + ")"


def _result_of(function: Callable[..., Any]) -> type | None:
    """The class of solotune that a function returns. Its name is imported for the type checker only, so its module is
    looked up in the source."""
    found = re.search(r"[A-Z]\w+", str(inspect.signature(function).return_annotation))
    module = importlib.import_module(function.__module__)
    if found is None or found[0] == "Path" or hasattr(module, found[0]):
        return None if found is None or found[0] == "Path" else getattr(module, found[0])
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.ImportFrom) and found[0] in [name.name for name in node.names]:
            return getattr(importlib.import_module(node.module or ""), found[0])
    return None


def _documented(thing: Any) -> list[str]:
    """A docstring as Markdown: indented lines are Python, the parts Args, Raises and Attributes are lists."""
    lines: list[str] = []
    text = inspect.getdoc(thing) or ""
    for part in [] if text.startswith(f"{thing.__name__}(") else text.split("\n\n"):
        if part.startswith("    ") or _is_code(part):
            lines += ["```python", textwrap.dedent(part), "```", ""]
            continue
        head, _, body = part.partition("\n")
        if re.fullmatch(r"(Args|Raises|Attributes|Returns):", head):
            entries = re.split(r"\n(?!\s)", textwrap.dedent(body))
            lines += [f"{head}", ""]
            lines += [f"- `{name}`: {_words(text)}" for name, _, text in (entry.partition(": ") for entry in entries)]
            lines.append("")
        else:
            lines += [part, ""]
    return lines[:-1]


def _is_code(part: str) -> bool:
    """Whether a paragraph is Python: an example that is the whole rest of a docstring has no indentation left."""
    try:
        ast.parse(part)
    except SyntaxError:
        return False
    return "(" in part


TOOLS = {"trl": "TRL", "unsloth": "Unsloth", "axolotl": "Axolotl", "llama_factory": "LLaMA-Factory"}


def coming_from_page() -> str:
    """A config of each tool with its keys here, then all names that are known."""
    lines = (HERE / "migrate" / "introduction.md").read_text(encoding="utf-8").rstrip().split("\n")
    for file, tool in TOOLS.items():
        path = HERE / "migrate" / f"{file}.yaml"
        lines += ["", f"## {tool}", "", f"[{path.name}](migrate/{path.name}), key by key:", ""]
        lines += [f"| {tool} | here |", "|---|---|", *_key_by_key(path)]
    lines += ["", "## All names that are translated", "", "A `*` means that the value is converted too.", ""]
    lines += ["| here | names in other tools |", "|---|---|"]
    for ours in dict.fromkeys(FOREIGN_KEYS.values()):
        theirs = [f"`{name}`{'*' * (name in CONVERTED)}" for name, key in FOREIGN_KEYS.items() if key == ours]
        lines.append(f"| `{ours}` | {', '.join(theirs)} |")
    lines += ["", "## What has no counterpart", "", "| keys | what holds here |", "|---|---|"]
    for reason in dict.fromkeys(NOT_HERE.values()):
        keys = " ".join(names for names, why in NOT_HERE.items() if why == reason).split()
        lines.append(f"| {', '.join(f'`{key}`' for key in keys)} | {_words(reason)} |")
    lines += [f"| `{key}` | {_words(reason)} |" for key, reason in REFUSED_KEYS.items()]
    return "\n".join(lines) + "\n"


def _key_by_key(path: Path) -> list[str]:
    """A row for each key of a foreign config: what `solotune init --from` makes of this line alone, or why nothing."""
    read, _ = read_mapping(path)
    _, left_out = translated(path)
    rows = []
    for key, value in read.items():
        if value is None:
            continue
        ours, reasons = translated_line(key, value)
        shown = " and ".join(f"`{name}: {yaml_value(wanted)}`" for name, wanted in ours.items())
        reason = left_out.get(key) or " ".join(reasons.values())
        rows.append(f"| `{key}: {_shown(value)}` | {shown or _words(reason) or 'holds anyway'} |")
    return rows


def _shown(value: Any) -> str:
    return "..." if isinstance(value, (dict, list)) and len(str(value)) > 60 else yaml_value(value)


def translated_line(key: str, value: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """What a config of this one line becomes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "line.yaml"
        path.write_text(json.dumps({key: value}), encoding="utf-8")
        return translated(path)


def questions() -> list[dict[str, str]]:
    """What people ask first: question, short answer, page and heading with the whole answer."""
    read, _ = read_mapping(HERE / "questions.yaml")
    return [dict(one) for one in read["questions"]]


def faq_page() -> str:
    lines = ["# Questions", "", "Generated from [questions.yaml](questions.yaml)."]
    for one in questions():
        target = f"{one['page']}#{one['anchor']}" if one.get("anchor") else one["page"]
        lines += ["", f"## {one['question']}", "", f"{one['answer']} [More]({target})"]
    return "\n".join(lines) + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "config.md": config_page,
    "config.schema.json": config_schema,
    "faults.md": faults_page,
    "commands/index.md": commands_page,
    **{f"commands/{verb}.md": partial(command_page, verb) for verb in VERBS},
    "python.md": python_page,
    "coming_from.md": coming_from_page,
    "faq.md": faq_page,
}

if __name__ == "__main__":
    for name, make in PAGES.items():
        (HERE / name).write_text(make(), encoding="utf-8")
