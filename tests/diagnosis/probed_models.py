"""A tiny model that knows some texts and chats, plain PEFT on it, and batches made by hand, right or wrong.

Nothing of solotune's own data path is used, since that cannot make most of the faults.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tiny import FAMILIES, save_tokenizer

from solotune.diagnosis.run_facts import LiveModel, RunFacts, Settings

WORDS = "ant bee cat dog eel fox gnu hen ibis jay".split()
Pair = tuple[list[int], list[int]]


def chats(count: int, begin: int = 0) -> list[list[dict[str, str]]]:
    """The answer repeats words of the question, so that a prompt matters."""
    found = []
    for i in range(begin, begin + count):
        a, b = WORDS[i % 10], WORDS[(i * 7 + i // 10) % 10]
        found.append([{"role": "user", "content": f"{a} {b}?"}, {"role": "assistant", "content": f"{a} {a} {b}."}])
    return found


def render(tokenizer: Any, chat: Sequence[dict[str, str]]) -> Pair:
    """(ids, labels of the answer with its end)."""
    prompt = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(chat, return_dict=False)[:-1]  # without the line break behind the end
    return whole, [-100] * len(prompt) + whole[len(prompt) :]


def padded(rows: Sequence[Pair], pad: int, left: bool = False, mask: bool = True) -> dict[str, torch.Tensor]:
    longest = max(len(ids) for ids, _ in rows)

    def filled(values: list[int], by: int) -> list[int]:
        gap = [by] * (longest - len(values))
        return gap + values if left else values + gap

    batch = {
        "input_ids": torch.tensor([filled(ids, pad) for ids, _ in rows]),
        "labels": torch.tensor([filled(labels, -100) for _, labels in rows]),
        "attention_mask": torch.tensor([filled([1] * len(ids), 0) for ids, _ in rows]),
    }
    return batch if mask else {k: v for k, v in batch.items() if k != "attention_mask"}


def packed(rows: Sequence[Pair], restart: bool = True, mask: bool = False) -> dict[str, torch.Tensor]:
    ids = [i for row, _ in rows for i in row]
    positions = [t for row, _ in rows for t in range(len(row))] if restart else list(range(len(ids)))
    batch = {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([[label for _, labels in rows for label in labels]]),
        "position_ids": torch.tensor([positions]),
    }
    return {**batch, "attention_mask": torch.ones(1, len(ids), dtype=torch.long)} if mask else batch


@cache
def tokenizer_at(folder: Path) -> Any:
    save_tokenizer(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


@cache
def _pretrained(family: str, folder: Path) -> transformers.PreTrainedModel:
    """Chats in the template's form, and the same texts bare; a few seconds."""
    tokenizer = tokenizer_at(folder)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    known = chats(100)
    bare = [tokenizer.encode(" ".join(m["content"] for m in chat), add_special_tokens=False) for chat in known]
    rows = [render(tokenizer, chat)[0] for chat in known] + bare
    generator = torch.Generator().manual_seed(0)
    for _ in range(180):
        chosen = [rows[i] for i in torch.randint(len(rows), (12,), generator=generator).tolist()]
        batch = padded([(ids, ids) for ids in chosen], pad=0)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def moved(tokenizer: Any, by: int) -> Any:
    """The same pieces, all of their ids but those of added tokens moved by some places."""
    import json

    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["content"] for token in state["added_tokens"]}
    pieces = [piece for piece in state["model"]["vocab"] if piece not in added]
    ids = [state["model"]["vocab"][piece] for piece in pieces]
    state["model"]["vocab"] |= dict(zip(pieces, ids[by:] + ids[:by], strict=True))
    named = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token")}
    other = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **named)
    other.chat_template = tokenizer.chat_template
    return other


def without_markers(tokenizer: Any, *lost: str) -> Any:
    """The tokenizer after a conversion that kept the ids and forgot that these are tokens of their own."""
    import json

    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [one for one in state["added_tokens"] if one["content"] not in lost]
    vocab = state["model"]["vocab"]
    state["model"]["vocab"] = {f"\u0100unused{i}" if word in lost else word: i for word, i in vocab.items()}
    named = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token")}
    named = {name: text for name, text in named.items() if text not in lost}
    other = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **named)
    other.chat_template = tokenizer.chat_template
    return other


Change = Callable[[Any], None]


class Ward:
    """Makes patients of one family."""

    def __init__(self, folder: Path, family: str = "llama") -> None:
        self.tokenizer, self.family, self._folder = tokenizer_at(folder), family, folder

    def model(self, **lora: Any) -> Any:
        import copy

        model = copy.deepcopy(_pretrained(self.family, self._folder))
        torch.manual_seed(1)
        given = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
        return peft.get_peft_model(model, peft.LoraConfig(**given))

    def rows(self, count: int = 16) -> list[Pair]:
        return [render(self.tokenizer, chat) for chat in chats(count, 100)]

    def new_rows(self, count: int = 16) -> list[Pair]:
        """A task that the model does not know."""
        known = chats(count, 100)
        for question, answer in known:
            a, b = question["content"].rstrip("?").split()
            answer["content"] = f"[{b}] no {a.upper()}"
        return [render(self.tokenizer, chat) for chat in known]

    def live(self, model: Any = None, batches: Sequence[Any] | None = None, **parts: Any) -> LiveModel:
        rows = self.rows()
        usual = [padded(rows[i : i + 4], pad=2) for i in range(0, len(rows), 4)]
        return LiveModel(self.model() if model is None else model, usual if batches is None else batches, **parts)

    def run_facts(self, batches: Sequence[Any] = (), **parts: Any) -> RunFacts:
        values = {"learning_rate": 1e-3, "assistant_only_loss": True, "max_length": 128, **parts.pop("settings", {})}
        given = {"tokenizer": self.tokenizer, "conversations": chats(16, 100), "batches": batches, **parts}
        return RunFacts("a run", Settings(values), **given)
