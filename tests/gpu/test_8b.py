"""The walkthrough's recipe on the Llama-3.1-8B shape against PEFT + bitsandbytes, on one GPU.

Needs CUDA and SOLOTUNE_8B, a folder with a checkpoint of that shape (random weights do):

    SOLOTUNE_8B=/path/to/model sh scripts/test -n 0 -m gpu tests/gpu
"""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from solotune.config.load import load_config
from solotune.dataset import Example
from solotune.dataset.collate import collate
from solotune.model.frozen_linear import FrozenLinear
from solotune.model.loading import load_model
from solotune.training import loop
from solotune.training.optimizer import make_optimizer

pytestmark = pytest.mark.gpu

FOLDER = os.environ.get("SOLOTUNE_8B", "")
RECIPE = Path(__file__).parents[2] / "examples" / "walkthrough.yaml"
STEPS, ROWS, LENGTH = 6, 4, 512


@pytest.fixture(scope="module")
def config():
    if not FOLDER:
        pytest.skip("SOLOTUNE_8B names no folder")
    # dropout 0: two dropout masks from different generators would be compared with each other, not the losses
    return load_config(RECIPE, [f"model_name_or_path={FOLDER}", "lora_dropout=0.0"])


def random_tokens(count: int, length: int) -> list[Example]:
    """Full rows of ids from 1,000 to 120,000, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 120000, (count, length), generator=generator).numpy().astype(np.int32)
    return [Example(row, np.ones(length, dtype=bool), f"random:{i}", []) for i, row in enumerate(ids)]


def peft_losses(config, initial, rows, upcast):
    """The same steps on transformers + bitsandbytes + PEFT under bfloat16 autocast, as TRL runs them."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        FOLDER, quantization_config=quantised, dtype=torch.bfloat16, device_map={"": 0}
    )
    if upcast:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    peft_config = LoraConfig(
        r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=0.0, target_modules=list(config.lora_target_modules)
    )
    model = get_peft_model(model, peft_config)
    parameters = dict(model.named_parameters())
    adapter = []
    for key, tensor in initial.items():
        parameter = parameters[key.removesuffix(".weight") + ".default.weight"]
        parameter.data = tensor.to(parameter.device, torch.float32)
        adapter.append(parameter)
    weights = {
        name.removeprefix("base_model.model.").removesuffix(".base_layer"): module.weight
        for name, module in model.named_modules()
        if type(module).__name__ == "Linear4bit"
    }
    optimizer = make_optimizer(config.optimizer, adapter)
    losses = []
    for step in range(STEPS):
        batch = collate(rows[step * ROWS : (step + 1) * ROWS], torch.device("cuda"))
        labels = torch.where(batch.label_mask_BT, batch.input_ids_BT, -100)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=batch.input_ids_BT, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, weights


def test_losses_equal_peft_and_bitsandbytes_within_bfloat16_noise(config, capsys):
    from bitsandbytes.functional import dequantize_4bit

    from solotune.model import lora

    rows = random_tokens(STEPS * ROWS, LENGTH)
    model = load_model(config, torch.device("cuda"), torch.bfloat16)
    assert model.num_trainable == 13_631_488
    initial = lora.state_dict(model.lora_layers)
    plain, weights = peft_losses(config, initial, rows, upcast=False)

    frozen = {n.removesuffix(".base"): m for n, m in model.module.named_modules() if isinstance(m, FrozenLinear)}
    assert frozen.keys() == weights.keys()
    for name, theirs in weights.items():
        assert torch.equal(
            frozen[name].storage.dense(torch.bfloat16), dequantize_4bit(theirs.data, theirs.quant_state)
        ), name
    del weights
    gc.collect()
    torch.cuda.empty_cache()
    upcast, _ = peft_losses(config, initial, rows, upcast=True)

    optimizer = make_optimizer(config.optimizer, model.trainable)
    model.module.train()
    ours = []
    for step in range(STEPS):
        batch = collate(rows[step * ROWS : (step + 1) * ROWS], torch.device("cuda"))
        ours.append(loop.train_step(model, [batch], optimizer, config.max_grad_norm).loss)
    difference = max(abs(a - b) for a, b in zip(ours, plain, strict=True))
    noise = max(
        abs(a - b) for a, b in zip(upcast, plain, strict=True)
    )  # the reference against itself, norms in float32
    with capsys.disabled():
        print(f"\nours {ours}\npeft {plain}\npeft, float32 norms and head {upcast}")
        print(f"largest difference {difference:.2e}; the reference's own noise {noise:.2e}")
    assert difference <= max(2 * noise, 2e-3)


def test_the_other_published_count_is_rank_8_on_all_seven(config):
    rank8 = config.replaced("test", lora_r=8, lora_target_modules="all-linear")
    model = load_model(rank8, torch.device("cuda"), torch.bfloat16)
    assert model.num_trainable == 20_971_520


def test_nf4_kernel_on_cuda_equals_its_plain_definition():
    from solotune.model.frozen_linear import NF4Weight

    for shape in ((4096, 1024), (5, 63), (3, 100)):
        for double_quant in (False, True):
            weight = NF4Weight(torch.randn(shape, device="cuda", dtype=torch.bfloat16), double_quant)
            for dtype in (torch.bfloat16, torch.float32):
                assert torch.equal(weight.dense(dtype), weight.dense_reference(dtype)), (shape, double_quant, dtype)
