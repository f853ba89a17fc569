"""Faults and odd but healthy things that a person can set up with solotune: config, files, folders.

The file is long because it is one list: a function for each program.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from bench.diagnose.ours import Job, Row
from bench.diagnose.unseen.bases import RoleFormat
from bench.diagnose.unseen.faults_rows import CHATML, LLAMA3, retokenized
from bench.diagnose.unseen.registry import program


def lengths(job: Job) -> list[int]:
    return sorted(len(job.tokenizer(job.format.text(row["messages"]))["input_ids"]) for row in job.train)


def token(job: Job, text: str) -> int:
    return cast(int, job.tokenizer.convert_tokens_to_ids(text))


def add(job: Job, *tokens: str) -> None:
    job.tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})


# --- faults: model folder


@program("F04", on=("seek/table/before", "seek/house/own"))
def ids_rotated(job: Job, rng: random.Random) -> None:
    """tokenizer.json of a sibling: the same pieces, all ids seven further."""
    job.tokenizer = retokenized(job.tokenizer, lambda ids: ids[7:] + ids[:7])


@program("F04", on="phi/as_json/before")
def pieces_shuffled(job: Job, rng: random.Random) -> None:
    """Another tokenizer of the same size: its pieces stand in another order."""
    job.tokenizer = retokenized(job.tokenizer, lambda ids: rng.sample(ids, len(ids)))


@program("F05", on="seek/house/before")
def tags_beyond_the_embedding(job: Job, rng: random.Random) -> None:
    """Three tags were added to the tokenizer and are in the rows; the model was not resized."""
    add(job, "<|form|>", "<|desk|>", "<|over|>")
    for chat in job.messages():
        chat[0]["content"] = rng.choice(("<|form|>", "<|desk|>", "<|over|>")) + chat[0]["content"]


@program("F06", on=("phi/table/before", "phi/house/own"))
def marker_in_a_padding_row(job: Job, rng: random.Random) -> None:
    """<|call|> got the id of a padding row, and each answer begins with it."""
    add(job, "<|call|>")
    for chat in job.messages():
        chat[-1]["content"] = "<|call|>" + chat[-1]["content"]


@program("F06", on="olmo/steps/before")
def chat_markers_for_a_base_model(job: Job, rng: random.Random) -> None:
    """ChatML's markers as new tokens in padding rows, and LoRA on the linears."""
    add(job, "<|im_start|>", "<|im_end|>")
    job.format = replace(job.format, **CHATML)
    job.retemplate()


@program("F14", on=("phi/house/before", "phi/steps/own"))
def end_of_text_alone(job: Job, rng: random.Random) -> None:
    """generation_config.json stops at <|endoftext|>; answers end with <|end|>."""
    job.generation_config["eos_token_id"] = token(job, "<|endoftext|>")


@program("F14", on="cohere/house/before")
def eos_of_generation_config(job: Job, rng: random.Random) -> None:
    """<EOS_TOKEN> in generation_config.json alone."""
    job.generation_config["eos_token_id"] = token(job, "<EOS_TOKEN>")


@program("F49", on="phi/short/before")
def quantised_already(job: Job, rng: random.Random) -> None:
    """The checkpoint is GPTQ's already, and nf4 is asked for."""
    job.model_config["quantization_config"] = {"quant_method": "gptq", "bits": 8, "group_size": 32, "desc_act": False}
    job.config["base_precision"] = "nf4"


# --- faults: template


@program("F07", on=("seek/steps/before", "seek/as_json/own"))
def llama3_template(job: Job, rng: random.Random) -> None:
    """chat_template_path is Llama 3's, whose markers this tokenizer does not have."""
    job.format = replace(job.format, **LLAMA3, ends=())
    job.template = job.format.jinja()


@program("F08", on="cohere/as_json/before")
def begins_twice(job: Job, rng: random.Random) -> None:
    """The template writes BOS two times."""
    job.tokenizer.chat_template = job.format.bos + job.format.jinja()


