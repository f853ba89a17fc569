"""Is a GGUF file in llama.cpp what was trained? Token ids, and log-probabilities within the bound of its format.

    parity, problems, notes = gguf_parity(path, "f16", tokenizer, "chat", rows, trained_log_probs)
    parity, problems, notes = ollama_parity(tokenizer)

`problems` are differences that nothing explains. `notes` are those that come from what the engine lacks, whatever file
it is given; with the number of conversations in which they show:

    NFC      llama.cpp does not compose characters (e + accent), which the tokenizers of Qwen and others do first
    ends     llama.cpp takes some spellings, `</s>` among them, for end tokens, in whatever vocabulary they are
    strip    llama.cpp strips ASCII white space only, where a template strips all
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from solotune.errors import SolotuneError
from solotune.exporters.artifact import Parity
from solotune.exporters.conversations import Conversation
from solotune.exporters.llama_cpp import LlamaCpp
from solotune.exporters.log_prob_error import LogProbError
from solotune.exporters.template_parity import MOST_SHOWN, Difference, Ids, TrainedIds, asked_of, compare_token_ids
from solotune.exporters.turn_format import derive

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_LOG_PROB_DIFF = {"f32": 1e-3}
MAX_MEAN_KL = {"f32": 1e-3, "f16": 1e-3, "bf16": 1e-3}
"""Bounds by format; others are reported, not judged."""
CONTEXT = 16384  # the longest conversation has 9,000 tokens with a vocabulary of letters
MAX_POSITIONS = 48  # each takes half a second with a vocabulary of 50,000
_END_SPELLINGS = re.compile(
    r"</s>|<\|(?:end|return|call|flush|calls|end_of_text|endoftext|eom_id|eot_id|im_end)\|>|<EOT>"
)
Rows = Iterable[tuple[Sequence[int], torch.Tensor]]
Changed = Callable[[str], str]


def gguf_parity(
    path: Path,
    quantization: str,
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: str,
    rows: Rows = (),
    *,
    lora: Path | None = None,
    prompts: Sequence[str] = (),
) -> tuple[Parity, list[str], list[str]]:
    """Compare a file in llama.cpp with the model that was trained.

    Args:
        rows: ids of a row, and what the trained model predicts after each of them: logits or log-probabilities (T, V).
            The last of MAX_POSITIONS, spread over the rows, are compared.
        lora: an adapter in GGUF beside the file.
        prompts: of a model trained on plain text: some of its own.

    Raises:
        EngineError: llama.cpp does not load the file.
    """
    rows = list(rows)
    error = LogProbError()
    with LlamaCpp(path, lora=lora, context=max([CONTEXT, *(len(ids) + 1 for ids, _ in rows)])) as engine:
        asked, _ = asked_of(tokenizer, prompt_format, prompts)
        trained, given = TrainedIds(tokenizer), engine_ids(engine)
        differences = compare_token_ids(asked, trained, given, tokenizer)
        problems, notes = explained(differences, asked, trained, given, normalizer(tokenizer))
        for ids, trained_TV in rows:
            at = range(len(ids))[-max(1, MAX_POSITIONS // len(rows)) :]
            error.add(trained_TV[at.start : at.stop], engine.log_probs(ids, at))
    return _parity(differences, asked, error), problems + _beyond(error, quantization), notes


def engine_ids(engine: LlamaCpp) -> Ids:
    """Token ids of a conversation in an engine, as `compare_token_ids` takes them."""

    def ids(asked: Conversation) -> list[int]:
        if asked.text is not None:
            return engine.token_ids(asked.text)
        return engine.token_ids(asked.messages, asked.tools, is_prompt=asked.is_prompt)

    return ids


def ollama_parity(tokenizer: PreTrainedTokenizerBase) -> tuple[Parity, list[str], list[str]]:
    """Compare the prompts of the Modelfile's TEMPLATE with training's, over the conversations that Ollama can have.

    No Go runs here: the pieces that TEMPLATE is written from are compared.

    Raises:
        InputError: the chat template has no turns that a TEMPLATE could have.
    """
    turns = derive(tokenizer)
    asked = [one for one in asked_of(tokenizer, "chat")[0] if one.is_prompt and not one.tools]
    asked = [one for one in asked if turns.supports(one.messages)]
    differ = [one.name for one in asked if turns.differs(one.messages)]
    thoughts = [one.name for one in asked if one.name in differ and "</think>" in str(one.messages)]
    others = [name for name in differ if name not in thoughts]
    problems = [f"conversation '{name}': TEMPLATE gives another prompt than training" for name in others[:MOST_SHOWN]]
    notes = (
        [f"{len(thoughts)} conversations with thoughts in earlier answers: {', '.join(thoughts)}"] if thoughts else []
    )
    return Parity("files", token_ids_equal=not differ, conversations=len(asked)), problems, notes


def explained(
    differences: Sequence[Difference], asked: Sequence[Conversation], trained: Ids, given: Ids, normalize: Changed
) -> tuple[list[str], list[str]]:
    """Sort differences: those that nothing explains, in words; and what the engine lacks, with how many that explains.

    A reason counts only if it is the whole one: the engine is asked again for the same conversation without what it
    cannot do, and its ids then have to be those of training.
    """
    by_name = {one.name: one for one in asked}
    lacks = {
        "llama.cpp does not compose characters as this tokenizer does (NFC)": normalize,
        "llama.cpp takes </s> and the like in a message for end tokens": lambda text: _END_SPELLINGS.sub("x", text),
        "llama.cpp strips ASCII white space only around messages": str.strip,
    }
    problems, counts = [], dict.fromkeys(lacks, 0)
    for difference in differences:
        one = by_name[difference.conversation]
        reason = next((why for why, change in lacks.items() if _is_equal_after(change, one, trained, given)), None)
        if reason is None:
            problems.append(str(difference))
        else:
            counts[reason] += 1
    if len(problems) > MOST_SHOWN:
        problems[MOST_SHOWN:] = [f"{len(problems) - MOST_SHOWN} more of {len(asked)} conversations differ"]
    return problems, [f"{reason}: {count} of {len(asked)} conversations" for reason, count in counts.items() if count]


def _is_equal_after(change: Changed, asked: Conversation, trained: Ids, given: Ids) -> bool:
    """Whether the engine's ids are training's once the texts of a conversation are changed."""
    messages = [
        {**message, "content": change(message["content"])} if isinstance(message.get("content"), str) else message
        for message in asked.messages
    ]
    changed = replace(asked, messages=messages, text=None if asked.text is None else change(asked.text))
    try:
        return changed != asked and given(changed) == trained(changed)
    except SolotuneError:
        return False


def normalizer(tokenizer: PreTrainedTokenizerBase) -> Changed:
    """What the tokenizer does to a text before it splits it."""
    fast: Any = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None or fast.normalizer is None:
        return str
    return lambda text: fast.normalizer.normalize_str(text)


def _parity(differences: Sequence[Difference], asked: Sequence[Conversation], error: LogProbError) -> Parity:
    kept: dict[str, Any] = {"token_ids_equal": not differences, "conversations": len(asked)}
    if error.positions:
        kept |= {name: getattr(error, name) for name in ("mean_kl", "max_kl", "top1_agreement", "max_logprob_diff")}
    return Parity("llama.cpp", positions=error.positions, **kept)


def _beyond(error: LogProbError, quantization: str) -> list[str]:
    """The bounds of a format that are exceeded, in words."""
    found = []
    most, mean = MAX_LOG_PROB_DIFF.get(quantization), MAX_MEAN_KL.get(quantization)
    if most is not None and error.max_logprob_diff > most:
        found.append(
            f"{quantization}: log-probabilities differ by up to {error.max_logprob_diff:.2g}, allowed {most:g}"
        )
    if mean is not None and error.mean_kl > mean:
        found.append(f"{quantization}: mean KL {error.mean_kl:.2g}, allowed {mean:g}")
    return found
