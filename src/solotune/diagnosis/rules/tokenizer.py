"""S2, base model and tokenizer: F04 and F07; `embedding` has F05 and F06."""

from __future__ import annotations

import re
from functools import partial

import numpy as np

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.base_tokenizer import changed_ids
from solotune.diagnosis.facts.row_arrays import NUM_DECODED, evenly, is_pattern, percent
from solotune.diagnosis.facts.row_facts import RowFacts, pieces_of_template
from solotune.diagnosis.facts.rows import examples_of
from solotune.diagnosis.findings import Finding
from solotune.diagnosis.rules import rule
from solotune.diagnosis.run_facts import RunFacts

SMALLEST_VOCABULARY_SHARE = 0.5
"""Released models pad the embedding by at most 2.3 % (DeepSeek); half can only be another tokenizer."""
USUAL_VOCABULARY_SHARE, MOST_PADDING = 0.9, 4096
"""Padding of more than a tenth, and of more rows than any padding has, is unusual."""
MOST_BEYOND = 1.1
"""A vocabulary that is larger than the embedding by a tenth belongs to another model; a resized one hardly is."""
MOST_CHANGED = 0.01
"""Of the ids of the base's tokenizer; copies of one tokenizer differ in none."""
MOST_UNKNOWN = 0.01
"""One unknown token in a hundred; byte-level and byte-fallback tokenizers have none in any language."""


_MARKER = re.compile(r"<[|｜][^|｜<>\s]{1,40}[|｜]>|</?(?:start|end)_of_\w{1,20}>")
_CHAT_WORD = re.compile(r"im_|turn|header|eot|eom|user|assistant|system|role|message|inst", re.IGNORECASE)


@rule("F04", needs=("rows",), probes=("P1",))
def wrong_tokenizer(facts: RowFacts) -> Finding | None:
    """F04: the tokenizer is not the one that the model was trained with.

    Sees: ids of begin and end of text in the model's files that are not special tokens in this tokenizer; a vocabulary
    of less than half of the embedding, or one that exceeds it without any added token; more than 1 % unknown tokens;
    where the base's own tokenizer lies on this machine, ids that mean other pieces of text in it. Similar tokenizers
    pass all of these checks; then a bad loss on plain text shows the fault, or ids that fit what the model expects only
    if all are moved by some places (probe P1).
    Why: the model reads different words than the text has: a first loss of log V or more, a high plateau, meaningless
    answers.
    Not: F12 and F22, where the loss on plain text is normal; an embedding with more rows than the tokenizer has tokens,
    which is normal (of far more rows than any released model has, a remark); text in another language; F05, where only
    added tokens are beyond the embedding.
    Fix: load both from the same folder and revision.
    Wrong when: config.json was edited by hand.
    Source: llama.cpp#7062; permuted ids gave 21 times the normal first loss (measured).
    """
    found = partial(Finding.of, "F04", "error")
    own = facts.all_model_ids("eos_token_id") | facts.all_model_ids("bos_token_id")
    if own and not own & (facts.special_ids | facts.control.ids):
        spelled = {str(i): facts.spelled(i) if i < len(facts.tokenizer) else "no such token" for i in sorted(own)}
        return found(
            message="The tokenizer does not belong to this model: the model's begin or end of text are ordinary tokens "
            "in it.",
            evidence={"model_special_ids": spelled, "tokenizer_eos_id": facts.eos_id},
            fix="copy the tokenizer files of the same model and revision into the folder of model_name_or_path",
        )
    if (of_another_size := _size_of_another(facts)) is not None:
        return of_another_size
    unknown = facts.named_id("unk")
    if unknown is None or unknown in {facts.named_id("eos"), facts.named_id("bos"), facts.named_id("pad")}:
        return None  # GPT-2 and similar use their end of text as unk, and never produce it for unknown text
    side = facts.train
    places = np.flatnonzero(side.ids == unknown)
    if len(places) < MOST_UNKNOWN * max(len(side.ids), 1) or not len(places):
        return None
    rows = np.unique(np.searchsorted(side.starts, places, side="right") - 1)
    return found(
        message=f"The tokenizer does not know the script of this data: {percent(len(places), len(side.ids))} of "
        "the tokens are unknown.",
        evidence={"unknown_tokens": len(places), "tokens": len(side.ids), "rows": side.places(rows)},
        affected=len(rows) / len(side.rows),
        fix="use a model whose tokenizer knows the script of the data, or remove these rows",
    )


