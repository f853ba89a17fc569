"""Healthy: settings of all sorts, each of which suits its task."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F

from bench.diagnose.unseen2.registry import tell
from bench.diagnose.unseen3.registry import overridden, program
from bench.diagnose.unseen3.styles import IGNORE, Packer, Tutor


@program(on="smol/riddle/loop smol/riddle/own smol/haggle/alone smol/waybill/before smol/diary/loop "
            "said/snip/loop said/mood/own said/ferry/folder said/ledger/before said/steps/alone "
            "fold/persona/own fold/huerta/folder fold/minutes/before fold/haggle/loop hun/lamps/own "
            "hun/lamps/loop hun/lamps/folder hun/steps/before hun/persona/alone phi/ferry/own "
            "phi/ledger/alone phi/diary/loop phi/snip/before phi/mood/folder")  # fmt: skip
def as_people_do(made: Any, rng: random.Random) -> None:
    """An ordinary fine-tuning."""


@program(on="smol/ledger/own said/waybill/folder fold/mood/loop hun/huerta/alone")
def alpha_is_the_rank(made: Any, rng: random.Random) -> None:
    """r = alpha = 16."""
    tell(made, lora_r=16, lora_alpha=16.0)


@program(on="said/huerta/own phi/steps/folder hun/waybill/loop")
def rank_stabilised(made: Any, rng: random.Random) -> None:
    """rsLoRA: alpha over the root of r."""
    tell(made, lora_r=16, lora_alpha=8.0, use_rslora=True)


@program(on="fold/snip/loop hun/ferry/alone phi/waybill/folder said/haggle/before")
def cosine_after_a_warmup(made: Any, rng: random.Random) -> None:
    """Eight steps of warm-up, then a cosine."""
    tell(made, warmup_steps=8, lr_scheduler_type="cosine")


@program(on="said/ledger/own")
def constant_rate(made: Any, rng: random.Random) -> None:
    """No decay, at half the rate."""
    tell(made, lr_scheduler_type="constant", learning_rate=3e-3)


@program(on="hun/snip/own said/waybill/loop")
def micro_batches_of_two(made: Any, rng: random.Random) -> None:
    """Two rows at a time, four times a step."""
    tell(made, per_device_train_batch_size=2, gradient_accumulation_steps=4)


@program(on="smol/mood/loop hun/persona/folder")
def the_whole_text(made: Any, rng: random.Random) -> None:
    """On prompts too, and the config says so."""
    tell(made, assistant_only_loss=False)


@program(on="fold/ferry/own hun/ledger/loop said/snip/alone")
def attention_alone_with_a_high_rank(made: Any, rng: random.Random) -> None:
    """r = 32 on the attention's linears."""
    family = made.base.kind.family
    targets = {"GPTBigCode": ["c_attn", "c_proj"], "Phi": ["q_proj", "k_proj", "v_proj", "dense"]}
    tell(made, lora_r=32, lora_alpha=64.0,
         lora_target_modules=targets.get(family, ["q_proj", "k_proj", "v_proj", "o_proj"]))  # fmt: skip


@program(on="smol/waybill/own fold/diary/loop said/persona/folder phi/ledger/own")
def some_dropout_and_decay(made: Any, rng: random.Random) -> None:
    """Dropout of 0.05, weight decay of 0.1."""
    tell(made, lora_dropout=0.05, weight_decay=0.1)


@program(on="hun/mood/own")
def clipped_at_a_third(made: Any, rng: random.Random) -> None:
    """max_grad_norm of 0.3, as QLoRA's."""
    tell(made, max_grad_norm=0.3)


@program(on="fold/ledger/own smol/ferry/loop")
def clipped_very_low_with_adam(made: Any, rng: random.Random) -> None:
    """max_grad_norm of 0.005: AdamW does not mind."""
    tell(made, max_grad_norm=0.005)


@program(on="said/diary/own")
def twice_as_long(made: Any, rng: random.Random) -> None:
    """More rows and 130 steps."""
    tell(made, max_steps=130, learning_rate=3e-3, lr_scheduler_type="cosine")


@program(on="phi/persona/loop")
def padded_left_with_a_mask(made: Any, rng: random.Random) -> None:
    """Left padding, its mask, answers alone: rotary positions are relative."""

    def collate(self: Any, old: Any, rows: Any) -> Any:
        longest = max(len(ids) for ids, _ in rows)
        padded = [([self.pad] * (longest - len(i)) + i, [IGNORE] * (longest - len(i)) + y) for i, y in rows]
        mask = [[0] * (longest - len(i)) + [1] * len(i) for i, _ in rows]
        return {"input_ids": torch.tensor([i for i, _ in padded]), "labels": torch.tensor([y for _, y in padded]),
                "attention_mask": torch.tensor(mask)}  # fmt: skip

    overridden(made, collate=collate)


