"""Rules on settings, trace, saved tensors and rows: each finds its fault, and no look-alike."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny import FAMILIES

from solotune.dataset import Example
from solotune.diagnosis.catalogue import FAULTS
from solotune.diagnosis.rules import GrowingRun, Rule, ask_all, rules
from solotune.diagnosis.run_facts import RunFacts, Saved, Settings, Trace

LLAMA = FAMILIES["llama"]().to_dict()
USUAL: dict[str, Any] = {
    "learning_rate": 2e-4, "lora_r": 8, "lora_alpha": 16, "lora_target_modules": ["q_proj", "v_proj"],
    "lr_scheduler_type": "linear", "warmup_steps": 0, "optim": "adamw_torch", "max_grad_norm": 1.0, "weight_decay": 0.0,
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_length": 512, "bf16": True,
}  # fmt: skip
STEPS = 100
HALF = np.arange(STEPS) >= 50
ZERO = np.where(HALF, 0.0, 2e-4)
HEADINGS = ("Sees:", "Why:", "Not:", "Fix:", "Wrong when:", "Source:")


def trace(**changed: Any) -> Trace:
    """A clean run of a hundred steps, all logged."""
    step = np.arange(1, STEPS + 1)
    values: dict[str, Any] = {
        "step_S": step, "loss_S": 2.5 * np.exp(-step / 40) + 0.5, "learning_rate_S": 2e-4 * (1 - step / STEPS),
        "grad_norm_S": np.linspace(2.0, 0.5, STEPS), "epoch_S": step / 50, "eval_step_E": np.array([25, 50, 75, 100]),
        "eval_loss_E": np.array([1.9, 1.3, 1.0, 0.8]), "total_steps": STEPS, "is_finished": True,
    }  # fmt: skip
    return Trace(**{**values, **changed})


def ended_at(step: int, error: str) -> Trace:
    """A clean run that ended with an error after this step."""
    whole = trace()
    names = ("step_S", "loss_S", "learning_rate_S", "grad_norm_S", "epoch_S")
    parts = {name: getattr(whole, name)[:step] for name in names}
    return replace(whole, **parts, is_finished=False, errors=(error,), eval_step_E=ZERO[:0], eval_loss_E=ZERO[:0])


def adapter(
    b: float = 0.1, a: float = 0.1, prefix: str = "base_model.model.", rank: int = 8
) -> dict[str, torch.Tensor]:
    """An adapter of the tiny Llama as PEFT saves it."""
    found = {}
    for layer in range(2):
        for name, outside in (("q_proj", 64), ("v_proj", 32)):
            path = f"{prefix}model.layers.{layer}.self_attn.{name}"
            found[f"{path}.lora_A.weight"] = torch.full((rank, 64), a)
            found[f"{path}.lora_B.weight"] = torch.full((outside, rank), b)
    return found


def run_facts(settings: dict[str, Any] | None = None, asked: dict[str, Any] | None = None, **parts: Any) -> RunFacts:
    return RunFacts("test", Settings({**USUAL, **(settings or {})}, asked or {}), **parts)


def rows(lengths: list[int], first: int = 1, last: int = 2) -> list[Example]:
    """Distinct rows that begin and end with these ids."""
    made = []
    for number, length in enumerate(lengths):
        ids = np.concatenate(([first], 3 + (np.arange(length - 2) * 7 + number) % 100, [last])).astype(np.int32)
        made.append(Example(ids, np.arange(length) >= length // 2, f"row {number}", []))
    return made


def said(one: RunFacts, least: float = 0.5) -> set[str]:
    signals, unasked = ask_all(one)
    assert not [why for why in unasked.values() if "failed" in why], "no rule stumbles"
    return {s.code for s in signals if s.weight >= least and not s.against and s.kind != "remark"}


UPWARDS = np.linspace(2e-6, 1e-4, STEPS)
RESTART = np.where(HALF, 2e-4 * (1 - (np.arange(STEPS) - 50) / 60), 2e-4 * (1 - np.arange(STEPS) / 60))
JUMPED = np.where(np.arange(STEPS) > 60, 4.8, trace().loss_S)
SPIKED = np.where(np.arange(STEPS) == 60, 400.0, trace().grad_norm_S)
OOM = "File loop.py, line 8, in {}\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 4 GiB"
CHATS = [
    [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {i}"}] for i in range(40)
]


NO_ANSWER = {"role": "assistant", "content": ""}
FALLING = 3 * np.exp(-np.arange(STEPS) / 20)
COSINE = 1e-4 * (1 + np.cos(np.pi * np.arange(1, STEPS + 1) / STEPS))
REENTRANT = {"use_reentrant": True, "gradient_checkpointing": True}


def chats(change: Any) -> list[list[dict[str, Any]]]:
    return [[change(i, dict(message)) for message in chat] for i, chat in enumerate(CHATS)]


FAULTY: list[tuple[str, RunFacts]] = [
    ("F01", run_facts(trace=trace(errors=("CUDA Setup failed despite GPU being available",)))),
    ("F01", run_facts({"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"},
                    environment={"BNB_CUDA_VERSION": "117", "cuda_runtime": "12.8"})),
    ("F02", run_facts({"max_length": 1024}, {"max_seq_length": 256})),
    ("F02", run_facts(trace=trace(errors=("TypeError: __init__() got an unexpected keyword argument 'tokenizer'",)))),
    ("F03", run_facts({"learning_rate": 5e-5}, {"learning_rate": 2e-4})),
    ("F05", run_facts(model_config={**LLAMA}, saved=Saved({**adapter(), "base_model.model.model.embed_tokens.weight":
                                                         torch.ones(100, 64)}, {}))),
    ("F25", run_facts({"rows_in": 100, "rows_out": 60})),
    ("F26", run_facts({"max_length": 40}, train=[*rows([20, 25, 30] * 10), *rows([40] * 12, first=50)])),
    ("F34", run_facts(conversations=chats(lambda i, m: NO_ANSWER if i % 3 == 0 and m["role"] != "user" else m))),
    ("F35", run_facts(conversations=chats(lambda i, m: {**m, "content": "I cannot."} if m["role"] != "user" else m))),
    ("F36", run_facts(conversations=chats(lambda i, m: {**m, "role": {"user": "human"}.get(m["role"], m["role"])}))),
    ("F36", run_facts(conversations=[[chat[0], *chat] for chat in CHATS])),
    ("F37", run_facts(conversations=chats(lambda i, m: {**m, "content": "é à la maison".encode().decode("latin-1")}))),
    ("F39", run_facts(train=rows([20, 24, 28] * 3) * 6)),
    ("F40", run_facts({"shuffle": False}, train=rows(list(range(10, 60))))),
    ("F41", run_facts({"dataloader_num_workers": 4, "num_train_epochs": 1}, train=rows([20] * 100), trace=trace())),
    ("F42", run_facts(train=rows([20] * 99 + [500]), trace=ended_at(60, OOM.format("forward")))),
    ("F43", run_facts({"dataset": "a.jsonl", "eval_dataset": "a.jsonl"})),
    ("F46", run_facts(trace=trace(eval_loss_E=np.array([1.5, 1.2, 1.6, 2.1]), loss_S=FALLING))),
    ("F47", run_facts({"assistant_only_loss": True, "eval_assistant_only_loss": False})),
    ("F48", run_facts({"validation_rows": 3, "train_rows": 480})),
    ("F49", run_facts({"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"},
                    model_config={**LLAMA, "quantization_config": {"quant_method": "awq"}})),
    ("F50", run_facts({"load_in_4bit": True})),
    ("F51", run_facts({"load_in_4bit": False}, {"load_in_4bit": True})),
    ("F52", run_facts({"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16", "llm_int8_skip_modules": ["gate"]})),
    ("F53", run_facts({"fp16": True, "bf16": False}, trace=trace(loss_S=np.where(HALF, np.nan, 2.0)))),
    ("F54", run_facts({"adapter_dtype": "bfloat16", "learning_rate": 2e-5}, model_config=LLAMA)),
    ("F55", run_facts(trace=trace(grad_norm_S=np.where(np.arange(STEPS) % 5 == 4, np.nan, 1.0)))),
    ("F56", run_facts({"lora_target_modules": ["q_proj", "v_proj", "c_attn"]}, model_config=LLAMA)),
    ("F56", run_facts({"lora_target_modules": ["q_proj", "c_fc"]}, saved=Saved(adapter(), {}))),
    ("F57", run_facts(REENTRANT, saved=Saved(adapter(b=0), {}), trace=trace())),
    ("F58", run_facts(trace=trace(grad_norm_S=np.zeros(STEPS), loss_S=np.full(STEPS, 2.41)))),
    ("F59", run_facts({"init_lora_weights": False})),
    ("F60", run_facts(saved=Saved(adapter(0, 0), {}))),
    ("F61", run_facts({"lora_alpha": 0})),
    ("F61", run_facts({"lora_alpha": 16384})),
    ("F61", run_facts(saved=Saved(adapter(), {"r": 8, "lora_alpha": 8}))),
    ("F63", run_facts({"lora_target_modules": ["q_proj", "lm_head"], "use_liger_kernel": True})),
    ("F64", run_facts({"learning_rate": 1e-7})),
    ("F65", run_facts({"warmup_steps": 80}, trace=trace())),
    ("F65", run_facts({"warmup_ratio": 0.7, "warmup_steps": None, "max_steps": 100})),
    ("F65", run_facts(trace=trace(learning_rate_S=UPWARDS))),
    ("F66", run_facts(trace=trace(learning_rate_S=ZERO))),
    ("F66", run_facts(trace=trace(learning_rate_S=2e-4 * (1 - np.arange(STEPS) / 1000)))),
    ("F67", run_facts({"learning_rate": 0.1}, model_config={**LLAMA, "hidden_size": 2048})),
    ("F67", run_facts(trace=trace(loss_S=JUMPED, grad_norm_S=SPIKED))),
    ("F68", run_facts({"max_grad_norm": 1e-8})),
    ("F68", run_facts({"max_grad_norm": 1e-4, "optim": "sgd"}, trace=trace())),
    ("F69", run_facts({"weight_decay": 1000.0}, trace=trace())),
    ("F70", run_facts(trace=ended_at(0, "in optimizer.step\n" + OOM.format("step")))),
    ("F71", run_facts({"gradient_checkpointing": False}, trace=ended_at(1, OOM.format("mlp")))),
    ("F72", run_facts(trace=trace(errors=(OOM.format("cross_entropy"),)))),
    ("F73", run_facts(trace=trace(errors=("torch._dynamo hit config.recompile_limit (8)",)))),
    ("F74", run_facts({"gradient_accumulation_steps": 8}, trace=trace(loss_S=8 * trace().loss_S))),
    ("F75", run_facts(saved=Saved({}, {"r": 8}))),
    ("F75", run_facts(saved=Saved(adapter(b=0), {}))),
    ("F77", run_facts(trace=trace(learning_rate_S=RESTART, seams=(50,)))),
    ("F77", run_facts(trace=trace(seams=(50,)), saved=Saved(adapter(), {}, optimizer_present=False))),
    ("F78", run_facts(model_config=LLAMA, saved=Saved(adapter(prefix="model."), {}))),
    ("F78", run_facts(model_config=LLAMA, saved=Saved(adapter(prefix="base_model.model.base_model.model."), {}))),
]  # fmt: skip


@pytest.mark.parametrize(("code", "faulty"), FAULTY, ids=[f"{code}-{i}" for i, (code, _) in enumerate(FAULTY)])
def test_a_fault_is_seen(code, faulty):
    assert code in said(faulty)


HEALTHY: dict[str, RunFacts] = {
    "usual": run_facts(train=rows([20, 30, 40] * 20), conversations=CHATS, model_config=LLAMA, trace=trace(),
                     saved=Saved(adapter(), {"r": 8, "lora_alpha": 16})),
    "a high rate of a narrow model": run_facts({"learning_rate": 6e-3}, model_config=LLAMA),
    "clip 1e-4 with AdamW": run_facts({"max_grad_norm": 1e-4}, trace=trace()),
    "weight decay 0.1": run_facts({"weight_decay": 0.1}, trace=trace()),
    "alpha/r 4": run_facts({"lora_alpha": 32}),
    "bf16 adapters at 2e-4": run_facts({"adapter_dtype": "bfloat16"}),
    "PiSSA": run_facts({"init_lora_weights": "pissa"}, saved=Saved(adapter(), {"init_lora_weights": "pissa"})),
    "padding side left": run_facts({"padding_side": "left"}),
    "sorted file, shuffled": run_facts({"shuffle": True}, train=rows(list(range(10, 60)))),
    "inference_mode as PEFT saves it": run_facts(saved=Saved(adapter(), {"inference_mode": True}), trace=trace()),
    "a run that was stopped early": run_facts(trace=trace(total_steps=400, is_finished=False,
                                                        learning_rate_S=2e-4 * (1 - np.arange(STEPS) / 400))),
    "a run that is warming up": run_facts({"warmup_steps": 150}, trace=trace(total_steps=2000, is_finished=False,
                                                                          learning_rate_S=UPWARDS)),
    "constant rate": run_facts({"lr_scheduler_type": "constant"}, trace=trace(learning_rate_S=np.full(STEPS, 2e-4))),
    "cosine to its end": run_facts({"lr_scheduler_type": "cosine"},
                                 trace=trace(learning_rate_S=COSINE)),
    "a final folder has no optimizer": run_facts(saved=Saved(adapter(), {}, optimizer_present=False), trace=trace()),
    "a resumption without a kink": run_facts(saved=Saved(adapter(), {}, optimizer_present=True, scheduler_present=True),
                                           trace=trace(seams=(50,))),
    "high loss of a hard task": run_facts(trace=trace(loss_S=7.2 - np.arange(STEPS) / 1000, eval_loss_E=np.full(4, 7.1))),
    "a tiny data set": run_facts({"num_train_epochs": 20}, train=rows([20, 22, 24, 26])),
    "not English": run_facts(conversations=chats(lambda i, m: {**m, "content": f"Ça va très bien à Zürich, {i} fois"})),
    "4 bits with their dtype": run_facts({"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}),
    "float32 on purpose": run_facts({"load_in_4bit": True, "bf16": False, "fp16": False}),
    "bitsandbytes' own 4 bits": run_facts(
        {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"},
        model_config={**LLAMA, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    ),
    "asked as it held": run_facts(asked={"learning_rate": "2e-4", "r": 8, "max_seq_length": 512}),
    "first gradients large": run_facts(trace=trace(grad_norm_S=np.where(np.arange(STEPS) < 2, 80.0, 0.5))),
    "merged and quantized, as is usual": run_facts({"merged_into": "int4"}),
    "a copy of the base under another name": run_facts({"model_name_or_path": "/models/llama3"}, model_config=LLAMA,
                                saved=Saved(adapter(), {"base_model_name_or_path": "meta-llama/Llama-3.2-1B"})),
    "a schedule that is not known rises again": run_facts({"lr_scheduler_type": None},
                                                          trace=trace(learning_rate_S=RESTART)),
    "DoRA beside LoRA": run_facts(saved=Saved({**adapter(), "base_model.model.model.layers.0.self_attn.q_proj"
                                             ".lora_magnitude_vector": torch.ones(64)}, {})),
}  # fmt: skip


@pytest.mark.parametrize("name", HEALTHY)
def test_odd_but_healthy_runs_have_no_fault(name):
    assert said(HEALTHY[name], least=0.25) == set()


def test_every_fault_has_a_rule_in_its_suspects_file_that_explains_it():
    known = rules()
    assert list(known) == list(FAULTS)
    for code, own in known.items():
        assert own[0].suspect == FAULTS[code].suspect
        missing = [heading for heading in HEADINGS if heading not in own[0].doc]
        assert own[0].doc.startswith(f"{code}: ") and not missing, (code, missing)


def test_rules_do_not_fail_on_empty_facts():
    signals, unasked = ask_all(RunFacts("nothing", Settings({})))
    assert not [why for why in unasked.values() if "failed" in why]
    assert not signals and "F66" in unasked and unasked["F75"] == "nothing was saved"


def test_an_untrained_embedding_is_seen_in_the_model_and_not_where_it_is_trained():
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES["llama"]())
    model.resize_token_embeddings(130, mean_resizing=True)
    model.get_input_embeddings().weight.requires_grad_(False)
    from solotune.diagnosis.run_facts import LiveModel

    one = run_facts(train=rows([20, 30, 40], last=129), live=lambda: LiveModel(model, []))
    assert {signal.code for signal in ask_all(one, loads=True)[0]} >= {"F06"}
    covered = replace(one, settings=Settings({**USUAL, "trainable_token_indices": [129]}))
    other = replace(one, train=rows([20, 30, 40]))
    for healthy in (covered, other):
        assert "F06" not in {signal.code for signal in ask_all(healthy, loads=True)[0]}


def test_a_model_that_should_be_quantised_and_a_head_that_should_not():
    from solotune.diagnosis.run_facts import LiveModel

    model = transformers.AutoModelForCausalLM.from_config(FAMILIES["llama"]())
    one = run_facts({"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}, live=lambda: LiveModel(model, []))
    assert "F51" in {signal.code for signal in ask_all(one, loads=True)[0]}
    layer = next(module for name, module in model.named_modules() if name.endswith("q_proj"))
    packed = layer.weight.detach().clone()
    layer.weight.data = (packed * 50).round().clamp(-7, 7) / 50  # values of four bits, unpacked
    assert "F51" not in {signal.code for signal in ask_all(one, loads=True)[0]}
    layer.weight.data = packed
    head = model.get_output_embeddings()
    plain = run_facts(live=lambda: LiveModel(model, []))
    assert "F52" not in {signal.code for signal in ask_all(plain, loads=True)[0]}
    head.weight.data = (head.weight.data * 300).round().clamp(-8, 7) / 300
    assert "F52" in {signal.code for signal in ask_all(plain, loads=True)[0]}


@pytest.mark.parametrize(
    ("code", "one"), [pytest.param(code, one, id=code) for code, one in FAULTY if one.trace is not None]
)
def test_a_growing_curve_is_judged_as_a_whole_one(code, one):
    growing, whole = GrowingRun(replace(one, trace=None)), one.trace
    part = {name: value[:9] for name, value in vars(whole).items() if isinstance(value, np.ndarray)}
    for curve in (None, replace(whole, **part, errors=(), is_finished=False), whole):
        assert growing.signals(curve) == ask_all(replace(one, trace=curve))[0]
    assert code in {signal.code for signal in growing.signals(whole)}


def test_a_growing_curve_runs_only_the_rules_that_read_it(monkeypatch):
    asked: Counter[Rule] = Counter()
    signals = Rule.signals
    monkeypatch.setattr(Rule, "signals", lambda rule, facts: asked.update([rule]) or signals(rule, facts))
    growing = GrowingRun(run_facts(train=rows([50] * 8), conversations=CHATS))
    for curve in (None, trace(), trace()):
        growing.signals(curve)
    times = {code: {asked[rule] for rule in rules()[code]} for code in ("F34", "F38", "F66")}
    assert times == {"F34": {1}, "F38": {1}, "F66": {2}}, "the chats are read once, the rate wherever there is a curve"
