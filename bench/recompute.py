"""Is what a run records what transformers, PEFT and torch compute alone? Losses, masks, gradients, held-out losses.

    python -m bench.recompute [--out bench/results/recompute.json] [CASE ...]

Each case is a tiny random model with a file of chats. solotune trains it for STEPS steps, each over all rows, and for
one step, whose adapter still has its initial A. Then the same is computed from scratch, without any code of solotune:
transformers renders, tokenizes and masks the chats (`{% generation %}`), loads the base and gives logits row by row;
PEFT puts adapters with that A on it; torch's cross-entropy, clipping and AdamW do the steps. Compared are the ids and
the mask of each row, the loss and the gradient's norm of each step, the adapter at the end, and the held-out losses of
base and tuned model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

STEPS, LEARNING_RATE, CLIP, R, ALPHA = 4, 1e-2, 0.3, 4, 8
TOLERANCE = {"loss": 2e-5, "grad_norm": 2e-4, "adapter": 2e-4, "held_out": 2e-5}
SHAPE = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "attention_dropout": 0.0, "hidden_dropout": 0.0,
              "residual_dropout": 0.0, "embedding_dropout": 0.0}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", {"head_dim": 16}),
    "gemma3 text": ("Gemma3Text", {"head_dim": 16}),
    "phi3": ("Phi3", {}),
    "gpt2": ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024}),
    "gpt-neox": ("GPTNeoX", {}),
    "falcon": ("Falcon", {}),
    "olmo2": ("Olmo2", {}),
    "granite": ("Granite", {"logits_scaling": 3.0}),
    "cohere": ("Cohere", {}),
    "stablelm": ("StableLm", {}),
    "smollm3": ("SmolLM3", {}),
    "starcoder2": ("Starcoder2", {}),
    "qwen3 moe": (
        "Qwen3Moe",
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "gpt-oss": ("GptOss", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64}),
}

TEMPLATE = """
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}
{%- if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}
{%- if m.content %}{{ m.content }}{% endif %}
{%- for call in m.tool_calls or [] %}<call>{{ call.function.name }}{{ call.function.arguments | tojson }}</call>
{%- endfor -%}
<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TOOL = {
    "type": "function",
    "function": {
        "name": "add", "description": "Add two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}  # fmt: skip
Row = dict[str, Any]


# --- the chats


def plain(i: int) -> Row:
    return {"messages": [{"role": "user", "content": f"twice {i}"}, {"role": "assistant", "content": f"it is {2 * i}"}]}


def tools(i: int) -> Row:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": i, "b": 7}}}
    answers = [{"role": "tool", "name": "add", "content": str(i + 7)}, {"role": "assistant", "content": f"{i + 7}"}]
    asked = [{"role": "user", "content": f"{i} and 7?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    return {"tools": [TOOL], "messages": [*asked, *answers]}


def thinking(i: int) -> Row:
    row = plain(i)
    row["messages"][1]["reasoning_content"] = f"{i} and {i} are {2 * i}"
    return row


def weights(i: int) -> Row:
    row = plain(i)
    row["messages"] += plain(i + 50)["messages"]
    row["messages"][1]["weight"] = (0, 0.25, 1)[i % 3]
    return row


# --- the models


def save_tokenizer(folder: Path) -> None:
    """A token for each printable ASCII character, and ChatML's three."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = [c for c in sorted(pre_tokenizers.ByteLevel.alphabet()) if c.isascii()] + ["Ġ", "Ċ"]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*special, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    fast.save_pretrained(folder)


def save_model(model: Any, folder: Path) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    save_tokenizer(folder)


def family(name: str) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        prefix, keys = FAMILIES[name]
        kind = getattr(transformers, f"{prefix}Config")
        known = {*kind().to_dict(), *getattr(kind, "attribute_map", {})}
        config = kind(**{k: v for k, v in {**SHAPE, **NO_DROPOUT, **keys}.items() if k in known})
        save_model(transformers.AutoModelForCausalLM.from_config(config), folder)

    return save


def another_head(folder: Path) -> None:
    """config.json ties head and embedding, the file holds two different tensors."""
    family("llama tied")(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def with_vision(folder: Path) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    text = {**SHAPE, "head_dim": 16}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    save_model(transformers.Gemma3ForConditionalGeneration(config), folder)


def hybrid(folder: Path) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 2, "out_hidden_size": 64}
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
    text = {**SHAPE, **linear, "linear_value_head_dim": 16, "head_dim": 16}
    text["layer_types"] = ["linear_attention", "full_attention"]
    config = transformers.Qwen3_5Config(text_config=text, vision_config={**vision, "patch_size": 14})
    save_model(transformers.Qwen3_5ForConditionalGeneration(config), folder)


Case = tuple[Callable[[Path], None], Callable[[int], Row], dict[str, Any]]
CASES: dict[str, Case] = {name: (family(name), plain, {}) for name in FAMILIES}
CASES |= {
    "tied, another head": (another_head, plain, {}),
    "gemma3 with vision": (with_vision, plain, {}),
    "qwen3.5 hybrid": (hybrid, plain, {}),
    "tools": (family("llama"), tools, {}),
    "thinking": (family("llama"), thinking, {}),
    "weights": (family("llama"), weights, {}),
    "packing": (family("llama"), plain, {"packing": True}),
    "rslora": (family("qwen2"), plain, {"use_rslora": True}),
}


# --- computed without solotune


def encoded(folder: Path, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (1, T) of a chat, and the weight (T) of each in the loss."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def render(messages: list[Row]) -> dict[str, Any]:
        return tokenizer.apply_chat_template(
            messages, tools=row.get("tools"), chat_template=TEMPLATE, tokenize=True, return_dict=True,
            return_assistant_tokens_mask=True,
        )  # fmt: skip

    whole, spread = render(row["messages"]), []
    mask, spans = whole["assistant_masks"], [m.get("weight", 1) for m in row["messages"] if m["role"] == "assistant"]
    for at, is_answer in enumerate(mask):
        spans = spans[1:] if at and mask[at - 1] and not is_answer else spans
        spread.append(float(spans[0]) if is_answer else 0.0)
    return torch.tensor([whole["input_ids"]]), torch.tensor(spread)


def token_losses(model: Any, rows: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of weighted losses, sum of weights) of rows, each alone."""
    total, weight = torch.zeros(()), torch.zeros(())
    for ids, spread in rows:
        losses = cross_entropy(model(input_ids=ids, use_cache=False).logits[0, :-1], ids[0, 1:], reduction="none")
        total, weight = total + (losses * spread[1:]).sum(), weight + spread[1:].sum()
    return total, weight


def computed(folder: Path, adapter: Path, train: list[Row], held_out: list[Row], use_rslora: bool) -> dict[str, Any]:
    """The run again: its losses, gradient norms, adapter and held-out losses."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    unseen = [encoded(folder, row) for row in held_out]
    with torch.no_grad():
        total, weight = token_losses(model, unseen)
    found: dict[str, Any] = {"losses": [], "grad_norms": [], "base": (total / weight).item()}
    targets = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    lora = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=targets, lora_dropout=0.0, use_rslora=use_rslora)
    tuned = get_peft_model(model, lora)
    initial = load_file(adapter / "adapter_model.safetensors")
    parameters = {name.replace(".default", ""): p for name, p in tuned.named_parameters() if p.requires_grad}
    assert parameters.keys() == initial.keys(), parameters.keys() ^ initial.keys()
    for name, parameter in parameters.items():
        parameter.data.copy_(initial[name] if "lora_A" in name else torch.zeros_like(parameter))
    optimizer = torch.optim.AdamW(parameters.values(), lr=LEARNING_RATE, weight_decay=0.0)
    rows = [encoded(folder, row) for row in train]
    for _ in range(STEPS):
        total, weight = token_losses(tuned, rows)
        (total / weight).backward()
        found["losses"].append((total / weight).item())
        found["grad_norms"].append(torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        total, weight = token_losses(tuned.eval(), unseen)
    return {**found, "tuned": (total / weight).item(), "adapter": {n: p.detach() for n, p in parameters.items()}}


# --- and recorded by solotune


def compare(name: str, folder: Path) -> dict[str, Any]:
    """Largest difference of each quantity."""
    import solotune

    make, chat, keys = CASES[name]
    torch.manual_seed(0)
    make(folder / "model")
    train, held_out = [chat(i) for i in range(12)], [chat(i) for i in range(30, 36)]
    for path, rows in (("train.jsonl", train), ("held_out.jsonl", held_out)):
        (folder / path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model_name_or_path": str(folder / "model"), "dataset": str(folder / "train.jsonl"),
        "eval_dataset": str(folder / "held_out.jsonl"), "max_length": 1024, "use_cpu": True, "base_precision": "fp32",
        "lora_target_modules": "all-linear", "lora_r": R, "lora_alpha": ALPHA, "lora_dropout": 0.0,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "weight_decay": 0.0, "max_grad_norm": CLIP,
        "gradient_checkpointing": False, "num_samples": 0, "seed": 0, **keys,
    }  # fmt: skip
    for steps in (1, STEPS):
        solotune.train({**config, "max_steps": steps, "output_dir": str(folder / f"run-{steps}")})
    run = folder / f"run-{STEPS}"
    shown = solotune.data({**config, "output_dir": str(folder / "none")}, show=len(train)).shown
    theirs = computed(folder / "model", folder / "run-1" / "adapter", train, held_out, bool(keys.get("use_rslora")))
    steps = [line for line in map(json.loads, (run / "metrics.jsonl").open()) if line["event"] == "step"]
    evaluation = json.loads((run / "evaluation.json").read_text())
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")

    def most(pairs: Iterator[tuple[float, float]]) -> float:
        return max(abs(one - other) for one, other in pairs)

    return {
        "masks": masks_differ(shown, [encoded(folder / "model", row) for row in train]),
        "loss": most((step["loss"], loss) for step, loss in zip(steps, theirs["losses"], strict=True)),
        "grad_norm": most((step["grad_norm"], norm) for step, norm in zip(steps, theirs["grad_norms"], strict=True)),
        "adapter": max((adapter[n] - p).abs().max().item() for n, p in theirs["adapter"].items()),
        "held_out": most((evaluation[who]["loss"], theirs[who]) for who in ("base", "tuned")),
        "first_loss": theirs["losses"][0], "last_loss": theirs["losses"][-1], "base": theirs["base"],
        "tuned": theirs["tuned"],
    }  # fmt: skip


def masks_differ(shown: Any, rows: list[tuple[torch.Tensor, torch.Tensor]]) -> int:
    """Number of rows whose ids, or whose tokens in the loss, are not the same."""
    differ = 0
    for row, (ids, spread) in zip(shown, rows, strict=True):
        ours = [(index, bool(is_learned)) for _, is_learned, piece in row.pieces for index in piece]
        differ += ours != list(zip(ids[0].tolist(), (spread > 0).tolist(), strict=True))
    return differ


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], metavar="CASE")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="recompute-cache-")
    torch.set_num_threads(1)
    found, failed = {}, []
    print(f"{'case':20} {'masks':>6} " + " ".join(f"{name:>10}" for name in TOLERANCE) + "   loss, first and last")
    for name in chosen.cases or CASES:
        with tempfile.TemporaryDirectory(prefix="recompute-") as folder:
            found[name] = row = compare(name, Path(folder))
        is_equal = not row["masks"] and all(row[key] <= limit for key, limit in TOLERANCE.items())
        failed += [] if is_equal else [name]
        figures = " ".join(f"{row[key]:10.1e}" for key in TOLERANCE)
        print(f"{name:20} {row['masks']:6} {figures}   {row['first_loss']:.4f} {row['last_loss']:.4f}"
              + ("" if is_equal else "   DIFFERS"), flush=True)  # fmt: skip
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)
    if chosen.out:
        figures = {"steps": STEPS, "tolerance": TOLERANCE, "cases": found, "differ": failed}
        chosen.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"{len(found) - len(failed)} of {len(found)} equal")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
