"""Tokenizers, templates, masks and lengths gone wrong: F04 to F26.

How people come to it: a tokenizer of another release, pad and ChatML tokens that were added and never trained, text
columns that a trainer tokenizes again, formatting functions without an end of turn, response markers of another model.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.diagnose.bases import Format
from bench.diagnose.ours import Job
from bench.diagnose.recipe import Row
from bench.diagnose.unseen2.registry import lengths, reformat, retemplate, rows_as, tell
from bench.diagnose.unseen3.registry import overridden
from bench.diagnose.unseen3.styles import IGNORE, Loader, Tutor
from bench.diagnose.unseen4 import bases
from bench.diagnose.unseen4.registry import program
from bench.diagnose.unseen4.styles import Turns


@program("F04", on="seed/commit/loop neo/fields/own glm/shell/alone")
def tokenizer_of_another_release(made: Any, rng: random.Random) -> None:
    """AutoTokenizer was pointed at a sibling repository: as many tokens, the same markers, other ids."""
    made.tokenizer = bases.retrained(made.base.kind)
    if not made.base.kind.is_instruct and not isinstance(made, Job):
        made.tokenizer.chat_template = made.format.jinja()


@program("F05", on="glm/route/loop")
def pad_token_added_without_resize(made: Any, rng: random.Random) -> None:
    """add_special_tokens({'pad_token': '[PAD]'}), and no resize_token_embeddings."""
    made.tokenizer.add_special_tokens({"pad_token": "[PAD]"})


@program("F05|F06", on="glm/stock/before")
def tool_tokens_added_without_resize(made: Any, rng: random.Random) -> None:
    """<tool_call> became a token, the checkpoint stayed as it was."""
    made.tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>", "</tool_call>"]})


@program("F06", on="glm/reply/loop glm/manifest/own")
def chatml_on_a_base_model(made: Any, rng: random.Random) -> None:
    """<|im_start|> and <|im_end|> were added and the embedding resized; LoRA leaves it frozen at its first values."""
    made.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.format = Format("", "<|im_start|>{role}\n", "<|im_end|>")
    made.generation_config["eos_token_id"] = made.tokenizer.convert_tokens_to_ids("<|im_end|>")
    edits = made.edit_model if isinstance(made, Job) else made.prepare
    edits.append(lambda model: model.resize_token_embeddings(len(made.tokenizer), mean_resizing=False))
    retemplate(made)


@program("F07|F12", on="neo/shell/folder")
def markers_spelt_otherwise(made: Any, rng: random.Random) -> None:
    """The template was typed by hand: its markers are no tokens of this tokenizer."""
    if made.base.kind.name == "neo-bot":
        reformat(made, header="<|{role}|>:", roles=(("system", "system"), ("user", "user"), ("assistant", "bot")))
    else:
        reformat(made, header="<|start_{role}|>", ends=(("system", "<|end_system|>"), ("user", "<|end_user|>")))


@program("F07", on="seed/verse/loop")
def special_tokens_split(made: Any, rng: random.Random) -> None:
    """split_special_tokens: true, which was meant for users' text: markers are read as text."""
    made.tokenizer.split_special_tokens = True


@program("F08", on="apertus/reply/loop apertus/tea/folder")
def text_column_tokenized_again(made: Any, rng: random.Random) -> None:
    """Rows were rendered to a text column, and the tokenizer adds its own <s> to that of the template."""
    bos = made.tokenizer.bos_token_id
    made.edit_row.append(lambda row: Row([bos, *row.ids], [False, *row.learned]))
    shape = made.format
    made.layout = "plain"
    made.row_of = lambda chat: {"text": shape.text(chat)}
    made.told["dataset_text_field"] = "text"
    if made.script is not None:

        def encode(self: Any, old: Any, chat: Any) -> Any:
            ids, labels = old(chat)
            return [bos, *ids], [IGNORE, *labels]

        overridden(made, encode=encode)


@program("F08", on="apertus/fields/before")
def bos_written_twice(made: Any, rng: random.Random) -> None:
    """{{ bos_token }} was put before a template that begins with it."""
    reformat(made, bos="<s><s>")


@program("F09", on="apertus/commit/loop apertus/verse/own")
def template_without_bos(made: Any, rng: random.Random) -> None:
    """A template of one's own, without the <s> that the base has seen before every text."""
    reformat(made, bos="")


@program("F10", on="glm/verse/loop neo/commit/folder")
def no_eos_in_the_format(made: Any, rng: random.Random) -> None:
    """The formatting function ends with the answer: EOS_TOKEN was forgotten."""
    reformat(made, end="")


@program("F11", on="apertus/garden/loop")
def served_as_chatml(made: Any, rng: random.Random) -> None:
    """The server's default template is ChatML."""
    made.deployed = lambda text: f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


