"""Base against tuned on held-out rows: losses paired by row, exact match, scores of answers, and sample answers.

Base and tuned are the same model with its adapters off and on. Their difference has a standard error and a p-value of
its own: much smaller than the errors of the two losses suggest, since a hard row is hard for both (`statistics`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import cached_property
from typing import Any

from solotune.config.settings import EvaluationSettings
from solotune.dataset import Example
from solotune.evaluation import generation
from solotune.evaluation.answer_quality import answer_quality
from solotune.evaluation.answers import Answered, Question, answer, first_questions, spread_questions
from solotune.evaluation.metrics import MetricScore, make_metrics, measure
from solotune.evaluation.scores import Score, score
from solotune.evaluation.statistics import loss_difference_p, ratio_and_stderr, verdict
from solotune.evaluation.task_scores import TaskScore, task_table
from solotune.model.loading import TrainableModel
from solotune.model.lora import adapters_off
from solotune.result_repr import ResultRepr, Table
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
    metrics: dict[str, MetricScore] = field(default_factory=dict)
    """The scores of generated answers that the key `metrics` asks for."""
    generation: dict[str, Any] | None = None
    """What the generated answers are like: see `answer_quality`."""
    tasks: list[TaskScore] = field(default_factory=list)
    """Scores on standard tasks of lm_eval, if they were asked for."""

    @property
    def difference(self) -> tuple[float, float]:
        """Tuned loss minus base loss and its standard error, paired by row."""
        return loss_difference(self.base, self.tuned)

    @cached_property
    def p_value(self) -> float:
        """Of the difference between the losses: `statistics.loss_difference_p`."""
        return _loss_p(self.base, self.tuned)

    @cached_property
    def exact_match(self) -> MetricScore:
        """Exact match as a score: the difference by McNemar's test."""
        base, tuned = (list(map(float, side.row_hits)) for side in (self.base, self.tuned))
        return MetricScore.of(base, tuned, self.base.row_groups)

    @property
    def units(self) -> str:
        """What errors and tests are over: `60 held-out rows`, or `60 held-out rows in 12 groups` of dependent rows.

        `60 held-out rows of 1 group`: rows, since there is only one group.
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
        return self.exact_match.verdict

    @property
    def verdict_in_words(self) -> str:
        """One sentence: which of the two predicts the held-out rows better, as far as these can tell."""
        difference, stderr = self.difference
        test = f"paired test, p = {self.p_value:.{4 if self.p_value < 0.01 else 2}f}"
        test += "; all of one group, so not known of others" * (self.base.num_groups == 1 < self.base.rows)
        if self.verdict == "inside the noise":
            return f"no clear difference between tuned and base on held-out rows ({test})"
        side = "lower" if difference < 0 else "higher"
        by = f"its loss per token is {side} by {plus_minus(abs(difference), stderr)}"
        return f"tuned is {self.verdict} than base on held-out rows: {by} ({test})"

    @property
    def answers_in_words(self) -> list[str]:
        """What the generated answers are like: a line on how they end, and others if there is something to see."""
        if self.generation is None:
            return []
        base, tuned, reference = (self.generation[side] for side in ("base", "tuned", "reference"))
        lines = [f"answers that end by themselves: {tuned['stop_rate']:.0%} of tuned, {base['stop_rate']:.0%} of base"]
        if (tuned["repetition"] or 0) > (reference["repetition"] or 0) + 0.1:
            often = f"{tuned['repetition']:.0%} (in the references {reference['repetition'] or 0:.0%})"
            lines.append(f"tuned repeats itself: 4-grams said before {often}")
        if tuned["overlap"] is not None and reference["overlap"] is not None:
            share = f"{tuned['overlap']:.0%} of tuned, {reference['overlap']:.0%} of the references"
            lines.append(f"8-grams of answers that stand in training answers: {share}")
        return lines

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
        return [self._scores(), *([task_table(self.tasks)] if self.tasks else []), self.sample_table()]

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
            *((name, f"{one.base:.3f}", f"{one.tuned:.3f}", f"{one.tuned - one.base:+.3f} ({one.verdict})")
              for name, one in self.metrics.items()),
        ]  # fmt: skip
        return Table(f"{self.units}; ± is one standard error", ("", "base", "tuned", "change"), rows)

    def to_json(self) -> dict[str, Any]:
        """The JSON of evaluation.json; `scores` may get more keys."""
        difference, stderr = self.difference
        return {
            "rows": self.base.rows,
            "groups": self.base.num_groups,
            "base": self.base.to_json(),
            "tuned": self.tuned.to_json(),
            "difference": {"loss": difference, "stderr": stderr, "p_value": self.p_value},
            "verdict": self.verdict,
            "scores": {name: one.to_json() for name, one in {"exact_match": self.exact_match, **self.metrics}.items()},
            "generation": self.generation,
            "tasks": [one.to_json() for one in self.tasks],
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


def loss_verdict(old: Score, new: Score) -> str:
    """What the new model is by its loss on the same rows: `better`, `worse` or `inside the noise`."""
    return verdict(loss_difference(old, new)[0], _loss_p(old, new))


def _loss_p(base: Score, tuned: Score) -> float:
    return loss_difference_p(_paired_losses(base, tuned), base.row_weights, base.row_groups)


def _paired_losses(base: Score, tuned: Score) -> list[float]:
    return [t - b for b, t in zip(base.row_losses, tuned.row_losses, strict=True)]


def sample_of(answered: Answered) -> Sample:
    """What is shown of an answered question."""
    question = answered.question
    return Sample(question.where, question.prompt, question.reference, answered.base_text, answered.tuned_text)


def compare(
    model: TrainableModel,
    tokenizer: Any,
    rows: Sequence[Example],
    settings: EvaluationSettings,
    *,
    training_rows: Sequence[Example] = (),
    rendered_on: date | None = None,
    tuned: Score | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Evaluation:
    """Evaluate base and tuned on `rows`.

    Args:
        training_rows: searched for what the answers copy.
        rendered_on: the date on which the rows were rendered.
        tuned: the tuned model's score where it was just measured; None: it is measured.
        progress: called with what is done, all of it, and what it is.

    Raises:
        InputError: a metric cannot be used, or failed; the row is shown.
    """
    shown = first_questions(tokenizer, rows, settings.num_samples, rendered_on)
    asked = _asked(tokenizer, rows, settings, rendered_on)
    metrics = make_metrics(settings.metrics, asked)  # a mistake in one is known before anything takes long
    size = settings.batch_size
    tuned = tuned or score(model, rows, size, lambda done, total: progress(done, total, "held-out rows, tuned"))
    with adapters_off(model.module):
        base = score(model, rows, size, lambda done, total: progress(done, total, "held-out rows, base"))
    stops = generation.stop_ids(model, tokenizer, (row.last_loss_token for row in rows))
    given = (model, tokenizer), (stops, settings.max_new_tokens, size, progress)
    answered = answer(*given[0], asked, *given[1], "answers for metrics")
    missing = [one for one in shown if one.where not in {other.question.where for other in answered}]
    by_row = {one.question.where: one for one in [*answered, *answer(*given[0], missing, *given[1])]}
    return Evaluation(
        base,
        tuned,
        [sample_of(by_row[question.where]) for question in shown],
        measure(metrics, answered),
        answer_quality(list(by_row.values()), training_rows),
    )


def check_metrics(
    tokenizer: Any, rows: Sequence[Example], settings: EvaluationSettings, rendered_on: date | None = None
) -> None:
    """Try the metrics of a config before training, on the references of a few rows.

    Raises:
        InputError: one of them cannot be used.
    """
    if settings.scores_answers:
        make_metrics(settings.metrics, _asked(tokenizer, rows, settings, rendered_on))


def _asked(
    tokenizer: Any, rows: Sequence[Example], settings: EvaluationSettings, rendered_on: date | None
) -> list[Question]:
    """The questions whose answers are scored."""
    if not settings.scores_answers:
        return []
    return spread_questions(tokenizer, rows, settings.metrics_rows, rendered_on)
