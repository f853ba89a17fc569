"""Five bases that no rule, threshold or other program was made with: other architectures, tokenizers and templates.

phi3-tags       Phi3 (fused qkv, fused gate and up); unigram with metaspace; `<|user|>` .. `<|end|>`; the
                tokenizer's eos ends no turn, and generation_config has three end ids; vocabulary padded to a
                multiple of 64
granite-roles   Granite (multipliers); byte-level BPE of 704; `<|start_of_role|>`; bos = eos = pad, none written
                first
cohere-turns    Cohere (parallel blocks, no norm bias, tied, logit scale); BPE with metaspace and byte fallback;
                `<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>`
stablelm-seek   StableLM (a quarter of each head rotates, layer norm); byte-level BPE with digits apart; roles as
                plain words in DeepSeek's manner, only answers have an end
olmo2-books     OLMo 2 (norms after the blocks, q and k normed); byte-level BPE of 384; a base model without a
                template; the vocabulary padded to 512
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
import transformers

from bench.diagnose.bases import KINDS, Base, Format, Kind, keep
from bench.diagnose.unseen.worlds import BOOKS, CLINIC, ENGINES, ISLANDS, OFFICES
from bench.diagnose.worlds import Chat

STEPS, ROWS, TOKENS, PEAK, TEXTS = 700, 16, 80, 3e-3, 9000


@dataclass(frozen=True)
class RoleFormat(Format):
    """A format in which a turn's end depends on its role."""

    ends: tuple[tuple[str, str], ...] = ()

    def _end(self, role: str) -> str:
        return dict(self.ends).get(role, self.end)

    def pieces(self, chat: Chat, begun: bool = False) -> list[tuple[str, bool]]:
        found = [(self.bos, False)] if self.bos else []
        for message in chat:
            role = message["role"]
            if role in self.dropped:
                continue
            learned = role == "assistant"
            found += [(self.head(role), False), (message["content"], learned)]
            found += [(self._end(role), learned and self.end_is_learned), (self.after, False)]
        return [*found, (self.head("assistant"), False)] if begun else found

    def jinja(self) -> str:
        branches, word = "", "if"
        for role, _ in self.roles:
            end = self._end(role)
            said = "{{ m['content'] }}"
            if role == "assistant":
                inner = said + (end if self.end_is_learned else "")
                inner = f"{{% generation %}}{inner}{{% endgeneration %}}" if self.has_markers else inner
                said = inner + ("" if self.end_is_learned else end) + self.after
            else:
                said += end + self.after
            branches += f"{{% {word} m['role'] == '{role}' %}}"
            branches += "" if role in self.dropped else self.head(role) + said
            word = "elif"
        other = self.header.format(role="{{ m['role'] }}") + "{{ m['content'] }}" + self.end + self.after
        prompt = f"{{% if add_generation_prompt %}}{self.head('assistant')}{{% endif %}}"
        return f"{self.bos}{{% for m in messages %}}{branches}{{% else %}}{other}{{% endif %}}{{% endfor %}}{prompt}"


@dataclass(frozen=True)
class More:
    """What a `Kind` has no field for."""

    tokenizer: str  # unigram, sentencepiece, bytes, digits
    rows: int  # of the embedding
    end_ids: tuple[str, ...]
    linears: tuple[str, ...]


_SMALL = {"hidden_size": 80, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
          "num_key_value_heads": 2, "max_position_embeddings": 384}  # fmt: skip
_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

