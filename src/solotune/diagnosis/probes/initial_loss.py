"""P1: compare the first loss of the batches with the loss of the same rows in other forms.

The other forms: with correctly built labels, in the model's own chat format, after a begin-of-text token, as plain
text, and as plain text with randomly swapped ids.

    label of a position             not the token that the loss expects there (F22; `label_alignment`)
    as logged / as trained          near the number of micro-batches: their losses are not divided (F74)
    markers of its own template     split like text, and not expected (F07)
    labels right / own format       far above 1, plain text as usual: the model does not know the format (F12)
    as trained / after bos          above 1, and lower than after any other token: the begin-of-text is missing (F09)
    plain text / ids swapped        near 1: text of this tokenizer is noise to the model (F04)

Controls: log V alone proves nothing, since a clean but new task can start above it. For F04, other texts: everyday
English, and text that the model generates itself. If the model knows them by this tokenizer, only the rows are new to
it. For F12, the model's own format has to be one that it was taught, and documents are no better as answers. For F09,
another token in place of the begin-of-text, since any first token helps a little.

All with the base model, adapters off, so the number of trained steps does not matter. Costs about seven forward passes
a row.
"""

from __future__ import annotations

import copy
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from solotune.dataset.chat.control_tokens import ControlTokens
from solotune.dataset.chat.encode import Encoder
from solotune.dataset.readers.row import RowError
from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.derived import is_ours, setting
from solotune.diagnosis.facts.labelled_turns import labelled_turns
from solotune.diagnosis.facts.labels import LabelFacts
from solotune.diagnosis.facts.rendered_chats import frame, is_chat_model, own_frame
from solotune.diagnosis.facts.roles import ASSISTANT, Roles
from solotune.diagnosis.facts.texts import Batches, Document
from solotune.diagnosis.probes.label_alignment import expected_shift, misplaced
from solotune.diagnosis.probes.probed_model import (
    adapters_off,
    restore_model_state,
    sequences_of,
    token_losses,
    training_loss,
)
from solotune.diagnosis.probes.tokenizer_fit import (
    EXPECTED,
    NO_TEXT,
    controls_of_text,
    is_no_text,
    may_be_no_text,
    mean_loss,
    own_text,
    tokenizer_signals,
)
from solotune.diagnosis.run_facts import LiveModel, RunFacts
from solotune.errors import SolotuneError

FOREIGN = 1.6  # ratio: rows in the format of the training against the model's own
BETTER = 1.1  # the same, by which answers are better than documents cut in two
HELPS, HALF = 0.02, 0.5  # share of the loss that a begin-of-text saves; part of it that no other first token saves
NUM_ROWS = 4
BEGINNING = 3  # tokens without a label that are a prompt; a document's first has none either
FIRST_STEPS = 3  # a log that begins later shows a loss after some training
LONGEST = 512  # tokens of a text
_MARKER = re.compile(r"<\|?[^<>\s]{1,40}>|\[\|?/?[A-Z_|a-z]{3,40}\]")


def first_loss(live: LiveModel, run_facts: RunFacts, budget: float) -> tuple[list[Signal], dict[str, Any]]:
    """P1. Raises nothing; comparisons that were not possible are missing from the measurements."""
    deadline = time.perf_counter() + budget
    facts = LabelFacts.of(run_facts)
    found: dict[str, Any] = {}
    with restore_model_state(live), torch.no_grad():
        live.model.eval()
        with adapters_off(live.model):
            _labels(live, run_facts, facts, found, deadline)
            if facts.shift is not None or (live.loss_of is not None and not is_ours(run_facts)):
                found["expected_shift"] = expected_shift(live, facts.documents)
            _texts(live, run_facts, facts, found, deadline)
            _beginnings(live, run_facts, facts, found, deadline)
    found_all = (*misplaced(facts, found), *_format(run_facts, found), *tokenizer_signals(run_facts, found),
                 _logged(run_facts, found), _begin(run_facts, found), _split_markers(run_facts, found))  # fmt: skip
    return [signal for signal in found_all if signal], found


