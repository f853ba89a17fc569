"""Scores of generated answers: what the key `metrics` asks for, base against tuned on the same rows.

json           `json_valid`: the answer is JSON. `json_fields`: equal fields over all fields of answer and reference (a
               field is a path to a value, `items/0/price`); rows whose reference is not JSON are left out
choice         the answer begins with the same choice as the reference; the choices are given, or the references that
               the rows have
regex          with a group: its first match in the answer is that in the reference (rows without it in the reference
               are left out). Without one: it is found in the answer
python         your function of `answer`, `reference` and `prompt`, whichever it has; higher is better
exact_match    is always measured, see `scores`

A score is a mean over rows. Its p-value is McNemar's if each row is right or wrong, else that of sign flips, over
groups (see `statistics`).
"""

from __future__ import annotations

import json
import math
import numbers
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from solotune.config.metric_specs import MetricSpec
from solotune.errors import InputError
from solotune.evaluation.answers import Answered, Question
from solotune.evaluation.python_metric import load_function
from solotune.evaluation.statistics import independent, mcnemar_p, ratio_and_stderr, sign_flip_p, verdict

MOST_CHOICES = 50  # different references; more are not a choice
CHECKED_ROWS = 8  # whose references are scored as answers before training: a mistake is found early
_SHOWN = 300  # characters of an answer in a message
_MISSING = object()


@dataclass(frozen=True)
class Metric:
    """A named score of one answer; None: the row has no such reference (whatever the answer is)."""

    name: str
    spec: MetricSpec
    function: Callable[[str, str, str], Any]
    """(answer, reference, prompt) -> a number"""

    def __call__(self, answer: str, question: Question) -> float | None:
        """Raises:
        InputError: the user's function failed, or gave no finite number; the row is shown.
        """
        try:
            found = self.function(answer, question.reference, question.prompt)
        except Exception as error:
            raise self._failed(f"{type(error).__name__}: {error}", answer, question) from error
        if found is None and self.spec.kind != "python":
            return None
        if not isinstance(found, numbers.Real) or not math.isfinite(found):
            raise self._failed(f"gave {found!r}, which is not a finite number"[:_SHOWN], answer, question)
        return float(found)

    def _failed(self, problem: str, answer: str, question: Question) -> InputError:
        parts = {"answer": answer, "reference": question.reference}
        return InputError(
            f"metrics, {self.spec}: {problem}",
            seen=f"row {question.where}: " + ", ".join(f"{name} {text[:_SHOWN]!r}" for name, text in parts.items()),
            allowed="a number for every answer: also for an empty one, and for one that is cut off",
            change="mend the function, or remove the metric",
        )


@dataclass(frozen=True)
class MetricScore:
    """A score of base and tuned over the same rows."""

    base: float
    tuned: float
    base_stderr: float
    tuned_stderr: float
    difference_stderr: float
    p_value: float
    rows: int

    @classmethod
    def of(cls, base: Sequence[float], tuned: Sequence[float], units: Sequence[str] | None) -> MetricScore:
        """Of the scores of each row, in the same order.

        Args:
            units: as `statistics.independent` gives them.
        """
        ones = [1.0] * len(base)
        differences = [t - b for b, t in zip(base, tuned, strict=True)]
        is_share = {*base, *tuned} <= {0.0, 1.0}
        (base_mean, base_error), (tuned_mean, tuned_error), (_, error) = (
            ratio_and_stderr(values, ones, units) for values in (base, tuned, differences)
        )
        if is_share:
            p_value = mcnemar_p([b == 1 for b in base], [t == 1 for t in tuned], units)
        else:
            p_value = sign_flip_p(differences, units)
        return cls(base_mean, tuned_mean, base_error, tuned_error, error, p_value, len(base))

    @property
    def verdict(self) -> str:
        """`better`, `worse` or `inside the noise`."""
        return verdict(self.base - self.tuned, self.p_value)

    def to_json(self) -> dict[str, Any]:
        errors = {"base": self.base_stderr, "tuned": self.tuned_stderr, "difference": self.difference_stderr}
        return {
            "base": self.base,
            "tuned": self.tuned,
            "difference": self.tuned - self.base,
            "stderr": errors,
            "p_value": self.p_value,
            "verdict": self.verdict,
            "rows": self.rows,
        }


