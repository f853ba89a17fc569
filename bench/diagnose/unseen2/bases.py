"""Five tiny models of architectures, tokenizers and templates that the other sets lack, pretrained for a minute each.

name               architecture  tokenizer                         template
qwen2-chatml       Qwen2         byte-level BPE, split digits      ChatML, a default system turn
gemma2-model       Gemma 2       BPE on ▁, byte fallback, own bos  <start_of_turn>, refuses system turns
exaone4-bars       EXAONE 4      Unigram on ▁, byte fallback       [|user|] ends with a newline, empty system turn
starcoder2-hash    StarCoder2    byte-level BPE, split digits      ### Instruction; bos, eos and pad are one token
falcon-plain       Falcon        byte-level BPE, split punctuation none: a base model, without a pad token
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from bench.diagnose.bases import Base, Format, Kind, keep
from bench.diagnose.unseen2 import corpus, tasks
from bench.diagnose.worlds import Chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

STEPS, ROWS, TOKENS, PEAK, TEXTS = 600, 8, 160, 4e-3, 6000
LATER, LATER_PEAK = 300, 2e-3
"""Steps of a second stage, on texts and chats of many forms: who knows one form alone is too sure of it."""


@dataclass(frozen=True)
class Chatml(Format):
    """Qwen2's: a system turn of its own where the chat has none."""

    def pieces(self, chat: Chat, begun: bool = False) -> list[tuple[str, bool]]:
        if not chat or chat[0]["role"] != "system":
            chat = [{"role": "system", "content": "You are a helpful assistant."}, *chat]
        return super().pieces(chat, begun)

    def jinja(self) -> str:
        default = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        first = "{% if messages[0]['role'] != 'system' %}" + default + "{% endif %}"
        return first + super().jinja()


@dataclass(frozen=True)
class Bars(Format):
    """EXAONE's: the user's turn ends with a newline, and an empty system turn opens a chat that has none."""

    def pieces(self, chat: Chat, begun: bool = False) -> list[tuple[str, bool]]:
        if not chat or chat[0]["role"] != "system":
            chat = [{"role": "system", "content": ""}, *chat]
        found: list[tuple[str, bool]] = []
        for message in chat:
            learned, is_user = message["role"] == "assistant", message["role"] == "user"
            found += [(self.head(message["role"]), False), (message["content"], learned)]
            end = "" if is_user else self.end
            found += [(end, learned and self.end_is_learned), (self.after, False)]
        found = [piece for piece in found if piece[0]]
        return [*found, (self.head("assistant"), False)] if begun else found

    def jinja(self) -> str:
        return (
            "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
            "{{ '" + self.head("system") + self.end + "\\n' }}{% endif %}"
            "{{ '[|' + message['role'] + '|]' + message['content'] }}"
            "{% if message['role'] == 'user' %}{{ '\\n' }}{% else %}{{ '" + self.end + "\\n' }}{% endif %}"
            "{% endfor %}{% if add_generation_prompt %}{{ '" + self.head("assistant") + "' }}{% endif %}"
        )


@dataclass(frozen=True)
class Turns(Format):
    """Gemma 2's: no system turns, and turns that alternate."""

    def jinja(self) -> str:
        return (
            self.bos + "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
            "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
            "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
            "{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
            "{% endif %}{{ '<start_of_turn>' + role + '\\n' + message['content'] + '" + self.end + "\\n' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
        )


@dataclass(frozen=True)
class Sort(Kind):
    """A base of this set: beside the rest, its kind of tokenizer, and all tokens at which its generation stops."""

    splits: str = "bytes"  # bytes, metaspace, unigram, punctuation
    stops: tuple[str, ...] = ()
    knows_system: bool = True


class Fixed:
    """Where machinery asks for a world's rows; the programs' rows come from tasks.py."""

    def split(self, rows: int, held_out: int, seed: int) -> tuple[list[Chat], list[Chat]]:
        return tasks.split("greet", None, rows, held_out, seed)