@rule("F04", needs=("tokenizer",))
def ids_changed(run_facts: RunFacts) -> Signal | None:
    """F04, where the base's own tokenizer is known: ids that mean other pieces of text in the run's tokenizer.

    Control: tokens that were added to either, which may have a new name; a tokenizer that only has more.
    """
    changed_V = changed_ids(run_facts)
    if changed_V is None or not changed_V.any() or changed_V.mean() < MOST_CHANGED:
        return None
    rows = [row.input_ids[row.input_ids < len(changed_V)] for row in examples_of(run_facts)[:2000]]
    used = np.concatenate(rows) if rows else np.zeros(0, np.int64)
    says = (
        f"{int(changed_V.sum()):,} of {len(changed_V):,} ids mean other pieces of text than in the base's own tokenizer"
    )
    share = float(changed_V[used].mean()) if len(used) else None
    says += "" if share is None else f": {share:.0%} of the tokens of the rows"
    numbers = {"ids": int(changed_V.sum()), "of": len(changed_V), "share_of_tokens": share}
    fix = "load the tokenizer from the base's own folder and revision, and tokenize the rows again"
    return Signal("F04", "invariant", says, 0.95, numbers, fix=fix, affected=1.0)


def _size_of_another(facts: RowFacts) -> Finding | None:
    """The finding on a vocabulary that the embedding cannot be made for."""
    size, tokens, ordinary = facts.num_embeddings, len(facts.tokenizer), facts.tokenizer.vocab_size
    if not size:
        return None
    is_small, is_large = tokens < SMALLEST_VOCABULARY_SHARE * size, ordinary > MOST_BEYOND * size
    is_unusual = tokens < USUAL_VOCABULARY_SHARE * size and size - tokens > MOST_PADDING
    if not is_small and not is_large and not is_unusual:
        return None
    says = f"The tokenizer has {ordinary if is_large else tokens:,} tokens"
    says += ", without those that were added" if is_large else ""
    says += f", but the embedding has {size:,} rows: "
    says += (
        "it does not belong to this model." if is_small or is_large else "padding is 2 % at most in released models."
    )
    return Finding.of(
        "F04",
        "error" if is_small or is_large else "warning",
        message=says,
        evidence={"tokens": tokens, "embedding_rows": size},
        affected=1.0,
        fix="copy the tokenizer files of the same model and revision into the folder of model_name_or_path",
    )


