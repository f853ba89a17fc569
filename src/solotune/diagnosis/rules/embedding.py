"""S2, the rows of the embedding: F05 and F06."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from solotune.dataset.chat.control_tokens import any_of
from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.derived import has_error, shape_of, targets
from solotune.diagnosis.facts.row_arrays import NUM_DECODED, is_pattern
from solotune.diagnosis.facts.row_facts import RowFacts
from solotune.diagnosis.facts.rows import examples_of
from solotune.diagnosis.findings import Finding
from solotune.diagnosis.rules import rule
from solotune.diagnosis.run_facts import RunFacts

if TYPE_CHECKING:
    import torch

MEAN_LIKE = 0.1
"""Distance from the mean embedding / usual distance: transformers starts new rows at the mean, with a scatter of
1e-9."""
OFTEN = 0.05
"""Share of the rows: a token of fewer is a rare one, not a marker."""
NUM_KNOWN, MIN_UNUSED, ALIKE = 20, 4, 1.2
"""Ordinary tokens and unused rows that are needed to compare with; the size of a row like them, as a factor."""
MOST_LIKE = 0.5
"""Share of the ordinary tokens of the rows whose head is like that of unused rows: more, and nothing is known."""

_RESIZE = "in transformers: model.resize_token_embeddings(max(len(tokenizer), model.config.vocab_size))"


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
        return _spelled_beyond(facts, size)
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


def _spelled_beyond(facts: RowFacts, size: int) -> Finding | None:
    """Messages that spell tokens without an embedding: text here, a token to other tools and engines."""
    added = facts.tokenizer.added_tokens_decoder
    beyond = {token.content: index for index, token in added.items() if index >= size}
    pattern = any_of(beyond)
    chats = {row: [m["content"] for m in facts.train.rows[row].messages] for row in facts.chats} if beyond else {}
    rows = [row for row, texts in chats.items() if any(map(pattern.search, texts))]
    if not is_pattern(len(rows), len(chats), OFTEN):
        return None
    token = next(match[0] for text in chats[rows[0]] if (match := pattern.search(text)))
    return Finding.of(
        "F05",
        "error",
        message=f"The messages spell tokens that the model has no embedding for: {token!r} is id {beyond[token]}, and "
        f"the embedding has {size:,} rows. solotune keeps it as text; what serves the model turns it into the token.",
        evidence={"token": token, "id": beyond[token], "embedding_rows": size, "rows": facts.train.places(rows)},
        affected=len(rows) / len(chats),
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
def untrained_embedding(run_facts: RunFacts) -> list[Signal]:
    """F06: the data uses tokens whose embedding rows were never trained.

    Sees: ids in many rows whose embedding is zero or the mean of all rows (where new rows start), or an added token
    whose row is like the unused rows at the end of the matrix or like a fresh one, and unlike those of ordinary tokens,
    while neither `trainable_token_indices` nor `modules_to_save` nor an adapter covers the embedding; tokens that the
    base's own tokenizer does not have. Spellings of such tokens in the messages count: other tools, and engines that
    serve the model, turn them into the token.
    Why: LoRA does not change embedding and head, so the model cannot tell the new token from others, and never writes
    it.
    Not: F07, where the marker is several ordinary ids; tokens that the base has but rarely used, which adapters in the
    layers can still learn; rows of the padding that no data uses; the padding's own row, which is zero by design.
    Fix: use tokens that the base model knows; or train the rows with PEFT: `trainable_token_indices: [...]`, or
    `modules_to_save: [embed_tokens, lm_head]`.
    Wrong when: the base itself has such rows (an untrained model). Control: rows that no token has, and those of
    ordinary tokens; of a token that the model was taught to write, the head's row is unlike theirs.
    Source: peft#2376; trl warns when it clones a template; "Fishing for Magikarp" (2024) finds such rows by the head.
    """
    if run_facts.live is None or covers_embedding(run_facts):
        return []
    live = run_facts.live()
    embedding = getattr(live.model, "get_input_embeddings", lambda: None)()
    weight = getattr(embedding, "weight", None)
    rows = [row.input_ids for row in examples_of(run_facts)[:500]] or [
        b["input_ids"].cpu().numpy() for b in live.batches
    ]
    if weight is None or weight.dim() != 2 or weight.requires_grad or not rows:
        return []
    spelled = spelled_tokens(run_facts)
    used, counts = np.unique(np.concatenate([np.unique(row) for row in rows]), return_counts=True)
    often = set(used[counts >= max(OFTEN * len(rows), min(3, len(rows)))].tolist())
    often |= {index for index, having in spelled.items() if is_pattern(len(having), len(rows), OFTEN)}
    often -= {getattr(embedding, "padding_idx", None)}
    chosen = np.array(sorted(i for i in often if i < weight.shape[0]), np.int64)
    head = getattr(getattr(live.model, "get_output_embeddings", lambda: None)(), "weight", None)
    untrained = untrained_rows(weight, chosen, run_facts.tokenizer, _spread(live.model), head)
    if not untrained:
        return []
    tokenizer = run_facts.tokenizer
    names = tokenizer.convert_ids_to_tokens(untrained[:3]) if tokenizer is not None else untrained[:3]
    having = {n for n, row in enumerate(rows) if np.isin(row, untrained).any()}.union(
        *map(spelled.get, untrained, [()] * len(untrained))
    )
    share = len(having) / len(rows)
    says = f"{share:.0%} of the rows use {', '.join(map(str, names))}, whose embedding was never trained and is not "
    says += "trained now"
    fix = f"use tokens that the base model knows, or in PEFT trainable_token_indices: {untrained[:8]}"
    found = [Signal("F06", "measured", says, 0.8, {"ids": untrained[:8]}, fix=fix, affected=share)]
    if _end_of_answers(run_facts) in untrained:
        says = "the end of the answers is a token that was never trained (F06): with it among the stop ids, the model "
        found.append(Signal("F14", "measured", says + "would not write it either", 0.8, {}, against=True))
    return found


def spelled_tokens(run_facts: RunFacts) -> dict[int, set[int]]:
    """Added token -> numbers of the rows in whose messages it is spelled.

    solotune keeps such a spelling as text, other tools turn it into the token.
    """
    tokenizer, rows = run_facts.tokenizer, list(run_facts.train[:500])
    if tokenizer is None or not rows:
        return {}
    ids = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    pattern = any_of(ids)
    found: dict[int, set[int]] = {}
    for number, row in enumerate(rows):
        for token in {token for message in row.messages for token in pattern.findall(message["content"])}:
            found.setdefault(ids[token], set()).add(number)
    return found


def _end_of_answers(run_facts: RunFacts) -> int | None:
    """The most frequent last label of the rows."""
    last = [int(row.input_ids[row.loss_mask][-1]) for row in examples_of(run_facts)[:500] if row.loss_mask.any()]
    return max(set(last), key=last.count, default=None)


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
    grown, base = saved_embedding_rows(run_facts) or get("embedding_rows"), run_facts.base_tokenizer
    past = len(base) if base is not None else shape["vocabulary"]
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


def untrained_rows(
    weight_VD: torch.Tensor,
    ids: np.ndarray,
    tokenizer: Any = None,
    spread: float = 0.02,
    head_VD: torch.Tensor | None = None,
) -> list[int]:
    """The ids whose embedding is zero or near the mean of all rows, and added tokens with a row as nothing trained it.

    Control for the added tokens: rows that are certainly not trained (past the tokenizer's last token, else of the size
    that a fresh row has) and those of the ordinary tokens among `ids`, which certainly are.

    Args:
        head_VD: the output head: training pushes the rows of all tokens that it never sees in one direction.
    """
    import torch

    whole = weight_VD.detach().float()
    away_V = (whole - whole.mean(0)).norm(dim=1)
    usual = float(away_V.median())
    if usual == 0 or not len(ids):
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
        if head_VD is not None and len(unused) >= MIN_UNUSED:
            like_unused = _like_unused(head_VD, chosen, len(tokenizer), ~is_added)
            is_new = (is_new & (like_unused | ~is_added)) | (like_unused & is_added)
    return [int(i) for i in chosen[is_new].tolist()]


def _like_unused(head_VD: torch.Tensor, chosen: torch.Tensor, num_tokens: int, is_known: torch.Tensor) -> torch.Tensor:
    """bool, one per chosen id: the head's row has the direction and size of the rows that no token has; none, if the
    ordinary tokens' rows have it too."""
    import torch

    head = head_VD.detach().float()
    rows = head - head.mean(0)
    unused = rows[num_tokens:]
    others = (unused.sum(0) - unused) / (len(unused) - 1)  # of each, without itself
    least = torch.nn.functional.cosine_similarity(unused, others).min()
    size = unused.norm(dim=1).max() * ALIKE
    is_like = torch.nn.functional.cosine_similarity(rows[chosen], unused.mean(0)[None]) >= least
    is_like &= rows[chosen].norm(dim=1) <= size
    return is_like & bool(is_like[is_known].float().mean() < MOST_LIKE)
