"""A packed row has the loss and the gradient it has alone; a model that mixes packed rows is refused."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from inline_snapshot import snapshot
from tiny import FAMILIES, VOCAB, random_rows

from solotune.dataset import sampler
from solotune.dataset.collate import collate, collate_packs
from solotune.errors import InputError
from solotune.model.loading import load_model
from tests.messages import stable

CPU = torch.device("cpu")


def gradients(model):
    grads = [p.grad.clone() for p in model.trainable]
    for p in model.trainable:
        p.grad = None
    return grads


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "opt"])
def test_losses_and_gradients_are_those_of_one_row_at_a_time(family, attention, tiny_config):
    model = load_model(tiny_config(family, packing=True, attn_implementation=attention), CPU, torch.float32)
    for layer in model.lora_layers.values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    rows = random_rows(7)
    rows[1].loss_mask[:] = True  # even so, its first token has no predecessor to learn from
    packs = [rows[:3], rows[3:6], rows[6:]]  # of different lengths, so some are padded too
    packed, hits = model.token_losses(collate_packs(packs, CPU))
    packed.sum().backward()
    packed_grads = gradients(model)
    alone = []
    for row in rows:
        losses, _ = model.token_losses(collate([row], CPU))
        losses.sum().backward()
        alone.append(losses.detach())
    alone_grads = gradients(model)
    torch.testing.assert_close(packed.detach(), torch.cat(alone), rtol=1e-5, atol=1e-5)
    assert hits.shape == packed.shape
    largest = max(grad.abs().max().item() for grad in alone_grads)
    for ours, theirs in zip(packed_grads, alone_grads, strict=True):
        assert (ours - theirs).abs().max().item() <= 1e-5 * largest


BLOOM = transformers.BloomConfig(vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4)


@pytest.mark.parametrize("architecture", [BLOOM, FAMILIES["opt"]()], ids=["bloom", "opt"])
def test_a_model_that_lets_packed_rows_see_each_other_is_refused(architecture, tiny_config, tmp_path):
    """Bloom's ALiBi and OPT's position table count from an attention mask and know no restarting positions."""
    model = transformers.AutoModelForCausalLM.from_config(architecture)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "model")
    keys = {"model_name_or_path": str(tmp_path / "model")}
    load_model(tiny_config(**keys), CPU, torch.float32)
    with pytest.raises(InputError) as caught:
        load_model(tiny_config(**keys, packing=True), CPU, torch.float32)
    assert re.sub(r"0\.\d+", "N", stable(caught.value)) == snapshot("""\
python, packing: rows of a packed sequence see each other in this model
  seen:    a token's loss changes by N on average when its row is packed with other rows
  allowed: models and attention implementations that follow position_ids that restart at each row
  change:  packing: false\
""")


def test_packs_train_on_every_row_once_an_epoch(tiny_config):
    rows = random_rows(50)
    config = tiny_config(
        packing=True, per_device_train_batch_size=1, gradient_accumulation_steps=2, num_train_epochs=1.0
    )
    packs = sampler.pack_sequences(config.batches, rows)
    assert len(packs) < 20
    schedule = sampler.BatchSampler.of(config.batches, len(packs))
    seen = [row for step in schedule.steps(0) for micro in step for i in micro for row in packs[i]]
    assert sorted(seen) == list(range(50))
