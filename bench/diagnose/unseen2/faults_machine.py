"""Faults of environment, memory, quantization and precision: told of an 8B model's run, or made on the tiny one."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import torch

from bench.diagnose.loop import default_loss
from bench.diagnose.machinery import activation_limit, in_nf4, of_8b, out_of_memory, rounded
from bench.diagnose.unseen2.registry import program, tell


@program("F01", on="star/tools/loop")
def no_binary_for_this_cuda(made: Any, _rng: random.Random) -> None:
    """BNB_CUDA_VERSION of another machine is set: the library of 4-bit layers is not found."""
    of_8b(made)
    made.environment["BNB_CUDA_VERSION"] = "118"

    @contextlib.contextmanager
    def crash(_step: int) -> Iterator[None]:
        raise RuntimeError(
            "Configured CUDA binary not found at /opt/venv/lib/python3.11/site-packages/bitsandbytes/"
            "libbitsandbytes_cuda118.so\nCUDA Setup failed despite CUDA being available. Please run the following "
            "command to get more information:\n\npython -m bitsandbytes"
        )
        yield

    made.warnings.append(
        "WARNING: BNB_CUDA_VERSION=118 environment variable detected; loading libbitsandbytes_cuda118.so."
    )
    made.crash = crash


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}


@program("F49", on="gemma/units/loop")
def quantised_checkpoint(made: Any, _rng: random.Random) -> None:
    """load_in_4bit on a checkpoint whose name ends in AWQ."""
    of_8b(made, model_name_or_path="shop/Llama-3.1-8B-Instruct-AWQ", load_in_4bit=True)
    made.model_config["quantization_config"] = AWQ
    made.warnings.append("ValueError: The model is quantized with AWQ but you are passing a BitsAndBytesConfig config.")


@program("F49", on="exaone/sql/before")
def quantised_checkpoint_in_solotune(made: Any, _rng: random.Random) -> None:
    """The same in solotune: a GPTQ folder, and base_precision: nf4."""
    made.model_config["quantization_config"] = GPTQ
    tell(made, base_precision="nf4")


@program("F50", on="gemma/conlang/loop")
def four_bits_compute_in_float32(made: Any, _rng: random.Random) -> None:
    """bnb_4bit_compute_dtype was left out, and so it is float32."""
    of_8b(made, bnb_4bit_compute_dtype="float32", load_in_4bit=True)


@program("F51", on="exaone/tools/loop")
def quantization_passed_to_a_built_model(made: Any, _rng: random.Random) -> None:
    """The model was loaded before, and quantization_config reached the trainer, which ignores it."""
    made.set(base_precision="nf4", load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")


@program("F52", on="exaone/greet/loop")
def head_in_four_bits(made: Any, _rng: random.Random) -> None:
    """llm_int8_skip_modules names one module, and lm_head is no longer left out."""
    in_nf4(made, skip=("nothing_at_all",))
    made.set(llm_int8_skip_modules=["vision_tower"])


@program("F53", on="qwen/minutes/loop")
def overflow_in_float16(made: Any, _rng: random.Random) -> None:
    """A model of bfloat16, run in float16 on an old card: its activations are too large."""

    def enlarge(model: Any) -> None:
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.data *= 3e5
            layer.mlp.down_proj.weight.data /= 3e5

    def half(model: Any, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            return default_loss(model, batch, step)

    made.prepare.append(enlarge)
    made.loss_of = half
    made.set(fp16=True, bf16=False)
    made.model_config["dtype"] = "bfloat16"


class Full(torch.optim.AdamW):
    """The states of Adam do not fit."""

    def step(self, closure: Any = None) -> Any:
        raise out_of_memory(3.1 * 2**30)


@program("F70", on="star/sql/loop")
def states_do_not_fit(made: Any, _rng: random.Random) -> None:
    """32-bit Adam on all linears at rank 1024 and the embedding: full at the first optimizer step."""
    of_8b(
        made,
        optim="adamw_torch",
        lora_r=1024,
        modules_to_save=["embed_tokens", "lm_head"],
        lora_target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )
    made.optimizer_class = Full


@program("F71", on="gemma/support/loop")
def activations_do_not_fit(made: Any, _rng: random.Random) -> None:
    """Gradient checkpointing off, rows of 4096 tokens: full in the first forward passes."""
    of_8b(made, gradient_checkpointing=False, max_length=4096, per_device_train_batch_size=8)
    made.crash = activation_limit(made, times=0.5)


@program("F72", on="gemma/minutes/loop")
def logits_do_not_fit(made: Any, _rng: random.Random) -> None:
    """A vocabulary of 256,000 and rows of 8192: full where the loss makes float32 of the logits."""
    of_8b(made, max_length=8192, per_device_train_batch_size=4)
    made.model_config["vocab_size"] = 256000

    def loss_function(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        del labels
        logits = logits.float()
        raise out_of_memory(4 * 8192 * 256000 * 4.0)

    def loss(model: Any, batch: dict[str, torch.Tensor], _step: int) -> torch.Tensor:
        given = {key: value for key, value in batch.items() if key != "labels"}
        return loss_function(model(**given, use_cache=False).logits, batch["labels"])

    made.loss_of = loss


@program("F73", on="star/support/loop")
def compiled_for_every_length(made: Any, _rng: random.Random) -> None:
    """torch_compile with batches of all lengths."""
    made.set(torch_compile=True, use_cpu=False)
    made.warnings.append(
        "torch._dynamo hit config.recompile_limit (8)\n   function: 'forward' (modeling_qwen2.py:214)\n   last reason: "
        "0/7: tensor 'hidden_states' size mismatch at index 1. expected 118, actual 131\nTo log all recompilation "
        'reasons, use TORCH_LOGS="recompiles".'
    )


@program("F76", on="gemma/tools/loop")
def merged_into_16_bits(made: Any, _rng: random.Random) -> None:
    """Trained on weights of four bits; the merged weights are rounded again, to fewer, and the update with them."""

    def coarse(model: Any, levels: int) -> None:
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module.out_features < 600:
                module.weight.data = rounded(module.weight.data, levels)

    def merged(model: Any) -> Any:
        trained = model.merge_and_unload()
        coarse(trained, 4)
        return trained

    made.prepare.append(lambda model: coarse(model, 16))
    made.merged = merged
    made.set(base_precision="nf4", merge_dtype="int4")
