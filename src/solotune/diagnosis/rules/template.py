"""S3, the chat template and special tokens: F08, F09, F11 and F16, about the rows and the prompts of serving.

Faults of the format are in `chat_format`, faults within a turn in `turns`.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.derived import is_ours, setting
from solotune.diagnosis.facts.rendered_chats import decoded, own_frame, rendered, rendered_by
from solotune.diagnosis.facts.row_arrays import evenly, is_pattern, percent, squeezed
from solotune.diagnosis.facts.row_facts import (
    NUM_RENDERED,
    RowFacts,
    is_in_rows,
    pieces_of,
    pieces_of_template,
    rendered_prompt,
)
from solotune.diagnosis.facts.rows import examples_of
from solotune.diagnosis.findings import Finding
from solotune.diagnosis.rules import rule
from solotune.diagnosis.rules.headers import header_doubled
from solotune.diagnosis.run_facts import RunFacts

MOST = 0.5
"""A fault of the template or tokenizer shows in all rows; half allows for rows that hide it."""
SOME = 0.05
"""One row in twenty, for what some rows have that were joined from another source."""

BEGINS_ALWAYS = ("gemma", "recurrent_gemma")
"""Families whose makers say that every text begins with it; a template without it was edited."""
_THOUGHTS = re.compile(r"</?think|\bthought|\banalysis\b|reasoning", re.IGNORECASE)
"""In a generation prompt: it opens or closes a thinking block."""


@rule("F08", needs=("rows",))
def double_bos(facts: RowFacts) -> Finding | None:
    """F08: rows begin with two begin-of-text tokens.

    Sees: the first two ids of the rows.
    Why: the template writes one and the tokenizer adds another. Serving uses one, so the two differ a little. It never
    causes a plateau (the first loss is 1.03 times the normal one).
    Not: F09, where it is missing; one begin-of-text and then a header; packed rows; a part of the rows, from another
    source (a remark).
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
        "error" if is_pattern(len(rows), len(side.rows), MOST) else "warning",
        message=f"{len(rows):,} rows ({percent(len(rows), len(side.rows))}) begin with {spelled} twice.",
        evidence={"rows_with": len(rows), "rows": side.places(rows), "bos_id": bos},
        affected=len(rows) / len(side.rows),
        fix=f"write {spelled} once in {where}"
        if facts.is_chat
        else f"remove {spelled} from the beginning of the texts: the tokenizer adds it",
    )


@rule("F08", needs=("tokenizer", "texts"), otherwise=True)
def texts_begun_twice(run_facts: RunFacts) -> Signal | None:
    """F08, of texts that another trainer tokenized, whose rows are not known: they begin with the begin-of-text token,
    and the run's tokenizer adds one to every text.

    Control: the trainer. Some tools leave the second one out: a remark.
    """
    tokenizer, texts, tool = run_facts.tokenizer, run_facts.texts, run_facts.settings.get("tool")
    begin = str(tokenizer.bos_token) if tokenizer is not None else ""
    if tokenizer is None or not tokenizer.bos_token or "batches" not in run_facts.missing:
        return None
    having = [text for text in texts if text.lstrip().startswith(begin)]
    if not is_pattern(len(having), len(texts), MOST) or tokenizer.encode(having[0])[:2] != [tokenizer.bos_token_id] * 2:
        return None
    says = f"{len(having):,} of {len(texts):,} texts begin with {begin}, and the run's tokenizer adds it to every text"
    kind = "measured" if tool in (None, "transformers", "trl") else "remark"
    fix = f"tokenize rendered texts with add_special_tokens=False, or remove {begin} from their beginning"
    return Signal("F08", kind, says, 0.6, {"texts": len(having)}, fix=fix, affected=len(having) / len(texts))


