"""Keys of other tools: each is answered with what works, and none is offered a key that changes another thing."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers

from solotune.config.foreign_keys import CONVERTED, answer, is_allowed, typo_of
from solotune.config.key_aliases import FOREIGN_KEYS, NOT_HERE, PATTERNS, REFUSED_KEYS
from solotune.config.load import load_config
from solotune.config.run_config import RunConfig
from solotune.config.secrets import holds_secret
from solotune.config.yaml_reader import parse, plain
from solotune.errors import InputError

MINIMAL = {"model_name_or_path": "m", "dataset": "d.jsonl"}

# keys that look like a key of solotune but set something else: of TRL, Axolotl, LLaMA-Factory, Unsloth, transformers, PEFT
LOOKALIKES = """use_peft use_kt use_mca use_muon use_ray use_cache use_comet use_pose use_galore use_apollo use_dora
use_qalora use_bdlora use_unsloth use_swanlab max_samples do_sample min_sample_len num_beams num_generation_samples
generate_samples data_seed deepspeed adapter_name_or_path base_model_name_or_path add_tokens add_special_tokens eos_token
pad_token eot_tokens tokens total_num_tokens fix_untrained_tokens adam_beta3 adam_epsilon2 badam_mode badam_verbose
asft_alpha dpo_alpha orpo_alpha ld_alpha lora_bias lora_qkv_kernel lora_on_cpu relora merge_lora module_dropout
dataset_num_proc dataset_processes dataset_prepared_path dataset_shard_num eval_delay
eval_on_start eval_table_size eval_accumulation_steps train_on_eos train_on_eot hub_strategy mix_strategy
packing_strategy train_sampling_strategy logging_first_step save_first_step save_safetensors gc_steps
profiler_warmup_steps jagged_restart_warmup_steps badam_update_ratio relora_prune_ratio
weight_dtype mixed_precision master_port optim_args optim_target_modules galore_target torch_compile_mode
lr_scheduler_kwargs overwrite_output_dir export_dir profiler_output_dir eva_config corda_config fsdp_config
skip_prepare_dataset shuffle_dataset bench_dataset pretraining_dataset min_steps num_iterations peft preflights_x
context_lengths_x reasoning_parser curriculum_sampling auto_mapping tokenizer_config bnb_4bit_quant_storage""".split()


@pytest.mark.parametrize("key", LOOKALIKES)
def test_a_key_that_looks_alike_is_never_offered(key: str) -> None:
    assert typo_of(key) is None
    assert "did you mean" not in answer(key, 1)


def test_no_key_of_transformers_and_peft_is_taken_for_a_typing_error() -> None:
    names = {
        field.name for kind in (transformers.TrainingArguments, peft.LoraConfig) for field in dataclasses.fields(kind)
    }
    known = names - set(RunConfig.model_fields) - set(REFUSED_KEYS) - set(FOREIGN_KEYS)
    assert len(known) > 100
    assert {key: typo_of(key) for key in known if typo_of(key)} == {}


@pytest.mark.parametrize(
    ("typo", "key"),
    [("learning_rte", "learning_rate"), ("lerning_rate", "learning_rate"), ("learningRate", "learning_rate"),
     ("learning-rate", "learning_rate"), ("learningrate", "learning_rate"), ("lora_aplha", "lora_alpha"),
     ("save_step", "save_steps"), ("lora_target_module", "lora_target_modules"), ("maxlength", "max_length"),
     ("gradient_acumulation_steps", "gradient_accumulation_steps"), ("sed", "seed"), ("paking", "packing"),
     ("usecpu", "use_cpu"), ("output-dir", "output_dir"), ("num_train_epoch", "num_train_epochs")],
)  # fmt: skip
def test_a_typing_error_still_is(typo: str, key: str) -> None:
    assert typo_of(typo) == key and f"did you mean {key}?" in answer(typo, 1)


# what people write, and the lines that replace it
CASES: list[tuple[str, Any, dict[str, Any]]] = [
    ("quantization_bit", 4, {"base_precision": "nf4"}),
    ("quantization_bit", 8, {}),
    ("load_in_8bit", False, {}),
    ("adapter", "qlora", {"base_precision": "nf4"}),
    ("adapter", "lora", {"base_precision": "bf16"}),
    ("lora_target", "all", {"lora_target_modules": "all-linear"}),
    ("lora_target", "q_proj, v_proj", {"lora_target_modules": ["q_proj", "v_proj"]}),
    ("lora_target_linear", True, {"lora_target_modules": "all-linear"}),
    ("train_on_inputs", False, {"assistant_only_loss": True}),
    ("train_on_inputs", True, {"assistant_only_loss": False}),
    ("train_on_prompt", True, {"assistant_only_loss": False}),
    ("train_on_responses_only", True, {"assistant_only_loss": True}),
    ("torch_dtype", "bfloat16", {"bf16": True}),
    ("torch_dtype", "float16", {}),
    ("dtype", "torch.float32", {"bf16": False}),
    ("pure_bf16", True, {"bf16": True}),
    ("max_samples", 1000, {"dataset_split": "train[:1000]"}),
    ("max_eval_samples", 50, {"validation_size": 50}),
    ("datasets", [{"path": "a.jsonl", "type": "chat_template"}], {"dataset": "a.jsonl"}),
    ("datasets", [{"path": "a.jsonl"}, {"path": "b.jsonl"}], {"dataset": ["a.jsonl", "b.jsonl"]}),
    ("test_datasets", [{"path": "t.jsonl"}], {"eval_dataset": "t.jsonl"}),
    ("chat_template", "chatml", {}),
    ("chat_template", "own.jinja", {"chat_template_path": "own.jinja"}),
    ("excess_length_strategy", "raise", {"overflow": "error"}),
    ("truncation_strategy", "delete", {"overflow": "drop"}),
    ("dataset_text_field", "body", {"column_mapping": {"body": "text"}}),
    ("saves_per_epoch", 1, {"save_strategy": "epoch"}),
    ("flash_attention", True, {"attn_implementation": "sdpa"}),
    ("use_gradient_checkpointing", "unsloth", {"gradient_checkpointing": True}),
    ("disable_gradient_checkpointing", True, {"gradient_checkpointing": False}),
    ("random_state", 3407, {"seed": 3407}),
    ("lora_rank", 8, {"lora_r": 8}),
    ("cutoff_len", 2048, {"max_length": 2048}),
    ("micro_batch_size", 2, {"per_device_train_batch_size": 2}),
    ("val_set_size", 0.05, {"validation_size": 0.05}),
    ("lr_scheduler", "cosine", {"lr_scheduler_type": "cosine"}),
    ("sample_packing", True, {"packing": True}),
]


def advised(message: str, value: Any) -> dict[str, Any]:
    """The lines of the config that a message says to write; empty if the line is to be removed."""
    if written := re.match(r"write (.*?) instead \(", message):
        return plain(parse(written[1].replace(" and ", "\n"), "the advice"))
    renamed = re.match(r"did you mean (\w+)\?", message)
    return {renamed[1]: value} if renamed else {}


@pytest.mark.parametrize(("key", "value", "lines"), CASES)
def test_what_is_advised_works(key: str, value: Any, lines: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        load_config({**MINIMAL, key: value})
    assert advised(answer(key, value), value) == lines
    assert all(name in str(caught.value) for name in lines) and f"{key}: unknown key; " in str(caught.value)
    load_config({**{name: item for name, item in MINIMAL.items() if name not in lines}, "model_name_or_path": "m",
                 "dataset": "d", **lines})  # fmt: skip


@pytest.mark.parametrize("value", [None, True, False, 0, -1, 3, 1e9, "", "x", [], [1], {}, {"a": 1}, "a" * 5000])
def test_any_value_of_a_foreign_key_has_an_answer(value: Any) -> None:
    for key in (*CONVERTED, *FOREIGN_KEYS, *(key for names in NOT_HERE for key in names.split())):
        assert answer(key, value), key
        assert key in CONVERTED or key not in FOREIGN_KEYS or "did you mean" in answer(key, value)
        if key in CONVERTED:
            assert all(is_allowed(name, item) for name, item in advised(answer(key, value), value).items()), key


def test_no_key_of_ours_stands_among_those_of_others() -> None:
    listed = [key for names in NOT_HERE for key in names.split()]
    assert len(set(listed)) == len(listed)
    assert not {*CONVERTED, *listed} & set(RunConfig.model_fields)
    assert not set(listed) & {*CONVERTED, *FOREIGN_KEYS}
    assert all(PATTERNS.values())


LLAMA_FACTORY = """model_name_or_path: m
quantization_bit: 4
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: identity,alpaca_en_demo
template: qwen
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: saves/x
plot_loss: true
overwrite_output_dir: true
report_to: none
ddp_timeout: 180000000
"""


def test_every_key_of_a_llama_factory_config_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(LLAMA_FACTORY)
    with pytest.raises(InputError) as caught:
        load_config("c.yaml")
    text = str(caught.value)
    foreign = [line.split(":")[0] for line in LLAMA_FACTORY.splitlines()]
    foreign = [key for key in foreign if key not in RunConfig.model_fields]
    assert all(f"{key}: unknown key; " in text for key in foreign)
    assert "num_samples" not in text and "'train[:1000]'" in text and "use_cpu" not in text
    assert "names from dataset_info.json" in text and "[identity.json, alpaca_en_demo.json]" in text


# --- tokens that are no secrets, and secrets

NO_SECRETS: list[tuple[str, Any]] = [
    ("eos_token", "<|im_end|>"), ("eos_token", "im_end"), ("pad_token", "<pad>"), ("bos_token", "[BOS]"),
    ("unk_token", "<unk>"), ("trainable_token_indices", [1, 2]), ("max_new_tokens", 3), ("eos_token_id", 2),
    ("image_token", "IMG"), ("special_tokens", {"pad_token": "x"}), ("token_type_ids", [0]), ("hub_token", None),
    ("use_auth_token", True), ("hub_token", "<HUB_TOKEN>"), ("hf_token", "${HF_TOKEN}"), ("max_token", 100),
    ("ignore_pad_token_for_loss", True), ("mask_token", "[MASK]"),
]  # fmt: skip
TOKEN = "hf_" + "aB3" * 12
ARE_SECRETS: list[tuple[str, Any]] = [
    ("hub_token", "abc123def456"), ("token", "swordfish1"), ("wandb_api_key", "0123456789abcdef" * 2),
    ("wandb", {"api_key": "swordfish"}), ("eos_token", TOKEN), ("datasets", [{"path": "x", "token": "swordfish"}]),
    ("hfToken", "swordfish"), ("hub-password", "swordfish"), ("hub_password", 12345), ("a", {"b": {"c": [TOKEN]}}),
    ("a", "https://x/y.jsonl?token=swordfish"), ("eos_token_api_key", "swordfish"), ("swanlab_lark_secret", "swordfish"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), NO_SECRETS)
def test_a_token_of_a_tokenizer_is_no_secret(key: str, value: Any) -> None:
    assert not holds_secret(key, value)
    if key not in RunConfig.model_fields:
        with pytest.raises(InputError, match=f"{key}: unknown key"):
            load_config({**MINIMAL, key: value})


@pytest.mark.parametrize(("key", "value"), ARE_SECRETS)
def test_a_secret_is_found_wherever_it_stands_and_not_shown(key: str, value: Any) -> None:
    with pytest.raises(InputError, match="looks like a token or password") as caught:
        load_config({**MINIMAL, key: value})
    assert "swordfish" not in str(caught.value) and TOKEN not in str(caught.value) and "12345" not in str(caught.value)


def test_a_column_called_token_is_a_column() -> None:
    assert load_config({**MINIMAL, "column_mapping": {"token": "text"}}).column_mapping == {"token": "text"}


# --- the command line


@pytest.mark.parametrize(
    ("override", "value"),
    [("dataset=chats #2.jsonl", "chats #2.jsonl"), ("dataset=#1.jsonl", "#1.jsonl"), ("dataset=a#b.jsonl", "a#b.jsonl"),
     ("dataset='a # b.jsonl'", "a # b.jsonl"),
     ("dataset= #x", "#x")],
)  # fmt: skip
def test_a_hash_in_an_override_is_not_cut(override: str, value: str) -> None:
    assert load_config(MINIMAL, [override]).dataset == value


@pytest.mark.parametrize("override", ["dataset=[a, b] # c", "dataset='a' # c", "dataset=[a,\n b # c\n]", "dataset=[a #b]",
                                      "column_mapping={a: text} #x"])  # fmt: skip
def test_a_comment_behind_an_override_is_refused(override: str) -> None:
    with pytest.raises(InputError, match="# would begin a comment"):
        load_config(MINIMAL, [override])


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: " + "[" * 1000, "levels deep"), ("a: &x [1]\nb: *x\n", "anchors and aliases"), ("<<: {seed: 1}\n", "merge keys"),
     ("a: {x: 1}\n<<: {y: 1}\n", "merge keys"), ("a: [" + "1," * 9_000 + "1]", "keys and values"),
     ("seed: 0x" + "f" * 20_000, "digits"), ("a: !!python/name:os.system x", "tags"), ("? {a: 1}\n: 2\n", "unknown key")],
)  # fmt: skip
def test_yaml_bombs_and_oddities_are_refused_in_no_time(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"model_name_or_path: m\ndataset: d\n{text}")
    with pytest.raises(InputError, match=words):
        load_config(tmp_path / "c.yaml")
