"""S4, the loss mask: F17 to F23, from the labels of the collator; `row_labels` judges rows before there are batches."""

from __future__ import annotations

import re

from solotune.dataset.chat.template_sandbox import TemplateRefusal, TemplateSyntax
from solotune.diagnosis.evidence import Kind, Signal
from solotune.diagnosis.facts.derived import is_ours
from solotune.diagnosis.facts.labels import LabelFacts
from solotune.diagnosis.facts.rendered_chats import marked_ids
from solotune.diagnosis.facts.roles import ASSISTANT, USER
from solotune.diagnosis.rules import rule
from solotune.diagnosis.run_facts import RunFacts

MOST = 0.5
"""Of the rows or turns: a fault of the whole data."""
MUCH = 0.33
"""Share of the rows or answers from which it is a fault; a smaller one is a remark (rows of weight 0, mixed data)."""
SOME = 0.1
"""Share of the users' turns that count in the loss: one in ten, and at least three."""
LEAST = 0.05
"""One in twenty, and at least three: worth a remark."""
ALMOST_ALL = 0.9
WHOLE = 0.97
"""Share of labels of a text of which every token counts: all but the first, or the line break at the end."""
FEW = 0.02
"""Share of the answers that may have labels in an inverted mask."""
NUM_CHATS, NUM_TEXTS = 500, 32
"""Conversations and texts that are compared where no headers show who speaks."""
MIN_LOGGED = 3
"""Logged steps of a run that is judged by its log."""
_ONLY_ANSWERS = "set assistant_only_loss: true, and check that the collator keeps the mask"
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


@rule("F17", needs=("batches",), probes=("P13",), unless=is_ours)
def pad_masks_terminator(run_facts: RunFacts) -> Signal | None:
    """F17: the end-of-turn token is masked in the labels because it is the padding token.

    Sees: answers followed by their end-of-turn token without a label, where this token is the padding token and has no
    label anywhere. Both batches and rows are checked.
    Why: the loss looks normal (it changes by 0.1 at most), and the model never learns to stop.
    Not: pad = eos alone, which does no harm if labels are masked by position (then there is no warning); F10, where the
    row has no end-of-turn token; F19, where the mask leaves out the end for another reason; F14, where the model writes
    the end and generation goes on.
    Fix: mask labels by position or by attention_mask, or give the tokenizer a separate pad_token.
    Wrong when: a custom mask leaves out this token on purpose.
    Source: transformers' DataCollatorForLanguageModeling masks by id (0 of 4 ends kept; TRL's collator keeps 4 of 4);
    mlabonne/llm-course#33, trl#456.
    """
    facts = LabelFacts.of(run_facts)
    pad = facts.batches.pad_id
    masked = facts.ends_masked[pad] if pad is not None else 0
    if masked < 3 or _learned_anywhere(facts, pad) or masked < MUCH * facts.answers:
        return None
    if _template_masks_end(run_facts, facts) is True:
        return None  # the template's generation marker leaves it out: F19
    token = _spelled(run_facts, pad)
    says = f"{masked} of {facts.answers} answers end with {token}, the padding token, which is always masked"
    numbers = {"ends_masked": masked, "answers": facts.answers, "pad_id": pad}
    fix = "mask labels where attention_mask is 0, not by the id of the padding; or set a separate pad_token"
    return Signal("F17", "invariant", says, 0.95, numbers, fix=fix, affected=masked / facts.answers)


@rule("F18", needs=("batches", "tokenizer", "settings"), unless=is_ours)
def no_generation_markers(run_facts: RunFacts) -> Signal | None:
    """F18: only answers should count in the loss, and the template does not mark them.

    Sees: a chat template without `{% generation %}`, `assistant_only_loss: true`, and rows without any label.
    Why: transformers then returns a mask of zeros. Some tools raise an error, others silently train on every token,
    which is reported as F20.
    Not: F25, where a larger max_length brings the labels back; F21, where the mask searches for a marker text.
    Fix: use a chat template with `{% generation %}` and `{% endgeneration %}` around the assistant's text.
    Wrong when: the mask is made without the template's markers (as in solotune) and is wrong for another reason.
    Source: marin#7237, Megatron-Bridge#3359, QwenLM/Qwen3#1522.
    """
    template = getattr(run_facts.tokenizer, "chat_template", None)
    marked = bool(_MARKER.search(template if isinstance(template, str) else str(template or "")))
    if not template or marked or not _asked_for_answers(run_facts) or run_facts.settings.get("response_template"):
        return None
    facts = LabelFacts.of(run_facts)
    if not facts.documents or len(facts.unlearned) < len(facts.documents) or _all_cut(run_facts, facts):
        return None
    says = "the chat template has no {% generation %} marker, so no answer counts in the loss"
    return Signal(
        "F18",
        "invariant",
        says,
        0.9,
        {"share_learned": facts.share},
        fix="use a chat template with {% generation %} ... {% endgeneration %} around the answer",
    )


