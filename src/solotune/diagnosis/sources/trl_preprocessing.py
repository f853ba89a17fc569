"""Reproduce the preprocessing of TRL's SFTTrainer: rendering, labels, truncation, packing and batches.

    sft = arguments({"completion_only_loss": None, "max_length": 64, ...})     of training_args.bin, or of a config
    made = prepare("chats.jsonl", "train", tokenizer, sft)                     None: rows that TRL would not accept

So loss masks, truncation and packing are those of the training; another way to read the rows would hide their faults.
TRL trains on the completion of prompt-completion rows and on every token of other rows, whatever `completion_only_loss`
says; it truncates (`keep_start`, `keep_end`), drops rows without a label, and `wrapped` packs have no boundaries.

Source: trl 1.16, trainer/sft_trainer.py (`_prepare_dataset`, `DataCollatorForLanguageModeling`), trainer/sft_config.py
(defaults), data_utils.py (`maybe_convert_to_chatml`, `pack_dataset`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from solotune.dataset import Example
from solotune.dataset.chat.template import render_chat
from solotune.dataset.readers.source import Source
from solotune.diagnosis.facts.rendered_chats import marked_ids
from solotune.diagnosis.facts.rows import plain_messages
from solotune.diagnosis.facts.texts import IGNORED
from solotune.errors import SolotuneError

NUM_ROWS = 5000
NUM_BATCHES = 8
DEFAULTS: dict[str, Any] = {
    "completion_only_loss": None,
    "assistant_only_loss": False,
    "max_length": 1024,
    "truncation_mode": "keep_start",
    "packing": False,
    "packing_strategy": "bfd",
    "padding_free": False,
    "dataset_text_field": "text",
    "dataset_kwargs": None,
}
"""Defaults of SFTConfig in trl 1.16 for keys that concern rows."""
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Made:
    """The rows as trained on, and the number of rows before."""

    examples: list[Example]
    rows_in: int
    learns_answers: bool
    """Whether only answers have labels: by the settings, or by TRL's default for such rows."""


_TYPES: dict[str, tuple[type, ...]] = {
    "completion_only_loss": (bool, type(None)),
    "max_length": (int, type(None)),
    "dataset_kwargs": (dict, type(None)),
}
"""Types of the keys whose default does not say it."""


