"""S8, the roles of the turns: F36."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.conversations import calls_of, chats_of
from solotune.diagnosis.facts.row_arrays import NUM_DECODED, evenly, is_pattern, squeezed
from solotune.diagnosis.facts.row_facts import RowFacts, pieces_of_template
from solotune.diagnosis.facts.rows import facts_of
from solotune.diagnosis.findings import Finding
from solotune.diagnosis.rules import rule
from solotune.diagnosis.run_facts import RunFacts

MOST = 0.5
"""Of the chats."""
SOME = 0.05
"""One chat in twenty."""
NEARER = 0.8
"""Of the second questions that are worded as later turns, where the answer before them was lost."""
NUM_COMPARED, FEWEST_WHOLE = 200, 8
"""Turns that are compared, and turns of whole chats that tell how users go on."""

_FOREIGN_ROLES = (
    "human",
    "gpt",
    "bot",
    "chatbot",
    "chatgpt",
    "model",
    "bard",
    "ai",
    "prompter",
    "customer",
    "agent",
    "instruction",
    "response",
)
_ROLES = {"system", "developer", "user", "assistant", "tool", "function", "ipython", "observation"}
_EXCHANGED = "one message of the assistant and one of the user after it: what the user says is not trained on."
_NAMES_OF_ROLES = (
    "in the data, give the message that is to be learned the role assistant, and the one before it the role user"
)


@rule("F36", needs=("rows",))
def broken_turns(facts: RowFacts) -> Finding | None:
    """F36: roles have wrong names or do not alternate.

    Sees: role names that no template knows (`human`, `gpt`), in chats or in headers of rendered rows; chats of one
    message of the assistant, other than in the next chat, and one of the user after it; the same turn twice in a row;
    two answers in a row, or two later questions, in half of the chats; two first ones, if the second is worded as later
    turns of whole chats in the file. In fewer chats they are a remark.
    Why: strict templates raise an error. Others write a header that the model has never seen, or no answer is found.
    The loss does not show it (the first loss is 1.3 times the normal one).
    Not: several tool messages in a row; a system message at the start; a call, its result and the answer; a greeting of
    the assistant at the start, or a last word of the user; role names that the trainer translates.
    Fix: rename the roles to system, user and assistant.
    Wrong when: the template is made for these names. Control: the rendered rows. If they have the template's header of
    a user, the names were translated.
    Source: Megatron-Bridge#5078, smol-course#260, unsloth#994.
    """
    chats = [facts.train.rows[row].messages for row in facts.chats]
    repeated = [row for row, messages in zip(facts.chats, chats, strict=True) if _repeats_a_role(messages)]
    twice = [row for row, messages in zip(facts.chats, chats, strict=True) if _repeats_a_role(messages, same=True)]
    total = len(chats)
    if exchanged := _exchanged(chats):
        rows = [facts.chats[number] for number in exchanged]
        return Finding.of(
            "F36",
            "error",
            message=f"{len(rows):,} of {total:,} rows are {_EXCHANGED}",
            evidence={"rows_with": len(rows), "rows_read": total, "rows": facts.train.places(rows)},
            fix=_NAMES_OF_ROLES,
            affected=len(rows) / total,
            is_statistic=True,
        )
    is_twice = is_pattern(len(twice), total, SOME)
    is_lost = is_pattern(sum(map(_lacks_a_turn, chats)), total, MOST) or _lacks_first_answers(chats)
    if not is_pattern(len(repeated), total, SOME):
        return None
    rows = twice if is_twice else repeated
    return Finding.of(
        "F36",
        "error" if is_twice or is_lost else "warning",
        message=f"{len(rows):,} of {total:,} rows have two turns of the same role in a row"
        + (", with the same text." if is_twice else ": the turn between them is missing." if is_lost else "."),
        evidence={"rows_with": len(rows), "rows_read": total, "rows": facts.train.places(rows)},
        fix="in the data, remove the second turn"
        if is_twice
        else "in the data, join neighbouring messages of one role, or look for a lost turn between them",
        affected=len(rows) / total,
        is_statistic=is_lost and not is_twice,
    )


@rule("F36", needs=("rows",))
def headers_of_foreign_roles(facts: RowFacts) -> Finding | None:
    """F36, of rendered rows: the template's header, with a role name that it does not have."""
    header = _header_of_answers(facts)
    if header is None:
        return None
    begin, end = header
    pattern = re.compile(re.escape(begin) + f"({'|'.join(_FOREIGN_ROLES)})" + re.escape(end), re.IGNORECASE)
    read = evenly(range(len(facts.train.rows)), NUM_DECODED)
    own = str(facts.tokenizer.chat_template)  # may have such a name for the user or the assistant itself
    texts = {row: facts.decode(facts.train.rows[row].input_ids) for row in read}
    found = {row: {name for name in pattern.findall(text) if name not in own} for row, text in texts.items()}
    named = {row: names for row, names in found.items() if names}
    if not is_pattern(len(named), len(read), SOME):
        return None
    names = sorted(set().union(*named.values()))
    return Finding.of(
        "F36",
        "error",
        message=f"{len(named):,} of {len(read):,} rows have turns of roles that the chat template does not have: "
        f"{', '.join(names)}.",
        evidence={
            "rows_with": len(named),
            "rows_read": len(read),
            "roles": names,
            "rows": facts.train.places([*named]),
        },
        fix="in the data, name the roles system, user and assistant",
        affected=len(named) / len(read),
    )


