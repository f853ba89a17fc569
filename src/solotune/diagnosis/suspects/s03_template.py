"""S3, the chat template and special tokens: F08 to F16."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from solotune.diagnosis.arithmetic import is_ours
from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.rows import examples_of, plain_messages
from solotune.diagnosis.subject import Subject
from solotune.diagnosis.suspects import rule, taken_over

MOST = 0.95
"""A property of the template shows in all rows; a twentieth leaves room for rows that were cut or hide it."""
NUM_ROWS = 100
_SENTINEL = "zqxjkv"


def rendered(
    subject: Subject, messages: Sequence[dict[str, Any]], prompt: bool = False, template: str | None = None
) -> str | None:
    """Messages by the tokenizer's own template (or this one), as they would be served; None where it has none or
    refuses."""
    tokenizer = subject.tokenizer
    if tokenizer is None or not tokenizer.chat_template:
        return None
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=prompt, chat_template=template
            )
        )
    except Exception:  # templates refuse in their own words, and not only with Jinja's errors
        return None


def frame(subject: Subject, template: str | None = None) -> tuple[str, str, str] | None:
    """The template's own text before a question, between question and answer, and behind the answer."""
    chat = [{"role": "user", "content": "quvwxq"}, {"role": "assistant", "content": "zwvuyz"}]
    text = rendered(subject, chat, template=template)
    match = re.fullmatch(r"(.*)quvwxq(.*)zwvuyz(.*)", text, re.DOTALL) if text else None
    return (match[1], match[2], match[3]) if match else None


def decoded(subject: Subject) -> list[str]:
    """Some training rows as text, special tokens included."""
    if subject.tokenizer is None:
        return []
    rows = examples_of(subject)
    chosen = [rows[int(i)] for i in np.linspace(0, len(rows) - 1, min(NUM_ROWS, len(rows))).astype(int)]
    return [str(subject.tokenizer.decode(row.input_ids.tolist(), clean_up_tokenization_spaces=False)) for row in chosen]


@rule("F08")
def double_bos(subject: Subject) -> list[Signal]:
    """F08: rows begin with two begin-of-text tokens.

    Sees: the first two ids of the rows.
    Why: the template writes one and the tokenizer another. Serving writes one, so the two differ a little; it is never
    the cause of a plateau (first loss 1.03 times the reference's).
    Not: F09, by count; one begin-of-text and then a header; packed documents.
    Fix: rendered text tokenized with `add_special_tokens=False`.
    Wrong when: the base was trained with two.
    Source: trl#1400, alignment-handbook#127, Soup#781; a rendered `text` column in trl 1.16 gives two (measured).
    """
    return taken_over(subject, "F08")


@rule("F09")
def missing_bos(subject: Subject) -> list[Signal]:
    """F09: rows lack the begin-of-text token that the model is served with.

    Sees: a template (or, for plain text, a tokenizer) that begins with it, and rows of which none does.
    Why: the base has seen it before every text; some families degrade badly without it (first loss 1.08 times).
    Not: ChatML models that define one and never write it; a template without it, which is then served without it too;
    F26, where only the long rows lack their beginning; F12, where the whole format is another.
    Fix: the template of the base, or `add_special_tokens=True` for plain text.
    Wrong when: it is served without on purpose.
    Source: the mirror case of trl#1400.
    """
    signals = taken_over(subject, "F09")
    tokenizer, rows = subject.tokenizer, examples_of(subject)
    bos = getattr(tokenizer, "bos_token_id", None)
    if signals or tokenizer is None or not isinstance(bos, int) or len(rows) < 3:
        return signals
    chat = rendered(subject, [{"role": "user", "content": "a"}])
    is_text = tokenizer.chat_template is None
    served = tokenizer.encode(chat, add_special_tokens=False) if chat else tokenizer.encode("a") if is_text else []
    whole = frame(subject)
    if served[:1] != [bos] or any(row.input_ids[:1].tolist() == [bos] for row in rows):
        return signals
    texts = decoded(subject)
    if not is_text and whole and whole[1].strip() and not any(whole[1].strip() in text for text in texts):
        return signals  # of another format altogether: F12
    spelled = tokenizer.convert_ids_to_tokens(bos)
    says = f"none of {len(rows):,} rows begins with {spelled}, with which the model is served"
    fix = "tokenize with the template's own beginning" if not is_text else "add_special_tokens=True"
    return [Signal("F09", "measured", says, 0.65, {"rows": len(rows)}, fix=fix)]


@rule("F10")
def terminator_missing(subject: Subject) -> list[Signal]:
    """F10: no token ends the assistant's turn in the training rows.

    Sees: the last token of each learned answer, and those behind it: neither is an end of turn.
    Why: a model that was never shown an end never stops, and writes the user's turns too.
    Not: F17 and F19, where the end is there and not learned; F24, where long rows are cut; F14, which is learned and
    not stopped at; F07, where the end is spelled as text.
    Fix: the end of turn in the template (trl appends it to plain text only).
    Wrong when: the base ends turns by beginning the next one (GLM).
    Source: unsloth#416, unsloth#419.
    """
    return taken_over(subject, "F10")


