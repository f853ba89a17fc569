"""Five tiny models of architectures, tokenizers and templates that no other set has, pretrained for a minute each.

name            architecture        tokenizer                            template
smol3-think     SmolLM3             byte-level BPE, tiktoken's pattern   ChatML; earlier turns lose their <think>
bigcode-said    GPTBigCode          byte-level BPE, single digits        <|user|>, absolute positions
nemotron-fold   Nemotron            Unigram on ▁, byte fallback          [INST], the system turn in the first question
hunyuan-tools   HunYuan (dense)     BPE on ▁, byte fallback, own bos     <|role|>name<|msg|>, tools answer
phi-plain       Phi                 byte-level BPE, punctuation          none: a base model, without a pad token
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.diagnose.bases import Base, Format
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
from bench.diagnose.unseen3 import corpus, tasks
from bench.diagnose.worlds import Chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

STEPS, PEAK, TEXTS, TOKENS = 560, 3.5e-3, 7000, 160  # tokens of a window, as in the second set


@dataclass(frozen=True)
class Think(Format):
    """SmolLM3's and Qwen3's: a thought is shown in the last answer alone."""

    def pieces(self, chat: Chat, begun: bool = False) -> list[tuple[str, bool]]:
        last = max((i for i, m in enumerate(chat) if m["role"] == "user"), default=-1)
        shown = [
            {**m, "content": m["content"].split("</think>")[-1].lstrip("\n")}
            if m["role"] == "assistant" and i < last else m
            for i, m in enumerate(chat)
        ]  # fmt: skip
        return super().pieces(shown, begun)

    def jinja(self) -> str:
        last = (
            "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
            "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        )
        say = (
            "{{ m['content'].split('</think>')[-1].lstrip('\\n') "
            "if m['role'] == 'assistant' and loop.index0 < ns.last else m['content'] }}"
        )
        return last + super().jinja().replace("{{ m['content'] }}", say)


@dataclass(frozen=True)
class Fold(Format):
    """Mistral's: what the system says stands in the first question."""

    def pieces(self, chat: Chat, begun: bool = False) -> list[tuple[str, bool]]:
        found = [(self.bos, False)] if self.bos else []
        system = ""
        for message in chat:
            role, content = message["role"], message["content"]
            if role in self.dropped:
                continue
            if role == "system":
                system = content + "\n\n"
            elif role == "assistant":
                found += [(content, True), (self.end, self.end_is_learned), (self.after, False)]
            else:
                found += [("[INST]", False), (system + content, False), ("[/INST]", False)]
                system = ""
        return [piece for piece in found if piece[0]]

    def jinja(self) -> str:
        end = self.end + self.after
        keeps = "" if "system" in self.dropped else "{% set ns.system = m['content'] + '\\n\\n' %}"
        mine = "{{ m['content'] }}" + end
        if self.has_markers:
            inner = "{{ m['content'] }}" + (self.end if self.end_is_learned else "")
            mine = (
                "{% generation %}"
                + inner
                + "{% endgeneration %}"
                + ("" if self.end_is_learned else self.end)
                + self.after
            )
        return (
            self.bos
            + "{% set ns = namespace(system='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
            + keeps
            + "{% elif m['role'] == 'assistant' %}" + mine
            + "{% else %}[INST]{{ ns.system }}{{ m['content'] }}[/INST]{% set ns.system = '' %}{% endif %}{% endfor %}"
        )  # fmt: skip


class Fixed:
    """Where machinery asks for a world's rows; the programs' rows come from tasks.py."""

    def split(self, rows: int, held_out: int, seed: int) -> tuple[list[Chat], list[Chat]]:
        return tasks.split("ferry", None, rows, held_out, seed)


_WORLD: Any = Fixed()
_ROTARY = {"hidden_size": 112, "intermediate_size": 224, "num_hidden_layers": 3, "num_attention_heads": 4,
           "num_key_value_heads": 2, "max_position_embeddings": 1024}  # fmt: skip
