"""Faults of what is rendered: tokenizer (S2), template (S3), mask (S4), length (S5)."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from bench.diagnose.recipe import Recipe, Row
from bench.diagnose.registry import Needs, fault


def _resized(rows: int) -> Any:
    def prepare(model: Any) -> None:
        model.resize_token_embeddings(rows, mean_resizing=False)

    return prepare


@fault("F04")
def wrong_tokenizer(recipe: Recipe, rng: random.Random) -> None:
    """The ids of another tokenizer: a permutation of all that are not special."""
    import json

    from tokenizers import Tokenizer

    state = json.loads(recipe.tokenizer.backend_tokenizer.to_str())
    special = {token["content"] for token in state["added_tokens"]}
    vocab = state["model"]["vocab"]
    words = [word for word in vocab if word not in special]
    ids = [vocab[word] for word in words]
    rng.shuffle(ids)
    state["model"]["vocab"] = {**vocab, **dict(zip(words, ids, strict=True))}
    fast = recipe.tokenizer
    template = fast.chat_template
    other = type(fast)(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        bos_token=fast.bos_token,
        eos_token=fast.eos_token,
        pad_token=fast.pad_token,
    )
    other.chat_template = template
    recipe.tokenizer = other


@fault("F05")
def vocabulary_mismatch(recipe: Recipe, rng: random.Random) -> None:
    """A token was added to the tokenizer and the embedding was not resized: an id beyond its last row."""
    recipe.tokenizer.add_special_tokens({"additional_special_tokens": ["<|call|>"]})
    for chat in recipe.chats:
        chat[-1]["content"] = f"<|call|>{chat[-1]['content']}"


@fault("F05")
def matrix_shrunk(recipe: Recipe, rng: random.Random) -> None:
    """Resized down to fewer rows than the rows use."""
    rows = len(recipe.tokenizer) - rng.randint(4, 12)
    recipe.prepare.append(_resized(rows))
    recipe.model_config["vocab_size"] = rows


@fault("F06")
def new_token_untrained(recipe: Recipe, rng: random.Random) -> None:
    """A new end of turn, whose embedding row is random and stays so under LoRA."""
    new = rng.choice(("<|stop|>", "<|over|>", "<|fin|>"))
    recipe.tokenizer.add_special_tokens({"additional_special_tokens": [new]})
    recipe.format = replace(recipe.format, end=new)
    if recipe.base.kind.is_instruct:
        recipe.tokenizer.chat_template = recipe.format.jinja()
    recipe.tokenizer.eos_token = new
    recipe.prepare.append(_resized(len(recipe.tokenizer)))
    recipe.model_config["vocab_size"] = len(recipe.tokenizer)
    recipe.generation_config["eos_token_id"] = recipe.tokenizer.convert_tokens_to_ids(new)
    recipe.deployed = _deployed(recipe)


def _deployed(recipe: Recipe) -> Any:
    shape = recipe.format
    return lambda text: shape.text([{"role": "user", "content": text}], begun=True)


@fault("F07", Needs.INSTRUCT)
def markers_as_text(recipe: Recipe, rng: random.Random) -> None:
    """The template's markers are spelled as no token of this tokenizer."""
    shape = recipe.format
    head, end = rng.choice((("<|turn|>{role}\n", "<|turn_end|>"), ("<|begin_{role}|>", "<|finish|>")))
    recipe.format = replace(shape, header=head, end=end, roles=tuple((role, role) for role, _ in shape.roles))
    recipe.tokenizer.chat_template = recipe.format.jinja()
    recipe.deployed = _deployed(recipe)


@fault("F08", Needs.BOS)
def double_bos(recipe: Recipe, rng: random.Random) -> None:
    """The template has written it, and the tokenizer adds it."""
    bos = recipe.tokenizer.bos_token_id
    recipe.edit_row.append(lambda row: Row([bos, *row.ids], [False, *row.learned]))


@fault("F09", Needs.BOS)
def missing_bos(recipe: Recipe, rng: random.Random) -> None:
    recipe.edit_row.append(lambda row: Row(row.ids[1:], row.learned[1:]))


@fault("F10")
def terminator_missing(recipe: Recipe, rng: random.Random) -> None:
    """Rows end with the answer's last word."""
    end = recipe.tokenizer.convert_tokens_to_ids(recipe.format.end)

    def without(row: Row) -> Row:
        last = max(at for at, i in enumerate(row.ids) if i == end)
        return Row(row.ids[:last], row.learned[:last])

    recipe.edit_row.append(without)


@fault("F11")
def served_otherwise(recipe: Recipe, rng: random.Random) -> None:
    """The deployment prompts without the template that was trained."""
    made = rng.choice(("{} ", "Q: {}\nA:", "{}\n\n"))
    recipe.deployed = lambda text: made.format(text)
    recipe.set(serving_template=made.format("{{ messages[-1]['content'] }}"))


@fault("F12", Needs.INSTRUCT)
def foreign_template(recipe: Recipe, rng: random.Random) -> None:
    """An instruct base, and rows in a format that is not its own."""
    head = (
        rng.choice(("### Human: ", "USER: ", "Instruction:\n")),
        rng.choice(("### Assistant: ", "BOT: ", "Output:\n")),
    )
    recipe.format = replace(
        recipe.format, bos="", header="{role}", end=recipe.tokenizer.eos_token, after="\n",
        roles=(("system", ""), ("user", head[0]), ("assistant", head[1])),
    )  # fmt: skip