@rule("F11", needs=("settings",), probes=("P12",))
def template_differs(subject: Subject) -> Signal | None:
    """F11: the model is served with another template than it was trained with.

    Sees: the template of training and the one that is served, each asked to render the same chat. Answers that are bad
    only in the deployment's rendering (generations, G6) show the same.
    Why: a good held-out loss and bad or repetitive chat: without its template a well-trained model repeated itself in
    10 to 48 % of its 4-grams (0 % with it).
    Not: F46, which repeats in both renderings; F15, which differs at the boundary alone.
    Fix: the template that was trained with, shipped beside the adapter.
    Wrong when: both write the same text for the chats that are served.
    Source: LlamaFactory#6020, ollama#6823.
    """
    tokenizer, get = subject.tokenizer, subject.settings.get
    served, trained = get("serving_template"), get("chat_template")
    trained = trained or (tokenizer.chat_template if tokenizer is not None else None)
    if is_ours(subject) or not isinstance(served, str) or not isinstance(trained, str) or served == trained:
        return None
    chat = [{"role": "user", "content": "quvwxq"}]
    texts = [_by(tokenizer, template, chat) for template in (trained, served)]
    if None in texts or texts[0] == texts[1]:
        return None
    says = f"a question is rendered as {texts[0]!r} for training and as {texts[1]!r} for serving"
    fix = "serve with the chat template that was saved beside the adapter (tokenizer.save_pretrained)"
    return Signal("F11", "invariant", says, 0.9, {"trained": texts[0], "served": texts[1]}, fix=fix)


def _by(tokenizer: Any, template: str, chat: list[dict[str, str]]) -> str | None:
    """A chat by a template, which may also be a format with {q} or {prompt} in it."""
    if "{%" not in template and "{{" not in template:
        return re.sub(r"\{\s*\w*\s*\}", chat[0]["content"], template, count=1)
    if tokenizer is None:
        return template
    try:
        return str(
            tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, add_generation_prompt=True)
        )
    except Exception:  # as above
        return None


@rule("F12", probes=("P1",))
def not_through_template(subject: Subject) -> list[Signal]:
    """F12: the rows are not in the chat format that the model was taught.

    Sees: that the template's text between question and answer stands in none of the rows, of a model whose end of text
    is the template's end of turn, which it is only in a chat model; chats whose messages were rendered before.
    Why: the model learns a second format beside its own (10 times the first loss) and is then asked in the first.
    Not: F04, whose loss on plain text is bad too; F38, whose format is right; a base model, where any format is
    legitimate; F07, whose markers are there and split.
    Fix: a messages column, so that the template is applied.
    Wrong when: it is served in the same format on purpose.
    Source: the walkthrough's article, trl#1400; ratio 9.8 raw, 9.6 with "### Human" (measured).
    """
    signals, texts = taken_over(subject, "F12"), decoded(subject)
    pieces = frame(subject, subject.base_template or None)  # that of the training may be the fault
    if signals or pieces is None or len(texts) < 3 or subject.tokenizer is None or not pieces[1].strip():
        return signals
    if is_ours(subject):  # the data door knows which rows are documents, for continued training
        return signals
    if not is_chat_model(subject, pieces[2]):
        return signals
    marker = pieces[1].strip()
    has = sum(marker in text for text in texts)
    if has > (1 - MOST) * len(texts):
        return signals
    says = f"{marker[:60]!r}, which the template writes between question and answer, is in {has} of {len(texts)} rows"
    fix = 'give the data as {"messages": [...]}, so that the model\'s own template renders it'
    return [Signal("F12", "measured", says, 0.65, {"rows": has, "of": len(texts)}, fix=fix)]


def is_chat_model(subject: Subject, ending: str) -> bool:
    """Whether the base's files end generation with what the template ends answers with."""
    tokenizer = subject.tokenizer
    if tokenizer is None or not ending.strip():
        return False
    ends = tokenizer.encode(ending.strip(), add_special_tokens=False)[:1]
    stops: set[int] = set()
    for config in (subject.generation_config, subject.model_config):
        found = config.get("eos_token_id")
        stops |= {one for one in (found if isinstance(found, list) else [found]) if isinstance(one, int)}
    return bool(ends) and (ends[0] in stops or ends[0] == tokenizer.eos_token_id)


