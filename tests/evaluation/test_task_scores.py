"""What lm_eval logged of a real run, paired by document: tests/data/lm_eval_logged.json (`task_files` records it)."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from solotune.errors import InputError
from solotune.evaluation.statistics import sign_flip_p
from solotune.evaluation.task_scores import Group, LoggedTask, Metric, TaskScore, remarks, score_tasks, task_table
from tests.evaluation.task_files import logged


def scores() -> dict[str, TaskScore]:
    return {one.name: one for one in score_tasks(*logged())}


def by_document(task: str, metric: str) -> tuple[list, list]:
    (found,) = (one for one in logged()[0] if one.name == task)
    return [one[metric] for one in found.base], [one[metric] for one in found.tuned]


def test_every_score_is_the_one_that_lm_eval_gave():
    given = {
        f"{task.name} {key.removesuffix(',none')}": values
        for task in logged()[0]
        for key, values in task.values.items()
        if key.endswith(",none") and "_stderr" not in key
    }
    found = scores()
    assert given.keys() == found.keys() - {"choices acc"} and len(given) == 11
    for name, values in given.items():
        assert (found[name].base, found[name].tuned) == pytest.approx(values, rel=1e-12), name
        assert found[name].rows == 9


def test_right_or_wrong_is_tested_by_mcnemar():
    answer = scores()["answer exact_match"]
    assert answer.p_value == 2 / 2**9  # tuned alone gets all nine right
    assert (answer.verdict, answer.is_share, answer.difference_stderr) == ("better", True, 0)
    kind = scores()["kind acc"]
    base, tuned = by_document("kind", "acc")
    lost, gained = (
        sum(b > t for b, t in zip(base, tuned, strict=True)),
        sum(b < t for b, t in zip(base, tuned, strict=True)),
    )
    assert kind.p_value == min(
        1, 2 * sum(math.comb(lost + gained, k) for k in range(gained + 1)) / 2 ** (lost + gained)
    )
    assert kind.difference_stderr == pytest.approx(np.std(np.subtract(tuned, base), ddof=1) / 3)
    assert kind.base_stderr == pytest.approx(np.std(base, ddof=1) / 3)


def test_the_error_of_a_perplexity_is_that_of_its_logarithm_times_the_slope():
    found = scores()["next_word perplexity"]
    base, tuned = by_document("next_word", "perplexity")
    assert found.base_stderr == pytest.approx(math.exp(-np.mean(base)) * np.std(base, ddof=1) / 3)
    weighted = math.exp(-np.mean(tuned)) * np.array(tuned) - math.exp(-np.mean(base)) * np.array(base)
    assert found.difference_stderr == pytest.approx(np.std(weighted, ddof=1) / 3)
    assert found.p_value == sign_flip_p(np.subtract(tuned, base).tolist())
    assert found.verdict == "worse" and found.tuned > found.base  # lower is better
    bits = scores()["text bits_per_byte"]
    pairs = by_document("text", "bits_per_byte")
    assert bits.p_value == sign_flip_p([t[0] - b[0] for b, t in zip(*pairs, strict=True)])
    assert bits.difference_stderr == pytest.approx(0.0343, abs=1e-4) and not bits.is_share


def test_one_number_of_all_documents_is_shown_and_not_tested():
    found = scores()
    assert [name for name, one in found.items() if one.p_value is None] == ["hurry f1", "answer bleu"]
    bleu = found["answer bleu"]
    assert bleu.verdict == "not tested" and bleu.to_json()["stderr"]["difference"] is None
    assert remarks(list(found.values())) == [
        "f1, bleu: one number of all documents together, so there is no paired test",
        "10 paired tests: about 0.5 would differ by chance alone",
    ]
    assert remarks([found["kind acc"]]) == []
    assert task_table([bleu]).rows == [("answer bleu", "9", "0.26", "100.00", "+99.74", "not tested")]


def test_a_group_is_tested_over_the_documents_of_all_its_tasks():
    found = scores()["choices acc"]
    base = [one for task in ("kind", "hurry") for one in by_document(task, "acc")[0]]
    assert (found.rows, found.is_share, found.base) == (18, True, np.mean(base))
    (kind, hurry), (group,) = logged()[0][:2], logged()[1]
    short = dataclasses.replace(hurry, base=hurry.base[:3], tuned=hurry.tuned[:3])
    by_task = dataclasses.replace(group, is_by_size=False)
    mean, *_ = score_tasks([kind, short], [by_task])
    sides = [
        [np.mean([one["acc"] for one in getattr(task, side)]) for task in (kind, short)] for side in ("base", "tuned")
    ]
    assert (mean.base, mean.tuned) == pytest.approx([np.mean(side) for side in sides])
    changes = [
        (t["acc"] - b["acc"]) / len(task.base)
        for task in (kind, short)
        for b, t in zip(task.base, task.tuned, strict=True)
    ]
    assert mean.p_value == sign_flip_p(changes) and not mean.is_share
    for metric in ("f1", "perplexity"):  # not a mean in each of its tasks
        found = score_tasks(logged()[0], [Group("all", metric, None, ["hurry", "next_word"], True)])
        assert "all" not in {one.task for one in found}


def sample(document: int, prompt: str = "p", **values: object) -> dict[str, object]:
    same = {"doc_id": document, "filter": "none", "doc_hash": str(document), "prompt_hash": prompt}
    return {**same, "metrics": list(values), **values}


@pytest.mark.parametrize(
    ("base", "tuned", "seen"),
    [
        ([sample(0, acc=1)], [sample(0, "q", acc=1)], "document 0"),
        ([sample(0, acc=1)], [sample(1, acc=1)], "document 1"),
        ([sample(0, acc=1)], [{**sample(0, acc=1), "doc_hash": "another"}], "document 0"),
        ([sample(0, acc=1)], [sample(0, acc=1), sample(1, acc=1)], "1 and 2 samples"),
        ([sample(0, acc=1), sample(0, acc=1)], [sample(0, acc=1)] * 2, "2 and 2 samples"),
    ],
)
def test_models_that_were_not_asked_the_same_are_not_compared(base, tuned, seen: str):
    with pytest.raises(InputError, match="--tasks mine: base and tuned were not asked the same") as caught:
        score_tasks([LoggedTask("mine", base, tuned, {}, {})])
    assert caught.value.seen == seen


def test_what_a_task_of_ones_own_may_log():
    base = [sample(i, share=np.float64(0.1), flag=False, list=[1], odd=float("nan"), some=math.nan) for i in range(8)]
    tuned = [sample(i, share=np.float64(0.9), flag=np.True_, list=[2], odd=1.0, some=i) for i in range(8)]
    base[0] |= {"some": 1.0}
    values = {"list,none": (1.0, 2.0), "odd,none": (math.nan, 1.0)}
    how = {"share": Metric("mean", True), "odd": Metric("mean", True), "some": Metric("nanmean", True)}
    found = {one.metric: one for one in score_tasks([LoggedTask("mine", base, tuned, values, how)])}
    assert (found["share"].verdict, found["share"].p_value) == ("better", 2 / 2**8)
    assert found["flag"].verdict == "different" and found["flag"].is_share  # lm_eval does not know what is better
    assert found["list"].verdict == found["odd"].verdict == "not tested"
    assert (found["some"].rows, found["some"].tuned) == (1, 0)  # of the documents that have a number
    (one,) = score_tasks([LoggedTask("mine", base[:1], tuned[:1], {}, {"share": how["share"]})])[:1]
    assert (one.verdict, one.difference_stderr, one.cells) == (
        "inside the noise",
        None,
        ("0.1000", "0.9000", "+0.8000"),
    )


def test_what_one_model_alone_logs_and_what_is_no_number_is_left_out():
    base = [sample(i, acc=1, said="x", bits=(-2.0, i)) for i in range(3)]  # the first document has no bytes
    tuned = [sample(i, acc=1, said="y", bits=(-1.0, i), more=1) for i in range(3)]
    values = {"said,none": ("x", "y"), "bits,none": (2.0, 1.0)}
    found = score_tasks([LoggedTask("mine", base, tuned, values, {"bits": Metric("bits_per_byte", False)})])
    assert [(one.metric, one.verdict) for one in found] == [("acc", "inside the noise"), ("bits", "not tested")]


def test_a_group_is_left_out_if_a_task_in_it_has_no_numbers_and_undirected_if_they_differ():
    def task(name: str, higher: bool, values: list) -> LoggedTask:
        samples = [sample(i, acc=value) for i, value in enumerate(values)]
        return LoggedTask(name, samples, samples, {}, {"acc": Metric("mean", higher)})

    group = Group("both", "acc", None, ["a", "b"], True)
    mixed, *_ = score_tasks([task("a", True, [0, 1]), task("b", False, [1])], [group])
    assert (mixed.task, mixed.rows, mixed.higher_is_better) == ("both", 3, None)
    broken = dataclasses.replace(task("b", True, [[1]]), values={"acc,none": (1.0, 1.0)})
    assert [one.task for one in score_tasks([task("a", True, [0, 1]), broken], [group])] == ["a", "b"]


def test_a_large_score_is_rounded_and_none_is_too_large():
    how = {"perplexity": Metric("perplexity", False), "count": Metric("mean", True)}
    base = [sample(i, perplexity=-2000.0, count=1234.56) for i in range(2)]
    found = {one.metric: one for one in score_tasks([LoggedTask("mine", base, base, {}, how)])}
    assert found["count"].cells == ("1234.6", "1234.6", "+0.0 ± 0.0")
    assert found["perplexity"].base == math.exp(700) and "e+304" in found["perplexity"].cells[0]
