"""Faults that a person can set up with solotune: in the config, the files of rows, the model folder, the run directory.

What its own code makes impossible (a mask left out, labels shifted, rows of a pack that see each other) is not here.
"""

from __future__ import annotations

import random
from dataclasses import replace

from bench.diagnose.faults_text import wrong_tokenizer as permuted
from bench.diagnose.ours import Job, Row, asked
from bench.diagnose.registry import Needs

# --- model folder


@asked("F04", before=True)
def wrong_tokenizer(job: Job, rng: random.Random) -> None:
    """The folder has another model's tokenizer, of the same size."""
    permuted(job, rng)  # type: ignore[arg-type]  # it has a tokenizer


@asked("F05", before=True)
def vocabulary_beyond_embedding(job: Job, rng: random.Random) -> None:
    """A new end of turn in tokenizer and template, and the embedding was not resized."""
    new = rng.choice(("<|stop|>", "<|over|>", "<|fin|>"))
    job.tokenizer.add_special_tokens({"additional_special_tokens": [new]})
    job.format = replace(job.format, end=new)
    job.retemplate()


@asked("F06", Needs.INSTRUCT)
def new_terminator(job: Job, rng: random.Random) -> None:
    """A new end of turn, with the row of the embedding that transformers gives it and LoRA leaves as it is."""
    new = rng.choice(("<|stop|>", "<|over|>", "<|fin|>"))
    job.tokenizer.add_special_tokens({"additional_special_tokens": [new]})
    job.tokenizer.eos_token = new
    job.format = replace(job.format, end=new)
    job.retemplate()
    size = len(job.tokenizer)
    job.edit_model.append(lambda model: model.resize_token_embeddings(size))
    job.generation_config["eos_token_id"] = job.tokenizer.convert_tokens_to_ids(new)


@asked("F14", before=True)
def generation_stops_elsewhere(job: Job, rng: random.Random) -> None:
    """generation_config.json, config.json and tokenizer end at a token that no answer has."""
    own = job.tokenizer.convert_tokens_to_ids(job.format.end)
    other = next(i for i in job.tokenizer.all_special_ids if i not in (own, job.tokenizer.eos_token_id))
    job.tokenizer.eos_token = job.tokenizer.convert_ids_to_tokens(other)
    job.generation_config["eos_token_id"] = other
    job.model_config["eos_token_id"] = other


@asked("F49", before=True)
def quantised_twice(job: Job, rng: random.Random) -> None:
    """The checkpoint says that it is AWQ's, and nf4 is asked for."""
    job.model_config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 64}
    job.config["base_precision"] = "nf4"


# --- template


@asked("F12", Needs.INSTRUCT, before=True)
def foreign_template(job: Job, rng: random.Random) -> None:
    """chat_template_path is some other model's."""
    head = rng.choice((("### Human: ", "### Assistant: "), ("USER: ", "BOT: "), ("Instruction:\n", "Output:\n")))
    job.format = replace(
        job.format, bos="", header="{role}", end=job.tokenizer.eos_token, after="\n",
        roles=(("system", ""), ("user", head[0]), ("assistant", head[1])),
    )  # fmt: skip
    job.template = job.format.jinja()


@asked("F10", before=True)
def no_terminator(job: Job, rng: random.Random) -> None:
    """The template writes nothing after an answer."""
    shape = job.format
    text = shape.jinja()
    job.template = text.replace(shape.end, "")


@asked("F13", Needs.INSTRUCT, before=True)
def role_dropped(job: Job, rng: random.Random) -> None:
    """The template passes over system messages."""
    said = rng.choice(("Answer in one line.", "You are the desk of a small office.", "Be brief and exact."))
    for number, chat in enumerate(job.messages()):
        chat.insert(0, {"role": "system", "content": f"{said} Form {number}."})
    job.format = replace(job.format, dropped=("system",))
    job.retemplate()


@asked("F15", Needs.INSTRUCT, before=True)
def no_generation_prompt(job: Job, rng: random.Random) -> None:
    """The template does not begin the answer where it is asked to."""
    text = job.format.jinja()
    job.template = text[: text.index("{% if add_generation_prompt")]


@asked("F16", Needs.INSTRUCT, before=True)
def prompt_ends_in_a_blank(job: Job, rng: random.Random) -> None:
    """The header ends in a blank, which the answer's first token takes."""
    job.format = replace(job.format, header=job.format.header.rstrip() + " ")
    job.retemplate()


