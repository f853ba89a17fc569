"""S2, base model and tokenizer: F04 to F07."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.derived import has_error, shape_of, targets
from solotune.diagnosis.facts.row_arrays import NUM_DECODED, evenly, is_pattern, percent
from solotune.diagnosis.facts.row_facts import RowFacts, pieces_of_template
from solotune.diagnosis.facts.rows import examples_of
from solotune.diagnosis.findings import Finding
from solotune.diagnosis.rules import rule
from solotune.diagnosis.run_facts import RunFacts

if TYPE_CHECKING:
    import torch

SMALLEST_VOCABULARY_SHARE = 0.5
"""Released models pad the embedding by at most 2.3 % (DeepSeek); half can only be another tokenizer."""
USUAL_VOCABULARY_SHARE, MOST_PADDING = 0.9, 4096
"""Padding of more than a tenth, and of more rows than any padding has, is unusual."""
MOST_BEYOND = 1.1
"""A vocabulary that is larger than the embedding by a tenth belongs to another model; a resized one hardly is."""
MOST_UNKNOWN = 0.01
"""One unknown token in a hundred; byte-level and byte-fallback tokenizers have none in any language."""
MEAN_LIKE = 0.1
"""Distance from the mean embedding / usual distance: transformers starts new rows at the mean, with a scatter of
1e-9."""
OFTEN = 0.05
"""Share of the rows: a token of fewer is a rare one, not a marker."""
NUM_KNOWN, MIN_UNUSED, ALIKE = 20, 4, 1.2
"""Ordinary tokens and unused rows that are needed to compare with; the size of a row like them, as a factor."""

_MARKER = re.compile(r"<[|｜][^|｜<>\s]{1,40}[|｜]>|</?(?:start|end)_of_\w{1,20}>")
_CHAT_WORD = re.compile(r"im_|turn|header|eot|eom|user|assistant|system|role|message|inst", re.IGNORECASE)
_RESIZE = "in transformers: model.resize_token_embeddings(max(len(tokenizer), model.config.vocab_size))"


@rule("F04", needs=("rows",), probes=("P1",))
def wrong_tokenizer(facts: RowFacts) -> Finding | None:
    """F04: the tokenizer is not the one that the model was trained with.

    Sees: ids of begin and end of text in the model's files that are not special tokens in this tokenizer; a vocabulary
    of less than half of the embedding, or one that exceeds it without any added token; more than 1 % unknown tokens.
    Similar tokenizers pass all of these checks; then a bad loss on plain text shows the fault (probe P1).
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


def took_steps(run_facts: RunFacts) -> bool:
    """Whether a loss was computed, so that every id had its embedding row."""
    return run_facts.trace is not None and bool(np.isfinite(run_facts.trace.loss_S).any())


@rule("F05", needs=("rows",), unless=took_steps)
def ids_beyond_embedding(facts: RowFacts) -> Finding | None:
    """F05: token ids do not match the rows of the embedding.

    Sees: ids in the rows that are not below the size of the embedding; an embedding saved with the adapter that has
    fewer rows than the base's; an index error in the log.
    Why: training stops with a device-side assert. Or a padded matrix was resized down to the tokenizer, and rows are
    lost silently.
    Not: an embedding with more rows than the tokenizer has tokens, which is padding; a run that took steps, so that its
    embedding was resized: F06.
    Fix: use the original tokenizer, or in transformers `resize_token_embeddings(max(old, new))`.
    Wrong when: config.json has another `vocab_size` than the checkpoint.
    Source: transformers#24698, unsloth-zoo#923.
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
    return Finding.of(
        "F05",
        "error",
        message=f"The data contains tokens that the model has no embedding for: {facts.spelled(beyond.min())!r} is id "
        f"{beyond.min()}, and the embedding has {size:,} rows.",
        evidence={"largest_id": int(beyond.max()), "embedding_rows": size, "rows": train.places(rows)},
        affected=len(rows) / max(len(train.rows), 1),
        fix="use the original tokenizer of the model; added tokens need a base with a larger embedding",
    )


@rule("F05")
def embedding_too_small(run_facts: RunFacts) -> list[Signal]:
    """F05, from the saved adapter and the log: an embedding with fewer rows than the base's, and an index error."""
    signals = []
    rows, shape = saved_embedding_rows(run_facts), shape_of(run_facts)
    if rows is not None and shape is not None and rows < shape["vocabulary"]:
        says = f"the embedding was saved with {rows:,} rows, but the base has {shape['vocabulary']:,}"
        signals.append(Signal("F05", "invariant", says, 0.85, {"rows": rows, "base": shape["vocabulary"]}, fix=_RESIZE))
    if line := has_error(run_facts, r"index out of range in self|device-side assert|srcIndex < srcSelectDimSize"):
        signals.append(Signal("F05", "measured", f"the run ended with this error: {line}", 0.6, {}, fix=_RESIZE))
    return signals