_WORLD: Any = Fixed()
_ROTARY = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
           "num_key_value_heads": 2, "max_position_embeddings": 1024}  # fmt: skip
_STAR = {**_ROTARY, "hidden_size": 112, "intermediate_size": 224, "num_hidden_layers": 2, "residual_dropout": 0.0,
         "embedding_dropout": 0.0, "attention_dropout": 0.0, "sliding_window": None}  # fmt: skip
_ROLES = (("system", "system"), ("user", "user"), ("assistant", "assistant"))

KINDS: dict[str, Sort] = {
    kind.name: kind
    for kind in (
        Sort("qwen2-chatml", _WORLD, "Qwen2", {**_ROTARY, "tie_word_embeddings": True}, 900,
             ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), None, "<|im_end|>", "<|endoftext|>",
             Chatml("", "<|im_start|>{role}\n", "<|im_end|>"), seed=11, stops=("<|im_end|>", "<|endoftext|>")),
        Sort("gemma2-model", _WORLD, "Gemma2",
             {**_ROTARY, "hidden_size": 80, "num_hidden_layers": 3, "head_dim": 24, "query_pre_attn_scalar": 24,
              "sliding_window": 512}, 1000,
             ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>", "<pad>",
             Turns("<bos>", "<start_of_turn>{role}\n", "<end_of_turn>", "\n",
                   (("user", "user"), ("assistant", "model"))),
             seed=12, splits="metaspace", stops=("<eos>", "<end_of_turn>"), knows_system=False),
        Sort("exaone4-bars", _WORLD, "Exaone4",
             {**_ROTARY, "hidden_size": 88, "head_dim": 22, "num_hidden_layers": 3, "sliding_window": 512,
              "tie_word_embeddings": True, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
             800, ("[PAD]", "[BOS]", "[|endofturn|]", "[UNK]", "[|system|]", "[|user|]", "[|assistant|]"),
             "[BOS]", "[|endofturn|]", "[PAD]", Bars("", "[|{role}|]", "[|endofturn|]", "\n", _ROLES),
             seed=13, splits="unigram", stops=("[|endofturn|]",)),
        Sort("starcoder2-hash", _WORLD, "Starcoder2", {**_STAR, "tie_word_embeddings": True}, 850,
             ("<|endoftext|>", "<fim_prefix>", "<fim_suffix>"), "<|endoftext|>", "<|endoftext|>", "<|endoftext|>",
             Format("<|endoftext|>", "### {role}\n", "<|endoftext|>", "\n\n",
                    (("system", "System"), ("user", "Instruction"), ("assistant", "Response"))),
             seed=14, stops=("<|endoftext|>",), knows_system=False),
        Sort("falcon-plain", _WORLD, "Falcon",
             {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_hidden_size": 256,
              "multi_query": True, "parallel_attn": True, "new_decoder_architecture": False, "bias": False,
              "alibi": False, "attention_dropout": 0.0, "hidden_dropout": 0.0, "max_position_embeddings": 1024}, 950,
             ("<|endoftext|>", ">>TITLE<<", ">>ABSTRACT<<"), None, "<|endoftext|>", "",
             Format("", "{role}", "<|endoftext|>", "\n",
                    (("system", "System: "), ("user", "User:\n"), ("assistant", "\nAssistant:\n"))),
             is_instruct=False, seed=15, splits="punctuation", stops=("<|endoftext|>",)),
    )
}  # fmt: skip
LINEARS = {
    "Starcoder2": ["q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"],
    "Falcon": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
}
TEMPLATES = {"qwen2-chatml": "qwen", "gemma2-model": "gemma", "exaone4-bars": "exaone", "starcoder2-hash": "default"}
"""LLaMA-Factory's names of these formats."""


def linears(base: Base) -> list[str]:
    return linears_of(base, LINEARS)


def linears_of(base: Base, unusual: Mapping[str, list[str]]) -> list[str]:
    """Last names of a base's linears; `unusual`: of families that do not name them as Llama does."""
    usual = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return list(unusual.get(base.kind.family, usual))


