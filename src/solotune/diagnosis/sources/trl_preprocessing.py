"""What TRL's SFTTrainer makes of rows, made again: its rendering, labels, truncation, packing and batches.

    told = arguments({"completion_only_loss": None, "max_length": 64, ...})     of training_args.bin, or of a config
    made = prepare("chats.jsonl", "train", tokenizer, told)                     None: rows that it would not have taken

So a mask, a cut or a pack is seen as it was there, where another reading of the same rows would hide it: TRL learns the
completion of prompt-completion rows and every token of others, whatever `completion_only_loss` says; it cuts
(`keep_start`, `keep_end`), drops what has no label left, and `wrapped` packs have no boundaries.

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
from solotune.dataset.readers.source import Source
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
"""SFTConfig's, of trl 1.16, in what concerns rows."""
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Made:
    """The rows as they were trained on, and what became of those that were not."""

    examples: list[Example]
    rows_in: int
    learns_answers: bool
    """Whether answers alone were to be learned: by the settings, or since TRL does so with such rows."""


def arguments(found: Mapping[str, Any]) -> dict[str, Any]:
    """Of all arguments those that concern rows, with TRL's defaults where nothing is said."""
    return {key: found.get(key, default) for key, default in DEFAULTS.items()}


def prepare(dataset: Any, split: str, tokenizer: Any, told: Mapping[str, Any]) -> Made | None:
    """The rows as TRL makes them; None where it makes them in a way that is not known from here (a dataset of ids, a
    formatting function, a training template of its own), or would have refused."""
    if (told["dataset_kwargs"] or {}).get("skip_prepare_dataset"):
        return None
    lacks_marker = not _MARKER.search(str(getattr(tokenizer, "chat_template", None) or ""))
    if told["assistant_only_loss"] and lacks_marker:
        return None  # it then takes a training template of its own
    try:
        rows = list(islice(Source.of("dataset", dataset, split), NUM_ROWS))
    except (SolotuneError, OSError, ValueError):
        return None
    if not rows:
        return None
    has_completion = {"prompt", "completion"} <= rows[0].values.keys()
    asked = told["completion_only_loss"]
    by_completion = has_completion if asked is None else bool(asked)
    examples = []
    for row in rows:
        try:
            made = _example(row.values, row.where, tokenizer, told, by_completion and has_completion)
        except Exception:  # templates refuse in their own words; then TRL had refused
            return None
        if made is None:
            return None
        if (made := _cut(made, told)) is not None:
            examples.append(made)
    learns_answers = by_completion or bool(told["assistant_only_loss"])
    return Made(examples, len(rows), learns_answers) if examples else None


def _chat(value: Any) -> list[dict[str, Any]] | None:
    """Messages as TRL renames their keys; roles stay as they are written."""
    if not isinstance(value, list) or not value or not all(isinstance(one, Mapping) for one in value):
        return None
    return [
        {**message, "role": message.get("role", message.get("from")),
         "content": message.get("content", message.get("value"))}
        for message in value
    ]  # fmt: skip


def _example(
    row: Mapping[str, Any], where: str, tokenizer: Any, told: Mapping[str, Any], by_completion: bool
) -> Example | None:
    """Ids and labels of one row, before anything is cut; None where TRL would find nothing in it."""
    marked = bool(told["assistant_only_loss"])
    if "prompt" in row and "completion" in row:
        asked, answered = _chat(row["prompt"]), _chat(row["completion"])
        if asked and answered:
            prompt, _ = _ids(tokenizer, asked, add_generation_prompt=True)
            ids, mask = _ids(tokenizer, [*asked, *answered], marked)
            messages = [*asked, *answered]
        elif isinstance(row["prompt"], str) and isinstance(row["completion"], str):
            completion = _ended(row["completion"], tokenizer)
            prompt, ids = tokenizer(row["prompt"])["input_ids"], tokenizer(row["prompt"] + completion)["input_ids"]
            mask, messages = None, []
        else:
            return None
        learned = np.arange(len(ids)) >= (_common(prompt, ids) if by_completion else 0)
    else:
        chat = _chat(row.get("messages")) or _chat(row.get("conversations"))
        text = row.get(told["dataset_text_field"])
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
    """How many ids they begin with alike: where TRL lets the completion begin."""
    unlike = (i for i, (one, other) in enumerate(zip(prompt, ids, strict=False)) if one != other)
    return next(unlike, min(len(prompt), len(ids)))


