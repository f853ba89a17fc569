"""Faults of tokenizer, template and loss mask, each made as somebody in an issue thread made it."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from bench.diagnose.bases import Format
from bench.diagnose.ours import Job
from bench.diagnose.recipe import Row
from bench.diagnose.unseen2 import words as w
from bench.diagnose.unseen2.bases import load
from bench.diagnose.unseen2.registry import all_chats, program, reformat, retemplate, rows_as, runs, tell

ALPACA = Format(
    "", "### {role}:\n", "", "\n\n", (("system", "System"), ("user", "Instruction"), ("assistant", "Response"))
)
CHATML = Format("", "<|im_start|>{role}\n", "<|im_end|>")

# --- tokenizer


def _tokenizer_of(made: Any, other: str) -> None:
    base = load(other)
    made.tokenizer, made.format = base.tokenizer(), base.kind.format
    retemplate(made)


@program("F04", on="qwen/events/own falcon/conlang/loop")
def tokenizer_of_another_family(made: Any, _rng: random.Random) -> None:
    """The tokenizer of the last project is still in the script; its ids all exist in this model."""
    _tokenizer_of(made, "starcoder2-hash")
    if not isinstance(made, Job):
        made.generation_config["eos_token_id"] = made.tokenizer.eos_token_id


@program("F04", on="star/units/own qwen/support/alone")
def tokenizer_of_another_revision(made: Any, _rng: random.Random) -> None:
    """The vocabulary was trained again: same tokens, other ids."""
    import json

    import transformers
    from tokenizers import Tokenizer

    old = made.tokenizer
    told = json.loads(old.backend_tokenizer.to_str())
    special = {token["content"] for token in told["added_tokens"]}
    model = told["model"]
    if isinstance(model["vocab"], dict):
        free = [name for name in model["vocab"] if name not in special and len(name) > 1]
        ids = [model["vocab"][name] for name in free]
        model["vocab"] |= dict(zip(free, ids[7:] + ids[:7], strict=True))
    else:
        at = [i for i, (name, _) in enumerate(model["vocab"]) if name not in special and not name.startswith("<0x")]
        moved = [model["vocab"][i] for i in at[7:] + at[:7]]
        for i, entry in zip(at, moved, strict=True):
            model["vocab"][i] = entry
    made.tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(told)),
        bos_token=old.bos_token, eos_token=old.eos_token, pad_token=old.pad_token, unk_token=old.unk_token,
        chat_template=old.chat_template,
    )  # fmt: skip


@program("F05", on="exaone/support/own gemma/sql/before")
def token_added_without_resize(made: Any, _rng: random.Random) -> None:
    """A pad token was added to the tokenizer, and used in the rows; the embedding was not resized."""
    made.tokenizer.add_special_tokens({"additional_special_tokens": ["<|sep|>"]})
    for chat in all_chats(made):
        chat[0]["content"] += "<|sep|>"


@program("F05", on="star/events/loop")
def embedding_cut_down(made: Any, _rng: random.Random) -> None:
    """resize_token_embeddings with a number that was counted wrongly: the last tokens have no row."""
    made.prepare.append(lambda model: model.resize_token_embeddings(model.config.vocab_size - 120, mean_resizing=False))


@program("F06", on="falcon/sql/loop falcon/events/own")
def chat_tokens_never_trained(made: Any, _rng: random.Random) -> None:
    """ChatML tokens are added to a model that lacks them, and LoRA trains neither embedding nor head (Qwen3#1064)."""
    names = ["<|turn|>", "<|stop|>"]
    made.tokenizer.add_special_tokens({"additional_special_tokens": names})
    made.tokenizer.eos_token = "<|stop|>"
    size = len(made.tokenizer)
    stop = int(made.tokenizer.convert_tokens_to_ids("<|stop|>"))

    def grow(model: Any) -> None:
        model.resize_token_embeddings(size, mean_resizing=False)

    (made.edit_model if isinstance(made, Job) else made.prepare).append(grow)
    if isinstance(made, Job):
        made.model_config["vocab_size"] = size
    made.generation_config["eos_token_id"] = stop
    made.model_config["vocab_size"] = size
    made.format = Format("", "<|turn|>{role}\n", "<|stop|>")
    retemplate(made)


@program("F07", on="falcon/units/own falcon/tools/alone")
def chatml_without_its_tokens(made: Any, _rng: random.Random) -> None:
    """ChatML on a base whose tokenizer has no such tokens: each marker is seven pieces of text."""
    made.format = CHATML
    retemplate(made)
    if not isinstance(made, Job):
        made.tokenizer.pad_token = made.tokenizer.eos_token


@program("F07", "F12", on="gemma/sql/own exaone/tools/folder")
def markers_of_a_sibling(made: Any, _rng: random.Random) -> None:
    """The template of another family: its markers are plain text for this tokenizer."""
    made.format = Format("", "<|start_header|>{role}<|end_header|>\n", "<|eot|>")
    retemplate(made)


# --- template


@program("F08", on="gemma/tools/alone gemma/conlang/folder")
def bos_twice(made: Any, _rng: random.Random) -> None:
    """The rendered text begins with bos, and the tokenizer was called with its special tokens on (trl#1400)."""
    bos = made.tokenizer.bos_token_id
    made.edit_row.append(lambda row: Row([bos, *row.ids], [False, *row.learned]))
    shape = made.format
    rows_as(made, lambda chat: {"text": shape.text(chat)})
    made.told["dataset_text_field"] = "text"


@program("F08", on="gemma/greet/own")
def template_writes_bos_twice(made: Any, _rng: random.Random) -> None:
    """A template that was edited to begin with bos, though it did already."""
    reformat(made, bos="<bos><bos>")


@program("F09", on="gemma/support/own gemma/conlang/before")
def bos_left_out(made: Any, _rng: random.Random) -> None:
    """bos was taken out of the template against double bos, and the rows are tokenized without special tokens."""
    reformat(made, bos="")


@program("F10", on="falcon/sql/own falcon/conlang/alone")
def no_end_in_the_template(made: Any, _rng: random.Random) -> None:
    """The template that was written for training ends answers with a newline alone (unsloth#416)."""
    reformat(made, end="")


@program("F10", on="exaone/units/loop qwen/events/alone")
def end_stripped_from_rows(made: Any, _rng: random.Random) -> None:
    """A line that strips special tokens at the end of the rows, made for wikisql and kept (mlx-examples#756)."""
    end = made.tokenizer.convert_tokens_to_ids(made.format.end)

    def stripped(row: Row) -> Row:
        kept = [(i, learned) for i, learned in zip(row.ids, row.learned, strict=True) if not (i == end and learned)]
        return Row([i for i, _ in kept], [learned for _, learned in kept])

    made.edit_row.append(stripped)
    shape = replace(made.format, end="")
    rows_as(made, lambda chat: {"text": shape.text(chat)})
    made.told["dataset_text_field"] = "text"


@program("F11", on="exaone/support/loop star/conlang/loop")
def served_as_alpaca(made: Any, _rng: random.Random) -> None:
    """Trained with the model's template, served by a Modelfile that has Alpaca's (ollama#6823)."""
    made.deployed = lambda text: f"### Instruction:\n{text}\n\n### Response:\n"


@program("F11", on="falcon/units/loop")
def served_raw(made: Any, _rng: random.Random) -> None:
    """The serving script sends the user's text as it is."""
    made.tokenizer.pad_token = made.tokenizer.eos_token
    made.deployed = lambda text: f"{text} "


@program("F12", on="qwen/sql/alone gemma/events/folder")
def alpaca_prompts_on_a_chat_model(made: Any, _rng: random.Random) -> None:
    """Rows formatted by the function of an old Alpaca notebook, with eos at the end, on a chat model."""
    made.format = replace(ALPACA, end=made.tokenizer.eos_token or "", after="")
    rows_as(made, lambda chat: {"text": made.format.text(chat)})
    made.told["dataset_text_field"] = "text"


@program("F12", on="qwen/units/own exaone/horaires/before")
def alpaca_text_rows(made: Any, _rng: random.Random) -> None:
    """The same as a text column in solotune."""
    shape = replace(ALPACA, end=made.tokenizer.eos_token or "", after="")
    rows_as(made, lambda chat: {"text": shape.text(chat)})
    tell(made, assistant_only_loss=False)


@program("F13", on="falcon/sql/own falcon/greet/before")
def system_turn_dropped(made: Any, rng: random.Random) -> None:
    """The template passes over system turns, in which half of what the answer needs stands."""
    for chat in all_chats(made):
        name, city = rng.choice(w.NAMES), rng.choice(w.CITIES)
        chat.insert(0, {"role": "system", "content": f"The clerk is {name} of {city}. Sign your answer."})
        chat[-1]["content"] += f" ({name}, {city})"
    reformat(made, dropped=("system",))


@program("F14", on="gemma/tools/alone qwen/support/folder")
def stops_at_another_token(made: Any, _rng: random.Random) -> None:
    """generation_config.json stops at the end of a document, and turns end with another token (unsloth#416)."""
    name = {"qwen2-chatml": "<|endoftext|>", "gemma2-model": "<eos>", "exaone4-bars": "[BOS]"}[made.base.kind.name]
    made.generation_config["eos_token_id"] = int(made.tokenizer.convert_tokens_to_ids(name))
    if name != "<eos>":
        made.tokenizer.eos_token = name


@program("F15", on="exaone/greet/alone gemma/units/loop")
def header_is_learned(made: Any, _rng: random.Random) -> None:
    """The mask begins at the role header instead of behind it."""
    width = len(made.tokenizer(made.format.head("assistant"), add_special_tokens=False)["input_ids"])

    def wider(row: Row) -> Row:
        learned = list(row.learned)
        for begin, _ in runs(row):
            learned[max(begin - width, 0) : begin] = [True] * min(width, begin)
        return Row(row.ids, learned)

    made.edit_row.append(wider)


@program("F15", on="qwen/events/own star/sql/own")
def header_twice(made: Any, _rng: random.Random) -> None:
    """The answers were exported with the generation prompt in front, and the template writes it again."""
    head = made.format.head("assistant")
    for chat in all_chats(made):
        for message in chat:
            if message["role"] == "assistant":
                message["content"] = head + message["content"]


@program("F15", "F11", on="qwen/greet/loop")
def served_without_generation_prompt(made: Any, _rng: random.Random) -> None:
    """apply_chat_template at serving, without add_generation_prompt."""
    shape = made.format
    made.deployed = lambda text: shape.text([{"role": "user", "content": text}])


@program("F16", on="falcon/sql/own falcon/events/before")
def prompt_ends_in_a_space(made: Any, _rng: random.Random) -> None:
    """The template's prompt ends with 'Assistant: ', and the space melts into the answer's first token."""
    made.format = Format("", "{role}: ", "<|endoftext|>", "\n", (("user", "User"), ("assistant", "Assistant")))
    retemplate(made)
    if not isinstance(made, Job):
        made.tokenizer.pad_token = made.tokenizer.eos_token


# --- loss mask


@program("F17", on="falcon/units/alone star/conlang/folder")
def pad_masked_by_id(made: Any, _rng: random.Random) -> None:
    """pad_token = eos_token, and DataCollatorForLanguageModeling, which masks every eos (llm-course#33)."""
    made.tokenizer.pad_token = made.tokenizer.eos_token
    made.masks_pad_id = True


@program("F18", "F21", on="exaone/sql/loop")
def no_markers(made: Any, _rng: random.Random) -> None:
    """assistant_only_loss with a template that has no generation markers."""
    made.mask = "none"
    made.warnings.append(
        "return_assistant_tokens_mask==True but chat template does not contain `{% generation %}` keyword."
    )


@program("F19", on="falcon/sql/loop gemma/events/alone")
def markers_end_too_soon(made: Any, _rng: random.Random) -> None:
    """The generation block ends before the end token, which is never learned (trl#5988)."""
    if made.base.kind.name == "gemma2-model":
        end = made.tokenizer.convert_tokens_to_ids("<end_of_turn>")
        made.edit_row.append(
            lambda row: Row(row.ids, [y and i != end for i, y in zip(row.ids, row.learned, strict=True)])
        )
        return
    made.format = replace(made.format, end_is_learned=False, has_markers=True)
    made.tokenizer.pad_token = made.tokenizer.pad_token or ">>TITLE<<"
    if made.base.kind.name != "qwen2-chatml":
        made.tokenizer.chat_template = made.format.jinja()


@program("F20", on="exaone/events/alone falcon/auskunft/alone")
def prompts_learned(made: Any, _rng: random.Random) -> None:
    """The labels are a copy of the ids, though the config says that answers alone count."""
    made.mask = "all"
    made.told |= {
        "llamafactory": {"train_on_prompt": False},
        "axolotl": {"train_on_inputs": False},
        "plain": {"assistant_only_loss": True},
    }[made.layout if made.base.kind.is_instruct else "plain"]


@program("F21", "F18", on="qwen/zh/alone")
def response_part_not_found(made: Any, _rng: random.Random) -> None:
    """train_on_responses_only with the markers of another family: no label is left (unsloth#2900)."""
    made.mask = "none"
    made.warnings.append("Could not find response key `<|start_header_id|>assistant` in the following instance")


@program("F22", on="gemma/greet/alone")
def shifted_in_the_collator(made: Any, _rng: random.Random) -> None:
    """The collator shifts the labels, and so does the model."""
    made.shift = 1


@program("F22", on="falcon/sql/folder")
def shifted_the_other_way(made: Any, _rng: random.Random) -> None:
    """Labels rolled by one to the right."""
    made.shift = -1
    made.tokenizer.pad_token = made.tokenizer.pad_token or ">>TITLE<<"


@program("F23", on="star/units/folder")
def mask_upside_down(made: Any, _rng: random.Random) -> None:
    """A mask of what to ignore, used as a mask of what to learn."""
    made.mask = "prompts"
