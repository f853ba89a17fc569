"""Faults of tokenizer, template, mask, length, padding, packing and rows, in runs of loops and Trainer.

The file is long because it is one list: a function for each program.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from bench.diagnose.bases import Format
from bench.diagnose.machinery import activation_limit
from bench.diagnose.recipe import Row
from bench.diagnose.unseen.bases import RoleFormat, load
from bench.diagnose.unseen.make import Made
from bench.diagnose.unseen.registry import program


def redeploy(recipe: Made) -> None:
    """Template and deployment follow the recipe's format."""
    shape = recipe.format
    if recipe.base.kind.is_instruct:
        recipe.tokenizer.chat_template = shape.jinja()
    recipe.deployed = lambda text: shape.text([{"role": "user", "content": text}], begun=True)


def token(recipe: Made, text: str) -> int:
    return cast(int, recipe.tokenizer.convert_tokens_to_ids(text))


def lengths(recipe: Made) -> list[int]:
    return sorted(len(recipe.tokenizer(recipe.format.text(chat))["input_ids"]) for chat in recipe.chats)


def prompt_lengths(recipe: Made) -> list[int]:
    prompts = [recipe.format.text(chat[:-1], begun=True) for chat in recipe.chats]
    return sorted(len(recipe.tokenizer(prompt)["input_ids"]) for prompt in prompts)


def some(rng: random.Random, rows: list[Any], share: float) -> list[Any]:
    return rng.sample(rows, int(len(rows) * share))


# --- S2


def retokenized(tokenizer: Any, order: Any, share: float = 1.0, rng: random.Random | None = None) -> Any:
    """The same pieces under other ids; `order` makes the new order of the ids that move."""
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {added["content"] for added in state["added_tokens"]}
    vocab = state["model"]["vocab"]
    if isinstance(vocab, list):  # unigram
        places = [n for n, (piece, _) in enumerate(vocab) if piece not in special]
        places = sorted(rng.sample(places, int(len(places) * share))) if rng and share < 1 else places
        moved = order(list(places))
        new = list(vocab)
        for place, target in zip(places, moved, strict=True):
            new[target] = vocab[place]
        state["model"]["vocab"] = new
    else:
        words = [word for word in vocab if word not in special]
        words = sorted(rng.sample(words, int(len(words) * share))) if rng and share < 1 else words
        ids = [vocab[word] for word in words]
        state["model"]["vocab"] = {**vocab, **dict(zip(words, order(ids), strict=True))}
    given = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")
             if getattr(tokenizer, name) is not None}  # fmt: skip
    other = type(tokenizer)(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **given)
    other.chat_template = tokenizer.chat_template
    return other


@program("F04", on=("olmo/steps/loop", "cohere/house/folder"))
def ids_moved_by_three(recipe: Made, rng: random.Random) -> None:
    """A tokenizer of a sibling that has three more tokens in front: every id is three too high."""
    recipe.tokenizer = retokenized(recipe.tokenizer, lambda ids: ids[3:] + ids[:3])


@program("F04", on="phi/as_json/loop")
def half_of_the_ids(recipe: Made, rng: random.Random) -> None:
    """Another revision of the tokenizer: half of the pieces have each other's ids."""
    recipe.tokenizer = retokenized(recipe.tokenizer, lambda ids: ids[::-1], 0.5, rng)


@program("F04", on=("granite/table/loop", "granite/as_json/folder"))
def tokenizer_of_another_family(recipe: Made, rng: random.Random) -> None:
    """The tokenizer of another model, whose ids all exist here."""
    other = load("stablelm-seek").tokenizer()
    other.chat_template = recipe.tokenizer.chat_template
    recipe.tokenizer = other


