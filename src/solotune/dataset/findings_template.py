"""Static rules on the chat template (S3).

Every rule's docstring says: *Sees*, *Why* it matters, *Not* (its look-alikes, and what tells them apart), *Fix*, and
*Wrong when*.
"""

from __future__ import annotations

import json
import re
from functools import partial

import numpy as np

from solotune.dataset.chat import ChatTemplate
from solotune.dataset.findings_facts import Facts, Finding, evenly, is_pattern, percent, rendered_prompt, squeezed
from solotune.dataset.findings_tokenizer import pieces_of, template_pieces

MOST = 0.5
"""A property of the template or the tokenizer shows in all rows; half leaves room for rows that hide it."""
SOME = 0.05
"""One row in twenty: what the data door could not be blamed for (a role that only some rows have)."""
NUM_RENDERED = 100
"""Prompts rendered anew; a template is a slow program, and a fault of it shows in a few."""

_FOREIGN = re.compile(
    r"^\s*(###\s*(?:Human|User|Assistant|Instruction|Response)\b|(?:Human|User|USER|Assistant|ASSISTANT|GPT):"
    r"|\[/?INST\]|<\|im_start\|>|<\|(?:user|assistant|system)\|>|<start_of_turn>|<\|start_header_id\|>)",
    re.MULTILINE,
)

_S3 = partial(Finding, suspect="S3")


def double_bos(facts: Facts) -> Finding | None:
    """F08: rows begin with two begin-of-text tokens.

    Sees: the first two ids of each row.
    Why: serving writes one; the mismatch costs a little quality. It is never the cause of a plateau (loss ratio 1.03).
    Not: one bos and then a header token; a bos inside a row between packed documents.
    Fix: one of the two places that write it.
    Wrong when: the base was trained with two.
    """
    side, bos = facts.train, facts.named_id("bos")
    long = np.flatnonzero(side.lengths > 1)
    if bos is None or not len(long):
        return None
    first = side.starts[long]
    rows = long[(side.ids[first] == bos) & (side.ids[first + 1] == bos)]
    if not is_pattern(len(rows), len(side.rows), 0.01):
        return None
    spelled = facts.spelled(bos)
    return _S3(
        "F08",
        "double-bos",
        severity="warning",
        message=f"{len(rows):,} rows ({percent(len(rows), len(side.rows))}) begin with {spelled} twice.",
        evidence={"rows_with": len(rows), "rows": side.places(rows), "bos_id": bos},
        fix=f"write {spelled} once in {facts.config.chat_template_path or 'the chat template (set chat_template_path)'}"
        if facts.is_chat
        else f"remove {spelled} from the beginning of the texts: it is added for you",
    )


def missing_bos(facts: Facts) -> Finding | None:
    """F09: a template of your own leaves out the begin-of-text token that the model's texts start with.

    Sees: what the tokenizer puts before a plain text, or the model's own template before a chat, against the first id
    of the rows.
    Why: every text the base was trained on began with it; some families (Gemma) degrade badly without.
    Not: ChatML models that define a bos and never write it (Qwen, SmolLM2: their tokenizer adds none); a model's own
    template without it (Zephyr), which is then served without it too; later pieces of a row that was split.
    Fix: `{{ bos_token }}` at the template's beginning.
    Wrong when: the template file is the model's own, copied.
    """
    side = facts.train
    if not facts.is_chat or not facts.config.chat_template_path:
        return None
    before, who = list(facts.encoder.affixes[0]), "this tokenizer starts every text with"
    pieces = pieces_of(facts.own_template) if not before and facts.own_template else None
    if pieces is not None:
        before, who = facts.encode(pieces[0])[:1], "the model's own template begins with"
        before = before if before == [facts.named_id("bos")] else []
    if not before or (side.ids[side.starts[:-1]] == before[0]).any():
        return None
    return _S3(
        "F09",
        "missing-bos",
        severity="warning",
        message=f"No row begins with {facts.spelled(before[0])}, which {who}.",
        evidence={"rows_with": 0, "rows_without": len(side.rows), "rows": side.places(range(len(side.rows)))},
        fix=f"begin {facts.config.chat_template_path} with {{{{ bos_token }}}}",
    )


