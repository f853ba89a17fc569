"""S3, the format: F12, rows that are not in the chat format that the model knows.

What is a fault, and what is a remark
-------------------------------------
Questions and answers with the labels of another prompt format, for a model whose generation ends where its own template
ends a turn, are a fault: the two formats are known, and the model was taught one of them. Plain documents are what they
are, a prompt and its completion are asked as they were trained, and a template that uses the tokenizer's control tokens
may have been chosen: all of these are remarks, until P1 measures that the model's own format is much better.
"""

from __future__ import annotations

import re
from typing import Any

from solotune.dataset.chat.answer_spans import ChatTemplate
from solotune.dataset.chat.control_tokens import ControlTokens
from solotune.dataset.chat.rendered_text import OWN, known_format
from solotune.dataset.data_report import PLAIN
from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.derived import is_ours
from solotune.diagnosis.facts.labelled_turns import labelled_turns, starts_with_label
from solotune.diagnosis.facts.rendered_chats import decoded, frame, is_chat_model, own_frame
from solotune.diagnosis.facts.row_arrays import evenly, is_pattern, squeezed
from solotune.diagnosis.facts.row_facts import NUM_RENDERED, RowFacts, is_in_rows, pieces_of, pieces_of_template
from solotune.diagnosis.facts.rows import examples_of
from solotune.diagnosis.findings import Finding
from solotune.diagnosis.rules import rule
from solotune.diagnosis.run_facts import RunFacts

MOST = 0.5
"""A fault of the format shows in all rows; half allows for rows that hide it."""
SOME = 0.05
"""One row in twenty, for what some rows have that were joined from another source."""
BEGINNING = 3
"""Tokens without a label that are a prompt; the first one, or a begin-of-text, has no label in documents either."""
NEARLY_ALL = 0.95
"""A twentieth allows for rows that are truncated or hide it."""
_TAG = re.compile(r"<\w+>")
"""Of XML, which many messages have."""


@rule("F12", needs=("rows",), probes=("P1",))
def not_through_template(facts: RowFacts) -> Finding | None:
    """F12: the rows are not in the model's chat format.

    Sees: rows of a chat model (generation ends at its template's end of turn) of which none contains the template's
    text between question and answer, while most have the labels or markers of another format ("### Human:", "USER:",
    another model's control tokens); chats of which nearly all were already rendered; a template file that writes plain
    labels where the model's own template writes control tokens.
    Why: the model learns a second format (10 times the first loss), and is then used with the first.
    Not: F04, where the loss on plain text is bad too; F38, whose format is right; a base model, for which any format is
    fine; F07, whose control tokens are present but split; documents, which have no turns; texts in which some users
    quote such markers; prompt and completion, which are asked as they were trained, and a template file with control
    tokens, which may have been chosen (remarks).
    Fix: give the data as a messages column, so that the model's own template is applied.
    Wrong when: the model is served in the same format on purpose.
    Source: the article behind examples/walkthrough.yaml, trl#1400; the first loss is 9.8 times the normal one for raw
    text, 9.6 times with "### Human" (measured).
    """
    side = facts.train
    if facts.is_chat:
        return _rendered_twice(facts) or _template_replaced(facts)
    if facts.report.text_formats[OWN]:
        return _rendered_already(facts)
    pieces = pieces_of_template(facts)
    if pieces is None or not facts.template or not side.rows or not squeezed(pieces[1]):
        return _in_known_format(facts)
    if not _is_taught(facts, facts.template):
        return _in_known_format(facts)
    rows = evenly(range(len(side.rows)), NUM_RENDERED)
    texts = [facts.decode(side.rows[r].input_ids) for r in rows]
    if any(squeezed(pieces[1]) in squeezed(text) for text in texts):
        return None
    foreign = [r for r, text in zip(rows, texts, strict=True) if labelled_turns(text)]
    label = _known_format_of(facts)
    if is_pattern(len(foreign), len(rows), MOST):
        label = label or next(turns[0]["label"] for text in texts if (turns := labelled_turns(text)))
    is_pair = facts.report.format == "prompt-completion"
    if not label and not is_pair:
        return None
    return Finding.of(
        "F12",
        "error" if label and not is_pair else "warning",
        is_statistic=True,
        message="The rows are not in the model's chat format"
        + (f": they use `{label.strip()}` instead." if label else ", although this is a chat model.")
        + (" A prompt is then asked as it stands, without the chat template." if is_pair else ""),
        evidence={
            "rows_read": len(rows),
            "with_the_template": 0,
            "with_another_format": len(foreign),
            "rows": side.places(rows),
            "expected": pieces[1].strip(),
        },
        affected=1.0 if is_pair else max(len(foreign) / len(rows), MOST),
        fix='give each row as {"messages": [{"role": "user", ...}, {"role": "assistant", ...}]}: the chat template is '
        "then applied automatically",
    )


