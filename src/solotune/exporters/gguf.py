"""A merged folder, or an adapter, as a GGUF file, made by llama.cpp's own converters.

    check_convertible(base_folder, adapter)        before anything is merged: can it become a GGUF file?
    write_gguf(merged, folder, "q8_0")             a merged folder -> model-q8_0.gguf
    write_lora_gguf(adapter_folder, base_folder, folder)    an adapter -> adapter.gguf, which serves without a merge

f32, f16, bf16 and q8_0 are written by the converter. K-quants are made by `llama-quantize` from a 16-bit file: the one
on PATH, else a pinned one.

What an engine adds to a prompt, and where it stops, is in the header and has to be what the training did:

    tokenizer.chat_template           the template of the folder, as llama.cpp needs it (`engine_template`)
    tokenizer.ggml.add_bos_token      whether llama.cpp adds BOS to a prompt (and drops the one that the template wrote)
    tokenizer.ggml.add_eos_token      false: no prompt ends with EOS
    tokenizer.ggml.add_space_prefix   SentencePiece only: whether a text after a control token gets a space in front.
                                      llama.cpp does that where the converter says nothing, and Mistral's prompts then
                                      have a token too many after [INST]
    eos_token_id, eot_, eom_          the end tokens of generation_config.json, three at most
    tokenizer.ggml.tokens             texts of tokens that llama.cpp would take for others (`engine_vocabulary`)
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from solotune.errors import CheckError, InputError, StorageError
from solotune.exporters import gguf_process
from solotune.exporters.engine_template import engine_template
from solotune.exporters.engine_vocabulary import renamed_tokens
from solotune.exporters.sentencepiece_model import SPACE, sentencepiece_model
from solotune.exporters.tools import CONVERTER, LORA_CONVERTER, LORA_SCRIPT, QUANTIZER
from solotune.exporters.turn_format import engine_adds_bos
from solotune.hub.safe_files import json_object
from solotune.model.adapter import Adapter
from solotune.run.atomic_io import Folder, whole_folder
from solotune.units import first_line

CONVERTED = ("f32", "f16", "bf16", "q8_0")
K_QUANTS = ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_k_s", "q4_k_m", "q5_0", "q5_k_s", "q5_k_m", "q6_k")
QUANTIZATIONS = (*CONVERTED, *K_QUANTS)
BYTES_PER_WEIGHT, K_QUANT_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 1.07}, 0.83  # of q6_k, the largest
LORA_FILE = "adapter.gguf"
SECONDS, BYTES_PER_SECOND = 600, 4 << 20  # a child may take SECONDS, and more for a large model
_ENDS = ("eos", "eot", "eom")
_HEAD_AND_EMBEDDING = ("lm_head", "embed_out", "embed_tokens", "wte", "word_embeddings", "embed_in")


def gguf_bytes(weights: int, quantization: str) -> int:
    """About how many bytes a file takes while it is made: a K-quant is made from a 16-bit file beside it."""
    between = 2 * weights if quantization in K_QUANTS else 0
    return round(weights * BYTES_PER_WEIGHT.get(quantization, K_QUANT_BYTES)) + between


def check_quantization(name: str) -> None:
    """Raises InputError for a quantisation that is not made here."""
    if name not in QUANTIZATIONS:
        raise InputError(
            f"quantization: {name!r} is not made here",
            allowed=", ".join(QUANTIZATIONS),
            change="export f16 and run llama.cpp's `llama-quantize model-f16.gguf "
            f"model-{name}.gguf {name.upper()}` (IQ types need an importance matrix: `llama-imatrix`)",
        )


def check_convertible(base_folder: Path, adapter: Adapter, *, is_merged: bool = True) -> None:
    """Ask the converter whether it knows the base's architecture and recognises its tokenizer.

    A merged model has the base's architecture and tokenizer, so this is asked before anything is merged.

    Args:
        is_merged: False if the adapter is to be a file of its own, which llama.cpp can load for some layers only.

    Raises:
        InputError: it cannot be converted; with the way that works.
    """
    if not is_merged:
        _check_lora(adapter)
    with _for_converter(base_folder) as seen:
        answer = _converter({"check": str(seen)}, _seconds_for(base_folder))
    if "ok" in answer:
        return
    other = "--to merged or vllm exports it; vLLM and `transformers serve` run that folder"
    if answer["refused"] == "architecture":
        raise InputError(
            f"{base_folder}: llama.cpp's converter ({CONVERTER.version}) does not know this architecture",
            seen=answer["why"],
            change=other,
        )
    if answer["refused"] == "tokenizer":
        raise InputError(
            f"{base_folder}: llama.cpp's converter does not recognise this tokenizer",
            seen=f"{first_line(answer['why'])} (it tells tokenizers apart by how a test text is split; a tokenizer "
            "that was trained again or got other rules for splitting is none of those that llama.cpp has)",
            allowed="the tokenizer that the base was published with; added tokens do no harm",
            change=other,
        )
    raise InputError(f"{base_folder}: llama.cpp's converter fails", seen=first_line(answer["why"])[:300], change=other)


# --- a merged folder


def write_gguf(
    merged: Path, target: Folder, quantization: str, *, prompt_format: str = "chat", name: str = "model"
) -> Path:
    """Convert a merged folder to `<name>-<quantization>.gguf` in the target folder; returns its path.

    Args:
        prompt_format: `chat` or `text`, as the model was trained; it decides whether prompts begin with BOS.

    Raises:
        InputError: a quantisation that is not made here, or a folder that cannot be converted.
        CheckError: the header of the written file is not what the training did.
        StorageError: the disk is full.
    """
    check_quantization(quantization)
    metadata = header_of(merged, prompt_format)
    path, seconds = target.path / f"{name}-{quantization}.gguf", _seconds_for(merged)
    if quantization in CONVERTED:
        _convert(merged, path, quantization, metadata, seconds)
    else:
        between = target.path / ".sixteen-bit.gguf"
        try:
            _convert(merged, between, "auto", metadata, seconds)
            _quantize(between, path, quantization, seconds)
        finally:
            between.unlink(missing_ok=True)
    if problems := header_problems(path, metadata):
        raise CheckError(f"{path.name}: the file's header is not what was trained", seen="; ".join(problems))
    target.adopt(path.name)
    return path


def header_of(merged: Path, prompt_format: str) -> dict[str, Any]:
    """The entries of the header that follow from the training; None: not to be there."""
    tokenizer = _tokenizer(merged)
    prefix = "tokenizer.ggml."
    ends = _end_ids(merged, tokenizer)
    found: dict[str, Any] = {f"{prefix}add_eos_token": False}
    found[f"{prefix}add_bos_token"] = engine_adds_bos(tokenizer, prompt_format)
    for kind, token in zip(_ENDS, ends, strict=False):
        found[f"{prefix}{kind}_token_id"] = token
    if SPACE in tokenizer.get_vocab():
        pieces = tokenizer.tokenize("x" if prompt_format == "text" else f"{tokenizer.eos_token}x")
        found[f"{prefix}add_space_prefix"] = pieces[-1].startswith(SPACE) or pieces[-2:-1] == [SPACE]
    if prompt_format == "chat":
        found["tokenizer.chat_template"] = engine_template(tokenizer)
    return found


def header_problems(path: Path, metadata: Mapping[str, Any]) -> list[str]:
    """Entries of a file's header that are not as wanted, in words."""
    answer = _converter({"read": str(path.absolute())}, SECONDS)
    if "ok" not in answer:
        return [f"it cannot be read back: {first_line(answer['why'])}"]
    header = answer["ok"]
    return [
        f"{key} is {str(header.get(key))[:60]!r} instead of {str(value)[:60]!r}"
        for key, value in metadata.items()
        if header.get(key) != value
    ]