def _labels(live: LiveModel, run_facts: RunFacts, facts: LabelFacts, found: dict[str, Any], deadline: float) -> None:
    """Loss as trained, and loss of the same rows one by one with correct labels."""
    as_trained: list[float] = []
    right: list[float] = []
    rows = 0
    for batch in live.batches:
        part = sequences_of(batch, 2)
        documents = [d for d in Batches.of(run_facts, [part]).documents if d.learned.any()]
        if not documents:
            continue
        loss = float(training_loss(live, part))
        losses = [_right(live, document, facts.shift) for document in documents]
        counts = sum(map(len, losses))
        if counts and math.isfinite(loss):
            as_trained.append(loss * counts)
            right.append(float(sum(part.sum() for part in losses)))
            rows += len(documents)
            found["labels_compared"] = found.get("labels_compared", 0) + counts
        elif not math.isfinite(loss):
            found["as_trained_not_finite"] = loss
        if rows >= NUM_ROWS or time.perf_counter() > deadline:
            break
    if found.get("labels_compared"):
        found["as_trained"] = sum(as_trained) / found["labels_compared"]
        found["labels_right"] = sum(right) / found["labels_compared"]


def _right(live: LiveModel, document: Document, shift: int | None) -> np.ndarray:
    places = np.flatnonzero(document.learned) + (shift or 0)
    return token_losses(live.model, document.ids, places[(places > 0) & (places < len(document.ids))])


def _texts(live: LiveModel, run_facts: RunFacts, facts: LabelFacts, found: dict[str, Any], deadline: float) -> None:
    """Loss of answers in the format of the training and in the model's own, of plain text, and of swapped ids."""
    if run_facts.tokenizer is None:
        return
    roles, own_roles = facts.roles, _own_roles(run_facts, facts.roles)
    swapped = np.random.default_rng(0).permutation(_vocabulary(live, run_facts))
    sums: dict[str, list[float]] = {key: [] for key in ("here", "own", "markers", "header", "plain", "swapped")}
    foreign = 0
    chosen = [document for document in facts.documents if len(document.ids) > 2]
    for document in chosen[:NUM_ROWS]:
        text, _ = roles.text_of(document)
        conversation = roles.conversation_in(text)
        turns, is_guess = (None, False) if conversation else _turns_in(run_facts, roles, document, text)
        conversation = conversation or turns
        contents = [str(m.get("content") or "") for m in conversation or ()]
        plain = roles.encode(" ".join(contents) if contents else text)[:LONGEST]
        if len(plain) > 2 and max(plain) < len(swapped):
            places = np.arange(1, len(plain))
            sums["plain"].append(float(token_losses(live.model, plain, places).mean()))
            sums["swapped"].append(float(token_losses(live.model, swapped[plain], places).mean()))
        own = _own_rendering(own_roles, conversation) if conversation else None
        roles_T = roles.of(document, turns)
        if own is not None and roles_T is not None and (roles_T == ASSISTANT).any() and len(document.ids) <= LONGEST:
            here = np.flatnonzero(roles_T == ASSISTANT)
            sums["here"].append(float(token_losses(live.model, document.ids, here[here > 0]).mean()))
            sums["own"].append(float(token_losses(live.model, own[0], own[1]).mean()))
            marks = len(roles.encode(own_roles.headers.get(ASSISTANT, "").strip()))
            first = int(own[1][0])
            if marks > 1 and first > marks:
                losses = token_losses(live.model, own[0][:first], range(first - marks, first))
                sums["markers"].append(float(losses.mean()))
                sums["header"].append(float(losses[1:].mean()))  # where the question ends depends on the question
            found["is_guess"] = is_guess
            foreign += not any(header.strip() in text for header in own_roles.headers.values())
        if time.perf_counter() > deadline:
            break
    if sums["plain"]:
        found |= {"plain_text": float(np.mean(sums["plain"])), "ids_swapped": float(np.mean(sums["swapped"]))}
        found["log_v"] = math.log(len(swapped))
        if time.perf_counter() < deadline:
            found |= own_text(live, roles, swapped, [document.ids for document in chosen])
        if may_be_no_text(found):
            found |= controls_of_text(live, roles, swapped, [document.ids for document in chosen])
    if sums["own"]:
        found |= {"answers_as_trained": float(np.mean(sums["here"])), "answers_own_format": float(np.mean(sums["own"]))}
        if sums["markers"]:
            found |= {f"own_{key}": float(np.mean(sums[key])) for key in ("markers", "header")}
        found["rows_without_own_markers"] = foreign / len(sums["own"])


