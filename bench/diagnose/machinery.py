"""What several faults need: a card that fills up, 4-bit linears, the shape of an 8B model.

A card of the CPU's own: `activation_limit` counts the bytes that autograd saves, and raises what CUDA raises at the
very place in forward where they are too many, so that the traceback is a real one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.diagnose.recipe import Recipe

CARD = 24 << 30
SHAPE_8B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
}


def out_of_memory(wanted_bytes: float) -> torch.OutOfMemoryError:
    """What a full card of 24 GB says."""
    return torch.OutOfMemoryError(
        f"CUDA out of memory. Tried to allocate {wanted_bytes / 2**30:.2f} GiB. GPU 0 has a total capacity of "
        f"{CARD / 2**30:.2f} GiB of which 212.69 MiB is free. Of the allocated memory 22.91 GiB is allocated by "
        "PyTorch, and 301.44 MiB is reserved by PyTorch but unallocated."
    )


def activation_limit(recipe: Recipe, times: float, from_step: int = 0) -> Callable[[int], Any]:
    """A card with room for `times` the activations of the first step; it is full at the first step that has more."""
    known = {"first": 0}

    @contextlib.contextmanager
    def card(step: int) -> Iterator[None]:
        held = {"bytes": 0}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            held["bytes"] += tensor.numel() * tensor.element_size()
            if step >= max(from_step, 1) and held["bytes"] > times * known["first"]:
                raise out_of_memory(2.0 * 2**30)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
        if step == 0:
            known["first"] = held["bytes"]

    return card


def of_8b(recipe: Recipe, **settings: Any) -> None:
    """Tells that the run was QLoRA on an 8B model on a card of 24 GB; the steps that it makes are the tiny model's."""
    recipe.model_config.update(SHAPE_8B)
    recipe.has_live = False
    recipe.steps = 40
    recipe.environment.update(gpu="NVIDIA GeForce RTX 4090", gpu_bytes=CARD, num_gpus=1, cuda_runtime="12.8")
    recipe.set(
        model_name_or_path="meta-llama/Llama-3.1-8B-Instruct",
        base_precision="nf4",
        bnb_4bit_compute_dtype="bfloat16",
        bf16=True,
        use_cpu=False,
        gradient_checkpointing=True,
        lora_target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        memory_bytes=CARD,
        max_steps=40,
    )
    recipe.set(**settings)


def in_nf4(recipe: Recipe, skip: tuple[str, ...] = ("lm_head",)) -> None:
    """The base's linears in NF4, by bitsandbytes itself."""

    def prepare(model: Any) -> None:
        import bitsandbytes as bnb

        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear) and not any(part in name for part in skip):
                new = bnb.nn.Linear4bit(
                    module.in_features,
                    module.out_features,
                    bias=module.bias is not None,
                    compute_dtype=torch.float32,
                    quant_type="nf4",
                )
                new.support_avx512bf16_for_cpu = False  # it repacks in eval(), and cannot train on after
                new.weight = bnb.nn.Params4bit(
                    module.weight.data.clone(), requires_grad=False, quant_type="nf4", module=new
                ).to("cpu")
                if module.bias is not None:
                    new.bias = module.bias
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent) if parent else model, leaf, new)
        model.is_loaded_in_4bit = True

    recipe.prepare.append(prepare)
    recipe.set(base_precision="nf4", bnb_4bit_compute_dtype="float32")


def rounded(weight: torch.Tensor, levels: int = 16) -> torch.Tensor:
    """To so many levels per row."""
    top = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12)
    half = levels / 2 - 0.5
    return ((weight / top * half + 0.5).round() - 0.5).clamp(-half, half) / half * top


def lora_parameters(model: torch.nn.Module, kinds: str = "AB") -> Iterator[torch.nn.Parameter]:
    """lora_A and lora_B of every adapted module."""
    for name, parameter in model.named_parameters():
        if any(f"lora_{kind}" in name for kind in kinds):
            yield parameter
