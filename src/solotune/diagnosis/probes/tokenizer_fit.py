"""Part of P1: does the model know the ids of this tokenizer?

Plain text that costs as much as the same text with randomly swapped ids is noise to the model: another tokenizer (F04),
or text that is new to it. Controls tell which:

    everyday English
    text that the model generates itself: with the right tokenizer it survives decoding and encoding again
    how often the model expects each id, on average over a text: with the right tokenizer that fits the ids of any text,
    and no move of all ids by a few places fits better; a tokenizer with more or fewer tokens in front is such a move
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

import numpy as np
import torch

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.base_tokenizer import changed_ids
from solotune.diagnosis.facts.roles import Roles
from solotune.diagnosis.probes.probed_model import device_of, logits_of, token_losses
from solotune.diagnosis.run_facts import LiveModel, RunFacts

NUM_SAMPLES, NUM_DRAWN, KEPT = 8, 32, 0.9  # clean models keep all, a wrong tokenizer 0.7
CALM = 0.6  # temperature: what the model is sure of
REWRITTEN, UNSURE = 0.95, 0.4
"""Share of the tokens that a model writes which survive decoding and encoding (ten clean models keep 0.98 and more;
with moved ids 0.55 to 0.98), where plain text costs more than this part of swapped ids."""
BEYOND_CHANCE = 0.5
"""Of the tokens that random text loses, the part that the model's own keeps: a clean base that was changed keeps 0.73
(PiSSA takes the largest directions out of it), one with another tokenizer next to none."""
NO_TEXT = 0.85  # plain text against swapped ids; clean models show 0.2 to 0.6
EXPECTED = 1.0  # nats a token of its own headers, for a model that was trained on its template
KNOWN = 0.7  # plain text against swapped ids: text that the model knows
NUM_MOVES, NUM_TEXTS, LONGEST = 64, 8, 256
"""For the frequency of ids: places to move them by (at most a quarter of the ids), texts, and tokens of a text."""
FITS_BETTER, FITS = 0.5, 0.3  # nats an id, by which moved ids fit better; clean models show 0.2 at most (JSON)
EVERYDAY = (
    "The weather was good today, so we went to the park and had lunch there with our friends.",
    "In the first year of the war the government of the United States did not change its position.",
    "She opened the door and said that she would be back in a few minutes.",
)
"""Sentences that every model of general text knows."""


def controls_of_text(
    live: LiveModel, roles: Roles, swapped: np.ndarray, texts: Sequence[Sequence[int] | np.ndarray]
) -> dict[str, Any]:
    """Controls for text that is noise to the model; `swapped` is a random permutation of the ids."""
    found: dict[str, Any] = {}
    everyday = [ids for text in EVERYDAY if max(ids := roles.encode(text)) < len(swapped)]
    losses = [[mean_loss(live, ids), mean_loss(live, swapped[ids])] for ids in everyday]
    found["everyday_text"], found["everyday_swapped"] = map(float, np.mean(losses, 0)) if losses else (1.0, 1.0)
    plain = [roles.encode(roles.decode(np.asarray(ids))) for ids in texts[:NUM_TEXTS]]
    return found | _frequencies(live, roles, [*plain, *everyday], len(swapped))


def own_text(
    live: LiveModel, roles: Roles, swapped: np.ndarray, texts: Sequence[Sequence[int] | np.ndarray]
) -> dict[str, Any]:
    """How much of what the base writes survives decoding and encoding again, and the same with swapped ids: a model
    writes texts as its own tokenizer splits them, whatever it knows."""
    assert roles.tokenizer is not None
    special = roles.tokenizer.added_tokens_decoder
    ids = [int(i) for ids in texts[:NUM_SAMPLES] for i in ids if int(i) not in special and int(i) < len(swapped)]
    if len(ids) < NUM_SAMPLES:
        return {}
    first = np.random.default_rng(0).choice(ids, NUM_SAMPLES, replace=False)
    written = [
        [i for i in ids if i not in special and i < len(swapped) and _is_written(roles.tokenizer, i)]
        for ids in _written(live, first.tolist())
    ]
    if sum(map(len, written)) < NUM_DRAWN:
        return {}
    again = [[int(swapped[i]) for i in ids] for ids in written]
    return {"own_text_kept": _kept(roles, written), "any_text_kept": _kept(roles, again)}


def _is_written(tokenizer: Any, index: int) -> bool:
    """Whether the tokenizer writes this id for its own piece of text. The id of a marker that was lost (F07) stands for
    no text, so that it tells nothing about how text is split."""
    if not tokenizer.is_fast:
        return True
    piece = tokenizer.convert_ids_to_tokens(index)
    pieces = tokenizer.backend_tokenizer.model.tokenize(piece) if piece else []
    return len(pieces) == 1 and pieces[0].id == index


def mean_loss(live: LiveModel, ids: Sequence[int] | np.ndarray) -> float:
    return float(token_losses(live.model, ids, np.arange(1, len(ids))).mean())


def _frequencies(live: LiveModel, roles: Roles, texts: Sequence[Sequence[int]], size: int) -> dict[str, Any]:
    """Mean log of the chance that the model gives to the ids of some texts, on average over all of their places: with
    the ids as they are, and moved by the number of places that fits best."""
    assert roles.tokenizer is not None
    counts_V, chances_V, seen = np.zeros(size), np.zeros(size), 0
    for ids in texts:
        ids = [i for i in ids if i < size][:LONGEST]
        if len(ids) < 3:
            continue
        np.add.at(counts_V, ids, 1)
        inputs = torch.tensor([ids], device=device_of(live.model))
        chances_TV = logits_of(live.model, {"input_ids": inputs})[0].float().softmax(-1)
        chances_V += chances_TV.sum(0).double().cpu().numpy()[:size]
        seen += len(ids)
    special = [i for i in roles.tokenizer.added_tokens_decoder if i < size]
    counts_V, log_V = np.delete(counts_V, special), np.log(np.delete(chances_V, special) / max(seen, 1) + 1e-9)
    most = min(NUM_MOVES, len(log_V) // 4)
    if not counts_V.any() or not most:
        return {}
    moves = [move for move in range(-most, most + 1) if move]
    fits = [float((counts_V * np.roll(log_V, -move)).sum() / counts_V.sum()) for move in (0, *moves)]
    best = int(np.argmax(fits[1:]))
    return {"ids_fit": fits[0], "moved_ids_fit": fits[1 + best], "moved_by": moves[best]}


def tokenizer_signals(run_facts: RunFacts, found: dict[str, Any]) -> list[Signal]:
    """F04 by the loss of plain text, or evidence against it; where it is F04, its markers are no fault of their own."""
    signal = _tokenizer(found)
    if signal is None:
        return []
    if not signal.against:
        says = "plain text without any marker is noise to the model too (F04)"
        is_clear = signal.weight > 0.5 and is_no_text(found)
        return [signal, Signal("F07", "measured", says, 0.8, against=True)] if is_clear else [signal]
    changed_V = changed_ids(run_facts)
    return [signal] if changed_V is None or not changed_V.any() else []  # else it is known that some ids are others


def may_be_no_text(found: dict[str, Any]) -> bool:
    """Worse than guessing, and not much better than with swapped ids: the controls tell."""
    plain = found["plain_text"]
    return is_no_text(found) or (plain > KNOWN * found["ids_swapped"] and plain > 1.05 * found["log_v"])


def _is_all_noise(found: dict[str, Any]) -> bool:
    """The rows, everyday English, and the header of the tokenizer's own template are worse than guessing, or as bad as
    swapped ids. Control: a model knows one of them, whatever the rows are."""
    markers, everyday = found.get("own_markers"), found.get("everyday_text")
    if markers is None or everyday is None or not may_be_no_text(found):
        return False
    return markers > found["log_v"] and everyday > NO_TEXT * found["everyday_swapped"]


def is_no_text(found: dict[str, Any]) -> bool:
    plain, swapped = found["plain_text"], found["ids_swapped"]
    return plain > NO_TEXT * swapped and plain > 1.05 * found["log_v"]


def _written(live: LiveModel, first: Sequence[int]) -> list[list[int]]:
    """Tokens that the base generates after these first ids, sampled."""
    ids_BT = torch.tensor([[int(i)] for i in first], device=device_of(live.model))
    generator = torch.Generator().manual_seed(0)
    for _ in range(NUM_DRAWN):
        chances_BV = (logits_of(live.model, {"input_ids": ids_BT})[:, -1].float() / CALM).softmax(-1).cpu()
        drawn_B1 = torch.multinomial(chances_BV, 1, generator=generator).to(ids_BT.device)
        ids_BT = torch.cat([ids_BT, drawn_B1], dim=1)
    return ids_BT[:, 1:].tolist()


def _kept(roles: Roles, texts: Sequence[list[int]]) -> float:
    """Share of the tokens that survive decoding and encoding again.

    Nearly all do if the model was trained with this tokenizer, since it splits a text in one way.
    """
    assert roles.tokenizer is not None
    texts_again = [roles.encode(str(roles.tokenizer.decode(ids, clean_up_tokenization_spaces=False))) for ids in texts]
    pairs = zip(texts, texts_again, strict=True)
    return float(np.mean([SequenceMatcher(None, ids, again, autojunk=False).ratio() for ids, again in pairs]))


def _tokenizer(found: dict[str, Any]) -> Signal | None:
    if "plain_text" not in found:
        return None
    plain, swapped, log_v = found["plain_text"], found["ids_swapped"], found["log_v"]
    numbers = {"plain_text": plain, "ids_swapped": swapped, "log_v": log_v}
    written, markers = found.get("own_text_kept", 1.0), found.get("own_markers")
    is_expected = markers is not None and markers < EXPECTED
    random = found.get("any_text_kept", 1.0)
    is_split_otherwise = written < REWRITTEN and written - random < BEYOND_CHANCE * (1 - random)
    if is_split_otherwise and UNSURE * swapped < plain <= NO_TEXT * swapped and not is_expected:  # above: see below
        says = (
            f"what the base writes is split otherwise by this tokenizer: {written:.0%} of its tokens survive decoding "
        )
        says += f"and encoding, of random tokens {random:.0%}; the loss of plain text is {plain:.1f} nats "
        says += f"a token, with swapped ids {swapped:.1f}"
        return Signal("F04", "measured", says, 0.75, {**numbers, "own_text_kept": written})
    here, moved = found.get("ids_fit", 0.0), found.get("moved_ids_fit", -1.0)
    if is_no_text(found) and moved - here > FITS_BETTER:
        says = f"the loss of plain text is {plain:.1f} nats a token, with randomly swapped ids {swapped:.1f}; moved by "
        says += f"{found['moved_by']:+d}, all ids fit what the model expects better, by {moved - here:.1f} nats an id"
        return Signal("F04", "measured", says, 0.9, {**numbers, "moved_by": found["moved_by"]})
    if is_expected:
        says = f"the model expects the markers of the tokenizer's template: {markers:.2f} nats a token"
        return Signal("F04", "measured", says, 0.8, {**numbers, "own_markers": markers}, against=True)
    if _is_all_noise(found):
        says = f"the loss of plain text is {plain:.1f} nats a token, of everyday English {found['everyday_text']:.1f}, "
        says += f"and of the header of the tokenizer's template {markers:.1f}; guessing gives {log_v:.1f}"
        return Signal("F04", "measured", says, 0.75, numbers)
    kept, by_chance = found.get("own_text_kept", 0.0), found.get("any_text_kept", 1.0)
    if is_no_text(found) and found["everyday_text"] < KNOWN * found["everyday_swapped"]:
        says = f"the loss of everyday English is {found['everyday_text']:.1f} nats a token, with swapped ids "
        says += f"{found['everyday_swapped']:.1f}: the tokenizer fits, and the rows are new to the model"
        return Signal("F04", "measured", says, 0.8, numbers, against=True)
    if is_no_text(found) and kept > KEPT > by_chance and moved - here < FITS:
        says = f"text that the model generates fits this tokenizer: {kept:.0%} of its tokens survive decoding and "
        says += f"encoding, of random tokens {by_chance:.0%}"
        return Signal("F04", "measured", says, 0.8, {**numbers, "own_text_kept": kept}, against=True)
    if is_no_text(found):
        says = f"the loss of plain text is {plain:.1f} nats a token, with randomly swapped ids {swapped:.1f}"
        says += f" (log V {log_v:.1f})"
        is_open = by_chance > KEPT or kept > KEPT  # any text survives this tokenizer, or the controls disagree
        return Signal("F04", "measured", says, 0.4 if is_open else 0.9, numbers)
    if plain < KNOWN * swapped:
        says = (
            f"the loss of plain text is {plain:.1f} nats a token, with swapped ids {swapped:.1f}: the ids fit the model"
        )
        return Signal("F04", "measured", says, 0.8, numbers, against=True)
    return None