_FOUR = (("system", "system"), ("user", "user"), ("assistant", "assistant"), ("tool", "tool"))
KINDS: dict[str, Sort] = {
    kind.name: kind
    for kind in (
        Sort("smol3-think", _WORLD, "SmolLM3", {**_ROTARY, "tie_word_embeddings": True, "no_rope_layer_interval": 3},
             1000, ("<|end_of_text|>", "<|im_start|>", "<|im_end|>", "<|pad|>", "<think>", "</think>"), None,
             "<|im_end|>", "<|pad|>", Think("", "<|im_start|>{role}\n", "<|im_end|>"), seed=31, splits="tiktoken",
             stops=("<|im_end|>", "<|end_of_text|>")),
        Sort("bigcode-said", _WORLD, "GPTBigCode",
             {"n_embd": 112, "n_layer": 3, "n_head": 4, "n_inner": 256, "n_positions": 1024, "multi_query": True,
              "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, 900,
             ("<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), None, "<|end|>",
             "<|pad|>", Format("", "<|{role}|>\n", "<|end|>", "\n"), seed=32, stops=("<|end|>", "<|endoftext|>")),
        Sort("nemotron-fold", _WORLD, "Nemotron",
             {**_ROTARY, "hidden_size": 96, "intermediate_size": 288, "head_dim": 24, "partial_rotary_factor": 0.5},
             950, ("<s>", "</s>", "<pad>", "[UNK]", "[INST]", "[/INST]"), "<s>", "</s>", "<pad>",
             Fold("<s>", "", "</s>", ""), seed=33, splits="unigram", stops=("</s>",)),
        Sort("hunyuan-tools", _WORLD, "HunYuanDenseV1", {**_ROTARY, "head_dim": 28, "tie_word_embeddings": True}, 1050,
             ("<bos>", "<eos>", "<pad>", "<unk>", "<|role|>", "<|msg|>", "<|turn_end|>", "<tool_call>", "</tool_call>"),
             "<bos>", "<eos>", "<pad>", Format("<bos>", "<|role|>{role}<|msg|>", "<|turn_end|>", "\n", _FOUR), seed=34,
             splits="metaspace", stops=("<eos>", "<|turn_end|>")),
        Sort("phi-plain", _WORLD, "Phi",
             {**_ROTARY, "num_key_value_heads": 4, "partial_rotary_factor": 0.5, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
              "attention_dropout": 0.0}, 1000, ("<|endoftext|>", "<|filler|>"), None, "<|endoftext|>", "",
             Format("", "{role}:\n", "<|endoftext|>", "\n",
                    (("system", "Context"), ("user", "Instruct"), ("assistant", "Output"), ("tool", "Result"))),
             is_instruct=False, seed=35, splits="punctuation", stops=("<|endoftext|>",)),
    )
}  # fmt: skip
LINEARS = {
    "GPTBigCode": ["c_attn", "c_proj", "c_fc"],
    "Nemotron": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    "Phi": ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"],
}
TEMPLATES = {"smol3-think": "smollm", "bigcode-said": "default", "nemotron-fold": "mistral", "hunyuan-tools": "hunyuan"}
"""LLaMA-Factory's names of these formats."""


def linears(base: Base) -> list[str]:
    return linears_of(base, LINEARS)


def folder_of(name: str) -> Path:
    return cache_folder_of(KINDS[name], [STEPS, PEAK, TEXTS, TOKENS])


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
            text = rng.choice((corpus.prose, corpus.foreign, corpus.code, corpus.broad, corpus.broad))(rng)
            texts.append((kind.bos or "") + text + kind.eos)
    return texts


def _make_tokenizer(kind: Sort) -> PreTrainedTokenizerFast:
    rng = random.Random(kind.seed)
    texts = [rng.choice((corpus.prose, corpus.foreign, corpus.code))(rng) for _ in range(2500)]
    texts += [m["content"] for _ in range(1500) for m in corpus.chat(rng)]
    texts += [m["content"] for task in tasks.TASKS.values() for _ in range(60) for m in task(rng)]
    for special in kind.specials:
        texts = [text.replace(special, " ") for text in texts]
    make = {"unigram": unigram, "metaspace": metaspace, "tiktoken": _tiktoken}.get(kind.splits, byte_level)
    return fast_tokenizer(kind, make(kind, texts))


def _tiktoken(kind: Sort, texts: list[str]) -> Any:
    """As Llama 3's and GPT-4's: numbers in threes, words with their leading space."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")  # fmt: skip
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=kind.vocab, special_tokens=list(kind.specials), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _make(kind: Sort, folder: Path) -> None:
    """Trains tokenizer and model; whole or not at all."""
    started = time.perf_counter()
    tokenizer: Any = _make_tokenizer(kind)
    model = new_model(kind, tokenizer)
    pretrain(model, tokenizer, _corpus(kind, TEXTS, 0), STEPS, PEAK, kind.seed)
    finish(kind, folder, tokenizer, model, _corpus(kind, 300, 1), started)
