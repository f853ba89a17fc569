"""Are the token ids of an engine those of training?

    trained = TrainedIds(tokenizer)
    differences = compare_token_ids(conversations(tokenizer), trained, engine_ids, tokenizer)
    parity, problems = folder_parity(folder, tokenizer, "chat", stop_ids)      transformers, on an exported folder

`engine_ids` is a function from a `Conversation` to ids: transformers' `apply_chat_template` on the exported folder,
llama.cpp's tokenizer and template, an Ollama TEMPLATE. A model whose prompts differ from its training by one line break
still answers, only worse, so nobody sees it; the first token that differs is therefore shown in words.

Control tokens spelled in a text
--------------------------------
A user may write `<|im_end|>` into a message. Training keeps it as ordinary text (`dataset/chat/control_tokens.py`), so
that no row can end a turn or forge a system prompt. An engine that gets messages renders them to one text and reads
every spelling in it as the control token; it cannot know which the template wrote. Parity there means: the same text,
read in the engine's way. `TrainedIds.spelled` says which conversations these are, and they are counted in the result.
What follows for whoever serves a model is in docs/adapter.md.

Plain text
----------
A run on texts or on prompts and completions never meets a chat template: its prompts are continued as they are, with
the bos that the tokenizer adds to a text, once.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solotune import dataset
from solotune.dataset import token_texts
from solotune.dataset.chat.answer_spans import ChatTemplate, Rendered
from solotune.dataset.chat.encode import Encoder
from solotune.errors import InputError
from solotune.exporters.artifact import Parity
from solotune.exporters.conversations import Conversation, rendered, split_by_template, text_conversations
from solotune.hub.safe_files import json_object
from solotune.units import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = Callable[[Conversation], list[int]]
SECONDS = 300  # for transformers to load a tokenizer and render all conversations; it takes five
MOST_SHOWN = 3  # differences in words
WORDS_BEFORE = 40  # characters shown before the first differing token


@dataclass(frozen=True)
class Difference:
    """The first token of a conversation that an engine makes differently."""

    conversation: str
    position: int
    trained: str
    """The token's text and id in training, or `the end`."""
    given: str
    """The same of the engine; or what it says, if it refuses the conversation."""
    before: str
    """The end of the text before it."""

    def __str__(self) -> str:
        place = f"token {self.position}" + (f", after {self.before!r}" if self.before else "")
        return f"conversation '{self.conversation}', {place}: {self.trained} in training, {self.given} here"


