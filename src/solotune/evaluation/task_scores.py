"""Scores of standard tasks: what lm_eval logged of each document, base against tuned, with the paired test.

lm_eval gives each model a score and a standard error of its own, and no test of their difference. But both models
answered the same documents, so they are compared document by document, as held-out rows are (`statistics`):

    mean, nanmean, brier_score      a mean of one number per document: McNemar's test if each is 0 or 1, else sign flips
    perplexity, bits_per_byte, ...  f(L) of a mean log-likelihood L, per document, word or byte: sign flips of L; the
                                    errors are those of L times the slope of f
    any other                       one number of all documents together (corpus BLEU, F1): shown, and not tested

A group (`mmlu`) is tested over the documents of all its tasks, in which its score is a mean as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from solotune.errors import InputError
from solotune.evaluation.statistics import LEVEL, mcnemar_p, ratio_and_stderr, sign_flip_p, verdict
from solotune.result_repr import Table

MEANS = ("mean", "nanmean", "brier_score")
"""Aggregations of lm_eval that are a mean of one number per document."""
MANY = 10
"""Tests, of which some would differ by chance alone."""
TASK_HEADER = ("task", "documents", "base", "tuned", "change", "verdict")
NO_FILTER = "none"
"""lm_eval's name of the filter that leaves answers as they are."""
NOT_TESTED, NOISE = "not tested", "inside the noise"


class Curve(NamedTuple):
    """A score as a function of a mean, and its slope."""

    value: Callable[[float], float]
    slope: Callable[[float], float]


def _perplexity(mean: float) -> float:
    return math.exp(min(-mean, 700.0))  # a larger exponent is no float


_IDENTITY = Curve(lambda mean: mean, lambda mean: 1.0)
_PERPLEXITY = Curve(_perplexity, lambda mean: -_perplexity(mean))
_BITS = Curve(lambda mean: -mean / math.log(2), lambda mean: -1 / math.log(2))
CURVES = {"perplexity": _PERPLEXITY, "weighted_perplexity": _PERPLEXITY, "bits_per_byte": _BITS}
"""Aggregations of lm_eval that are a function of a mean log-likelihood."""


@dataclass(frozen=True)
class Metric:
    """How lm_eval makes a score of what it logs of each document."""

    aggregation: str
    """lm_eval's name of it; empty for a function of the task's own."""
    higher_is_better: bool | None = None
    """None: lm_eval does not know."""
    of_one: Callable[[list[Any]], Any] | None = None
    """The aggregation itself; of a list of one document it gives that document's number."""


@dataclass(frozen=True)
class Group:
    """A score over several tasks: a mean over their documents, or (not `is_by_size`) over the tasks."""

    name: str
    metric: str
    filters: Sequence[str] | None  # None: all
    tasks: Sequence[str]
    is_by_size: bool


class Pairs(NamedTuple):
    """What one metric gives of the documents: sums and weights, whose ratio is the mean; both models in one order."""

    base: list[float]
    tuned: list[float]
    weights: list[float]


@dataclass(frozen=True)
class TaskScore:
    """A score of base and tuned on a task of lm_eval; the fields that are None: not tested, or only one document."""

    task: str
    metric: str
    filter: str
    higher_is_better: bool | None
    rows: int
    base: float
    tuned: float
    base_stderr: float | None = None
    tuned_stderr: float | None = None
    difference_stderr: float | None = None
    p_value: float | None = None
    is_share: bool = False
    note: str = ""
    """Why it has no test."""

    @property
    def name(self) -> str:
        """`gsm8k exact_match (strict-match)`"""
        return f"{self.task} {self.metric}" + f" ({self.filter})" * (self.filter != NO_FILTER)

    @property
    def verdict(self) -> str:
        """What the tuned model is: `better`, `worse`, `inside the noise`, `not tested`, or `different` if lm_eval does
        not know which way is better."""
        if self.p_value is None:
            return NOT_TESTED
        if self.higher_is_better is None:
            return "different" if verdict(self.tuned - self.base, self.p_value) != NOISE else NOISE
        gain = self.tuned - self.base if self.higher_is_better else self.base - self.tuned
        return verdict(-gain, self.p_value)

    @property
    def cells(self) -> tuple[str, str, str]:
        """Base, tuned, and their difference with its error; shares in percent."""
        scale, unit = (100, "%") if self.is_share else (1, "")
        largest = scale * max(abs(self.base), abs(self.tuned))
        digits = (
            ".3g"
            if largest >= 1e6
            else ".1f"
            if self.is_share or largest >= 1000
            else ".2f"
            if largest >= 10
            else ".4f"
        )
        change, error = scale * (self.tuned - self.base), self.difference_stderr
        by = "" if error is None else f" ± {scale * error:{digits}}"
        base, tuned = (f"{scale * value:{digits}}{unit}" for value in (self.base, self.tuned))
        return base, tuned, f"{change:+{digits}}{by}"

    def to_json(self) -> dict[str, Any]:
        """As the other scores of evaluation.json."""
        errors = {"base": self.base_stderr, "tuned": self.tuned_stderr, "difference": self.difference_stderr}
        return {
            "task": self.task,
            "metric": self.metric,
            "filter": self.filter,
            "higher_is_better": self.higher_is_better,
            "base": self.base,
            "tuned": self.tuned,
            "difference": self.tuned - self.base,
            "stderr": errors,
            "p_value": self.p_value,
            "verdict": self.verdict,
            "rows": self.rows,
            "is_share": self.is_share,
            "note": self.note,
        }