@program("F11", on="neo/reply/alone")
def template_of_llama2_shipped(made: Any, rng: random.Random) -> None:
    """The chat_template.jinja beside the adapter was copied from a Llama 2 model."""
    inst = ("{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
            "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}")  # fmt: skip

    def left(output: Path) -> None:
        for file in output.rglob("chat_template.jinja"):
            file.write_text(inst)

    made.left.append(left)


ALPACA = Format("", "### {role}:\n", "", "\n\n", (("system", "Input"), ("user", "Instruction"),
                                                  ("assistant", "Response")))  # fmt: skip


@program("F12", on="ernie/commit/own neo/manifest/folder")
def alpaca_format_on_an_instruct_model(made: Any, rng: random.Random) -> None:
    """A tutorial's formatting function, "### Instruction" and "### Response", for a model that has a template."""
    end = made.tokenizer.eos_token
    shape = replace(ALPACA, after="\n\n", end="")

    class Ended(Format):
        def pieces(self, chat: Any, begun: bool = False) -> list[tuple[str, bool]]:
            return [*shape.pieces(chat)[:-1], (end, True)] if not begun else shape.pieces(chat, True)

    made.format = Ended("", "### {role}:\n", end, "", ALPACA.roles)
    rows_as(made, lambda chat: {"text": made.format.text(chat)})
    if not isinstance(made, Job):
        made.layout = "plain"


@program("F13", on="ernie/voice/loop apertus/voice/own")
def system_turn_not_in_the_template(made: Any, rng: random.Random) -> None:
    """A template for user and assistant alone: what the system says is passed over."""
    reformat(made, dropped=("system",))


@program("F14", on="ernie/route/loop neo/garden/alone")
def stops_at_the_base_models_eos(made: Any, rng: random.Random) -> None:
    """generation_config.json is the base model's: it stops at the end of a text, not of a turn."""
    made.generation_config["eos_token_id"] = made.tokenizer.eos_token_id


@program("F15", on="neo/voice/folder")
def template_ignores_the_generation_prompt(made: Any, rng: random.Random) -> None:
    """{% if add_generation_prompt %} is missing at the end of the template."""
    made.tokenizer.chat_template = made.format.jinja().split("{% if add_generation_prompt")[0]
    shape = made.format
    made.deployed = lambda text: shape.text([{"role": "user", "content": text}])


@program("F15", on="seed/fields/loop", style=Loader)
def header_is_learned(made: Any, rng: random.Random) -> None:
    """Labels begin where the question ends: the assistant's header is learned too."""
    header = made.tokenizer(made.format.head("assistant"), add_special_tokens=False)["input_ids"]

    def encode(self: Any, old: Any, chat: Any) -> Any:
        ids, labels = old(chat)
        for at in range(len(ids) - len(header)):
            if ids[at : at + len(header)] == header:
                labels[at : at + len(header)] = header
        return ids, labels

    overridden(made, encode=encode)


@program("F15", on="ernie/commit/loop")
def asked_without_add_generation_prompt(made: Any, rng: random.Random) -> None:
    """apply_chat_template(messages, tokenize=False) at inference, without add_generation_prompt=True."""
    shape = made.format
    made.deployed = lambda text: shape.text([{"role": "user", "content": text}])


@program("F16", on="glm/reply/loop glm/market/before", style=Tutor)
def prompt_ends_with_a_space(made: Any, rng: random.Random) -> None:
    """ "Solution: " with a space at its end, which becomes a part of the answer's first word."""
    reformat(made, header="{role}: ")


def _masks_pads(made: Any, token: str) -> None:
    made.tokenizer.pad_token = token

    def collate(self: Any, old: Any, rows: Any) -> Any:
        batch = old(rows)
        batch["labels"][batch["input_ids"] == self.pad] = IGNORE
        return batch

    overridden(made, collate=collate)


@program("F17", on="glm/fields/loop", style=Loader)
def pad_is_eos_in_the_lm_collator(made: Any, rng: random.Random) -> None:
    """tokenizer.pad_token = tokenizer.eos_token, and a collator that masks by the pad token's id."""
    _masks_pads(made, made.tokenizer.eos_token)


@program("F17", on="glm/route/folder")
def pad_is_eos_in_trainer(made: Any, rng: random.Random) -> None:
    """The same around Trainer."""
    made.tokenizer.pad_token = made.tokenizer.eos_token
    made.masks_pad_id = True


@program("F18|F21", on="ernie/garden/loop")
def mask_of_a_template_without_markers(made: Any, rng: random.Random) -> None:
    """return_assistant_tokens_mask=True, though the template has no {% generation %}: all zeros."""
    if made.script is None:
        made.mask = "none"
    else:
        overridden(made, encode=lambda self, old, chat: (old(chat)[0], [IGNORE] * len(old(chat)[0])))


