"""S4, the loss mask: F17 to F23, read off the labels as the training's collator made them; `labels_of_rows` before."""

from __future__ import annotations

import re

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.labels import LabelFacts
from solotune.diagnosis.facts.roles import ASSISTANT, USER
from solotune.diagnosis.rules import rule
from solotune.diagnosis.run_facts import RunFacts

MOST = 0.5  # of the documents: a fault of the whole data
ALMOST_ALL = 0.9
FEW = 0.02  # labels that may be of another role: a header, a line break
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


@rule("F17", needs=("batches",), probes=("P13",))
def pad_masks_terminator(run_facts: RunFacts) -> Signal | None:
    """F17: the end of turn is masked in the labels because it is the padding token.

    Sees: answers that are followed by their end of turn without a label, where that id is the pad's and has a label
    nowhere; batches and rows alike.
    Why: the loss looks as it should (it moves by 0.1 either way), and the model never learns to stop.
    Not: pad = eos alone, which is harmless where labels are masked by position (then this is silent); F10, whose ends
    are not in the ids; F19, whose mask leaves out the end for another reason; F14, which generates the end and goes on.
    Fix: mask the labels by position or by attention_mask, or give the padding a token of its own.
    Wrong when: a mask of one's own leaves out just this id on purpose.
    Source: transformers' DataCollatorForLanguageModeling masks by id (0 of 4 ends kept; TRL's collator 4 of 4);
    mlabonne/llm-course#33, trl#456.
    """
    facts = LabelFacts.of(run_facts)
    pad = facts.batches.pad_id
    masked = facts.ends_masked[pad] if pad is not None else 0
    if not masked or _learned_anywhere(facts, pad) or masked < MOST * facts.answers:
        return None
    if _template_masks_end(run_facts, facts) is True:
        return None  # the template's own marker leaves it out: F19
    token = _spelled(run_facts, pad)
    says = (
        f"{masked} of {facts.answers} answers are followed by {token}, the padding token, and none of them is learned"
    )
    return Signal(
            "F17", "invariant", says, 0.95, {"ends_masked": masked, "answers": facts.answers, "pad_id": pad},
            fix="mask labels where attention_mask is 0, not where the id is the pad's; or a pad_token of its own",
        )  # fmt: skip


@rule("F18", needs=("batches", "tokenizer", "settings"))
def no_generation_markers(run_facts: RunFacts) -> Signal | None:
    """F18: answers alone were to be learned, and the template does not mark them.

    Sees: a chat template without `{% generation %}`, `assistant_only_loss` asked for, and labels on nothing.
    Why: transformers then returns a mask of zeros; one framework raises, another learns every token without a word,
    which is told as F20.
    Not: F25, whose labels come back with a longer max_length; F21, whose mask looks for a marker of its own.
    Fix: a training template with `{% generation %}` and `{% endgeneration %}` around the assistant's part.
    Wrong when: the mask is made from outside of the template (as solotune does) and is at fault for another reason.
    Source: marin#7237, Megatron-Bridge#3359, QwenLM/Qwen3#1522.
    """
    template = getattr(run_facts.tokenizer, "chat_template", None)
    marked = bool(_MARKER.search(template if isinstance(template, str) else str(template or "")))
    if not template or marked or not _asked_for_answers(run_facts) or run_facts.settings.get("response_template"):
        return None
    facts = LabelFacts.of(run_facts)
    if not facts.documents or len(facts.unlearned) < len(facts.documents) or _all_cut(run_facts, facts):
        return None
    says = "the chat template has no {% generation %} marker, and nothing is learned though answers were asked for"
    return Signal(
        "F18",
        "invariant",
        says,
        0.9,
        {"share_learned": facts.share},
        fix="a chat template with {% generation %} ... {% endgeneration %} around the answer",
    )


