"""bench.recipe_step measures a run of `solotune train` on full rows, and the docs quote commands that it takes."""

from __future__ import annotations

import json
import re
import shlex
import statistics
from pathlib import Path

import pytest
from ranks import Ranks

import solotune
from bench import recipe_step
from bench.recipe_step import RECIPE
from solotune.config.load import load_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LENGTH = 24
TINY = (f"max_length={LENGTH}", "lora_r=4", "use_cpu=true")


@pytest.fixture
def arguments(chat_model):
    def make(*words):
        return recipe_step.parser().parse_intermixed_args([str(chat_model), *TINY, *words])

    return make


def resolved(run):
    """The config that a run recorded, without where it lies."""
    return load_config(run / "config.yaml").model_dump(exclude={"output_dir"})


def test_the_bench_trains_with_the_config_that_solotune_train_records(arguments, chat_model, tmp_path):
    options = ["--steps", "3", "--targets", "all", "--base-precision", "nf4", "--memory-budget", "2GiB"]
    found = recipe_step.measure(arguments(*options), tmp_path)
    by_hand = [f"model_name_or_path={chat_model}", f"dataset={tmp_path / 'rows.jsonl'}", "dataset_split=train", *TINY]
    by_hand += ["gradient_accumulation_steps=2", "validation_size=0", "save_strategy=no", "max_steps=3"]
    by_hand += ["lora_target_modules=all-linear", "base_precision=nf4", "memory_budget=2GiB"]
    plain = solotune.train(RECIPE, [*by_hand, f"output_dir={tmp_path / 'plain'}"])
    assert resolved(found.run) == resolved(plain.run_dir)
    assert load_config(found.run / "config.yaml").base_residency != "auto"  # the plan has chosen
    result = found.to_json()
    chosen = {choice["key"] for choice in result["predicted"]["choices"]}
    assert chosen == {"gradient_checkpointing", "base_residency"}
    assert result["choices"] == [f"{choice.key}: {choice.value}" for choice in plain.choices]
    plan = json.loads((plain.run_dir / "plan.json").read_text())["predicted"]
    assert result["predicted"]["choices"] == plan["choices"]
    assert result["predicted"]["peak_gib"] == round(plan["peak_bytes"] / 2**30, 2)


def test_every_row_has_max_length_tokens_and_the_first_two_steps_do_not_count(arguments, tmp_path):
    found = recipe_step.measure(arguments("--steps", "5"), tmp_path)
    steps = found.clock.steps
    assert [step.num_tokens for step in steps] == [8 * LENGTH] * 5
    assert [step.num_supervised for step in steps] == [8 * (LENGTH - 1)] * 5  # nothing predicts a row's first token
    result = found.to_json()
    assert result["step_seconds"] == round(statistics.median(step.step_seconds for step in steps[2:]), 3)
    assert result["tokens_per_second"] == round(statistics.median(step.tokens_per_second for step in steps[2:]))
    assert len(result["losses"]) == 5


def test_rows_that_are_not_full_are_refused(arguments, tmp_path):
    with pytest.raises(SystemExit, match="rows of 24 tokens were meant"):
        recipe_step.measure(arguments("--steps", "3", "overflow=split"), tmp_path)


def test_too_few_steps_are_refused(arguments, tmp_path):
    with pytest.raises(SystemExit, match="2 whole steps, of which the first 2 do not count"):
        recipe_step.measure(arguments("--steps", "2"), tmp_path)


def test_chats_are_packed_and_the_last_step_of_the_epoch_does_not_count(arguments, chat_config, tmp_path):
    args = arguments("--chats", chat_config["dataset"], "per_device_train_batch_size=2", "max_length=64")
    found = recipe_step.measure(args, tmp_path)
    config = load_config(found.run / "config.yaml")
    assert config.packing and config.num_train_epochs == 1
    assert found.timed == found.clock.steps[2:-1]
    tokens = json.loads((found.run / "data.json").read_text())["tokens"]["total"]
    assert sum(step.num_tokens for step in found.clock.steps) == tokens


def test_the_table_names_the_command_and_json_is_one_object(chat_model, capsys):
    words = [str(chat_model), "--steps", "3", *TINY]
    recipe_step.main(words)
    card, _, head, _, row = capsys.readouterr().out.splitlines()
    command = f"python -m bench.recipe_step {chat_model.name} --steps 3 {' '.join(TINY)}"
    assert card.startswith("CPU, torch ") and head.startswith("| command | tokens/s | peak GiB |")
    assert f"`{command}`" in row and "base_residency: dequantized" in row
    recipe_step.main([*words, "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["command"] == command and result["tokens_per_second"] > 0


@pytest.mark.ranks
@pytest.mark.parametrize("sharding", ["false", "true"])
def test_two_ranks_take_rows_for_both_and_the_first_prints(sharding, chat_model, tmp_path):
    words = [str(chat_model), "--steps", "4", "--json", *TINY, f"base_sharding={sharding}"]
    ranks = Ranks(2, lambda rank: recipe_step.main(words) or 0, tmp_path)
    assert ranks.ends() == [0, 0], ranks.said(0) + ranks.said(1)
    result = json.loads(ranks.said(0).splitlines()[-1])
    assert (result["ranks"], len(result["losses"])) == (2, 4)
    assert result["command"].startswith("torchrun --standalone --nproc-per-node=2 -m bench.recipe_step ")
    assert ranks.said(1) == ""


def quoted():
    """The arguments of each command in the tables of README and engine.md."""
    pages = README + (ROOT / "bench" / "results" / "engine.md").read_text(encoding="utf-8")
    return sorted(set(re.findall(r"`python -m bench\.recipe_step ([^`]+)`", pages)))


@pytest.mark.parametrize("words", quoted())
def test_commands_of_the_tables_are_ones(words):
    args = recipe_step.parser().parse_intermixed_args(shlex.split(words))
    load_config(RECIPE, recipe_step.recipe_overrides(args))


def test_each_of_our_rows_in_the_readme_has_its_command():
    ours = [line for line in README.splitlines() if re.match(r"\| solotune.*\d{2},\d{3} \|", line)]
    assert len(ours) == 3 and all(re.search(r"`python -m bench\.recipe_step MODEL[^`]*` \|$", row) for row in ours)
