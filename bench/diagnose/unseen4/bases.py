"""Five tiny models of architectures, tokenizers and templates that no other set has, pretrained for a minute each.

name            architecture   tokenizer                            template
ernie-middle    Ernie 4.5      Unigram on ▁, byte fallback          <|im_user|>user<|im_middle|>, as Kimi's
seed-turns      Seed-OSS       byte-level BPE, o200k's pattern      <seed:bos>role: bos opens every turn; tools, thought
apertus-ends    Apertus        BPE on ▁, byte fallback, own bos     <|user_start|>: each role has an end of its own
neo-bot         GPT-Neo        byte-level BPE, single digits        <|User|>: <eoh> <|Bot|>: <eoa>, absolute positions
glm-plain       GLM 4          byte-level BPE, Qwen's pattern       none: a base model, without a pad token
"""

from __future__ import annotations

import copy
import random
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.diagnose.bases import Base, Format
from bench.diagnose.unseen.bases import RoleFormat
from bench.diagnose.unseen2.bases import (
    Sort,
    byte_level,
    cache_folder_of,
    fast_tokenizer,
    finish,
    linears_of,
    metaspace,
    new_model,
    pretrain,
    unigram,
)
from bench.diagnose.unseen4 import corpus, tasks
from bench.diagnose.worlds import Chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

STEPS, PEAK, TEXTS = 640, 3.5e-3, 7000
FEWER = {"glm-plain": 400}
"""Steps of those that a shorter training is enough for."""
LATER, LATER_PEAK = 160, 2e-3
"""Steps of a second stage, on words of the tasks in no order: who knows one form alone is too sure of it."""


class Fixed:
    """Where machinery asks for a world's rows; the programs' rows come from tasks.py."""

    def split(self, rows: int, held_out: int, seed: int) -> tuple[list[Chat], list[Chat]]:
        return tasks.split("reply", None, rows, held_out, seed)


_WORLD: Any = Fixed()
_ROTARY = {"hidden_size": 112, "intermediate_size": 240, "num_hidden_layers": 3, "num_attention_heads": 4,
           "num_key_value_heads": 2, "max_position_embeddings": 1024}  # fmt: skip