@rule("F19", needs=("batches",), probes=("P13",))
def terminator_masked(run_facts: RunFacts) -> Signal | None:
    """F19: the end of turn stands behind the answer and is not learned.

    Sees: answers followed by an end of turn without a label.
    Why: as F17: endless answers at a loss that looks right.
    Not: F17, where that id is the pad's and is masked wherever it stands; F10, where there is none; rows that were cut.
    Fix: the end of turn inside of `{% generation %}`, or of whatever makes the mask.
    Wrong when: never for a model that is to stop by itself.
    Source: trl#5988 (GLM); reproduced with `{{content}}{% endgeneration %}<|eot|>`.
    """
    facts = LabelFacts.of(run_facts)
    masked = sum(facts.ends_masked.values())
    if not masked or masked < MOST * facts.answers:
        return None
    pad = facts.batches.pad_id
    by_pad = pad in facts.ends_masked and not _learned_anywhere(facts, pad)
    by_template = _template_masks_end(run_facts, facts)
    if by_pad and not by_template:
        return None
    (end, _), *_ = facts.ends_masked.most_common(1)
    says = f"{masked} of {facts.answers} answers are followed by {_spelled(run_facts, end)} without a label"
    if by_template:
        says += ", which the template writes behind its {% endgeneration %}"
    fix = "put the end of turn before {% endgeneration %}" if by_template else "let the mask include the end of turn"
    return Signal("F19", "invariant", says, 0.95, {"ends_masked": masked, "answers": facts.answers}, fix=fix)


@rule("F20", needs=("batches",))
def prompt_learned(run_facts: RunFacts) -> Signal | None:
    """F20: prompts are learned though answers alone were asked for.

    Sees: labels on the user's text, or labels that are one constant number where the mask should be -100.
    Why: the loss looks better (prompts are easy), and capacity goes into writing the user's part.
    Not: a choice: silent where the config asks for every token, weak where nobody knows what was asked; F23, whose
    answers have no labels; F29, whose labels stand on padding.
    Fix: `assistant_only_loss: true`, and a mask of -100.
    Wrong when: the config says answers alone and means another stage.
    Source: llama-cookbook#101, PraisonAI#4358.
    """
    facts = LabelFacts.of(run_facts)
    if constant := _constant_instead_of_mask(facts):
        value, count = constant
        says = f"{count:,} labels are {value} where the token is another one: the loss ignores -100 and nothing else"
        return Signal("F20", "invariant", says, 0.9, {"value": value, "labels": count}, fix="labels of -100")
    asked = run_facts.settings.get("assistant_only_loss")
    users, answers = facts.role_labels[USER], facts.role_labels[ASSISTANT]
    if asked is False or not answers or not facts.role_tokens[USER] or facts.unlike:
        return None
    share = users / facts.role_tokens[USER]
    if share < MOST or answers < MOST * facts.role_tokens[ASSISTANT]:
        return None
    says = f"{share:.0%} of the users' {facts.role_tokens[USER]:,} tokens are learned"
    numbers = {"user_share": share, "share_learned": facts.share}
    if asked is None:
        weak = Signal("F20", "measured", says + "; whether that was asked is not known", 0.3, numbers)
        return weak
    if _template_lacks_marker(run_facts) and facts.share > ALMOST_ALL:
        says += "; the chat template has no {% generation %} marker that would tell answers (F18)"
    fix = "assistant_only_loss: true, and check that the collator keeps the mask"
    return Signal("F20", "invariant", says + ", though answers alone were asked for", 0.9, numbers, fix=fix)


@rule("F21", needs=("batches",))
def nothing_learned(run_facts: RunFacts) -> Signal | None:
    """F21: whole rows have no label, though they are short enough: the answer's beginning was not found.

    Sees: documents without a single label that are shorter than the longest and than max_length.
    Why: the loss is 0 or NaN, or rows count for nothing without a word.
    Not: F25, where the prompt fills the window; F18, where the template has no marker to find.
    Fix: take the mask from the template's offsets instead of searching for a string, which is tokenised differently in
    its context.
    Wrong when: rows without an answer are meant (weight 0).
    Source: transformers#27733, fms-hf-tuning#18, unsloth#2900.
    """
    facts = LabelFacts.of(run_facts)
    limit = run_facts.settings.get("max_length") or 1 << 62
    short = [d for d in facts.unlearned if len(d.ids) < limit and (len(d.ids) < facts.longest or facts.longest < limit)]
    if len(short) < 0.05 * max(len(facts.documents), 1) or not short:
        return None
    lacking = _asked_for_answers(run_facts) and _template_lacks_marker(run_facts)
    if lacking and not run_facts.settings.get("response_template") and len(short) == len(facts.documents):
        return None  # F18
    if _all_cut(run_facts, facts):
        return None
    everything = len(short) >= MOST * len(facts.documents)
    says = f"{len(short)} of {len(facts.documents)} rows have no label at all, and none of them fills max_length"
    return Signal(
            "F21", "invariant" if everything else "measured", says, 0.9 if everything else 0.6,
            {"rows": len(short), "of": len(facts.documents)},
            fix="find answers by the template's offsets, not by a marker string",
        )  # fmt: skip


