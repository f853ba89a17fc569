"""P13: generate answers to the same questions as the deployment does and with the prompt format of the training.

    good with the training format, bad as deployed                      F11; F12 if no row has the model's own format
    deterministic, and different from the training format               F11, or F12
    as deployed, what the model writes after a prompt without header    F15
    the end of turn is generated, and generation goes on                F14, unless the data's own answers go on too
    no end in either, and a low probability of an end after the data's  F10, F17, F19 or F24: the labels show which; if
    own answers                                                         the ends have labels, F17 if the pad is an end
                                                                        and the base did end

Repetition after training is as often a fault of the deployed format as of the training, so both are always tested. Bad
means without an end, or repetitive: rep-4 is the share of 4-grams that occurred before. Uses the saved adapter if the
model has no trained one. Costs some dozens of tokens, generated one by one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from solotune.diagnosis.evidence import Kind, Signal
from solotune.diagnosis.facts.derived import is_ours
from solotune.diagnosis.facts.labels import LabelFacts
from solotune.diagnosis.facts.rendered_chats import decoded, is_chat_model, own_frame
from solotune.diagnosis.facts.roles import ASSISTANT
from solotune.diagnosis.facts.texts import Document
from solotune.diagnosis.probes.probed_model import adapters_off, device_of, is_untouched, logits_of, restore_model_state
from solotune.diagnosis.probes.prompt_use import _cost, _pair
from solotune.diagnosis.probes.saved_adapter import _put_in
from solotune.diagnosis.probes.skipped import Skipped
from solotune.diagnosis.run_facts import LiveModel, RunFacts

NUM_PROMPTS = 4
MOST_TOKENS = 48
REPEATS = 0.25  # rep-4
UNEXPECTED = 0.05  # probability of an end of turn after a whole answer; long free answers may go on anyway
CLEARLY, SURELY, BEGINNING = 0.3, 1.0, 24  # nats a token (the second even if few ends are expected), of so many tokens
MUCH = 0.5  # of the prompts; also the gap of losses, in nats
LAST, LEARNED = 4, 0.7  # tokens before the end of an answer, and their loss where the answers are known: one in two
LIKE = 8  # tokens by which two answers are alike
GOES_ON = 4  # tokens after an end: white space and an end of text may follow


def both_renderings(live: LiveModel, run_facts: RunFacts, budget: float) -> tuple[list[Signal], dict[str, Any]]:
    """P13."""
    deadline = time.perf_counter() + budget
    facts = LabelFacts.of(run_facts)
    if live.generate is None or run_facts.tokenizer is None:
        raise Skipped("how the deployment generates answers is not known")
    with restore_model_state(live), torch.no_grad():
        _require_trained(live, run_facts)
        live.model.eval()
        deployed, trained, wanted, prompts, ends, gaps, again = [], [], [], [], [], [], None
        behind: list[int] = []
        bare: list[bool] = []
        is_whole = True
        for whole in facts.documents:
            document = _first_turn(facts, whole)
            pair, question = _pair(document, facts.roles), _question(facts, whole)
            if pair is None or not question:
                continue
            if len(trained) == NUM_PROMPTS or time.perf_counter() > deadline:
                break
            text = live.generate(question)
            is_whole = is_whole and _is_whole(facts, whole)
            if again is None and is_whole:
                again = live.generate(question) == text
            deployed.append(facts.roles.encode(text))
            trained.append(_greedy(live, pair[0], facts.roles.ends, min(MOST_TOKENS, 2 * len(pair[1]) + 8)))
            wanted.append(pair[1])
            behind.append(_behind_end(document.ids[len(pair[0]) :].tolist(), facts.roles.ends))
            ends.append(_expects_end(live, [*pair[0], *pair[1]], facts.roles.ends))
            prompts.append(pair[0])
            bare.append(_is_without_header(live, facts, pair[0], trained[-1], deployed[-1]))
            if deployed[-1] and trained[-1]:
                costs = [_cost(live, pair[0], answers[-1][:BEGINNING]) for answers in (deployed, trained)]
                gaps.append(costs[0] - costs[1])
    if len(trained) < 2:
        raise Skipped("fewer than two rows have a question and an answer")
    found = {
        "prompts": len(trained),
        "training_rendering": _looks(trained, facts.roles.ends),
        "deployment_rendering": _looks(deployed, facts.roles.ends),
        "end_expected": float(np.mean(ends)),
        "goes_on_after_end": float(np.mean([_behind_end(ids, facts.roles.ends) > GOES_ON for ids in deployed])),
        "data_goes_on_after_end": float(np.mean([count > GOES_ON for count in behind])),
        "ends_are_stops": _are_stops(run_facts, [i for ids in deployed for i in ids if i in facts.roles.ends]),
        "stops_at_end": float(np.mean([_behind_end(ids, facts.roles.ends) == 0 for ids in deployed])),
        "right": {
            "training_rendering": _share_right(trained, wanted, facts.roles.ends),
            "deployment_rendering": _share_right(deployed, wanted, facts.roles.ends),
        },
        "deployed_costs_more": float(np.mean(gaps)) if gaps else 0.0,  # nats a token, with the training format
        "as_without_header": float(np.mean(bare)) if bare else 0.0,
        "same_again": bool(again),  # deterministic, and the question is the whole prompt
        "question_is_whole": is_whole,
        "equal": float(np.mean([_alike(a, b, facts.roles.ends) for a, b in zip(trained, deployed, strict=True)])),
    }
    if _never_ended(found) and facts.ends_learned >= MUCH * max(facts.answers, 1):
        found["last_words"] = float(np.mean([_last_words(live, *pair) for pair in zip(prompts, wanted, strict=True)]))
        return _never_ends(live, run_facts, facts, prompts, found), found
    return _judge(run_facts, found), found


def _require_trained(live: LiveModel, run_facts: RunFacts) -> None:
    """Put the saved adapter into a model without a trained one.

    Raises:
        Skipped: there is none, or it is empty.
    """
    if not is_untouched(live.model):
        return
    if run_facts.saved is None or not _put_in(live.model, run_facts.saved)[0]:
        raise Skipped("the adapter is not trained yet")
    if is_untouched(live.model):
        raise Skipped("the adapter is empty")


def _is_without_header(
    live: LiveModel, facts: LabelFacts, prompt: list[int], trained: list[int], deployed: list[int]
) -> bool:
    """Whether the deployed answer, which is another than the trained one, is what the model writes without a header."""
    cut = _without_header(facts, prompt)
    if cut is None or _alike(trained, deployed, facts.roles.ends):
        return False
    without = _greedy(live, cut, frozenset(), LIKE)
    return bool(without) and _alike(without, deployed, facts.roles.ends)


def _are_stops(run_facts: RunFacts, ends: Sequence[int]) -> bool:
    """Whether generation by the files of the base stops at these ends; where solotune generates in place of an unknown
    deployment, it stops at the template's."""
    stops = run_facts.settings.get("serving_stop_ids") or run_facts.generation_config.get("eos_token_id")
    known = set(stops) if isinstance(stops, (list, tuple, set)) else {stops} - {None}
    return not known or set(ends) <= known


