"""Static rules on the tokenizer (S2), and the template's text around a question and its answer.

Every rule's docstring says: *Sees*, *Why* it matters, *Not* (its look-alikes, and what tells them apart), *Fix*, and
*Wrong when*.
"""

from __future__ import annotations

import re
from functools import partial

import numpy as np

from solotune.dataset.chat import ChatTemplate
from solotune.dataset.findings_facts import NUM_DECODED, Facts, Finding, percent
from solotune.errors import InputError

SMALLEST_VOCABULARY_SHARE = 0.5
"""Embedding matrices are padded, by 2.3 % at most in released models (DeepSeek); half can only be another tokenizer."""
MOST_UNKNOWN = 0.01
"""More than one unknown token in a hundred: byte-level and byte-fallback tokenizers have none in any language."""

_MARKER = re.compile(r"<[|｜][^|｜<>\s]{1,40}[|｜]>|</?(?:start|end)_of_\w{1,20}>")
_CHAT_WORD = re.compile(r"im_|turn|header|eot|eom|user|assistant|system|role|message|inst", re.IGNORECASE)
_USER, _ANSWER = "\ufdd0", "\ufdd1"

_S2 = partial(Finding, suspect="S2")


def wrong_tokenizer(facts: Facts) -> Finding | None:
    """F04: the tokenizer is not the model's.

    Sees: the ids that the model's own files call begin and end of text, none of which is a special token in this
    tokenizer; or a vocabulary that covers less than half of the embedding; or more than 1 % unknown tokens in the data.
    Why: the model reads other words than were written: loss near log V, word salad.
    Not: a padded embedding (more rows than tokens is normal); another language (byte-level tokenizers spell any text);
    several stop ids of which the tokenizer names one (Llama 3).
    Fix: take both from one place.
    Wrong when: config.json was edited by hand. It cannot see two tokenizers that agree on these ids (Llama 2, Mistral):
    the loss on plain text does (probe P1).
    """
    found = partial(_S2, "F04", "wrong-tokenizer", severity="error")
    own = facts.model_ids("eos_token_id") | facts.model_ids("bos_token_id")
    if own and not own & (facts.special_ids | facts.control.ids):
        spelled = {str(i): facts.spelled(i) if i < len(facts.tokenizer) else "no such token" for i in sorted(own)}
        return found(
            message="The tokenizer is not this model's: what the model's files call begin or end of text are ordinary "
            "tokens in it.",
            evidence={"model_special_ids": spelled, "tokenizer_eos_id": facts.eos_id},
            fix="copy the tokenizer files of the same model and revision into the folder of model_name_or_path",
        )
    size = facts.num_embeddings
    if size and len(facts.tokenizer) < SMALLEST_VOCABULARY_SHARE * size:
        return found(
            message=f"The tokenizer has {len(facts.tokenizer):,} tokens for an embedding of {size:,}: it is not this "
            "model's.",
            evidence={"tokens": len(facts.tokenizer), "embedding_rows": size},
            fix="copy the tokenizer files of the same model and revision into the folder of model_name_or_path",
        )
    unknown = facts.named_id("unk")
    if unknown is None or unknown in {facts.named_id("eos"), facts.named_id("bos"), facts.named_id("pad")}:
        return None  # GPT-2 and its kin name their end of text as unknown, and never produce it for one
    side = facts.train
    places = np.flatnonzero(side.ids == unknown)
    if len(places) < MOST_UNKNOWN * max(len(side.ids), 1) or not len(places):
        return None
    rows = np.unique(np.searchsorted(side.starts, places, side="right") - 1)
    return found(
        message=f"The tokenizer cannot spell this data: {percent(len(places), len(side.ids))} of its tokens are unknown"
        " ones.",
        evidence={"unknown_tokens": len(places), "tokens": len(side.ids), "rows": side.places(rows)},
        fix="use a model whose tokenizer knows the script of the data, or remove these rows",
    )