def _known_format_of(facts: RowFacts) -> str | None:
    """The well-known format that most of the texts have; None without."""
    formats = facts.report.text_formats
    found = {name: number for name, number in formats.items() if name not in (OWN, PLAIN)}
    name = max(found, key=found.__getitem__, default=None)
    return name if name is not None and is_pattern(found[name], formats.total(), MOST) else None


def _rendered_already(facts: RowFacts) -> Finding:
    """Texts with the markers of this model's template, which `render` has found the answers of: no fault."""
    formats = facts.report.text_formats
    rendered, total = formats[OWN], formats.total()
    if not facts.settings.assistant_only_loss:
        loss = "the loss counts all tokens (assistant_only_loss: false)"
    else:
        loss = "only their assistant turns are trained on"
    rest = total - rendered
    return Finding.of(
        "F12",
        "info" if rest < SOME * total else "warning",
        message=f"{rendered:,} of {total:,} texts are already rendered by {OWN}: {loss}, and no second end token is "
        "added." + (f" The other {rest:,} are trained on as plain text." if rest else ""),
        evidence={"rendered": rendered, "texts": total},
        affected=rest / total,
        fix="nothing, if that is meant"
        if not rest
        else "give all rows in one format: rendered, or better as messages, which the chat template then renders",
        slug="already-rendered",
    )


def _in_known_format(facts: RowFacts) -> Finding | None:
    """Texts in a known prompt format, for a base model or one whose template is not taught: a remark."""
    name = _known_format_of(facts)
    if name is None or facts.report.format != "text" or not facts.settings.assistant_only_loss:
        return None
    number = facts.report.text_formats[name]
    return Finding.of(
        "F12",
        "info",
        message=f"{number:,} of {facts.report.text_formats.total():,} texts are prompts and answers in the format "
        f"{name}, which is plain text for this model: all of it is trained on, the prompts too.",
        evidence={"format": name, "rows": number},
        affected=number / facts.report.text_formats.total(),
        fix="to train on the answers only, give prompt (up to the mark before the answer) and completion instead of "
        "text; or messages, with a model that has a chat template",
        slug="already-rendered",
    )


def _is_taught(facts: RowFacts, template: ChatTemplate) -> bool:
    """Whether generation, by the model's files, ends at the template's end of turn."""
    ends = {facts.encode(text)[-1] for text in template.terminators}
    return bool(ends & (facts.model_ids("eos_token_id") | {facts.eos_id}))


def _template_replaced(facts: RowFacts) -> Finding | None:
    own = facts.own_template
    if own is None or not facts.train.rows or not _is_taught(facts, own):
        return None
    pieces = pieces_of(own)
    if pieces is None:
        return None
    header = pieces[1].strip()
    for end in own.terminators:  # of the question; a missing end is another fault (F10)
        header = header.removeprefix(end).strip()
    if is_in_rows(facts, pieces[1]):
        return None
    rows = evenly(range(len(facts.train.rows)), NUM_RENDERED)
    written, control, path = pieces_of_template(facts), facts.control.pattern, facts.settings.chat_template_path
    is_plain = written is not None and not control.search(written[1].strip().removeprefix(_end_of(facts)))
    return Finding.of(
        "F12",
        "error" if is_plain and control.search(header) else "warning",
        message=f"{path or 'The chat template'} renders a format that the model does not know: no row contains "
        f"{header!r}, which the model's own template writes before an answer.",
        evidence={"rows_read": len(rows), "with_the_template": 0, "rows": facts.train.places(rows)},
        affected=1.0,
        fix=("remove chat_template_path" if path else "use the base's own tokenizer files")
        + ", so that the model's own template renders the rows",
    )


def _end_of(facts: RowFacts) -> str:
    """The end of a user's turn, if the template in use writes the same after answers."""
    pieces = pieces_of_template(facts)
    ends = facts.template.terminators if facts.template else ()
    return next((end for end in ends if pieces and pieces[1].lstrip().startswith(end)), "")


