"""Tokens that llama.cpp takes for control tokens because of their text, whatever the file says of them.

    renamed_tokens(tokenizer)     {128247: "</s_>"}: texts for the GGUF file's list of tokens

llama.cpp looks for end tokens and for tokens of code completion by their text (`llama_vocab::impl::load`: "this is
currently determined based on the token text, which is obviously not ideal"), makes control tokens of them, and then
finds them wherever their text stands in a prompt. In the vocabularies of Qwen and Gemma, `</s>` is an ordinary piece of
HTML that no text is ever split into: training reads `</`, `s`, `>`, and llama.cpp would read one token that ends an
answer. The file can say another text for such a token, which llama.cpp then does not look for. Nothing else changes,
since no text gives this token in training either; what is left is what is shown if a model ever writes it.

A token that texts are split into, or one that the tokenizer itself adds, keeps its text.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_TEXTS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
)  # fmt: skip
_CODE_TEXTS = (
    "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<PRE>", "<|code_prefix|>", "<|prefix|>",
    "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<SUF>", "<|code_suffix|>", "<|suffix|>",
    "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<MID>", "<|code_middle|>", "<|middle|>",
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]",
    "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
)  # fmt: skip
END_SPELLING = re.compile("|".join(re.escape(text) for text in sorted(END_TEXTS, key=len, reverse=True)))
_BESIDE = ("", " ", "\n", "x", "7", ".", ">", "é")


def renamed_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Ids of ordinary tokens that llama.cpp would make control tokens of, and the texts that they get instead."""
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    found: dict[int, str] = {}
    for text in (*END_TEXTS, *_CODE_TEXTS):
        token = vocabulary.get(text)
        if token is None or token in added or _is_reached(tokenizer, text, token):
            continue
        other = f"{text[:-1]}_{text[-1]}"
        while other in vocabulary or other in found.values():
            other = f"{other[:-1]}_{other[-1]}"
        found[token] = other
    return found


def _is_reached(tokenizer: Any, text: str, token: int) -> bool:
    """Whether a text with this spelling is split into the token."""
    around = [f"{before}{text}{after}" for before in _BESIDE for after in _BESIDE]
    return any(token in ids for ids in tokenizer(around, add_special_tokens=False)["input_ids"])
