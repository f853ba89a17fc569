"""README.md and provenance.json of an exported folder: what it is, and what it was made of.

    with whole_folder(target) as folder:
        ...                                                # all other files
        write_card(folder, source, "merged", {"parity": ...})

README.md is a model card: its front matter, which the hub reads, is written by huggingface_hub; the text has recipe,
scores with their errors, how to use it, and what is not known. provenance.json has the same for programs, with the
sha256 of every file. Both are meant to be passed on, so they hold no secret, no path of this machine and no user name:
a path becomes the name of its file or folder (`portable`).
"""

from __future__ import annotations

import getpass
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from solotune.config.secrets import holds_secret, without_secrets
from solotune.errors import InputError
from solotune.exporters.adapter_folder import base_name
from solotune.regular_files import read_bytes
from solotune.run.atomic_io import Folder, json_text
from solotune.run.run_dir import FINGERPRINTS, read_object
from solotune.version import __version__

if TYPE_CHECKING:
    from solotune.exporters.source import ExportSource

README, PROVENANCE = "README.md", "provenance.json"
LOCAL_KEYS = ("output_dir", "memory_budget", "use_cpu", "preflight")  # say something about the machine, not the model
RECIPE = (
    "base_precision", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "dataset",
    "max_length", "packing", "assistant_only_loss", "num_train_epochs", "max_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "optim", "learning_rate", "lr_scheduler_type", "warmup_ratio", "weight_decay",
    "seed",
)  # fmt: skip
_MAX_README = 1 << 20
_PATH = re.compile(r"(?:~|\.\.?)?/[^\s:'\"]*|~[^\s:'\"]*")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def write_card(target: Folder, source: ExportSource, kind: str, facts: Mapping[str, Any]) -> None:
    """Write both files into a folder that has all its others.

    Args:
        kind: `merged`, `adapter`, `gguf`, ...
        facts: more for provenance.json: how the export was compared, what was chosen.
    """
    records = _records(source)
    target.write(README, _readme(source, kind, records))
    files = {name: entry.sha256 for name, entry in sorted(target.entries.items())}
    content = {
        "kind": kind,
        "solotune": __version__,
        "base": {
            "name": base_name(source),
            "revision": source.base.revision if source.base.hub_id else None,
            "fingerprint": records["fingerprints"].get("base"),
            "license": license_of(source.base.folder),
        },
        "data": {"sha256": records["data"].get("sha256"), "rows": records["data"].get("rows")},
        "config": _config_of(source),
        "evaluation": {key: value for key, value in records["evaluation"].items() if key != "samples"},
        "versions": records["environment"].get("versions"),
        "stop_ids": source.stop_ids,
        **facts,
        "files": files,
    }
    target.write(PROVENANCE, json_text(portable(content)))


def license_of(folder: Path) -> dict[str, str]:
    """The licence that the README of a base names: `license`, with `license_name` and `license_link` if it has them.

    Empty if it has no README or names none.
    """
    from huggingface_hub import ModelCard

    try:
        card = ModelCard(read_bytes(folder / README, _MAX_README).decode(), ignore_metadata_errors=True)
    except (OSError, ValueError, InputError):  # no README, not UTF-8, no YAML
        return {}
    except Exception as error:  # errors of the YAML library share no other class
        if type(error).__module__.partition(".")[0] != "yaml":
            raise
        return {}
    found = card.data.to_dict()
    keys = ("license", "license_name", "license_link")
    return {key: str(found[key]) for key in keys if isinstance(found.get(key), str)}


def portable(value: Any) -> Any:
    """The value without secrets, paths of this machine and the user's name.

    An absolute path, one from the home folder or out of the working directory becomes the name of its file or folder.
    """
    if isinstance(value, Mapping):
        return {key: portable(item) for key, item in value.items() if not holds_secret(str(key), item)}
    if isinstance(value, list | tuple):
        return [portable(item) for item in value]
    if not isinstance(value, str):
        return value
    return _PATH.sub(_name_of, without_secrets(value))


def _name_of(found: re.Match[str]) -> str:
    path = found[0]
    if path.startswith("./") and ".." not in Path(path).parts:
        return path
    before = found.string[: found.start()]
    if before[-1:].isalnum() or before[-1:] in ("-", "_", "<", ")", "]"):  # a/b, </s>
        return path
    if path.startswith("//") and before.endswith(":"):  # https://
        return path
    home = {Path.home().name, _user()}
    name = Path(path).name
    return name if name and name not in home and "~" not in name else "."


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without an entry for the user
        return ""


def _records(source: ExportSource) -> dict[str, dict[str, Any]]:
    """The run's own files; empty for an adapter that others trained."""
    names = {
        "data": "data.json",
        "evaluation": "evaluation.json",
        "environment": "environment.json",
        "fingerprints": FINGERPRINTS,
    }
    run = source.run
    paths = {key: None if run is None else run.path / name for key, name in names.items()}
    return {key: read_object(path) if path is not None and path.is_file() else {} for key, path in paths.items()}


def _config_of(source: ExportSource) -> dict[str, Any]:
    """The settings of the training; what is known of them for an adapter that others trained."""
    if source.run is None or source.config is None:
        keys = ("r", "lora_alpha", "use_rslora", "lora_dropout", "target_modules")
        return {key: source.adapter.config[key] for key in keys if key in source.adapter.config}
    from solotune.config.load import load_config

    config = load_config(source.run.path / "config.yaml").model_dump(mode="json")
    return {key: value for key, value in config.items() if key not in LOCAL_KEYS} | {
        "model_name_or_path": base_name(source)
    }


