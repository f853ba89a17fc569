"""Is a GGUF file in llama.cpp what was trained? Token ids, and log-probabilities within the bound of its format.

    parity, problems, notes = gguf_parity(path, "f16", tokenizer, "chat", rows, texts=texts_of(source.data))
    parity, problems, notes = ollama_parity(tokenizer, texts_of(source.data))

`problems` are differences that nothing explains, and those that come from what the engine lacks if the user's own rows
have such text; the rest of these are `notes` (`engine_lacks`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from solotune.exporters.artifact import Parity
from solotune.exporters.conversations import Conversation
from solotune.exporters.engine_lacks import Texts, explained, judged, lacks_of, ollama_lacks
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
Rows = Iterable[tuple[Sequence[int], torch.Tensor]]


def gguf_parity(
    path: Path,
    quantization: str,
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: str,
    rows: Rows = (),
    *,
    lora: Path | None = None,
    prompts: Sequence[str] = (),
    texts: Texts = (),
) -> tuple[Parity, list[str], list[str]]:
    """Compare a file in llama.cpp with the model that was trained.

    Args:
        rows: ids of a row, and what the trained model predicts after each of them: logits or log-probabilities (T, V).
            The last of MAX_POSITIONS, spread over the rows, are compared.
        lora: an adapter in GGUF beside the file.
        prompts: of a model trained on plain text: some of its own.
        texts: of the rows of the training, as far as they are known; read only if it matters.

    Raises:
        EngineError: llama.cpp does not load the file.
    """
    rows = list(rows)
    error = LogProbError()
    with LlamaCpp(path, lora=lora, context=max([CONTEXT, *(len(ids) + 1 for ids, _ in rows)])) as engine:
        asked, _ = asked_of(tokenizer, prompt_format, prompts)
        trained, given = TrainedIds(tokenizer), engine_ids(engine)
        differences = compare_token_ids(asked, trained, given, tokenizer)
        problems, lacking = explained(differences, asked, trained, given, lacks_of(tokenizer))
        for ids, trained_TV in rows:
            at = range(len(ids))[-max(1, MAX_POSITIONS // len(rows)) :]
            error.add(trained_TV[at.start : at.stop], engine.log_probs(ids, at))
    own, notes = judged(lacking, texts)
    return _parity(differences, asked, error), problems + own + _beyond(error, quantization), notes


def engine_ids(engine: LlamaCpp) -> Ids:
    """Token ids of a conversation in an engine, as `compare_token_ids` takes them."""

    def ids(asked: Conversation) -> list[int]:
        if asked.text is not None:
            return engine.token_ids(asked.text)
        return engine.token_ids(asked.messages, asked.tools, is_prompt=asked.is_prompt)

    return ids


def ollama_parity(tokenizer: PreTrainedTokenizerBase, texts: Texts = ()) -> tuple[Parity, list[str], list[str]]:
    """Compare the prompts of the Modelfile's TEMPLATE with training's, over the conversations that Ollama can have.

    No Go runs here: the pieces that TEMPLATE is written from are compared.

    Args:
        texts: of the rows of the training, as far as they are known; read only if it matters.

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
    found = Parity("files", token_ids_equal=not differ, conversations=len(asked), differing=len(differ))
    own, lacks = judged(ollama_lacks(tokenizer), texts)
    return found, problems + own, notes + lacks


def _parity(differences: Sequence[Difference], asked: Sequence[Conversation], error: LogProbError) -> Parity:
    kept: dict[str, Any] = {
        "token_ids_equal": not differences, "conversations": len(asked), "differing": len(differences)
    }  # fmt: skip
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