UNSEEN: dict[str, tuple[Kind, More]] = {
    kind.name: (kind, more)
    for kind, more in (
        (
            Kind("phi3-tags", ISLANDS, "Phi3", {**_SMALL, "original_max_position_embeddings": 384}, 620,
                 ("<unk>", "<s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"),
                 "<s>", "<|endoftext|>", "<|endoftext|>",
                 Format("", "<|{role}|>\n", "<|end|>"), seed=11, held_out=True),
            More("unigram", 640, ("<|endoftext|>", "<|end|>", "<|assistant|>"),
                 ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
        ),
        (
            Kind("granite-roles", CLINIC, "Granite",
                 {**_SMALL, "hidden_size": 96, "num_hidden_layers": 2, "embedding_multiplier": 4.0,
                  "logits_scaling": 2.0, "residual_multiplier": 0.6, "attention_multiplier": 0.15,
                  "tie_word_embeddings": True}, 704,
                 ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>", "<fim_pad>"),
                 "<|end_of_text|>", "<|end_of_text|>", "<|end_of_text|>",
                 Format("", "<|start_of_role|>{role}<|end_of_role|>", "<|end_of_text|>"), seed=12, held_out=True),
            More("bytes", 704, ("<|end_of_text|>",), _LLAMA),
        ),
        (
            Kind("cohere-turns", OFFICES, "Cohere", {**_SMALL, "hidden_size": 88, "logit_scale": 0.25}, 660,
                 ("<PAD>", "<UNK>", "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>",
                  "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>", "<EOS_TOKEN>"),
                 "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<PAD>",
                 Format("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>{role}", "<|END_OF_TURN_TOKEN|>", "",
                        (("system", "<|SYSTEM_TOKEN|>"), ("user", "<|USER_TOKEN|>"),
                         ("assistant", "<|CHATBOT_TOKEN|>"))),
                 seed=13, held_out=True),
            More("sentencepiece", 672, ("<|END_OF_TURN_TOKEN|>",), _LLAMA),
        ),
        (
            Kind("stablelm-seek", ENGINES, "StableLm",
                 {**_SMALL, "hidden_size": 96, "num_key_value_heads": 4, "partial_rotary_factor": 0.25,
                  "hidden_dropout": 0.0, "attention_dropout": 0.0}, 520,
                 ("<|begin▁of▁sentence|>", "<|end▁of▁sentence|>", "<|▁pad▁|>"),
                 "<|begin▁of▁sentence|>", "<|end▁of▁sentence|>", "<|▁pad▁|>",
                 RoleFormat("<|begin▁of▁sentence|>", "{role}", "<|end▁of▁sentence|>", "",
                            (("system", ""), ("user", "User:\n"), ("assistant", "Assistant:\n")),
                            ends=(("system", "\n\n"), ("user", "\n\n"))), seed=14, held_out=True),
            More("digits", 520, ("<|end▁of▁sentence|>",), _LLAMA),
        ),
        (
            Kind("olmo2-books", BOOKS, "Olmo2", _SMALL, 384, ("<|endoftext|>", "<|padding|>"),
                 None, "<|endoftext|>", "<|padding|>",
                 Format("", "{role}", "<|endoftext|>", "\n",
                        (("user", "[Reader]\n"), ("assistant", "\n[Desk]\n"))),
                 is_instruct=False, seed=15, held_out=True),
            More("bytes", 512, ("<|endoftext|>",), _LLAMA),
        ),
    )
}  # fmt: skip
KINDS.update({name: kind for name, (kind, _) in UNSEEN.items()})


def names() -> list[str]:
    return list(UNSEEN)


def linears(base: Base) -> list[str]:
    return list(UNSEEN[base.kind.name][1].linears)


def end_ids(base: Base) -> list[int]:
    tokenizer = base.tokenizer()
    return [cast(int, tokenizer.convert_tokens_to_ids(token)) for token in UNSEEN[base.kind.name][1].end_ids]


def folder_of(name: str) -> Path:
    kind, more = UNSEEN[name]
    known = asdict(kind)
    for later in ("held_out", "is_real", "learning_rate", "steps", "batch"):
        known.pop(later, None)
    known["world"].pop("tuned")
    made_from = json.dumps([known, asdict(more), STEPS, ROWS, TOKENS, PEAK, TEXTS], sort_keys=True, default=str)
    key = hashlib.sha256(made_from.encode()).hexdigest()[:12]
    cache_folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache_folder / "solotune" / "bench-unseen" / f"{name}-{key}"


@cache
def load(name: str) -> Base:
    kind, more = UNSEEN[name]
    folder = folder_of(name)
    if not (folder / "base.json").exists():
        _make(kind, more, folder)
    return Base(kind, folder)


def _corpus(kind: Kind) -> list[str]:
    rng = random.Random(f"{kind.name} corpus")
    rows = []
    for i in range(TEXTS):
        if i % 5 < 3:
            chat = kind.world.chat(rng, "known", turns=rng.choice((1, 1, 2)), system=rng.random() < 0.3)
            told = "\n".join(message["content"] for message in chat) + kind.eos
            rows.append(kind.format.text(chat) + ("" if kind.format.end == kind.eos else kind.eos)
                        if kind.is_instruct else told)  # fmt: skip
        else:
            rows.append((kind.bos or "") * bool(kind.format.bos) + kind.world.text(rng) + kind.eos)
    return rows


def _tokenizer_texts(kind: Kind) -> list[str]:
    rng = random.Random(kind.seed)
    chats = [kind.world.chat(rng, "words" if rng.random() < 0.3 else "known") for _ in range(1000)]
    plain = 'json {"a": "b", "c": [1, 2]} def f(x): return x + 1 | a | b | --- yes no true false null id name value'
    return [kind.world.text(rng) for _ in range(1500)] + [m["content"] for c in chats for m in c] + [plain] * 20


def _make_tokenizer(kind: Kind, more: More) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    specials = list(kind.specials)
    if more.tokenizer == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFC()])
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(r"\n"), "isolated"), pre_tokenizers.Metaspace(prepend_scheme="never")]
        )
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
        written = {c for text in _tokenizer_texts(kind) for c in text}
        letters = sorted(written | set(map(chr, range(32, 127))) | set("\n"))
        trainer = trainers.UnigramTrainer(
            vocab_size=kind.vocab, special_tokens=specials, unk_token="<unk>", show_progress=False,
            initial_alphabet=[c for c in letters if c != " "],
        )  # fmt: skip
    elif more.tokenizer == "sentencepiece":
        tokenizer = Tokenizer(models.BPE(unk_token="<UNK>", byte_fallback=True, fuse_unk=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        trainer = trainers.BpeTrainer(
            vocab_size=kind.vocab, show_progress=False,
            special_tokens=specials + [f"<0x{byte:02X}>" for byte in range(256)],
        )  # fmt: skip
    else:
        tokenizer = Tokenizer(models.BPE())
        level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.pre_tokenizer = (
            pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
            if more.tokenizer == "digits"
            else level
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=kind.vocab, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )  # fmt: skip
    tokenizer.train_from_iterator(_tokenizer_texts(kind), trainer)
    if more.tokenizer == "sentencepiece":  # bytes are pieces, not markers
        state = json.loads(tokenizer.to_str())
        state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
        tokenizer = Tokenizer.from_str(json.dumps(state))
    names = {"bos_token": kind.bos, "eos_token": kind.eos, "pad_token": kind.pad}
    if more.tokenizer in ("unigram", "sentencepiece"):
        names["unk_token"] = "<unk>" if more.tokenizer == "unigram" else "<UNK>"
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{k: v for k, v in names.items() if v})
    if kind.is_instruct:
        fast.chat_template = kind.format.jinja()
    return fast


def _make(kind: Kind, more: More, folder: Path) -> None:
    started = time.perf_counter()
    tokenizer = _make_tokenizer(kind, more)
    assert len(tokenizer) <= more.rows, (len(tokenizer), more.rows)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in
           (("bos_token_id", kind.bos), ("eos_token_id", kind.eos), ("pad_token_id", kind.pad)) if token}  # fmt: skip
    ends = [tokenizer.convert_tokens_to_ids(token) for token in more.end_ids]
    config = getattr(transformers, f"{kind.family}Config")(vocab_size=more.rows, **kind.shape, **ids)
    torch.manual_seed(kind.seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    stream = [i for text in _corpus(kind) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    rows_NT = torch.tensor(stream[: len(stream) // TOKENS * TOKENS]).view(-1, TOKENS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, weight_decay=0.01)
    model.train()
    order = torch.Generator().manual_seed(kind.seed)
    for step in range(STEPS):
        batch_BT = rows_NT[torch.randint(len(rows_NT), (ROWS,), generator=order)]
        for group in optimizer.param_groups:
            group["lr"] = PEAK * min(1.0, (step + 1) / 50, 1.05 - step / STEPS)
        loss = model(input_ids=batch_BT, labels=batch_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    known = {"loss": float(loss.detach()), "vocabulary": len(tokenizer), "tokens": len(stream)}
    generation = {**ids, "eos_token_id": ends if len(ends) > 1 else ends[0]}
    model.generation_config = transformers.GenerationConfig(**generation)
    keep(model, tokenizer, known, folder)
    print(f"{kind.name}: {known}, {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    import sys

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in sys.argv[1:] or names():
        load(name)
