"""Environment, quantization, memory, files: F01, F49, F50, F70 to F73, F75 to F78.

A card is not needed: what crashes on one is raised from code with the names that its traceback has, in runs that are
written as those of a 7B model (has_live is False: settings, config, curve and errors are all that is handed over).
"""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

from bench.diagnose.machinery import rounded
from bench.diagnose.ours import Job
from bench.diagnose.unseen2.registry import tell
from bench.diagnose.unseen3.faults_machine import _fails as fails
from bench.diagnose.unseen3.registry import overridden
from bench.diagnose.unseen4.registry import program

QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    "tie_word_embeddings": False,
}  # fmt: skip


def _of_7b(made: Any, **settings: Any) -> None:
    made.has_live = False
    made.model_config.update(QWEN)
    made.settings.pop("base_precision", None)
    made.set(**{
        "model_name_or_path": "Qwen/Qwen2.5-7B-Instruct", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "bfloat16", "bf16": True, "use_cpu": False, "gradient_checkpointing": True,
        "lora_r": 16, "lora_alpha": 16.0, "learning_rate": 1e-4, "max_length": 1024, "optim": "paged_adamw_8bit",
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8,
        "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        **settings,
    })  # fmt: skip


def _full(gib: str, free: str) -> str:
    return (f"CUDA out of memory. Tried to allocate {gib} GiB. GPU 0 has a total capacity of 15.89 GiB of which {free} "
            "GiB is free. Process 4121 has 15.02 GiB memory in use. Of the allocated memory 14.31 GiB is allocated by "
            "PyTorch, and 410.52 MiB is reserved by PyTorch but unallocated.")  # fmt: skip


@program("F01", on="neo/shell/loop")
def wheel_without_cuda(made: Any, rng: random.Random) -> None:
    """A container with the CPU build of bitsandbytes, or without libcudart."""
    _of_7b(made)
    told = ("The installed version of bitsandbytes was compiled without GPU support. 8-bit optimizers and GPU "
            "quantization are unavailable.",
            "CUDA Setup failed despite GPU being available. Please run the following command to get more information: "
            "python -m bitsandbytes")[made.seed % 2]  # fmt: skip
    made.crash = fails(0, told, [("bitsandbytes/__init__.py", "<module>".strip("<>")),
                                 ("bitsandbytes/cextension.py", "get_native_library")])  # fmt: skip


