"""Base against tuned on held-out rows: losses paired by row, exact match, and sample answers.

Base and tuned are the same model with its adapters off and on. Their difference has a standard error and a p-value of
its own: much smaller than the errors of the two losses suggest, since a hard row is hard for both (`statistics`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

from solotune.dataset import Example, render_prompt
from solotune.evaluation import generation
from solotune.evaluation.scores import Score, score
from solotune.evaluation.statistics import mcnemar_p, ratio_and_stderr, sign_flip_p, verdict
from solotune.model.loading import TrainableModel
from solotune.model.lora import adapters_off
from solotune.result_repr import ResultRepr, Table
from solotune.runtime import signals
from solotune.units import plus_minus


@dataclass(frozen=True)
class Sample:
    """One held-out prompt with the answers of both."""

    where: str
    prompt: str
    reference: str
    base: str
    tuned: str


@dataclass(frozen=True, repr=False)
class Evaluation(ResultRepr):
    """The content of evaluation.json."""

    base: Score
    tuned: Score
    samples: list[Sample]

    @property
    def difference(self) -> tuple[float, float]:
        """Tuned loss minus base loss and its standard error, paired by row."""
        return loss_difference(self.base, self.tuned)

    @cached_property
    def p_value(self) -> float:
        """Of the difference between the losses: `statistics.sign_flip_p`."""
        return sign_flip_p(_paired_losses(self.base, self.tuned), self.base.row_groups)

    @cached_property
    def exact_match_p_value(self) -> float:
        """Of the difference between the exact matches: McNemar's test."""
        return mcnemar_p(self.base.row_hits, self.tuned.row_hits, self.base.row_groups)

    @property
    def units(self) -> str:
        """What errors and tests are over: `60 held-out rows`, or `60 held-out rows in 12 groups` of dependent rows.

        `60 held-out rows of 1 group`: rows, since there are too few groups.
        """
        rows, groups = f"{self.base.rows:,} held-out rows", self.base.num_groups
        if groups is None:
            return rows
        return f"{rows} {'in' if self.base.row_groups else 'of'} {groups} group{'s' * (groups != 1)}"

    @property
    def verdict(self) -> str:
        """`better`, `worse` or `inside the noise`: what the tuned model is, by its loss."""
        return verdict(self.difference[0], self.p_value)

    @property
    def exact_match_verdict(self) -> str:
        """The same, by exact match."""
        return verdict(self.base.exact_match - self.tuned.exact_match, self.exact_match_p_value)

    @property
    def verdict_in_words(self) -> str:
        """One sentence: which of the two predicts the held-out rows better, as far as these can tell."""
        difference, stderr = self.difference
        test = f"paired test, p = {self.p_value:.{4 if self.p_value < 0.01 else 2}f}"
        if self.verdict == "inside the noise":
            return f"no clear difference between tuned and base on held-out rows ({test})"
        side = "lower" if difference < 0 else "higher"
        by = f"its loss per token is {side} by {plus_minus(abs(difference), stderr)}"
        return f"tuned is {self.verdict} than base on held-out rows: {by} ({test})"

    def figures(self) -> dict[str, object]:
        return {
            "base_loss": self.base.loss,
            "tuned_loss": self.tuned.loss,
            "base_exact_match": self.base.exact_match,
            "tuned_exact_match": self.tuned.exact_match,
            "rows": self.base.rows,
            "verdict": self.verdict,
        }

    def tables(self) -> list[Table]:
        return [self._scores(), self.sample_table()]

    def sample_table(self) -> Table:
        """Prompts with the answers of both models."""
        header = ("prompt", "reference", "base", "tuned")
        return Table("Answers", header, [(s.prompt, s.reference, s.base, s.tuned) for s in self.samples])

    def _scores(self) -> Table:
        difference, stderr = self.difference
        rows = [
            ("loss per token", *(plus_minus(s.loss, s.stderr) for s in (self.base, self.tuned)),
             f"{'+' * (difference >= 0)}{plus_minus(difference, stderr)}"),
            ("exact match", f"{self.base.exact_match:.1%}", f"{self.tuned.exact_match:.1%}",
             f"{100 * (self.tuned.exact_match - self.base.exact_match):+.1f} points"),
        ]  # fmt: skip
        return Table(f"{self.units}; ± is one standard error", ("", "base", "tuned", "change"), rows)

    def to_json(self) -> dict[str, Any]:
        """The JSON of evaluation.json; `scores` may get more keys."""
        difference, stderr = self.difference
        exact = {
            "base": self.base.exact_match,
            "tuned": self.tuned.exact_match,
            "stderr": {"base": self.base.exact_match_stderr, "tuned": self.tuned.exact_match_stderr},
            "p_value": self.exact_match_p_value,
        }
        return {
            "rows": self.base.rows,
            "groups": self.base.num_groups,
            "base": self.base.to_json(),
            "tuned": self.tuned.to_json(),
            "difference": {"loss": difference, "stderr": stderr, "p_value": self.p_value},
            "verdict": self.verdict,
            "scores": {"exact_match": exact},
            "row_losses": {  # what two runs are compared by, row by row: weighted sums, in the order of the rows
                "base": self.base.row_losses,
                "tuned": self.tuned.row_losses,
                "weights": self.base.row_weights,
                "groups": self.base.row_groups,
            },
            "samples": [asdict(sample) for sample in self.samples],
        }


