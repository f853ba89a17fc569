"""Differences that come from what llama.cpp lacks, whatever the file says; and whether the user's own rows meet them.

    problems, lacking = explained(differences, asked, trained, given, lacks_of(tokenizer))
    problems, notes = judged(lacking, texts_of(source.data))

What a file can say so that llama.cpp gives training's ids, the exported file says (`engine_template`,
`engine_vocabulary`). Then this is left:

    NFC      llama.cpp does not compose characters (e + accent), which the tokenizers of Qwen and others do first. The
             chat template of the file does it, but not for a run on texts, which has none, nor in Ollama, whose
             TEMPLATE has no means for it. A GGUF file has no entry for it: `tokenizer.ggml.normalizer.*` knows lower
             case and accents, for BERT alone
    ends     a token with the text of an end token, which texts are split into
    strip    a template that strips white space in a way that could not be rewritten

Is that a failed export? The conversations that are compared hold such text on purpose, so every export of such a
tokenizer would fail, however it is made, and say nothing of this model. What counts is the text that the model was
trained for. If one of the user's own rows has such text, the file gives other ids than training for it: a difference,
exit code 3, with its first token. If none has, it is a note, with the same token. Either way it is counted apart, and
the ids are called equal only where all are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from solotune.dataset import Example
from solotune.errors import SolotuneError
from solotune.exporters.conversations import Conversation
from solotune.exporters.engine_template import ASCII_WHITE_SPACE, composes
from solotune.exporters.engine_vocabulary import END_SPELLING
from solotune.exporters.template_parity import MOST_SHOWN, Difference, Ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Changed = Callable[[str], str]
Texts = Iterable[list[str]]
"""The texts of each row; of a row of plain text none, since only its tokens are kept."""


@dataclass(frozen=True)
class Lack:
    """Something that training's tokenizer or template does and llama.cpp does not."""

    what: str
    which_text: str
    change: Changed
    """Makes a text one on which it does not matter."""
    instead: str

    def affects(self, texts: Iterable[str]) -> bool:
        """Whether it matters for one of these."""
        return any(self.change(text) != text for text in texts)


@dataclass(frozen=True)
class Lacking:
    """A lack, and the compared conversations in which it shows; none of an engine that is not asked."""

    lack: Lack
    count: int = 0
    of: int = 0
    first: Difference | None = None

    def __str__(self) -> str:
        if self.first is None:
            return self.lack.what
        return f"{self.lack.what}: {self.count} of {self.of} conversations; {self.first}"


_SERVE = "`transformers serve` on the merged folder does it (solotune serve --engine transformers)"


def lacks_of(tokenizer: PreTrainedTokenizerBase) -> list[Lack]:
    """What llama.cpp may lack with a tokenizer."""
    return [
        Lack(
            "llama.cpp does not compose characters as this tokenizer does (NFC)",
            "text in decomposed form",
            normalizer(tokenizer),
            f"send it text in NFC; {_SERVE}",
        ),
        Lack(
            "llama.cpp takes </s> and the like in a message for end tokens",
            "such a spelling",
            lambda text: END_SPELLING.sub("x", text),
            f"take it out of messages; {_SERVE}",
        ),
        Lack(
            "llama.cpp strips ASCII white space only around messages",
            "other white space around a message",
            _without_other_white_space,
            f"strip messages before you send them; {_SERVE}",
        ),
    ]


def ollama_lacks(tokenizer: PreTrainedTokenizerBase) -> list[Lacking]:
    """What a Modelfile's TEMPLATE cannot make up for: Ollama does not use the template in the GGUF file."""
    nfc, *_ = lacks_of(tokenizer)
    what = "Ollama does not compose characters as this tokenizer does (NFC)"
    return [Lacking(replace(nfc, what=what))] if composes(tokenizer) else []


def _without_other_white_space(text: str) -> str:
    return text if text.strip() == text.strip(ASCII_WHITE_SPACE) else text.strip()


def normalizer(tokenizer: PreTrainedTokenizerBase) -> Changed:
    """What the tokenizer does to a text before it splits it."""
    fast: Any = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None or fast.normalizer is None:
        return str
    return lambda text: fast.normalizer.normalize_str(text)


def explained(
    differences: Sequence[Difference], asked: Sequence[Conversation], trained: Ids, given: Ids, lacks: Sequence[Lack]
) -> tuple[list[str], list[Lacking]]:
    """Sort differences: those that nothing explains, in words; and those that come from what the engine lacks.

    A reason counts only if it is the whole one: the engine is asked again for the same conversation without what it
    cannot do, and its ids then have to be those of training.
    """
    by_name = {one.name: one for one in asked}
    problems, found = [], dict[str, list[Difference]]()
    for difference in differences:
        one = by_name[difference.conversation]
        reason = next((lack.what for lack in lacks if _is_equal_after(lack.change, one, trained, given)), None)
        if reason is None:
            problems.append(str(difference))
        else:
            found.setdefault(reason, []).append(difference)
    if len(problems) > MOST_SHOWN:
        problems[MOST_SHOWN:] = [f"{len(problems) - MOST_SHOWN} more of {len(asked)} conversations differ"]
    return problems, [
        Lacking(lack, len(found[lack.what]), len(asked), found[lack.what][0]) for lack in lacks if lack.what in found
    ]


def _is_equal_after(change: Changed, asked: Conversation, trained: Ids, given: Ids) -> bool:
    """Whether the engine's ids are training's once the texts of a conversation are changed."""
    messages = [
        {**message, "content": change(message["content"])} if isinstance(message.get("content"), str) else message
        for message in asked.messages
    ]
    changed = replace(asked, messages=messages, text=None if asked.text is None else change(asked.text))
    try:
        return changed != asked and given(changed) == trained(changed)
    except SolotuneError:
        return False


# --- the user's own rows


def texts_of(data: Iterable[Sequence[Example]]) -> Iterator[list[str]]:
    """The texts of each row, one row at a time: rows may be more than fit into memory."""
    for rows in data:
        for row in rows:
            yield list(_strings([row.messages, row.tools]))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _strings(one)


def judged(lacking: Sequence[Lacking], rows: Texts) -> tuple[list[str], list[str]]:
    """What the engine lacks, in words: problems where the user's own rows have such text, else notes."""
    problems, notes = [], []
    total, known, affected = _counted(lacking, rows)
    for one in lacking:
        count = affected[one.lack.what]
        if not known:
            notes.append(f"{one}; whether rows of the training have {one.lack.which_text} is not known here")
        elif not count:
            notes.append(f"{one}; none of the {total:,} rows has {one.lack.which_text}")
        else:
            have = f"{count:,} of the {total:,} rows {'has' if count == 1 else 'have'} {one.lack.which_text}"
            problems.append(f"{one}; {have}: {one.lack.instead}")
    return problems, notes


def _counted(lacking: Sequence[Lacking], rows: Texts) -> tuple[int, bool, dict[str, int]]:
    """The number of rows, whether there are texts of them, and how many rows each lack affects."""
    total, known, affected = 0, False, dict.fromkeys((one.lack.what for one in lacking), 0)
    for texts in rows if lacking else ():
        total, known = total + 1, known or bool(texts)
        for one in lacking:
            affected[one.lack.what] += one.lack.affects(texts)
    return total, known, affected
