"""S2, the pairing of base model and tokenizer: F04 to F07."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from solotune.diagnosis.arithmetic import has_error, shape_of, targets
from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.rows import examples_of
from solotune.diagnosis.subject import Subject
from solotune.diagnosis.suspects import rule, taken_over

if TYPE_CHECKING:
    import torch

MEAN_LIKE = 0.1
"""Distance from the mean embedding, in usual distances: transformers starts new rows at the mean, with 1e-9 of
scatter."""


@rule("F04", probes=("P1",))
def wrong_tokenizer(subject: Subject) -> list[Signal]:
    """F04: the tokenizer is not the one that the model was trained with.

    Sees: the ids that the model's files call begin and end of text, of which none is a special token in this tokenizer;
    a vocabulary of less than half of the embedding; more than 1 % unknown tokens. Twins that agree on all of these are
    told by the loss on plain text, which is bad as well (probe P1).
    Why: the model reads other words than were written: a first loss at or above log V, a high plateau, word salad.
    Not: F12 and F22, whose loss on plain text is normal; an embedding with more rows than the tokenizer has tokens,
    which is normal; text in another language.
    Fix: both from the same place and revision.
    Wrong when: config.json was edited by hand.
    Source: llama.cpp#7062; permuted ids gave 21 times the reference's first loss (measured).
    """
    return taken_over(subject, "F04")


@rule("F05")
def ids_beyond_embedding(subject: Subject) -> list[Signal]:
    """F05: token ids and rows of the embedding do not match.

    Sees: ids in the rows that are as large as the embedding or larger; an embedding saved with the adapter that has
    fewer rows than the base; an index error in the log.
    Why: a device-side assert; or, where a padded matrix was resized down to the tokenizer, rows that are lost in
    silence.
    Not: an embedding with more rows than the tokenizer has tokens, which is padding; a training that took steps, so
    that its embedding was resized: F06.
    Fix: `resize_token_embeddings(max(old, new))`, or the tokenizer as it came.
    Wrong when: config.json has another `vocab_size` than the checkpoint.
    Source: transformers#24698, unsloth-zoo#923.
    """
    ran = subject.trace is not None and bool(np.isfinite(subject.trace.loss_S).any())  # so every id had its row
    signals = [] if ran else taken_over(subject, "F05")
    fix = "model.resize_token_embeddings(max(len(tokenizer), model.config.vocab_size))"
    rows, shape = saved_embedding_rows(subject), shape_of(subject)
    if rows is not None and shape is not None and rows < shape["vocabulary"]:
        says = f"the embedding was saved with {rows:,} rows, and the base has {shape['vocabulary']:,}"
        signals.append(Signal("F05", "invariant", says, 0.85, {"rows": rows, "base": shape["vocabulary"]}, fix=fix))
    if line := has_error(subject, r"index out of range in self|device-side assert|srcIndex < srcSelectDimSize"):
        signals.append(Signal("F05", "measured", f"the run ended with: {line}", 0.6, {}, fix=fix))
    if not signals and not ran and (beyond := ids_beyond(subject)) is not None:
        size = shape["vocabulary"] if shape else 0
        says = f"the rows have id {beyond:,}, and the embedding has {size:,} rows"
        signals.append(Signal("F05", "invariant", says, 0.9, {"largest": beyond, "rows": size}, fix=fix))
    return signals


def ids_beyond(subject: Subject) -> int | None:
    """The largest id of the rows, where the embedding of config.json ends below it and no larger one was saved."""
    shape = shape_of(subject)
    if shape is None:
        return None
    largest = max((int(row.input_ids.max()) for row in examples_of(subject)[:2000] if len(row.input_ids)), default=-1)
    rows = max(shape["vocabulary"], saved_embedding_rows(subject) or 0)
    return largest if largest >= rows else None


def saved_embedding_rows(subject: Subject) -> int | None:
    """Rows of an embedding that was saved with the adapter."""
    for name, tensor in (subject.saved.adapter if subject.saved else {}).items():
        if re.search(r"(embed_tokens|wte|word_embeddings|embed_in)(\.modules_to_save)?(\.\w+)?\.weight$", name):
            return int(tensor.shape[0])
    return None


@rule("F06", needs=("settings", "live"))
def untrained_embedding(subject: Subject) -> Signal | None:
    """F06: tokens of the data have embedding rows that nothing has ever trained.

    Sees: ids in the rows whose embedding is zero, or lies where new rows are put (at the mean of all rows), while
    neither `trainable_token_indices` nor `modules_to_save` nor an adapter covers the embedding.
    Why: LoRA leaves embedding and head as they are, so the model cannot tell the new token from the others, and never
    writes it.
    Not: F07, where the marker is several ordinary ids; tokens that the base has and hardly used, which adapters in the
    layers below can still learn.
    Fix: `trainable_token_indices: [...]`, or `modules_to_save: [embed_tokens, lm_head]`.
    Wrong when: the base itself begins with such rows (an untrained model).
    Source: peft#2376; trl warns when it clones a template.
    """
    if subject.live is None or covers_embedding(subject):
        return None
    live = subject.live()
    embedding = getattr(live.model, "get_input_embeddings", lambda: None)()
    weight = getattr(embedding, "weight", None)
    rows = [row.input_ids for row in examples_of(subject)[:500]] or [b["input_ids"].cpu().numpy() for b in live.batches]
    if weight is None or weight.dim() != 2 or weight.requires_grad or not rows:
        return None
    used = np.unique(np.concatenate([np.asarray(row).ravel() for row in rows]))
    untrained = untrained_rows(weight, used[used < weight.shape[0]])
    if not untrained:
        return None
    names = subject.tokenizer.convert_ids_to_tokens(untrained[:3]) if subject.tokenizer is not None else untrained[:3]
    says = f"the rows use {', '.join(map(str, names))}, whose embedding was never trained, and nothing trains it"
    fix = f"trainable_token_indices: {untrained[:8]}"
    return Signal("F06", "measured", says, 0.8, {"ids": untrained[:8]}, fix=fix)


@rule("F06", needs=("settings", "model_config"))
def added_tokens_not_trained(subject: Subject) -> Signal | None:
    """F06, before the model is there: rows use ids past the base's vocabulary, the embedding grew, and is not
    trained."""
    shape, rows = shape_of(subject), saved_embedding_rows(subject)
    grown = rows or subject.settings.get("embedding_rows")
    if shape is None or not isinstance(grown, int) or grown <= shape["vocabulary"] or covers_embedding(subject):
        return None
    used = {int(i) for row in examples_of(subject)[:2000] for i in row.input_ids[row.input_ids >= shape["vocabulary"]]}
    if not used:
        return None
    says = (
        f"the rows use {len(used)} ids that were added to the base's {shape['vocabulary']:,}, and nothing trains them"
    )
    fix = f"trainable_token_indices: {sorted(used)[:8]}"
    return Signal("F06", "invariant", says, 0.85, {"ids": sorted(used)[:8]}, fix=fix)


def covers_embedding(subject: Subject) -> bool:
    """Whether the embedding is trained in some way."""
    get, config = subject.settings.get, subject.saved.adapter_config if subject.saved else {}
    listed = [get("modules_to_save"), config.get("modules_to_save"), targets(subject)]
    names = " ".join(str(name) for part in listed if part for name in ([part] if isinstance(part, str) else part))
    chosen = get("trainable_token_indices") or config.get("trainable_token_indices")
    return bool(chosen) or bool(re.search(r"embed_tokens|wte|word_embeddings|embed_in", names))


def untrained_rows(weight_VD: torch.Tensor, ids: np.ndarray) -> list[int]:
    """Those of the ids whose embedding is zero or lies at the mean of all, next to which usual rows are far away."""
    import torch

    whole = weight_VD.detach().float()
    mean_D = whole.mean(0)
    away_V = (whole - mean_D).norm(dim=1)
    usual = float(away_V.median())
    if usual == 0:
        return []
    chosen = torch.as_tensor(ids.astype(np.int64), device=whole.device)
    is_new = (away_V[chosen] < MEAN_LIKE * usual) | (whole[chosen].norm(dim=1) < 1e-3 * usual)
    return [int(i) for i in chosen[is_new].tolist()]


@rule("F07", probes=("P1",))
def markers_as_text(subject: Subject) -> list[Signal]:
    """F07: the template's control tokens are split like ordinary text.

    Sees: spellings such as `<|im_start|>` in the template's text that encode to several ids, where an answer is ended
    by one or the tokenizer has chat tokens of its own; the same in the decoded rows.
    Why: an instruct model sees a format that it was never taught (6 times the first loss), rows grow by 10 to 20 %, and
    answers contain the markup.
    Not: F12, which has no markup; formats of plain words; Zephyr and TinyLlama, whose `<|user|>` is text by design.
    Fix: the template that belongs to the tokenizer, or its markers declared as special tokens.
    Wrong when: a base model carries chat tokens that it was never trained on, and text is meant.
    Source: dolma#176 (an option that does it on purpose); ratio 6.4 (measured).
    """
    return taken_over(subject, "F07")
