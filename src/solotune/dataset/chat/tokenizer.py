"""Load a model's tokenizer and chat template from a local folder or the hub, without running code that comes with it.

    tokenizer = load_tokenizer(config)     # chat_template_path replaces the template

Downloaded files are checked like those of a local folder before transformers reads them.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solotune.config.run_config import RunConfig
from solotune.dataset.chat.template_sandbox import TemplateRefusal, TemplateSyntax, sandbox
from solotune.dataset.chat.tokenizer_files import MAX_TEMPLATE_BYTES, check_tokenizer_files
from solotune.errors import InputError
from solotune.hub.model_files import ModelFiles, resolve_model
from solotune.units import first_line

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

CONFIG = "tokenizer_config.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "tokenizer_config.json",
)


def load_tokenizer(config: RunConfig, model_files: ModelFiles | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of `config.model_name_or_path`, with the template of `chat_template_path` if given.

    Args:
        model_files: files of the config's model; None: they are resolved here.

    Raises:
        InputError: no such folder or model, no tokenizer in it, code of its own, or a template that does not parse.
    """
    from transformers import AutoTokenizer

    model_files = model_files or resolve_model(config)
    folder = model_files.folder
    if model_files.is_local:
        _check_has_tokenizer(model_files)
    try:
        check_tokenizer_files(folder)
        # where mistral-common is installed, transformers would take its tokenizer, which uses no chat template
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, mistral_format=False
        )
    except InputError:
        raise
    # transformers raises OSError, ValueError, KeyError, json and Rust errors for the same user mistake
    except Exception as error:
        raise InputError(
            f"model_name_or_path: no tokenizer could be loaded from {model_files.name}",
            seen=first_line(error),
            allowed="a model folder or a hub model with tokenizer files that transformers can read",
            change=_what_to_change(str(error), is_local=model_files.is_local),
        ) from None
    _name_ends(tokenizer)
    if config.chat_template_path is not None:
        tokenizer.chat_template = _read_template(config.chat_template_path)
    return tokenizer


def _what_to_change(error: str, *, is_local: bool) -> str:
    if "mistral-common" in error:
        return "pip install mistral-common, or use a copy of the model with a tokenizer.json"
    if is_local:
        return "check the folder's tokenizer files"
    return "check model_revision; without a network use a local folder with all of the tokenizer's files"


def _name_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    """Set bos and eos for a tekken.json, which does not name them; else templates would write neither."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    if tokenizer.eos_token is None and "[INST]" in special:
        ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
        tokenizer.add_special_tokens({name: token for name, token in ends.items() if token in special})


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | np.ndarray) -> list[str]:
    """The text of each id alone; for a part of a character, its name in the vocabulary."""
    texts = []
    for index in map(int, ids):
        text, name = str(tokenizer.decode([index])), str(tokenizer.convert_ids_to_tokens(index))
        if name.startswith("▁") and not text.startswith(" "):
            text = " " + text  # SentencePiece omits the space before a text's first word
        texts.append(name if "\ufffd" in text else text)
    return texts


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer's files."""
    return any((folder / file).is_file() for file in _TOKENIZER_FILES)


def saved_files(tokenizer: Any) -> Iterator[tuple[str, bytes]]:
    """(name, content) of a tokenizer's files, its chat template among them.

    transformers can only write to a folder, so a temporary one is used.
    """
    with tempfile.TemporaryDirectory(prefix="solotune-") as scratch:
        tokenizer.save_pretrained(scratch)
        for path in sorted(path for path in Path(scratch).rglob("*") if path.is_file()):
            content = path.read_bytes()
            yield path.relative_to(scratch).as_posix(), for_transformers_4(content) if path.name == CONFIG else content


def for_transformers_4(content: bytes) -> bytes:
    """tokenizer_config.json as transformers 5 writes it, in words that versions 4 and 5 both read.

    Version 4, which vLLM used for long, knows no class TokenizersBackend, which is what version 5 calls its
    PreTrainedTokenizerFast, and fails on a list of `extra_special_tokens`.
    """
    config = json.loads(content)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    for key in ("is_local", "local_files_only"):  # how it was loaded here
        config.pop(key, None)
    return (json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _check_has_tokenizer(model_files: ModelFiles) -> None:
    folder = model_files.folder
    if not has_tokenizer(folder):
        present = sorted(path.name for path in folder.iterdir())
        raise InputError(
            f"model_name_or_path: {model_files.name} has no tokenizer files",
            seen=", ".join(present[:8]) or "an empty folder",
            allowed="tokenizer.json, or the file that this model family uses (tokenizer.model, tekken.json)",
            change="copy the tokenizer files of the base model into the folder",
        )


def _read_template(written: str) -> str:
    path = Path(os.path.expanduser(written))
    if not path.is_file():
        raise InputError(f"chat_template_path: {written}: no such file", seen=f"looked in {path.parent.resolve()}")
    if path.stat().st_size > MAX_TEMPLATE_BYTES:
        raise InputError(f"chat_template_path: {written}: too large for a template", allowed="1 MiB")
    try:
        template = path.read_text(encoding="utf-8-sig")
        sandbox().check(template)
    except UnicodeDecodeError as error:
        raise InputError(f"chat_template_path: {written}: not UTF-8", seen=f"byte {error.start + 1}") from None
    except TemplateSyntax as error:
        raise InputError(
            f"chat_template_path: {written}, line {error.line}: not a valid Jinja template", seen=str(error)
        ) from None
    except TemplateRefusal as error:
        raise InputError(f"chat_template_path: {written}: not a valid Jinja template", seen=str(error)) from None
    if not template.strip():
        raise InputError(f"chat_template_path: {written}: the template is empty")
    return template
