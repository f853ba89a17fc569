"""Tiny models that know a world: pretrained for a minute on its texts and chats, and kept by content.

    base = load("llama-chatml")      base.model() is a fresh copy, base.tokenizer() too

Pretraining is what gives an initial loss, a plain text's loss and a prompt their meaning: a random model is as bad
under the right template as under a wrong one. Seven architectures, so that nothing is fitted to one: rotary positions
with grouped heads, absolute positions (two kinds), Conv1D and fused linears, a tied and scaled embedding, parallel
blocks; instruct with BOS and without, and a base model that knows no chats.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import shutil
import time
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from bench.diagnose.worlds import ANIMALS, CITIES, CREW, PLANTS, SHOP, Chat, World
from bench.diagnose.worlds_held_out import KITCHEN, RAILWAY, TOOLS
from examples import smollm2

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

STEPS, ROWS, TOKENS, PEAK = 800, 16, 80, 3e-3
"""Of pretraining: steps, rows of a batch, tokens of a row, learning rate."""
TEXTS = 12_000
"""Texts and chats that it sees, some of them twice."""


@dataclass(frozen=True)
class Format:
    """A chat template as data: what stands before a turn, and after it."""

    bos: str
    header: str  # {role}
    end: str
    after: str = "\n"
    roles: tuple[tuple[str, str], ...] = (("system", "system"), ("user", "user"), ("assistant", "assistant"))
    dropped: tuple[str, ...] = ()  # roles that the template passes over
    end_is_learned: bool = True
    has_markers: bool = False  # {% generation %}

    def head(self, role: str) -> str:
        return self.header.format(role=dict(self.roles).get(role, role))

    def pieces(self, chat: Chat, begun: bool = False) -> list[tuple[str, bool]]:
        """Text and whether an answer's loss is wanted there; `begun` adds the header of the next answer."""
        found = [(self.bos, False)] if self.bos else []
        for message in chat:
            if message["role"] in self.dropped:
                continue
            learned = message["role"] == "assistant"
            found += [(self.head(message["role"]), False), (message["content"], learned)]
            found += [(self.end, learned and self.end_is_learned), (self.after, False)]
        return [*found, (self.head("assistant"), False)] if begun else found

    def text(self, chat: Chat, begun: bool = False) -> str:
        return "".join(text for text, _ in self.pieces(chat, begun))

    def jinja(self) -> str:
        """The same as a template; `{% generation %}` around what is learned."""
        say = "{{ m['content'] }}" + (f"{self.end}" if self.end_is_learned else "")
        rest = ("" if self.end_is_learned else self.end) + self.after
        learned = f"{{% generation %}}{say}{{% endgeneration %}}{rest}" if self.has_markers else f"{say}{rest}"
        branches, word = "", "if"
        for role, _ in self.roles:
            shown = "" if role in self.dropped else self.head(role) + (learned if role == "assistant" else say + rest)
            branches += f"{{% {word} m['role'] == '{role}' %}}{shown}"
            word = "elif"
        other = self.header.format(role="{{ m['role'] }}") + say + rest
        prompt = f"{{% if add_generation_prompt %}}{self.head('assistant')}{{% endif %}}"
        return f"{self.bos}{{% for m in messages %}}{branches}{{% else %}}{other}{{% endif %}}{{% endfor %}}{prompt}"


@dataclass(frozen=True)
class Kind:
    """What a base is made from."""

    name: str
    world: World
    family: str
    shape: dict[str, Any]
    vocab: int
    specials: tuple[str, ...]
    bos: str | None
    eos: str
    pad: str
    format: Format
    is_instruct: bool = True
    seed: int = 0
    held_out: bool = False
    is_real: bool = False
    """Not made here: SmolLM2 as people have it, with weights from a package; for a few programs, since it is slow."""
    learning_rate: float = 6e-3
    steps: int = 60
    batch: int = 8


_ROTARY = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
           "num_key_value_heads": 2, "max_position_embeddings": 512}  # fmt: skip
_QUIET = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

