"""P10: compare the loss of answers after their own prompt with their loss after the prompts of other rows.

The table L[i, j] is the loss of answer i after prompt j, by the base model, adapters off. In a healthy run the diagonal
is lower than the rest. If it is not, and another prompt of the data (of the next row, if a whole column was shifted)
lowers the loss, the rows are misaligned, and shifting them back is the counterfactual (F38). The other prompts are
those one and two rows away, those at the shift that the texts show, and those that share the words of the answers. If
no prompt makes a difference, the base may not know the task yet: then the trained model is tested.

Control: an answer that its prompt does not decide, or only its class, costs the same after any prompt. So no difference
is never an accusation, only another prompt that is better; and one part of the rows does not speak for the others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.labels import LabelFacts
from solotune.diagnosis.facts.prompt_answer_overlap import alignment_of, shift_of
from solotune.diagnosis.facts.roles import ASSISTANT, Roles
from solotune.diagnosis.facts.rows import text_of
from solotune.diagnosis.facts.texts import Document
from solotune.diagnosis.probes.initial_loss import _own_rendering
from solotune.diagnosis.probes.probed_model import adapters_off, is_untouched, restore_model_state, token_losses
from solotune.diagnosis.probes.saved_adapter import _put_in
from solotune.diagnosis.probes.skipped import Skipped
from solotune.diagnosis.run_facts import LiveModel, RunFacts

NUM_ROWS = 12
SHIFTS = (1, -1, 2, -2)  # rows by which a column may be shifted
CLEAR = 3.0  # standard errors
NEARLY_ALL = 0.9  # of the rows: with fewer, a part of the rows may be misaligned
CLEAR_SLIP = 5.0  # more, since the best of four shifts is taken, over a dozen rows
WORTH = 0.1  # nats
ONLY_A_DOUBT = 0.3  # weight of a remark: a new task that is not learned yet looks the same, one without an answer too
LEAST_STEPS, LEARNED = 20, 0.67  # logged, and the loss at the end as a share of the first
LONGEST = 256


def own_prompt_against_others(
    live: LiveModel, run_facts: RunFacts, budget: float
) -> tuple[list[Signal], dict[str, Any]]:
    """P10."""
    deadline = time.perf_counter() + budget
    facts = LabelFacts.of(run_facts)
    rows = _rows(facts)
    if len(rows) < 4:
        raise Skipped("fewer than four rows have a prompt and an answer")
    if len({tuple(answer) for _, answer in rows}) < 0.5 * len(rows):
        raise Skipped("most answers are equal")
    with restore_model_state(live), torch.no_grad(), adapters_off(live.model):
        live.model.eval()
        table, rows = _table(live, rows, deadline)
        slips = _slips(live, facts.roles, run_facts.conversations, deadline)
    own, others, error = _own_and_others(table)
    gaps, count = others - own, len(rows)  # above 0 where the own prompt helps
    found: dict[str, Any] = {
        "share_gaining": float((gaps > 0).mean()),
        "rows": count,
        "own_prompt": float(own.mean()),
        "other_prompts": float(others.mean()),
        "gain": float(gaps.mean()),
        "gain_stderr": error,
        "best_is_own": float((table.argmin(1) == np.arange(count)).mean()),
        "slipped": slips,
    }
    signals = _judge(found, slips)
    return signals or _after_training(live, run_facts, rows, found, deadline), found


def _own_and_others(table: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Loss of each answer after its own prompt and after the others, and the standard error of the mean difference."""
    own, count = np.diag(table), len(table)
    others = (table.sum(1) - own) / (count - 1)
    return own, others, float((others - own).std(ddof=1) / math.sqrt(count)) + 1e-9


def _after_training(
    live: LiveModel,
    run_facts: RunFacts,
    rows: list[tuple[list[int], list[int]]],
    found: dict[str, Any],
    deadline: float,
) -> list[Signal]:
    """Repeat with the trained model, if the base does not know the task: a run that learns also learns to use the
    prompt, unless the prompt says nothing about the answer."""
    with restore_model_state(live), torch.no_grad():
        if is_untouched(live.model) and run_facts.saved is not None:
            _put_in(live.model, run_facts.saved)
        if is_untouched(live.model) is not False:
            return []
        live.model.eval()
        table, _ = _table(live, rows, deadline)
    own, others, error = _own_and_others(table)
    gain = float((others - own).mean())
    found["trained_gain"], found["trained_gain_stderr"] = gain, error
    numbers = {key: value for key, value in found.items() if isinstance(value, float)}
    says = f"after training, the loss of answers is {gain:.3f} ± {error:.3f} nats a token lower after their own prompt"
    if gain > max(WORTH / 5, CLEAR * error):
        return [Signal("F38", "measured", says, 0.85, numbers, against=True)]
    are_sentences = len({tuple(answer) for _, answer in rows}) >= 0.9 * len(rows)  # labels are learned late
    if gain < min(WORTH / 5, 2 * error) and are_sentences and _has_learned(run_facts):
        return [Signal("F38", "remark", says, ONLY_A_DOUBT, numbers, fix="join prompts and answers again, by a key")]
    return []


