"""Folders of Hugging Face's Trainer: what is read of them, what they cannot say, and what is never run."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from tiny import chat_rows

from solotune.dataset.chat import template_sandbox
from solotune.diagnosis.findings import Finding
from solotune.diagnosis.rules import ask_all
from solotune.diagnosis.sources import hf_rows, hf_settings, hf_trainer, pickle_reader, trl_preprocessing
from solotune.errors import InputError


@pytest.fixture(scope="module")
def output(tmp_path_factory, chat_model) -> Path:
    """A run of Trainer with a PEFT adapter, with checkpoints; beside it the config and the data."""
    folder = tmp_path_factory.mktemp("trainer")
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat_rows(40)))
    (folder / "sft.yaml").write_text(
        f"model_name_or_path: {chat_model}\nlearning_rate: 1e-3\nmax_seq_length: 64\nlora_rank: 4\n"
        "train_on_inputs: false\ntraining_arguments:\n  lr_scheduler: linear\n"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(chat_model)
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(chat_model),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    rows = [tokenizer.apply_chat_template(row["messages"], return_dict=False) for row in chat_rows(40)]

    def collate(chosen):
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["ids"]) for row in chosen], batch_first=True)
        return {"input_ids": ids, "labels": ids.masked_fill(ids == 0, -100), "attention_mask": (ids != 0).long()}

    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "output"), max_steps=6, logging_steps=1, save_steps=3, learning_rate=1e-3,
        per_device_train_batch_size=4, use_cpu=True, report_to=[], remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=[{"ids": ids} for ids in rows], data_collator=collate,
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    trainer.save_state()
    trainer.save_model()
    return folder / "output"


def named(run_facts) -> set[str]:
    """Faults that rules on this subject are more likely than not sure of."""
    return {signal.code for signal in ask_all(run_facts)[0] if signal.weight >= 0.5 and not signal.against}


def test_a_good_folder_is_read_whole_and_nothing_speaks_against_it(output):
    run_facts = hf_trainer.from_folder(output, output.parent / "sft.yaml", str(output.parent / "chats.jsonl"))
    get = run_facts.settings.get
    assert (get("learning_rate"), get("lora_r"), get("lora_alpha"), get("max_length")) == (1e-3, 4, 8, 64)
    assert get("assistant_only_loss") is True and get("lr_scheduler_type") == "linear"
    assert run_facts.settings.sources["max_length"] == "sft.yaml line 3"
    assert run_facts.trace is not None and run_facts.trace.step_S.tolist() == [1, 2, 3, 4, 5, 6]
    assert run_facts.trace.total_steps == 6 and run_facts.trace.is_finished
    assert run_facts.saved is not None and len(run_facts.saved.adapter) == 8
    assert len(run_facts.train) == 40 and run_facts.model_config["model_type"] == "llama"
    assert "solotune renders" in run_facts.missing["batches"]
    assert named(run_facts) == set()
    live = run_facts.live() if run_facts.live else None
    assert live is not None and float(live.model(**live.batches[0]).loss) < 20


def test_evaluation_data_that_is_not_here_hides_no_training_rows(output, tmp_path):
    """LLaMA-Factory's configs name it as dataset_info.json does."""
    config = tmp_path / "sft.yaml"
    config.write_text((output.parent / "sft.yaml").read_text() + "eval_dataset: desk_eval\n")
    run_facts = hf_trainer.from_folder(output, config, str(output.parent / "chats.jsonl"))
    assert len(run_facts.train) == 40 and run_facts.live is not None
    assert run_facts.missing["validation"] == "the evaluation data desk_eval is not here"
    project = tmp_path / "project"
    shutil.copytree(output.parent, project)
    (project / "desk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat_rows(45)[40:]))
    (project / "dataset_info.json").write_text(json.dumps({"desk_eval": {"file_name": "desk.jsonl"}}))
    run_facts = hf_trainer.from_folder(project / "output", config, str(project / "chats.jsonl"))
    assert (len(run_facts.train), len(run_facts.validation)) == (40, 5)
    assert run_facts.found["evaluation rows"] == "../desk.jsonl (its name is in the config)"


LOOPS = "{% for a in range(9999) %}{% for b in range(9999) %}{{ range(9999) | sum }}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("template", [None, LOOPS], ids=["good", "loops"])
@pytest.mark.parametrize("marked", [True, False])
def test_trls_rows_are_rendered_in_the_sandbox(output, chat_model, monkeypatch, template, marked):
    """As `apply_chat_template` renders them, which would run the template of a foreign folder here, without limits."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(chat_model)
    marker = "{% generation %}{{ m['content'] }}{% endgeneration %}"
    tokenizer.chat_template = template or tokenizer.chat_template.replace("{{ m['content'] }}", marker)
    expected: list = []
    for row in chat_rows(3) if template is None else ():
        expected.append(tokenizer.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=marked
        ))  # fmt: skip
    monkeypatch.setattr(type(tokenizer), "apply_chat_template", lambda *_, **__: pytest.fail("rendered in here"))
    monkeypatch.setattr(template_sandbox, "CPU_SECONDS", 0.2)
    template_sandbox.sandbox().close()
    sft = trl_preprocessing.arguments({"assistant_only_loss": marked})
    made = trl_preprocessing.prepare(str(output.parent / "chats.jsonl"), "train", tokenizer, sft)
    template_sandbox.sandbox().close()
    assert (made is None) == (template is not None)
    for row, one in zip(made.examples if made else [], expected, strict=False):
        assert row.input_ids.tolist() == one["input_ids"]
        assert row.loss_mask.astype(int).tolist() == (one["assistant_masks"] if marked else [1] * len(row.input_ids))


def test_rows_are_judged_with_the_generation_config_of_the_folder(output, monkeypatch):
    found = [Finding("F39", "duplicates", "S8", "warning", "copies", {}, "remove them")]
    for checked, expected in (([], None), (found, found)):
        monkeypatch.setattr(hf_rows, "check_rows", lambda *_, checked=checked: checked)
        run_facts = hf_trainer.from_folder(output, output.parent / "sft.yaml", str(output.parent / "chats.jsonl"))
        assert run_facts.findings == expected


def test_a_template_that_was_put_beside_the_adapter_is_that_of_serving(output, tmp_path):
    """The newest checkpoint has the template of the run."""
    folder = shutil.copytree(output, tmp_path / "copy")
    served = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(served)
    run_facts = hf_trainer.from_folder(folder)
    trained = run_facts.tokenizer.chat_template
    assert (run_facts.settings.get("serving_template"), run_facts.settings.get("chat_template")) == (served, trained)
    assert trained != served and "F11" in named(run_facts)
    assert "F11" not in named(hf_trainer.from_folder(output))


def test_a_checkpoint_alone_and_a_folder_with_checkpoints_alone(output, tmp_path):
    alone = hf_trainer.from_folder(output / "checkpoint-3")
    assert alone.trace is not None and alone.trace.step_S[-1] == 3 and alone.saved is not None
    for name in ("checkpoint-6", "checkpoint-3"):
        shutil.copytree(output / name, tmp_path / name)
    inside = hf_trainer.from_folder(tmp_path)
    assert inside.trace is not None and inside.trace.step_S[-1] == 6 and inside.saved is not None
    assert inside.live is None and "--dataset" in inside.missing["train"]


def test_without_its_base_the_static_rules_still_answer(output, tmp_path):
    for name in ("trainer_state.json", "training_args.bin", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((output / name).read_bytes())
    config = json.loads((output / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "/nowhere/base", "lora_alpha": 4096})
    )
    run_facts = hf_trainer.from_folder(tmp_path)
    assert run_facts.live is None and "/nowhere/base" in run_facts.missing["live"]
    assert named(run_facts) == {"F61"}


def test_a_name_that_the_trainer_does_not_read_is_named(output, tmp_path):
    """Held: 1024, as the arguments say; asked: 256 under the old name."""
    asked, _ = hf_settings.read(output.parent / "sft.yaml")
    run_facts = hf_trainer.from_folder(output)
    told = type(run_facts.settings)({**run_facts.settings.values, "max_length": 1024}, asked=asked)
    import dataclasses

    assert "F02" in named(dataclasses.replace(run_facts, settings=told))


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"log_history": [', b"[]", b'{"log_history": [null, 3, {"loss": "x"}]}']
)
def test_a_torn_state_is_missing_and_no_more(output, tmp_path, content):
    (tmp_path / "adapter_config.json").write_bytes((output / "adapter_config.json").read_bytes())
    (tmp_path / "trainer_state.json").write_bytes(content)
    run_facts = hf_trainer.from_folder(tmp_path)
    assert run_facts.trace is None or not len(run_facts.trace.step_S)
    ask_all(run_facts)


def test_a_state_with_nan_keeps_its_places(tmp_path):
    history = [{"step": 1, "loss": 2.0, "grad_norm": 1.0}, {"step": 2, "loss": 1.9, "grad_norm": float("nan")},
               {"step": 3, "loss": 1.9, "grad_norm": float("nan")}, {"step": 3, "eval_loss": float("nan")}]  # fmt: skip
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history, "max_steps": 9, "global_step": 3}))
    run_facts = hf_trainer.from_folder(tmp_path)
    assert run_facts.trace is not None and not run_facts.trace.is_finished
    assert named(run_facts) == {"F55"}


def test_a_config_that_is_none_is_bad_input(output, tmp_path):
    (tmp_path / "list.yaml").write_text("- a\n")
    (tmp_path / "torn.yaml").write_text("a: [1\n")
    for name in ("list.yaml", "torn.yaml", "nowhere.yaml"):
        with pytest.raises(InputError):
            hf_trainer.from_folder(output, tmp_path / name)


def test_the_words_of_other_tools_mean_ours(tmp_path):
    found = hf_settings.translated(
        {"sequence_len": 512, "lr": "2e-4", "lora_target_linear": True, "train_on_inputs": True, "torch_dtype": "fp16",
         "quantization_bit": 4, "gradient_checkpointing_kwargs": {"use_reentrant": True}, "bf16": "auto",
         "datasets": [{"path": "a.jsonl", "type": "chat"}]}
    )  # fmt: skip
    assert found == {
        "max_length": 512, "learning_rate": 2e-4, "lora_target_modules": "all-linear", "assistant_only_loss": False,
        "model_dtype": "float16", "load_in_4bit": True, "use_reentrant": True, "dataset": "a.jsonl",
    }  # fmt: skip


class Evil:
    """Runs code where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_read_and_not_run(tmp_path, zipped):
    arguments = transformers.TrainingArguments(output_dir="x", learning_rate=3e-4, use_cpu=True, report_to=[])
    arguments.extra = Evil(tmp_path / "touched")
    file = tmp_path / "training_args.bin"
    torch.save(arguments, file, _use_new_zipfile_serialization=zipped)
    name, found = pickle_reader.attributes(file)
    assert name.endswith("TrainingArguments") and found["learning_rate"] == 3e-4
    assert found["lr_scheduler_type"] == "linear", "an enum is its value"
    assert "extra" not in found and not (tmp_path / "touched").exists()


class Scheduler:
    """An enum as Python 3.11.2 writes it."""

    def __reduce__(self):
        return (getattr, (transformers.SchedulerType, "COSINE_WITH_RESTARTS"))


@pytest.mark.parametrize("protocol", [2, 4])
def test_an_enum_of_every_python_is_its_value(tmp_path, protocol):
    arguments = transformers.TrainingArguments(output_dir="x", use_cpu=True, report_to=[])
    arguments.lr_scheduler_type = Scheduler()  # type: ignore[assignment]
    file = tmp_path / "training_args.bin"
    file.write_bytes(pickle.dumps(arguments, protocol=protocol))
    assert pickle_reader.attributes(file)[1]["lr_scheduler_type"] == "cosine_with_restarts"


def test_pickles_that_are_damaged_endless_or_large_are_refused(tmp_path):
    whole = pickle.dumps({"a": 1}, protocol=4)
    again = b"\x80\x02" + b"]q\x00" + b"".join(b"(" + b"h\x00" * 200 + b"e" for _ in range(50)) + b"."
    for content in (b"", whole[:-3], b"\x80\x05.", b"(" * 10_000, b"not a pickle", again):
        (tmp_path / "a.bin").write_bytes(content)
        with pytest.raises(pickle_reader.UnreadableError):
            pickle_reader.attributes(tmp_path / "a.bin")
    with zipfile.ZipFile(tmp_path / "bomb.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"0" * (pickle_reader.MAX_BYTES + 1))
    with pytest.raises(pickle_reader.UnreadableError):
        pickle_reader.attributes(tmp_path / "bomb.bin")


# --- what TRL makes of rows, and what its config leaves out (trl itself is not needed)

ROWS = [
    {"prompt": [{"role": "user", "content": f"ask {i}"}],
     "completion": [{"role": "assistant", "content": f"say {i} now"}]}
    for i in range(12)
]  # fmt: skip


def made(tmp_path, chat_model, rows, **told):
    """The rows as SFTTrainer makes them, with the chat model's tokenizer."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = transformers.AutoTokenizer.from_pretrained(chat_model)
    found = trl_preprocessing.prepare(str(file), "train", tokenizer, trl_preprocessing.arguments(told))
    assert found is not None
    return tokenizer, found


def test_completions_are_learned_of_rows_that_have_them_and_of_no_others(tmp_path, chat_model):
    tokenizer, by_default = made(tmp_path, chat_model, ROWS)
    row = by_default.examples[3]
    assert tokenizer.decode(row.input_ids[row.loss_mask]).startswith("say 3 now") and by_default.learns_answers
    _, whole = made(tmp_path, chat_model, ROWS, completion_only_loss=False)
    assert whole.examples[3].loss_mask.all() and not whole.learns_answers
    chats = [{"messages": row["prompt"] + row["completion"]} for row in ROWS]
    _, asked = made(tmp_path, chat_model, chats, completion_only_loss=True)
    assert asked.examples[3].loss_mask.all() and asked.learns_answers, "TRL finds no completion there, without a word"


def test_rows_are_cut_dropped_and_packed_as_trl_does(tmp_path, chat_model):
    tokenizer, whole = made(tmp_path, chat_model, ROWS)
    lengths = [len(row.input_ids) for row in whole.examples]
    begins = [int(row.loss_mask.argmax()) for row in whole.examples]
    _, none = made(tmp_path, chat_model, ROWS, max_length=min(begins) + 1)
    assert none.rows_in == 12 and all(row.loss_mask.any() for row in none.examples)
    _, ends = made(tmp_path, chat_model, ROWS, max_length=6, truncation_mode="keep_end")
    assert (ends.examples[0].input_ids == whole.examples[0].input_ids[-6:]).all()
    told = trl_preprocessing.arguments({"packing": True, "max_length": 2 * max(lengths)})
    fitted = trl_preprocessing.batches_of(whole.examples, tokenizer, told, 2)
    starts = (fitted[0]["position_ids"][0] == 0).nonzero().flatten()
    assert len(starts) >= 4 and (fitted[0]["labels"][0][starts] == -100).all() and "attention_mask" not in fitted[0]
    wrapped = trl_preprocessing.batches_of(whole.examples, tokenizer, {**told, "packing_strategy": "wrapped"}, 2)
    assert "position_ids" not in wrapped[0] and wrapped[0]["input_ids"].shape == (2, 2 * max(lengths))


def test_what_a_config_leaves_out_is_what_its_trainer_takes(output, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((output / name).read_bytes())
    (tmp_path / "axolotl.yaml").write_text("sequence_len: 64\nmicro_batch_size: 2\nlearning_rate: 2e-4\n")
    get = hf_trainer.from_folder(tmp_path, tmp_path / "axolotl.yaml").settings.get
    assert (get("lr_scheduler_type"), get("assistant_only_loss"), get("max_length")) == ("cosine", True, 64)
    (tmp_path / "trl.yaml").write_text("use_peft: true\nmax_length: 64\npacking: false\n")
    settings = hf_trainer.from_folder(tmp_path, tmp_path / "trl.yaml").settings
    assert settings.get("learning_rate") == 2e-5 and settings.sources["learning_rate"].startswith("default")
    assert settings.get("lora_r") == 4, "the adapter's own config outranks a default"


def test_a_cosine_past_its_end_is_a_schedule_of_another_length(output):
    run_facts, step = hf_trainer.from_folder(output), np.arange(1, 61)
    assert run_facts.trace is not None
    ones = dict.fromkeys(("loss_S", "grad_norm_S", "epoch_S"), np.ones(60))
    past_end = 1e-3 * 0.5 * (1 + np.cos(np.pi * step / 20))
    begun_anew = np.where(step <= 20, 1e-3 * (1 - step / 25), 1e-3 * (1 - (step - 20) / 41))
    for rate, code in ((past_end, "F66"), (begun_anew, "F77")):
        trace = replace(run_facts.trace, step_S=step, learning_rate_S=rate, total_steps=60, **ones)
        assert {"F66", "F77"} & named(replace(run_facts, trace=trace)) == {code}