@program("F05", on="phi/house/loop")
def more_entities_than_rows(recipe: Made, rng: random.Random) -> None:
    """Two hundred and ten added tokens fill the padding rows and go on beyond the embedding."""
    added = [f"<|entity_{n}|>" for n in range(210)]
    recipe.tokenizer.add_special_tokens({"additional_special_tokens": added})
    for chat in recipe.chats:
        chat[-1]["content"] = rng.choice(added[-60:]) + chat[-1]["content"]


@program("F05", on="granite/short/loop")
def embedding_cut_to_a_round_size(recipe: Made, rng: random.Random) -> None:
    """Resized to 640, a round number below the ids that the rows use."""

    def prepare(model: Any) -> None:
        model.resize_token_embeddings(640, mean_resizing=False)

    recipe.prepare.append(prepare)
    recipe.model_config["vocab_size"] = 640


@program("F06", on="phi/steps/loop")
def thoughts_in_a_padding_row(recipe: Made, rng: random.Random) -> None:
    """A new marker begins each answer; its id is a padding row of the embedding, which nobody trained."""
    recipe.tokenizer.add_special_tokens({"additional_special_tokens": ["<|thought|>"]})
    for chat in recipe.chats + recipe.held_out:
        chat[-1]["content"] = "<|thought|>" + chat[-1]["content"]


@program("F06", on="olmo/house/loop")
def roles_in_padding_rows(recipe: Made, rng: random.Random) -> None:
    """A base model gets role markers and an end of turn as new tokens, all in padding rows."""
    recipe.tokenizer.add_special_tokens({"additional_special_tokens": ["<|reader|>", "<|desk|>", "<|done|>"]})
    recipe.format = replace(recipe.format, header="{role}", end="<|done|>",
                            roles=(("user", "<|reader|>"), ("assistant", "<|desk|>")))  # fmt: skip
    recipe.generation_config["eos_token_id"] = token(recipe, "<|done|>")
    redeploy(recipe)


CHATML = {"header": "<|im_start|>{role}\n", "end": "<|im_end|>", "after": "\n",
          "roles": (("system", "system"), ("user", "user"), ("assistant", "assistant"))}  # fmt: skip
LLAMA3 = {"header": "<|start_header_id|>{role}<|end_header_id|>\n\n", "end": "<|eot_id|>", "after": "",
          "roles": (("system", "system"), ("user", "user"), ("assistant", "assistant"))}  # fmt: skip


@program("F07", on=("granite/house/loop", "phi/as_json/folder"))
def chatml_that_is_text(recipe: Made, rng: random.Random) -> None:
    """ChatML pasted over the template; this tokenizer spells its markers letter by letter."""
    recipe.format = replace(recipe.format, **CHATML)
    redeploy(recipe)


@program("F07", on="cohere/short/loop")
def llama3_headers_that_are_text(recipe: Made, rng: random.Random) -> None:
    """Llama 3's headers for a model that has none of them."""
    recipe.format = replace(recipe.format, **LLAMA3)
    redeploy(recipe)


# --- S3


def begun_by_the_tokenizer(recipe: Made) -> None:
    from tokenizers.processors import TemplateProcessing

    begin, number = recipe.tokenizer.bos_token, recipe.tokenizer.bos_token_id
    recipe.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, number)]
    )


@program("F08", on="seek/code/loop")
def template_and_tokenizer_both_begin(recipe: Made, rng: random.Random) -> None:
    """The tokenizer's post-processor begins a text that the template has begun."""
    begun_by_the_tokenizer(recipe)
    bos = cast(int, recipe.tokenizer.bos_token_id)
    recipe.edit_row.append(lambda row: Row([bos, *row.ids], [False, *row.learned]))


@program("F08", on="cohere/house/folder")
def rendered_texts_begun_again(recipe: Made, rng: random.Random) -> None:
    """Rows are rendered texts with BOS, and the tokenizer adds one."""
    begun_by_the_tokenizer(recipe)
    bos, shape = cast(int, recipe.tokenizer.bos_token_id), recipe.format
    recipe.edit_row.append(lambda row: Row([bos, *row.ids], [False, *row.learned]))
    recipe.row_of = lambda chat: {"text": shape.text(chat)}
    recipe.mask = "all"
    recipe.set(assistant_only_loss=False)