@program("F09", on=("seek/as_json/before", "seek/table/own"))
def begins_without(job: Job, rng: random.Random) -> None:
    """A template file without BOS, for a base that has begun every text with it."""
    job.format = replace(job.format, bos="")
    job.template = job.format.jinja()


@program("F10", on=("phi/steps/before", "phi/as_json/own"))
def no_end_in_the_template(job: Job, rng: random.Random) -> None:
    """The template writes no <|end|> after an answer."""
    shape = RoleFormat("", "<|{role}|>\n", "", "\n", ends=(("user", "<|end|>"), ("system", "<|end|>")))
    job.format = shape
    job.template = shape.jinja()


@program("F12", on=("seek/house/before", "phi/table/own"))
def texts_by_hand(job: Job, rng: random.Random) -> None:
    """Rows are texts in Alpaca's format, for a model with a chat template."""

    def text(row: Row) -> Row:
        question, answer = row["messages"][-2:]
        said = f"### Instruction:\n{question['content']}\n\n### Response:\n{answer['content']}"
        return {"text": said + cast(str, job.tokenizer.eos_token)}

    job.train, job.held_out = [text(r) for r in job.train], [text(r) for r in job.held_out]


@program("F13", on=("phi/house/before", "seek/short/own"))
def instructions_dropped(job: Job, rng: random.Random) -> None:
    """Each row has a system turn of its own, and the template passes over it."""
    for chat in job.messages():
        chat.insert(0, {"role": "system", "content": f"Speak to {rng.choice(job.base.world.subjects)} lovers."})
    job.format = replace(job.format, dropped=("system",))
    job.retemplate()


@program("F15", on="cohere/steps/before")
def header_twice(job: Job, rng: random.Random) -> None:
    """The generation prompt writes the answer's header two times."""
    head = job.format.head("assistant")
    job.tokenizer.chat_template = job.format.jinja().replace(
        "{% if add_generation_prompt %}", "{% if add_generation_prompt %}" + head
    )


@program("F16", on="phi/house/before")
def header_with_a_blank(job: Job, rng: random.Random) -> None:
    """`<|assistant|> ` with a blank, which answers take into their first token."""
    for chat in job.messages():
        chat[-1]["content"] = "the answer: " + chat[-1]["content"]
    job.format = replace(job.format, header="<|{role}|> ")
    job.retemplate()


# --- faults: rows


@program("F24", on=("seek/report/before", "granite/report/before"))
def reports_cut(job: Job, rng: random.Random) -> None:
    """Six of ten rows are longer than max_length."""
    found = lengths(job)
    job.config["max_length"] = found[int(len(found) * 0.4)]


