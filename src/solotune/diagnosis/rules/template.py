"""S3, the chat template and special tokens: F08, F09, F11 and F12, about the format of the rows.

Faults within a turn are in `turns`.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from solotune.dataset.chat.answer_spans import ChatTemplate
from solotune.dataset.chat.rendered_text import OWN, known_format
from solotune.dataset.data_report import PLAIN
from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.derived import is_ours
from solotune.diagnosis.facts.rendered_chats import decoded, frame, rendered, rendered_by
from solotune.diagnosis.facts.row_arrays import evenly, is_pattern, percent, squeezed
from solotune.diagnosis.facts.row_facts import RowFacts, pieces_of, pieces_of_template
from solotune.diagnosis.facts.rows import examples_of
from solotune.diagnosis.findings import Finding
from solotune.diagnosis.rules import rule
from solotune.diagnosis.run_facts import RunFacts

MOST = 0.5
"""A fault of the template or tokenizer shows in all rows; half allows for rows that hide it."""
SOME = 0.05
"""One row in twenty, for what some rows have that were joined from another source."""
NEARLY_ALL = 0.95
"""The same for rows of another trainer: a twentieth allows for rows that are truncated or hide it."""
NUM_RENDERED = 100
"""Rows to decode; a fault of a template shows in a few."""

_FOREIGN = re.compile(
    r"^\s*(###\s*(?:Human|User|Assistant|Instruction|Response)\b|(?:Human|User|USER|Assistant|ASSISTANT|GPT):"
    r"|\[/?INST\]|<\|im_start\|>|<\|(?:user|assistant|system)\|>|<start_of_turn>|<\|start_header_id\|>)",
    re.MULTILINE,
)


@rule("F08", needs=("rows",))
def double_bos(facts: RowFacts) -> Finding | None:
    """F08: rows begin with two begin-of-text tokens.

    Sees: the first two ids of the rows.
    Why: the template writes one and the tokenizer adds another. Serving uses one, so the two differ a little. It never
    causes a plateau (the first loss is 1.03 times the normal one).
    Not: F09, where it is missing; one begin-of-text and then a header; packed rows.
    Fix: tokenize rendered text with `add_special_tokens=False`.
    Wrong when: the base was trained with two.
    Source: trl#1400, alignment-handbook#127, Soup#781; a rendered `text` column in trl 1.16 gives two (measured).
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
    where = facts.settings.chat_template_path or "the chat template (set chat_template_path)"
    return Finding.of(
        "F08",
        "warning",
        message=f"{len(rows):,} rows ({percent(len(rows), len(side.rows))}) begin with {spelled} twice.",
        evidence={"rows_with": len(rows), "rows": side.places(rows), "bos_id": bos},
        fix=f"write {spelled} once in {where}"
        if facts.is_chat
        else f"remove {spelled} from the beginning of the texts: the tokenizer adds it",
    )


@rule("F09", needs=("rows",))
def missing_bos(facts: RowFacts) -> Finding | None:
    """F09: rows lack the begin-of-text token that the model is served with.

    Sees: a template (or, for plain text, a tokenizer) that starts with it, and no row that does.
    Why: in pretraining every text began with it. Some model families (Gemma) become much worse without it (the first
    loss is 1.08 times the normal one).
    Not: ChatML models that define the token and never write it (Qwen, SmolLM2); a model's own template without it
    (Zephyr), which is then served without it too; F26, where only long rows lack their beginning; F12, where the whole
    format is different.
    Fix: use the base model's own template, or `add_special_tokens=True` for plain text.
    Wrong when: the model is served without it on purpose.
    Source: the opposite case of trl#1400.
    """
    side = facts.train
    if not facts.is_chat or not facts.settings.chat_template_path:
        return None
    before, why = list(facts.encoder.affixes[0]), "this tokenizer starts every text with"
    pieces = pieces_of(facts.own_template) if not before and facts.own_template else None
    if pieces is not None:
        before, why = facts.encode(pieces[0])[:1], "the model's own template begins with"
        before = before if before == [facts.named_id("bos")] else []
    if not before or (side.ids[side.starts[:-1]] == before[0]).any():
        return None
    return Finding.of(
        "F09",
        "warning",
        message=f"No row begins with {facts.spelled(before[0])}, which {why}.",
        evidence={"rows_with": 0, "rows_without": len(side.rows), "rows": side.places(range(len(side.rows)))},
        fix=f"write {{{{ bos_token }}}} at the start of {facts.settings.chat_template_path}",
    )