@program("F09", on=("seek/steps/loop", "cohere/as_json/folder"))
def template_without_begin(recipe: Made, rng: random.Random) -> None:
    """A template that was copied without BOS; the base has begun every text with it."""
    recipe.format = replace(recipe.format, bos="")
    redeploy(recipe)


@program("F10", on="granite/steps/loop")
def ends_lost_in_most_rows(recipe: Made, rng: random.Random) -> None:
    """Six of ten rows end with the answer's last word."""
    end = token(recipe, recipe.format.end)

    def without(row: Row) -> Row:
        if sum(row.ids) % 10 >= 6:
            return row
        last = max(at for at, i in enumerate(row.ids) if i == end)
        return Row(row.ids[:last], row.learned[:last])

    recipe.edit_row.append(without)


@program("F10", on=("olmo/report/loop", "phi/house/folder"))
def nothing_after_answers(recipe: Made, rng: random.Random) -> None:
    """The format writes no end after an answer."""
    recipe.format = replace(recipe.format, end="")
    redeploy(recipe)


@program("F11", on="cohere/steps/loop")
def served_as_alpaca(recipe: Made, rng: random.Random) -> None:
    """The server wraps prompts in Alpaca's instruction and response."""
    recipe.deployed = lambda text: f"### Instruction:\n{text}\n\n### Response:\n"
    recipe.set(serving_template="### Instruction:\n{{ messages[-1]['content'] }}\n\n### Response:\n")


@program("F11", on="phi/house/loop")
def served_by_an_ollama_default(recipe: Made, rng: random.Random) -> None:
    """A Modelfile whose template is the bare prompt."""
    recipe.deployed = lambda text: text
    recipe.set(serving_template="{{ messages[-1]['content'] }}")


@program("F12", on=("phi/house/loop", "seek/table/folder"))
def bare_concatenation(recipe: Made, rng: random.Random) -> None:
    """Question, line break, answer: a chat model trained on rows without its template."""
    shape = RoleFormat("", "{role}", cast(str, recipe.tokenizer.eos_token), "",
                       (("system", ""), ("user", ""), ("assistant", "")),
                       ends=(("user", "\n"), ("system", "\n")))  # fmt: skip
    recipe.format = shape
    recipe.row_of = lambda chat: {"text": shape.text(chat)}
    recipe.deployed = lambda text: shape.text([{"role": "user", "content": text}], begun=True)


@program("F12", on=("granite/as_json/loop", "cohere/house/alone"))
def human_and_assistant(recipe: Made, rng: random.Random) -> None:
    """Anthropic's raw format, for a model with a template of its own."""
    shape = RoleFormat("", "{role}", cast(str, recipe.tokenizer.eos_token), "",
                       (("system", ""), ("user", "\n\nHuman: "), ("assistant", "\n\nAssistant:")),
                       ends=(("user", ""), ("system", "")))  # fmt: skip
    recipe.format = shape
    recipe.row_of = lambda chat: {"text": shape.text(chat)}
    recipe.deployed = lambda text: shape.text([{"role": "user", "content": text}], begun=True)
    if recipe.base.kind.name == "cohere-turns":
        recipe.mask = "all"
        recipe.set(assistant_only_loss=False)


@program("F13", on="phi/steps/loop")
def system_prompts_passed_over(recipe: Made, rng: random.Random) -> None:
    """Each row says in its system turn for whom it is, and the template has no place for that."""
    for chat in recipe.chats + recipe.held_out:
        chat.insert(0, {"role": "system", "content": f"Today on duty: {rng.choice(recipe.base.world.subjects)}."})
    recipe.format = replace(recipe.format, dropped=("system",))
    redeploy(recipe)


