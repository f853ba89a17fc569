"""S3, the header before an answer: F15."""

from __future__ import annotations

import numpy as np

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.derived import is_ours
from solotune.diagnosis.facts.labelled_turns import starts_with_label
from solotune.diagnosis.facts.labels import LabelFacts
from solotune.diagnosis.facts.rendered_chats import NUM_ROWS, rendered
from solotune.diagnosis.facts.roles import Roles
from solotune.diagnosis.facts.row_arrays import NUM_DECODED, evenly, is_pattern, squeezed
from solotune.diagnosis.facts.row_facts import NUM_RENDERED, RowFacts, pieces_of_template
from solotune.diagnosis.findings import Finding
from solotune.diagnosis.rules import rule
from solotune.diagnosis.run_facts import RunFacts

MOST = 0.5
"""A fault of the template or tokenizer shows in all rows; half allows for rows that hide it."""


@rule("F15", needs=("rows",), probes=("P13",))
def header_learned(facts: RowFacts) -> Finding | None:
    """F15: the role header before the answer is missing in serving, doubled, or trained on as part of the answer.

    Sees: answers whose loss begins at their role header; a generation prompt that writes the header twice; rows in
    which it stands twice before the answer; prompts served without the template's generation prompt; deployed answers
    that are what the model writes after a prompt without the header (probe P13).
    Why: the answer starts with a header, or is empty.
    Not: F11, where not only the start of the answer differs; templates with an empty generation prompt (Mistral);
    `assistant_only_loss: false`, where headers are trained on, on purpose; a model whose own template has no generation
    prompt, which was probably trained so (a remark).
    Fix: render both with the same function, with `add_generation_prompt=True`.
    Wrong when: the model is served without a generation prompt, and was trained so.
    Source: trl#4201.
    """
    side = facts.train
    pieces = pieces_of_template(facts)
    if pieces is not None and facts.is_chat and (twice := header_doubled(facts)):
        return Finding.of(
            "F15",
            "error",
            message=f"The generation prompt writes the header of an answer twice ({twice!r}); the rows have it once.",
            evidence={"generation_prompt": twice, "rows": side.places(range(len(side.rows)))},
            affected=1.0,
            fix="write the header once after {% if add_generation_prompt %} in the chat template",
        )
    if pieces is None or not facts.is_chat or not facts.settings.assistant_only_loss or not len(side.begins):
        return None
    with_header = _answers_with_header(facts, pieces[1])
    calls = {r for r, row in enumerate(side.rows) if any("tool_calls" in m for m in row.messages)}
    with_header = with_header[~np.isin(side.row_of[with_header], list(calls))]
    with_header = with_header[~np.isin(side.begins[with_header], side.starts)]  # there everything counts: F20
    if not is_pattern(len(with_header), len(side.begins), MOST):
        return None
    start = int(side.begins[with_header[0]])
    first = facts.decode(side.ids[start : start + 4])
    own, asked = facts.own_template, facts.template.generation_prompt.strip() if facts.template else ""
    is_lost = own is not None and bool(own.generation_prompt.strip()) and not asked  # the file of the user has none
    is_written = bool(asked) and squeezed(asked) in squeezed(pieces[1])  # a prompt ends with it, as the rows have it
    return Finding.of(
        "F15",
        "error" if is_lost or is_written else "warning",
        message=f"The loss of the answers begins at the role header ({first.strip()!r})"
        + (
            ", which is in the prompt already."
            if is_written
            else ": the template does not write it as the generation prompt."
        ),
        evidence={
            "answers_with": len(with_header),
            "answers": len(side.begins),
            "rows": side.places(np.unique(side.row_of[with_header])),
        },
        affected=len(with_header) / len(side.begins),
        fix="start the loss after the header: mask it like the prompt"
        if is_written
        else "end the template (chat_template_path) with {% if add_generation_prompt %}, the header before an answer, "
        "{% endif %}",
    )


def _answers_with_header(facts: RowFacts, between: str) -> np.ndarray:
    """Indices of the answers whose labels begin at the header: at its first control token (the model may write later
    ones itself, as `<|message|>` of gpt-oss), or at its text."""
    side = facts.train
    header = [i for i in facts.encode(between) if i in facts.control.ids and i not in facts.turn_end_ids][:1]
    if header:
        return np.flatnonzero(np.isin(side.ids[side.begins], header))
    text = between.strip()
    for end in facts.template.terminators if facts.template else ():
        text = text.removeprefix(end).strip()
    size = 2 * len(facts.encode(text)) + 2
    read = evenly(range(len(side.begins)), NUM_DECODED) if text else []
    begins = (facts.decode(side.ids[side.begins[a] : min(side.begins[a] + size, side.ends[a])]) for a in read)
    found = [a for a, begin in zip(read, begins, strict=True) if begin.lstrip().startswith(text)]
    if not is_pattern(len(found), len(read), MOST):
        return np.zeros(0, np.int64)
    return np.array(found) if len(read) == len(side.begins) else np.arange(len(side.begins))


