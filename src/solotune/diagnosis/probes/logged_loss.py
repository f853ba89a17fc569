"""P14: which labels explain the losses that a trainer logged, if it saved no batches.

The logged losses are those of the labels that the collator really made. P14 takes the rows with the labels that the
settings ask for, and the same rows with other labels, and asks the base and the trained model for the loss of each:

    labels                        as the settings ask      with the fault
    answers and prompts           loss far from the log    loss as logged, prompts were learned    F20
    prompts alone                                          the same, and answers got worse         F23
    the token before or after                              the same                                F22
    answers and padding                                    padding was learned                     F29
    answers without their end                              ends were not learned                   F19, F17

Two measurements that do not depend on each other have to agree: the log, at both ends of the run, and what the model
learned, by its loss on exactly these tokens before and after. Control: the labels that were asked for, which explain
neither, and all other labels. If several explain both, nothing is said. Embedding noise and label smoothing raise the
logged loss alone, so nothing is asked with them.

The last evaluation is asked in the same way: held-out rows with prompts against answers alone (F47).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from solotune.dataset.example import Example
from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.derived import is_zero, setting
from solotune.diagnosis.facts.roles import USER, Roles
from solotune.diagnosis.probes.probed_model import adapters_off, device_of, logits_of, restore_model_state
from solotune.diagnosis.probes.skipped import Skipped
from solotune.diagnosis.run_facts import LiveModel, RunFacts, Trace

NUM_ROWS, LARGEST = 64, 8
"""Rows that are asked, and of one batch."""
FEWEST = 4
"""Batches for an average with an error."""
EARLY = 10
"""Steps: a log that begins later tells little of the start."""
NEAR = 0.2
"""Of the logged loss: how near a loss of the same labels is, in a run that goes on while it is logged."""
LEARNED, UNLEARNED = 0.6, 0.9
"""Loss after training / loss of the base of tokens that had labels, and of tokens that had none."""
PADDING_LEARNED = 0.75
"""The same of padding; clean runs show 0.9 and more."""
HARD = 2.0
"""Nats of a token that a model does not expect."""
ERRORS = 4.0
"""Standard errors of a difference."""
GROUPS = ("answers", "ends", "prompts", "padding", "after", "before")
ASKED = ("answers", "ends")
PARTS = {
    "asked": ASKED,
    "all": (*ASKED, "prompts"),
    "prompts": ("prompts",),
    "after": ("after",),
    "before": ("before",),
    "padding": (*ASKED, "padding"),
    "no_ends": ("answers",),
}
"""Labels -> the groups of tokens that have them."""
_CHUNK = 512


@dataclass(frozen=True)
class Losses:
    """Sum of losses and number of tokens of each group, (batches, groups)."""

    sums_NG: np.ndarray
    counts_NG: np.ndarray

    def of(self, *groups: str) -> tuple[float, float]:
        """Mean over batches of their mean a token, and its scatter."""
        chosen = [GROUPS.index(group) for group in groups]
        counts_N = self.counts_NG[:, chosen].sum(1)
        if not counts_N.all():
            return float("nan"), float("nan")
        means_N = self.sums_NG[:, chosen].sum(1) / counts_N
        return float(means_N.mean()), float(means_N.std(ddof=1))


def labels_by_the_log(live: LiveModel, run_facts: RunFacts, budget: float) -> tuple[list[Signal], dict[str, Any]]:
    """P14.

    Raises:
        Skipped: the batches are known, or there is no log and adapter to compare with.
    """
    trace = _trace(live, run_facts)
    deadline = time.perf_counter() + budget
    with restore_model_state(live), torch.no_grad():
        live.model.eval()
        base, end = _both(live, run_facts, run_facts.train, deadline)
        held_out = None
        if len(run_facts.validation) >= FEWEST and len(trace.eval_step_E) and trace.eval_step_E[-1] == trace.step_S[-1]:
            held_out = _both(live, run_facts, run_facts.validation, deadline)[1]
    found: dict[str, Any] = {"batches": len(base.sums_NG), "first_logged": float(trace.loss_S[0])}
    found["last_logged"] = float(_last(trace).mean())
    for name, parts in PARTS.items():
        found[name] = [base.of(*parts)[0], end.of(*parts)[0]]
    found |= {f"on_{group}": [base.of(group)[0], end.of(group)[0]] for group in ("ends", "padding")}
    signal = _signal(run_facts, trace, base, end)
    if signal is None and held_out is not None:
        found["held_out"] = {name: held_out.of(*PARTS[name])[0] for name in ("asked", "all")}
        signal = _evaluated(trace, end, held_out)
    return [signal] if signal else [], found


def _trace(live: LiveModel, run_facts: RunFacts) -> Trace:
    get, trace, saved = run_facts.settings.get, run_facts.trace, run_facts.saved
    if not live.is_rebuilt or not run_facts.train:
        raise Skipped("the batches of the training are known")
    if trace is None or len(trace.loss_S) < 2 or not np.isfinite(trace.loss_S).all():
        raise Skipped("there is no log of finite losses")
    if trace.seams or not trace.is_finished or saved is None or get("load_best_model_at_end"):
        raise Skipped("the adapter is not known to be that of the last logged step")
    if all(is_zero(tensor) for name, tensor in saved.adapter.items() if "lora_B" in name):
        raise Skipped("the adapter changes nothing")
    if get("neftune_noise_alpha") or get("label_smoothing_factor"):
        raise Skipped("the logged loss is not that of the labels alone")
    return trace


def _last(trace: Trace) -> np.ndarray:
    """The losses of the last tenth of the steps, at most five."""
    late = trace.loss_S[trace.step_S > 0.9 * trace.step_S[-1]]
    return late[-5:]


def _both(live: LiveModel, run_facts: RunFacts, rows: Sequence[Example], deadline: float) -> tuple[Losses, Losses]:
    """Of the base and of the trained model, on batches of random rows."""
    size = run_facts.settings.get("per_device_train_batch_size")
    size = min(size, LARGEST) if isinstance(size, int) and size > 0 else LARGEST
    order = np.random.default_rng(0).permutation(len(rows))[:NUM_ROWS]
    size = max(min(size, len(order) // FEWEST), 1)
    ends = Roles(run_facts).ends
    pad = getattr(run_facts.tokenizer, "pad_token_id", None)
    if run_facts.settings.get("packing") or pad in ends:  # then it is learned as an end
        pad = None
    found: tuple[list[Any], list[Any]] = ([], [])
    for begin in range(0, len(order) - size + 1, size):
        chosen = [rows[int(i)] for i in order[begin : begin + size]]
        if any(row.weights is not None for row in chosen):
            raise Skipped("tokens have weights")
        width = max(len(row.input_ids) for row in chosen)
        with adapters_off(live.model):
            found[0].append(sum(_of_row(live, row, ends, pad, width) for row in chosen))
        found[1].append(sum(_of_row(live, row, ends, pad, width) for row in chosen))
        if time.perf_counter() > deadline:
            break
    if len(found[0]) < FEWEST:
        raise Skipped("too few rows fit into its time")
    both = [np.stack(part) for part in found]
    return Losses(both[0][:, 0], both[0][:, 1]), Losses(both[1][:, 0], both[1][:, 1])


def _of_row(live: LiveModel, row: Example, ends: frozenset[int], pad: int | None, width: int) -> np.ndarray:
    """(2, groups): sums of losses and numbers of tokens."""
    size, ids_T = len(row.input_ids), np.asarray(row.input_ids, np.int64)
    mask_T = np.asarray(row.loss_mask, bool)
    gap = width - size if pad is not None else 0
    ids = torch.as_tensor(np.r_[ids_T, np.full(gap, pad if pad is not None else 0)], device=device_of(live.model))
    seen = torch.ones_like(ids)
    seen[size:] = 0
    logits_TV = logits_of(live.model, {"input_ids": ids[None], "attention_mask": seen[None]})[0]
    is_last_T = mask_T & ~np.r_[mask_T[1:], False]
    is_end_T = is_last_T & np.isin(ids_T, list(ends))
    t = np.arange(1, size)
    places = {  # positions of labels, and of the tokens that they are
        "answers": (at := t[(mask_T & ~is_end_T)[1:]], at),
        "ends": (at := t[is_end_T[1:]], at),
        "prompts": (at := t[~mask_T[1:]], at),
        "padding": (at := np.arange(size, size + gap), at),
        "after": (at := t[:-1][mask_T[2:]], at + 1),
        "before": (at := t[mask_T[:-1]], at - 1),
    }
    found = np.zeros((2, len(GROUPS)))
    for g, name in enumerate(GROUPS):
        at, tokens = places[name]
        for begin in range(0, len(at), _CHUNK):
            part = slice(begin, begin + _CHUNK)
            losses = torch.nn.functional.cross_entropy(
                logits_TV[torch.as_tensor(at[part] - 1, device=ids.device)].float(),
                ids[torch.as_tensor(tokens[part], device=ids.device)],
                reduction="sum",
            )
            found[:, g] += (float(losses), len(at[part]))
    return found


# --- what the log says


def _signal(run_facts: RunFacts, trace: Trace, base: Losses, end: Losses) -> Signal | None:
    """The fault whose labels alone explain the log and what was learned, where those that were asked for do not."""
    last, first = float(_last(trace).mean()), float(trace.loss_S[0])
    steps = int(trace.step_S[0])
    if steps > EARLY or last <= 0:
        return None
    count = max(setting(run_facts, "gradient_accumulation_steps") or 1.0, 1.0)
    near = [
        name for name in PARTS
        if _begins(base, name, first, steps * count) and (name == "no_ends" or _ends(end, name, trace))
    ]  # fmt: skip
    explained = [
        name for name in near
        if name != "asked" and _is_learned(name, base, end)
        and _contradicts(name, base, end, first, last, steps * count)
    ]  # fmt: skip
    if len(explained) != 1:
        return None
    return _named(run_facts, explained[0], base, end, first, last)


def _contradicts(name: str, base: Losses, end: Losses, first: float, last: float, batches: float) -> bool:
    """Whether the log is not that of the labels that were asked for, beyond what regularisation of a run explains."""
    (start, scatter), (after, late) = base.of(*ASKED), end.of(*ASKED)
    error = ERRORS * late / np.sqrt(len(end.sums_NG))
    if name == "all":
        return first > 1.1 * start + ERRORS * scatter / np.sqrt(min(len(base.sums_NG), batches))
    if name == "padding":
        return first > start and last > 1.3 * after + error
    if name == "no_ends":
        without = end.of(*PARTS[name])[0]
        return last * (1 + NEAR / 2) + error < after and abs(last - without) < 0.5 * abs(last - after)
    return last * (1 + NEAR) + error < after


def _begins(base: Losses, name: str, first: float, batches: float) -> bool:
    """Whether the first logged loss is that of these labels, or lower, since the run learns while it is averaged."""
    mean, scatter = base.of(*PARTS[name])
    error = ERRORS * scatter * np.sqrt(1 / len(base.sums_NG) + 1 / batches)
    return 0.5 * mean <= first <= mean + error


def _ends(end: Losses, name: str, trace: Trace) -> bool:
    mean, scatter = end.of(*PARTS[name])
    late = _last(trace)
    error = ERRORS * scatter * np.sqrt(1 / len(end.sums_NG) + 1 / len(late))
    return abs(late.mean() - mean) <= max(NEAR * late.mean(), min(error, 2 * NEAR * late.mean()))


def _is_learned(name: str, base: Losses, end: Losses) -> bool:
    """Whether the model learned these tokens, which it would not without labels on them."""

    def change(*groups: str) -> float:
        return end.of(*groups)[0] / max(base.of(*groups)[0], 1e-6)

    if name == "all":
        return change("prompts") <= LEARNED
    if name == "padding":  # only the first token of it is predicted from a text
        return change("padding") <= PADDING_LEARNED
    if name == "no_ends":
        return change("ends") > LEARNED and end.of("ends")[0] >= HARD and change("answers") <= LEARNED
    return change(name) <= LEARNED and change(*ASKED) >= UNLEARNED


def _named(run_facts: RunFacts, name: str, base: Losses, end: Losses, first: float, last: float) -> Signal | None:
    asked, other = ([losses.of(*PARTS[key])[0] for losses in (base, end)] for key in ("asked", name))
    numbers = {"first_logged": first, "last_logged": last, "asked": asked, "other": other, "labels": name}
    what = {
        "all": "prompts and answers",
        "prompts": "the prompts alone",
        "after": "the token after each position",
        "before": "the token before each position",
        "padding": "answers and padding",
        "no_ends": "answers without their end",
    }[name]
    says = f"the log ({first:.2f} to {last:.2f}) is the loss of labels on {what} ({other[0]:.2f} to {other[1]:.2f}), "
    says += f"not of those that the settings ask for ({asked[0]:.2f} to {asked[1]:.2f}); the model learned these"
    if name == "no_ends":
        ends = [losses.of("ends")[0] for losses in (base, end)]
        says = says.removesuffix("; the model learned these")
        says += f"; the loss of the end is {ends[1]:.1f} after training and {ends[0]:.1f} before"
    code = {"all": "F20", "prompts": "F23", "after": "F22", "before": "F22", "padding": "F29", "no_ends": "F19"}[name]
    # other labels alone bring the trained model from a loss above the base's to the log
    kind, weight = ("counterfactual", 0.9) if code in ("F22", "F23") else ("measured", 0.85)
    tokenizer = run_facts.tokenizer
    if code == "F19" and not any(row.messages for row in run_facts.train[:NUM_ROWS]):
        code = "F10"  # text that the trainer took as it is; a document needs no end
        if not _are_chats(run_facts):
            return None
    elif code == "F19" and tokenizer is not None and tokenizer.pad_token_id in Roles(run_facts).ends:
        code = "F17"
    if code == "F20" and (wants := run_facts.settings.get("assistant_only_loss")) is not True:
        if wants is False:
            return None
        kind, weight = "remark", 0.3
    return Signal(code, kind, says, weight, numbers, affected=1.0)


def _are_chats(run_facts: RunFacts) -> bool:
    """Whether a text has the template's header of a user's turn."""
    header, tokenizer = Roles(run_facts).headers.get(USER, "").strip(), run_facts.tokenizer
    return bool(header) and tokenizer is not None and header in tokenizer.decode(run_facts.train[0].input_ids.tolist())


def _evaluated(trace: Trace, end: Losses, held_out: Losses) -> Signal | None:
    """F47 if the last evaluation is the loss of all tokens of the held-out rows, and the training's of the answers."""
    logged = float(trace.eval_loss_E[-1])
    asked, whole = held_out.of(*ASKED), held_out.of(*PARTS["all"])
    error = ERRORS * max(asked[1], whole[1]) / np.sqrt(len(held_out.sums_NG))
    apart = abs(asked[0] - whole[0])
    if not np.isfinite([logged, *asked, *whole]).all() or not _ends(end, "asked", trace) or _ends(end, "all", trace):
        return None
    if apart < NEAR * logged + error or abs(logged - whole[0]) > apart / 4 or abs(logged - whole[0]) > NEAR * logged:
        return None
    says = f"the last held-out loss ({logged:.2f}) is that of prompts and answers ({whole[0]:.2f}), not of answers "
    says += f"alone ({asked[0]:.2f}), on which the model was trained"
    return Signal("F47", "measured", says, 0.8, {"logged": logged, "answers": asked[0], "all": whole[0]}, affected=1.0)