class TrainedIds:
    """Token ids as training makes them: a function from a conversation to ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._encoder = Encoder(tokenizer)
        self._template = None if tokenizer.chat_template is None else ChatTemplate(tokenizer)

    def __call__(self, conversation: Conversation) -> list[int]:
        if conversation.text is not None:
            return dataset.text_prompt(self._tokenizer, conversation.text)
        row = replace(self._rendered(conversation), forged=[])
        return self._encoder.encode([row], [conversation.name])[0].ids.tolist()

    def spelled(self, conversation: Conversation) -> bool:
        """Whether a text spells a control token, which training keeps as text and engines read as the token."""
        return conversation.text is None and bool(self._rendered(conversation).forged)

    def _rendered(self, conversation: Conversation) -> Rendered:
        if self._template is None:
            raise InputError("this model has no chat template", allowed="conversations with a text")
        return rendered(self._template, conversation)


def compare_token_ids(
    conversations: Iterable[Conversation], expected: Ids, given: Ids, tokenizer: PreTrainedTokenizerBase
) -> list[Difference]:
    """The first differing token of every conversation that differs.

    Args:
        expected: token ids in training: a `TrainedIds`.
        given: token ids of an engine; it raises InputError for a conversation that it refuses.
        tokenizer: shows the tokens.
    """
    differences = []
    for conversation in conversations:
        trained = expected(conversation)
        try:
            ids = list(given(conversation))
        except InputError as error:
            differences.append(Difference(conversation.name, 0, "accepted", f"refused ({first_line(error)})", ""))
            continue
        if ids != trained:
            differences.append(_difference(conversation.name, trained, ids, tokenizer))
    return differences


def _difference(name: str, trained: list[int], given: list[int], tokenizer: PreTrainedTokenizerBase) -> Difference:
    pairs = zip(trained, given, strict=False)
    place = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(trained), len(given)))
    before = "".join(token_texts(tokenizer, trained[max(0, place - WORDS_BEFORE) : place]))[-WORDS_BEFORE:]
    return Difference(name, place, _word(tokenizer, trained, place), _word(tokenizer, given, place), before)


def _word(tokenizer: PreTrainedTokenizerBase, ids: list[int], place: int) -> str:
    if place >= len(ids):
        return "the end"
    (text,) = token_texts(tokenizer, ids[place : place + 1])
    return f"{text!r} (id {ids[place]})"


# --- an exported folder in transformers


def folder_parity(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: str,
    stop_ids: Sequence[int],
    prompts: Sequence[str] = (),
) -> tuple[Parity, list[str]]:
    """Compare what transformers makes of an exported folder with training: token ids, and tokens that end an answer.

    Args:
        tokenizer: of the training.
        prompt_format: `chat`, or `text` for a model that continues plain texts.
        stop_ids: ids that end an answer.
        prompts: of a model trained on plain text: some of its own.

    Returns:
        The parity, and in words what differs.
    """
    asked, _ = asked_of(tokenizer, prompt_format, prompts)
    trained = TrainedIds(tokenizer)
    template = None if prompt_format == "text" else ChatTemplate(tokenizer)
    differences = compare_token_ids(asked, trained, _served(folder, asked, template), tokenizer)
    problems = [str(difference) for difference in differences[:MOST_SHOWN]]
    if len(differences) > MOST_SHOWN:
        problems.append(f"{len(differences) - MOST_SHOWN} more of {len(asked)} conversations differ")
    if missing := missing_ends(folder, stop_ids):
        names = ", ".join(_word(tokenizer, missing, place) for place in range(len(missing)))
        problems.append(f"generation_config.json: eos_token_id does not have {names}, which ends answers in training")
    found = Parity(
        "transformers", token_ids_equal=not differences, conversations=len(asked), differing=len(differences)
    )
    return found, problems


def asked_of(
    tokenizer: PreTrainedTokenizerBase, prompt_format: str, prompts: Sequence[str] = ()
) -> tuple[list[Conversation], dict[str, str]]:
    """The conversations to compare a model over; and those that its template refuses, by name, with the reason."""
    if prompt_format == "text":
        return text_conversations(tokenizer, prompts), {}
    return split_by_template(tokenizer)


def missing_ends(folder: Path, stop_ids: Sequence[int]) -> list[int]:
    """Ids that end an answer in training, and not when the folder is served.

    Raises:
        InputError: generation_config.json is no JSON object.
    """
    path = folder / "generation_config.json"
    named: Any = json_object(path).get("eos_token_id") if path.is_file() else None
    ends = named if isinstance(named, list) else [named]
    return [token for token in stop_ids if token not in ends]


def _served(folder: Path, asked: Sequence[Conversation], template: ChatTemplate | None) -> Ids:
    """Token ids of the folder's tokenizer in transformers, all made at once by a process of its own.

    Raises:
        InputError: transformers cannot load the folder, or its template takes too long.
    """
    lines = [
        json.dumps(
            {
                "messages": one.messages if template is None else template.as_taken(one.messages),
                "tools": one.tools,
                "kwargs": one.kwargs,
                "text": one.text,
            }
        )
        for one in asked
    ]
    command = [sys.executable, "-m", "solotune.exporters.served_ids", str(folder)]
    try:
        done = subprocess.run(command, input="\n".join(lines).encode(), capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise InputError(f"{folder}: transformers needs more than {SECONDS} s for its chat template") from None
    if done.returncode:
        seen = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise InputError(f"{folder}: transformers cannot load its tokenizer", seen="".join(seen)[:300])
    made = dict(zip((one.name for one in asked), map(json.loads, done.stdout.splitlines()), strict=True))

    def ids(conversation: Conversation) -> list[int]:
        found = made[conversation.name]
        if isinstance(found, str):
            raise InputError(found[:200])
        return found

    return ids