def _never_ended(found: dict[str, Any]) -> bool:
    return found["training_rendering"]["without_end"] == 1.0 and found["end_expected"] < UNEXPECTED


def _never_ends(
    live: LiveModel, run_facts: RunFacts, facts: LabelFacts, prompts: Sequence[Sequence[int]], found: dict[str, Any]
) -> list[Signal]:
    """Signals if no answer ends, although the ends have labels as the rows were rendered here.

    So the ids are not the fault (F10). If the pad is an end and the base did end, a collator that masks labels by id
    explains it; else the model has not trained long enough. Labels of the training's own batches leave no doubt.
    Controls: the base, and the words before the end, which have labels in both cases.
    """
    if "batches" not in run_facts.missing or found["last_words"] >= LEARNED:
        return []
    tokenizer = run_facts.tokenizer
    pad = tokenizer.pad_token_id if tokenizer is not None else None
    if pad not in _ends_of_answers(facts):
        says = f"none of {found['prompts']} answers ends by itself"
        return [Signal(code, "measured", says, 0.4, found) for code in ("F17", "F19")]
    with restore_model_state(live), torch.no_grad(), adapters_off(live.model):
        live.model.eval()
        before = [_greedy(live, prompt, facts.roles.ends, MOST_TOKENS) for prompt in prompts]
    found["base_without_end"] = _looks(before, facts.roles.ends)["without_end"]
    says = (
        f"none of {found['prompts']} answers ends by itself, while {1 - found['base_without_end']:.0%} of the base's "
    )
    says += "answers do; the end of turn is also the padding token"
    fix = "mask labels where attention_mask is 0, not where the id is the pad's; or set a separate pad_token"
    kind, weight = ("measured", 0.65) if found["base_without_end"] < MUCH else ("remark", 0.3)  # control: the base
    return [Signal("F17", kind, says, weight, found, fix=fix)]