@asked("F07", Needs.INSTRUCT, before=True)
def markers_as_text(job: Job, rng: random.Random) -> None:
    """A template with markers that this tokenizer does not know."""
    head, end = rng.choice((("<|turn|>{role}\n", "<|turn_end|>"), ("<|begin_{role}|>", "<|finish|>")))
    job.format = replace(job.format, header=head, end=end, roles=tuple((role, role) for role, _ in job.format.roles))
    job.retemplate()


@asked("F08", Needs.BOS, before=True)
def two_bos(job: Job, rng: random.Random) -> None:
    job.template = job.format.bos + job.format.jinja()


@asked("F09", Needs.BOS, before=True)
def no_bos(job: Job, rng: random.Random) -> None:
    job.format = replace(job.format, bos="")
    job.template = job.format.jinja()


@asked("F12", Needs.INSTRUCT, before=True)
def rendered_by_hand(job: Job, rng: random.Random) -> None:
    """Rows of text in a made-up format, for a chat model."""
    head = rng.choice((("### Human: ", "### Assistant: "), ("USER: ", "ASSISTANT: ")))

    def text(row: Row) -> Row:
        question, answer = row["messages"][-2:]
        return {"text": f"{head[0]}{question['content']}\n{head[1]}{answer['content']}"}

    job.train, job.held_out = ([text(row) for row in rows] for rows in (job.train, job.held_out))


def as_pairs(rows: list[Row]) -> list[Row]:
    return [{"prompt": row["messages"][0]["content"], "completion": row["messages"][1]["content"]} for row in rows]


# --- rows


@asked("F34", before=True)
def empty_answers(job: Job, rng: random.Random) -> None:
    for chat in job.messages():
        if rng.random() < 0.5:
            chat[-1]["content"] = ""


@asked("F35", before=True)
def constant_answers(job: Job, rng: random.Random) -> None:
    said = job.train[0]["messages"][-1]["content"]
    for chat in job.messages():
        chat[-1]["content"] = said


@asked("F36", Needs.INSTRUCT, before=True)
def swapped_roles(job: Job, rng: random.Random) -> None:
    """Who asks is called assistant, and who answers user."""
    other = {"user": "assistant", "assistant": "user"}
    for chat in job.messages():
        for message in chat:
            message["role"] = other.get(message["role"], message["role"])


@asked("F37", before=True)
def mojibake(job: Job, rng: random.Random) -> None:
    """UTF-8 that was read as Latin-1 on the way."""
    for chat in job.messages():
        for message in chat:
            said = message["content"].replace("e", "é") if rng.random() < 0.6 else message["content"]
            message["content"] = said.encode().decode("latin1")


@asked("F38")
def misaligned(job: Job, rng: random.Random) -> None:
    """Every answer stands one row further down."""
    chats = job.messages()
    answers = [chat[-1]["content"] for chat in chats]
    for chat, answer in zip(chats, answers[-1:] + answers[:-1], strict=True):
        chat[-1]["content"] = answer


@asked("F38")
def shuffled_answers(job: Job, rng: random.Random) -> None:
    for rows in (job.train, job.held_out):
        answers = [row["messages"][-1]["content"] for row in rows]
        rng.shuffle(answers)
        for row, answer in zip(rows, answers, strict=True):
            row["messages"][-1]["content"] = answer


@asked("F39", before=True)
def duplicates(job: Job, rng: random.Random) -> None:
    """A few rows many times."""
    job.train = [row for row in job.train[: rng.randint(10, 16)] for _ in range(15)]
    rng.shuffle(job.train)


# --- lengths


@asked("F24", before=True)
def answers_cut(job: Job, rng: random.Random) -> None:
    lengths = _lengths(job)
    job.config["max_length"] = lengths[int(len(lengths) * rng.uniform(0.35, 0.55))]


@asked("F25", before=True)
def prompts_fill_the_window(job: Job, rng: random.Random) -> None:
    """Documents stand before most questions, and no place is left for the answers to them."""
    for chat in job.messages():
        if rng.random() < 0.7:
            chat[0]["content"] = " ".join([*(job.base.world.text(rng) for _ in range(12)), chat[0]["content"]])
    job.config["max_length"] = 160


@asked("F25", before=True)
def no_answer_fits(job: Job, rng: random.Random) -> None:
    """Nothing of any answer."""
    job.config["max_length"] = rng.randint(8, 12)


def _lengths(job: Job) -> list[int]:
    return sorted(len(job.tokenizer(job.format.text(row["messages"]))["input_ids"]) for row in job.train)