KINDS = {
    kind.name: kind
    for kind in (
        Kind("llama-chatml", ANIMALS, "Llama", _ROTARY, 480, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
             None, "<|im_end|>", "<|endoftext|>", Format("", "<|im_start|>{role}\n", "<|im_end|>")),
        Kind("gpt2-turns", SHOP, "GPT2", {"n_embd": 96, "n_layer": 3, "n_head": 4, "n_positions": 512, **_QUIET}, 560,
             ("<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"), "<s>", "</s>", "<pad>",
             Format("<s>", "<|{role}|>", "</s>", ""), seed=1),
        Kind("mistral-base", CITIES, "Mistral", {**_ROTARY, "hidden_size": 80, "head_dim": 20}, 440,
             ("<unk>", "<eos>", "<fill>"), None, "<eos>", "<fill>",
             Format("", "### {role}:\n", "<eos>", "\n", (("user", "Question"), ("assistant", "Reply"))),
             is_instruct=False, seed=2),
        Kind("qwen3-header", CREW, "Qwen3", {**_ROTARY, "num_hidden_layers": 2, "hidden_size": 112, "head_dim": 28},
             600, ("<|begin|>", "<|end|>", "<|sh|>", "<|eh|>", "<|eot|>", "<|finetune_pad|>"), "<|begin|>", "<|eot|>",
             "<|finetune_pad|>", Format("<|begin|>", "<|sh|>{role}<|eh|>\n\n", "<|eot|>", ""), seed=3),
        Kind("opt-inst", PLANTS, "OPT",
             {"hidden_size": 96, "ffn_dim": 192, "num_hidden_layers": 3, "num_attention_heads": 4, "dropout": 0.0,
              "max_position_embeddings": 512, "word_embed_proj_dim": 96}, 520,
             ("<pad>", "</s>", "[INST]", "[/INST]", "[ANS]", "[SYS]"), None, "</s>", "<pad>",
             Format("", "{role}", "</s>", "\n",
                    (("system", "[SYS]"), ("user", "[INST]"), ("assistant", "[/INST][ANS]"))), seed=4),
        Kind("gemma-turns", KITCHEN, "Gemma", {**_ROTARY, "hidden_size": 88, "head_dim": 22}, 500,
             ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"), "<bos>", "<end_of_turn>", "<pad>",
             Format("<bos>", "<start_of_turn>{role}\n", "<end_of_turn>", "\n",
                    (("system", "system"), ("user", "user"), ("assistant", "model"))), seed=5, held_out=True),
        Kind("neox-dialog", RAILWAY, "GPTNeoX",
             {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
              "max_position_embeddings": 512}, 540,
             ("<|endoftext|>", "<|padding|>", "<|prompter|>", "<|assistant|>", "<|prefix|>"),
             None, "<|endoftext|>", "<|padding|>",
             Format("", "{role}", "<|endoftext|>", "",
                    (("system", "<|prefix|>"), ("user", "<|prompter|>"), ("assistant", "<|assistant|>"))),
             seed=6, held_out=True),
        Kind("smollm2-135m", TOOLS, "Llama", {}, 49152, (), None, "<|im_end|>", "<|im_end|>",
             Format("", "<|im_start|>{role}\n", "<|im_end|>"), is_real=True,
             learning_rate=1e-3, steps=20, batch=4),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Base:
    """A pretrained model, on disk."""

    kind: Kind
    folder: Path

    @property
    def world(self) -> World:
        return self.kind.world

    def tokenizer(self) -> PreTrainedTokenizerFast:
        tokenizer = copy.deepcopy(_tokenizer(self.folder))
        if self.kind.is_real:
            tokenizer.chat_template = self.kind.format.jinja()  # without its default system turn
        return tokenizer

    def model(self) -> PreTrainedModel:
        """A copy, in float32."""
        return copy.deepcopy(_model(self.folder))


@cache
def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


@cache
def _model(folder: Path) -> PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def made_here() -> dict[str, Kind]:
    """The tiny ones."""
    return {name: kind for name, kind in KINDS.items() if not kind.is_real}


@cache
def load(name: str) -> Base:
    """The base of this name; made now if this machine has not made it yet."""
    kind = KINDS[name]
    if kind.is_real:
        return Base(kind, smollm2.ensure())
    known = asdict(kind)
    del known["world"]["tuned"]  # it is learned later
    for later in ("held_out", "is_real", "learning_rate", "steps", "batch"):
        del known[later]
    made_from = json.dumps([known, STEPS, ROWS, TOKENS, PEAK], sort_keys=True, default=str)
    key = hashlib.sha256(made_from.encode()).hexdigest()[:12]
    cache_folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache_folder / "solotune" / "bench-diagnose" / f"{name}-{key}"
    if not (folder / "base.json").exists():
        _make(kind, folder)
    return Base(kind, folder)


def _corpus(kind: Kind, count: int, seed: int) -> list[str]:
    """Texts and chats; for an instruct model through its template, else as prose."""
    rng = random.Random(f"{kind.name} {seed}")
    rows = []
    for i in range(count):
        if i % 5 < 3:
            chat = kind.world.chat(rng, "known", turns=rng.choice((1, 1, 2)), system=rng.random() < 0.3)
            told = "\n".join(message["content"] for message in chat) + kind.eos
            rows.append(kind.format.text(chat) if kind.is_instruct else told)
        else:
            rows.append((kind.bos or "") + kind.world.text(rng) + kind.eos)
    return rows


def _make_tokenizer(kind: Kind) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(kind.seed)
    texts = [kind.world.text(rng) for _ in range(2000)] + [
        message["content"]
        for _ in range(1000)
        for message in kind.world.chat(rng, "words" if rng.random() < 0.3 else "known")
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=kind.vocab,
        special_tokens=list(kind.specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=kind.bos, eos_token=kind.eos, pad_token=kind.pad
    )
    if kind.is_instruct:
        fast.chat_template = kind.format.jinja()
    return fast


def _make(kind: Kind, folder: Path) -> None:
    """Trains tokenizer and model, and measures what it knows; whole or not at all."""
    started = time.perf_counter()
    tokenizer = _make_tokenizer(kind)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in
           (("bos_token_id", kind.bos), ("eos_token_id", kind.eos), ("pad_token_id", kind.pad)) if token}  # fmt: skip
    config_class = getattr(transformers, f"{kind.family}Config")
    config = config_class(vocab_size=len(tokenizer), **kind.shape, **ids)
    torch.manual_seed(kind.seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    stream = [i for text in _corpus(kind, TEXTS, 0) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    rows_NT = torch.tensor(stream[: len(stream) // TOKENS * TOKENS]).view(-1, TOKENS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, weight_decay=0.01)
    model.train()
    order = torch.Generator().manual_seed(kind.seed)
    for step in range(STEPS):
        batch_BT = rows_NT[torch.randint(len(rows_NT), (ROWS,), generator=order)]
        for group in optimizer.param_groups:
            group["lr"] = PEAK * min(1.0, (step + 1) / 50, 1.05 - step / STEPS)
        model(input_ids=batch_BT, labels=batch_BT, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    rng = random.Random("held out")
    texts = [(kind.bos or "") + kind.world.text(rng) for _ in range(40)]
    chats = [kind.format.text(kind.world.chat(rng, "known")) for _ in range(40)]
    known = {"text_loss": _loss(model, tokenizer, texts), "chat_loss": _loss(model, tokenizer, chats)}
    model.generation_config = transformers.GenerationConfig(**ids)
    keep(model, tokenizer, known, folder)
    print(f"{kind.name}: {known}, {time.perf_counter() - started:.0f} s")


def keep(model: Any, tokenizer: Any, known: dict[str, Any], folder: Path) -> None:
    """Save a base, whole or not at all: several processes may make it at the same time."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "base.json").write_text(json.dumps(known))
    if folder.exists():  # another process was first
        shutil.rmtree(partial)
    else:
        partial.rename(folder)


@torch.no_grad()
def _loss(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    losses = []
    for text in texts:
        ids_1T = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        losses.append(float(model(input_ids=ids_1T, labels=ids_1T, use_cache=False).loss))
    return sum(losses) / len(losses)


def with_format(base: Base, **changes: Any) -> Format:
    """The base's format with something else in it."""
    return replace(base.kind.format, **changes)