@program(on="hun/waybill/loop fold/mood/loop")
def packed_apart(made: Any, rng: random.Random) -> None:
    """A packing of one's own: positions restart and no mask is sent."""
    made.script, made.window, made.accumulation = Packer, 256, 3
    tell(made, packing=True, gradient_accumulation_steps=3)


@program(on="smol/ledger/own fold/diary/before")
def packed_by_the_tool(made: Any, rng: random.Random) -> None:
    """packing: true."""
    tell(made, packing=True, per_device_train_batch_size=2)


@program(on="phi/waybill/alone")
def embeddings_learned_too(made: Any, rng: random.Random) -> None:
    """modules_to_save, on purpose."""
    both = ["embed_tokens", "lm_head"]
    made.adapters["modules_to_save"] = both
    made.set(modules_to_save=both)
    tell(made, learning_rate=3e-3)


@program(on="said/mood/loop hun/ferry/loop")
def ended_early(made: Any, rng: random.Random) -> None:
    """Stopped by hand after three quarters, when the loss was low."""
    made.stop_after = 60


@program(on="smol/ledger/alone said/waybill/alone fold/ferry/folder")
def resumed_with_its_state(made: Any, rng: random.Random) -> None:
    """Resumed from the middle; nothing was lost."""
    made.resumed = lambda checkpoint: None


@program(on="smol/waybill/alone")
def nothing_held_out(made: Any, rng: random.Random) -> None:
    """No evaluation, as in many scripts."""
    made.held_out = []
    made.evaluates = 0


@program(on="said/ferry/loop smol/persona/loop")
def adapters_in_bfloat16(made: Any, rng: random.Random) -> None:
    """At a rate that bfloat16 can follow."""
    made.touch.append(_bfloat16)
    made.set(bf16=True)


def _bfloat16(model: Any) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()


@program(on="phi/mood/loop")
def smoothed_labels(made: Any, rng: random.Random) -> None:
    """Label smoothing of 0.02."""

    def loss(self: Any, old: Any, model: Any, batch: Any) -> Any:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits_BTV = model(**inputs, use_cache=False).logits
        smooth = 0.02 if model.training else 0.0
        return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(),
                               ignore_index=IGNORE, label_smoothing=smooth)  # fmt: skip

    overridden(made, loss=loss)
    made.set(label_smoothing_factor=0.02)


@program(on="said/steps/loop")
def noise_in_training_alone(made: Any, rng: random.Random) -> None:
    """NEFTune, switched off in evaluation."""

    def touch(model: Any) -> None:
        def noisy(module: Any, _given: Any, out: torch.Tensor) -> torch.Tensor:
            size = (out.shape[1] * out.shape[2]) ** 0.5
            return out + torch.empty_like(out).uniform_(-2 / size, 2 / size) if module.training else out

        model.get_input_embeddings().register_forward_hook(noisy)

    made.touch.append(touch)
    made.set(neftune_noise_alpha=2)


@program(on="hun/ledger/own said/snip/own phi/steps/before")
def activations_recomputed(made: Any, rng: random.Random) -> None:
    """Gradient checkpointing."""
    tell(made, gradient_checkpointing=True)


@program(on="smol/snip/loop")
def pissa(made: Any, rng: random.Random) -> None:
    """Initialised from the weights' own directions."""
    tell(made, init_lora_weights="pissa", learning_rate=2e-3)


@program(on="fold/persona/loop")
def another_optimizer(made: Any, rng: random.Random) -> None:
    """NAdam."""
    made.optimizer_class = torch.optim.NAdam
    tell(made, learning_rate=3e-3)
    made.set(optim="nadam")


@program(on="hun/persona/loop")
def loops_of_a_class(made: Any, rng: random.Random) -> None:
    """The template's prefix decides on the labels."""
    made.script = Tutor


@program(on="smol/mood/own phi/diary/folder said/persona/own")
def a_gentle_rate(made: Any, rng: random.Random) -> None:
    """2e-3, which takes longer."""
    tell(made, learning_rate=2e-3, max_steps=110, lr_scheduler_type="constant")


@program(on="hun/ledger/before phi/waybill/own")
def a_brisk_rate(made: Any, rng: random.Random) -> None:
    """9e-3 with a warm-up."""
    tell(made, learning_rate=9e-3, warmup_steps=10)