def _ended(text: str, tokenizer: Any) -> str:
    """What is no chat gets the end of text, where it does not have it."""
    end = tokenizer.eos_token or ""
    return text if text.endswith(end) else text + end


def _ids(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], marked: bool = False, **options: Any
) -> tuple[list[int], list[int] | None]:
    """By the template: ids, and what stands between its markers."""
    out = tokenizer.apply_chat_template(
        list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=marked, **options
    )
    return out["input_ids"], out["assistant_masks"] if marked else None


def _cut(row: Example, told: Mapping[str, Any]) -> Example | None:
    """At `max_length`, on the side that was asked for; None where no label is left (packing drops none)."""
    limit, is_packed = told["max_length"], bool(told["packing"])
    if not isinstance(limit, int) or (is_packed and told["packing_strategy"] != "bfd"):
        return row
    kept = slice(-limit, None) if told["truncation_mode"] == "keep_end" and not is_packed else slice(limit)
    cut = Example(row.input_ids[kept], row.loss_mask[kept], row.where, row.messages)
    return cut if is_packed or cut.loss_mask.any() else None


# --- batches


def batches_of(
    rows: Sequence[Example], tokenizer: Any, told: Mapping[str, Any], size: int, count: int = NUM_BATCHES
) -> list[dict[str, torch.Tensor]]:
    """The first micro-batches of a shuffled epoch, as TRL's collator makes them.

    Args:
        size: rows (or packs) of a micro-batch.
    """
    order = np.random.default_rng(0).permutation(len(rows))
    if not told["packing"]:
        lines = [[_pair(rows[i])] for i in order[: count * size]]
    elif told["packing_strategy"] == "wrapped":
        lines = _wrapped([_pair(rows[i]) for i in order], told["max_length"], count * size)
    else:
        chosen = [part for i in order for part in _parts(_pair(rows[i]), told["max_length"])]
        lines = _best_fit(chosen, told["max_length"])[: count * size]
    flat = told["padding_free"] or (told["packing"] and told["packing_strategy"] != "wrapped")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    chunks = [lines[i : i + size] for i in range(0, len(lines), size)]
    return [_flat(chunk) if flat else _padded(chunk, pad) for chunk in chunks if chunk]


Pair = tuple[np.ndarray, np.ndarray]
"""int64 ids and labels of a stretch."""


def _pair(row: Example) -> Pair:
    ids = row.input_ids.astype(np.int64)
    return ids, np.where(row.loss_mask, ids, IGNORED)


def _parts(pair: Pair, limit: int) -> list[Pair]:
    """What `bfd_split` makes of a row that is longer than a pack."""
    return [(pair[0][i : i + limit], pair[1][i : i + limit]) for i in range(0, len(pair[0]), limit)]


def _wrapped(pairs: Sequence[Pair], limit: int, count: int) -> list[list[Pair]]:
    """All rows one behind the other, cut wherever a pack is full."""
    ids, labels = (np.concatenate([pair[side] for pair in pairs]) for side in (0, 1))
    return [[part] for part in _parts((ids, labels), limit)[:count]]


def _best_fit(pairs: Sequence[Pair], limit: int) -> list[list[Pair]]:
    """The longest first, each into the pack with the least room that is enough."""
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
    """Without padding: one line of all rows, whose positions begin anew; the first token of each is no label."""
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
    """Padded on the right, whatever the tokenizer's side; what is padding is masked by its place."""
    longest = max(len(line[0][0]) for line in chunk)
    ids_BT = torch.full((len(chunk), longest), pad)
    labels_BT, mask_BT = torch.full_like(ids_BT, IGNORED), torch.zeros_like(ids_BT)
    for b, [(ids, labels)] in enumerate(chunk):
        ids_BT[b, : len(ids)], labels_BT[b, : len(ids)] = torch.as_tensor(ids), torch.as_tensor(labels)
        mask_BT[b, : len(ids)] = 1
    return {"input_ids": ids_BT, "labels": labels_BT, "attention_mask": mask_BT}