@program("F25", on=("olmo/extract/before", "phi/extract/own"))
def nothing_left_of_answers(job: Job, rng: random.Random) -> None:
    """Half of the prompts are as long as max_length."""
    shape = job.format
    found = sorted(len(job.tokenizer(shape.text(r["messages"][:-1], begun=True))["input_ids"]) for r in job.train)
    job.config["max_length"] = found[len(found) // 2]


@program("F34", on=("phi/steps/before", "olmo/house/own"))
def answers_missing(job: Job, rng: random.Random) -> None:
    """Four of ten answers are empty."""
    for chat in job.messages():
        if rng.random() < 0.4:
            chat[-1]["content"] = ""


@program("F35", on=("seek/short/before", "olmo/steps/own"))
def same_words(job: Job, rng: random.Random) -> None:
    """All answers are the text of an error page."""
    for chat in job.messages():
        chat[-1]["content"] = "503 Service temporarily unavailable. Please try again later."


@program("F36", on=("phi/as_json/before", "seek/table/own"))
def sides_swapped(job: Job, rng: random.Random) -> None:
    """user and assistant are swapped in every row."""
    other = {"user": "assistant", "assistant": "user"}
    for chat in job.messages():
        for message in chat:
            message["role"] = other.get(message["role"], message["role"])


@program("F37", on=("cohere/steps/before", "cohere/table/before"))
def latin1(job: Job, rng: random.Random) -> None:
    """German rows read with the wrong encoding."""
    for chat in job.messages():
        for message in chat:
            message["content"] = (message["content"] + " für Käthe, größer").encode().decode("latin1")


@program("F38", on=("olmo/as_json/own", "phi/house/own", "seek/house/before"))
def answers_moved(job: Job, rng: random.Random) -> None:
    """Answers stand nineteen rows further down, in training and in evaluation."""
    for rows in (job.train, job.held_out):
        said = [row["messages"][-1]["content"] for row in rows]
        for row, answer in zip(rows, said[-19:] + said[:-19], strict=True):
            row["messages"][-1]["content"] = answer


@program("F39", on=("phi/short/before", "seek/as_json/before"))
def copies_kept(job: Job, rng: random.Random) -> None:
    """Fifteen rows, thirteen times each, and copies are kept."""
    job.train = [json.loads(json.dumps(row)) for row in job.train[:15] for _ in range(13)]
    rng.shuffle(job.train)
    job.config["dataset_exact_deduplication"] = False


@program("F42", on=("olmo/house/before", "phi/short/before"))
def one_row_beyond_the_positions(job: Job, rng: random.Random) -> None:
    """One row of some 900 tokens, of a model with 384 positions, and max_length lets it in."""
    long = " ".join(job.base.world.text(rng) for _ in range(30))
    ids = job.tokenizer(long, add_special_tokens=False)["input_ids"][:880]
    message = job.train[77]["messages"][0]
    message["content"] = cast(str, job.tokenizer.decode(ids)) + " " + message["content"]
    job.config["max_length"] = 1024


@program("F43", on=("phi/house/before", "olmo/steps/own"))
def evaluated_on_the_same(job: Job, rng: random.Random) -> None:
    """eval_dataset has rows of the training file."""
    job.held_out = rng.sample(job.train, 24)


@program("F44", on=("olmo/house/before", "seek/as_json/before"))
def near_copies(job: Job, rng: random.Random) -> None:
    """Half of the evaluation rows are in training too, with a greeting before the question."""
    for row in job.held_out[::2]:
        first, *others = row["messages"]
        job.train.append({"messages": [{**first, "content": "Good morning. " + first["content"]}, *others]})
    rng.shuffle(job.train)


@program("F48", on="seek/steps/before")
def two_rows_to_judge_by(job: Job, rng: random.Random) -> None:
    """eval_dataset has two rows."""
    job.held_out = job.held_out[:2]


@program("F46", on="olmo/as_json/own")
def twelve_rows_eighty_epochs(job: Job, rng: random.Random) -> None:
    """Twelve rows, eighty epochs."""
    job.train = job.train[:12]
    del job.config["max_steps"]
    job.config.update(num_train_epochs=80, eval_steps=20, learning_rate=8e-3)


# --- faults: adapter and optimizer


@program("F56", on=("phi/steps/before", "phi/short/own"))
def llama_names(job: Job, rng: random.Random) -> None:
    """q, k, v, o of Llama, on a model with one qkv_proj."""
    job.config["lora_target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj"]


@program("F61", "F64", on="olmo/steps/own")
def alpha_of_a_fiftieth(job: Job, rng: random.Random) -> None:
    """r = 48, alpha = 0.1."""
    job.config.update(lora_r=48, lora_alpha=0.1)


@program("F62", on="olmo/as_json/own")
def rank_one_on_keys(job: Job, rng: random.Random) -> None:
    """r = 1 on k_proj."""
    job.config.update(lora_r=1, lora_alpha=2.0, lora_target_modules=["k_proj"])


@program("F63", on=("olmo/table/before", "phi/as_json/before"))
def head_as_a_target(job: Job, rng: random.Random) -> None:
    """lm_head stands among the targets."""
    job.config["lora_target_modules"] = ["o_proj", "down_proj", "lm_head"]


@program("F63", on="seek/steps/before")
def embedding_as_a_target(job: Job, rng: random.Random) -> None:
    """embed_tokens and lm_head stand among the targets."""
    job.config["lora_target_modules"] = ["q_proj", "v_proj", "embed_tokens", "lm_head"]


@program("F64", "F61", on=("phi/table/own", "seek/house/own"))
def rate_of_a_pretraining(job: Job, rng: random.Random) -> None:
    """2e-5."""
    job.config["learning_rate"] = 2e-5


@program("F65", on=("phi/short/before", "olmo/house/own"))
def nearly_all_warmup(job: Job, rng: random.Random) -> None:
    """warmup_ratio 0.97."""
    job.config["warmup_ratio"] = 0.97


@program("F67", "F61", on=("seek/steps/own", "olmo/table/own"))
def rate_of_a_half(job: Job, rng: random.Random) -> None:
    """learning_rate 0.5."""
    job.config["learning_rate"] = 0.5


@program("F68", on=("phi/as_json/own", "olmo/steps/before"))
def clipped_to_nothing(job: Job, rng: random.Random) -> None:
    """max_grad_norm 2e-9."""
    job.config["max_grad_norm"] = 2e-9


@program("F69", on="phi/house/before")
def decay_beyond_the_limit(job: Job, rng: random.Random) -> None:
    """weight_decay 100, which the config does not allow: refused, and its name should be told."""
    job.config["weight_decay"] = 100.0


@program("F53", on="seek/short/before")
def half_precision_for_a_bfloat_model(job: Job, rng: random.Random) -> None:
    """fp16 and a compute dtype of float16 for a bfloat16 checkpoint: refused, and its name should be told."""
    job.model_config["dtype"] = "bfloat16"
    job.config.update(base_precision="nf4", bnb_4bit_compute_dtype="float16")
    del job.config["bf16"]


# --- faults: afterwards


def edit_adapter(run: Path, edit: Any) -> None:
    from safetensors.torch import load_file, save_file

    file = run / "adapter" / "adapter_model.safetensors"
    found = [edit(name, tensor) for name, tensor in load_file(file).items()]
    save_file({name: tensor.contiguous() for name, tensor in found}, file)


@program("F75", on="olmo/table/own")
def b_zeroed(job: Job, rng: random.Random) -> None:
    """The adapter was overwritten by one that never trained."""
    job.after.append(lambda run, _: edit_adapter(run, lambda n, t: (n, t * 0 if "lora_B" in n else t)))


@program("F78", on="phi/steps/own")
def keys_with_orig_mod(job: Job, rng: random.Random) -> None:
    """The adapter's keys went through a compiled wrapper: _orig_mod. in each."""

    def wrapped(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        return name.replace("base_model.model.", "base_model.model._orig_mod."), tensor

    job.after.append(lambda run, _: edit_adapter(run, wrapped))


@program("F78", on="seek/table/own")
def another_base_in_its_place(job: Job, rng: random.Random) -> None:
    """The model folder was replaced by another checkpoint of the same shape."""

    def change(_run: Path, model: Path) -> None:
        from safetensors.torch import load_file, save_file

        file = model / "model.safetensors"
        made = torch.Generator().manual_seed(3)
        tensors = {
            n: t if t.ndim < 2 else t.flip(0).contiguous() + 0.05 * t.std() * torch.randn(t.shape, generator=made)
            if "layers.1" in n and t.shape[0] == t.shape[1]
            else t + 0.12 * t.std() * torch.randn(t.shape, generator=made)
            for n, t in load_file(file).items()
        }  # fmt: skip
        save_file(tensors, file, metadata={"format": "pt"})

    job.after.append(change)


# --- healthy


@program(on=("phi/house/own", "olmo/house/own", "seek/steps/own", "granite/as_json/before", "cohere/table/before"))
def plain(job: Job, rng: random.Random) -> None:
    """Nothing odd but the task."""


@program(on=("phi/report/own", "olmo/report/before"))
def formulaic(job: Job, rng: random.Random) -> None:
    """Reports whose words are mostly the same: no leak, no constant answer."""


@program(on=("seek/classes/own", "granite/classes/before", "olmo/classes/before"))
def labels(job: Job, rng: random.Random) -> None:
    """A handful of labels."""


@program(on=("seek/tools/before", "phi/tools/own"))
def tool_calls(job: Job, rng: random.Random) -> None:
    """Three turns of calls and results."""
    job.config["max_length"] = 384


@program(on=("seek/languages/before", "olmo/languages/own"))
def four_languages(job: Job, rng: random.Random) -> None:
    """French, Spanish, Italian and Swedish."""


@program(on=("phi/code/before", "olmo/sql/before", "seek/code/own"))
def program_text(job: Job, rng: random.Random) -> None:
    """Answers are code."""


@program(on="olmo/extract/own")
def passages(job: Job, rng: random.Random) -> None:
    """Prompts of ten times the answer's length."""


@program(on="seek/report/before")
def two_rows_cut(job: Job, rng: random.Random) -> None:
    """max_length cuts 1 % of the rows."""
    job.config["max_length"] = lengths(job)[-3] - 1


@program(on="phi/house/before")
def long_rows_left_out(job: Job, rng: random.Random) -> None:
    """overflow: drop, and three rows are longer."""
    job.config.update(max_length=lengths(job)[-4] - 1, overflow="drop")


@program(on="seek/house/own")
def held_out_by_default(job: Job, rng: random.Random) -> None:
    """No eval_dataset: the default of 5 % holds ten rows out."""
    job.held_out = []


@program(on="phi/as_json/own")
def packed(job: Job, rng: random.Random) -> None:
    """Several rows a sequence."""
    job.config.update(packing=True, max_length=256, per_device_train_batch_size=2)


@program(on="olmo/house/own")
def low_rate_more_steps(job: Job, rng: random.Random) -> None:
    """A fifth of the rate, constant, more steps."""
    job.config.update(learning_rate=1.5e-3, lr_scheduler_type="constant", max_steps=140)


@program(on="seek/table/own")
def high_rate(job: Job, rng: random.Random) -> None:
    """1.5e-2, with a warmup of a tenth."""
    job.config.update(learning_rate=1.5e-2, warmup_ratio=0.1)


@program(on="olmo/steps/own")
def stopped(job: Job, rng: random.Random) -> None:
    """The scheduler ended the job after 50 of 80 steps."""
    job.stops_after = 50


@program(on="phi/steps/own")
def weights_of_rows(job: Job, rng: random.Random) -> None:
    """A third of the rows count double."""
    for number, row in enumerate(job.train):
        row["weight"] = 2.0 if number % 3 == 0 else 1.0


@program(on="olmo/short/own")
def pairs_for_a_base(job: Job, rng: random.Random) -> None:
    """prompt and completion, of a base model."""
    for name in ("train", "held_out"):
        rows = getattr(job, name)
        pairs = [(r["messages"][0]["content"], r["messages"][1]["content"]) for r in rows]
        setattr(job, name, [{"prompt": asked + "\n", "completion": said} for asked, said in pairs])
    job.template = None


@program(on="phi/table/before")
def chats_that_end_with_the_user(job: Job, rng: random.Random) -> None:
    """One row in eight ends with the user's thanks."""
    for row in job.train[::8]:
        row["messages"].append({"role": "user", "content": "Thank you, that is all."})


@program(on="cohere/languages/before")
def accents_and_invisible_signs(job: Job, rng: random.Random) -> None:
    """Non-breaking blanks before French signs, and a soft hyphen here and there."""
    for chat in job.messages():
        chat[0]["content"] = chat[0]["content"].replace(" ?", "\u00a0?").replace(" :", "\u00a0:") + "\u00ad"


@program(on="seek/steps/before")
def odd_targets(job: Job, rng: random.Random) -> None:
    """Only the MLP's way down and the values, r = 24, alpha = 24."""
    job.config.update(lora_target_modules=["v_proj", "down_proj"], lora_r=24, lora_alpha=24.0)


@program(on="phi/short/own")
def short_answers(job: Job, rng: random.Random) -> None:
    """Two words."""
    job.config.update(lora_r=4, lora_alpha=8.0, max_grad_norm=0.3)


@program(on="olmo/table/own")
def accumulated(job: Job, rng: random.Random) -> None:
    """Four micro-batches of two, dropout, a little decay."""
    job.config.update(per_device_train_batch_size=2, gradient_accumulation_steps=4, lora_dropout=0.1, weight_decay=0.05)
