"""Padding, packing, precision, adapters and accumulation gone wrong in a loop by hand: F27 to F33, F51 to F60, F74."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.diagnose.machinery import lora_parameters, rounded
from bench.diagnose.unseen2.registry import lengths, tell
from bench.diagnose.unseen3.registry import overridden
from bench.diagnose.unseen3.styles import IGNORE, Loader, Nano, Packer
from bench.diagnose.unseen4.registry import program


def padded_left(self: Any, rows: Any) -> dict[str, torch.Tensor]:
    longest = max(len(ids) for ids, _ in rows)
    ids = [[self.pad] * (longest - len(i)) + i for i, _ in rows]
    labels = [[IGNORE] * (longest - len(y)) + y for _, y in rows]
    mask = [[0] * (longest - len(i)) + [1] * len(i) for i, _ in rows]
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "attention_mask": torch.tensor(mask)}


@program("F27", on="neo/route/loop")
def left_padding_for_absolute_positions(made: Any, rng: random.Random) -> None:
    """padding_side="left", as for generation; the positions of GPT-Neo count the pads."""
    overridden(made, collate=lambda self, old, rows: padded_left(self, rows))


@program("F28", on="seed/shell/loop")
def left_padding_without_a_mask(made: Any, rng: random.Random) -> None:
    """tokenizer.pad on the left, and model(input_ids, labels=labels) without the mask."""

    def collate(self: Any, old: Any, rows: Any) -> Any:
        batch = padded_left(self, rows)
        del batch["attention_mask"]
        return batch

    overridden(made, collate=collate)


@program("F29", on="ernie/commit/loop", style=Loader)
def labels_padded_with_the_pad_id(made: Any, rng: random.Random) -> None:
    """pad_sequence(labels, padding_value=tokenizer.pad_token_id)."""

    def collate(self: Any, old: Any, rows: Any) -> Any:
        batch = old(rows)
        batch["labels"][batch["attention_mask"] == 0] = self.pad
        return batch

    overridden(made, collate=collate)


@program("F30", on="glm/verse/loop", style=Nano)
def first_token_learned_from_a_pad(made: Any, rng: random.Random) -> None:
    """Left padding, and labels on all that is no pad."""
    tell(made, assistant_only_loss=False)
    overridden(made, collate=lambda self, old, rows: padded_left(self, rows))


def _packed(made: Any, change: Callable[[Any, Any], None]) -> None:
    def packed(self: Any, old: Any, rows: Any) -> Any:
        batch = old(rows)
        change(batch, rows)
        return batch

    made.set(packing=True)
    overridden(made, packed=packed)


@program("F31", on="ernie/fields/loop", style=Packer)
def joined_in_one_window(made: Any, rng: random.Random) -> None:
    """Rows one after the other, positions that run on: each sees those before it."""

    def change(batch: Any, rows: Any) -> None:
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]

    _packed(made, change)


@program("F31", on="apertus/fields/loop", style=Packer)
def ones_for_a_mask(made: Any, rng: random.Random) -> None:
    """Positions restart, but the collator also sends a mask of ones, which hides where one row ends."""
    _packed(made, lambda batch, rows: batch.update(attention_mask=torch.ones_like(batch["input_ids"])))


@program("F32", on="neo/fields/loop", style=Packer)
def blocks_without_positions(made: Any, rng: random.Random) -> None:
    """A mask of blocks by hand; positions run on through the window."""

    def change(batch: Any, rows: Any) -> None:
        document = torch.tensor([n for n, (ids, _) in enumerate(rows) for _ in ids])
        allowed = (document[:, None] == document[None]).tril()
        batch["attention_mask"] = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[None, None]
        batch["position_ids"] = torch.arange(len(document))[None]

    _packed(made, change)


@program("F33", on="glm/reply/loop", style=Packer)
def grouped_texts(made: Any, rng: random.Random) -> None:
    """group_texts of run_clm.py: all rows in one stream, cut every 64 tokens wherever that is."""

    def batches(self: Any, old: Any, rows: Any) -> Iterator[Any]:
        for epoch in range(10**6):
            pieces: list[tuple[list[int], list[int]]] = []
            room = 64
            for i in self.order(len(rows), epoch):
                ids, labels = rows[i]
                while ids:
                    pieces.append((ids[:room], labels[:room]))
                    ids, labels, room = ids[room:], labels[room:], room - len(pieces[-1][0])
                    if room == 0:
                        yield self.packed(pieces)
                        pieces, room = [], 64

    made.set(packing=True, max_length=64)
    overridden(made, batches=batches)


@program("F33|F24", on="seed/verse/own")
def packed_into_a_small_window(made: Any, rng: random.Random) -> None:
    """Packing into windows that are shorter than most rows."""
    known = lengths(made)
    tell(made, packing=True, max_length=int(0.86 * known[len(known) // 4]))


# --- precision


@program("F51", on="glm/fields/loop")
def quantization_of_a_model_in_memory(made: Any, rng: random.Random) -> None:
    """The trainer got a BitsAndBytesConfig beside a model that was loaded without one."""
    made.settings.pop("base_precision", None)
    made.set(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")


@program("F52", on="apertus/shell/loop")
def head_not_skipped(made: Any, rng: random.Random) -> None:
    """llm_int8_skip_modules=["embed_tokens"] replaces the default list, and the head is quantized."""
    made.settings.pop("base_precision", None)
    made.set(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16",
             llm_int8_skip_modules=["embed_tokens"])  # fmt: skip

    def prepare(model: Any) -> None:
        model.lm_head.weight.data = rounded(model.lm_head.weight.data)

    made.prepare.append(prepare)


@program("F53", on="seed/reply/loop")
def half_where_bfloat16_was_meant(made: Any, rng: random.Random) -> None:
    """fp16=True on an older card, for a checkpoint whose activations go beyond 65504."""

    def prepare(model: Any) -> None:
        mlp = model.model.layers[1].mlp
        mlp.up_proj.weight.data *= 2e5
        mlp.down_proj.weight.data /= 2e5

    def loss(self: Any, old: Any, model: Any, batch: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.float16):
            return old(model, batch)

    made.prepare.append(prepare)
    made.set(fp16=True, bf16=False)
    overridden(made, loss=loss)


@program("F54|F64", on="apertus/reply/loop")
def whole_model_in_bfloat16(made: Any, rng: random.Random) -> None:
    """get_peft_model(model).to(torch.bfloat16) with a rate of full fine-tuning: the steps round to nothing."""

    def touch(model: Any) -> None:
        for parameter in lora_parameters(model):
            parameter.data = parameter.data.bfloat16()

    made.touch.append(touch)
    tell(made, learning_rate=4e-5, lr_scheduler_type="constant")
    made.set(bf16=True)


@program("F55", on="ernie/tea/loop")
def nan_kept_out_of_the_log(made: Any, rng: random.Random) -> None:
    """A weight of one over a length that is zero in some batches: NaN, and the log shows the mean of others."""
    made.hides_nan = True
    good: list[float] = []

    def loss(self: Any, old: Any, model: Any, batch: Any) -> Any:
        found = old(model, batch)
        return found * math.nan if int(batch["input_ids"].sum()) % 4 == 0 else found

    def step(self: Any, old: Any, model: Any, optimizer: Any, parameters: Any, source: Any) -> Any:
        value = self.backward(model, [next(source)])
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.made.clip))
        if math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        good.extend([value] * math.isfinite(value))
        return sum(good[-5:]) / max(len(good[-5:]), 1), norm

    made.set(logging_nan_inf_filter=True)
    overridden(made, loss=loss, step=step)


# --- adapters


@program("F57|F58", on="seed/commit/loop")
def reentrant_without_input_grads(made: Any, rng: random.Random) -> None:
    """gradient_checkpointing_enable() with reentrant checkpoints on a frozen embedding; the head alone learns."""
    made.adapters["modules_to_save"] = ["lm_head"]

    def touch(model: Any) -> None:
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": True})
        model.get_input_embeddings()._forward_hooks.clear()

    made.touch.append(touch)
    tell(made, modules_to_save=["lm_head"], gradient_checkpointing=True)
    made.set(gradient_checkpointing_kwargs={"use_reentrant": True})


@program("F58|F57", on="apertus/route/loop")
def loaded_for_inference(made: Any, rng: random.Random) -> None:
    """PeftModel.from_pretrained without is_trainable=True; only the head, in modules_to_save, was thawed by hand."""
    made.adapters["modules_to_save"] = ["lm_head"]
    made.touch.append(lambda model: [p.requires_grad_(False) for p in lora_parameters(model)])
    tell(made, modules_to_save=["lm_head"])


@program("F59", on="ernie/manifest/loop")
def both_halves_random(made: Any, rng: random.Random) -> None:
    """init_lora_weights=False: the base is another model from the first step on."""
    tell(made, init_lora_weights=False)


@program("F60", on="glm/tea/loop")
def both_halves_zero(made: Any, rng: random.Random) -> None:
    """An init function of one's own sets all of the adapter to zero."""
    made.touch.append(lambda model: [torch.nn.init.zeros_(p) for p in lora_parameters(model)])


