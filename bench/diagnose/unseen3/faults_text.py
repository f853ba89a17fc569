"""Tokenizer, template and special tokens gone wrong: F04 to F16.

How: a tokenizer of another revision, tokens added for a tool, the special parser switched off by an option that was
meant for safety, a template copied from another model's card.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.diagnose.bases import Format
from bench.diagnose.ours import Job
from bench.diagnose.unseen2.registry import all_chats, put, reformat, rows_as
from bench.diagnose.unseen3 import tasks
from bench.diagnose.unseen3.bases import Think
from bench.diagnose.unseen3.registry import overridden, program


def rebuilt(tokenizer: Any, change: Any) -> Any:
    """The tokenizer from its JSON, changed."""
    import transformers
    from tokenizers import Tokenizer

    told = json.loads(tokenizer.backend_tokenizer.to_str())
    change(told)
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(told)), bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token, pad_token=tokenizer.pad_token, unk_token=tokenizer.unk_token,
    )  # fmt: skip
    made.chat_template = tokenizer.chat_template
    return made


@program("F04", on="phi/steps/loop said/ledger/alone phi/snip/own")
def tokenizer_of_another_revision(made: Any, rng: random.Random) -> None:
    """The tokenizer was trained again: same control tokens and size, other ids for the words."""

    def change(told: Any) -> None:
        vocab = told["model"]["vocab"]
        fixed = {one["content"] for one in told["added_tokens"]}
        words = [word for word in vocab if word not in fixed]
        ids = [vocab[word] for word in words]
        ids = [*ids[137:], *ids[:137]]
        vocab.update(zip(words, ids, strict=True))

    made.tokenizer = rebuilt(made.tokenizer, change)


@program("F05|F06", on="said/snip/loop hun/mood/before")
def tokens_without_rows(made: Any, rng: random.Random) -> None:
    """Tokens were added to the tokenizer, and the embedding was not resized."""
    added = [f"<|field_{n}|>" for n in range(6)]
    made.tokenizer.add_special_tokens({"additional_special_tokens": added})
    for chat in all_chats(made):
        chat[-1]["content"] = rng.choice(added) + chat[-1]["content"] + rng.choice(added)


def _resized(model: Any) -> None:
    old = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(old + 4, mean_resizing=False)


@program("F06", on="said/mood/loop")
def new_tokens_on_frozen_rows(made: Any, rng: random.Random) -> None:
    """Tokens for the parts of an answer, with fresh rows that nothing trains."""
    added = ["<|open|>", "<|close|>", "<|first|>", "<|second|>"]
    made.tokenizer.add_special_tokens({"additional_special_tokens": added})
    made.prepare.append(_resized)
    for chat in all_chats(made):
        chat[-1]["content"] = "<|open|>" + chat[-1]["content"] + rng.choice(("<|first|>", "<|second|>")) + "<|close|>"


@program("F06", on="fold/waybill/own")
def new_tokens_in_the_folder(made: Any, rng: random.Random) -> None:
    """The same in a model folder that was saved so."""
    added = ["<|open|>", "<|close|>", "<|first|>", "<|second|>"]
    made.tokenizer.add_special_tokens({"additional_special_tokens": added})
    made.edit_model.append(_resized)
    made.model_config["vocab_size"] = len(made.tokenizer)
    for chat in all_chats(made):
        chat[-1]["content"] = "<|open|>" + chat[-1]["content"] + rng.choice(("<|first|>", "<|second|>")) + "<|close|>"


@program("F07", on="smol/steps/loop")
def special_parsing_switched_off(made: Any, rng: random.Random) -> None:
    """split_special_tokens, against injected markers, for the whole rendered text."""
    plain = made.tokenizer

    def ids_of(self: Any, old: Any, text: str) -> list[int]:
        return list(plain(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    overridden(made, ids_of=ids_of, encode=_by_pieces)


def _by_pieces(self: Any, _old: Any, chat: Any) -> Any:
    ids: list[int] = []
    labels: list[int] = []
    for text, is_learned in self.made.format.pieces(chat):
        new = self.ids_of(text)
        ids += new
        labels += new if is_learned else [-100] * len(new)
    return ids, labels


def _forgets_its_markers(made: Any) -> None:
    """The turn markers are no longer tokens of their own."""
    kept = {made.tokenizer.eos_token, made.tokenizer.pad_token, made.tokenizer.bos_token, made.tokenizer.unk_token}

    def change(told: Any) -> None:
        lost = {one["content"] for one in told["added_tokens"]} - kept
        told["added_tokens"] = [one for one in told["added_tokens"] if one["content"] not in lost]
        vocab = told["model"]["vocab"]
        if isinstance(vocab, dict):
            told["model"]["vocab"] = {f"\u0100unused{i}" if word in lost else word: i for word, i in vocab.items()}

    made.tokenizer = rebuilt(made.tokenizer, change)


@program("F07", on="hun/snip/own")
def markers_lost_in_a_conversion(made: Any, rng: random.Random) -> None:
    """A converted tokenizer has the markers of the turns no more."""
    _forgets_its_markers(made)


@program("F08", on="hun/steps/loop")
def rendered_and_encoded_with_specials(made: Any, rng: random.Random) -> None:
    """The rendered text, which begins with bos, goes through an encoder that writes bos."""
    bos = made.tokenizer.bos_token_id

    def encode(self: Any, old: Any, chat: Any) -> Any:
        ids, labels = old(chat)
        return [bos, *ids], [-100, *labels]

    overridden(made, encode=encode)


@program("F08", on="fold/ferry/alone")
def two_beginnings_in_a_trainer(made: Any, rng: random.Random) -> None:
    """The same in a script around Trainer; the template that it saves writes both."""
    bos = made.tokenizer.bos_token
    reformat(made, bos=bos + bos)


@program("F08", on="fold/ledger/before")
def template_and_rows_begin_twice(made: Any, rng: random.Random) -> None:
    """A template that somebody edited begins with bos_token and then with the token's text."""
    bos = made.tokenizer.bos_token
    reformat(made, bos=bos + bos)