@rule("F05", otherwise=True, unless=took_steps)
def largest_id_beyond_embedding(run_facts: RunFacts) -> Signal | None:
    """F05, of rows without a known tokenizer."""
    beyond, shape = ids_beyond(run_facts), shape_of(run_facts)
    if beyond is None:
        return None
    size = shape["vocabulary"] if shape else 0
    says = f"the rows have id {beyond:,}, but the embedding has only {size:,} rows"
    return Signal("F05", "invariant", says, 0.9, {"largest": beyond, "rows": size}, fix=_RESIZE)


def ids_beyond(run_facts: RunFacts) -> int | None:
    """The largest id of the rows, if it does not fit the embedding of config.json and no larger one was saved."""
    shape = shape_of(run_facts)
    if shape is None:
        return None
    largest = max((int(row.input_ids.max()) for row in examples_of(run_facts)[:2000] if len(row.input_ids)), default=-1)
    rows = max(shape["vocabulary"], saved_embedding_rows(run_facts) or 0)
    return largest if largest >= rows else None


def saved_embedding_rows(run_facts: RunFacts) -> int | None:
    """Rows of the embedding that was saved with the adapter; None without one."""
    for name, tensor in (run_facts.saved.adapter if run_facts.saved else {}).items():
        if re.search(r"(embed_tokens|wte|word_embeddings|embed_in)(\.modules_to_save)?(\.\w+)?\.weight$", name):
            return int(tensor.shape[0])
    return None


@rule("F06", needs=("settings", "live"))
def untrained_embedding(run_facts: RunFacts) -> Signal | None:
    """F06: the data uses tokens whose embedding rows were never trained.

    Sees: ids in many rows whose embedding is zero or the mean of all rows (where new rows start), or an added token
    whose row is like the unused rows at the end of the matrix or like a fresh one, and unlike those of ordinary tokens,
    while neither `trainable_token_indices` nor `modules_to_save` nor an adapter covers the embedding; tokens that the
    base's own tokenizer does not have.
    Why: LoRA does not change embedding and head, so the model cannot tell the new token from others, and never writes
    it.
    Not: F07, where the marker is several ordinary ids; tokens that the base has but rarely used, which adapters in the
    layers can still learn; rows of the padding that no data uses.
    Fix: use tokens that the base model knows; or train the rows with PEFT: `trainable_token_indices: [...]`, or
    `modules_to_save: [embed_tokens, lm_head]`.
    Wrong when: the base itself has such rows (an untrained model).
    Source: peft#2376; trl warns when it clones a template.
    """
    if run_facts.live is None or covers_embedding(run_facts):
        return None
    live = run_facts.live()
    embedding = getattr(live.model, "get_input_embeddings", lambda: None)()
    weight = getattr(embedding, "weight", None)
    rows = [row.input_ids for row in examples_of(run_facts)[:500]] or [
        b["input_ids"].cpu().numpy() for b in live.batches
    ]
    if weight is None or weight.dim() != 2 or weight.requires_grad or not rows:
        return None
    used, counts = np.unique(np.concatenate([np.unique(row) for row in rows]), return_counts=True)
    often = used[(counts >= max(OFTEN * len(rows), min(3, len(rows)))) & (used < weight.shape[0])]
    untrained = untrained_rows(weight, often, run_facts.tokenizer, _spread(live.model))
    if not untrained:
        return None
    tokenizer = run_facts.tokenizer
    names = tokenizer.convert_ids_to_tokens(untrained[:3]) if tokenizer is not None else untrained[:3]
    share = float(np.mean([np.isin(row, untrained).any() for row in rows]))
    says = f"{share:.0%} of the rows use {', '.join(map(str, names))}, whose embedding was never trained and is not "
    says += "trained now"
    fix = f"use tokens that the base model knows, or in PEFT trainable_token_indices: {untrained[:8]}"
    return Signal("F06", "measured", says, 0.8, {"ids": untrained[:8]}, fix=fix, affected=share)


def _spread(model: Any) -> float:
    """The standard deviation with which this architecture makes new rows."""
    spread = getattr(model.config.get_text_config(), "initializer_range", None)
    return float(spread) if isinstance(spread, (int, float)) else 0.02