@rule("F19", needs=("batches",), probes=("P13",), unless=is_ours)
def terminator_masked(run_facts: RunFacts) -> Signal | None:
    """F19: the end-of-turn token follows the answer but is not trained on.

    Sees: answers followed by an end-of-turn token without a label.
    Why: as in F17, answers never end, and the loss looks normal.
    Not: F17, where the token is the padding token and is masked everywhere; F10, where there is none; truncated rows.
    In less than a third of the answers it is a remark. Control: the other answers, which show the end.
    Fix: put the end-of-turn token inside `{% generation %}`, or include it in the mask.
    Wrong when: never, if the model should stop by itself.
    Source: trl#5988 (GLM); reproduced with `{{content}}{% endgeneration %}<|eot|>`.
    """
    facts = LabelFacts.of(run_facts)
    masked = sum(facts.ends_masked.values())
    if masked < min(3, facts.answers) or masked < LEAST * facts.answers or not masked:
        return None
    pad = facts.batches.pad_id
    by_pad = pad in facts.ends_masked and not _learned_anywhere(facts, pad)
    by_template = _template_masks_end(run_facts, facts)
    if by_pad and not by_template:
        return None
    (end, _), *_ = facts.ends_masked.most_common(1)
    says = f"{masked} of {facts.answers} answers end with {_spelled(run_facts, end)}, which is masked"
    if by_template:
        says += ": the template writes it after {% endgeneration %}"
    fix = (
        "put the end-of-turn token before {% endgeneration %}"
        if by_template
        else "include the end-of-turn token in the mask"
    )
    kind, weight = _fault_or_remark(masked, facts.answers)
    numbers = {"ends_masked": masked, "answers": facts.answers}
    return Signal("F19", kind, says, weight, numbers, fix=fix, affected=masked / facts.answers)


@rule("F20", needs=("batches",), unless=is_ours)
def prompt_learned(run_facts: RunFacts) -> Signal | None:
    """F20: the loss includes prompts, although only answers should count.

    Sees: labels on the text of users, in all of their turns or only in the later ones; labels with one constant number
    where the mask should be -100. A token whose weight is 0 counts as one without a label.
    Why: the loss looks better (prompts are easy), and the adapter learns to write the user's text.
    Not: a choice: nothing is said if the config trains on all tokens, and it is a remark if its intention is not known;
    F23, whose answers have no labels; F29, whose labels are on padding; a mask that is off by a few tokens.
    Fix: `assistant_only_loss: true`, and labels of -100 at masked tokens.
    Wrong when: the answers-only setting belongs to another training stage.
    Source: llama-cookbook#101, PraisonAI#4358.
    """
    facts = LabelFacts.of(run_facts)
    if constant := facts.constant_label:
        value, count = constant
        says = f"{count:,} labels are {value} although the token is a different one: the loss only ignores -100"
        return Signal(
            "F20",
            "invariant",
            says,
            0.9,
            {"value": value, "labels": count},
            fix="use -100 as the label of masked tokens",
        )
    asked, count = run_facts.settings.get("assistant_only_loss"), facts.turns_learned[USER]
    if asked is False or facts.unlike:
        return None
    if not facts.turns[USER]:  # no turn was found in the texts
        if not asked or facts.share < WHOLE or not _have_questions(run_facts, facts):
            return None
        says, share = f"{facts.share:.0%} of all tokens count in the loss", facts.share
    else:
        share = count / facts.turns[USER]
        if count < min(3, facts.turns[USER]) or share < SOME or facts.turns_learned[ASSISTANT] <= FEW * count:
            return None
        says = f"{count:,} of {facts.turns[USER]:,} turns of users count in the loss"
    numbers = {"user_turns": count, "share": share, "share_learned": facts.share}
    if asked is None:
        says += ", beside the answers; whether that is intended is not known"
        return Signal("F20", "remark", says, 0.3, numbers, fix=_ONLY_ANSWERS, affected=share)
    says += ", although only answers should"
    if _template_lacks_marker(run_facts) and facts.share > ALMOST_ALL:
        says += "; the chat template has no {% generation %} marker to find answers by (F18)"
    return Signal("F20", "invariant", says, 0.9, numbers, fix=_ONLY_ANSWERS, affected=share)