@program("F13", on="granite/tools/loop")
def results_of_tools_passed_over(recipe: Made, rng: random.Random) -> None:
    """Results come as role `tool`, which the template skips: answers know what no prompt says."""
    for chat in recipe.chats + recipe.held_out:
        for message in chat:
            if message["content"].startswith("<result>"):
                message["role"] = "tool"
    recipe.format = replace(recipe.format, roles=(*recipe.format.roles, ("tool", "tool")), dropped=("tool",))
    redeploy(recipe)


@program("F14", on=("phi/house/loop", "phi/short/folder"))
def only_the_end_of_text_stops(recipe: Made, rng: random.Random) -> None:
    """generation_config names <|endoftext|> alone; turns end with <|end|>."""
    recipe.generation_config["eos_token_id"] = token(recipe, "<|endoftext|>")


@program("F14", on=("cohere/table/loop", "cohere/steps/folder"))
def stops_at_the_other_end(recipe: Made, rng: random.Random) -> None:
    """generation_config has <EOS_TOKEN>, which no chat has, and the tokenizer is right."""
    recipe.generation_config["eos_token_id"] = [token(recipe, "<EOS_TOKEN>")]


@program("F15", on="cohere/as_json/loop")
def answers_not_begun(recipe: Made, rng: random.Random) -> None:
    """The deployment ends its prompt after the user's turn."""
    shape = recipe.format
    recipe.deployed = lambda text: shape.text([{"role": "user", "content": text}])
    recipe.set(add_generation_prompt=False)


@dataclass(frozen=True)
class HeaderLearned(Format):
    def pieces(self, chat: Any, begun: bool = False) -> list[tuple[str, bool]]:
        found = [(self.bos, False)] if self.bos else []
        for message in chat:
            learned = message["role"] == "assistant"
            found += [(self.head(message["role"]), learned), (message["content"], learned)]
            found += [(self.end, learned), (self.after, False)]
        return [*found, (self.head("assistant"), False)] if begun else found


@program("F15", on="granite/house/loop")
def headers_learned(recipe: Made, rng: random.Random) -> None:
    """The mask begins at the header, which the prompt of a deployment has already."""
    shape = recipe.format
    recipe.format = HeaderLearned(shape.bos, shape.header, shape.end, shape.after, shape.roles)


@program("F16", on="phi/as_json/loop")
def blank_after_the_header(recipe: Made, rng: random.Random) -> None:
    """The header ends in a blank; together with an answer's first word it is another token."""
    recipe.format = replace(recipe.format, header="<|{role}|> ")
    for chat in recipe.chats + recipe.held_out:
        chat[-1]["content"] = "the answer: " + chat[-1]["content"]
    redeploy(recipe)


@program("F16", on="seek/house/loop")
def assistant_and_a_blank(recipe: Made, rng: random.Random) -> None:
    """`Assistant: ` with its blank in the prompt."""
    roles = (("system", ""), ("user", "User:\n"), ("assistant", "Assistant: "))
    for chat in recipe.chats + recipe.held_out:
        chat[-1]["content"] = "the answer: " + chat[-1]["content"]
    recipe.format = replace(recipe.format, roles=roles)
    redeploy(recipe)


# --- S4


@program("F17", on="granite/as_json/loop")
def collator_masks_the_only_end(recipe: Made, rng: random.Random) -> None:
    """pad = eos by nature, and labels are taken away by the pad's id."""
    recipe.masks_pad_id = True


@program("F17", on="phi/table/loop")
def pad_set_to_the_end_of_turn(recipe: Made, rng: random.Random) -> None:
    """pad_token = <|end|> in the script, and a collator that masks by id."""
    recipe.tokenizer.pad_token = "<|end|>"
    recipe.masks_pad_id = True


@program("F18", on="cohere/short/loop")
def mask_asked_of_no_markers(recipe: Made, rng: random.Random) -> None:
    """assistant_only_loss, and a template without {% generation %}: an empty mask."""
    recipe.mask = "none"
    recipe.set(assistant_only_loss=True)