@rule("F22", needs=("batches",), probes=("P1",))
def shifted_twice(run_facts: RunFacts) -> Signal | None:
    """F22: labels are shifted before a model that shifts them again.

    Sees: labels that are not the token at their place but the one before or behind it.
    Why: the model learns to skip a token. The curve looks normal, since what comes two ahead can be learned by heart;
    under right labels the loss stays where it was.
    Not: F04, where plain text is bad too; F38, whose labels are their tokens.
    Fix: `labels = input_ids.clone()`; the model shifts.
    Wrong when: the loss in use does not shift by itself; P1 then finds a normal first loss and speaks against this.
    Source: transformers#47394, #44642; first loss 15 times the right one, 7.3 against 1.8 after training.
    """
    facts = LabelFacts.of(run_facts)
    if facts.unlike < MOST * max(facts.labels, 1) or facts.shift is None:
        return None
    which = "behind" if facts.shift > 0 else "before"
    says = f"{facts.unlike:,} of {facts.labels:,} labels are not their token but the one {abs(facts.shift)} {which} it"
    return Signal(
        "F22", "invariant", says, 0.95, {"unlike": facts.unlike, "labels": facts.labels, "shift": facts.shift},
        fix="labels = input_ids, masked with -100; no shift of one's own",
    )  # fmt: skip


@rule("F23", needs=("batches",))
def mask_inverted(run_facts: RunFacts) -> Signal | None:
    """F23: the prompt is learned and the answer is not.

    Sees: labels on the users' tokens, and none (or hardly any) on the assistant's.
    Why: the model learns to ask questions; the loss is low, for prompts are easy.
    Not: F20 learns both; F36, where the data swapped the roles.
    Fix: turn the mask around.
    Wrong when: the user is simulated on purpose.
    Source: no report found; first loss 0.8 of the right one, so the loss does not show it.
    """
    facts = LabelFacts.of(run_facts)
    users, answers = facts.role_labels[USER], facts.role_labels[ASSISTANT]
    if not users or users < MOST * facts.role_tokens[USER] or answers > FEW * max(facts.role_tokens[ASSISTANT], 1):
        return None
    says = (
        f"{users:,} of the users' {facts.role_tokens[USER]:,} tokens are learned, and {answers:,} of the assistant's "
        f"{facts.role_tokens[ASSISTANT]:,}"
    )
    numbers = {"user_labels": users, "assistant_labels": answers}
    return Signal("F23", "invariant", says, 0.95, numbers, fix="invert the mask: labels on the answers")


def _asked_for_answers(run_facts: RunFacts) -> bool:
    return bool(run_facts.settings.get("assistant_only_loss"))


def _template_lacks_marker(run_facts: RunFacts) -> bool:
    template = getattr(run_facts.tokenizer, "chat_template", None)
    return bool(template) and not _MARKER.search(template if isinstance(template, str) else str(template))


def _all_cut(run_facts: RunFacts, facts: LabelFacts) -> bool:
    """All rows without labels fill the window: F25."""
    limit = run_facts.settings.get("max_length")
    return bool(limit and facts.unlearned) and all(len(d.ids) >= limit for d in facts.unlearned)


def _constant_instead_of_mask(facts: LabelFacts) -> tuple[int, int] | None:
    """(value, how many) where labels that are not their token are all one number."""
    if facts.unlike < 0.05 * max(facts.labels, 1) or facts.shift is not None:
        return None
    (value, count), *_ = facts.unlike_values.most_common(1)
    return (value, count) if count >= ALMOST_ALL * facts.unlike else None


def _learned_anywhere(facts: LabelFacts, token: int | None) -> bool:
    return any((d.labels == token).any() for d in facts.documents)


def _spelled(run_facts: RunFacts, token: int | None) -> str:
    return f"id {token}" if run_facts.tokenizer is None else str(run_facts.tokenizer.convert_ids_to_tokens(token or 0))


def _template_masks_end(run_facts: RunFacts, facts: LabelFacts) -> bool | None:
    """Whether the template's own `{% generation %}` markers leave out the end of turn; None: it has none."""
    tokenizer = run_facts.tokenizer
    if tokenizer is None or not getattr(tokenizer, "chat_template", None) or _template_lacks_marker(run_facts):
        return None
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        out = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    except Exception:  # a template may refuse anything; then it does not tell
        return None
    ids, mask = out["input_ids"], out["assistant_masks"]  # type: ignore[index]
    if not any(mask):
        return None
    return not any(m and i in facts.roles.ends for i, m in zip(ids, mask, strict=True))