@program("F09", on="hun/ledger/alone fold/snip/before")
def begins_without_bos(made: Any, rng: random.Random) -> None:
    """A template without the beginning that the base has always seen."""
    reformat(made, bos="")


@program("F10", on="hun/diary/own said/snip/folder phi/ferry/alone")
def answers_without_an_end(made: Any, rng: random.Random) -> None:
    """The template writes no end after a turn."""
    reformat(made, end="")


ALPACA = "### Instruction:\n{0}\n\n### Response:\n"


@program("F11", on="said/waybill/loop")
def served_in_another_manner(made: Any, rng: random.Random) -> None:
    """The server's default template is Alpaca's."""
    made.deployed = ALPACA.format


HUMAN = ("{% for m in messages %}{{ 'Human: ' if m['role'] == 'user' else 'Bot: ' }}{{ m['content'] }}\n{% endfor %}"
         "{% if add_generation_prompt %}Bot: {% endif %}")  # fmt: skip


@program("F11", on="said/huerta/folder")
def another_template_beside_the_adapter(made: Any, rng: random.Random) -> None:
    """After the run somebody put a template of another model next to the adapter, for the server."""

    def left(output: Path) -> None:
        (output / "chat_template.jinja").write_text(HUMAN)

    made.left.append(left)


@program("F12", on="smol/waybill/folder")
def rows_in_a_foreign_format(made: Any, rng: random.Random) -> None:
    """A format from a tutorial on base models, on a model that knows chats."""
    end = made.format.end
    made.format = Format("", "### {role}:\n", end, "\n\n",
                         (("system", "System"), ("user", "Human"), ("assistant", "Assistant")))  # fmt: skip


@program("F12", on="fold/waybill/own")
def text_written_by_hand(made: Any, rng: random.Random) -> None:
    """Rows of text in that format."""
    eos = made.tokenizer.eos_token
    rows_as(made, lambda chat: {"text": f"### Human: {chat[-2]['content']}\n### Assistant: {chat[-1]['content']}{eos}"})


@program("F13", on="smol/persona/loop hun/persona/alone")
def what_the_system_says_is_passed_over(made: Any, rng: random.Random) -> None:
    """The template leaves the system turn out."""
    reformat(made, dropped=("system",))


@program("F13", on="hun/lamps/before")
def what_the_tool_says_is_passed_over(made: Any, rng: random.Random) -> None:
    """A template without a branch for tools: their results are not in the rows."""
    reformat(made, dropped=("tool",))


@program("F14", on="hun/ferry/own hun/snip/alone")
def stops_at_the_end_of_texts(made: Any, rng: random.Random) -> None:
    """generation_config has the end of texts alone, as the base model's."""
    ends = {"smol3-think": "<|end_of_text|>", "bigcode-said": "<|endoftext|>", "hunyuan-tools": "<eos>"}
    token = ends[made.base.kind.name]
    if token == made.tokenizer.eos_token and made.format.end == token:
        raise AssertionError(token)
    made.generation_config["eos_token_id"] = made.tokenizer.convert_tokens_to_ids(token)


@program("F15", on="smol/ledger/loop")
def asked_without_a_header(made: Any, rng: random.Random) -> None:
    """Served without the header of the answer."""
    shape = made.format
    made.deployed = lambda text: shape.text([{"role": "user", "content": text}])


@program("F15", on="phi/ledger/loop")
def header_counted_as_answer(made: Any, rng: random.Random) -> None:
    """The labels begin at the header of the answer."""

    def encode(self: Any, old: Any, chat: Any) -> Any:
        ids, labels = old(chat)
        header = self.ids_of(self.made.format.head("assistant"))
        for at in range(len(ids) - len(header)):
            if ids[at : at + len(header)] == header and labels[at + len(header)] != -100:
                labels[at : at + len(header)] = header
        return ids, labels

    overridden(made, encode=encode)


@program("F15", on="said/steps/folder")
def template_without_a_generation_prompt(made: Any, rng: random.Random) -> None:
    """The branch for add_generation_prompt was lost."""
    jinja = made.tokenizer.chat_template
    begin = jinja.index("{% if add_generation_prompt %}")
    made.tokenizer.chat_template = jinja[:begin] + jinja[jinja.index("{% endif %}", begin) + len("{% endif %}") :]


@program("F16", on="phi/ferry/loop phi/ledger/before")
def prompt_ends_within_a_word(made: Any, rng: random.Random) -> None:
    """The header ends with a blank, which the answer's first token takes along."""
    reformat(made, header="{role}: ")


_ = (Job, replace, put, tasks, Think)
