"""A tokenizer for each chat template that `bench.templates` looks at.

Four vocabularies are at hand: Llama 3, Qwen 3, Mistral v3 (SentencePiece) and SmolLM2. A template of a family whose own
is not gets one of them with the control tokens that stand in the template added as special tokens; its name then ends
with `+ tokens`.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

# beginning of a template's name -> vocabulary, bos, eos; True where the vocabulary is the family's own
FAMILIES: dict[str, tuple[str, str | None, str, bool]] = {
    "cohere": ("qwen3", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", False),
    "deepseek": ("qwen3", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", False),
    "diffusion_gemma": ("qwen3", "<bos>", "<eos>", False),
    "gemma": ("qwen3", "<bos>", "<eos>", False),
    "gemma4": ("qwen3", "<bos>", "<eos>", False),
    "glm": ("qwen3", None, "<|endoftext|>", False),
    "gptoss": ("qwen3", "<|startoftext|>", "<|return|>", False),
    "idefics3": ("llama3", "<|begin_of_text|>", "<end_of_utterance>", False),
    "lfm2": ("qwen3", "<|startoftext|>", "<|im_end|>", False),
    "llama3": ("llama3", "<|begin_of_text|>", "<|eot_id|>", True),
    "llava": ("mistral3", "<s>", "</s>", True),
    "mistral_v3": ("mistral3", "<s>", "</s>", True),
    "mistral_v3_tekken": ("tekken", "<s>", "</s>", True),
    "muse": ("qwen3", "<|begin_of_text|>", "<|end|>", False),
    "nemotron": ("qwen3", "<s>", "<|im_end|>", False),
    "phi3": ("mistral3", "<s>", "<|endoftext|>", False),
    "qwen": ("qwen3", None, "<|im_end|>", True),
    "smolvlm": ("smollm2", "<|im_start|>", "<end_of_utterance>", False),
}
_SPECIAL = re.compile(
    r"<\|[^<>|\s{}'\"]+\|?>|<[^<>|\s{}'\"/]+\|>|<｜[^<>｜]+｜>"
    r"|</?(?:bos|eos|start_of_turn|end_of_turn|start_of_image|end_of_utterance|image|s|sop)>"
)
_MARKUP = re.compile(r"</?think>|</?tool_call>|</?arg_(?:key|value)>")


def family_of(template: str) -> str:
    """The key of `FAMILIES`."""
    return max((family for family in FAMILIES if template.startswith(family)), key=len)


@cache
def tokenizer_for(folder: Path, template: str, source: str) -> tuple[PreTrainedTokenizerBase, str]:
    """The tokenizer, with `source` as its template, and the name it goes by in the table."""
    vocabulary, bos, eos, is_own = FAMILIES[family_of(template)]
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "tok" / vocabulary, local_files_only=True)
    spellings = sorted({*_SPECIAL.findall(source), *filter(None, (bos, eos))})
    missing = [token for token in spellings if token not in tokenizer.get_vocab()]
    if not is_own:
        tokenizer.add_tokens(sorted({*_MARKUP.findall(source)} - tokenizer.get_vocab().keys()))
        tokenizer.add_tokens(missing, special_tokens=True)
    tokenizer.add_special_tokens({"eos_token": eos, **({"bos_token": bos} if bos else {})})
    tokenizer.chat_template = source
    return tokenizer, vocabulary if is_own else f"{vocabulary} + tokens"
