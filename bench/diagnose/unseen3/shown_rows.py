"""What a program's rows, labels and batches violate: a function per code, F04 to F30; true where it is that fault."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

from bench.diagnose.unseen2.verify import _loss
from bench.diagnose.unseen3.case import (
    Case,
    Shown,
    base_loss,
    differs_alone,
    place_of,
    share_of,
)
from bench.diagnose.unseen3.styles import IGNORE

# --- per code: what is shown, and whether that is the fault


def f04(c: Case) -> Shown:
    text = " ".join(m["content"] for chat in c.chats[:12] for m in chat)
    mine, right = c.ids(text), c.base.tokenizer()(text, add_special_tokens=False)["input_ids"]
    from bench.diagnose.recipe import Row

    model = c.base.model()
    losses = [_loss(model, [Row(list(ids[:250]), [True] * len(ids[:250]))]) for ids in (mine, right)]
    return {"loss": losses, "is_shown": losses[0] > 1.6 * losses[1]}


def f05(c: Case) -> Shown:
    most = max(max(c.ids(text)) for text in c.texts())
    rows = c.base.model().get_input_embeddings().weight.shape[0]
    return {"id": most, "rows": rows, "is_shown": most >= rows}


def f06(c: Case) -> Shown:
    old = c.base.model().get_input_embeddings().weight.shape[0]
    used = share_of(max(c.ids(text)) >= old for text in c.texts())
    learned = getattr(c.made, "adapters", {}).get("modules_to_save")
    return {"rows with new ids": used, "is_shown": used > 0.9 and not learned}


def f07(c: Case) -> Shown:
    before = c.clean.format.text(c.chats[0])
    right = len(c.base.tokenizer()(before, add_special_tokens=False)["input_ids"])
    mine = len(c.rows[0][0]) if c.rows else len(c.ids(before))
    return {"tokens": [mine, right], "is_shown": mine > 1.1 * right}


def f08(c: Case) -> Shown:
    bos = c.base.tokenizer().bos_token_id
    ids = c.rows[0][0] if c.rows else c.ids(c.texts()[0])
    return {"begin": ids[:3], "is_shown": ids[:2] == [bos, bos]}


def f09(c: Case) -> Shown:
    bos = c.base.tokenizer().bos_token_id
    ids = c.rows[0][0] if c.rows else c.ids(c.texts()[0])
    return {"begin": ids[:3], "is_shown": bos is not None and bos not in ids}


def f10(c: Case) -> Shown:
    ids = [i for i, _ in c.rows] or [c.ids(text) for text in c.texts()]
    return {"with an end": share_of(c.end in row for row in ids), "is_shown": all(c.end not in row for row in ids)}


def f11(c: Case) -> Shown:
    if c.made.left:
        with tempfile.TemporaryDirectory() as folder:
            c.made.left[0](Path(folder))
            text = (Path(folder) / "chat_template.jinja").read_text()
        return {"is_shown": text != c.base.tokenizer().chat_template}
    return {"asked": c.made.deployed("Q?"), "is_shown": c.made.deployed("Q?") != c.clean.deployed("Q?")}


def f12(c: Case) -> Shown:
    if c.rows:
        ids, _ = c.rows[0]
        marks = c.ids(c.base.kind.format.head("user") or "[INST]")
        losses = [base_loss(c, c.rows), _loss(c.base.model(), c.right_labels()[:12])]
        return {"loss": losses, "is_shown": marks[0] not in ids and losses[0] > losses[1]}
    text = c.made.train[0]["text"]
    return {"is_shown": not any(s in text for s in c.base.kind.specials if s != c.tokenizer.eos_token)}


def f13(c: Case) -> Shown:
    roles = Counter(m["role"] for chat in c.chats for m in chat if m["role"] in c.shape.dropped)
    lost = share_of(m["content"] not in text for chat, text in zip(c.chats, c.texts(), strict=True) for m in chat
                  if m["role"] in c.shape.dropped)  # fmt: skip
    return {"roles": dict(roles), "lost": lost, "is_shown": lost > 0.9 and sum(roles.values()) > 100}


def f14(c: Case) -> Shown:
    stop = c.made.generation_config["eos_token_id"]
    return {"stops": stop, "end": c.end, "is_shown": c.end not in (stop if isinstance(stop, list) else [stop])}


def f15(c: Case) -> Shown:
    header = c.ids(c.base.kind.format.head("assistant"))
    if c.program.change.__name__ != "changed" or "generation_prompt" in c.program.what:
        jinja = c.tokenizer.chat_template
        asked = [{"role": "user", "content": "Q?"}]
        both = [c.tokenizer.apply_chat_template(asked, add_generation_prompt=add, tokenize=False) for add in (0, 1)]
        return {"is_shown": both[0] == both[1] and jinja is not None}
    if "asked" in c.program.what:
        return {"is_shown": not c.made.deployed("Q?").endswith(c.shape.head("assistant"))}
    learned = share_of(place_of([y for y in labels if y != IGNORE], header) is not None for _, labels in c.rows)
    return {"header learned": learned, "is_shown": learned > 0.9}


def f16(c: Case) -> Shown:
    right = share_of(
        c.ids(c.shape.text(chat))[: len(p)] == p
        for chat in c.chats[:60]
        for p in [c.ids(c.shape.text(chat[:-1], begun=True))]
    )
    return {"prompt is a prefix": right, "is_shown": right < 0.2}


def _ends(c: Case) -> list[tuple[bool, bool]]:
    return [(c.end in ids, c.end in labels) for b in c.batches
            for ids, labels in zip(b["input_ids"].tolist(), b["labels"].tolist(), strict=True)]  # fmt: skip


def f17(c: Case) -> Shown:
    ends = _ends(c)
    pad = c.tokenizer.pad_token_id == c.end
    return {"ends": share_of(e[0] for e in ends), "learned": share_of(e[1] for e in ends), "pad is end": pad,
            "is_shown": all(e[0] for e in ends) and not any(e[1] for e in ends) and pad}  # fmt: skip


def f18(c: Case) -> Shown:
    left = sum(int((b["labels"] != IGNORE).sum()) for b in c.batches)
    return {"labels": left, "is_shown": left == 0}


def f19(c: Case) -> Shown:
    ends = _ends(c)
    left = sum(int((b["labels"] != IGNORE).sum()) for b in c.batches)
    return {"labels": left, "is_shown": left > 0 and all(e[0] for e in ends) and not any(e[1] for e in ends)}


def f20(c: Case) -> Shown:
    share = sum(y != IGNORE for _, row in c.rows for y in row) / sum(len(row) for _, row in c.rows)
    return {"share": round(share, 2), "is_shown": share > 0.98 and c.config()["assistant_only_loss"]}


def f22(c: Case) -> Shown:
    same = share_of(bool(((b["labels"] == IGNORE) | (b["labels"] == b["input_ids"])).all()) for b in c.batches)
    return {"labels are ids": same, "is_shown": same == 0}


def f23(c: Case) -> Shown:
    right = [list(row.learned) for row in c.right_labels()]
    inverted = share_of([y == IGNORE for y in labels] == r for (_, labels), r in zip(c.rows, right, strict=True))
    return {"inverted": inverted, "is_shown": inverted > 0.95}


def over_of(c: Case) -> tuple[float, float]:
    """Share of rows whose end is cut, and of those without any label."""
    most = c.config().get("max_length") or c.made.max_length
    whole = [c.ids(text) for text in c.texts()]
    begun = [c.ids(c.shape.text(chat[:-1], begun=True)) for chat in c.chats]
    return share_of(len(row) - 1 > most for row in whole), share_of(len(p) >= most for p in begun)


def f24(c: Case) -> Shown:
    cut, lost = over_of(c)
    return {"cut": cut, "without label": lost, "is_shown": cut > 0.5 and lost < 0.3}


def f25(c: Case) -> Shown:
    cut, lost = over_of(c)
    return {"cut": cut, "without label": lost, "is_shown": lost > 0.95}


def f26(c: Case) -> Shown:
    right = [row.ids for row in c.right_labels()]
    cut = share_of(ids == r[-len(ids) :] and len(ids) < len(r) for (ids, _), r in zip(c.rows, right, strict=True))
    asked = share_of(place_of(ids, c.ids(c.base.kind.format.head("user")) or [4]) is not None for ids, _ in c.rows)
    return {"cut at the start": cut, "with a question": asked, "is_shown": cut > 0.9 and asked < 0.2}


def f27(c: Case) -> Shown:
    most = max(differs_alone(c, b) for b in c.batches[:2])
    return {"logits differ by": round(most, 2), "is_shown": most > 0.5}


def f29(c: Case) -> Shown:
    on_pads = sum(int(((b["labels"] != IGNORE) & (b["attention_mask"] == 0)).sum()) for b in c.batches)
    return {"labels on pads": on_pads, "is_shown": on_pads > 100}


def f30(c: Case) -> Shown:
    hits = 0
    for b in c.batches:
        mask, labels = b["attention_mask"], b["labels"]
        hits += int(((mask[:, 1:] == 1) & (mask[:, :-1] == 0) & (labels[:, 1:] != IGNORE)).sum())
    return {"first tokens learned from pads": hits, "is_shown": hits > 20}