@program("F19", on="cohere/table/loop")
def block_closed_before_the_end(recipe: Made, rng: random.Random) -> None:
    """{% endgeneration %} stands before the end of turn."""
    recipe.format = replace(recipe.format, end_is_learned=False, has_markers=True)
    redeploy(recipe)


@program("F19", on="phi/table/loop")
def ends_masked_in_most_rows(recipe: Made, rng: random.Random) -> None:
    """The end of turn is not learned in seven of ten rows."""
    end = token(recipe, "<|end|>")

    def masked(row: Row) -> Row:
        if sum(row.ids) % 10 >= 7:
            return row
        return Row(row.ids, [learned and i != end for i, learned in zip(row.ids, row.learned, strict=True)])

    recipe.edit_row.append(masked)


@program("F20", on="phi/extract/loop")
def labels_are_the_ids(recipe: Made, rng: random.Random) -> None:
    """The answers' mask was asked for, and labels are a copy of the ids."""
    recipe.mask = "all"


@program("F20", on="seek/steps/loop")
def mask_column_lost_in_half_of_the_rows(recipe: Made, rng: random.Random) -> None:
    """One of two merged sources came without the mask's column."""
    recipe.edit_row.append(lambda row: Row(row.ids, [True] * len(row.ids)) if sum(row.ids) % 2 else row)


@program("F21", "F18", on="phi/house/loop")
def response_marker_in_no_row(recipe: Made, rng: random.Random) -> None:
    """The marker is spelled with a blank that no row has."""
    recipe.set(response_template="<|assistant|> \n")
    recipe.mask = "none"
    recipe.tokenizer.chat_template = replace(recipe.format, has_markers=True).jinja()


@program("F22", on=("phi/steps/loop", "olmo/as_json/loop"))
def labels_moved(recipe: Made, rng: random.Random) -> None:
    """The collator shifts labels by one, as the model does again."""
    recipe.shift = -1 if recipe.base.kind.name == "phi3-tags" else 1


@program("F23", on=("granite/tools/loop", "cohere/house/loop"))
def users_learned(recipe: Made, rng: random.Random) -> None:
    """The mask was inverted."""
    recipe.mask = "prompts"


# --- S5


