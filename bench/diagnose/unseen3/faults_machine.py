"""Environment, quantization, precision, memory and accumulation gone wrong: F01, F49 to F55, F70 to F74.

A card is not needed: what crashes on one is raised from code with the names that its traceback has, in runs that are
written as those of an 8B model (has_live is False: settings, config, curve and errors are all that is handed over).
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator
from typing import Any

import torch

from bench.diagnose.unseen2.registry import tell
from bench.diagnose.unseen3.registry import overridden, program

SITE = "/opt/conda/lib/python3.11/site-packages/"


def _raised(error: str, frames: list[tuple[str, str]], kind: type[Exception] = RuntimeError) -> None:
    """Raises it as from those files and functions, the outermost first."""
    scope: dict[str, Any] = {"kind": kind, "error": error}
    source = "def call():\n    raise kind(error)\n"
    for file, function in reversed([*frames]):
        exec(compile(source.replace("def call", f"def {function}"), SITE + file, "exec"), scope)
        source = "def call():\n    return inner()\n"
        scope = {"inner": scope[function]}
    scope["inner"]()


def _fails(step: int, error: str, frames: list[tuple[str, str]]) -> Any:
    @contextlib.contextmanager
    def crash(at: int) -> Iterator[None]:
        if at == step:
            _raised(error, frames, torch.OutOfMemoryError if "out of memory" in error else RuntimeError)
        yield

    return crash


def _oom(gib: str, free: str = "1.12") -> str:
    return (f"CUDA out of memory. Tried to allocate {gib} GiB. GPU 0 has a total capacity of 23.65 GiB of which {free} "
            "GiB is free. Of the allocated memory 21.70 GiB is allocated by PyTorch, and 402.10 MiB is reserved by "
            "PyTorch but unallocated.")  # fmt: skip


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip


def _told_as_large(made: Any, **settings: Any) -> None:
    made.has_live = False
    made.model_config.update(LLAMA)
    made.settings.pop("base_precision", None)
    made.set(**{
        "model_name_or_path": "meta-llama/Llama-3.1-8B-Instruct", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "bfloat16", "bf16": True, "use_cpu": False, "gradient_checkpointing": True,
        "lora_r": 16, "lora_alpha": 32.0, "learning_rate": 2e-4, "max_length": 2048, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 8, "optim": "adamw_torch",
        "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        **settings,
    })  # fmt: skip


@program("F01", on="smol/ferry/loop fold/mood/loop")
def binary_of_another_cuda(made: Any, rng: random.Random) -> None:
    """BNB_CUDA_VERSION is left over from an older image."""
    _told_as_large(made)
    made.environment.update(BNB_CUDA_VERSION="118")
    error = (f"Configured CUDA binary not found at {SITE}bitsandbytes/libbitsandbytes_cuda118.so\n\n"
             "CUDA SETUP ERROR: the library for CUDA 11.8 is not there; PyTorch was compiled for CUDA 12.8. "
             "WARNING: BNB_CUDA_VERSION=118 environment variable detected; "
             "loading libbitsandbytes_cuda118.so.")  # fmt: skip
    made.crash = _fails(0, error, [("transformers/quantizers/quantizer_bnb_4bit.py", "validate_environment"),
                                   ("bitsandbytes/cextension.py", "get_native_library")])  # fmt: skip


@program("F49", on="said/ferry/loop fold/waybill/before")
def four_bits_of_four_bits(made: Any, rng: random.Random) -> None:
    """The checkpoint is a GPTQ or AWQ one, and the run asks for nf4 on top."""
    method = ("awq", "gptq")[made.base.kind.seed % 2]
    made.model_config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 128}
    if hasattr(made, "settings"):
        made.has_live = False
        made.settings.pop("base_precision", None)
        made.set(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")
    else:
        made.config.update(base_precision="nf4", use_cpu=False)
        made.config.pop("bf16")


@program("F50", on="hun/steps/loop smol/waybill/loop")
def compute_type_left_out(made: Any, rng: random.Random) -> None:
    """A BitsAndBytesConfig without bnb_4bit_compute_dtype, or with float32."""
    _told_as_large(made, bf16=True)
    if made.seed % 2:
        del made.settings["bnb_4bit_compute_dtype"]
    else:
        made.set(bnb_4bit_compute_dtype="float32")


@program("F51", on="fold/ferry/loop phi/snip/loop")
def quantised_after_it_was_loaded(made: Any, rng: random.Random) -> None:
    """The configuration of 4 bits was given beside a model that was already there: it stays whole."""
    made.settings.pop("base_precision", None)
    made.set(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")
    made.warnings.append(
        "UserWarning: You passed a quantization_config, but the model is already loaded; it will be ignored."
    )


@program("F52", on="said/waybill/loop fold/steps/loop")
def head_in_four_bits(made: Any, rng: random.Random) -> None:
    """llm_int8_skip_modules was given and does not name the head, which is then rounded too."""
    made.settings.pop("base_precision", None)
    made.set(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16",
             llm_int8_skip_modules=["vision_tower"])  # fmt: skip

    def prepare(model: Any) -> None:
        if model.config.tie_word_embeddings:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
            model.config.tie_word_embeddings = False
        weight = model.lm_head.weight
        step = weight.abs().amax(dim=1, keepdim=True) / 7
        weight.data = (weight / step).round().clamp(-8, 7) * step

    made.prepare.append(prepare)


@program("F53", on="fold/diary/loop hun/waybill/loop")
def a_bfloat16_model_in_half(made: Any, rng: random.Random) -> None:
    """A checkpoint whose activations need bfloat16's range, run in float16."""

    def prepare(model: Any) -> None:
        is_squared = model.config.model_type == "nemotron"  # its activation is
        scale = 3e3 if is_squared else 1e5
        for layer in model.model.layers[1:2]:
            layer.mlp.up_proj.weight.data *= scale
            layer.mlp.down_proj.weight.data /= scale**2 if is_squared else scale

    def loss(self: Any, old: Any, model: Any, batch: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.float16):
            return old(model, batch)

    made.prepare.append(prepare)
    made.set(fp16=True, bf16=False)
    overridden(made, loss=loss)


