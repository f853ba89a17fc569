"""Faults of schedule, adapter, precision and loop as other people's programs have them, and what only looks like one.

Each is a log, the settings and what was saved; nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.run_diagnosis import examine
from solotune.diagnosis.run_facts import RunFacts, Saved, Trace
from tests.diagnosis.rules.test_rules import LLAMA, adapter, run_facts

Curve = Callable[[int], float]
RATE, FLAT, MANY = 2e-4, 2.41, 300
WIDE: dict[str, Any] = {**LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "tie_word_embeddings": False}
TIED = {**WIDE, "tie_word_embeddings": True}
HALF_B = {k: v * 0 if "layers.1" in k and "lora_B" in k else v for k, v in adapter().items()}
EXPERT = "base_model.model.model.layers.0.mlp.experts.3.up_proj.lora_"
UNUSED_EXPERT = {**adapter(), f"{EXPERT}A.weight": torch.ones(8, 64), f"{EXPERT}B.weight": torch.zeros(64, 8)}
HEAD = "base_model.model.lm_head.lora_"
TRAINED_HEAD = {**adapter(), f"{HEAD}A.weight": torch.ones(8, 64), f"{HEAD}B.weight": torch.ones(128, 8)}
NESTED = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
NESTED_16 = {**NESTED, "bnb_4bit_compute_dtype": "bfloat16"}
CONSTANT = {"lr_scheduler_type": "constant"}


def log(
    loss: Curve | None = None, rate: Curve | float | None = None, norm: Curve | None = None, steps: int = MANY,
    every: int = 1, evals: list[float] | None = None, **parts: Any,
) -> Trace:  # fmt: skip
    """A run of this many steps: falling loss, linear decay, unless given."""
    logged = range(every, steps + 1, every)
    step = np.array(logged)
    noise = 0.05 * np.random.default_rng(0).standard_normal(len(step))
    falling = loss or (lambda s: 2.5 * np.exp(-2 * s / steps) + 0.5)
    rates = rate if callable(rate) else (lambda s: RATE * (1 - s / steps) if rate is None else rate)
    norms = norm or (lambda s: 0.6)
    loss_S, rate_S, norm_S = (np.array([float(of(s)) for s in logged]) for of in (falling, rates, norms))
    at = np.array([steps // 3, 2 * steps // 3, steps])
    held_out = np.interp(at, step, loss_S) + 0.05 if evals is None else np.array(evals)
    made = Trace(step, loss_S + noise * (loss is None), rate_S, norm_S, step / steps, at, held_out, steps, True)
    return replace(made, **parts)


def stays(s: int) -> float:
    return FLAT + 0.02 * np.sin(7 * s)


def jumps(to: float, at: int = 50) -> Curve:
    return lambda s: 2.4 - 0.004 * s if s < at else to + 0.1 * np.sin(7 * s)


FAULTY: dict[str, tuple[str, RunFacts]] = {
    "a schedule that ends early above zero": ("F66", run_facts(
        {"lr_scheduler_type": "cosine"}, trace=log(rate=lambda s: max(2e-6, RATE * (1 - s / 30))))),
    "a scheduler that steps with each micro-batch": ("F66", run_facts(
        {"gradient_accumulation_steps": 8}, trace=log(rate=lambda s: max(0, RATE * (1 - 8 * s / MANY)), every=10))),
    "a scheduler that never steps": ("F66", run_facts({"lr_scheduler_type": "cosine"}, trace=log(rate=RATE, every=10))),
    "a learning rate of zero from the start": ("F66", run_facts(trace=log(stays, rate=0.0, every=10))),
    "a warm-up counted in micro-batches": ("F65", run_facts(trace=log(stays, lambda s: RATE * s / 2000, every=10))),
    "a warm-up longer than a short run": ("F65", run_facts({"warmup_steps": 100, "max_steps": 40})),
    "1e-7": ("F64", run_facts({**CONSTANT, "learning_rate": 1e-7, "max_steps": 500})),
    "1e-6 and a flat loss": ("F64", run_facts({**CONSTANT, "learning_rate": 1e-6}, trace=log(stays, rate=1e-6))),
    "alpha 0.05": ("F61", run_facts({**CONSTANT, "lora_alpha": 0.05, "lora_r": 64}, trace=log(stays, rate=RATE))),
    "alpha of zero": ("F61", run_facts({"lora_alpha": 0})),
    "alpha taken for alpha / r": ("F61", run_facts(
        {"lora_alpha": 1024}, trace=log(jumps(7.5), norm=lambda s: 900 if s == 50 else 0.5))),
    "a loss that jumps": ("F67", run_facts(
        {**CONSTANT, "learning_rate": 2e-3}, trace=log(jumps(5.5, 200), 2e-3, lambda s: 300 if s == 200 else 1.0))),
    "a loss that jumps between two logged steps": ("F67", run_facts(
        {**CONSTANT, "learning_rate": 2e-2}, trace=log(jumps(7.5), 2e-2, every=20))),
    "NaN in bfloat16": ("F67", run_facts(
        {**CONSTANT, "learning_rate": 5e-2}, trace=log(lambda s: 2.4 if s < 60 else np.nan, rate=5e-2))),
    "clipped to Adam's epsilon": ("F68", run_facts(
        {"max_grad_norm": 1e-7, "lora_r": 64, "lora_target_modules": "all-linear"}, model_config=WIDE)),
    "decay of 100": ("F69", run_facts({"weight_decay": 100.0, "max_steps": 1000})),
    "frozen by a wrapper: evaluations are equal": ("F58", run_facts(
        trace=log(lambda s: FLAT + 0.3 * np.sin(7 * s), evals=[2.3456789] * 3))),
    "half of the layers got nothing": ("F57", run_facts(saved=Saved(HALF_B, {}), trace=log())),
    "zeros logged for NaN in float16": ("F53", run_facts(
        {"fp16": True, "bf16": False},
        trace=log(lambda s: 2.4 if s < 100 else 0.0, norm=lambda s: 1.0 if s < 100 else np.nan, every=10))),
    "adapters trained in float16": ("F53", run_facts({"adapter_dtype": "float16"})),
    "adapters in bfloat16 at 5e-6": ("F54", run_facts(
        {"adapter_dtype": "bfloat16", "learning_rate": 5e-6}, model_config=WIDE)),
    "bfloat16 rounding, not the large scale": ("F54", run_facts(
        {"adapter_dtype": "bfloat16", "learning_rate": 5e-6, "lora_alpha": 512}, model_config=WIDE)),
    "a tied head": ("F63", run_facts({"lora_target_modules": ["q_proj", "lm_head"]}, model_config=TIED)),
    "a tied embedding": ("F63", run_facts({"lora_target_modules": ["q_proj", "embed_tokens"]}, model_config=TIED)),
    "a head beside TRL's fused loss": ("F63", run_facts(
        {"lora_target_modules": ["q_proj", "lm_head"], "tool": "trl"}, model_config=WIDE)),
    "losses that are summed": ("F74", run_facts({"gradient_accumulation_steps": 8}, trace=log(
        lambda s: 8 * (2.5 * np.exp(-s / 150) + 0.5), evals=[1.8, 1.2, 0.85]))),
    "a renamed argument": ("F02", run_facts({"max_length": 1024}, {"max_seq_length": 4096})),
    "an argument of an earlier version": ("F02", run_facts(
        {"per_device_train_batch_size": 8}, {"per_gpu_train_batch_size": 2})),
    "a length by another word": ("F02", run_facts({"max_length": 1024}, {"context_length": 4096})),
    "a batch by DeepSpeed's word": (
        "F02", run_facts({"per_device_train_batch_size": 8}, {"train_micro_batch_size_per_gpu": 2})),
    "epochs with a hyphen": ("F02", run_facts({"num_train_epochs": 3}, {"num-epochs": 1})),
    "clipping by another word": ("F02", run_facts({"max_grad_norm": 1.0}, {"grad_clip": 0.3})),
    "a length that leaves no label, and a loss that falls": ("F02", run_facts(
        {"max_length": 64, "tool": "transformers"}, {"max_seq_length": 64}, trace=log(),
        refusals=[Signal("F25", "invariant", "none of the rows can be used", 0.95)])),
    "float32 in a nested quantization": ("F50", run_facts(
        {"quantization_config": {**NESTED, "bnb_4bit_compute_dtype": "torch.float32"}}, trace=log())),
    "no compute dtype in a nested quantization": ("F50", run_facts({"quantization_config": NESTED}, trace=log())),
    "a head without protection in a nested quantization": ("F52", run_facts(
        {"quantization_config": {**NESTED_16, "llm_int8_skip_modules": ["vision_tower"]}}, model_config=WIDE)),
    "an alternative of a regular expression that matches nothing": ("F56", run_facts(
        {"lora_target_modules": r".*\.(q_proj|v_proj|W_pack)"}, model_config=LLAMA)),
    "a regular expression for another family": ("F56", run_facts(
        {"lora_target_modules": r".*\.(query|value)"}, model_config=LLAMA)),
    "a misspelt argument": ("F02", run_facts({"max_length": 1024}, {"max_lenght": 4096})),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTY)
def test_another_form_of_a_fault_is_named_first(name):
    code, facts = FAULTY[name]
    found = examine(facts, budget=0)
    assert found.verdict == "fault" and found.culprits[0].fault == code, found.culprits


def constant(s: int) -> float:
    return 1.05 + 0.01 * np.sin(7 * s)


HEALTHY: dict[str, RunFacts] = {
    "five steps": run_facts({"max_steps": 5}, trace=log(steps=5)),
    "five steps of warm-up": run_facts(
        {"max_steps": 5, "warmup_steps": 5}, trace=log(rate=lambda s: RATE * s / 5, steps=5)),
    "logged every hundred steps": run_facts(trace=log(steps=600, every=100)),
    "began at the lowest loss, 1e-5": run_facts(
        {**CONSTANT, "learning_rate": 1e-5}, trace=log(constant, rate=1e-5)),
    "spikes that recover": run_facts(trace=log(
        lambda s: 5.0 if s in (100, 150) else 2.5 * np.exp(-s / 100) + 0.5, norm=lambda s: 90 if s == 100 else 0.5)),
    "warm-up, stable, decay": run_facts(
        {"lr_scheduler_type": "warmup_stable_decay"},
        trace=log(rate=lambda s: RATE * min(1, s / 10) * min(1, (MANY - s) / 60))),
    "steps down to a hundredth": run_facts(
        {"lr_scheduler_type": "step"}, trace=log(rate=lambda s: RATE * (1 if s < 150 else 0.1 if s < 225 else 0.01))),
    "warm restarts": run_facts(
        {"lr_scheduler_type": "cosine_with_restarts"},
        trace=log(rate=lambda s: RATE / 2 * (1 + np.cos(np.pi * (s % 100) / 100)))),
    "a minimum rate": run_facts(
        {"lr_scheduler_type": "cosine_with_min_lr"},
        trace=log(rate=lambda s: RATE * (0.1 + 0.45 * (1 + np.cos(np.pi * s / MANY))))),
    "interrupted": run_facts(trace=log(rate=lambda s: RATE * (1 - s / 4 / MANY), total_steps=4 * MANY, is_finished=False)),
    "one row a step": run_facts(
        {"per_device_train_batch_size": 1},
        trace=log(lambda s: 1.6 - s / 100 + 0.6 * np.sin(97 * s), steps=60)),
    "resumed": run_facts(trace=log(seams=(150,))),
    "a loss scaler looks for its factor": run_facts(
        {"fp16": True, "bf16": False}, model_config={**WIDE, "dtype": "bfloat16"},
        trace=log(norm=lambda s: np.inf if s in (1, 2, 3, 200) else 0.5)),
    "learned by heart, rounded to zero": run_facts(
        {"fp16": True, "bf16": False}, trace=log(lambda s: round(2.5 * np.exp(-s / 20), 4), every=10)),
    "an untied head that was trained": run_facts(
        {"lora_target_modules": ["q_proj", "v_proj", "lm_head"]}, model_config={**LLAMA, "tie_word_embeddings": False},
        saved=Saved(TRAINED_HEAD, {}), trace=log()),
    "head and embedding trained whole": run_facts({"modules_to_save": ["lm_head", "embed_tokens"]}, model_config=WIDE),
    "decay 0.1 in a very long run": run_facts(
        {**CONSTANT, "weight_decay": 0.1, "learning_rate": 1e-3, "max_steps": 100_000}),
    "adapters that TRL casts to bfloat16": run_facts(
        {"adapter_dtype": "bfloat16", "learning_rate": 2e-5}, model_config={**WIDE, "hidden_size": 4096}),
    "no gradient norm is logged": run_facts(trace=log(norm=lambda s: 0.0)),
    "an expert without tokens": run_facts(saved=Saved(UNUSED_EXPERT, {}), trace=log()),
    "changed on the command line": run_facts(
        {"learning_rate": 1e-4, "max_length": 2048},
        {"learning_rate": 3e-4, "max_seq_length": 4096, "optim": "adamw_torch_fused"}),
    "the batch of a whole step": run_facts({"per_device_train_batch_size": 8}, {"train_batch_size": 64}),
    "a name with more said after it": run_facts(
        {"lr_scheduler_type": "constant_with_warmup"}, {"lr_scheduler_type": "constant"}, trace=log(rate=RATE)),
    "4 bits in LLaMA-Factory": run_facts({"load_in_4bit": True, "tool": "llama-factory"}),
    "an estimate of memory that a finished run disproves": run_facts(
        {"gradient_checkpointing": False, "memory_bytes": 6e9}, model_config={**WIDE, "num_hidden_layers": 64}, trace=log()),
    "lengths of tools that keep a part of the answer": run_facts(
        {"max_length": 64, "tool": "llama-factory"}, {"cutoff_len": 64}, trace=log()),
    "16 bits in a nested quantization": run_facts(
        {"quantization_config": {**NESTED_16, "llm_int8_skip_modules": ["lm_head"]}}, model_config=WIDE),
    "a regular expression": run_facts(
        {"lora_target_modules": r".*\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"}, model_config=LLAMA),
    "a regular expression for a model with images": run_facts(
        {"lora_target_modules": r"model\.language_model\..*(q_proj|v_proj)"}, model_config=LLAMA),
    "BNB_CUDA_VERSION of a run that took steps": run_facts(
        {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}, trace=log(),
        environment={"BNB_CUDA_VERSION": "117", "cuda_runtime": "12.8"}),
    "evaluations of a hard task, rounded": run_facts(trace=log(stays, evals=[7.1, 7.1, 7.1])),
}  # fmt: skip


@pytest.mark.parametrize("name", HEALTHY)
def test_what_only_looks_like_a_fault_is_a_remark_at_most(name):
    found = examine(HEALTHY[name], budget=0)
    assert found.verdict == "healthy", found.culprits


REMARKS: dict[str, tuple[str, RunFacts]] = {
    "a learning rate for full fine-tuning": ("F64", run_facts({"learning_rate": 2e-5})),
    "a high learning rate": ("F67", run_facts({"learning_rate": 2e-2}, model_config=WIDE)),
    "alpha / r of 256 at 2e-4": ("F61", run_facts({"lora_alpha": 2048})),
    "alpha / r of 1/8": ("F61", run_facts({"lora_alpha": 1})),
    "rank 1 on one kind of module": ("F62", run_facts({"lora_r": 1, "lora_alpha": 2, "lora_target_modules": ["q_proj"]})),
    "a head without a fused loss": ("F63", run_facts({"lora_target_modules": ["q_proj", "lm_head"]}, model_config=WIDE)),
    "a router": ("F63", run_facts({"lora_target_modules": ["q_proj", "gate"]})),
    "a warm-up of a trial": ("F65", run_facts({"warmup_steps": 5, "max_steps": 5})),
    "a large decay for a short time": ("F69", run_facts({"weight_decay": 10.0, "max_steps": 4000})),
    "float16 of a bfloat16 checkpoint": ("F53", run_facts(
        {"fp16": True, "bf16": False}, model_config={**WIDE, "dtype": "bfloat16"})),
    "bfloat16 adapters at 1e-4": ("F54", run_facts({"adapter_dtype": "bfloat16", "learning_rate": 1e-4})),
    "a default that nobody wrote": ("F03", replace(
        run_facts(), settings=replace(run_facts({"learning_rate": 2e-5}).settings,
                                      sources={"learning_rate": "default: not set in the config"}))),
    "4 bits of unknown precision": ("F50", replace(
        run_facts(), settings=replace(run_facts().settings, values={"load_in_4bit": True}))),
}  # fmt: skip


@pytest.mark.parametrize("name", REMARKS)
def test_an_unusual_value_is_a_remark(name):
    code, facts = REMARKS[name]
    found = examine(facts, budget=0)
    assert found.verdict == "healthy" and code in {remark.fault for remark in found.remarks}, found
    assert next(remark for remark in found.remarks if remark.fault == code).fix


RECIPES = list(product((1e-5, 2e-4, 1e-3), (4, 16, 256), (0.5, 2, 4), (False, True), (5, 60, 1000), (0.0, 0.1)))


def test_published_recipes_are_not_accused():
    for rate, rank, times, rslora, steps, share in RECIPES:
        settings = {"learning_rate": rate, "lora_r": rank, "lora_alpha": rank * times, "use_rslora": rslora,
                    "max_steps": steps, "warmup_ratio": share, "warmup_steps": None, "weight_decay": share,
                    "max_grad_norm": 0.3 if share else None}  # fmt: skip
        found = examine(run_facts(settings), budget=0)
        assert found.verdict == "healthy", (settings, found.culprits)


FIXED = {
    "F61": {"lora_alpha": 16}, "F64": {"learning_rate": 2e-4}, "F65": {"warmup_steps": 0, "warmup_ratio": 0.03},
    "F68": {"max_grad_norm": 1.0}, "F69": {"weight_decay": 0.0}, "F63": {"lora_target_modules": ["q_proj"]},
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n, (code, facts) in FAULTY.items() if code in FIXED and facts.trace is None])
def test_the_fix_makes_the_finding_go(name):
    code, facts = FAULTY[name]
    (fix,) = {c.fix for c in examine(facts, budget=0).culprits if c.fault == code}
    key = next(iter(FIXED[code]))
    assert key in fix
    if ": " in fix and code not in ("F61", "F63"):
        assert all(
            f"{k}: {v:g}" in fix or float(fix.split(f"{k}: ")[1].split(",")[0]) == v for k, v in FIXED[code].items()
        )
    values = {**facts.settings.values, **FIXED[code]}
    assert examine(replace(facts, settings=replace(facts.settings, values=values)), budget=0).verdict == "healthy"


TRAINER = """Traceback (most recent call last):
  File "/opt/lib/transformers/trainer.py", line 2600, in _inner_training_loop
    tr_loss_step = self.training_step(model, inputs, num_items_in_batch)
  File "/opt/lib/transformers/trainer.py", line 3900, in training_step
    loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
{}torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 3.12 GiB.
"""
LAYER = """  File "/opt/lib/transformers/models/llama/modeling_llama.py", line 170, in forward
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
  File "/opt/lib/torch/nn/modules/linear.py", line 125, in forward
    return F.linear(input, self.weight, self.bias)
