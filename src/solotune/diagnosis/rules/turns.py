"""S3, the chat template and special tokens within a turn: F10, F13 and F14, on its end and its roles."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from solotune.dataset.chat.rendered_content import NAME, THOUGHTS, TOOLS, WAYS_TO_KEEP_THOUGHTS
from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.rendered_chats import NUM_ROWS, rendered
from solotune.diagnosis.facts.row_arrays import Side, is_pattern, percent, squeezed
from solotune.diagnosis.facts.row_facts import RowFacts
from solotune.diagnosis.facts.row_labels import open_answers
from solotune.diagnosis.facts.rows import examples_of, plain_messages
from solotune.diagnosis.findings import Finding, Severity
from solotune.diagnosis.rules import rule
from solotune.diagnosis.run_facts import RunFacts
from solotune.errors import InputError

MOST = 0.5
"""A fault of the template or tokenizer shows in all rows; half allows for rows that hide it."""
SOME = 0.05
"""One row in twenty, for faults that depend on the row (a role that only some rows have)."""
FEW = 0.01
"""One row in a hundred, for faults that should never happen."""
NEARLY_ALL = 0.95
"""A twentieth allows for rows of another source."""
NUM_TAIL = 4
"""Last tokens of an answer: its end, and white space after it."""
NUM_TRIED = 5
"""Chats to render with a test word."""
_SENTINEL = "zqxjkv"


@rule("F10", needs=("rows",))
def terminator_missing(facts: RowFacts) -> Finding | None:
    """F10: the answers in the training rows have no end-of-turn token.

    Sees: answers whose last loss token is not an end of turn, and is not followed by one.
    Why: a model that never sees an end never stops, and writes the user's turns too.
    Not: F17 and F19, where the end is there but not trained on; F24, where long rows are truncated; F14, where the end
    is trained on but generation does not stop at it; F07, where the end is spelled as text; a model whose own template
    ends a turn by the header of the next one, at which generation stops (GLM: a remark).
    Fix: write the end-of-turn token in the template (trl appends it to plain text only).
    Wrong when: the text is a document without an end.
    Source: unsloth#416, unsloth#419.
    """
    side = facts.train
    missing = facts.once(open_answers).missing
    rows = np.unique(side.row_of[missing])
    if not is_pattern(len(rows), len(side.rows), FEW):
        return None
    eos = facts.tokenizer.eos_token or "an end-of-text token (the tokenizer has none)"
    is_own = facts.template is not None and facts.own_template is None and not facts.settings.chat_template_path
    is_own = is_own and not facts.is_plain_base  # which has learned no header that could end a turn
    ends_by_header = (
        facts.is_chat
        and is_own
        and facts.template is not None
        and not facts.template.terminators
        and len(rows) >= NEARLY_ALL * len(side.rows)
        and _stops_at_headers(facts)
    )
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
        affected=len(rows) / len(side.rows),
        fix=f"write {eos} after the assistant's content in {path or 'your own template (chat_template_path)'}"
        if facts.is_chat
        else f"end the texts with {eos}",
    )


def _stops_at_headers(facts: RowFacts) -> bool:
    """Whether the model stops at the first control token that the template writes after an answer: the header of the
    next turn. One that ends the question's turn is no header. True if the model's files are not known."""
    known, next_turn = facts.model_ids("eos_token_id"), _after_answer(facts)
    if not known or next_turn is None:
        return not known
    first = facts.control.pattern.search(next_turn)
    return first is not None and facts.tokenizer.convert_tokens_to_ids(first[0]) in known


def _after_answer(facts: RowFacts) -> str | None:
    """The template's text between an answer and the question after it; None if it fails."""
    words = ("quvwxq", "zwvuyz", _SENTINEL)
    chat = [{"role": role, "content": word} for role, word in zip(("user", "assistant", "user"), words, strict=True)]
    try:
        text = facts.template.raw("the probe", chat, None, is_prompt=False) if facts.template else ""
    except InputError:
        return None
    return text.partition(words[1])[2].partition(words[2])[0]


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
        affected=lost / total,
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
    """F13, from the template: a test word in a role that the data has is in no rendering of its chats.

    Control: the chats themselves, since some templates render a role only after another one (a result after its call).
    """
    signals = []
    chats = [plain_messages(chat) for chat in list(run_facts.conversations)[:NUM_ROWS]]
    for role in ("system", "tool"):
        having = [chat for chat in chats if any(message["role"] == role for message in chat)]
        texts = [_with_test_word(run_facts, chat, role) for chat in having[:NUM_TRIED]]
        texts = [text for text in texts if text is not None]
        if texts and not any(_SENTINEL in text for text in texts):
            says = (
                f"the template leaves out the text of {role} messages, which {len(having)} of {len(chats)} chats have"
            )
            fix = f"move the text of {role} messages into the user's, or use a template that renders them"
            share = len(having) / len(chats)
            signals.append(Signal("F13", "invariant", says, 0.9, {"role": role}, fix=fix, affected=share))
    return signals