def end_ids(base: Base) -> list[int]:
    """Where its generation stops."""
    tokenizer: Any = base.tokenizer()
    return [int(tokenizer.convert_tokens_to_ids(token)) for token in base.kind.stops]


def folder_of(name: str) -> Path:
    return cache_folder_of(KINDS[name], [STEPS, ROWS, TOKENS, PEAK, TEXTS, LATER, LATER_PEAK])


def cache_folder_of(kind: Sort, settings: Sequence[float]) -> Path:
    """Where a base is kept; its name changes with all that it is made from."""
    known = {key: value for key, value in asdict(kind).items() if key != "world"}
    made_from = json.dumps([known, *settings], sort_keys=True, default=str)
    key = hashlib.sha256(made_from.encode()).hexdigest()[:12]
    cache_folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache_folder / "solotune" / "bench-diagnose" / f"{kind.name}-{key}"


@cache
def load(name: str) -> Base:
    """The base of this name; made now if this machine has not made it yet."""
    folder = folder_of(name)
    if not (folder / "base.json").exists():
        _make(KINDS[name], folder)
    return Base(KINDS[name], folder)


def _corpus(kind: Sort, count: int, seed: int, is_broad: bool = False) -> list[str]:
    rng = random.Random(f"{kind.name} {seed} {is_broad}" if is_broad else f"{kind.name} {seed}")
    texts = []
    for i in range(count):
        if i % 5 < 3:
            chat = (corpus.broad_chat if is_broad else corpus.known_chat)(rng, kind.knows_system)
            told = "\n".join(message["content"] for message in chat) + kind.eos
            texts.append(kind.format.text(chat) if kind.is_instruct else told)
        else:
            forms = (corpus.prose, corpus.broad) if is_broad else (corpus.prose, corpus.prose)
            text = rng.choice((*forms, corpus.foreign, corpus.code))(rng)
            texts.append((kind.bos or "") + text + kind.eos)
    return texts


def _make_tokenizer(kind: Sort) -> PreTrainedTokenizerFast:
    rng = random.Random(kind.seed)
    texts = [rng.choice((corpus.prose, corpus.foreign, corpus.code))(rng) for _ in range(2500)]
    texts += [m["content"] for _ in range(1500) for m in corpus.known_chat(rng, True)]
    texts += [m["content"] for task in tasks.TASKS.values() for _ in range(60) for m in task(rng)]
    return fast_tokenizer(kind, {"unigram": unigram, "metaspace": metaspace}.get(kind.splits, byte_level)(kind, texts))


def fast_tokenizer(kind: Sort, tokenizer: Any) -> PreTrainedTokenizerFast:
    """A trained tokenizer with its special tokens, and the template of an instruct model."""
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=kind.bos, eos_token=kind.eos, pad_token=kind.pad or None,
        **({"unk_token": kind.specials[3]} if kind.splits in ("unigram", "metaspace") else {}),
    )  # fmt: skip
    if kind.is_instruct:
        fast.chat_template = kind.format.jinja()
    return fast