@rule("F06", needs=("settings", "model_config"))
def added_tokens_not_trained(run_facts: RunFacts) -> Signal | None:
    """F06, before the model is loaded: ids past the base's vocabulary, or past the last token of its own tokenizer, in
    the padding of the embedding."""
    shape, get = shape_of(run_facts), run_facts.settings.get
    if shape is None or covers_embedding(run_facts):
        return None
    grown, tokens = saved_embedding_rows(run_facts) or get("embedding_rows"), get("base_tokens")
    past = tokens if isinstance(tokens, int) else shape["vocabulary"]
    if past >= shape["vocabulary"] and not (isinstance(grown, int) and grown > shape["vocabulary"]):
        return None
    rows = examples_of(run_facts)[:2000]
    having = [
        row.input_ids[row.input_ids >= past] for row in rows if len(row.input_ids) and row.input_ids.max() >= past
    ]
    used = {int(i) for ids in having for i in ids}
    if not used:
        return None
    says = f"the rows use {len(used)} ids that were added to the base's {past:,}, whose embedding is not trained"
    fix = f"use tokens that the base model knows, or in PEFT trainable_token_indices: {sorted(used)[:8]}"
    share = len(having) / len(rows)
    return Signal("F06", "invariant", says, 0.85, {"ids": sorted(used)[:8]}, fix=fix, affected=share)


def covers_embedding(run_facts: RunFacts) -> bool:
    """Whether some setting trains the embedding."""
    get, config = run_facts.settings.get, run_facts.saved.adapter_config if run_facts.saved else {}
    listed = [get("modules_to_save"), config.get("modules_to_save"), targets(run_facts)]
    names = " ".join(str(name) for part in listed if part for name in ([part] if isinstance(part, str) else part))
    chosen = get("trainable_token_indices") or config.get("trainable_token_indices")
    return bool(chosen) or bool(re.search(r"embed_tokens|wte|word_embeddings|embed_in", names))


def untrained_rows(weight_VD: torch.Tensor, ids: np.ndarray, tokenizer: Any = None, spread: float = 0.02) -> list[int]:
    """The ids whose embedding is zero or near the mean of all rows, and added tokens with a row as nothing trained it.

    Control for the added tokens: rows that are certainly not trained (past the tokenizer's last token, else of the size
    that a fresh row has) and those of the ordinary tokens among `ids`, which certainly are.
    """
    import torch

    whole = weight_VD.detach().float()
    away_V = (whole - whole.mean(0)).norm(dim=1)
    usual = float(away_V.median())
    if usual == 0:
        return []
    chosen = torch.as_tensor(ids.astype(np.int64), device=whole.device)
    norm_V = whole.norm(dim=1)
    is_new = (away_V[chosen] < MEAN_LIKE * usual) | (norm_V[chosen] < 1e-3 * usual)
    added = set(tokenizer.added_tokens_decoder) if tokenizer is not None else set()
    is_added = torch.tensor([int(i) in added for i in ids], dtype=torch.bool, device=whole.device)
    if tokenizer is not None and is_added.any() and int((~is_added).sum()) >= NUM_KNOWN:
        unused = norm_V[len(tokenizer) :]
        fresh = norm_V.new_tensor([spread * whole.shape[1] ** 0.5])
        sizes = unused if len(unused) >= MIN_UNUSED else fresh
        low, high = float(sizes.min()) / ALIKE, float(sizes.max()) * ALIKE
        known = norm_V[chosen[~is_added]].quantile(norm_V.new_tensor([0.05, 0.95])).tolist()
        if high < known[0] or low > known[1]:  # else untrained rows cannot be told from trained ones
            is_new |= is_added & (norm_V[chosen] >= low) & (norm_V[chosen] <= high)
    return [int(i) for i in chosen[is_new].tolist()]


@rule("F07", needs=("rows",), probes=("P1",))
def markers_as_text(facts: RowFacts) -> Finding | None:
    """F07: the tokenizer splits the template's control tokens like ordinary text.

    Sees: texts such as `<|im_start|>` in the template that encode to several ids, if one of them ends answers or the
    tokenizer has its own chat tokens.
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
    if not split or not (unused or ends_with_text_marker(facts)):
        return None
    path = facts.settings.chat_template_path
    return Finding.of(
        "F07",
        "error" if ends_with_text_marker(facts) else "warning",
        message=f"The chat template writes {', '.join(split)}, which is not a token of this tokenizer and is "
        "split like any word.",
        evidence={"ids_per_marker": split, "own_tokens_not_used": unused[:8], "chat_template_path": path},
        affected=1.0,
        fix=(f"remove `chat_template_path: {path}`" if path else "set chat_template_path to a template")
        + (f" that uses the tokenizer's own tokens ({', '.join(unused[:4])})" if unused and not path else "")
        + ("" if unused else ", or end answers with {{ eos_token }}"),
    )


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