@rule("F07", needs=("rows",), probes=("P1",))
def markers_as_text(facts: RowFacts) -> Finding | None:
    """F07: the tokenizer splits the template's control tokens like ordinary text.

    Sees: texts such as `<|im_start|>` in the template that encode to several ids, if one of them ends answers, the
    tokenizer has its own chat tokens, or an id at which the model stops is no control token in this tokenizer; markers
    that are one id in the base's own tokenizer; the model's own template whose markers are split, and which the model
    does not expect (probe P1).
    Why: an instruct model sees a format that it does not know (6 times the first loss), rows become 10 to 20 % longer,
    and answers contain the markup.
    Not: F12, which has no markup; formats of plain words; Zephyr and TinyLlama, whose `<|user|>` is text by design.
    Fix: use the template that belongs to the tokenizer, or add its control tokens to the tokenizer as special tokens.
    Wrong when: a base model has chat tokens that were never trained, and text is wanted.
    Source: dolma#176 (an option that does it on purpose); the first loss is 6.4 times the normal one (measured).
    """
    pieces = pieces_of_template(facts)
    if pieces is None or not facts.is_chat:
        return None
    text = "".join(pieces)
    split = {m: len(ids) for m in sorted(set(_MARKER.findall(text))) if len(ids := facts.encode(m)) > 1}
    named = set(facts.tokenizer.special_tokens_map.values()) if facts.tokenizer.special_tokens_map else set()
    unused = sorted(
        s for s in facts.control.spellings - {str(n) for n in named} if _CHAT_WORD.search(s) and s not in text
    )
    if (lost := _lost_in_rows(facts, text)) is not None:
        return lost
    path = facts.settings.chat_template_path
    lost_ends = [] if path else sorted(facts.all_model_ids("eos_token_id") - facts.special_ids - facts.control.ids)
    if not split or not (unused or lost_ends or ends_with_text_marker(facts)):
        return None
    return Finding.of(
        "F07",
        "error" if lost_ends or ends_with_text_marker(facts) else "warning",
        message=f"The chat template writes {', '.join(split)}, which is not a token of this tokenizer and is "
        "split like any word.",
        evidence={
            "ids_per_marker": split,
            "own_tokens_not_used": unused[:8],
            "chat_template_path": path,
            "ends_that_are_no_tokens": lost_ends,
        },
        affected=1.0,
        fix="copy the tokenizer files of the same model and revision into the folder of model_name_or_path"
        if lost_ends
        else (f"remove `chat_template_path: {path}`" if path else "set chat_template_path to a template")
        + (f" that uses the tokenizer's own tokens ({', '.join(unused[:4])})" if unused and not path else "")
        + ("" if unused else ", or end answers with {{ eos_token }}"),
    )


@rule("F07", needs=("tokenizer",))
def markers_lost(run_facts: RunFacts) -> Signal | None:
    """F07, where the base's own tokenizer is known: markers of the template that are one id in it, and several here."""
    base, tokenizer = run_facts.base_tokenizer, run_facts.tokenizer
    template = run_facts.base_template or str(getattr(tokenizer, "chat_template", None) or "")
    if base is None or tokenizer is None or not template:
        return None
    written = [token.content for token in base.added_tokens_decoder.values() if token.content in template]
    lost = [text for text in written if len(tokenizer.encode(text, add_special_tokens=False)) > 1]
    if not lost:
        return None
    says = f"{', '.join(lost[:4])} of the chat template are tokens of the base's tokenizer, and are split like any "
    says += "word by the run's"
    fix = "load the tokenizer from the base's own folder and revision, and tokenize the rows again"
    return Signal("F07", "invariant", says, 0.95, {"lost": lost[:8]}, fix=fix, affected=1.0)


def _lost_in_rows(facts: RowFacts, rendered: str) -> Finding | None:
    """Rows that spell the template's control tokens as text, though the tokenizer has them.

    Control: the template, which writes each of them; a token that no row has is only asked for if its text is there.
    """
    side = facts.train
    for token in sorted(facts.control.spellings):
        index = facts.tokenizer.convert_tokens_to_ids(token)
        if token not in rendered or not _MARKER.fullmatch(token) or (side.ids == index).any():
            continue
        rows = evenly(range(len(side.rows)), NUM_DECODED)
        having = [r for r in rows if token in facts.decode(side.rows[r].input_ids)]
        if is_pattern(len(having), len(rows), 0.5):
            return Finding.of(
                "F07",
                "error",
                message=f"{token} is a token of this tokenizer, but in {len(having):,} of {len(rows):,} rows it is "
                "spelled as text, and in none it is the token.",
                evidence={"token": token, "id": index, "rows": side.places(having)},
                affected=len(having) / len(rows),
                fix="tokenize without split_special_tokens, so that control tokens stay whole",
            )
    return None


def ends_with_text_marker(facts: RowFacts) -> bool:
    """Whether the template ends answers with text that looks like a control token but is not one, and with no other."""
    pieces = pieces_of_template(facts)
    marker = _MARKER.match(pieces[2].lstrip()) if pieces else None
    is_split = marker is not None and len(facts.encode(marker[0])) > 1
    return is_split and pieces is not None and not set(facts.encode(pieces[2])) & facts.stop_ids