def _has_learned(run_facts: RunFacts) -> bool:
    """The loss fell by a third: what can be learned without the prompt was learned."""
    loss_S = run_facts.trace.loss_S[np.isfinite(run_facts.trace.loss_S)] if run_facts.trace is not None else np.zeros(0)
    return len(loss_S) >= LEAST_STEPS and float(loss_S[-5:].mean()) < LEARNED * float(loss_S[0])


def _judge(found: dict[str, Any], slips: dict[str, Any]) -> list[Signal]:
    gain, error = found["gain"], found["gain_stderr"]
    numbers = {key: value for key, value in found.items() if isinstance(value, float)}
    best = max(slips, key=lambda shift: slips[shift]["gain"], default=None)
    if best is not None and slips[best]["gain"] > max(WORTH, CLEAR_SLIP * slips[best]["stderr"]):
        says = f"answers have {slips[best]['gain']:.2f} nats a token less loss after the prompt of another row ({best})"
        return [Signal("F38", "counterfactual", says, 0.95, numbers, fix="join prompts and answers again, by a key")]
    if gain > max(WORTH / 2, CLEAR * error) and found["share_gaining"] >= NEARLY_ALL:
        says = f"answers have {gain:.2f} ± {error:.2f} nats a token less loss after their own prompt than after others"
        return [Signal("F38", "measured", says, 0.85, numbers, against=True)]
    return []


def _rows(facts: LabelFacts) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) of documents with one answer, distinct and short."""
    found: list[tuple[list[int], list[int]]] = []
    for document in facts.documents:
        pair = _pair(document, facts.roles)
        if pair and pair not in found and sum(map(len, pair)) <= LONGEST:
            found.append(pair)
        if len(found) >= NUM_ROWS:
            break
    return found


def _pair(document: Document, roles: Roles) -> tuple[list[int], list[int]] | None:
    roles_T = roles.of(document)
    if roles_T is None:
        return None
    answer = np.flatnonzero(roles_T == ASSISTANT)
    if not len(answer) or answer[0] < 2 or answer[-1] - answer[0] + 1 != len(answer):
        return None
    ids = document.ids.tolist()
    inside = [i for i in ids[answer[0] : answer[-1] + 1] if i not in roles.ends]
    return (ids[: answer[0]], inside) if inside else None


def _table(
    live: LiveModel, rows: list[tuple[list[int], list[int]]], deadline: float
) -> tuple[np.ndarray, list[tuple[list[int], list[int]]]]:
    """(R, R): loss of answer i after prompt j, and its rows; fewer rows if time is short."""
    started = time.perf_counter()
    _cost(live, *rows[0])
    each = time.perf_counter() - started
    fits = int(math.sqrt(max(deadline - time.perf_counter(), 0) / max(each, 1e-5) / 1.5))
    rows = rows[: max(4, min(len(rows), fits))]
    table = np.array([[_cost(live, prompt, answer) for prompt, _ in rows] for _, answer in rows])
    return table, rows


def _cost(live: LiveModel, prompt: Sequence[int], answer: Sequence[int]) -> float:
    ids = [*prompt, *answer]
    return float(token_losses(live.model, ids, np.arange(len(prompt), len(ids))).mean())


def _slips(
    live: LiveModel, roles: Roles, conversations: Sequence[Sequence[Mapping[str, Any]]], deadline: float
) -> dict[str, Any]:
    """Shift (or `same words`) -> by how much the loss of answers falls after the prompt of that row, in data order."""
    single = [c for c in conversations[:2000] if [m.get("role") for m in c][-2:] == ["user", "assistant"]]
    found: dict[str, Any] = {}
    for name, pairs in _suspected(single).items():
        gaps = []
        for i, at in pairs[:: max(1, len(pairs) // NUM_ROWS)][:NUM_ROWS]:
            if time.perf_counter() > deadline:
                break
            own = _own_rendering(roles, single[i])
            other = _own_rendering(roles, [*single[at][:-1], single[i][-1]])
            if own is None or other is None:
                continue
            costs = [float(token_losses(live.model, *one).mean()) for one in (own, other)]
            gaps.append(costs[0] - costs[1])
        if len(gaps) >= 4:
            stderr = float(np.std(gaps, ddof=1) / math.sqrt(len(gaps)))
            found[name] = {"gain": float(np.mean(gaps)), "stderr": stderr}
    return found


def _suspected(chats: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, list[tuple[int, int]]]:
    """Name -> pairs of an answer and the other prompt to try: what the texts show first, then the neighbours."""
    texts = [
        ("\n".join(text_of(m.get("content")) for m in chat[:-1]), text_of(chat[-1].get("content"))) for chat in chats
    ]
    found: dict[str, list[tuple[int, int]]] = {}
    shifts = list(SHIFTS)
    if (alignment := alignment_of(texts)) is not None and alignment.is_displaced:
        found["same words"] = list(zip(alignment.displaced, alignment.claimed, strict=True))
    if (moved := shift_of(texts)) is not None:
        shifts = [moved.rows, *(shift for shift in SHIFTS if shift != moved.rows)]
    for shift in shifts:
        inside = range(max(0, -shift), len(chats) - max(0, shift))
        found[f"{shift:+d}"] = [(i, i + shift) for i in inside]
    return found