def task_table(scores: Sequence[TaskScore]) -> Table:
    """The scores as a table."""
    rows = [(one.name, f"{one.rows:,}", *one.cells, one.verdict) for one in scores]
    return Table("Tasks of lm_eval; ± is one standard error of the difference", TASK_HEADER, rows)


def remarks(scores: Sequence[TaskScore]) -> list[str]:
    """What has to be known of scores: which have no test, and that of many tests some differ by chance."""
    untested = [one for one in scores if one.p_value is None]
    lines = [f"{', '.join(dict.fromkeys(one.metric for one in untested))}: {untested[0].note}"] if untested else []
    tested = len(scores) - len(untested)
    if tested >= MANY:
        lines.append(f"{tested} paired tests: about {round(LEVEL * tested, 1):g} would differ by chance alone")
    return lines


@dataclass(frozen=True)
class LoggedTask:
    """What lm_eval gave of one task, for both models.

    Args:
        base: the logged samples: `doc_id`, `filter`, hashes, `metrics` (names) and under each name its value.
        values: the scores that lm_eval made, "metric,filter" -> (base, tuned).
    """

    name: str
    base: Sequence[Mapping[str, Any]]
    tuned: Sequence[Mapping[str, Any]]
    values: Mapping[str, tuple[Any, Any]]
    metrics: Mapping[str, Metric]


def score_tasks(logged: Sequence[LoggedTask], groups: Iterable[Group] = ()) -> list[TaskScore]:
    """All scores: those of groups first, then of each task.

    Raises:
        InputError: base and tuned were not asked the same.
    """
    paired = {task.name: _paired(task) for task in logged}
    of_tasks = [score for task in logged for score in _scores_of(task, paired[task.name])]
    means = {task.name: [name for name, how in task.metrics.items() if how.aggregation in MEANS] for task in logged}
    return [score for group in groups for score in _group_scores(group, of_tasks, paired, means)] + of_tasks


def _paired(task: LoggedTask) -> dict[tuple[str, str], list[tuple[Any, Any]]]:
    """(metric, filter) -> the values of base and tuned, of each document that has both.

    Raises:
        InputError: another document or prompt for one of them.
    """
    of_base = {(sample["filter"], sample["doc_id"]): sample for sample in task.base}
    if len(of_base) != len(task.base) or len(task.tuned) != len(task.base):
        raise _not_the_same(task, f"{len(task.base)} and {len(task.tuned)} samples")
    found: dict[tuple[str, str], list[tuple[Any, Any]]] = {}
    for tuned in task.tuned:
        base = of_base.get((tuned["filter"], tuned["doc_id"]))
        if base is None or any(base[key] != tuned[key] for key in ("doc_hash", "prompt_hash")):
            raise _not_the_same(task, f"document {tuned['doc_id']}")
        for metric in tuned["metrics"]:
            if metric in base["metrics"]:
                found.setdefault((metric, tuned["filter"]), []).append((base[metric], tuned[metric]))
    return found


def _not_the_same(task: LoggedTask, seen: str) -> InputError:
    return InputError(
        f"--tasks {task.name}: base and tuned were not asked the same",
        seen=seen,
        change="a task that chooses documents or prompts at random needs a fixed seed",
    )