def not_through_template(facts: Facts) -> Finding | None:
    """F12: rows for a chat model are not in its chat format, or are in another's.

    Sees: of chats: that most messages hold control tokens or role labels, so that they were rendered already; that
    `chat_template_path` writes another text before an answer than the model's own template. Of rows of text: that the
    template's text between question and answer occurs in none, and that they are prompt + completion, or carry two role
    labels of another format (`### Human:`).
    Why: the model learns a second format beside its own (first loss 10 times as high) and is then asked in the first.
    Not: a base model, where any format is legitimate: told by eos, which ends the template's turns only in a chat
    model; continued training on documents (no role labels); a few rows that talk about chat formats.
    Fix: a messages column.
    Wrong when: the same format is used for serving on purpose.
    """
    side = facts.train
    if facts.is_chat:
        return _rendered_twice(facts) or _template_replaced(facts)
    pieces = template_pieces(facts)
    if pieces is None or not facts.template or not side.rows or not squeezed(pieces[1]):
        return None
    if not _is_taught(facts, facts.template):
        return None
    rows = evenly(range(len(side.rows)), NUM_RENDERED)
    texts = [facts.decode(side.rows[r].input_ids) for r in rows]
    if any(squeezed(pieces[1]) in squeezed(text) for text in texts):
        return None
    foreign = [r for r, text in zip(rows, texts, strict=True) if len(set(_FOREIGN.findall(text))) >= 2]
    is_pair = facts.report.format == "prompt-completion"
    if not is_pair and not is_pattern(len(foreign), len(rows), MOST):
        return None
    label = next(iter(_FOREIGN.findall(texts[0])), None)
    return _S3(
        "F12",
        "not-through-chat-template",
        severity="warning",
        message="The rows are not in the model's chat format"
        + (f": they are marked with `{label.strip()}` instead." if label else ", and this is a chat model."),
        evidence={
            "rows_read": len(rows),
            "with_the_template": 0,
            "with_another_format": len(foreign),
            "rows": side.places(rows),
            "expected": pieces[1].strip(),
        },
        fix='give each row as {"messages": [{"role": "user", ...}, {"role": "assistant", ...}]}: the chat template is '
        "then applied for you",
    )


def _is_taught(facts: Facts, template: ChatTemplate) -> bool:
    """Whether the model's files end generation with what the template ends its turns with."""
    ends = {facts.encode(text)[-1] for text in template.terminators}
    return bool(ends & (facts.model_ids("eos_token_id") | {facts.eos_id}))


def _template_replaced(facts: Facts) -> Finding | None:
    own = facts.own_template
    if own is None or not facts.train.rows or not _is_taught(facts, own):
        return None
    pieces = pieces_of(own)
    if pieces is None:
        return None
    header = pieces[1].strip()
    for end in own.terminators:  # of the question, whose absence is another fault (F10)
        header = header.removeprefix(end).strip()
    if not squeezed(header):
        return None
    rows = evenly(range(len(facts.train.rows)), NUM_RENDERED)
    if any(squeezed(header) in squeezed(facts.decode(facts.train.rows[r].input_ids)) for r in rows):
        return None
    return _S3(
        "F12",
        "not-through-chat-template",
        severity="warning",
        message=f"{facts.config.chat_template_path} renders another format than the model was taught: "
        f"{header!r}, which its own template writes before an answer, is in no row.",
        evidence={"rows_read": len(rows), "with_the_template": 0, "rows": facts.train.places(rows)},
        fix="remove chat_template_path, so that the model's own template renders the rows",
    )


def _rendered_twice(facts: Facts) -> Finding | None:
    total = facts.report.num_train + facts.report.num_validation
    forged = facts.report.num_with_forged_tokens
    labelled = [r for r in facts.chats if any(_FOREIGN.match(m["content"]) for m in facts.train.rows[r].messages)]
    if not is_pattern(forged, total, MOST) and not is_pattern(len(labelled), len(facts.chats), MOST):
        return None
    return _S3(
        "F12",
        "not-through-chat-template",
        severity="warning",
        message="The messages were rendered before: their texts contain chat markup, which the chat template then "
        "wraps once more.",
        evidence={
            "rows_with_control_tokens": forged,
            "rows_with_role_labels": len(labelled),
            "rows": facts.train.places(labelled),
        },
        fix="give the bare texts of the messages, without role labels and control tokens",
    )