"""
LOSS = """  File "/opt/lib/transformers/models/llama/modeling_llama.py", line 480, in forward
    loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
  File "/opt/lib/transformers/loss/loss_utils.py", line 50, in ForCausalLMLoss
    logits = logits.float()
"""
HEAD_PASS = """  File "/opt/lib/transformers/models/llama/modeling_llama.py", line 470, in forward
    logits = self.lm_head(hidden_states[:, slice_indices, :])
  File "/opt/lib/torch/nn/modules/linear.py", line 125, in forward
    return F.linear(input, self.weight, self.bias)
"""
STEP = """  File "/opt/lib/accelerate/optimizer.py", line 178, in step
    self.optimizer.step(closure)
  File "/opt/lib/torch/optim/adamw.py", line 190, in _init_group
    state["exp_avg_sq"] = torch.zeros_like(p)
"""


@pytest.mark.parametrize(
    ("frames", "code"),
    [(LAYER, "F71"), (LOSS, "F72"), (HEAD_PASS, "F72"), (STEP, "F70")],
    ids=["layer", "loss", "head", "step"],
)
def test_where_memory_ran_out_is_read_from_the_innermost_frame(frames: str, code: str) -> None:
    """Every traceback of a trainer has compute_loss in it."""
    trace = log(steps=1)
    known = run_facts({"gradient_checkpointing": False}, trace=replace(trace, errors=(TRAINER.format(frames),)))
    assert examine(known, budget=0).culprits[0].fault == code


def test_f54_of_float32_files_whose_values_are_bfloat16s() -> None:
    """What was trained in bfloat16 and saved in float32; training in float32 fills the other bits."""
    random = torch.Generator().manual_seed(0)
    full = {name: 0.1 * torch.randn(part.shape, generator=random) for name, part in adapter().items()}
    rounded = {name: part.bfloat16().float() for name, part in full.items()}
    settings, falling = {"learning_rate": 2e-5}, log(rate=lambda s: 2e-5 * (1 - s / MANY))
    for tensors, is_found in ((rounded, True), (full, False)):
        known = run_facts(settings, saved=Saved(tensors, {}), model_config=LLAMA, trace=falling)
        assert ("F54" in {c.fault for c in examine(known, budget=0).culprits}) is is_found