def _ends_of_answers(facts: LabelFacts) -> set[int]:
    """The ids with which labels of answers end."""
    last = (int(document.ids[document.learned][-1]) for document in facts.documents if document.learned.any())
    return set(last) & facts.roles.ends


def _last_words(live: LiveModel, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """Loss of the last tokens of a whole answer, before its end."""
    return _cost(live, [*prompt, *answer[:-LAST]], answer[-LAST:])


def _judge(run_facts: RunFacts, found: dict[str, Any]) -> list[Signal]:
    good, bad = found["training_rendering"], found["deployment_rendering"]
    if found["goes_on_after_end"] >= MUCH > found["data_goes_on_after_end"]:
        says = f"in {found['goes_on_after_end']:.0%} of the deployed answers, text follows after the end of turn"
        return [Signal("F14", "invariant", says, 0.9, found, fix="eos_token_id of generation_config: the end of turn")]
    code, fix = _difference(run_facts)
    # without its system prompt a model may well answer otherwise: that is another question, not another template
    kind: Kind = "counterfactual" if found["question_is_whole"] else "remark"
    weight = 0.9 if found["question_is_whole"] else 0.3
    worse = bad["rep_4"] - good["rep_4"] > REPEATS / 2 or bad["without_end"] - good["without_end"] >= MUCH
    if found["as_without_header"] >= MUCH > found["equal"]:
        says = (
            f"{found['as_without_header']:.0%} of the deployed answers are what the model writes if the header of the "
        )
        says += "answer is left out of the prompt, and other answers than with it"
        fix = "render prompts with add_generation_prompt=True"
        return [Signal("F15", kind, says, weight, found, fix=fix)]
    right = found["right"]
    if right["training_rendering"] - right["deployment_rendering"] >= MUCH:
        says = f"with the training format {right['training_rendering']:.0%} of the answers begin as in the data, "
        says += f"as deployed {right['deployment_rendering']:.0%}"
        return [Signal(code, kind, says, weight, found, fix=fix)]
    if good["rep_4"] < REPEATS and good["without_end"] < MUCH and worse and found["equal"] < MUCH:
        says = f"the deployed answers have rep-4 {bad['rep_4']:.2f} and {bad['without_end']:.0%} have no end; with "
        says += f"the training format {good['rep_4']:.2f} and {good['without_end']:.0%}"
        return [Signal(code, kind, says, weight, found, fix=fix)]
    if _never_ended(found):
        says = f"none of {found['prompts']} answers ends by itself, and after the data's own answers an end has a "
        says += f"probability of {found['end_expected']:.1%}"
        return [Signal(code, "measured", says, 0.4, found) for code in ("F10", "F17", "F19")]
    is_other = found["equal"] <= MUCH / 2 and found["deployed_costs_more"] > CLEARLY  # not two equally likely answers
    is_sure = good["without_end"] == 0 and found["deployed_costs_more"] > SURELY
    is_trained = good["without_end"] < MUCH and (found["end_expected"] >= UNEXPECTED or is_sure)  # else any two differ
    is_known = not is_ours(run_facts) and "batches" not in run_facts.missing  # else solotune renders both
    if found["same_again"] and is_other and is_trained and is_known:
        says = (
            f"only {found['equal']:.0%} of the deployed answers begin as with the training format, though they are the "
        )
        says += f"same each time; in that format their loss is {found['deployed_costs_more']:.1f} nats a token higher"
        return [Signal(code, "measured", says, 0.6, found, fix=fix)]
    if found["equal"] >= MUCH:
        says = f"{found['equal']:.0%} of the deployed answers equal those with the training format"
        cleared = ("F11", "F14") if found["stops_at_end"] == 1 and found["ends_are_stops"] else ("F11",)
        return [Signal(code, "measured", says, 0.8, found, against=True) for code in cleared]
    return []


def _difference(run_facts: RunFacts) -> tuple[str, str]:
    """The fault, and its fix, where answers are good only in the format of the rows: the deployment's, or the rows' if
    none of them has the format that the model was taught."""
    pieces, texts = own_frame(run_facts), decoded(run_facts)
    marker = pieces[1].strip() if pieces and is_chat_model(run_facts, pieces[2]) else ""
    if marker and texts and not any(marker in text for text in texts):
        return "F12", 'give the data as {"messages": [...]}, so that the model\'s own template is applied'
    return "F11", "serve with the chat template that rendered the training rows"


def _without_header(facts: LabelFacts, prompt: Sequence[int]) -> list[int] | None:
    """The prompt without the header of the answer at its end; None if it does not end with the template's."""
    header = facts.roles.headers.get(ASSISTANT, "")
    for end in facts.roles.template.terminators if facts.roles.template else ():
        header = header.removeprefix(end).lstrip()
    ids = facts.roles.encode(header) if header else []
    return list(prompt[: -len(ids)]) if ids and list(prompt[-len(ids) :]) == ids else None


def _share_right(answers: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]], ends: frozenset[int]) -> float:
    return float(np.mean([_alike(a, w, ends) for a, w in zip(answers, wanted, strict=True)]))