def role_dropped(facts: Facts) -> Finding | None:
    """F13: the template leaves out what a role says.

    Sees: whether the text of every system, user and tool message, and the names of the tools, occur in the decoded
    row. A text that was changed on the way counts as there if eight of ten of its words are.
    Why: the model is taught to answer without the instructions it will be given. Nothing in the loss shows it.
    Not: thinking cut out of earlier answers (assistant turns are not looked at); a row that was truncated.
    Fix: a template that renders the role, or its text moved into the first user message.
    Wrong when: the template rewrites a text beyond recognition.
    """
    seen: dict[str, int] = {}
    missing: dict[str, list[int]] = {}
    for row in facts.sample(facts.train):
        example = facts.train.rows[row]
        whole = squeezed(facts.decode(example.input_ids))
        for role, lost in _roles_lost(example.messages, example.tools, whole).items():
            seen[role] = seen.get(role, 0) + 1
            if lost:
                missing.setdefault(role, []).append(row)
    lost = {role: rows for role, rows in missing.items() if is_pattern(len(rows), seen[role], SOME)}
    if not lost:
        return None
    role, rows = max(lost.items(), key=lambda item: len(item[1]) / seen[item[0]])
    return _S3(
        "F13",
        "role-dropped",
        severity="error" if len(rows) >= MOST * seen[role] else "warning",
        message=f"The chat template leaves out the {role}{' definitions' if role == 'tools' else ' messages'}: "
        f"{len(rows)} of {seen[role]} rows that were read back do not contain {'them' if role == 'tools' else 'it'}.",
        evidence={
            "rows_read": seen,
            "rows_without": {name: len(found) for name, found in lost.items()},
            "rows": facts.train.places(rows),
        },
        fix="set chat_template_path to a template that renders "
        + ("tools" if role == "tools" else f"{role} messages, or put their text into the first user message"),
    )


def _roles_lost(messages: list[dict], tools: list[dict] | None, whole: str) -> dict[str, bool]:
    """role -> whether some text of it is missing from the row."""
    lost: dict[str, bool] = {}
    for message in messages:
        text = squeezed(message["content"])
        if message["role"] == "assistant" or len(text) < 4:
            continue
        words = {squeezed(word) for word in message["content"].split()}
        quoted = squeezed(json.dumps(message["content"], ensure_ascii=False)[1:-1])  # Llama 3.1, of a tool's result
        is_there = text in whole or quoted in whole or sum(word in whole for word in words) >= 0.8 * len(words) > 4
        lost[message["role"]] = lost.get(message["role"], False) or not is_there
    names = [str((tool.get("function") or tool).get("name")) for tool in tools or ()]
    if names:
        lost["tools"] = not any(squeezed(name) in whole for name in names)
    return lost