def _is_markup(messages: list[dict[str, Any]]) -> bool:
    """Whether messages are rendered for certain: question and answer begin with a label, or one has the control tokens
    of a whole turn. Not a question about a conversation, which quotes the labels of its speakers."""
    begins = {message["role"] for message in messages if starts_with_label(message["content"])}
    turns = (labelled_turns(message["content"]) for message in messages)
    labels = [found[0]["label"] for found in turns if found]
    return begins >= {"user", "assistant"} or any(one[0] in "<[" and not _TAG.fullmatch(one) for one in labels)


def _rendered_twice(facts: RowFacts) -> Finding | None:
    total = facts.report.num_train + facts.report.num_validation
    forged = facts.report.num_with_forged_tokens
    contents = {r: [m["content"] for m in facts.train.rows[r].messages] for r in facts.chats}
    labelled = [r for r, texts in contents.items() if any(map(starts_with_label, texts))]
    whole = [r for r, texts in contents.items() if any(map(known_format, texts))]  # a question and an answer in one
    is_whole = is_pattern(len(whole), len(facts.chats), SOME)
    if not (is_whole or is_pattern(forged, total, MOST) or is_pattern(len(labelled), len(facts.chats), MOST)):
        return None
    name = known_format(next(text for text in contents[whole[0]] if known_format(text))) if is_whole else None
    twice = [r for r in facts.chats if _is_markup(facts.train.rows[r].messages)]
    is_fault = is_pattern(len(twice), len(facts.chats), NEARLY_ALL)
    return Finding.of(
        "F12",
        "error" if is_fault else "warning",
        is_statistic=True,
        message="The messages are already rendered: their texts contain chat markup"
        + (f" ({name}; in {len(whole):,} of {len(facts.chats):,} chats whole turns)" if name else "")
        + ", and the chat template renders them once more.",
        evidence={
            "rows_with_control_tokens": forged,
            "rows_with_role_labels": len(labelled),
            "rows_with_whole_turns": len(whole),
            "rows": facts.train.places(sorted({*labelled, *whole})),
        },
        affected=max(len({*whole, *labelled}) / max(len(facts.chats), 1), min(forged / max(total, 1), 1.0)),
        fix="give the plain texts of the messages, without role labels and control tokens, one message for each turn"
        + ("; or, if this model's own template rendered them, the whole text under text" if name else ""),
    )


@rule("F12", otherwise=True)
def rows_without_template_text(run_facts: RunFacts) -> Signal | None:
    """F12, of rows that another trainer made; in solotune the data step knows which rows are documents for continued
    pretraining.

    Control: rows that are no chats. Without a conversation, a masked prompt or labels of turns they may be documents,
    which is a remark, until P1 measures that the model's own format is better.
    """
    texts = decoded(run_facts)
    pieces = own_frame(run_facts)
    if pieces is None or len(texts) < 3 or run_facts.tokenizer is None or not pieces[1].strip():
        return None
    if is_ours(run_facts) or not is_chat_model(run_facts, pieces[2]):
        return None
    marker = _header_of(pieces)
    has = sum(marker in text for text in texts)
    if has > (1 - NEARLY_ALL) * len(texts):
        return None
    rows = examples_of(run_facts)
    labelled = sum(labelled_turns(text) is not None for text in texts)
    is_chat = bool(run_facts.conversations) or is_pattern(labelled, len(texts), MOST)
    is_chat = is_chat or sum(not row.loss_mask[:BEGINNING].any() for row in rows) >= MOST * len(rows)
    says = f"{marker[:60]!r}, which the template writes between question and answer, is in {has} of {len(texts)} rows"
    fix = 'give the data as {"messages": [...]}, so that the model\'s own template is applied'
    numbers = {"rows": has, "of": len(texts), "with_labels": labelled}
    share = 1 - has / len(texts)
    kind = "measured" if is_chat and not _is_chosen(run_facts) else "remark"
    return Signal("F12", kind, says, 0.65, numbers, fix=fix, affected=share)


def _header_of(pieces: tuple[str, str, str]) -> str:
    """What stands before an answer, without the end of the question: if that is missing, it is another fault (F10)."""
    whole, end = pieces[1].strip(), pieces[2].strip()
    return (whole.removeprefix(end).strip() if end else "") or whole


def _is_chosen(run_facts: RunFacts) -> bool:
    """Whether the run has a template of its own, which writes control tokens of this tokenizer before answers."""
    written = frame(run_facts) if run_facts.base_template else None
    if written is None or run_facts.tokenizer is None:
        return False
    return ControlTokens(run_facts.tokenizer).pattern.search(_header_of(written)) is not None