# --- README.md


def _readme(source: ExportSource, kind: str, records: Mapping[str, dict[str, Any]]) -> str:
    from huggingface_hub import ModelCardData

    config, base = _config_of(source), base_name(source)
    dataset = config.get("dataset")
    is_hub_dataset = isinstance(dataset, str) and _HUB_ID.fullmatch(dataset) and not Path(dataset).exists()
    data = ModelCardData(
        base_model=source.base.hub_id,
        datasets=[dataset] if is_hub_dataset and isinstance(dataset, str) else None,
        library_name="peft"
        if kind == "adapter"
        else "gguf"
        if kind in ("gguf", "ollama", "adapter-gguf")
        else "transformers",
        pipeline_tag="text-generation",
        tags=["solotune", "lora", *(["base_model:adapter:" + source.base.hub_id] if source.base.hub_id else [])],
        **cast("dict[str, Any]", license_of(source.base.folder)),
    )
    title = f"{Path(base).name}, fine-tuned"
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {title}",
        _what_it_is(source, kind, base),
        _recipe(config, records["data"]),
        _scores(records["evaluation"]),
        _use(source, kind, base),
        _limits(source, records),
    ]
    return portable("\n\n".join(parts)) + "\n"


def _what_it_is(source: ExportSource, kind: str, base: str) -> str:
    what = {
        "adapter": f"A LoRA adapter for `{base}`, in PEFT's format.",
        "merged": f"`{base}` with a LoRA adapter merged into its weights: a complete model.",
        "adapter-gguf": f"A LoRA adapter for `{base}` as a GGUF file, beside the base that it was trained on.",
    }.get(kind, f"`{base}` with a LoRA adapter merged into its weights, as {kind}.")
    asked = (
        "It was trained on chats; the chat template in its files is that of the training."
        if source.prompt_format == "chat"
        else "It was trained on plain text: give it the beginning of a text, without a chat template."
    )
    system = f" All training rows have this system prompt:\n\n> {source.system_prompt}" if source.system_prompt else ""
    revision = f"\n\nBase revision: `{source.base.revision}`." if source.base.hub_id else ""
    return f"{what} {asked}{system}{revision}"


def _recipe(config: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    rows = [f"| `{key}` | {config[key]} |" for key in RECIPE if config.get(key) not in (None, "")]
    rows = rows or [f"| `{key}` | {value} |" for key, value in config.items()]
    text = "## Recipe\n\n| setting | value |\n|---|---|\n" + "\n".join(rows)
    split, hashes = data.get("split") or {}, data.get("sha256") or {}
    if hashes:
        text += f"\n\nTraining data: {split.get('train', '?')} rows, {split.get('validation', '?')} held out; sha256 of"
        text += " the tokenized rows: " + ", ".join(f"{side} `{value}`" for side, value in hashes.items()) + "."
    return text


def _scores(evaluation: Mapping[str, Any]) -> str:
    base, tuned = evaluation.get("base"), evaluation.get("tuned")
    if not isinstance(base, dict) or not isinstance(tuned, dict):
        return "## Scores\n\nNot measured on held-out rows."
    lines = ["| | base | this model |", "|---|---|---|"]
    lines.append(f"| loss | {_plus_minus(base['loss'], base)} | {_plus_minus(tuned['loss'], tuned)} |")
    for name, score in (evaluation.get("scores") or {}).items():
        errors = score.get("stderr") or {}
        shown = [_plus_minus(score[side], {"stderr": errors.get(side)}) for side in ("base", "tuned")]
        lines.append(f"| {name.replace('_', ' ')} | {shown[0]} | {shown[1]} |")
    rows = evaluation.get("rows", "?")
    return f"## Scores\n\nOn {rows} held-out rows, with standard errors.\n\n" + "\n".join(lines)


def _plus_minus(value: float, errors: Mapping[str, Any]) -> str:
    error = errors.get("stderr")
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"


def _use(source: ExportSource, kind: str, base: str) -> str:
    loader, package = (
        ("AutoPeftModelForCausalLM", "peft") if kind == "adapter" else ("AutoModelForCausalLM", "transformers")
    )
    if kind not in ("adapter", "merged"):
        return "## Use\n\nSee the documentation of the program that reads this format."
    prompt = (
        'tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True, '
        'return_tensors="pt", return_dict=True)'
        if source.prompt_format == "chat"
        else 'tokenizer("Once upon a time", return_tensors="pt")'
    )
    imports = f"from {package} import {loader}\nfrom transformers import AutoTokenizer"
    if package == "transformers":
        imports = f"from transformers import {loader}, AutoTokenizer"
    code = (
        f'{imports}\n\nfolder = "."  # this folder\ntokenizer = AutoTokenizer.from_pretrained(folder)\n'
        f"model = {loader}.from_pretrained(folder)\ninputs = {prompt}\n"
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=200)[0]))"
    )
    return f"## Use\n\n```python\n{code}\n```"


def _limits(source: ExportSource, records: Mapping[str, dict[str, Any]]) -> str:
    lines = [
        "- It was compared with its base on held-out rows of its own task only; what it lost elsewhere is not known."
        if records["evaluation"]
        else "- It was not evaluated.",
        "- The licence of the base applies."
        if license_of(source.base.folder)
        else "- The base's files name no licence.",
    ]
    return "## Limits\n\n" + "\n".join(lines) + f"\n\n`{PROVENANCE}` has hashes, settings and versions."
