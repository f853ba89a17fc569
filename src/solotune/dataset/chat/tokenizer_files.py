"""Check the tokenizer files of a folder before transformers reads them.

`tokenizer_class` can name any class of transformers, `auto_map` a Python file of the folder, a link can lead anywhere,
and a tokenizer.json of 100 MB or a template of 10 MB can fill the memory. Templates are foreign programs: they are
rendered in a separate process (`template_sandbox`), and only their size is checked here.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from solotune.errors import InputError
from solotune.hub.safe_files import check_links, check_regular, json_object
from solotune.regular_files import read_bytes

MAX_TEMPLATE_BYTES = 1 << 20  # the longest known template (Llama 4, gpt-oss) has 20 KB
MAX_BYTES = {
    "tokenizer.json": 64 << 20,  # the largest known, Gemma's, has 33 MB
    "tokenizer.model": 64 << 20,
    "tekken.json": 64 << 20,
    "spiece.model": 64 << 20,
    "sentencepiece.bpe.model": 64 << 20,
    "vocab.json": 64 << 20,
    "vocab.txt": 64 << 20,
    "merges.txt": 64 << 20,
    "tokenizer_config.json": 8 << 20,
    "special_tokens_map.json": 1 << 20,
    "added_tokens.json": 8 << 20,
    "chat_template.json": MAX_TEMPLATE_BYTES,
    "chat_template.jinja": MAX_TEMPLATE_BYTES,
    "config.json": 1 << 20,
}
_CLASS = re.compile(r"\w*(Tokenizer(Fast)?|Backend)")


def digest(folder: Path) -> str:
    """sha256 over the tokenizer files of a folder, its templates among them; names and bytes.

    Raises:
        InputError: one of them is not a regular file, or too large.
    """
    found = hashlib.sha256()
    for name, limit in _files(folder).items():
        path = folder / name
        if path.exists() or path.is_symlink():
            _check_size(folder, path, limit)
            content = read_bytes(path, limit)
            found.update(f"{name} {len(content)}\n".encode() + content)
    return found.hexdigest()


def _files(folder: Path) -> dict[str, int]:
    """Names of tokenizer files, which may be absent, with the bytes they may have."""
    templates = sorted(path.relative_to(folder).as_posix() for path in folder.glob("additional_chat_templates/*.jinja"))
    return {**MAX_BYTES, **dict.fromkeys(templates, MAX_TEMPLATE_BYTES)}


def _check_size(folder: Path, path: Path, limit: int) -> None:
    check_regular(folder, path)
    if (size := path.stat().st_size) > limit:
        raise InputError(f"{path}: too large", seen=f"{size:,} bytes", allowed=f"{limit:,} bytes")


def check_tokenizer_files(folder: Path) -> None:
    """Check sizes, links and JSON of the tokenizer files.

    Raises:
        InputError: a file is too large, not JSON, leads out of the folder, or names code.
    """
    from solotune.hub.hf_config import refuse_code  # imports transformers

    check_links(folder)
    for name, limit in _files(folder).items():
        path = folder / name
        if path.exists() or path.is_symlink():
            _check_size(folder, path, limit)
    for name in ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        path = folder / name
        if not path.exists():
            continue
        raw = json_object(path)
        refuse_code(path, raw)
        kind = raw.get("tokenizer_class")
        if kind is not None and not (isinstance(kind, str) and _CLASS.fullmatch(kind)):
            raise InputError(
                f"{path}: tokenizer_class is not a tokenizer class",
                seen=repr(kind)[:80],
                allowed="a tokenizer class of transformers",
            )
        template = raw.get("chat_template")
        if isinstance(template, str) and len(template) > MAX_TEMPLATE_BYTES:
            raise InputError(
                f"{path}: chat_template is too large", seen=f"{len(template):,} characters", allowed="1 MiB"
            )