def ids_beyond_embedding(facts: Facts) -> Finding | None:
    """F05: a token's id has no row in the embedding.

    Sees: the largest id in the data against `vocab_size` of the model's config.json.
    Why: a device-side assert, or another row's memory.
    Not: an embedding with more rows than the tokenizer has tokens (padding, normal); added tokens that no row uses.
    Fix: the tokenizer as it came with the model.
    Wrong when: the checkpoint has more rows than its config says; then it does not load either.
    """
    size = facts.num_embeddings
    if not size:
        return None
    found = [(whole, np.flatnonzero(whole.largest >= size)) for whole in facts.whole]
    some = [whole.rows[int(row)].input_ids for whole, rows in found for row in rows[:NUM_DECODED]]
    if not some:
        return None
    beyond = np.concatenate(some)
    beyond = beyond[beyond >= size]
    train, rows = found[0]
    return _S2(
        "F05",
        "ids-beyond-embedding",
        severity="error",
        message=f"The data contains tokens that the model has no embedding for: {facts.spelled(beyond.min())!r} is id "
        f"{beyond.min()}, and the embedding has {size:,} rows.",
        evidence={"largest_id": int(beyond.max()), "embedding_rows": size, "rows": train.places(rows)},
        fix="use the tokenizer as it came with the model; tokens added to it need a base with a larger embedding",
    )


def template_pieces(facts: Facts) -> tuple[str, str, str] | None:
    """The template's own text before a question, between it and the answer, and after; None if it refuses."""
    return None if facts.template is None else pieces_of(facts.template)


def pieces_of(template: ChatTemplate) -> tuple[str, str, str] | None:
    """The same of a template."""
    chat = [{"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = template.raw("the probe", chat, None, is_prompt=False)
    except InputError:
        return None
    header, _, rest = text.partition(_USER)
    between, found, end = rest.partition(_ANSWER)
    return (header, between, end) if found else None


def ends_with_text_marker(facts: Facts) -> bool:
    """Whether the template ends answers with something spelled like a control token that is none."""
    pieces = template_pieces(facts)
    marker = _MARKER.match(pieces[2].lstrip()) if pieces else None
    return marker is not None and len(facts.encode(marker[0])) > 1


def markers_as_text(facts: Facts) -> Finding | None:
    """F07: the template writes control tokens that the tokenizer does not have.

    Sees: spellings such as `<|im_start|>` in the template's own text that encode to several ids, where either an
    answer is ended by one (nothing can stop on it) or the tokenizer has chat tokens of its own that are not used.
    Why: an instruct model sees a format it was never taught (6 times the first loss), rows grow by 10-20 %.
    Not: a format of plain words (`### User:`); Zephyr and TinyLlama, whose `<|user|>` is text by design: their answers
    end with a real `</s>`, and their tokenizer has no chat tokens; `[INST]` of Llama 2, which is text too.
    Fix: the template that belongs to the tokenizer.
    Wrong when: a base model carries chat tokens it was never trained on (Llama 3) and a text format is meant.
    """
    pieces = template_pieces(facts)
    if pieces is None or not facts.is_chat:
        return None
    text = "".join(pieces)
    split = {m: len(ids) for m in sorted(set(_MARKER.findall(text))) if len(ids := facts.encode(m)) > 1}
    named = set(facts.tokenizer.special_tokens_map.values()) if facts.tokenizer.special_tokens_map else set()
    unused = sorted(
        s for s in facts.control.spellings - {str(n) for n in named} if _CHAT_WORD.search(s) and s not in text
    )
    if not split or not (unused or ends_with_text_marker(facts)):
        return None
    path = facts.config.chat_template_path
    return _S2(
        "F07",
        "markers-as-text",
        severity="error" if ends_with_text_marker(facts) else "warning",
        message=f"The chat template writes {', '.join(split)}, which this tokenizer has no token for and splits like "
        "any word.",
        evidence={"ids_per_marker": split, "own_tokens_not_used": unused[:8], "chat_template_path": path},
        fix=(f"remove `chat_template_path: {path}`" if path else "set chat_template_path to a template")
        + (f" that uses the tokenizer's own tokens ({', '.join(unused[:4])})" if unused and not path else "")
        + ("" if unused else ", or end answers with {{ eos_token }}"),
    )


RULES = (wrong_tokenizer, ids_beyond_embedding, markers_as_text)