def stops_elsewhere(facts: Facts) -> Finding | None:
    """F14: the answers end with a token that the model's generation does not stop at.

    Sees: the most frequent last token of the answers, against eos_token_id of generation_config.json (or config.json)
    and the tokenizer's eos.
    Why: the model learns its end of turn, writes it, and goes on: endless answers wherever the adapter is served.
    Not: no end of turn at all (F10) or one that is not learned (F17, F19).
    Fix: the token added to the stop list where it is served.
    Wrong when: the serving engine reads stop tokens from elsewhere.
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
    return _S3(
        "F14",
        "stops-elsewhere",
        severity="warning",
        message=f"Answers end with {spelled}, but the model's generation stops at "
        f"{', '.join(facts.spelled(i) for i in sorted(stops))}.",
        evidence={"answer_end_id": end, "answers": int(counts.max()), "stop_ids": sorted(stops)},
        fix=f"add {end} to eos_token_id in generation_config.json where the model is served, or end answers with "
        "{{ eos_token }} in a template of your own (chat_template_path)",
    )


def header_learned(facts: Facts) -> Finding | None:
    """F15: the answers that are learned begin with the role header, or the template writes a header after them.

    Sees: control tokens at the beginning of most answers that also stand in the template's text before an answer.
    Why: the prompt that is served ends with the header; the model writes a second one, or nothing.
    Not: Mistral, whose `[/INST]` ends the question and whose generation prompt is empty; thinking and tool tokens,
    which are the model's to write; `assistant_only_loss: false`, where headers are learned on purpose.
    Fix: the generation prompt in the template.
    Wrong when: the model is served without a generation prompt too.
    """
    side = facts.train
    pieces = template_pieces(facts)
    if pieces is None or not facts.is_chat or not facts.config.assistant_only_loss or not len(side.begins):
        return None
    # the first token of a header: later ones may be the model's to write (`<|message|>` of gpt-oss)
    header = [i for i in facts.encode(pieces[1]) if i in facts.control.ids and i not in facts.turn_end_ids][:1]
    with_header = np.flatnonzero(np.isin(side.ids[side.begins], header))
    calls = {r for r, row in enumerate(side.rows) if any("tool_calls" in m for m in row.messages)}
    with_header = with_header[~np.isin(side.row_of[with_header], list(calls))]
    if not is_pattern(len(with_header), len(side.begins), MOST):
        return None
    start = int(side.begins[with_header[0]])
    first = facts.decode(side.ids[start : start + 4])
    return _S3(
        "F15",
        "header-learned",
        severity="warning",
        message=f"The answers that are learned begin with the role header ({first.strip()!r}): the template does not "
        "write it as the generation prompt.",
        evidence={
            "answers_with": len(with_header),
            "answers": len(side.begins),
            "rows": side.places(np.unique(side.row_of[with_header])),
        },
        fix="end the template with {% if add_generation_prompt %}, the header that stands before an answer, "
        "{% endif %} (set chat_template_path)",
    )


def prompt_is_no_prefix(facts: Facts) -> Finding | None:
    """F16: what the model is asked with is not how the training row begins.

    Sees: of chats, prompts rendered and tokenised as for generating, against the first ids of their rows; of prompt +
    completion texts, the count that the data door keeps of prompts whose tokens are others when they stand alone.
    Why: the answer is learned after other tokens than it will be asked after; where a token reaches across the
    boundary, the answer's first word is not learned at all.
    Not: templates that rewrite earlier turns (Qwen3's thinking): the prompt of the last answer is compared, with the
    history as the row has it; a role header that is learned (F15).
    Fix: the boundary at a token, or rows with the thinking block that the generation prompt opens.
    Wrong when: the prompt is served in the other form on purpose.
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
    return _S3(
        "F16",
        "prompt-is-no-prefix",
        severity="warning",
        message=f"{len(wrong)} of {read} rows do not begin with the prompt that the model would be asked with: "
        + ("its last token joins with" if is_merged else f"it ends with {begins!r}, which is not what stands before")
        + " the answer.",
        evidence={
            "rows_read": read,
            "token_reaches_across": len(merged),
            "template_differs": len(other),
            "rows": facts.train.places(wrong),
        },
        fix="end the generation prompt of the template at a token boundary (a newline), not in a blank"
        if is_merged
        else "give the answers the block that the generation prompt opens (a thinking block), or set "
        "chat_template_path to a template without it",
    )


def _text_prompt_is_no_prefix(facts: Facts) -> Finding | None:
    labels = facts.report.labels
    if not is_pattern(labels.num_not_prefix, len(labels.shares), SOME):
        return None
    return _S3(
        "F16",
        "prompt-is-no-prefix",
        severity="warning",
        message=f"{labels.num_not_prefix:,} of {len(labels.shares):,} prompts end inside a token: its other part, the "
        "beginning of the completion, is not learned.",
        evidence={
            "rows_with": labels.num_not_prefix,
            "rows_read": len(labels.shares),
            "tokens_reaching_across": labels.num_crossing,
            "rows": facts.train.places(range(len(facts.train.rows))),
        },
        fix="move the blank from the end of the prompts to the beginning of the completions",
    )


RULES = (
    double_bos,
    missing_bos,
    not_through_template,
    role_dropped,
    stops_elsewhere,
    header_learned,
    prompt_is_no_prefix,
)