@rule("F21", needs=("batches",), unless=is_ours)
def nothing_learned(run_facts: RunFacts) -> Signal | None:
    """F21: whole rows have no label although they are short enough: the start of the answer was not found.

    Sees: rows without a single label that are shorter than the longest row and than max_length.
    Why: the loss is 0 or NaN, or these rows silently have no effect.
    Not: F25, where the prompt fills max_length; F18, where the template has no marker to find. Less than a third of the
    rows are a remark. Control: the other rows, which have labels.
    Fix: make the mask from the template's offsets. Do not search for a marker text: its tokens differ inside a row.
    Wrong when: rows without an answer are wanted (weight 0).
    Source: transformers#27733, fms-hf-tuning#18, unsloth#2900.
    """
    facts = LabelFacts.of(run_facts)
    limit = run_facts.settings.get("max_length") or 1 << 62
    short = [d for d in facts.unlearned if len(d.ids) < limit and (len(d.ids) < facts.longest or facts.longest < limit)]
    if len(short) < LEAST * max(len(facts.documents), 1) or not short:
        return None
    lacking = _asked_for_answers(run_facts) and _template_lacks_marker(run_facts)
    if lacking and not run_facts.settings.get("response_template") and len(short) == len(facts.documents):
        return None  # F18
    if _all_cut(run_facts, facts):
        return None
    says = f"{len(short)} of {len(facts.documents)} rows have no label at all, although none of them fills max_length"
    kind, weight = _fault_or_remark(len(short), len(facts.documents))
    numbers, share = {"rows": len(short), "of": len(facts.documents)}, len(short) / len(facts.documents)
    fix = "find answers by the template's offsets, not by a marker text"
    return Signal("F21", kind, says, weight, numbers, fix=fix, affected=share)


@rule("F21", needs=("trace",), unless=is_ours)
def loss_of_no_labels(run_facts: RunFacts) -> Signal | None:
    """F21, from the log: every loss and every gradient is exactly 0, and no evaluation is a number above 0.

    A loss that overflows has a gradient that is not a number, and memorised rows a loss just above 0.
    """
    trace = run_facts.trace
    if trace is None or len(trace.loss_S) < MIN_LOGGED or (trace.loss_S != 0).any() or (trace.grad_norm_S != 0).any():
        return None
    if (trace.eval_loss_E > 0).any():
        return None
    says = f"all {len(trace.loss_S)} logged losses and gradients are exactly 0: no row has a label"
    fix = "find answers by the template's offsets, not by a marker text"
    return Signal("F21", "invariant", says, 0.9, {"logged": len(trace.loss_S)}, fix=fix, affected=1.0)


@rule("F22", needs=("batches",), probes=("P1",))
def shifted_twice(run_facts: RunFacts) -> Signal | None:
    """F22: labels are shifted twice: once in the data and once by the model.

    Sees: labels that are not the token at their position but one before or after it; a loss that compares labels with
    the logits of another position than the one before (probe P1 replaces single labels and sees which).
    Why: the model learns to skip a token. The loss curve looks normal, since the model can memorise the token after
    next, but the loss with correct labels does not fall.
    Not: F04, where the loss on plain text is bad too; F38, whose labels are their tokens.
    Fix: `labels = input_ids.clone()`; the model shifts them itself.
    Wrong when: the loss function does not shift by itself. Then P1 sees that it expects these labels, which counts
    against this fault.
    Source: transformers#47394, #44642; the first loss is 15 times the normal one; after training 7.3 instead of 1.8
    (measured).
    """
    facts = LabelFacts.of(run_facts)
    if facts.unlike < MOST * max(facts.labels, 1) or facts.shift is None:
        return None
    which = "after" if facts.shift > 0 else "before"
    says = (
        f"{facts.unlike:,} of {facts.labels:,} labels are not their own token but the one {abs(facts.shift)} {which} it"
    )
    numbers = {"unlike": facts.unlike, "labels": facts.labels, "shift": facts.shift}
    fix = "labels = input_ids, with -100 where masked; do not shift them yourself"
    return Signal("F22", "invariant", says, 0.95, numbers, fix=fix, affected=facts.unlike / facts.labels)