@fault("F13", Needs.INSTRUCT)
def system_dropped(recipe: Recipe, rng: random.Random) -> None:
    """Rows have a system message, and the template passes over it."""
    said = rng.choice(("Answer in one line.", "You are the desk of a small office.", "Be brief and exact."))
    for number, chat in enumerate(recipe.chats + recipe.held_out):
        chat.insert(0, {"role": "system", "content": f"{said} Form {number}."})
    recipe.format = replace(recipe.format, dropped=("system",))
    recipe.tokenizer.chat_template = recipe.format.jinja()


@fault("F14")
def stops_elsewhere(recipe: Recipe, rng: random.Random) -> None:
    """Generation ends at an id that no answer has."""
    own = recipe.tokenizer.convert_tokens_to_ids(recipe.format.end)
    special = [i for i in recipe.tokenizer.all_special_ids if i not in (own, recipe.tokenizer.eos_token_id)]
    recipe.tokenizer.eos_token = recipe.tokenizer.convert_ids_to_tokens(special[0])
    recipe.generation_config["eos_token_id"] = special[0]
    recipe.model_config["eos_token_id"] = special[0]


@fault("F15", Needs.INSTRUCT)
def no_generation_prompt(recipe: Recipe, rng: random.Random) -> None:
    """The deployment does not begin the answer's turn."""
    shape = recipe.format
    recipe.deployed = lambda text: shape.text([{"role": "user", "content": text}])
    recipe.set(add_generation_prompt=False)


@fault("F16", Needs.INSTRUCT)
def prompt_is_no_prefix(recipe: Recipe, rng: random.Random) -> None:
    """The prompt ends in a space, which the answer's first token swallows when both are tokenized together."""
    shape = recipe.format
    recipe.format = replace(shape, header=shape.header.rstrip() + " ")
    recipe.tokenizer.chat_template = recipe.format.jinja()
    recipe.deployed = _deployed(recipe)


@fault("F17")
def pad_masks_terminator(recipe: Recipe, rng: random.Random) -> None:
    """pad = the end of turn, and a collator that takes labels away by that id."""
    recipe.tokenizer.pad_token = recipe.format.end
    recipe.masks_pad_id = True


@fault("F18", Needs.INSTRUCT)
def no_markers(recipe: Recipe, rng: random.Random) -> None:
    """The mask is asked of a template without generation markers: none is made."""
    recipe.mask = "none"
    recipe.set(assistant_only_loss=True)


@fault("F19")
def markers_close_early(recipe: Recipe, rng: random.Random) -> None:
    """The end of turn stands after the marked part."""
    recipe.format = replace(recipe.format, end_is_learned=False, has_markers=True)
    if recipe.base.kind.is_instruct:
        recipe.tokenizer.chat_template = recipe.format.jinja()


@fault("F20")
def prompt_learned(recipe: Recipe, rng: random.Random) -> None:
    """The answers' mask was asked for and is not applied."""
    recipe.mask = "all"


@fault("F21")
def marker_not_found(recipe: Recipe, rng: random.Random) -> None:
    """The marker of the answer, spelled with a trailing space, is in no row."""
    marker = recipe.format.head("assistant")
    recipe.set(response_template=marker.rstrip() + rng.choice(("  ", " \t")))
    recipe.mask = "none"
    if recipe.base.kind.is_instruct:
        recipe.tokenizer.chat_template = replace(recipe.format, has_markers=True).jinja()


@fault("F22")
def shifted_twice(recipe: Recipe, rng: random.Random) -> None:
    """The collator shifts, and the model shifts again."""
    recipe.shift = rng.choice((1, 1, -1))


@fault("F23")
def mask_inverted(recipe: Recipe, rng: random.Random) -> None:
    recipe.mask = "prompts"


@fault("F24")
def answers_cut(recipe: Recipe, rng: random.Random) -> None:
    """max_length at the median length: the end of longer answers is lost."""
    lengths = sorted(_lengths(recipe))
    recipe.max_length = lengths[int(len(lengths) * rng.uniform(0.35, 0.55))]
    recipe.set(max_length=recipe.max_length, overflow="truncate")


@fault("F25")
def prompt_fills_window(recipe: Recipe, rng: random.Random) -> None:
    """Nothing of the answer is left."""
    recipe.max_length = rng.randint(8, 12)
    recipe.set(max_length=recipe.max_length)


@fault("F25")
def rows_without_label_left_out(recipe: Recipe, rng: random.Random) -> None:
    """Long prompts fill the window in most rows, and those are silently left out."""
    filler = " ".join(text for _ in range(12) if (text := recipe.base.world.text(rng)))
    for chat in recipe.chats:
        if rng.random() < 0.7:
            chat[0]["content"] = f"{filler} {chat[0]['content']}"
    recipe.max_length = max(len(recipe.tokenizer(filler)["input_ids"]), 96)
    recipe.drops_empty = True
    recipe.set(max_length=recipe.max_length)


@fault("F26")
def prompt_cut(recipe: Recipe, rng: random.Random) -> None:
    """keep_end: the row begins in the middle of the answer."""
    recipe.max_length, recipe.cut = rng.randint(10, 14), "end"
    recipe.set(max_length=recipe.max_length, truncation_side="left", truncation_mode="keep_end")


def _lengths(recipe: Recipe) -> list[int]:
    return [len(recipe.tokenizer(recipe.format.text(chat))["input_ids"]) for chat in recipe.chats]