@rule("F09", otherwise=True)
def rows_without_served_bos(run_facts: RunFacts) -> Signal | None:
    """F09, of rows that another trainer made: none begins with the first token of the rendered chat."""
    tokenizer, rows = run_facts.tokenizer, examples_of(run_facts)
    bos = getattr(tokenizer, "bos_token_id", None)
    if tokenizer is None or not isinstance(bos, int) or len(rows) < 3:
        return None
    chat = rendered(run_facts, [{"role": "user", "content": "a"}])
    is_text = tokenizer.chat_template is None
    served = tokenizer.encode(chat, add_special_tokens=False) if chat else tokenizer.encode("a") if is_text else []
    whole = frame(run_facts)
    if served[:1] != [bos] or any(row.input_ids[:1].tolist() == [bos] for row in rows):
        return None
    texts = decoded(run_facts)
    if not is_text and whole and whole[1].strip() and not any(whole[1].strip() in text for text in texts):
        return None  # a different format: F12
    spelled = tokenizer.convert_ids_to_tokens(bos)
    says = f"none of {len(rows):,} rows begins with {spelled}, but prompts in serving do"
    fix = (
        "keep the begin-of-text token of the chat template" if not is_text else "tokenize with add_special_tokens=True"
    )
    return Signal("F09", "measured", says, 0.65, {"rows": len(rows)}, fix=fix)


@rule("F11", needs=("settings",), probes=("P12",))
def template_differs(run_facts: RunFacts) -> Signal | None:
    """F11: the model is served with a different chat template than it was trained with.

    Sees: the same chat rendered with the template of training and with that of serving. Answers that are bad only with
    the serving template show the same.
    Why: the held-out loss is good, but chat answers are bad or repeat themselves: without its template a well-trained
    model repeated 10 to 48 % of its 4-grams (0 % with it).
    Not: F46, which repeats with both templates; F15, where only the start of the answer differs.
    Fix: serve with the template of training, saved with the adapter.
    Wrong when: both render the chats that are served in the same way.
    Source: LlamaFactory#6020, ollama#6823.
    """
    tokenizer, get = run_facts.tokenizer, run_facts.settings.get
    served, trained = get("serving_template"), get("chat_template")
    trained = trained or (tokenizer.chat_template if tokenizer is not None else None)
    if is_ours(run_facts) or not isinstance(served, str) or not isinstance(trained, str) or served == trained:
        return None
    chat = [{"role": "user", "content": "quvwxq"}]
    texts = [_by(tokenizer, template, chat) for template in (trained, served)]
    if None in texts or texts[0] == texts[1]:
        return None
    says = f"a question is rendered as {texts[0]!r} for training and as {texts[1]!r} for serving"
    fix = "serve with the chat template of training: save it with the adapter (tokenizer.save_pretrained)"
    return Signal("F11", "invariant", says, 0.9, {"trained": texts[0], "served": texts[1]}, fix=fix)


def _by(tokenizer: Any, template: str, chat: list[dict[str, str]]) -> str | None:
    """Render a chat with a template, which may also be a format with {q} or {prompt} in it."""
    if "{%" not in template and "{{" not in template:
        return re.sub(r"\{\s*\w*\s*\}", chat[0]["content"], template, count=1)
    if tokenizer is None:
        return template
    return rendered_by(tokenizer, chat, prompt=True, template=template)