@program("F49", on="apertus/fields/loop seed/shell/before")
def awq_checkpoint_in_four_bits(made: Any, rng: random.Random) -> None:
    """The "-AWQ" repository was taken because it is smaller, and QLoRA asks for nf4 on top."""
    made.model_config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm",
                                                "zero_point": True}  # fmt: skip
    if isinstance(made, Job):
        made.config.update(base_precision="nf4", use_cpu=False)
        made.config.pop("bf16")
    else:
        made.has_live = False
        made.settings.pop("base_precision", None)
        made.set(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")


@program("F50", on="neo/commit/loop")
def load_in_4bit_and_no_more(made: Any, rng: random.Random) -> None:
    """BitsAndBytesConfig(load_in_4bit=True): what it computes in is float32."""
    _of_7b(made)
    if made.seed % 2:
        del made.settings["bnb_4bit_compute_dtype"]
    else:
        made.set(bnb_4bit_compute_dtype="float32")


@program("F70", on="apertus/reply/loop")
def moments_of_whole_embeddings(made: Any, rng: random.Random) -> None:
    """modules_to_save of embedding and head with 32-bit AdamW: the first optimizer step does not fit."""
    _of_7b(made, modules_to_save=["embed_tokens", "lm_head"], optim="adamw_torch_fused")
    made.crash = fails(0, _full("2.03", "0.71"), [("transformers/trainer.py", "_inner_training_loop"),
                                                  ("torch/optim/lr_scheduler.py", "wrapper"),
                                                  ("torch/optim/adamw.py", "step"),
                                                  ("torch/optim/adam.py", "_init_group")])  # fmt: skip


@program("F71", on="ernie/garden/loop")
def checkpointing_forgotten(made: Any, rng: random.Random) -> None:
    """gradient_checkpointing: false on a card of 16 GB: the second forward pass does not fit."""
    _of_7b(made, gradient_checkpointing=False, per_device_train_batch_size=4, max_length=4096)
    made.crash = fails(1, _full("0.29", "0.20"), [("transformers/trainer.py", "training_step"),
                                                  ("transformers/models/qwen2/modeling_qwen2.py", "forward"),
                                                  ("transformers/models/qwen2/modeling_qwen2.py", "forward"),
                                                  ("torch/nn/modules/linear.py", "forward")])  # fmt: skip


@program("F72", on="glm/commit/loop")
def logits_upcast_in_compute_loss(made: Any, rng: random.Random) -> None:
    """A weighted loss of one's own: logits.float() of 152,064 columns does not fit."""
    _of_7b(made, per_device_train_batch_size=4, max_length=4096)
    made.crash = fails(0, _full("9.28", "3.02"), [("transformers/trainer.py", "training_step"),
                                                  ("train_sft.py", "compute_loss"),
                                                  ("transformers/loss/loss_utils.py", "ForCausalLMLoss"),
                                                  ("torch/nn/functional.py", "cross_entropy")])  # fmt: skip


@program("F73", on="seed/queue/loop")
def compiled_with_dynamic_padding(made: Any, rng: random.Random) -> None:
    """torch_compile: true, and each batch is padded to its own longest row."""
    _of_7b(made, torch_compile=True, pad_to_multiple_of=None)
    made.warnings.append(
        "W0611 09:12:44.117000 88 torch/_dynamo/convert_frame.py:1016] [3/8] torch._dynamo hit config.recompile_limit "
        "(8)\nfunction: 'forward' (transformers/models/qwen2/modeling_qwen2.py:217)\nlast reason: 3/7: "
        "hidden_states.size()[1] == 611\nTo diagnose recompilation issues, see torch.compile's documentation."
    )


# --- files


@program("F75", on="ernie/shell/folder")
def saved_above_train(made: Any, rng: random.Random) -> None:
    """model.save_pretrained(output_dir) stands above trainer.train()."""
    made.saves_at_start = True


@program("F75", on="neo/tea/alone")
def state_dict_taken_twice(made: Any, rng: random.Random) -> None:
    """alpaca-lora's patch of model.state_dict: the filter runs on what was filtered, and nothing is left."""
    made.saves = lambda state: {}


@program("F75", on="seed/manifest/own")
def fresh_adapter_copied_over(made: Any, rng: random.Random) -> None:
    """The adapter's file was replaced by that of get_peft_model before any step: B is zero."""
    made.after.append(lambda output, model: _edit(output, lambda n, t: (n, t * 0 if "lora_B" in n else t)))


def _edit(folder: Path, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    for file in folder.rglob("adapter_model.safetensors"):
        save_file(dict(change(n, t.contiguous()) for n, t in load_file(file).items()), file)


@program("F76", on="ernie/fields/loop")
def quantized_again_after_the_merge(made: Any, rng: random.Random) -> None:
    """Merged in float32, then written in two bits for the engine: what was learned is rounded away."""

    def merged(model: Any) -> Any:
        whole = copy.deepcopy(model).merge_and_unload()
        for name, parameter in whole.named_parameters():
            if "_proj.weight" in name:
                parameter.data = rounded(parameter.data, 4)
        return whole

    made.merged = merged


@program("F77", on="glm/tea/folder neo/verse/alone")
def checkpoint_without_optimizer(made: Any, rng: random.Random) -> None:
    """save_only_model, or a sync that leaves *.pt out: resumed without optimizer and schedule."""

    def resumed(checkpoint: Path) -> None:
        for file in checkpoint.glob("*.pt"):
            file.unlink()

    made.resumed = resumed


@program("F77", on="seed/reply/loop")
def only_weights_loaded_again(made: Any, rng: random.Random) -> None:
    """After a crash the weights were loaded and the script started over: optimizer, warm-up and order begin again."""
    seam = 3 * made.steps // 5
    made.seam = (seam, frozenset({"optimizer", "schedule", "order"}))
    tell(made, warmup_steps=6)

    def before(self: Any, old: Any, step: int, optimizer: Any, source: Any, parameters: Any) -> Any:
        return (self.optimizer(parameters), self.batches(self.train_rows)) if step == seam else (optimizer, source)

    overridden(made, rate=lambda self, old, step: old(step - seam if step >= seam else step), before=before)


@program("F78|F75", on="ernie/manifest/alone")
def keys_of_another_version(made: Any, rng: random.Random) -> None:
    """Saved under a release that keeps the decoder in model.language_model: here no key is found."""
    made.saves = lambda state: {
        n.replace("base_model.model.model.", "base_model.model.model.language_model."): t for n, t in state.items()
    }


@program("F78|F75", on="seed/stock/own")
def prefix_stripped(made: Any, rng: random.Random) -> None:
    """A converter for another engine took "base_model.model." off the names."""
    made.after.append(lambda output, model: _edit(output, lambda n, t: (n.removeprefix("base_model.model."), t)))
