"""What goes wrong in scripts with TRL and PEFT: numbers, rows, lengths, template and collator.

Each function does to a run what its owner did; the reader has the folder alone, and the rows and the config where they
were handed over.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from bench.diagnose.bases import with_format
from bench.diagnose.registry import Needs
from bench.diagnose.trl_run import Run, as_messages, change


def _answers(run: Run, edit: Callable[[int, str], str]) -> None:
    """Every answer, by its place and its text."""
    for place, row in enumerate(run.rows):
        row["completion"] = [{"role": "assistant", "content": edit(place, row["completion"][0]["content"])}]


# --- optimizer and schedule


@change("F64")
def rate_of_full_training(run: Run, rng: random.Random) -> None:
    run.sft["learning_rate"] = 4e-5


@change("F03", "F64")
def rate_left_out(run: Run, rng: random.Random) -> None:
    del run.sft["learning_rate"]


@change("F64")
def rate_too_low_and_no_config(run: Run, rng: random.Random) -> None:
    run.sft["learning_rate"] = 1e-4
    run.told = False


@change("F67")
def rate_too_high(run: Run, rng: random.Random) -> None:
    run.sft["learning_rate"] = 0.4


@change("F61")
def alpha_one_of_rank_64(run: Run, rng: random.Random) -> None:
    run.lora |= {"r": 64, "lora_alpha": 1}


@change("F61", "F67")
def alpha_far_above_rank(run: Run, rng: random.Random) -> None:
    run.lora |= {"r": 4, "lora_alpha": 2048}


@change("F65")
def warmup_longer_than_run(run: Run, rng: random.Random) -> None:
    run.sft["warmup_steps"] = 900


@change("F65")
def warmup_seen_in_curve_alone(run: Run, rng: random.Random) -> None:
    run.sft["warmup_steps"] = 250
    run.told = run.gives_rows = False


@change("F66")
def schedule_of_a_third(run: Run, rng: random.Random) -> None:
    import transformers

    def made(trainer: Any) -> None:
        trainer.create_optimizer()
        schedule = transformers.get_cosine_schedule_with_warmup
        trainer.lr_scheduler = schedule(trainer.optimizer, 0, run.sft["max_steps"] // 3)

    run.touch.append(made)


@change("F68")
def clipped_with_sgd(run: Run, rng: random.Random) -> None:
    run.sft |= {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 1e-4}


@change("F68")
def clipped_below_epsilon(run: Run, rng: random.Random) -> None:
    run.sft["max_grad_norm"] = 1e-9


@change("F69")
def decay_of_another_optimizer(run: Run, rng: random.Random) -> None:
    run.sft["weight_decay"] = 60.0


@change("F46")
def eight_rows_by_heart(run: Run, rng: random.Random) -> None:
    run.rows = run.rows[:8]
    run.sft |= {"max_steps": -1, "num_train_epochs": 90, "eval_strategy": "steps", "eval_steps": 10}


# --- rows


@change("F35")
def one_answer_for_all(run: Run, rng: random.Random) -> None:
    said = run.rows[0]["completion"][0]["content"]
    _answers(run, lambda place, text: said if place % 10 else text)


@change("F38")
def answers_moved_by_one(run: Run, rng: random.Random) -> None:
    texts = [row["completion"][0]["content"] for row in run.rows]
    _answers(run, lambda place, text: texts[place - 1])


@change("F39")
def merged_twenty_times(run: Run, rng: random.Random) -> None:
    run.rows = run.rows[:30] * 8
    rng.shuffle(run.rows)


@change("F34")
def empty_answers(run: Run, rng: random.Random) -> None:
    _answers(run, lambda place, text: "" if place % 3 == 0 else text)


@change("F37")
def read_as_latin_1(run: Run, rng: random.Random) -> None:
    _answers(run, lambda place, text: ("«" + text + "» é").encode().decode("latin-1"))


@change("F36")
def users_in_a_row(run: Run, rng: random.Random) -> None:
    run.rows = as_messages(run.rows)
    for row in run.rows:
        for message in row["messages"]:
            message["role"] = {"user": "human", "assistant": "bot"}.get(message["role"], message["role"])


@change("F44")
def held_out_rows_in_train(run: Run, rng: random.Random) -> None:
    run.held_out = run.held_out[:20] + run.rows[5:17]
    run.sft |= {"eval_strategy": "steps", "eval_steps": 10}
    run.tells_held_out = True


@change("F48")
def three_held_out_rows(run: Run, rng: random.Random) -> None:
    run.held_out = run.held_out[:3]
    run.sft |= {"eval_strategy": "steps", "eval_steps": 10}
    run.tells_held_out = True


# --- what is learned, and how long


@change("F20")
def completion_only_of_messages(run: Run, rng: random.Random) -> None:
    """TRL has no completion in such rows, and learns every token without a word."""
    run.rows = as_messages(run.rows)
    run.sft["completion_only_loss"] = True


@change("F20")
def answers_asked_and_not_passed(run: Run, rng: random.Random) -> None:
    run.rows = as_messages(run.rows)
    run.wrote["assistant_only_loss"] = True


@change("F24")
def half_of_the_answers_cut(run: Run, rng: random.Random) -> None:
    lengths = sorted(len(_ids(run, row)) for row in run.rows)
    run.sft["max_length"] = lengths[len(lengths) // 3] - 6


@change("F25")
def prompts_fill_the_window(run: Run, rng: random.Random) -> None:
    text = run.base.kind.format.text
    prompts = sorted(len(_tokens(run, text(row["prompt"], begun=True))) for row in run.rows)
    run.sft["max_length"] = prompts[len(prompts) // 2]


@change("F26")
def beginnings_cut(run: Run, rng: random.Random) -> None:
    lengths = sorted(len(_ids(run, row)) for row in run.rows)
    run.sft |= {"max_length": lengths[0] * 2 // 3, "truncation_mode": "keep_end"}


@change("F31", "F33")
def packed_by_wrapping(run: Run, rng: random.Random) -> None:
    run.sft |= {"packing": True, "packing_strategy": "wrapped", "max_length": 160}


@change("F33")
def packs_shorter_than_rows(run: Run, rng: random.Random) -> None:
    lengths = sorted(len(_ids(run, row)) for row in run.rows)
    run.sft |= {"packing": True, "max_length": lengths[len(lengths) // 3] - 6}


def _ids(run: Run, row: dict[str, Any]) -> list[int]:
    return _tokens(run, run.base.kind.format.text(row["prompt"] + row["completion"]))


def _tokens(run: Run, text: str) -> list[int]:
    return run.tokenizer(text, add_special_tokens=False)["input_ids"]


# --- template and tokenizer


@change("F10")
def template_without_end(run: Run, rng: random.Random) -> None:
    run.tokenizer.chat_template = with_format(run.base, end="").jinja()


@change("F12")
def template_of_another_family(run: Run, rng: random.Random) -> None:
    roles = (("system", "S"), ("user", "U"), ("assistant", "A"))
    run.tokenizer.chat_template = with_format(run.base, header="### {role}:\n", bos="", roles=roles).jinja()


@change("F08", needs=Needs.BOS)
def template_begins_twice(run: Run, rng: random.Random) -> None:
    run.tokenizer.chat_template = f"{run.tokenizer.bos_token}{run.tokenizer.chat_template}"


@change("F08", needs=Needs.BOS)
def rendered_texts_begin_twice(run: Run, rng: random.Random) -> None:
    """A text column that was rendered before, and a tokenizer that begins every text itself."""
    from tokenizers.processors import TemplateProcessing

    begin, number = run.tokenizer.bos_token, run.tokenizer.bos_token_id
    run.rows = [{"text": run.base.kind.format.text(row["prompt"] + row["completion"])} for row in run.rows]
    begins = TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, number)])
    run.tokenizer.backend_tokenizer.post_processor = begins


@change("F17")
def ends_masked_by_id(run: Run, rng: random.Random) -> None:
    """transformers' collator masks by id, and the pad is the end."""
    from transformers import DataCollatorForLanguageModeling

    run.tokenizer.pad_token = run.tokenizer.eos_token
    run.rows = as_messages(run.rows)
    by_id = DataCollatorForLanguageModeling(run.tokenizer, mlm=False)
    run.collator = lambda run: lambda rows: by_id([{"input_ids": row["input_ids"]} for row in rows])