def _header_of_answers(facts: RowFacts) -> tuple[str, str] | None:
    """What the template writes before and after the role's name in the header of an answer; None without a name."""
    pieces = pieces_of_template(facts)
    if pieces is None or "assistant" not in pieces[1]:
        return None
    before, _, after = pieces[1].rpartition("assistant")
    begin = before.rpartition("\n")[2][-16:]
    return (begin, after[:4]) if begin.strip() and after else None


def _repeats_a_role(messages: Sequence[Mapping[str, Any]], same: bool = False) -> bool:
    """Whether the user or the assistant has two turns in a row (`same`: of the same text); a call and the answer after
    it are no repetition."""
    turns = [message for message in messages if message["role"] not in ("system", "developer")]
    return any(
        a["role"] == b["role"]
        and a["role"] in ("user", "assistant")
        and not calls_of(a)
        and (not same or a["content"] == b["content"])
        for a, b in itertools.pairwise(turns)
    )


def _lacks_a_turn(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether an answer follows an answer, or a question that is not the first one a question: what stood between them
    was lost. A document and a question about it, or thoughts and their answer, are two turns on purpose."""
    turns = [message for message in messages if message["role"] not in ("system", "developer")]
    pairs = [
        (number, a["role"])
        for number, (a, b) in enumerate(itertools.pairwise(turns))
        if a["role"] == b["role"] and not calls_of(a) and not calls_of(b) and not _is_thought(str(a["content"]))
    ]
    return any(role == "assistant" or (role == "user" and number > 0) for number, role in pairs)


def _begins_twice(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a chat begins with two turns of the user."""
    turns = [message for message in messages if message["role"] not in ("system", "developer")]
    return [turn["role"] for turn in turns[:2]] == ["user", "user"]


def _lacks_first_answers(chats: Sequence[Sequence[Mapping[str, Any]]]) -> bool:
    """Whether the answer between the first two questions was lost in most chats.

    Control: the whole chats of the same file. What the user says second, in a chat that lost an answer, is worded as
    what users say later in a chat, not as what they say first; a question about a document is worded as a first one.
    """
    broken, whole = [], []
    for chat in chats:
        users = [str(message["content"]) for message in chat if message["role"] == "user"]
        (broken if _begins_twice(chat) else whole).append(users)
    later = [_words(text) for users in whole for text in users[1:]][:NUM_COMPARED]
    first = [_words(users[0]) for users in whole if users][:NUM_COMPARED]
    if not is_pattern(len(broken), len(chats), MOST) or min(len(later), len(first)) < FEWEST_WHOLE:
        return False
    second = [_words(users[1]) for users in broken][:NUM_COMPARED]
    like_later = [max(_shared(words, other) for other in later) for words in second]
    like_first = [max(_shared(words, other) for other in first) for words in second]
    is_nearer = [a > b for a, b in zip(like_later, like_first, strict=True)]
    return is_pattern(sum(is_nearer), len(is_nearer), NEARER)


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+|[^\w\s]", text.casefold()))


def _shared(a: set[str], b: set[str]) -> float:
    """The share of the words of two texts that both have."""
    return len(a & b) / max(len(a | b), 1)


def _is_thought(text: str) -> bool:
    return bool(re.match(r"\s*(<|\[)?/?(think|thought|reason|analysis|plan|scratch)", text, re.IGNORECASE))


def _exchanged(chats: Sequence[Sequence[Mapping[str, Any]]]) -> list[int]:
    """Numbers of the chats whose question is the assistant's and whose answer is the user's; empty unless most are so.

    The order alone does not tell: many chats begin with a greeting, interviews with a question, and end with the user.
    But a greeting is the same in many chats, and an interview does not end after one answer, which nobody trains on.
    """
    found, first = [], set()
    for number, messages in enumerate(chats):
        turns = [message for message in messages if message["role"] not in ("system", "developer")]
        if [turn["role"] for turn in turns] == ["assistant", "user"]:
            found.append(number)
            first.add(squeezed(str(turns[0]["content"])))
    return found if is_pattern(len(found), len(chats), MOST) and len(first) > MOST * len(found) else []


@rule("F36", otherwise=True)
def foreign_roles(run_facts: RunFacts) -> Signal | None:
    """F36, of conversations that could not be rendered: unknown role names, or roles that do not alternate."""
    chats = chats_of(run_facts)
    if not chats:
        return None
    fix = "in the data, name the roles system, user and assistant, and let user and assistant alternate"
    named = Counter(m["role"] for chat in chats for m in chat)
    foreign = {role: count for role, count in named.items() if role not in _ROLES}
    odd = sum(any(m["role"] in foreign for m in chat) for chat in chats)
    if foreign and is_pattern(odd, len(chats), SOME) and not _are_translated(run_facts):
        says = f"{odd:,} of {len(chats):,} chats have roles that no template knows: {', '.join(sorted(foreign))}"
        return Signal("F36", "invariant", says, 0.85, {"roles": foreign}, fix=fix, affected=odd / len(chats))
    if exchanged := len(_exchanged(chats)):
        says, affected = f"{exchanged:,} of {len(chats):,} chats are {_EXCHANGED}", exchanged / len(chats)
        return Signal("F36", "measured", says, 0.75, {"chats": exchanged}, fix=_NAMES_OF_ROLES, affected=affected)
    broken, twice = (sum(_repeats_a_role(chat, same) for chat in chats) for same in (False, True))
    if not is_pattern(broken, len(chats), SOME):
        return None
    if is_pattern(twice, len(chats), SOME):
        says = f"in {twice:,} of {len(chats):,} chats a turn stands twice in a row"
        return Signal("F36", "measured", says, 0.75, {"chats": twice}, fix=fix, affected=twice / len(chats))
    lost = sum(map(_lacks_a_turn, chats))
    if is_pattern(lost, len(chats), MOST) or _lacks_first_answers(chats):
        lost = max(lost, sum(_begins_twice(chat) for chat in chats))
        says = f"in {lost:,} of {len(chats):,} chats an answer follows an answer, or a question a question"
        return Signal("F36", "measured", says, 0.7, {"chats": lost}, fix=fix, affected=lost / len(chats))
    says = f"in {broken:,} of {len(chats):,} chats user and assistant do not alternate"
    return Signal("F36", "remark", says, 0.3, {"chats": broken}, fix=fix, affected=broken / len(chats))


def _are_translated(run_facts: RunFacts) -> bool:
    """Whether the rendered rows have the template's header of a user, and of no other role: the trainer knew them."""
    is_own_rendering = "batches" in run_facts.missing  # the trainer's is not known, and these rows are solotune's
    facts = facts_of(run_facts) if len(run_facts.train) and not is_own_rendering else None
    header = None if facts is None else _header_of_answers(facts)
    if facts is None or header is None:
        return False
    read = [facts.decode(facts.train.rows[row].input_ids) for row in evenly(range(len(facts.train.rows)), 20)]
    user = f"{header[0]}user{header[1]}"
    return all(user in text for text in read) and headers_of_foreign_roles(facts) is None