@rule("F09", needs=("rows",), probes=("P1",))
def missing_bos(facts: RowFacts) -> Finding | None:
    """F09: rows lack the begin-of-text token that the model is served with.

    Sees: a model whose own template (or without one, whose tokenizer) starts every text with it, and no row that does;
    rows whose loss falls with it in front (probe P1).
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
    path = facts.settings.chat_template_path
    always = facts.family.startswith(BEGINS_ALWAYS)
    if not facts.is_chat or (not path and facts.own_template is None and not always):
        return None
    pieces = pieces_of(facts.own_template) if facts.own_template else None
    if pieces is None or always:
        before, why = list(facts.encoder.affixes[0]), "this tokenizer starts every text with"
    elif not is_in_rows(facts, pieces[1]):
        return None  # a different format: F12
    else:  # what the tokenizer adds to plain text does not count: a chat is rendered without it
        before, why = facts.encode(pieces[0])[:1], "the model's own template begins with"
        before = before if before == [facts.named_id("bos")] else []
    if not before or (side.ids[side.starts[:-1]] == before[0]).any():
        return None
    return Finding.of(
        "F09",
        "error",
        message=f"No row begins with {facts.spelled(before[0])}, which {why}.",
        evidence={"rows_with": 0, "rows_without": len(side.rows), "rows": side.places(range(len(side.rows)))},
        affected=1.0,
        fix=f"write {{{{ bos_token }}}} at the start of {path or 'the chat template'}",
    )


@rule("F09", otherwise=True)
def rows_without_served_bos(run_facts: RunFacts) -> Signal | None:
    """F09, of rows that another trainer made: none begins with the first token of the chat as the base renders it.

    Control: the model's own template. If it writes none, the rows need none (Zephyr, ChatML). A plain text for which
    only the tokenizer would add one is a remark: what it costs, P1 measures.
    """
    tokenizer, limit = run_facts.tokenizer, setting(run_facts, "max_length") or np.inf
    rows = [row for row in examples_of(run_facts) if len(row.input_ids) < limit]  # others may have lost it: F26
    bos = getattr(tokenizer, "bos_token_id", None)
    if tokenizer is None or not isinstance(bos, int) or len(rows) < 3:
        return None
    if any(bos in row.input_ids[:2].tolist() for row in rows):
        return None
    chat = rendered(run_facts, [{"role": "user", "content": "a"}], template=run_facts.base_template or None)
    writes = chat is not None and tokenizer.encode(chat, add_special_tokens=False)[:1] == [bos]
    adds = tokenizer.encode("a")[:1] == [bos]
    if not writes and not (adds and chat is None):
        return None
    pieces = own_frame(run_facts)
    if writes and pieces and pieces[1].strip() and not any(pieces[1].strip() in text for text in decoded(run_facts)):
        return None  # a different format: F12
    spelled = tokenizer.convert_ids_to_tokens(bos)
    says = f"none of {len(rows):,} rows begins with {spelled}, which "
    says += "the model's own template writes" if writes else "this tokenizer adds to every text"
    fix = "keep the begin-of-text token of the chat template" if writes else "tokenize with add_special_tokens=True"
    return Signal("F09", "invariant" if writes else "measured", says, 0.65, {"rows": len(rows)}, fix=fix, affected=1.0)


@rule("F11", needs=("settings",), probes=("P12",))
def template_differs(run_facts: RunFacts) -> Signal | None:
    """F11: the model is served with a different chat template than it was trained with.

    Sees: the same chat rendered with the template of training and with that of serving; in a folder, with the template
    of its newest checkpoint and with the one that lies beside the final adapter. Answers that are bad only with the
    serving template show the same.
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