@rule("F12", needs=("rows",), probes=("P1",))
def not_through_template(facts: RowFacts) -> Finding | None:
    """F12: the rows are not in the model's chat format.

    Sees: rows of a chat model (its end of text is the template's end of turn) of which none contains the template's
    text between question and answer; texts with the markers of a well-known template (those of the model's own are
    read, and only mentioned); chats whose messages were already rendered: most of them contain control tokens or
    role labels; a template file that renders a different format than the model's own template.
    Why: the model learns a second format (10 times the first loss), and is then used with the first.
    Not: F04, where the loss on plain text is bad too; F38, whose format is right; a base model, for which any format is
    fine; F07, whose control tokens are present but split.
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
    foreign = [r for r, text in zip(rows, texts, strict=True) if len(set(_FOREIGN.findall(text))) >= 2]
    known = _known_format_of(facts)
    is_pair = facts.report.format == "prompt-completion"
    if not is_pair and not known and not is_pattern(len(foreign), len(rows), MOST):
        return None
    label = next(iter(_FOREIGN.findall(texts[0])), None) or known
    return Finding.of(
        "F12",
        "warning",
        message="The rows are not in the model's chat format"
        + (f": they use `{label.strip()}` instead." if label else ", although this is a chat model."),
        evidence={
            "rows_read": len(rows),
            "with_the_template": 0,
            "with_another_format": len(foreign),
            "rows": side.places(rows),
            "expected": pieces[1].strip(),
        },
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
    if not squeezed(header):
        return None
    rows = evenly(range(len(facts.train.rows)), NUM_RENDERED)
    if any(squeezed(header) in squeezed(facts.decode(facts.train.rows[r].input_ids)) for r in rows):
        return None
    return Finding.of(
        "F12",
        "warning",
        message=f"{facts.settings.chat_template_path} renders a format that the model does not know: no row contains "
        f"{header!r}, which the model's own template writes before an answer.",
        evidence={"rows_read": len(rows), "with_the_template": 0, "rows": facts.train.places(rows)},
        fix="remove chat_template_path, so that the model's own template renders the rows",
    )


def _rendered_twice(facts: RowFacts) -> Finding | None:
    total = facts.report.num_train + facts.report.num_validation
    forged = facts.report.num_with_forged_tokens
    contents = {r: [m["content"] for m in facts.train.rows[r].messages] for r in facts.chats}
    labelled = [r for r, texts in contents.items() if any(map(_FOREIGN.match, texts))]
    whole = [r for r, texts in contents.items() if any(map(known_format, texts))]  # a question and an answer in one
    is_whole = is_pattern(len(whole), len(facts.chats), SOME)
    if not (is_whole or is_pattern(forged, total, MOST) or is_pattern(len(labelled), len(facts.chats), MOST)):
        return None
    name = known_format(next(text for text in contents[whole[0]] if known_format(text))) if is_whole else None
    return Finding.of(
        "F12",
        "warning",
        message="The messages are already rendered: their texts contain chat markup"
        + (f" ({name}; in {len(whole):,} of {len(facts.chats):,} chats whole turns)" if name else "")
        + ", and the chat template renders them once more.",
        evidence={
            "rows_with_control_tokens": forged,
            "rows_with_role_labels": len(labelled),
            "rows_with_whole_turns": len(whole),
            "rows": facts.train.places(sorted({*labelled, *whole})),
        },
        fix="give the plain texts of the messages, without role labels and control tokens, one message for each turn"
        + ("; or, if this model's own template rendered them, the whole text under text" if name else ""),
    )


@rule("F12", otherwise=True)
def rows_without_template_text(run_facts: RunFacts) -> Signal | None:
    """F12, of rows that another trainer made; in solotune the data step knows which rows are documents for continued
    pretraining."""
    texts = decoded(run_facts)
    pieces = frame(run_facts, run_facts.base_template or None)  # the template of the run may be the fault
    if pieces is None or len(texts) < 3 or run_facts.tokenizer is None or not pieces[1].strip():
        return None
    if is_ours(run_facts) or not is_chat_model(run_facts, pieces[2]):
        return None
    marker = pieces[1].strip()
    has = sum(marker in text for text in texts)
    if has > (1 - NEARLY_ALL) * len(texts):
        return None
    says = f"{marker[:60]!r}, which the template writes between question and answer, is in {has} of {len(texts)} rows"
    fix = 'give the data as {"messages": [...]}, so that the model\'s own template is applied'
    return Signal("F12", "measured", says, 0.65, {"rows": has, "of": len(texts)}, fix=fix)


def is_chat_model(run_facts: RunFacts, ending: str) -> bool:
    """Whether generation, by the base's files, ends with the text that the template writes after answers."""
    tokenizer = run_facts.tokenizer
    if tokenizer is None or not ending.strip():
        return False
    ends = tokenizer.encode(ending.strip(), add_special_tokens=False)[:1]
    stops: set[int] = set()
    for config in (run_facts.generation_config, run_facts.model_config):
        found = config.get("eos_token_id")
        stops |= {one for one in (found if isinstance(found, list) else [found]) if isinstance(one, int)}
    return bool(ends) and (ends[0] in stops or ends[0] == tokenizer.eos_token_id)