@rule("F15", needs=("rows",))
def header_twice(facts: RowFacts) -> Finding | None:
    """F15, of answers that were exported with the generation prompt, and rendered with it a second time.

    Control: a template's own row, which has it once. Between two turns of one role stands the end of the first.
    """
    asked = facts.template.generation_prompt.strip() if facts.template else ""
    rows = evenly(range(len(facts.train.rows)), NUM_RENDERED)
    twice = squeezed(asked) * 2
    having = [r for r in rows if asked and twice in squeezed(facts.decode(facts.train.rows[r].input_ids))]
    asks = (message for r in having for message in facts.train.rows[r].messages if message["role"] == "user")
    if not is_pattern(len(having), len(rows), MOST) or any(starts_with_label(message["content"]) for message in asks):
        return None  # or the whole chats were rendered before: F12
    return Finding.of(
        "F15",
        "error",
        message=f"In {len(having):,} of {len(rows):,} rows the header of an answer ({asked!r}) stands twice.",
        evidence={"rows_with": len(having), "rows_read": len(rows), "rows": facts.train.places(having)},
        affected=len(having) / len(rows),
        fix=f"in the data, remove {asked!r} from the beginning of the answers: the chat template writes it",
    )


@rule("F15", needs=("conversations", "tokenizer"), otherwise=True)
def header_in_answers(run_facts: RunFacts) -> Signal | None:
    """F15, of conversations that could not be rendered, since their answers begin with the header's control tokens.

    Control: the questions, which begin with a header too where whole chats were rendered before (F12).
    """
    template = Roles(run_facts).template
    header = template.generation_prompt.strip() if template else ""
    said: dict[str, list[str]] = {role: [] for role in ("user", "assistant")}
    for message in (message for chat in run_facts.conversations[:NUM_ROWS] for message in chat):
        said.setdefault(str(message.get("role")), []).append(str(message.get("content") or "").lstrip())
    having = [text for text in said["assistant"] if text.startswith(header)]
    if not header or not is_pattern(len(having), len(said["assistant"]), MOST):
        return None
    if is_pattern(sum(map(starts_with_label, said["user"])), len(said["user"]), MOST):
        return None
    says = f"{len(having):,} of {len(said['assistant']):,} answers begin with {header!r}, which the template writes too"
    fix = f"in the data, remove {header!r} from the beginning of the answers"
    share = len(having) / len(said["assistant"])
    return Signal("F15", "invariant", says, 0.9, {"answers": len(having)}, fix=fix, affected=share)


@rule("F15", needs=("batches", "conversations", "tokenizer"), otherwise=True, unless=is_ours)
def header_in_labels(run_facts: RunFacts) -> Signal | None:
    """F15, of batches: the labels of an answer begin before its text, at the label or header of its turn.

    Control: the conversations. A phrase with which the answers begin themselves is in their texts; thoughts that a
    template puts before them are no label; a header that the generation prompt leaves out is written by the model.
    """
    facts, template = LabelFacts.of(run_facts), Roles(run_facts).template
    if run_facts.settings.get("assistant_only_loss") is False:
        return None
    first, read = [], 0
    for document in facts.documents[:NUM_ROWS]:
        text, begins_T = facts.roles.text_of(document)
        chat = facts.roles.conversation_in(text) or ()
        said = next((str(turn.get("content") or "") for turn in chat if turn.get("role") == "assistant"), "").strip()
        place = text.find(said) if said else -1
        spans = [(begin, end) for begin, end in document.spans() if begin and end > np.searchsorted(begins_T, place)]
        if place < 0 or not spans:
            continue
        read += 1
        header = text[int(begins_T[spans[0][0]]) : place]
        if starts_with_label(header) and (template is None or squeezed(header) in squeezed(template.generation_prompt)):
            first.append(header)
    if not is_pattern(len(first), read, MOST):
        return None
    says = f"the labels of {len(first)} of {read} answers begin at {first[0].strip()!r}, which stands before the answer"
    fix = "start the labels after the header: mask it like the prompt"
    return Signal("F15", "invariant", says, 0.85, {"answers": len(first)}, fix=fix, affected=len(first) / read)


def header_doubled(facts: RowFacts) -> str:
    """The generation prompt, if it has the header of an answer twice and the template's chats have it once; else
    empty."""
    pieces = facts.once(pieces_of_template)
    asked = "".join(facts.template.generation_prompt.split()) if facts.template else ""
    half = asked[: len(asked) // 2]
    if pieces is None or not half or asked != half * 2:
        return ""
    return facts.template.generation_prompt if "".join(pieces[1].split()).count(half) == 1 else ""  # type: ignore[union-attr]


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