@rule("F23", needs=("batches",), unless=is_ours)
def mask_inverted(run_facts: RunFacts) -> Signal | None:
    """F23: the mask is inverted: the prompts are trained on and the answers are not.

    Sees: labels on the user's tokens, and none (or hardly any) on the assistant's.
    Why: the model learns to ask questions. The loss is low, because prompts are easy.
    Not: F20, where both are trained on; F36, where the data has the roles swapped.
    Fix: invert the mask.
    Wrong when: the model should simulate the user.
    Source: no public report found; the first loss is 0.8 of the normal one, so the loss does not show it (measured).
    """
    facts = LabelFacts.of(run_facts)
    users, answers = facts.turns_learned[USER], facts.turns_learned[ASSISTANT]
    if not users or users < MOST * facts.turns[USER] or facts.turns[ASSISTANT] < SOME * users:
        return None
    if answers > FEW * facts.turns[ASSISTANT]:
        return None
    says = (
        f"{users:,} of {facts.turns[USER]:,} turns of users count in the loss, and {answers:,} of the "
        f"assistant's {facts.turns[ASSISTANT]:,}"
    )
    numbers = {"user_turns": users, "assistant_turns": answers}
    fix = "invert the mask, so that the answers have the labels"
    return Signal("F23", "invariant", says, 0.95, numbers, fix=fix, affected=users / facts.turns[USER])


def _fault_or_remark(count: int, whole: int) -> tuple[Kind, float]:
    """Kind and weight of an invariant that is violated in so many of all."""
    return ("invariant", 0.95) if count >= MUCH * whole else ("remark", 0.3)


def _have_questions(run_facts: RunFacts, facts: LabelFacts) -> bool:
    """Whether most texts have something in them that a user says in the conversations."""
    chats = run_facts.conversations[:NUM_CHATS]
    said = {str(m.get("content") or "").strip() for chat in chats for m in chat if m.get("role") == "user"} - {""}
    texts = [facts.roles.text_of(document)[0] for document in facts.documents[:NUM_TEXTS]] if said else []
    return sum(any(one in text for one in said) for text in texts) > MOST * len(texts)


def _asked_for_answers(run_facts: RunFacts) -> bool:
    return bool(run_facts.settings.get("assistant_only_loss"))


def _template_lacks_marker(run_facts: RunFacts) -> bool:
    template = getattr(run_facts.tokenizer, "chat_template", None)
    return bool(template) and not _MARKER.search(template if isinstance(template, str) else str(template))


def _all_cut(run_facts: RunFacts, facts: LabelFacts) -> bool:
    """Whether all rows without labels fill max_length: F25."""
    limit = run_facts.settings.get("max_length")
    return bool(limit and facts.unlearned) and all(len(d.ids) >= limit for d in facts.unlearned)


def _learned_anywhere(facts: LabelFacts, token: int | None) -> bool:
    return any((d.labels == token).any() for d in facts.documents)


def _spelled(run_facts: RunFacts, token: int | None) -> str:
    return f"id {token}" if run_facts.tokenizer is None else str(run_facts.tokenizer.convert_ids_to_tokens(token or 0))


def _template_masks_end(run_facts: RunFacts, facts: LabelFacts) -> bool | None:
    """Whether the template's own `{% generation %}` markers leave out the end-of-turn token; None without markers."""
    tokenizer = run_facts.tokenizer
    if tokenizer is None or not getattr(tokenizer, "chat_template", None) or _template_lacks_marker(run_facts):
        return None
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        ids, mask = marked_ids(tokenizer, turns)
    except (TemplateRefusal, TemplateSyntax, ValueError):  # a template may refuse any chat; then the answer is unknown
        return None
    if not any(mask):
        return None
    return not any(m and i in facts.roles.ends for i, m in zip(ids, mask, strict=True))
