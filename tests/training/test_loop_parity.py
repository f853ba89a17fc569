"""The step against transformers + peft + plain torch, float32, 20 steps: every loss and every adapter gradient."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import random_rows
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM, get_scheduler

from solotune.dataset import sampler
from solotune.dataset.collate import collate
from solotune.model.loading import load_model
from solotune.training import loop
from solotune.training.optimizer import learning_rate_at, make_optimizer

CPU = torch.device("cpu")
STEPS = 20


class Reference:
    """The recipe written by hand on Hugging Face's stack: one pass over the whole batch, mean over its labels."""

    def __init__(self, config, folder, lora_layers):
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        targets = sorted({name.rpartition(".")[2] for name in lora_layers})
        self.model = get_peft_model(
            base, LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=0.0, target_modules=targets)
        )
        parameters = dict(self.model.named_parameters())
        self.adapter = [
            parameters[f"base_model.model.{name}.{part}.default.weight"]
            for name in lora_layers
            for part in ("lora_A", "lora_B")
        ]
        ours = [p for layer in lora_layers.values() for p in (layer.lora_A, layer.lora_B)]
        for theirs, our in zip(self.adapter, ours, strict=True):
            theirs.data.copy_(our.data)
        self.optimizer = torch.optim.AdamW(self.adapter, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.scheduler = get_scheduler(config.lr_scheduler_type, self.optimizer, config.warmup_steps, STEPS)
        self.model.train()

    def step(self, rows, max_grad_norm):
        batch = collate(rows, CPU)
        lengths = torch.tensor([len(row.input_ids) for row in rows])
        mask = (torch.arange(batch.input_ids_BT.shape[1]) < lengths[:, None]).long()
        labels = torch.where(batch.label_mask_BT, batch.input_ids_BT, -100)
        loss = self.model(input_ids=batch.input_ids_BT, attention_mask=mask, labels=labels).loss
        loss.backward()
        norm = clip_grad_norm_(self.adapter, max_grad_norm)
        grads = [p.grad.clone() for p in self.adapter]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return loss.item(), norm.item(), grads


def run_ours(config, rows):
    """Losses, norms and clipped gradients of 20 steps through the product's own `train_step`."""
    model = load_model(config, CPU, torch.float32)
    schedule = sampler.BatchSampler.of(config.batches, len(rows))
    optimizer = make_optimizer(config.optimizer, model.trainable)
    history, order = [], []
    optimizer.register_step_pre_hook(lambda *_: history[-1].append([p.grad.clone() for p in model.trainable]))
    model.module.train()
    for step, micro_batches in enumerate(schedule.steps(0)):
        batches = [collate([rows[i] for i in chosen], CPU) for chosen in micro_batches]
        order.append([i for chosen in micro_batches for i in chosen])
        history.append([])
        optimizer.param_groups[0]["lr"] = learning_rate_at(config.schedule, step, schedule.total_steps)
        result = loop.train_step(model, batches, optimizer, config.max_grad_norm)
        history[-1][:0] = [result.loss, result.grad_norm]
    return model, history, order


def recipe(tiny_config, family, size, accumulation):
    return tiny_config(
        family,
        max_steps=STEPS,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        lr_scheduler_type="cosine",
        warmup_steps=3,
        weight_decay=0.01,
        gradient_checkpointing=True,
        max_grad_norm=0.5,
    )


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma", "phi", "gpt2"])
def test_twenty_steps_equal_transformers_peft_and_torch(family, tiny_config, model_folder):
    rows = random_rows(40)
    config = recipe(tiny_config, family, 2, 4)
    fresh = load_model(config, CPU, torch.float32)
    reference = Reference(config, model_folder(family), fresh.lora_layers)
    _, history, order = run_ours(config, rows)
    assert len(history) == STEPS
    for (loss, norm, grads), chosen in zip(history, order, strict=True):
        their_loss, their_norm, their_grads = reference.step([rows[i] for i in chosen], config.max_grad_norm)
        assert loss == pytest.approx(their_loss, rel=1e-5)
        assert norm == pytest.approx(their_norm, rel=1e-4)
        largest = max(g.abs().max().item() for g in their_grads)
        for ours, theirs in zip(grads, their_grads, strict=True):
            assert (ours - theirs).abs().max().item() <= 1e-5 * largest


def test_one_pass_of_eight_rows_is_eight_passes_of_one(tiny_config):
    rows = random_rows(40)
    _, whole, _ = run_ours(recipe(tiny_config, "llama", 8, 1), rows)
    _, single, _ = run_ours(recipe(tiny_config, "llama", 1, 8), rows)
    for (loss, norm, grads), (loss1, norm1, grads1) in zip(whole, single, strict=True):
        assert loss == pytest.approx(loss1, rel=1e-5)
        assert norm == pytest.approx(norm1, rel=1e-5)
        largest = max(g.abs().max().item() for g in grads)
        for a, b in zip(grads, grads1, strict=True):
            assert (a - b).abs().max().item() <= 1e-5 * largest