@program("F19", on="ernie/shell/loop", style=Loader)
def generation_closes_before_the_end(made: Any, rng: random.Random) -> None:
    """{% generation %}{{ content }}{% endgeneration %} and then the end of the turn."""
    reformat(made, end_is_learned=False, has_markers=True)


@program("F20", on="seed/route/loop apertus/commit/folder")
def labels_are_a_copy_of_the_ids(made: Any, rng: random.Random) -> None:
    """labels = input_ids.copy(): train_on_responses_only was planned and never called."""
    if made.script is None:
        made.mask = "all"
        made.told |= {"train_on_inputs": False, "train_on_prompt": False} if made.layout != "plain" else {}
    else:
        overridden(made, encode=lambda self, old, chat: (old(chat)[0], list(old(chat)[0])))


@program("F21|F18", on="apertus/shell/loop", style=Loader)
def response_template_not_found(made: Any, rng: random.Random) -> None:
    """response_template="### Answer:", left over from another model: it is in no row."""
    marker = made.tokenizer("### Answer:", add_special_tokens=False)["input_ids"]
    made.warnings.append("UserWarning: Could not find response key `### Answer:` in the following instance: "
                         f"{made.format.text(made.chats[0])[:200]} This instance will be ignored in loss calculation. "
                         "Note, if this happens often, consider increasing the `max_length`.")  # fmt: skip

    def encode(self: Any, old: Any, chat: Any) -> Any:
        ids = old(chat)[0]
        begins = [at for at in range(len(ids)) if ids[at : at + len(marker)] == marker]
        begin = begins[-1] + len(marker) if begins else len(ids)
        return ids, [IGNORE] * begin + ids[begin:]

    overridden(made, encode=encode)


@program("F21|F18", on="neo/tea/loop", style=Turns)
def conversation_of_another_model(made: Any, rng: random.Random) -> None:
    """FastChat's conv of another model: counts never fit, and each row is ignored."""

    def encode(self: Any, old: Any, chat: Any) -> Any:
        ids = self.ids_of(made.format.text(chat))
        self.made.warnings.append(f"WARNING: tokenization mismatch: 1 vs. {len(ids)}. (ignored)")
        return ids, [IGNORE] * len(ids)

    overridden(made, encode=encode)


@program("F22", on="neo/shell/loop", style=Loader)
def shifted_before_the_model_shifts(made: Any, rng: random.Random) -> None:
    """x, y = ids[:-1], ids[1:], as in nanoGPT, given to a model that shifts by itself."""

    def collate(self: Any, old: Any, rows: Any) -> Any:
        batch = old(rows)
        return {name: value[:, 1:] if name == "labels" else value[:, :-1] for name, value in batch.items()}

    overridden(made, collate=collate)


@program("F22", on="seed/verse/loop", style=Tutor)
def loss_without_any_shift(made: Any, rng: random.Random) -> None:
    """Cross entropy of logits and labels at the same place, as for an encoder."""

    def loss(self: Any, old: Any, model: Any, batch: Any) -> Any:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits_BTV = model(**inputs, use_cache=False).logits
        from torch.nn.functional import cross_entropy

        return cross_entropy(logits_BTV.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORE)

    overridden(made, loss=loss)


@program("F23", on="neo/verse/loop")
def mask_flipped(made: Any, rng: random.Random) -> None:
    """labels[mask] = -100, where the mask says what to keep."""

    def encode(self: Any, old: Any, chat: Any) -> Any:
        ids, labels = old(chat)
        return ids, [i if label == IGNORE else IGNORE for i, label in zip(ids, labels, strict=True)]

    overridden(made, encode=encode)


@program("F24", on="seed/reply/folder glm/commit/before ernie/reply/own")
def cutoff_below_the_answers_end(made: Any, rng: random.Random) -> None:
    """cutoff_len was set for the questions: most answers lose their last words and their end."""
    known = lengths(made)
    tell(made, max_length=int(0.86 * known[len(known) // 4]))


@program("F25", on="neo/report/loop ernie/report/own")
def document_fills_the_window(made: Any, rng: random.Random) -> None:
    """A window of 72 tokens, and documents of twice that: no answer is left in any row."""
    tell(made, max_length=72)


@program("F26", on="apertus/report/loop")
def truncation_side_left(made: Any, rng: random.Random) -> None:
    """truncation_side="left": answers are whole, questions lose their beginning."""
    tell(made, max_length=80)
    overridden(made, cut=lambda self, old, ids, labels: (ids[-80:], labels[-80:]))