def _end_ids(folder: Path, tokenizer: Any) -> list[int]:
    """End tokens, the tokenizer's own first."""
    found: list[Any] = [tokenizer.eos_token_id]
    for name in ("generation_config.json", "config.json"):
        ids = json_object(folder / name).get("eos_token_id") if (folder / name).exists() else None
        if ids is not None:
            found += ids if isinstance(ids, list) else [ids]
            break
    return list(dict.fromkeys(int(token) for token in found if token is not None))


def _convert(merged: Path, path: Path, outtype: str, metadata: Mapping[str, Any], seconds: float) -> None:
    with _for_converter(merged) as seen:
        arguments = [str(seen), "--outtype", outtype, "--outfile", str(path.absolute())]
        tokens = renamed_tokens(_tokenizer(merged))
        answer = _converter({"convert": arguments, "metadata": metadata, "tokens": tokens}, seconds)
    if "ok" in answer and path.is_file():
        return
    _check_room(path.parent, answer.get("why", ""))
    raise InputError(
        f"{merged}: llama.cpp's converter fails",
        seen=first_line(answer.get("why", "it wrote no file"))[:300],
        change="--to merged or vllm exports the model without GGUF",
    )


def _quantize(source: Path, path: Path, quantization: str, seconds: float) -> None:
    program = shutil.which("llama-quantize") or str(QUANTIZER.folder() / QUANTIZER.keep[0])
    command = [program, str(source.absolute()), str(path.absolute()), quantization.upper(), str(os.cpu_count() or 1)]
    done = _run(command, seconds, dict(os.environ))
    if done.returncode == 0 and path.is_file():
        return
    said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    _check_room(path.parent, " ".join(said[-3:]))
    raise InputError(
        f"{path.name}: llama-quantize fails",
        seen=said[-1][:300] if said else f"exit code {done.returncode}",
        allowed=", ".join(CONVERTED),
        change=f"export f16 and run `llama-quantize model-f16.gguf {path.name} {quantization.upper()}` of another "
        "version of llama.cpp",
    )


# --- an adapter