@rule("F16", needs=("rows",))
def prompt_is_no_prefix(facts: RowFacts) -> Finding | None:
    """F16: the prompt's tokens are not the first tokens of the row.

    Sees: prompts, tokenized as in serving, that differ from the first ids of their rows; plain-text prompts that get
    different tokens when tokenized alone.
    Why: in training the answer follows different tokens than in serving; a mask computed from the prompt's length is
    off by a token.
    Not: F20, whose mask is off by many tokens; templates that rewrite earlier turns (Qwen3's thinking), where only the
    last answer counts; a model's own generation prompt that opens a thinking block (DeepSeek R1), while the answers
    have no thoughts, and a part of the rows (remarks).
    Fix: end prompts at a token boundary (not with a space), and render earlier turns in the same way in both.
    Wrong when: the model is served in the other form on purpose.
    Source: trl#1920; trl warns once and cuts at the first difference.
    """
    if not facts.is_chat:
        return _text_prompt_is_no_prefix(facts)
    pieces = pieces_of_template(facts)
    if (pieces is not None and not is_in_rows(facts, pieces[1])) or header_doubled(facts):
        return None  # a different format: F12; a prompt with two headers: F15
    other, merged, read = [], [], 0
    for row in evenly(facts.sample(facts.train), NUM_RENDERED):
        example = facts.train.rows[row]
        turn = max((i for i, message in enumerate(example.messages) if message["role"] == "assistant"), default=0)
        prompt = rendered_prompt(facts, example.messages[:turn], example.tools)
        text = facts.decode(example.input_ids)
        if not turn or prompt is None or squeezed(example.messages[max(turn - 1, 0)]["content"]) not in squeezed(text):
            continue  # the rows of another trainer may be in another order
        read += 1
        asked, whole = (_without_bos(facts, ids) for ids in (prompt, example.input_ids))  # missing or twice: F08, F09
        shared = min(len(asked), len(whole))  # another trainer may have truncated it
        if np.array_equal(asked[:shared], whole[:shared]):
            continue
        is_same_text = text.startswith(facts.decode(prompt))
        (merged if is_same_text else other).append(row)
    wrong = sorted(merged + other)
    if not is_pattern(len(wrong), read, SOME):
        return None
    is_merged = len(merged) > len(other)
    begins = facts.template.generation_prompt if facts.template else ""
    is_blank = is_merged and begins.endswith((" ", "\t"))  # of the template; else the answers begin with white space
    is_fault = is_blank or (is_pattern(len(wrong), read, MOST) and (is_merged or _THOUGHTS.search(begins) is None))
    return Finding.of(
        "F16",
        "error" if is_fault else "warning",
        message=f"{len(wrong)} of {read} rows do not begin with the prompt as in serving: "
        + ("its last token joins with" if is_merged else f"it ends with {begins!r}, which is not the text before")
        + " the answer.",
        evidence={
            "rows_read": read,
            "token_reaches_across": len(merged),
            "template_differs": len(other),
            "rows": facts.train.places(wrong),
        },
        affected=len(wrong) / read,
        fix="end the generation prompt of the template at a token boundary (a newline), not with a space"
        if is_merged
        else "add to the answers the block that the generation prompt opens (a thinking block), or set "
        "chat_template_path to a template without it",
    )


def _without_bos(facts: RowFacts, ids: np.ndarray) -> np.ndarray:
    """The ids without begin-of-text tokens at the start."""
    bos = facts.named_id("bos")
    count = next((n for n, index in enumerate(ids) if index != bos), len(ids))
    return ids[count:]


def _text_prompt_is_no_prefix(facts: RowFacts) -> Finding | None:
    labels = facts.report.labels
    if not is_pattern(labels.num_not_prefix, len(labels.shares), SOME):
        return None
    return Finding.of(
        "F16",
        "error" if is_pattern(labels.num_not_prefix, len(labels.shares), MOST) else "warning",
        message=f"{labels.num_not_prefix:,} of {len(labels.shares):,} prompts end inside a token: the other part of "
        "this token, the start of the completion, is not trained on.",
        evidence={
            "rows_with": labels.num_not_prefix,
            "rows_read": len(labels.shares),
            "tokens_reaching_across": labels.num_crossing,
            "rows": facts.train.places(range(len(facts.train.rows))),
        },
        affected=labels.num_not_prefix / len(labels.shares),
        fix="move the space from the end of the prompts to the start of the completions",
    )


@rule("F16", otherwise=True)
def plain_prompts_join_with_answers(run_facts: RunFacts) -> Signal | None:
    """F16, of prompts and completions that another trainer joined as plain text: the last token of the prompt reaches
    into the answer.

    Control: the tokenizer, since a space at the end changes nothing where it is a token of its own.
    """
    tokenizer, rows, read, joined = run_facts.tokenizer, examples_of(run_facts), 0, 0
    if tokenizer is None:
        return None
    for row in (rows[index] for index in evenly(range(len(rows)), NUM_RENDERED)):
        if [message["role"] for message in row.messages] != ["user", "assistant"]:
            continue
        prompt, answer = (message["content"] for message in row.messages)
        text = str(tokenizer.decode(row.input_ids.tolist(), skip_special_tokens=True))
        if not prompt or not text.startswith(prompt + answer[:1]):
            continue  # rendered by a template
        read += 1
        begins = tokenizer.encode(prompt, add_special_tokens=False)
        joined += tokenizer.encode(prompt + answer, add_special_tokens=False)[: len(begins)] != begins
    if not is_pattern(joined, read, SOME):
        return None
    kind = "invariant" if is_pattern(joined, read, MOST) else "remark"
    says = f"the last token of {joined} of {read} prompts joins with the first word of the answer"
    fix = "move the space from the end of the prompts to the start of the completions"
    return Signal("F16", kind, says, 0.8, {"joined": joined, "of": read}, fix=fix, affected=joined / read)
