r"""Find the logged steps in the console output of a training, of any trainer.

    entries, total, ended = steps_of("{'loss': 2.4, 'grad_norm': 0.3, 'learning_rate': 1e-4, 'epoch': 0.1}\n...")

Understood are the dicts that transformers prints (numbers or texts, NaN too), JSON lines, and lines such as
`step 10 | loss: 2.31 lr: 1e-4` of torchtune, LitGPT and hand-written loops. Dicts of transformers have no step: it is
counted from the progress bar (`10/375 [`) where it says how many steps lie between two of them, else from the order.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

MAX_LINE = 4096
MAX_ENTRIES = 1_000_000
_NUMBER = r"[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|nan|inf|NaN|Infinity)"
_PAIR = re.compile(rf"""["']([\w/.()-]{{1,60}})["']\s*:\s*["']?({_NUMBER})(?=["'\s,}}/%]|$)""")
_OF = re.compile(r"""["']global_step/max_steps["']\s*:\s*["'](\d{1,12})/(\d{1,12})""")
_BAR = re.compile(r"(?<![\d.])(\d{1,12})/(\d{1,12}) \[")
_STEP = re.compile(r"\b(?:global[ _]?)?(?:step|iter|iteration)\b\W{0,3}(\d{1,12})(?:\s?/\s?(\d{1,12}))?", re.IGNORECASE)
_LOSS = re.compile(rf"(?<![\w/])(?:train(?:ing)?[ _/]|ema[ _])?loss\b(?: train)?\W{{1,4}}({_NUMBER})", re.IGNORECASE)
_RATE = re.compile(rf"\b(?:lr|learning[ _]rate)\b\W{{1,4}}({_NUMBER})", re.IGNORECASE)
_NORM = re.compile(rf"\b(?:grad(?:ient)?[ _]?norm)\b\W{{1,4}}({_NUMBER})", re.IGNORECASE)
_ENDED = re.compile(r"""["']train_runtime["']|Training completed""")


def steps_of(text: str) -> tuple[list[dict[str, Any]], int | None, bool]:
    """(entries with their step, planned steps if a progress bar says, whether the end of the training was printed)."""
    entries: list[dict[str, Any]] = []
    seen: list[tuple[int, int]] = []  # step and length of the progress bar before each entry
    bar, ended = (0, 0), False
    for line in re.split(r"[\r\n]", text):
        for start in range(0, len(line), MAX_LINE):
            part = line[start : start + MAX_LINE]
            for shown in _BAR.finditer(part):
                bar = (int(shown[1]), int(shown[2]))
            entry = _entry(part)
            if entry is not None and len(entries) < MAX_ENTRIES:
                entries.append(entry)
                seen.append(bar)
            ended = ended or bool(_ENDED.search(part))
    told = [entry["of_steps"] for entry in entries if "of_steps" in entry]
    # losses stand beside the bar of the training; those of downloads, tokenising and evaluation have other lengths
    lengths = Counter(length for (_, length), entry in zip(seen, entries, strict=True) if "loss" in entry and length)
    _number(entries, [step for step, _ in seen])
    return entries, told[-1] if told else lengths.most_common(1)[0][0] if lengths else None, ended


def _entry(line: str) -> dict[str, Any] | None:
    """The numbers of a line that tells a loss; None for other lines."""
    if "loss" not in line.lower():
        return None
    if "{" in line:
        found: dict[str, Any] = {key: float(value) for key, value in _PAIR.findall(line[line.index("{") :])}
        if not any("loss" in key for key in found):
            return None
        if of := _OF.search(line):
            found |= {"step": int(of[1]), "of_steps": int(of[2])}
        return found
    step, loss = _STEP.search(line), _LOSS.search(line)
    if not step or not loss:
        return None
    found = {"step": int(step[1]), "loss": float(loss[1])}
    if step[2]:
        found["of_steps"] = int(step[2])
    for key, pattern in (("learning_rate", _RATE), ("grad_norm", _NORM)):
        if value := pattern.search(line):
            found[key] = float(value[1])
    return found


def _number(entries: list[dict[str, Any]], seen: list[int]) -> None:
    """Give each entry without a step one: the multiple of the interval that the progress bar shows, or its order."""
    for start, end in _runs(entries):
        lines = [i for i in range(start, end) if "loss" in entries[i] and "step" not in entries[i]]
        interval = _interval([seen[i] for i in lines])
        count = 0
        for i in range(start, end):
            if i in set(lines[count : count + 1]):
                count += 1
                entries[i]["step"] = count * interval
            entries[i].setdefault("step", count * interval)


def _runs(entries: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """The parts of a log into which a run was appended after another: where the epoch goes back."""
    starts, before = [0], -math.inf
    for i, entry in enumerate(entries):
        epoch = entry.get("epoch", before)
        if epoch < before:
            starts.append(i)
        before = epoch
    return list(zip(starts, [*starts[1:], len(entries)], strict=True))


def _interval(bars: list[int]) -> int:
    """Steps from one entry to the next, such that no bar is past its entry or a whole interval behind; else 1."""
    if len(bars) < 2 or bars[-1] <= 0:
        return 1
    for interval in dict.fromkeys((round(bars[-1] / len(bars)), math.ceil(bars[-1] / len(bars)))):
        if interval > 0 and all((k - 1) * interval < bar <= k * interval for k, bar in enumerate(bars, 1)):
            return interval
    return 1