def _with_test_word(run_facts: RunFacts, chat: list[dict[str, Any]], role: str) -> str | None:
    """The chat as it would be rendered, with a test word as the text of this role; None if the template refuses it."""
    return rendered(run_facts, [{**m, "content": _SENTINEL} if m["role"] == role else m for m in chat])


def ends_at_known_stop(run_facts: RunFacts) -> bool:
    """Whether the deployment, or the generation_config.json beside the run, stops where the answers end; the findings
    on the rows may have been made with the base's file."""
    stops = run_facts.settings.get("serving_stop_ids") or run_facts.generation_config.get("eos_token_id")
    stops = set(stops) if isinstance(stops, (list, tuple, set)) else {stops}
    rows = [row.input_ids[row.loss_mask][-NUM_TAIL:] for row in examples_of(run_facts)[:NUM_ROWS]]
    ending = sum(bool(stops & set(tail.tolist())) for tail in rows)
    return is_pattern(ending, len(rows), SOME)


@rule("F14", needs=("rows",), unless=ends_at_known_stop)
def stops_elsewhere(facts: RowFacts) -> Finding | None:
    """F14: generation stops at a different token than the one that ends the answers.

    Sees: the last tokens of the answers, none of which is among the stop ids: `eos_token_id` of generation_config.json,
    or of config.json without one, as transformers reads them; or those of the deployment if they are known. The
    tokenizer's eos_token is compared too, but `generate` does not read it.
    Why: the model writes its end of turn and continues: answers never end although every label is right.
    Not: F10 and F17, where the output never contains the end-of-turn token; several stop ids of which one is right;
    some rows of another source that end with another token (a remark).
    Fix: add the token to `eos_token_id` in generation_config.json.
    Wrong when: the serving engine has its own stop tokens.
    Source: unsloth#416, torchtune#949; transformers warns if the three ids differ.
    """
    stops, side = facts.model_ids("eos_token_id"), facts.train
    is_last = np.diff(side.row_of, append=-1) != 0  # earlier answers of a chat may end otherwise (gpt-oss)
    last = side.ids[facts.last_of_answers(side)[is_last]] if len(side.ends) else side.ids[:0]
    last = last[np.isin(last, list(facts.special_ids | facts.control.ids))]
    if not stops or not len(last):
        return None
    elsewhere = last[~np.isin(last, list(stops))]
    if not is_pattern(len(elsewhere), len(last), SOME):
        return None
    is_all = len(elsewhere) >= NEARLY_ALL * len(last)
    found, counts = np.unique(elsewhere, return_counts=True)
    end = int(found[counts.argmax()])
    spelled, where = facts.spelled(end), facts.where_from("eos_token_id")
    agrees = "" if facts.eos_id != end else " (the tokenizer's eos_token is right, but generate does not read it)"
    return Finding.of(
        "F14",
        "error" if is_all else "warning",
        message=f"{'Answers' if is_all else percent(len(elsewhere), len(last)) + ' of the answers'} end with {spelled} "
        f"({end}), but by {where} generation stops at {', '.join(f'{facts.spelled(i)} ({i})' for i in sorted(stops))}"
        f"{agrees}.",
        evidence={"answer_end_id": end, "answers": int(counts.max()), "stop_ids": sorted(stops)},
        affected=len(elsewhere) / len(last),
        fix=f"add {end} to eos_token_id in {where} of the model folder, where the model is served too"
        + ("" if end == facts.eos_id else ", or end answers with {{ eos_token }} in your own template"),
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