def loss_difference(base: Score, tuned: Score) -> tuple[float, float]:
    """Tuned minus base and its standard error, paired by row: much smaller than either error alone."""
    return ratio_and_stderr(_paired_losses(base, tuned), base.row_weights, base.row_groups)


def _paired_losses(base: Score, tuned: Score) -> list[float]:
    return [t - b for b, t in zip(base.row_losses, tuned.row_losses, strict=True)]


def samples(
    model: TrainableModel,
    tokenizer: Any,
    rows: Sequence[Example],
    count: int,
    max_new_tokens: int,
    rendered_on: date | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> list[Sample]:
    """Answers of base and tuned to the first `count` held-out rows, asked as they were trained.

    Of a chat, the last answer is asked for, through the chat template; of plain text, what follows its prompt, or its
    first half if it has none.
    """
    asked = (asked for row in rows if (asked := _question(tokenizer, row, rendered_on)) is not None)
    chosen = list(islice(asked, count))
    stops = generation.stop_ids(model, tokenizer, (row.last_loss_token for row in rows))
    shown = []
    for number, question in enumerate(chosen):
        signals.check_stop()
        progress(number, len(chosen), "sample answers")
        tuned = generation.generate(model, question.prompt_ids, max_new_tokens, stops)
        with adapters_off(model.module):
            base = generation.generate(model, question.prompt_ids, max_new_tokens, stops)
        texts = [_text(tokenizer, ids) for ids in (base, tuned)]
        texts = [text.strip() for text in texts] if question.is_chat else texts
        shown.append(Sample(question.where, question.prompt, question.reference, *texts))
    return shown


class _Question(NamedTuple):
    """A prompt made of a held-out row, and the row's own answer."""

    where: str
    prompt_ids: Sequence[int]
    prompt: str
    reference: str
    is_chat: bool


def _question(tokenizer: Any, row: Example, rendered_on: date | None) -> _Question | None:
    """The question of a row; None if nothing can be asked: a chat that ends with its user, or part of a split row."""
    if row.messages:
        if row.messages[-1]["role"] != "assistant":
            return None
        users = [message["content"] for message in row.messages if message["role"] == "user"]
        prompt_ids = render_prompt(tokenizer, row.messages[:-1], row.tools, rendered_on=rendered_on)
        return _Question(row.where, prompt_ids, users[-1] if users else "", row.messages[-1]["content"], True)
    begin = len(row.prompt_ids) or len(row.input_ids) // 2
    if row.is_later_part or begin == 0:
        return None
    prompt_ids, after = row.input_ids[:begin].tolist(), row.input_ids[begin:][row.loss_mask[begin:]]
    return _Question(row.where, prompt_ids, _text(tokenizer, prompt_ids), _text(tokenizer, after.tolist()), False)


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)


def compare(
    model: TrainableModel,
    tokenizer: Any,
    rows: Sequence[Example],
    *,
    batch_size: int,
    num_samples: int,
    max_new_tokens: int,
    rendered_on: date | None = None,
    tuned: Score | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Evaluation:
    """Evaluate base and tuned on `rows`.

    Args:
        rendered_on: the date on which the rows were rendered.
        tuned: the tuned model's score where it was just measured; None: it is measured.
        progress: called with what is done, all of it, and what it is.
    """
    tuned = tuned or score(model, rows, batch_size, lambda done, total: progress(done, total, "held-out rows, tuned"))
    with adapters_off(model.module):
        base = score(model, rows, batch_size, lambda done, total: progress(done, total, "held-out rows, base"))
    answers = samples(model, tokenizer, rows, num_samples, max_new_tokens, rendered_on, progress)
    return Evaluation(base, tuned, answers)