def make_metrics(specs: Iterable[MetricSpec], asked: Sequence[Question]) -> list[Metric]:
    """The metrics of a config, each with a name of its own, tried on the references of a few rows.

    Raises:
        InputError: a function cannot be used, no row has a reference that a metric can use, or no row can be asked.
    """
    made: dict[str, Metric] = {}
    for spec in specs:
        for name, function in _functions(spec, asked).items():
            own, number = name, 2
            while own in made or own == "exact_match":
                own, number = f"{name}_{number}", number + 1
            made[own] = Metric(own, spec, function)
    if made and not asked:
        raise InputError("metrics: no held-out row has a question and an answer", change="hold out rows, or remove it")
    for metric in made.values():
        for question in asked[:CHECKED_ROWS]:
            metric(question.reference, question)
        if metric.spec.kind != "python" and all(metric("", question) is None for question in asked):
            raise InputError(
                f"metrics, {metric.spec}: none of {len(asked)} held-out rows has such a reference",
                seen=repr(asked[0].reference[:_SHOWN]),
                change="remove the metric, or correct it",
            )
    return list(made.values())


def measure(metrics: Iterable[Metric], answered: Sequence[Answered]) -> dict[str, MetricScore]:
    """Each metric over the answers of both models.

    Raises:
        InputError: the user's function failed; the row is shown.
    """
    found = {}
    for metric in metrics:
        pairs = [
            (metric(one.base_text, one.question), metric(one.tuned_text, one.question), one.question.group)
            for one in answered
        ]
        used = [(base, tuned, group) for base, tuned, group in pairs if base is not None and tuned is not None]
        if used:
            base, tuned, groups = zip(*used, strict=True)
            found[metric.name] = MetricScore.of(base, tuned, independent(groups))
    return found


# --- the metrics: (answer, reference, prompt) -> score


def _functions(spec: MetricSpec, asked: Sequence[Question]) -> dict[str, Callable[[str, str, str], Any]]:
    if spec.kind == "json":
        return {"json_valid": _json_valid, "json_fields": _json_fields}
    if spec.kind == "regex":
        return {"regex": partial(_regex, re.compile(spec.pattern))}
    if spec.kind == "choice":
        return {"choice": partial(_choice, _longest_first(spec.choices or _choices_of(asked)))}
    if spec.kind == "python":
        return {spec.function: load_function(spec)}
    return {}  # exact_match needs no answer


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _MISSING


def _json_valid(answer: str, reference: str, prompt: str) -> float | None:
    return None if _json(reference) is _MISSING else float(_json(answer) is not _MISSING)


def _json_fields(answer: str, reference: str, prompt: str) -> float | None:
    wanted, given = _json(reference), _json(answer)
    if wanted is _MISSING:
        return None
    if given is _MISSING:
        return 0.0
    theirs, ours = _fields(wanted), _fields(given)
    equal = sum(path in ours and _is_equal(ours[path], value) for path, value in theirs.items())
    return equal / len(theirs.keys() | ours.keys())


def _fields(value: Any) -> dict[tuple[Any, ...], Any]:
    """Path -> value of all that is neither a filled object nor a filled list."""
    found: dict[tuple[Any, ...], Any] = {}
    waiting: list[tuple[tuple[Any, ...], Any]] = [((), value)]
    while waiting:
        path, item = waiting.pop()
        if isinstance(item, dict | list) and item:
            inside = item.items() if isinstance(item, dict) else enumerate(item)
            waiting += [((*path, key), one) for key, one in inside]
        else:
            found[path] = item
    return found


def _is_equal(one: Any, other: Any) -> bool:
    """As JSON: 1 and 1.0 are equal, 1 and true are not."""
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def _regex(pattern: re.Pattern[str], answer: str, reference: str, prompt: str) -> float | None:
    found = pattern.search(answer)
    if not pattern.groups:
        return float(found is not None)
    wanted = pattern.search(reference)
    return None if wanted is None else float(found is not None and found[1] == wanted[1])


def _choice(choices: Sequence[str], answer: str, reference: str, prompt: str) -> float | None:
    wanted = _chosen(choices, reference)
    return None if wanted is None else float(_chosen(choices, answer) == wanted)


def _chosen(choices: Sequence[str], text: str) -> str | None:
    """The choice that a text begins with, as whole words: `B` of `**B**: Paris`, but not of `Because`."""
    text = text.casefold().lstrip(" \t\r\n\"'`*_([")
    return next((one for one in choices if text.startswith(one) and not text[len(one) : len(one) + 1].isalnum()), None)


def _longest_first(choices: Iterable[str]) -> list[str]:
    return sorted({choice.strip().casefold() for choice in choices}, key=lambda choice: (-len(choice), choice))


def _choices_of(asked: Sequence[Question]) -> list[str]:
    found = sorted({question.reference.strip() for question in asked} - {""})
    if len(found) > MOST_CHOICES:
        raise InputError(
            f"metrics, choice: {len(found)} different references in {len(asked)} held-out rows are no choice",
            seen=repr(found[0][:_SHOWN]),
            allowed=f"at most {MOST_CHOICES}",
            change="name the choices: metrics: [{choice: [A, B, C, D]}]",
        )
    return found