def _first_turn(facts: LabelFacts, document: Document) -> Document:
    """The document up to the end of its first answer: a deployment that is asked once does not know later turns."""
    roles_T = facts.roles.of(document)
    answers = np.flatnonzero(roles_T == ASSISTANT) if roles_T is not None else np.zeros(0, int)
    behind = np.flatnonzero(np.diff(answers) > 1)  # where a later turn begins
    if not len(behind):
        return document
    size = int(answers[behind[0]]) + 1
    ids, labels = document.ids[:size], document.labels[:size]
    return replace(document, end=document.start + size, ids=ids, labels=labels)


def _question(facts: LabelFacts, document: Document) -> str:
    """What the user of the document asks first; empty if somebody else begins."""
    conversation = facts.roles.conversation_in(facts.roles.text_of(document)[0]) or ()
    turns = [message for message in conversation if message.get("role") not in ("system", "developer")]
    is_asked = [message.get("role") for message in turns[:2]] == ["user", "assistant"]
    return str(turns[0].get("content") or "") if is_asked else ""


def _is_whole(facts: LabelFacts, document: Document) -> bool:
    """The question is the whole prompt: no instruction before it, which a deployment may leave out."""
    conversation = facts.roles.conversation_in(facts.roles.text_of(document)[0]) or ()
    return all(message.get("role") in ("user", "assistant") for message in conversation)


def _greedy(live: LiveModel, prompt: Sequence[int], ends: frozenset[int], count: int) -> list[int]:
    ids = list(prompt)
    while len(ids) < len(prompt) + count and not (len(ids) > len(prompt) and ids[-1] in ends):
        inputs = torch.tensor([ids], device=device_of(live.model))
        ids.append(int(logits_of(live.model, {"input_ids": inputs})[0, -1].argmax()))
    return ids[len(prompt) :]


def _expects_end(live: LiveModel, ids: Sequence[int], ends: frozenset[int]) -> float:
    """Probability of an end of turn as the next token."""
    inputs = torch.tensor([list(ids)], device=device_of(live.model))
    chances_V = logits_of(live.model, {"input_ids": inputs})[0, -1].float().softmax(-1)
    return float(chances_V[sorted(ends)].sum())


def _looks(answers: Sequence[Sequence[int]], ends: frozenset[int]) -> dict[str, float]:
    return {
        "without_end": float(np.mean([not any(i in ends for i in ids) for ids in answers])),
        "rep_4": float(np.mean([_repeats([i for i in ids if i not in ends]) for ids in answers])),
    }


def _repeats(ids: Sequence[int]) -> float:
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _behind_end(ids: Sequence[int], ends: frozenset[int]) -> int:
    """Number of tokens after the first end."""
    return next((len(ids) - n - 1 for n, i in enumerate(ids) if i in ends), 0)


def _alike(a: Sequence[int], b: Sequence[int], ends: frozenset[int]) -> bool:
    """The first tokens of both are equal, without ends: a deployment may strip spaces and hide its ends."""
    a, b = [i for i in a if i not in ends], [i for i in b if i not in ends]
    size = min(len(a), len(b), LIKE)
    return a[:size] == b[:size] and bool(size or not (a or b))