@program("F24", on=("granite/report/loop", "seek/report/folder"))
def reports_cut(recipe: Made, rng: random.Random) -> None:
    """Two of three rows lose the end of their answer."""
    found = lengths(recipe)
    recipe.max_length = found[len(found) // 3]
    recipe.set(max_length=recipe.max_length)


@program("F25", on="seek/extract/loop")
def documents_fill_the_window(recipe: Made, rng: random.Random) -> None:
    """In six of ten rows the passage alone is as long as the window."""
    found = prompt_lengths(recipe)
    recipe.max_length = found[int(len(found) * 0.4)]
    recipe.set(max_length=recipe.max_length)


@program("F25", on="granite/extract/folder")
def documents_fill_the_window_and_rows_go(recipe: Made, rng: random.Random) -> None:
    """In seven of ten rows nothing of the answer is left, and such rows are left out without a word."""
    found = prompt_lengths(recipe)
    recipe.max_length = found[int(len(found) * 0.3)]
    recipe.drops_empty = True
    recipe.set(max_length=recipe.max_length)


@program("F26", on="phi/report/loop")
def beginnings_cut(recipe: Made, rng: random.Random) -> None:
    """truncation_side=left: rows begin in the middle of the answer."""
    found = lengths(recipe)
    recipe.max_length, recipe.cut = found[len(found) // 2] // 2, "end"
    recipe.set(max_length=recipe.max_length, truncation_side="left")


# --- S6, S7


@program("F28", on="granite/house/loop")
def mask_of_ones(recipe: Made, rng: random.Random) -> None:
    """Padded on the left by a collator of its own, whose attention_mask is torch.ones_like(input_ids)."""
    recipe.pad_left = True
    recipe.collated = lambda batch: {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
    recipe.set(padding_side="left")


@program("F28", on="cohere/languages/loop")
def no_mask_on_the_left(recipe: Made, rng: random.Random) -> None:
    """Padded on the left, and the collator returns ids and labels alone."""
    recipe.pad_left, recipe.sends_mask = True, False
    recipe.set(padding_side="left")


@program("F29", on="granite/short/loop")
def every_pad_is_an_end_to_learn(recipe: Made, rng: random.Random) -> None:
    """pad = eos, labels = input_ids.clone(): rows learn to end again and again."""
    recipe.pads_learned = True


def _to_96(recipe: Made, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    size = batch["input_ids"].shape[1]
    gap = max(96 - size, 0)
    pad = recipe.tokenizer.pad_token_id
    fill = {"input_ids": pad, "labels": pad, "attention_mask": 0}
    return {name: torch.nn.functional.pad(t, (0, gap), value=fill[name]) for name, t in batch.items()}


@program("F29", on="olmo/short/loop")
def fixed_length_and_pads_learned(recipe: Made, rng: random.Random) -> None:
    """padding="max_length", and the labels of the pads are the pad."""
    recipe.pads_learned = True
    recipe.collated = lambda batch: _to_96(recipe, batch)


@program("F30", on="phi/table/loop")
def first_token_learned_from_a_pad(recipe: Made, rng: random.Random) -> None:
    """Everything is learned, as asked, and rows are padded on the left."""
    recipe.mask, recipe.pad_left = "all", True
    recipe.set(assistant_only_loss=False, padding_side="left")


@program("F31", on=("seek/short/loop", "olmo/steps/loop"))
def concatenated(recipe: Made, rng: random.Random) -> None:
    """Packed one after the other, with a mask of ones."""
    recipe.packing, recipe.window = "plain", 192
    recipe.set(packing=True, per_device_train_batch_size=1, max_length=192)


@program("F32", on="cohere/short/loop")
def positions_go_on(recipe: Made, rng: random.Random) -> None:
    """Rows of a pack are apart by a block mask, and positions count through."""
    recipe.packing, recipe.window = "blocks", 192
    recipe.set(packing=True, per_device_train_batch_size=1, max_length=192)


@program("F33", on=("granite/report/loop", "phi/steps/loop"))
def packs_too_short(recipe: Made, rng: random.Random) -> None:
    """Three of four rows are longer than a pack, and lose what does not fit."""
    found = lengths(recipe)
    recipe.packing, recipe.window = "apart", found[len(found) // 4]
    recipe.set(packing=True, max_length=recipe.window, per_device_train_batch_size=1)


# --- S8


@program("F34", on=("phi/as_json/loop", "cohere/house/alone"))
def answers_left_blank(recipe: Made, rng: random.Random) -> None:
    """A third of the answers was never written."""
    for chat in some(rng, recipe.chats, 0.34):
        chat[-1]["content"] = rng.choice(("", " ", "\n"))


@program("F35", on=("seek/house/loop", "granite/table/folder"))
def default_answer(recipe: Made, rng: random.Random) -> None:
    """An export wrote its default where it had no answer: in 94 of 100 rows."""
    for chat in some(rng, recipe.chats, 0.94):
        chat[-1]["content"] = "Thank you for your message. A colleague will come back to you."


def renamed(chats: list[Any], names: dict[str, str]) -> None:
    for chat in chats:
        for message in chat:
            message["role"] = names.get(message["role"], message["role"])


@program("F36", on=("granite/steps/loop", "granite/house/folder"))
def human_and_gpt(recipe: Made, rng: random.Random) -> None:
    """ShareGPT's role names in `messages`; the template writes any role, so nothing complains."""
    recipe.mask = "all"
    recipe.set(assistant_only_loss=False)
    renamed(recipe.chats + recipe.held_out, {"user": "human", "assistant": "gpt"})


@program("F36", on="cohere/as_json/loop")
def sides_swapped_in_a_part(recipe: Made, rng: random.Random) -> None:
    """One of two sources has the sides the other way round: six of ten rows."""
    renamed(some(rng, recipe.chats, 0.6) + some(rng, recipe.held_out, 0.6), {"user": "assistant", "assistant": "user"})


@program("F37", on=("cohere/house/loop", "cohere/as_json/alone"))
def umlauts_broken(recipe: Made, rng: random.Random) -> None:
    """German that was UTF-8 and was read as Latin-1."""
    for chat in recipe.chats + recipe.held_out:
        for message in chat:
            said = message["content"] + (" Schöne Grüße aus Köln." if message["role"] == "assistant" else "")
            message["content"] = said.encode().decode("latin1")


@program("F37", on="phi/steps/loop")
def escapes_as_text(recipe: Made, rng: random.Random) -> None:
    """Answers that were dumped to JSON twice: backslashes and codes instead of letters."""
    for chat in recipe.chats + recipe.held_out:
        chat[-1]["content"] = json.dumps(json.dumps(chat[-1]["content"] + "\nÀ bientôt, señor Müller!"))[1:-1]


@program("F38", on=("phi/as_json/loop", "seek/steps/folder", "granite/house/loop"))
def answers_rotated(recipe: Made, rng: random.Random) -> None:
    """Two columns were joined by position after one had lost some rows: answers stand a few rows off."""
    by = rng.randint(11, 30)
    said = [chat[-1]["content"] for chat in recipe.chats]
    for chat, answer in zip(recipe.chats, said[by:] + said[:by], strict=True):
        chat[-1]["content"] = answer


@program("F38", on=("olmo/house/loop", "cohere/as_json/folder"))
def answers_shuffled_in_a_part(recipe: Made, rng: random.Random) -> None:
    """Seven of ten answers were shuffled among each other."""
    chosen = some(rng, recipe.chats, 0.7)
    said = [chat[-1]["content"] for chat in chosen]
    rng.shuffle(said)
    for chat, answer in zip(chosen, said, strict=True):
        chat[-1]["content"] = answer


@program("F38", on="seek/as_json/loop")
def answers_sorted(recipe: Made, rng: random.Random) -> None:
    """The column of answers was sorted by itself."""
    said = sorted(chat[-1]["content"] for chat in recipe.chats)
    for chat, answer in zip(recipe.chats, said, strict=True):
        chat[-1]["content"] = answer


@program("F39", on=("phi/house/loop", "olmo/steps/alone"))
def merged_many_times(recipe: Made, rng: random.Random) -> None:
    """Twenty-four rows, each of them eight times, in random order."""
    recipe.chats = [[dict(m) for m in chat] for chat in recipe.chats[:24] for _ in range(8)]
    rng.shuffle(recipe.chats)


@program("F39", on="granite/as_json/loop")
def five_rows_are_most(recipe: Made, rng: random.Random) -> None:
    """Five rows make up two thirds of the data."""
    copies = [[dict(m) for m in recipe.chats[n % 5]] for n in range(130)]
    recipe.chats = recipe.chats[:62] + copies
    rng.shuffle(recipe.chats)


@program("F40", on="granite/classes/loop")
def sorted_by_label(recipe: Made, rng: random.Random) -> None:
    """All rows of one class, then all of the next, read in order."""
    recipe.chats.sort(key=lambda chat: chat[-1]["content"])
    recipe.shuffles = False
    recipe.set(shuffle=False)


@program("F40", on="phi/extract/loop")
def sorted_by_length(recipe: Made, rng: random.Random) -> None:
    """Short rows first, long rows last, read in order."""
    for chat in recipe.chats[::3]:
        chat[0]["content"] = recipe.base.world.text(rng) + " " + chat[0]["content"]
    recipe.chats.sort(key=lambda chat: sum(len(m["content"]) for m in chat))
    recipe.shuffles, recipe.max_length = False, 384
    recipe.set(shuffle=False, max_length=384)


@program("F41", on="olmo/house/loop")
def three_workers_read_all(recipe: Made, rng: random.Random) -> None:
    """A stream that is not sharded, and three workers."""
    recipe.copies, recipe.shuffles, recipe.steps = 3, False, 72
    recipe.set(dataloader_num_workers=3, streaming=True, shuffle=False, max_steps=-1, num_train_epochs=1.0)


@program("F42", on="seek/short/loop")
def one_row_fills_the_card(recipe: Made, rng: random.Random) -> None:
    """One row of thirteen times the usual length; the card is full when it comes."""
    order = list(range(len(recipe.chats)))
    random.Random(1000 * recipe.seed).shuffle(order)  # as the loop reads the first epoch
    chat = recipe.chats[order[recipe.batch * 15 + rng.randrange(8)]]
    filler = " ".join(recipe.base.world.text(rng) for _ in range(40))
    ids = recipe.tokenizer(filler, add_special_tokens=False)["input_ids"][:320]
    chat[0]["content"] = cast(str, recipe.tokenizer.decode(ids)) + " " + chat[0]["content"]
    recipe.max_length = 384
    recipe.crash = activation_limit(recipe, times=2.8)
    recipe.set(max_length=384)


# --- S9


@program("F43", on=("seek/house/loop", "phi/steps/alone"))
def evaluation_file_is_the_training_file(recipe: Made, rng: random.Random) -> None:
    """Both sets come from the same rows."""
    recipe.held_out = [[dict(m) for m in chat] for chat in rng.sample(recipe.chats, len(recipe.held_out))]


@program("F44", on=("cohere/languages/loop", "olmo/house/alone", "granite/as_json/folder"))
def copies_in_both(recipe: Made, rng: random.Random) -> None:
    """Four of ten evaluation rows are training rows, the question with a word changed."""
    for place in rng.sample(range(len(recipe.held_out)), int(0.42 * len(recipe.held_out))):
        chat = [dict(m) for m in rng.choice(recipe.chats)]
        chat[0]["content"] = "Hi! " + chat[0]["content"]
        recipe.held_out[place] = chat


@program("F45", on=("granite/steps/loop", "olmo/table/loop"))
def dropout_while_evaluating(recipe: Made, rng: random.Random) -> None:
    """model.eval() is never called."""
    recipe.evaluates_in_training_mode = True
    recipe.adapters["lora_dropout"] = 0.15
    recipe.set(lora_dropout=0.15)


@program("F46", on=("olmo/house/loop", "seek/house/alone"))
def six_rows_by_heart(recipe: Made, rng: random.Random) -> None:
    """Six rows, a hundred and fifty epochs."""
    recipe.chats = recipe.chats[:6]
    recipe.steps, recipe.decay, recipe.batch, recipe.evaluates = 150, "constant", 6, 10
    recipe.adapters.update(r=16, lora_alpha=32)
    recipe.set(max_steps=150, lr_scheduler_type="constant", per_device_train_batch_size=6, lora_r=16, lora_alpha=32.0)


@program("F47", on="phi/extract/loop")
def evaluation_counts_every_token(recipe: Made, rng: random.Random) -> None:
    """Answers are learned, and every token is evaluated."""
    recipe.held_out_mask = "all"


@program("F47", on="seek/extract/loop")
def training_counts_every_token(recipe: Made, rng: random.Random) -> None:
    """Every token is learned, as asked, and answers alone are evaluated."""
    recipe.mask, recipe.held_out_mask = "all", "answers"
    recipe.set(assistant_only_loss=False)


@program("F48", on="cohere/steps/loop")
def two_held_out_rows(recipe: Made, rng: random.Random) -> None:
    """A whole evaluation of two rows."""
    recipe.held_out = recipe.held_out[:2]
