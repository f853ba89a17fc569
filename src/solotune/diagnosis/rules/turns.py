"""S3, the chat template and special tokens within a turn: F10 and F13 to F16, on its end, header and roles."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from solotune.dataset.chat.rendered_content import NAME, THOUGHTS, TOOLS, WAYS_TO_KEEP_THOUGHTS
from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.rendered_chats import NUM_ROWS, rendered
from solotune.diagnosis.facts.row_arrays import Side, evenly, is_pattern, percent, squeezed
from solotune.diagnosis.facts.row_facts import RowFacts, pieces_of_template, rendered_prompt
from solotune.diagnosis.facts.row_labels import open_answers
from solotune.diagnosis.facts.rows import examples_of, plain_messages
from solotune.diagnosis.findings import Finding, Severity
from solotune.diagnosis.rules import rule
from solotune.diagnosis.run_facts import RunFacts

MOST = 0.5
"""A fault of the template or tokenizer shows in all rows; half allows for rows that hide it."""
SOME = 0.05
"""One row in twenty, for faults that depend on the row (a role that only some rows have)."""
FEW = 0.01
"""One row in a hundred, for faults that should never happen."""
NUM_RENDERED = 100
"""Prompts to render again; templates are slow, and a fault shows in a few."""
_SENTINEL = "zqxjkv"


@rule("F10", needs=("rows",))
def terminator_missing(facts: RowFacts) -> Finding | None:
    """F10: the answers in the training rows have no end-of-turn token.

    Sees: answers whose last loss token is not an end of turn, and is not followed by one.
    Why: a model that never sees an end never stops, and writes the user's turns too.
    Not: F17 and F19, where the end is there but not trained on; F24, where long rows are truncated; F14, where the end
    is trained on but generation does not stop at it; F07, where the end is spelled as text.
    Fix: write the end-of-turn token in the template (trl appends it to plain text only).
    Wrong when: the model ends turns by starting the next one (GLM), and the adapter does not change that.
    Source: unsloth#416, unsloth#419.
    """
    side = facts.train
    missing = facts.once(open_answers).missing
    rows = np.unique(side.row_of[missing])
    if not is_pattern(len(rows), len(side.rows), FEW):
        return None
    eos = facts.tokenizer.eos_token or "an end-of-text token (the tokenizer has none)"
    ends_by_header = facts.is_chat and not facts.settings.chat_template_path and not facts.turn_end_ids - {facts.eos_id}
    path = facts.settings.chat_template_path
    return Finding.of(
        "F10",
        "error" if len(rows) >= MOST * len(side.rows) and not ends_by_header else "warning",
        message=f"{percent(len(rows), len(side.rows))} of the rows have an answer without an end-of-turn token: the "
        "model is not trained to stop.",
        evidence={
            "answers_without": len(missing),
            "answers": len(side.begins),
            "rows_with": len(rows),
            "rows": side.places(rows),
            "answer_ends": _tail(facts, side, missing[:1]),
        },
        fix=f"write {eos} after the assistant's content in {path or 'your own template (chat_template_path)'}"
        if facts.is_chat
        else f"end the texts with {eos}",
    )


def _tail(facts: RowFacts, side: Side, answers: np.ndarray) -> list[str]:
    return [facts.decode(side.ids[max(side.begins[a], side.ends[a] - 6) : side.ends[a]]) for a in answers]


@rule("F13", needs=("rows",))
def role_dropped(facts: RowFacts) -> list[Finding]:
    """F13: the template silently leaves out the messages of one role.

    Sees: texts of system, user and tool messages, tools and names that are not in the rendered rows; a test word in
    each role of the data that is not in the rendered chat.
    Why: the model is trained to answer without the instructions that it will get later. No loss shows it.
    Not: thinking that the template removes from earlier answers, which is only mentioned (and refused if no thought is
    rendered); truncated rows; a template that raises an error for the role.
    Fix: move the text into the first user message, in training and in serving.
    Wrong when: the template rewrites the text completely.
    Source: Automodel#3143 ("indistinguishable from one that trains on them"), node-llama-cpp#624.
    """
    if facts.report.contents:
        return [_left_out(kind, counts) for kind, counts in facts.report.contents.items() if counts["lost"]]
    seen: dict[str, int] = {}
    missing: dict[str, list[int]] = {}
    for row in facts.sample(facts.train):
        example = facts.train.rows[row]
        whole = squeezed(facts.decode(example.input_ids))
        for role, lost in _roles_lost(example.messages, example.tools, whole).items():
            seen[role] = seen.get(role, 0) + 1
            if lost:
                missing.setdefault(role, []).append(row)
    counts = {
        role: {"total": seen[role], "lost": len(rows), "rows": facts.train.places(rows)}
        for role, rows in missing.items()
        if is_pattern(len(rows), seen[role], SOME)
    }
    return [_left_out(role, lost) for role, lost in counts.items()]


def _left_out(kind: str, counts: dict[str, Any]) -> Finding:
    """The finding on content of one kind (`rendered_content.Part`) that renderings lack."""
    lost, total = counts["lost"], counts["total"]
    severity: Severity = "error" if lost >= MOST * total else "warning" if is_pattern(lost, total, SOME) else "info"
    where = f" ({', '.join(counts['rows'])})"
    what = f"{lost:,} of {total:,} {kind} messages"
    fix = f"set chat_template_path to a template that renders {kind} messages, or move their text into the first user "
    fix += "message"
    if kind == TOOLS:
        what = f"the tools definitions of {lost:,} of {total:,} rows"
        fix = "set chat_template_path to a template that renders tools"
    elif kind == THOUGHTS:
        severity, what = "info", f"{lost:,} of {total:,} thoughts: the model does not learn to think in these answers"
        fix = WAYS_TO_KEEP_THOUGHTS
    elif kind == NAME:
        severity, what = "info", f"{lost:,} of {total:,} values of the key name"
        fix = "write the name into the content if it matters who speaks, or set chat_template_path to a template that "
        fix += "renders it"
    return Finding.of(
        "F13",
        severity,
        message=f"The chat template leaves out {what}{where}.",
        evidence={"kind": kind, "lost": lost, "of": total, "rows": counts["rows"]},
        fix=fix,
        slug="thoughts-dropped" if kind == THOUGHTS else "",
    )


def _roles_lost(messages: list[dict], tools: list[dict] | None, whole: str) -> dict[str, bool]:
    """Role -> whether some of its text is missing from the row."""
    lost: dict[str, bool] = {}
    for message in messages:
        text = squeezed(message["content"])
        if message["role"] == "assistant" or len(text) < 4:
            continue
        words = {squeezed(word) for word in message["content"].split()}
        quoted = squeezed(
            json.dumps(message["content"], ensure_ascii=False)[1:-1]
        )  # Llama 3.1 writes a tool's result so
        is_there = text in whole or quoted in whole or sum(word in whole for word in words) >= 0.8 * len(words) > 4
        lost[message["role"]] = lost.get(message["role"], False) or not is_there
    names = [str((tool.get("function") or tool).get("name")) for tool in tools or ()]
    if names:
        lost["tools"] = not any(squeezed(name) in whole for name in names)
    return lost


@rule("F13", otherwise=True)
def template_leaves_out_a_role(run_facts: RunFacts) -> list[Signal]:
    """F13, from the template: a test word in a role that the data has is not in the rendered chat."""
    signals = []
    roles = {str(m.get("role")) for chat in list(run_facts.conversations)[:NUM_ROWS] for m in plain_messages(chat)}
    for role in sorted(roles & {"system", "tool"}):
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        chat.insert(0 if role == "system" else 2, {"role": role, "content": _SENTINEL})
        text = rendered(run_facts, chat)
        if text is not None and _SENTINEL not in text:
            says = f"the template leaves out the text of {role} messages"
            fix = f"move the text of {role} messages into the user's, or use a template that renders them"
            signals.append(Signal("F13", "invariant", says, 0.9, {"role": role}, fix=fix))
    return signals


@rule("F14", needs=("rows",))
def stops_elsewhere(facts: RowFacts) -> Finding | None:
    """F14: generation stops at a different token than the one that ends the answers.

    Sees: the last token of the answers is not among the stop ids of generation_config.json, or of the deployment if
    they are known.
    Why: the model writes its end of turn and continues: answers never end although every label is right.
    Not: F10 and F17, where the output never contains the end-of-turn token.
    Fix: add the token to `eos_token_id` in generation_config.json.
    Wrong when: the serving engine has its own stop tokens.
    Source: unsloth#416, torchtune#949.
    """
    stops = facts.model_ids("eos_token_id")
    last = facts.train.ids[facts.last_of_answers(facts.train)] if len(facts.train.ends) else facts.train.ids
    last = last[np.isin(last, list(facts.special_ids))]
    if not stops or not len(last):
        return None
    found, counts = np.unique(last, return_counts=True)
    end = int(found[counts.argmax()])
    if end in stops | {facts.eos_id}:
        return None
    spelled = facts.spelled(end)
    return Finding.of(
        "F14",
        "warning",
        message=f"Answers end with {spelled}, but generation stops at "
        f"{', '.join(facts.spelled(i) for i in sorted(stops))}.",
        evidence={"answer_end_id": end, "answers": int(counts.max()), "stop_ids": sorted(stops)},
        fix=f"add {end} to eos_token_id in generation_config.json where the model is served, or end answers with "
        "{{ eos_token }} in your own template (chat_template_path)",
    )


@rule("F14", otherwise=True)
def deployment_stops_elsewhere(run_facts: RunFacts) -> Signal | None:
    """F14, of a deployment whose stop ids are known."""
    stops, rows = run_facts.settings.get("serving_stop_ids"), examples_of(run_facts)
    if not isinstance(stops, (list, tuple, set)) or not rows:
        return None
    tokenizer = run_facts.tokenizer
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder) if tokenizer is not None else set()
    last = [int(row.input_ids[row.loss_mask][-1]) for row in rows if row.loss_mask.any()]
    last = [i for i in last if i in special]
    if not last:
        return None
    found, counts = np.unique(last, return_counts=True)
    end = int(found[counts.argmax()])
    if end in stops:
        return None
    spelled = tokenizer.convert_ids_to_tokens(end) if tokenizer is not None else end
    says = f"{counts.max():,} answers end with {spelled} ({end}), but generation stops at {sorted(map(int, stops))}"
    return Signal("F14", "invariant", says, 0.9, {"end": end}, fix=f"eos_token_id: {sorted({*map(int, stops), end})}")


@rule("F15", needs=("rows",))
def header_learned(facts: RowFacts) -> Finding | None:
    """F15: the role header before the answer is missing in serving, doubled, or trained on as part of the answer.

    Sees: answers whose loss begins at their role header; prompts served without the template's generation prompt.
    Why: the answer starts with a header, or is empty.
    Not: F11, where not only the start of the answer differs; templates with an empty generation prompt (Mistral);
    `assistant_only_loss: false`, where headers are trained on, on purpose.
    Fix: render both with the same function, with `add_generation_prompt=True`.
    Wrong when: the model is served without a generation prompt, and was trained so.
    Source: trl#4201.
    """
    side = facts.train
    pieces = pieces_of_template(facts)
    if pieces is None or not facts.is_chat or not facts.settings.assistant_only_loss or not len(side.begins):
        return None
    # the first token of a header: the model may write later ones itself (`<|message|>` of gpt-oss)
    header = [i for i in facts.encode(pieces[1]) if i in facts.control.ids and i not in facts.turn_end_ids][:1]
    with_header = np.flatnonzero(np.isin(side.ids[side.begins], header))
    calls = {r for r, row in enumerate(side.rows) if any("tool_calls" in m for m in row.messages)}
    with_header = with_header[~np.isin(side.row_of[with_header], list(calls))]
    if not is_pattern(len(with_header), len(side.begins), MOST):
        return None
    start = int(side.begins[with_header[0]])
    first = facts.decode(side.ids[start : start + 4])
    return Finding.of(
        "F15",
        "warning",
        message=f"The loss of the answers begins at the role header ({first.strip()!r}): the template does not write "
        "it as the generation prompt.",
        evidence={
            "answers_with": len(with_header),
            "answers": len(side.begins),
            "rows": side.places(np.unique(side.row_of[with_header])),
        },
        fix="end the template (chat_template_path) with {% if add_generation_prompt %}, the header before an answer, "
        "{% endif %}",
    )


@rule("F15", otherwise=True)
def served_without_header(run_facts: RunFacts) -> Signal | None:
    """F15, of a deployment that leaves out the generation prompt."""
    if run_facts.settings.get("add_generation_prompt") is not False:
        return None
    chat = [{"role": "user", "content": "a"}]
    with_prompt, without = rendered(run_facts, chat, prompt=True), rendered(run_facts, chat)
    if with_prompt is None or with_prompt == without:
        return None
    says = (
        f"prompts are served without {with_prompt.removeprefix(without or '')!r}, which is before answers in training"
    )
    return Signal("F15", "invariant", says, 0.9, {}, fix="render prompts with add_generation_prompt=True")


@rule("F16", needs=("rows",))
def prompt_is_no_prefix(facts: RowFacts) -> Finding | None:
    """F16: the prompt's tokens are not the first tokens of the row.

    Sees: prompts, tokenized as in serving, that differ from the first ids of their rows; plain-text prompts that get
    different tokens when tokenized alone.
    Why: in training the answer follows different tokens than in serving; a mask computed from the prompt's length is
    off by a token.
    Not: F20, whose mask is off by many tokens; templates that rewrite earlier turns (Qwen3's thinking), where only the
    last answer counts.
    Fix: end prompts at a token boundary (not with a space), and render earlier turns in the same way in both.
    Wrong when: the model is served in the other form on purpose.
    Source: trl#1920; trl warns once and cuts at the first difference.
    """
    if not facts.is_chat:
        return _text_prompt_is_no_prefix(facts)
    other, merged, read = [], [], 0
    for row in evenly(facts.sample(facts.train), NUM_RENDERED):
        example = facts.train.rows[row]
        turn = max(i for i, message in enumerate(example.messages) if message["role"] == "assistant")
        prompt = rendered_prompt(facts, example.messages[:turn], example.tools)
        if prompt is None:
            continue
        read += 1
        if np.array_equal(prompt, example.input_ids[: len(prompt)]):
            continue
        is_same_text = facts.decode(example.input_ids).startswith(facts.decode(prompt))
        (merged if is_same_text else other).append(row)
    wrong = sorted(merged + other)
    if not is_pattern(len(wrong), read, SOME):
        return None
    is_merged = len(merged) > len(other)
    begins = facts.template.generation_prompt if facts.template else ""
    return Finding.of(
        "F16",
        "warning",
        message=f"{len(wrong)} of {read} rows do not begin with the prompt as in serving: "
        + ("its last token joins with" if is_merged else f"it ends with {begins!r}, which is not the text before")
        + " the answer.",
        evidence={
            "rows_read": read,
            "token_reaches_across": len(merged),
            "template_differs": len(other),
            "rows": facts.train.places(wrong),
        },
        fix="end the generation prompt of the template at a token boundary (a newline), not with a space"
        if is_merged
        else "add to the answers the block that the generation prompt opens (a thinking block), or set "
        "chat_template_path to a template without it",
    )


def _text_prompt_is_no_prefix(facts: RowFacts) -> Finding | None:
    labels = facts.report.labels
    if not is_pattern(labels.num_not_prefix, len(labels.shares), SOME):
        return None
    return Finding.of(
        "F16",
        "warning",
        message=f"{labels.num_not_prefix:,} of {len(labels.shares):,} prompts end inside a token: the other part of "
        "this token, the start of the completion, is not trained on.",
        evidence={
            "rows_with": labels.num_not_prefix,
            "rows_read": len(labels.shares),
            "tokens_reaching_across": labels.num_crossing,
            "rows": facts.train.places(range(len(facts.train.rows))),
        },
        fix="move the space from the end of the prompts to the start of the completions",
    )


@rule("F16", otherwise=True)
def prompts_end_in_a_blank(run_facts: RunFacts) -> Signal | None:
    """F16, of prompts and completions as given."""
    chats = [chat for chat in list(run_facts.conversations)[:NUM_ROWS] if chat]
    if run_facts.tokenizer is None or not chats:
        return None
    blank = [chat for chat in chats if str(chat[0].get("prompt") or "").endswith((" ", "\t"))]
    if len(blank) < max(3, 0.05 * len(chats)):
        return None
    says = f"{len(blank)} of {len(chats)} prompts end with a space, which joins with the first word of the answer"
    return Signal("F16", "measured", says, 0.6, {}, fix="move the space from the prompt to the completion")