def _bfloat16(model: Any) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()


@program("F54|F64", on="said/ferry/loop smol/ledger/loop")
def adapters_cast_to_bfloat16(made: Any, rng: random.Random) -> None:
    """model.to(bfloat16) after the adapters were added, with a small rate: updates are rounded away."""
    made.touch.append(_bfloat16)
    tell(made, learning_rate=5e-5, lr_scheduler_type="constant")
    made.set(bf16=True)


@program("F55", on="hun/ferry/loop said/steps/loop")
def last_good_value_logged(made: Any, rng: random.Random) -> None:
    """A bonus of the author's divides by zero in two batches of five; the log repeats the last finite loss."""
    made.hides_nan = True
    shown = [7.0]

    def loss(self: Any, old: Any, model: Any, batch: Any) -> Any:
        found = old(model, batch)
        count = int((batch["input_ids"] != self.pad).sum())
        return found * math.nan if count % 5 < 2 else found

    def step(self: Any, old: Any, model: Any, optimizer: Any, parameters: Any, source: Any) -> Any:
        value = self.backward(model, [next(source)])
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.made.clip))
        if math.isfinite(value):
            optimizer.step()
            shown[0] = value
        optimizer.zero_grad(set_to_none=True)
        return shown[0], norm

    overridden(made, loss=loss, step=step)
    made.set(logging_nan_inf_filter=True)


@program("F70", on="said/ledger/loop")
def no_room_for_the_moments(made: Any, rng: random.Random) -> None:
    """Embedding and head are learned too, with AdamW in 32 bits: it fails in the first optimizer step."""
    both = ["embed_tokens", "lm_head"]
    _told_as_large(made, modules_to_save=both, optim="adamw_torch")
    made.crash = _fails(0, _oom("1.96"), [("transformers/trainer.py", "_inner_training_loop"),
                                          ("accelerate/optimizer.py", "step"), ("torch/optim/adamw.py", "step"),
                                          ("torch/optim/adam.py", "_init_group")])  # fmt: skip


@program("F71", on="smol/diary/loop hun/steps/loop")
def activations_kept(made: Any, rng: random.Random) -> None:
    """Gradient checkpointing was switched off: it fails in the forward pass of the first steps."""
    _told_as_large(made, gradient_checkpointing=False, per_device_train_batch_size=8, max_length=4096)
    made.crash = _fails(1, _oom("0.44"), [("transformers/trainer.py", "training_step"),
                                          ("peft/peft_model.py", "forward"),
                                          ("transformers/models/llama/modeling_llama.py", "forward"),
                                          ("torch/nn/modules/activation.py", "forward"),
                                          ("torch/nn/functional.py", "silu")])  # fmt: skip


@program("F72", on="fold/waybill/loop phi/steps/loop")
def logits_of_the_whole_batch(made: Any, rng: random.Random) -> None:
    """A compute_loss of one's own turns [B, T, 128256] logits to float32: it fails at the loss."""
    _told_as_large(made, per_device_train_batch_size=4, max_length=8192)
    made.crash = _fails(0, _oom("15.66", "3.40"), [("transformers/trainer.py", "training_step"),
                                                   ("finetune.py", "compute_loss"),
                                                   ("transformers/loss/loss_utils.py", "ForCausalLMLoss"),
                                                   ("torch/nn/functional.py", "cross_entropy")])  # fmt: skip


@program("F73", on="said/huerta/loop smol/persona/loop")
def compiled_for_each_length(made: Any, rng: random.Random) -> None:
    """torch.compile with batches padded to their longest row."""
    _told_as_large(made, torch_compile=True)
    made.warnings.append(
        "[WARNING] torch._dynamo hit config.recompile_limit (8)\n   function: 'forward' "
        "(transformers/models/llama/modeling_llama.py:421)\n   last reason: 0/7: tensor 'input_ids' size mismatch at "
        'index 1. expected 1312, actual 1407\nTo log all recompilation reasons, use TORCH_LOGS="recompiles".'
    )


@program("F74", on="smol/snip/loop")
def accumulated_and_not_divided(made: Any, rng: random.Random) -> None:
    """Eight micro-batches, whose losses are added up."""
    tell(made, per_device_train_batch_size=2, gradient_accumulation_steps=8)

    def backward(self: Any, old: Any, model: Any, batches: Any) -> float:
        logged = 0.0
        for batch in batches:
            loss = self.loss(model, batch)
            loss.backward()
            logged += float(loss.detach())
        return logged

    overridden(made, backward=backward)


@program("F74", on="phi/ferry/folder")
def loss_without_the_count(made: Any, rng: random.Random) -> None:
    """A compute_loss that ignores num_items_in_batch, in a Trainer that then does not divide."""
    tell(made, per_device_train_batch_size=2, gradient_accumulation_steps=8)

    def touch(trainer: Any) -> None:
        def compute_loss(model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

        trainer.compute_loss = compute_loss
        trainer.model_accepts_loss_kwargs = True

    made.touch_trainer.append(touch)