def _check_lora(adapter: Adapter) -> None:
    """Refuse adapters that llama.cpp cannot load beside a base.

    Raises:
        InputError: adapters on head or embedding, or on layers that keep their weights transposed.
    """
    change = "merge it: `--to merged,gguf` writes one GGUF file with the adapter in it"
    ends = [module for module in adapter.modules if module.rpartition(".")[2] in _HEAD_AND_EMBEDDING]
    if ends:
        raise InputError(
            "the adapter cannot be a GGUF file of its own: llama.cpp loads none on head or embedding",
            seen=", ".join(ends),
            allowed="adapters on the linears of the layers",
            change=change,
        )
    if adapter.fan_in_fan_out:
        raise InputError(
            "the adapter cannot be a GGUF file of its own: its base keeps weights transposed (fan_in_fan_out)",
            change=change,
        )


def write_lora_gguf(adapter_folder: Path, base_folder: Path, target: Folder) -> Path:
    """Convert an adapter to `adapter.gguf` in f32, for Ollama's ADAPTER and llama-server's --lora.

    llama.cpp scales every layer by alpha / r. Where the training scaled otherwise (rsLoRA, patterns of alpha), the
    quotient goes into B.

    Raises:
        InputError: it cannot be converted; with the way that works.
        StorageError: the disk is full.
    """
    adapter = Adapter.read(adapter_folder)
    _check_lora(adapter)
    path = target.path / LORA_FILE
    with tempfile.TemporaryDirectory(prefix="solotune-lora-") as scratch:
        plain = Path(scratch) / "adapter"
        with whole_folder(plain) as folder:
            plainly_scaled(adapter).write(folder)
        script = LORA_CONVERTER.folder() / LORA_SCRIPT
        command = [sys.executable, "-P", str(script), "--base", str(base_folder.absolute()), "--outtype", "f32"]
        done = _run([*command, "--outfile", str(path.absolute()), str(plain)], SECONDS, _environment())
    if done.returncode or not path.is_file():
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        _check_room(path.parent, said[-1])
        raise InputError(
            f"{adapter_folder}: llama.cpp's converter of adapters fails",
            seen=said[-1][:300],
            change="merge it: `--to merged,gguf` writes one GGUF file with the adapter in it",
        )
    target.adopt(LORA_FILE)
    return path


def plainly_scaled(adapter: Adapter) -> Adapter:
    """The same adapter with the scale alpha / r in every layer."""
    alpha = adapter.config["lora_alpha"]
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in adapter.tensors.items():
        module = key.removeprefix("base_model.model.").rpartition(".lora_")[0]
        factor = adapter.scaling(module) * adapter.rank(module) / alpha
        tensors[key] = tensor * factor if ".lora_B." in key and factor != 1 else tensor
    config = {**adapter.config, "use_rslora": False, "alpha_pattern": {}}
    return Adapter(config, tensors)


# --- child processes


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


@contextmanager
def _for_converter(folder: Path) -> Iterator[Path]:
    """The folder, or one of links to its files with a `tokenizer.model` of the tokenizer that training used."""
    content = sentencepiece_model(_tokenizer(folder))
    if content is None:
        yield folder.absolute()  # the child has a working directory of its own
        return
    with tempfile.TemporaryDirectory(prefix="solotune-model-") as scratch:
        seen = Path(scratch) / folder.name
        seen.mkdir()
        for file in folder.iterdir():
            if file.name != "tokenizer.model":
                (seen / file.name).symlink_to(file.resolve())
        (seen / "tokenizer.model").write_bytes(content)
        yield seen


def _seconds_for(folder: Path) -> float:
    return SECONDS + sum(file.stat().st_size for file in folder.glob("*.safetensors")) / BYTES_PER_SECOND


def _environment() -> dict[str, str]:
    """Of a child that runs a converter: its folder is the only addition to what Python finds."""
    return {**os.environ, "PYTHONPATH": str(CONVERTER.folder()), "NO_LOCAL_GGUF": "1", "HF_HUB_OFFLINE": "1"}


def _run(command: list[str], seconds: float, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a child to its end, in a folder where it finds nothing; it is killed with us by Ctrl-C, and after a time.

    Raises:
        InputError: it took too long.
    """
    with tempfile.TemporaryDirectory(prefix="solotune-gguf-") as empty:
        try:
            return subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=seconds, env=environment,
                cwd=empty, stdin=subprocess.DEVNULL, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise InputError(f"{Path(command[-1]).name}: no result within {seconds:.0f} s", seen=command[0]) from None


def _converter(request: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The answer of `gguf_process`; a child that ended without one has refused."""
    done = _run([sys.executable, "-P", gguf_process.__file__, json.dumps(request)], seconds, _environment())
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return {"refused": "converter", "why": said[-1] if said else f"exit code {done.returncode}"}


def _check_room(folder: Path, said: str) -> None:
    if "No space left" in said or shutil.disk_usage(folder).free < 1 << 20:
        raise StorageError(f"{folder}: cannot be written", seen="no space left on the disk")