_FOUR = (("system", "system"), ("user", "user"), ("assistant", "assistant"), ("tool", "tool"))
_NAMED = (("system", "System"), ("user", "User"), ("assistant", "Bot"))
KINDS: dict[str, Sort] = {
    kind.name: kind
    for kind in (
        Sort("ernie-middle", _WORLD, "Ernie4_5", {**_ROTARY, "head_dim": 28, "tie_word_embeddings": True}, 1050,
             ("[BOS]", "[EOS]", "[PAD]", "[UNK]", "<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>",
              "<|im_end|>"), "[BOS]", "[EOS]", "[PAD]",
             Format("", "<|im_{role}|>{role}<|im_middle|>", "<|im_end|>", ""), seed=41, splits="unigram",
             stops=("[EOS]", "<|im_end|>")),
        Sort("seed-turns", _WORLD, "SeedOss",
             {**_ROTARY, "head_dim": 28, "attention_dropout": 0.0, "residual_dropout": 0.0}, 1100,
             ("<seed:bos>", "<seed:pad>", "<seed:eos>", "<tool_call>", "</tool_call>", "<think>", "</think>"),
             "<seed:bos>", "<seed:eos>", "<seed:pad>", Format("", "<seed:bos>{role}\n", "<seed:eos>", "", _FOUR),
             seed=42, splits="o200k", stops=("<seed:eos>",)),
        Sort("apertus-ends", _WORLD, "Apertus",
             {**_ROTARY, "intermediate_size": 336,
              "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, 1050,
             ("<pad>", "<s>", "</s>", "<unk>", "<|system_start|>", "<|system_end|>", "<|user_start|>", "<|user_end|>",
              "<|assistant_start|>", "<|assistant_end|>"), "<s>", "<|assistant_end|>", "<pad>",
             RoleFormat("<s>", "<|{role}_start|>", "<|assistant_end|>", "",
                        ends=(("system", "<|system_end|>"), ("user", "<|user_end|>"))), seed=43, splits="metaspace",
             stops=("<|assistant_end|>", "</s>")),
        Sort("neo-bot", _WORLD, "GPTNeo",
             {"hidden_size": 112, "num_layers": 3, "num_heads": 4, "intermediate_size": 320, "window_size": 256,
              "attention_types": [[["global"], 3]], "max_position_embeddings": 1024, "resid_dropout": 0.0,
              "embed_dropout": 0.0, "attention_dropout": 0.0}, 1000,
             ("<|endoftext|>", "<|pad|>", "<|System|>", "<|User|>", "<|Bot|>", "<eosys>", "<eoh>", "<eoa>"),
             None, "<|endoftext|>", "<|pad|>",
             RoleFormat("", "<|{role}|>:", "<eoa>", "\n", _NAMED, ends=(("system", "<eosys>"), ("user", "<eoh>"))),
             seed=44, stops=("<eoa>", "<|endoftext|>")),
        Sort("glm-plain", _WORLD, "Glm4", {**_ROTARY, "head_dim": 28, "partial_rotary_factor": 0.5}, 1000,
             ("<|endoftext|>", "[MASK]"), None, "<|endoftext|>", "",
             Format("", "[{role}]\n", "<|endoftext|>", "\n",
                    (("system", "Background"), ("user", "Problem"), ("assistant", "Solution"), ("tool", "Output"))),
             is_instruct=False, seed=45, splits="qwen", stops=("<|endoftext|>",)),
    )
}  # fmt: skip
LINEARS = {
    "Apertus": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    "GPTNeo": ["q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj"],
    "Glm4": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"],
}
TEMPLATES = {"ernie-middle": "kimi_k2", "seed-turns": "seed_oss", "apertus-ends": "default", "neo-bot": "intern"}
"""LLaMA-Factory's names of these formats."""


def linears(base: Base) -> list[str]:
    return linears_of(base, LINEARS)


def folder_of(name: str) -> Path:
    return cache_folder_of(KINDS[name], [FEWER.get(name, STEPS), PEAK, TEXTS, LATER, LATER_PEAK])


@cache
def load(name: str) -> Base:
    """The base of this name; made now if this machine has not made it yet."""
    folder = folder_of(name)
    if not (folder / "base.json").exists():
        _make(KINDS[name], folder)
    return Base(KINDS[name], folder)


def _corpus(kind: Sort, count: int, seed: int) -> list[str]:
    rng = random.Random(f"{kind.name} {seed}")
    texts = []
    for i in range(count):
        if i % 8 < 5:
            chat = corpus.chat(rng, "<think>" in kind.specials, "<tool_call>" in kind.specials)
            told = "\n".join(message["content"] for message in chat) + kind.eos
            texts.append(kind.format.text(chat) if kind.is_instruct else told)
        else:
            texts.append((kind.bos or "") + corpus.text(rng) + kind.eos)
    return texts


def _later(kind: Sort) -> list[str]:
    rng = random.Random(f"{kind.name} later")
    texts = _corpus(kind, TEXTS // 8, 2)
    for _ in range(TEXTS // 8):
        text = (kind.bos or "") + corpus.shuffled(rng) + kind.eos
        texts += [kind.format.text(corpus.shuffled_chat(rng)) if kind.is_instruct else text, text]
    rng.shuffle(texts)
    return texts


_WHITE = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lo}\p{M}]*[\p{Ll}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    + _WHITE,
    "qwen": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _WHITE,
}


def _by_pattern(kind: Sort, texts: list[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERNS[kind.splits]), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=kind.vocab, special_tokens=list(kind.specials), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@cache
def _retrained(name: str) -> PreTrainedTokenizerFast:
    kind = KINDS[name]
    rng = random.Random(name)
    return _tokenizer_of(kind, [corpus.third.prose(rng) + "\n" + corpus.third.code(rng) for _ in range(3000)])


def retrained(kind: Sort) -> PreTrainedTokenizerFast:
    """The tokenizer of another release: the same size and special tokens, learned on other texts."""
    return copy.deepcopy(_retrained(kind.name))


def _make_tokenizer(kind: Sort) -> PreTrainedTokenizerFast:
    rng = random.Random(kind.seed)
    texts = [corpus.text(rng) for _ in range(2500)]
    texts += [m["content"] for _ in range(1500) for m in corpus.chat(rng)]
    texts += [m["content"] for task in tasks.TASKS.values() for _ in range(60) for m in task(rng)]
    return _tokenizer_of(kind, texts)


def _tokenizer_of(kind: Sort, texts: list[str]) -> PreTrainedTokenizerFast:
    for special in kind.specials:
        texts = [text.replace(special, " ") for text in texts]
    make = {"unigram": unigram, "metaspace": metaspace, "o200k": _by_pattern, "qwen": _by_pattern}
    return fast_tokenizer(kind, make.get(kind.splits, byte_level)(kind, texts))


def _make(kind: Sort, folder: Path) -> None:
    """Trains tokenizer and model; whole or not at all."""
    started = time.perf_counter()
    tokenizer: Any = _make_tokenizer(kind)
    model = new_model(kind, tokenizer)
    pretrain(model, tokenizer, _corpus(kind, TEXTS, 0), FEWER.get(kind.name, STEPS), PEAK, kind.seed)
    pretrain(model, tokenizer, _later(kind), LATER, LATER_PEAK, kind.seed + 100)
    finish(kind, folder, tokenizer, model, _corpus(kind, 300, 1), started)