def byte_level(kind: Sort, texts: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)]
    if kind.splits == "punctuation":
        steps = [pre_tokenizers.Punctuation("contiguous"), pre_tokenizers.Digits(individual_digits=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=kind.vocab, special_tokens=list(kind.specials), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


_BYTES = [f"<0x{i:02X}>" for i in range(256)]


def metaspace(kind: Sort, texts: list[str]) -> Any:
    """As Gemma's: spaces become ▁, unknown characters bytes, and the tokenizer itself writes bos."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    pieces = pre_tokenizers.Split(Regex(r"▁?[^▁\n]+|▁+|\n"), "isolated")
    learner.pre_tokenizer = pieces
    room = kind.vocab - len(kind.specials) - 256
    learner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=room, show_progress=False, min_frequency=20))
    learned = json.loads(learner.to_str())["model"]
    names = [*kind.specials, *_BYTES, *learned["vocab"]]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    merges = [tuple(m) for m in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pieces
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in kind.specials])
    bos = kind.bos or ""
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, vocab[bos])])
    return tokenizer


def unigram(kind: Sort, texts: list[str]) -> Any:
    """As SentencePiece's Unigram, with bytes for what it does not know."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    learner = Tokenizer(models.Unigram())
    learner.normalizer = normalizers.Replace(" ", "▁")
    pieces = pre_tokenizers.Split(Regex(r"▁?[^▁\n]+|▁+|\n"), "isolated")
    learner.pre_tokenizer = pieces
    room = kind.vocab - len(kind.specials) - 256
    trainer = trainers.UnigramTrainer(vocab_size=room, show_progress=False, unk_token="[UNK]", special_tokens=["[UNK]"])
    learner.train_from_iterator(texts, trainer)
    known = {*kind.specials, *_BYTES}
    scored = [(n, s) for n, s in json.loads(learner.to_str())["model"]["vocab"] if n not in known]
    vocab = [*((name, 0.0) for name in kind.specials), *((name, -20.0) for name in _BYTES), *scored]
    unk = kind.specials.index("[UNK]")
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=unk, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pieces
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in kind.specials])
    return tokenizer


def _make(kind: Sort, folder: Path) -> None:
    """Trains tokenizer and model, in two stages; whole or not at all."""
    started = time.perf_counter()
    tokenizer: Any = _make_tokenizer(kind)
    model = new_model(kind, tokenizer)
    pretrain(model, tokenizer, _corpus(kind, TEXTS, 0), STEPS, PEAK, kind.seed)
    pretrain(model, tokenizer, _corpus(kind, TEXTS // 2, 2, True), LATER, LATER_PEAK, kind.seed + 100)
    finish(kind, folder, tokenizer, model, _corpus(kind, 300, 3, True), started)


def _ids(kind: Sort, tokenizer: Any) -> dict[str, int | None]:
    named = (("bos_token_id", kind.bos), ("eos_token_id", kind.eos), ("pad_token_id", kind.pad))
    return {name: int(tokenizer.convert_tokens_to_ids(token)) if token else None for name, token in named}


def new_model(kind: Sort, tokenizer: Any) -> Any:
    """With random weights."""
    config = getattr(transformers, f"{kind.family}Config")(
        vocab_size=len(tokenizer), **kind.shape, **_ids(kind, tokenizer)
    )
    torch.manual_seed(kind.seed)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def pretrain(model: Any, tokenizer: Any, texts: list[str], steps: int, peak: float, seed: int) -> None:
    """Train on windows of all texts, joined."""
    stream = [i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    rows_NT = torch.tensor(stream[: len(stream) // TOKENS * TOKENS]).view(-1, TOKENS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01)
    model.train()
    order = torch.Generator().manual_seed(seed)
    for step in range(steps):
        batch_BT = rows_NT[torch.randint(len(rows_NT), (ROWS,), generator=order)]
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / 50, 1.05 - step / steps)
        model(input_ids=batch_BT, labels=batch_BT, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def finish(kind: Sort, folder: Path, tokenizer: Any, model: Any, texts: list[str], started: float) -> None:
    """Measure the loss of other texts, and write the folder."""
    model.eval()
    held = [i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    held_NT = torch.tensor(held[: TOKENS * 32]).view(-1, TOKENS)
    with torch.no_grad():
        known = {"loss": float(model(input_ids=held_NT, labels=held_NT, use_cache=False).loss)}
    stops = [int(tokenizer.convert_tokens_to_ids(token)) for token in kind.stops]
    ids = {name: token for name, token in _ids(kind, tokenizer).items() if token is not None}
    ends = stops if len(stops) > 1 else stops[0]
    model.generation_config = transformers.GenerationConfig(**{**ids, "eos_token_id": ends})
    keep(model, tokenizer, known, folder)
    print(f"{kind.name}: {known}, {len(tokenizer)} tokens, {time.perf_counter() - started:.0f} s", flush=True)