@rule("F13")
def role_dropped(subject: Subject) -> list[Signal]:
    """F13: the template leaves a role of the conversations out, without a word.

    Sees: texts of system, user and tool messages that are not in the decoded rows; a word put into each role that the
    data has, and looked for in what the template renders.
    Why: the model is taught to answer without the instructions that it will be given. No loss shows it.
    Not: thinking that is cut out of earlier answers; rows that were truncated; a template that refuses the role aloud.
    Fix: the text moved into the first user message, in training and serving alike.
    Wrong when: the template rewrites the text beyond recognition.
    Source: Automodel#3143 ("indistinguishable from one that trains on them"), node-llama-cpp#624.
    """
    signals = taken_over(subject, "F13")
    roles = {str(m.get("role")) for chat in list(subject.conversations)[:NUM_ROWS] for m in plain_messages(chat)}
    for role in sorted(roles & {"system", "tool"}) if not signals else ():
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        chat.insert(0 if role == "system" else 2, {"role": role, "content": _SENTINEL})
        text = rendered(subject, chat)
        if text is not None and _SENTINEL not in text:
            says = f"what a {role} message says is not in what the template renders"
            fix = f"put the text of {role} messages into the user's, or a template that renders them"
            signals.append(Signal("F13", "invariant", says, 0.9, {"role": role}, fix=fix))
    return signals


@rule("F14")
def stops_elsewhere(subject: Subject) -> list[Signal]:
    """F14: generation stops on another token than the one that answers end with.

    Sees: the last token of the answers against the stop ids of generation_config.json, or of the deployment where those
    are known.
    Why: the model writes its end of turn and goes on: endless answers although every label is right.
    Not: F10 and F17, where the end never appears in the output.
    Fix: the token added to `eos_token_id`.
    Wrong when: the serving engine has stop tokens of its own.
    Source: unsloth#416, torchtune#949.
    """
    signals, stops = taken_over(subject, "F14"), subject.settings.get("serving_stop_ids")
    rows = examples_of(subject)
    if signals or not isinstance(stops, (list, tuple, set)) or not rows:
        return signals
    tokenizer = subject.tokenizer
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder) if tokenizer is not None else set()
    last = [int(row.input_ids[row.supervised][-1]) for row in rows if row.supervised.any()]
    last = [i for i in last if i in special]
    if not last:
        return signals
    found, counts = np.unique(last, return_counts=True)
    end = int(found[counts.argmax()])
    if end in stops:
        return signals
    spelled = tokenizer.convert_ids_to_tokens(end) if tokenizer is not None else end
    says = f"{counts.max():,} answers end with {spelled} ({end}), and generation stops at {sorted(map(int, stops))}"
    return [Signal("F14", "invariant", says, 0.9, {"end": end}, fix=f"eos_token_id: {sorted({*map(int, stops), end})}")]


@rule("F15")
def header_learned(subject: Subject) -> list[Signal]:
    """F15: the role header before the answer is missing at serving, doubled, or learned as part of the answer.

    Sees: answers that are learned from their role header on; prompts that are served without the generation prompt that
    the template has.
    Why: the first tokens of an answer are a header, or the answer is empty.
    Not: F11, which differs everywhere and not only at the boundary; templates whose generation prompt is empty
    (Mistral); `assistant_only_loss: false`, where headers are learned on purpose.
    Fix: one function for both, with `add_generation_prompt=True`.
    Wrong when: the model is served without a generation prompt, and was trained so.
    Source: trl#4201.
    """
    signals = taken_over(subject, "F15")
    if signals or subject.settings.get("add_generation_prompt") is not False:
        return signals
    chat = [{"role": "user", "content": "a"}]
    with_prompt, without = rendered(subject, chat, prompt=True), rendered(subject, chat)
    if with_prompt is None or with_prompt == without:
        return signals
    says = f"prompts are served without {with_prompt.removeprefix(without or '')!r}, after which answers were learned"
    return [Signal("F15", "invariant", says, 0.9, {}, fix="add_generation_prompt=True")]


@rule("F16")
def prompt_is_no_prefix(subject: Subject) -> list[Signal]:
    """F16: the prompt's tokens are not the beginning of the row's tokens.

    Sees: prompts as they are served, tokenized, against the first ids of their rows.
    Why: the answer is learned after other tokens than it will be asked after; a mask that is cut by the prompt's length
    is off by a token.
    Not: F20, whose mask is off by many tokens; templates that rewrite earlier turns, where the last answer counts.
    Fix: prompts that end at a token boundary (not in a blank), history rendered the same way both times.
    Wrong when: it is served in the other form on purpose.
    Source: trl#1920; trl warns once and cuts at the divergence.
    """
    signals = taken_over(subject, "F16")
    asked = [chat for chat in list(subject.conversations)[:NUM_ROWS] if chat]
    if signals or subject.tokenizer is None or not asked:
        return signals
    blank = [chat for chat in asked if str(chat[0].get("prompt") or "").endswith((" ", "\t"))]
    if len(blank) < max(3, 0.05 * len(asked)):
        return signals
    says = f"{len(blank)} of {len(asked)} prompts end in a blank, which joins with the answer's first word"
    return [Signal("F16", "measured", says, 0.6, {}, fix="move the blank from the prompt to the completion")]