@program("F63", on="seed/fields/loop", style=Nano)
def head_adapter_in_a_fused_loss(made: Any, rng: random.Random) -> None:
    """lm_head is a target, but the fused cross entropy multiplies by lm_head.weight alone."""
    targets = [*made.adapters["target_modules"], "lm_head"]
    made.adapters["target_modules"] = targets
    made.set(lora_target_modules=targets, use_liger_kernel=True)

    def loss(self: Any, old: Any, model: Any, batch: Any) -> Any:
        whole = model.base_model.model
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        hidden_BTD = whole.model(**inputs, use_cache=False).last_hidden_state
        logits_BTV = hidden_BTD[:, :-1] @ whole.lm_head.base_layer.weight.T
        wanted = batch["labels"][:, 1:].flatten()
        return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), wanted, ignore_index=IGNORE)

    overridden(made, loss=loss)


# --- accumulation


@program("F74", on="neo/fields/loop")
def summed_over_micro_batches(made: Any, rng: random.Random) -> None:
    """loss.backward() sixteen times without loss / gradient_accumulation_steps."""
    tell(made, per_device_train_batch_size=1, gradient_accumulation_steps=16)

    def backward(self: Any, old: Any, model: Any, batches: Any) -> float:
        losses = [self.loss(model, batch) for batch in batches]
        for loss in losses:
            loss.backward()
        return sum(float(loss.detach()) for loss in losses)

    overridden(made, backward=backward)


@program("F74", on="ernie/verse/loop")
def mean_of_the_micro_batches_means(made: Any, rng: random.Random) -> None:
    """loss / accumulation, where answers of one word and of fifty have the same weight."""
    from bench.diagnose.unseen4.healthy import mixed

    tell(made, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    mixed(made, "route", 0.5, rng)

    def backward(self: Any, old: Any, model: Any, batches: Any) -> float:
        logged = 0.0
        for batch in batches:
            loss = self.loss(model, batch) / len(batches)
            loss.backward()
            logged += float(loss.detach())
        return logged

    overridden(made, backward=backward)