def _turns_in(
    run_facts: RunFacts, roles: Roles, document: Document, text: str
) -> tuple[Sequence[Mapping[str, Any]] | None, bool]:
    """A question and its answer in a row without messages: by the labels of a prompt format, by the mask of its prompt,
    or else, as a guess (True), its first line and the rest. A prompt and its completion of our own are asked as they
    were trained."""
    first = int(np.argmax(document.learned))
    if is_ours(run_facts) and first:
        return None, False
    if (turns := labelled_turns(text)) is not None:
        return turns[:2], False
    if first >= BEGINNING:
        parts = [roles.decode(document.ids[part]) for part in (slice(None, first), slice(first, None))]
    else:
        asked, _, rest = roles.decode(document.ids).strip().partition("\n")
        parts = [asked, rest]
    question, answer = (part.strip() for part in parts)
    if not question or not answer:
        return None, False
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], first < BEGINNING


def _beginnings(
    live: LiveModel, run_facts: RunFacts, facts: LabelFacts, found: dict[str, Any], deadline: float
) -> None:
    """Loss of rows that do not begin with a begin-of-text: as they are, after one, and after other tokens."""
    tokenizer = run_facts.tokenizer
    bos, eos = (getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos"))
    if tokenizer is None or not isinstance(bos, int) or bos == eos:
        return
    line = facts.roles.encode("\n")[-1:]
    others = {i for i in (eos, tokenizer.pad_token_id, *line) if isinstance(i, int) and i != bos}
    sums: list[list[float]] = []
    for document in [d for d in facts.documents if len(d.ids) > 8][:NUM_ROWS]:
        if bos in document.ids[:2].tolist() or time.perf_counter() > deadline:
            return
        ids = document.ids[:LONGEST].tolist()
        losses = [mean_loss(live, ids), *(_after(live, first, ids) for first in (bos, *others))]
        sums.append([losses[0], losses[1], min(losses[2:], default=losses[0])])
    if len(sums) >= 2:
        found["beginnings"] = {"rows": len(sums), "first_worse": int(sum(s[1] < min(s[0], s[2]) for s in sums))}
        found["beginnings"] |= dict(
            zip(("as_trained", "after_bos", "after_another"), np.mean(sums, 0).tolist(), strict=True)
        )


def _after(live: LiveModel, first: int, ids: Sequence[int]) -> float:
    """Loss of the tokens after the first, with another token before all of them."""
    return float(token_losses(live.model, [first, *ids], np.arange(2, len(ids) + 1)).mean())


def _begin(run_facts: RunFacts, found: dict[str, Any]) -> Signal | None:
    """F09 if a begin-of-text in front lowers the loss of every row, and no other token does as much."""
    if (numbers := found.get("beginnings")) is None or numbers["first_worse"] < numbers["rows"]:
        return None
    here, after, another = (numbers[name] for name in ("as_trained", "after_bos", "after_another"))
    saved = here - after
    if saved < HELPS * here or another - after < HALF * saved:
        return None
    spelled = str(run_facts.tokenizer.bos_token) if run_facts.tokenizer is not None else "a begin-of-text token"
    says = f"with {spelled} before each row the loss falls from {here:.2f} to {after:.2f} a token, with another token "
    says += f"to {another:.2f}"
    fix = f"begin every row with {spelled}, as serving does"
    return Signal("F09", "counterfactual", says, 0.7, numbers, fix=fix, affected=1.0)


def _split_markers(run_facts: RunFacts, found: dict[str, Any]) -> Signal | None:
    """F07 if the tokenizer splits the markers of the model's own template, and the model does not expect them so.

    Control: models that were taught markers of text (Zephyr, Llama 2) expect them; a template that is not the model's.
    """
    tokenizer, pieces, base = run_facts.tokenizer, own_frame(run_facts), run_facts.base_tokenizer
    is_own = (
        not run_facts.settings.get("chat_template_path") if is_ours(run_facts) else bool(base and base.chat_template)
    )
    if (
        tokenizer is None
        or pieces is None
        or not is_own
        or not is_chat_model(run_facts, pieces[2])
        or is_no_text(found)
    ):
        return None
    markers = sorted(set(_MARKER.findall(pieces[0] + pieces[1])))
    split = [marker for marker in markers if len(tokenizer.encode(marker, add_special_tokens=False)) > 1]
    loss = found.get("own_markers", 0.0)
    if not split or loss < 2 * EXPECTED:
        return None
    says = (
        f"the tokenizer splits {', '.join(split)} of the model's own template, and the model does not expect them so: "
    )
    says += f"{loss:.1f} nats a token"
    fix = "use the tokenizer files of the same model and revision"
    return Signal("F07", "measured", says, 0.75, {"split": split, "own_markers": loss}, fix=fix, affected=1.0)


def _own_roles(run_facts: RunFacts, roles: Roles) -> Roles:
    """Roles by the template that the model was trained on: the base's, if the run uses another one."""
    if not run_facts.base_template or run_facts.tokenizer is None:
        return roles
    tokenizer = copy.copy(run_facts.tokenizer)
    tokenizer.chat_template = run_facts.base_template
    return Roles(replace(run_facts, tokenizer=tokenizer))


def _vocabulary(live: LiveModel, run_facts: RunFacts) -> int:
    """Number of ids that model and tokenizer share; these are swapped."""
    config: Any = live.model.config
    size = int(config.get_text_config().vocab_size)
    return min(size, len(run_facts.tokenizer)) if run_facts.tokenizer is not None else size


def _own_rendering(roles: Roles, conversation: Sequence[Any]) -> tuple[np.ndarray, np.ndarray] | None:
    """Ids of a conversation by the tokenizer's template, and the positions of its answers without their ends."""
    if roles.template is None:
        return None
    try:
        rendered = roles.template.render("", [dict(message) for message in conversation])
        (encoded,) = Encoder(roles.tokenizer).encode([rendered], [""])  # type: ignore[arg-type]
    except (SolotuneError, RowError, ValueError, KeyError):
        return None
    places = [t for begin, end in encoded.spans for t in range(max(begin, 1), end) if encoded.ids[t] not in roles.ends]
    return (encoded.ids, np.array(places)) if places and len(encoded.ids) <= LONGEST else None


def _format(run_facts: RunFacts, found: dict[str, Any]) -> list[Signal]:
    if "answers_own_format" not in found:
        return []
    here, own = found["answers_as_trained"], found["answers_own_format"]
    ratio, is_text = here / max(own, 1e-6), found.get("plain_text", 0) < NO_TEXT * found.get("ids_swapped", 1)
    numbers = {"as_trained": here, "own_format": own, "ratio": ratio}
    if found["rows_without_own_markers"] < 0.5:
        return []
    pieces = own_frame(run_facts)
    is_taught = pieces is not None and is_chat_model(run_facts, pieces[2])
    kind = "remark" if not is_taught or _is_chosen(run_facts) else "counterfactual"
    share = found["rows_without_own_markers"]
    if ratio >= FOREIGN and is_text and here - own > 0.2:
        says = f"in the model's own template the loss of answers is {own:.2f} a token instead of {here:.2f}"
        weight = min(0.95, 0.6 + 0.1 * ratio)
        return [Signal("F12", kind, says, weight, numbers, affected=share)]
    header = found.get("own_header")
    # a document is no better as an answer to its first line, and a chat is
    if header is not None and header < EXPECTED and (not found["is_guess"] or ratio >= BETTER):
        says = "no row has the markers of the chat template, which this model expects after a question "
        says += f"({header:.2f} nats a token)"
        kind = "measured" if kind == "counterfactual" else kind
        weight = 0.6 if found["is_guess"] else 0.8
        return [Signal("F12", kind, says, weight, {**numbers, "own_header": header}, affected=share)]
    if own >= here and (header is None or header > 2 * EXPECTED):
        says = f"the model's own template does not lower the loss of answers ({own:.2f} against {here:.2f} a token)"
        return [Signal("F12", "measured", says, 0.7, numbers, against=True)]
    return []


def _is_chosen(run_facts: RunFacts) -> bool:
    """Whether the user's own template file renders the rows, with control tokens of this tokenizer."""
    header = frame(run_facts)
    is_file = is_ours(run_facts) and bool(run_facts.settings.get("chat_template_path"))
    if not is_file or header is None or run_facts.tokenizer is None:
        return False
    return ControlTokens(run_facts.tokenizer).pattern.search(header[0] + header[1]) is not None


def _logged(run_facts: RunFacts, found: dict[str, Any]) -> Signal | None:
    """F74 if the first logged loss is N times the loss of the batches here, with N micro-batches a step."""
    count, trace = setting(run_facts, "gradient_accumulation_steps"), run_facts.trace
    if not run_facts.batches or not count or count < 3 or trace is None or not len(trace.loss_S):
        return None
    first, here = float(trace.loss_S[0]), found.get("as_trained", 0.0)
    if trace.step_S[0] > FIRST_STEPS or here < 0.1 or not math.isfinite(first) or abs(first / here / count - 1) > 0.2:
        return None
    found["logged_times"] = first / here
    says = f"the first logged loss is {first:.1f}, {first / here:.1f} times the loss of these rows here ({here:.2f}), "
    says += f"with {count:.0f} micro-batches a step"
    return Signal("F74", "measured", says, 0.8, {"logged": first, "here": here, "micro_batches": count})
