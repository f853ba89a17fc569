"""What vLLM and llm-compressor require of a merged or an adapter folder, checked from its files, and the serve line.

    check_vllm(folder) -> ["adapter_config.json: ...", ...]         empty: the loaders accept it
    serve_line(folder, "demo", base="org/name") -> "vllm serve org/name --enable-lora ..."

Neither engine runs here: both need a GPU with a stack of their own. What their loaders check was read in their sources
(vLLM's documentation of models at commit 0046f770, `vllm/config/lora.py` at 01230b40, `vllm/lora/lora_model.py` at
0306474e; llm-compressor loads with transformers' `from_pretrained`). A folder without a problem here should load; that
it does is for whoever has the engine to see, and every text says so (`NOT_RUN`).

Adapters
--------
vLLM takes one rank r and one alpha of adapter_config.json for all layers. It does not read `rank_pattern` and
`alpha_pattern`, and would scale those layers wrongly without a word. `max_lora_rank` has to be one of `RANKS`; a rank
between two of them is padded. Its server takes tokenizer, chat template and generation config from the base, which may
have others than the training; the serve line names those of the adapter.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from solotune.errors import InputError
from solotune.hub.safe_files import contained, json_object
from solotune.hub.safetensors_header import Entry, read_header
from solotune.model.adapter import CONFIG as ADAPTER_CONFIG
from solotune.model.adapter import TENSORS as ADAPTER_TENSORS

NOT_RUN = "checked from its files; vLLM itself was not run here"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
DTYPES = ("BF16", "F16", "F32")
WITHOUT_LORA = frozenset(
    (
        "BloomForCausalLM", "DbrxForCausalLM", "FalconForCausalLM", "FalconMambaForCausalLM", "GPT2LMHeadModel",
        "GPTJForCausalLM", "GPTNeoXForCausalLM", "MambaForCausalLM", "Mamba2ForCausalLM", "MPTForCausalLM",
        "OlmoeForCausalLM", "RWForCausalLM", "StableLmForCausalLM", "StableLMEpochForCausalLM",
    )
)  # fmt: skip
WITH_LORA = frozenset(
    (
        "BambaForCausalLM", "CohereForCausalLM", "Cohere2ForCausalLM", "DeepseekForCausalLM", "DeepseekV2ForCausalLM",
        "DeepseekV3ForCausalLM", "Ernie4_5ForCausalLM", "Exaone4ForCausalLM", "FalconH1ForCausalLM",
        "GPTBigCodeForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma4ForCausalLM",
        "Glm4ForCausalLM", "Glm4MoeForCausalLM", "GlmForCausalLM", "GptOssForCausalLM", "GraniteForCausalLM",
        "GraniteMoeForCausalLM", "GraniteMoeHybridForCausalLM", "GraniteMoeSharedForCausalLM", "JambaForCausalLM",
        "Lfm2ForCausalLM", "LlamaForCausalLM", "MiniCPMForCausalLM", "MistralForCausalLM", "MixtralForCausalLM",
        "NemotronForCausalLM", "OPTForCausalLM", "OlmoForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM",
        "PhiForCausalLM", "Phi3ForCausalLM", "PhiMoEForCausalLM", "Qwen2ForCausalLM", "Qwen2MoeForCausalLM",
        "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Qwen3NextForCausalLM", "SeedOssForCausalLM", "SmolLM3ForCausalLM",
        "SolarForCausalLM", "Starcoder2ForCausalLM",
    )
)  # fmt: skip
"""Architectures of text models that vLLM serves with LoRA adapters; those above, only merged. Not all of them: those
that solotune can train."""
_OUTER = ("embed_tokens", "lm_head", "embed_out", "wte", "output")
_LORA = (".lora_A.weight", ".lora_B.weight")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")


def check_vllm(folder: Path, base: Mapping[str, Any] | None = None) -> list[str]:
    """What of a folder the loaders of vLLM and llm-compressor refuse or would read otherwise, in words.

    Args:
        folder: a merged model or an adapter.
        base: config.json of the adapter's base, if it is known.
    """
    try:
        if (folder / ADAPTER_CONFIG).is_file():
            return list(_adapter_problems(folder, base))
        return list(_model_problems(folder))
    except InputError as error:
        return [str(error).replace("\n", ";")]


def serve_line(folder: Path, name: str, *, base: str | None = None, revision: str | None = None) -> str:
    """The command that serves a folder with vLLM, as `name`.

    Args:
        base: of an adapter: a folder or a hub id.
        revision: of the base.
    """
    if base is None:
        return shlex.join(["vllm", "serve", str(folder), "--served-model-name", name])
    words = ["vllm", "serve", base, *(["--revision", revision] if revision else [])]
    words += ["--enable-lora", "--lora-modules", f"{name}={folder}", "--max-lora-rank", str(_served_rank(folder))]
    if _has_tokenizer(folder):
        words += ["--tokenizer", str(folder)]
    if (folder / "chat_template.jinja").is_file():
        words += ["--chat-template", str(folder / "chat_template.jinja")]
    if (folder / "generation_config.json").is_file():
        words += ["--generation-config", str(folder)]
    return shlex.join(words)


def _served_rank(folder: Path) -> int:
    """The smallest `max_lora_rank` that the adapter fits in.

    Raises:
        InputError: its rank is no number, or larger than vLLM serves.
    """
    r = json_object(folder / ADAPTER_CONFIG).get("r")
    if type(r) is not int or r < 1 or r > RANKS[-1]:
        raise InputError(
            f"{folder / ADAPTER_CONFIG}: vLLM cannot serve an adapter of this rank",
            seen=f"r: {r}",
            allowed=f"1 to {RANKS[-1]}",
            change="serve the merged model",
        )
    return next(rank for rank in RANKS if rank >= r)


# --- adapters


def _adapter_problems(folder: Path, base: Mapping[str, Any] | None) -> Iterator[str]:
    config = json_object(folder / ADAPTER_CONFIG)
    where = ADAPTER_CONFIG
    missing = [key for key in ("r", "lora_alpha", "target_modules") if config.get(key) is None]
    if missing:
        yield f"{where}: {', '.join(missing)} missing"
    elif type(config["r"]) is not int or not 1 <= config["r"] <= RANKS[-1]:
        yield f"{where}: rank {config['r']}; vLLM serves 1 to {RANKS[-1]}"
    if config.get("peft_type") != "LORA":
        yield f"{where}: peft_type is {config.get('peft_type')}; vLLM serves LORA"
    for key, plain in (("bias", "none"), ("use_dora", False), ("modules_to_save", None)):
        if config.get(key) not in (plain, None, False, []):
            yield f"{where}: {key} is {config[key]}; vLLM serves plain LoRA only, so serve the merged model"
    for key in ("rank_pattern", "alpha_pattern"):
        if config.get(key):
            yield f"{where}: {key}; vLLM scales all layers by r and lora_alpha, so serve the merged model"
    if config.get("fan_in_fan_out"):
        yield f"{where}: fan_in_fan_out; vLLM does not serve adapters of such layers, so serve the merged model"
    if base is not None:
        yield from _architecture_problems(base, needs_lora=True)
    if not (folder / ADAPTER_TENSORS).is_file():
        yield f"{ADAPTER_TENSORS}: missing"
        return
    tensors = read_header(folder / ADAPTER_TENSORS)
    odd = [name for name in tensors if not name.startswith("base_model.model.") or not name.endswith(_LORA)]
    if odd:
        yield f"{ADAPTER_TENSORS}: {odd[0]} is not a LoRA matrix of PEFT"
    outer = sorted({part for name in tensors for part in name.split(".") if part in _OUTER})
    if outer:
        what = f"adapters on {', '.join(outer)}, which most of vLLM's models lack"
        yield f"{ADAPTER_TENSORS}: {what}; serve the merged model"
    yield from _dtype_problems(ADAPTER_TENSORS, tensors)


# --- whole models


def _model_problems(folder: Path) -> Iterator[str]:
    if not (folder / "config.json").is_file():
        yield "config.json: missing"
        return
    config = json_object(folder / "config.json")
    yield from _architecture_problems(config, needs_lora=False)
    if config.get("quantization_config"):
        yield "config.json: quantization_config; llm-compressor and vLLM read it as a quantised model"
    dtype = config.get("dtype", config.get("torch_dtype"))
    if dtype not in ("bfloat16", "float16", "float32"):
        yield f"config.json: dtype is {dtype}; vLLM reads bfloat16, float16 or float32 there"
    if config.get("auto_map"):
        yield "config.json: auto_map; vLLM would need --trust-remote-code"
    yield from _weight_problems(folder)
    if not _has_tokenizer(folder):
        yield "no tokenizer (tokenizer.json or tokenizer.model)"
    if not (folder / "generation_config.json").is_file():
        yield "generation_config.json: missing; vLLM stops at the eos token of config.json alone"


def _architecture_problems(config: Mapping[str, Any], *, needs_lora: bool) -> Iterator[str]:
    named = config.get("architectures")
    if not isinstance(named, list) or not named:
        yield "config.json: architectures is missing, by which vLLM finds its model"
        return
    if known := WITH_LORA.intersection(named):
        return
    if not WITHOUT_LORA.intersection(named):
        yield f"config.json: architectures is {', '.join(map(str, named))}, which is not in vLLM's list"
    elif needs_lora and not known:
        yield f"vLLM serves {', '.join(map(str, named))} without adapters only, so serve the merged model"


def _weight_problems(folder: Path) -> Iterator[str]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = json_object(index).get("weight_map")
        placed = dict(shards) if isinstance(shards, dict) else {}
        files = sorted({str(file) for file in placed.values()})
    elif (folder / "model.safetensors").is_file():
        placed, files = {}, ["model.safetensors"]
    else:
        yield "no model.safetensors and no model.safetensors.index.json; formats that can run code are not loaded"
        return
    found: dict[str, Entry] = {}
    for file in files:
        if not (folder / file).is_file():
            yield f"{file}: named in the index, but missing"
            continue
        tensors = read_header(contained(folder, file))
        found |= tensors
        yield from _dtype_problems(file, tensors)
    if wrong := sorted(set(placed) ^ set(found)) if placed else []:
        yield f"{index.name}: {wrong[0]} is only in the index or only in a file"
    if foreign := [name for name in found if "lora_" in name or "base_layer" in name or ".absmax" in name]:
        yield f"{foreign[0]}: not a tensor of the merged model"


def _dtype_problems(file: str, tensors: Mapping[str, Entry]) -> Iterator[str]:
    if odd := next((name for name, entry in tensors.items() if entry.dtype not in DTYPES), None):
        yield f"{file}: {odd} is stored as {tensors[odd].dtype}; allowed are {', '.join(DTYPES)}"


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / file).is_file() for file in _TOKENIZERS)