def arguments(found: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that concern rows; TRL's default where one is missing or has a type that TRL would not accept."""
    kept = {}
    for key, default in DEFAULTS.items():
        value = found.get(key, default)
        fits = isinstance(value, _TYPES.get(key, (type(default),))) and (key != "max_length" or _is_length(value))
        kept[key] = value if fits else default
    return kept


def _is_length(value: Any) -> bool:
    return value is None or (not isinstance(value, bool) and 0 < value <= 100_000_000)


def prepare(dataset: Any, split: str, tokenizer: Any, sft: Mapping[str, Any]) -> Made | None:
    """The rows as TRL makes them; None if TRL would refuse them, or makes them in a way that is not known here (a
    dataset of ids, a formatting function, a training template of its own)."""
    if (sft["dataset_kwargs"] or {}).get("skip_prepare_dataset"):
        return None
    lacks_marker = not _MARKER.search(str(getattr(tokenizer, "chat_template", None) or ""))
    if sft["assistant_only_loss"] and lacks_marker:
        return None  # TRL then uses its own training template
    try:
        rows = list(islice(Source.of("dataset", dataset, split), NUM_ROWS))
    except (SolotuneError, OSError, ValueError):
        return None
    if not rows:
        return None
    has_completion = {"prompt", "completion"} <= rows[0].values.keys()
    completion_only = sft["completion_only_loss"]
    by_completion = has_completion if completion_only is None else bool(completion_only)
    examples = []
    for row in rows:
        try:
            made = _example(row.values, row.where, tokenizer, sft, by_completion and has_completion)
        except Exception:  # templates raise any error; TRL would fail too
            return None
        if made is None:
            return None
        if (made := _cut(made, sft)) is not None:
            examples.append(made)
    learns_answers = by_completion or bool(sft["assistant_only_loss"])
    return Made(examples, len(rows), learns_answers) if examples else None


def _chat(value: Any) -> list[dict[str, Any]] | None:
    """Messages with their keys renamed as TRL does; roles as written."""
    if not isinstance(value, list) or not value or not all(isinstance(one, Mapping) for one in value):
        return None
    return [
        {**message, "role": message.get("role", message.get("from")),
         "content": message.get("content", message.get("value"))}
        for message in value
    ]  # fmt: skip


def _example(
    row: Mapping[str, Any], where: str, tokenizer: Any, sft: Mapping[str, Any], by_completion: bool
) -> Example | None:
    """Ids and labels of one row before truncation; None if TRL would find no text in it."""
    marked = bool(sft["assistant_only_loss"])
    if "prompt" in row and "completion" in row:
        prompt_chat, completion_chat = _chat(row["prompt"]), _chat(row["completion"])
        if prompt_chat and completion_chat:
            prompt, _ = _ids(tokenizer, prompt_chat, is_prompt=True)
            ids, mask = _ids(tokenizer, [*prompt_chat, *completion_chat], marked)
            messages = [*prompt_chat, *completion_chat]
        elif isinstance(row["prompt"], str) and isinstance(row["completion"], str):
            completion = _ended(row["completion"], tokenizer)
            prompt, ids = tokenizer(row["prompt"])["input_ids"], tokenizer(row["prompt"] + completion)["input_ids"]
            mask, messages = None, []
        else:
            return None
        learned = np.arange(len(ids)) >= (_common(prompt, ids) if by_completion else 0)
    else:
        chat = _chat(row.get("messages")) or _chat(row.get("conversations"))
        text = row.get(sft["dataset_text_field"])
        if chat:
            (ids, mask), messages = _ids(tokenizer, chat, marked), chat
        elif isinstance(text, str):
            ids, mask, messages = tokenizer(_ended(text, tokenizer))["input_ids"], None, []
        else:
            return None
        learned = np.ones(len(ids), bool)
    if mask is not None:
        learned &= np.asarray(mask, bool)
    return Example(np.asarray(ids, np.int32), learned, where, plain_messages(messages))


def _common(prompt: Sequence[int], ids: Sequence[int]) -> int:
    """Number of equal ids at the start; there TRL lets the completion begin."""
    unlike = (i for i, (one, other) in enumerate(zip(prompt, ids, strict=False)) if one != other)
    return next(unlike, min(len(prompt), len(ids)))


def _ended(text: str, tokenizer: Any) -> str:
    """The text with the end-of-text token; added if missing (only for rows that are not chats)."""
    end = tokenizer.eos_token or ""
    return text if text.endswith(end) else text + end


def _ids(
    tokenizer: Any, messages: Sequence[dict[str, Any]], marked: bool = False, is_prompt: bool = False
) -> tuple[list[int], list[bool] | None]:
    """Ids by the template, and the mask of its generation markers."""
    if marked:
        return marked_ids(tokenizer, messages)
    text = render_chat(tokenizer, list(messages), is_prompt=is_prompt)
    return tokenizer(text, add_special_tokens=False)["input_ids"], None


def _cut(row: Example, sft: Mapping[str, Any]) -> Example | None:
    """The row truncated to `max_length` on the configured side; None if no label is left (packing drops none)."""
    limit, is_packed = sft["max_length"], bool(sft["packing"])
    if not isinstance(limit, int) or (is_packed and sft["packing_strategy"] != "bfd"):
        return row
    kept = slice(-limit, None) if sft["truncation_mode"] == "keep_end" and not is_packed else slice(limit)
    cut = Example(row.input_ids[kept], row.loss_mask[kept], row.where, row.messages)
    return cut if is_packed or cut.loss_mask.any() else None


# --- batches


def batches_of(
    rows: Sequence[Example], tokenizer: Any, sft: Mapping[str, Any], size: int, count: int = NUM_BATCHES
) -> list[dict[str, torch.Tensor]]:
    """The first micro-batches of a shuffled epoch, as TRL's collator makes them.

    Args:
        size: rows (or packs) of a micro-batch.
    """
    order = np.random.default_rng(0).permutation(len(rows))
    if not sft["packing"]:
        lines = [[_pair(rows[i])] for i in order[: count * size]]
    elif sft["packing_strategy"] == "wrapped":
        lines = _wrapped([_pair(rows[i]) for i in order], sft["max_length"], count * size)
    else:
        chosen = [part for i in order for part in _parts(_pair(rows[i]), sft["max_length"])]
        lines = _best_fit(chosen, sft["max_length"])[: count * size]
    flat = sft["padding_free"] or (sft["packing"] and sft["packing_strategy"] != "wrapped")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    chunks = [lines[i : i + size] for i in range(0, len(lines), size)]
    return [_flat(chunk) if flat else _padded(chunk, pad) for chunk in chunks if chunk]


Pair = tuple[np.ndarray, np.ndarray]
"""int64 ids and labels of consecutive tokens."""


def _pair(row: Example) -> Pair:
    ids = row.input_ids.astype(np.int64)
    return ids, np.where(row.loss_mask, ids, IGNORED)


def _parts(pair: Pair, limit: int) -> list[Pair]:
    """Parts of a row that is longer than a pack, as `bfd_split` makes them."""
    return [(pair[0][i : i + limit], pair[1][i : i + limit]) for i in range(0, len(pair[0]), limit)]


def _wrapped(pairs: Sequence[Pair], limit: int, count: int) -> list[list[Pair]]:
    """All rows concatenated, and cut wherever a pack is full."""
    ids, labels = (np.concatenate([pair[side] for pair in pairs]) for side in (0, 1))
    return [[part] for part in _parts((ids, labels), limit)[:count]]


def _best_fit(pairs: Sequence[Pair], limit: int) -> list[list[Pair]]:
    """Best fit decreasing: longest rows first, each into the fullest pack with enough room."""
    packs: list[list[Pair]] = []
    room: list[int] = []
    for pair in sorted(pairs, key=lambda pair: -len(pair[0])):
        fits = [i for i, left in enumerate(room) if left >= len(pair[0])]
        if not fits:
            packs.append([])
            room.append(limit)
            fits = [len(packs) - 1]
        best = min(fits, key=lambda i: room[i])
        packs[best].append(pair)
        room[best] -= len(pair[0])
    return packs


def _flat(chunk: Sequence[Sequence[Pair]]) -> dict[str, torch.Tensor]:
    """Without padding: all rows in one sequence, positions restart for each; the first token of each has no label."""
    pairs = [pair for line in chunk for pair in line]
    positions = torch.cat([torch.arange(len(ids)) for ids, _ in pairs])[None]
    labels = torch.as_tensor(np.concatenate([labels for _, labels in pairs]))[None]
    labels[positions == 0] = IGNORED
    return {
        "input_ids": torch.as_tensor(np.concatenate([ids for ids, _ in pairs]))[None],
        "labels": labels,
        "position_ids": positions,
    }


def _padded(chunk: Sequence[Sequence[Pair]], pad: int) -> dict[str, torch.Tensor]:
    """Padded on the right, whatever the tokenizer's side; padding is masked by position."""
    longest = max(len(line[0][0]) for line in chunk)
    ids_BT = torch.full((len(chunk), longest), pad)
    labels_BT, mask_BT = torch.full_like(ids_BT, IGNORED), torch.zeros_like(ids_BT)
    for b, [(ids, labels)] in enumerate(chunk):
        ids_BT[b, : len(ids)], labels_BT[b, : len(ids)] = torch.as_tensor(ids), torch.as_tensor(labels)
        mask_BT[b, : len(ids)] = 1
    return {"input_ids": ids_BT, "labels": labels_BT, "attention_mask": mask_BT}