def _scores_of(task: LoggedTask, paired: Mapping[tuple[str, str], list[tuple[Any, Any]]]) -> list[TaskScore]:
    scores = []
    for (metric, filter_name), values in paired.items():
        how = task.metrics.get(metric, Metric("mean"))  # as lm_eval takes what it does not know
        pairs = _numbers(how, values)
        if pairs is not None and pairs.weights:
            curve = CURVES.get(how.aggregation, _IDENTITY)
            scores.append(_tested(task.name, metric, filter_name, how.higher_is_better, pairs, curve))
            continue
        base, tuned = task.values.get(f"{metric},{filter_name}", (None, None))
        if isinstance(base, int | float) and isinstance(tuned, int | float):
            note = "one number of all documents together, so there is no paired test"
            scores.append(
                TaskScore(
                    task.name, metric, filter_name, how.higher_is_better, len(values), base, tuned, note=note
                )
            )  # fmt: skip
    return scores


def _numbers(how: Metric, values: Sequence[tuple[Any, Any]]) -> Pairs | None:
    """Sums and weights of each document; None if the metric has no such numbers."""
    try:
        if how.aggregation in ("weighted_perplexity", "bits_per_byte"):  # (log-likelihood, words or bytes)
            kept = [(float(b[0]), float(t[0]), float(b[1])) for b, t in values]
        elif how.aggregation == "perplexity":
            kept = [(float(b), float(t), 1.0) for b, t in values]
        elif how.aggregation in MEANS:
            of_one = how.of_one if how.of_one is not None and how.aggregation == "brier_score" else _only
            kept = [(float(of_one([b])), float(of_one([t])), 1.0) for b, t in values]
        else:
            return None
    except (TypeError, ValueError, IndexError):  # a list, a text
        return None
    finite = [one for one in kept if all(map(math.isfinite, one)) and one[2] > 0]
    if len(finite) < len(kept) and how.aggregation != "nanmean":
        return None
    return Pairs(*(list(column) for column in zip(*finite, strict=True))) if finite else None


def _only(values: list[Any]) -> Any:
    return values[0]


def _tested(
    task: str, metric: str, filter_name: str, is_higher_better: bool | None, pairs: Pairs, curve: Curve
) -> TaskScore:
    """The score with its errors and its test; the documents are independent."""
    base, tuned, weights = pairs
    (base_mean, base_error), (tuned_mean, tuned_error) = (ratio_and_stderr(sums, weights) for sums in (base, tuned))
    slopes = curve.slope(base_mean), curve.slope(tuned_mean)
    differences = [slopes[1] * t - slopes[0] * b for b, t in zip(base, tuned, strict=True)]
    error = ratio_and_stderr(differences, weights)[1]
    is_share = curve is _IDENTITY and {*base, *tuned} <= {0.0, 1.0} and set(weights) == {1.0}
    if is_share:
        p_value = mcnemar_p([one == 1 for one in base], [one == 1 for one in tuned])
    else:
        p_value = sign_flip_p([t - b for b, t in zip(base, tuned, strict=True)])
    return TaskScore(
        task,
        metric,
        filter_name,
        is_higher_better,
        len(weights),
        curve.value(base_mean),
        curve.value(tuned_mean),
        _finite(abs(slopes[0]) * base_error),
        _finite(abs(slopes[1]) * tuned_error),
        _finite(error),
        p_value,
        is_share,
    )


def _finite(error: float) -> float | None:
    return error if math.isfinite(error) else None


def _group_scores(
    group: Group,
    scores: Sequence[TaskScore],
    paired: Mapping[str, Mapping[tuple[str, str], list[tuple[Any, Any]]]],
    means: Mapping[str, Sequence[str]],
) -> list[TaskScore]:
    """The scores of a group, if those of its tasks are means; a task without the metric is left out, as in lm_eval.

    Args:
        means: the metrics of each task that are means.
    """
    inside = [one for one in scores if one.task in group.tasks and one.metric == group.metric]
    if any(one.metric not in means[one.task] for one in inside):
        return []
    found = []
    for filter_name in group.filters or sorted({one.filter for one in inside}):
        members = [one for one in inside if one.filter == filter_name]
        numbers = [_numbers(Metric("mean"), paired[one.task][one.metric, one.filter]) for one in members]
        parts = [one for one in numbers if one is not None]
        if not parts or len(parts) < len(numbers):
            continue
        all_of_them = Pairs([], [], [])
        for part in parts:
            weight = 1.0 if group.is_by_size else 1.0 / len(part.weights)
            for column, values in zip(all_of_them, part, strict=True):
                column.extend(weight * value for value in values)
        directions = {one.higher_is_better for one in members}
        is_higher_better = directions.pop() if len(directions) == 1 else None
        found.append(_tested(group.name, group.metric, filter_name, is_higher_better, all_of_them, _IDENTITY))
    return found
