"""No validation row is known from training, and the split is the same tomorrow."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inline_snapshot import snapshot

from solotune.dataset.chat.formats import Record
from solotune.dataset.records import Records, packed, row_hash
from solotune.dataset.row_store import Store
from solotune.dataset.split import holdout as splitting
from solotune.dataset.split.groups import _link
from solotune.dataset.split.holdout import Split
from solotune.dataset.split.near_duplicates import _bands, _triples, near_duplicates
from solotune.errors import CheckError, InputError
from tests.dataset.conftest import chat
from tests.messages import stable


def record(number: int, answer: str | None = None, group: str | None = None, system: str | None = None) -> Record:
    words = random.Random(number).choices("abcdefghijklmnopqrstuvwxyz", k=40)
    text = " ".join(a + b for a, b in zip(words[::2], words[1::2], strict=True))
    return Record(f"f:{number}", messages=chat(f"question {number}", answer or text, system=system), group=group)


def stored(records: Sequence[Record]) -> Records:
    """The records as `prepare` keeps them."""
    store = Store()
    exact = np.zeros(len(records), np.uint64)
    for number, one in enumerate(records):
        data, exact[number] = packed(one)
        store.append(data)
    hashes = np.array([row_hash(one) for one in records], "S16")
    links = np.array([[_link(one.group), 0, 0, 0] for one in records], np.uint64)
    return Records(store, np.arange(len(records)), hashes, exact, links)


def hold_out(records: Sequence[Record], size: float | int, seed: int, **keys: Any) -> Split:
    return splitting.hold_out(stored(records), size, seed, **keys)


def check_leaks(train: Sequence[Record], validation: Sequence[Record], *, key: str) -> int:
    return splitting.check_leaks(stored(train), stored(validation), key=key)


def places(records: Sequence[Record]) -> list[str]:
    return [one.where for one in records]


@pytest.mark.parametrize(
    ("size", "wanted"), [(0.1, 10), (0.05, 5), (7, 7), (1, 1), (0.001, 1), (0, 0), (0.0, 0), (99, 99)]
)
def test_size(size: float | int, wanted: int) -> None:
    split = hold_out([record(n) for n in range(100)], size, seed=0)
    assert (len(split.validation), len(split.train)) == (wanted, 100 - wanted)
    assert split.num_groups == 100


def test_file_order_is_kept_and_the_seed_decides() -> None:
    records = [record(n) for n in range(100)]
    splits = [hold_out(records, 0.2, seed) for seed in (0, 0, 1)]
    assert places(splits[0].validation) == places(splits[1].validation) != places(splits[2].validation)
    for split in splits:
        for side in (split.train, split.validation):
            assert places(side) == sorted(places(side), key=lambda where: int(where[2:]))


def test_appending_rows_moves_almost_none() -> None:
    before = {*places(hold_out([record(n) for n in range(1000)], 0.1, 0).validation)}
    after = {*places(hold_out([record(n) for n in range(1200)], 0.1, 0).validation)}
    moved = before ^ {where for where in after if int(where[2:]) < 1000}
    assert len(moved) <= 10  # by chance 180 would


def test_appended_near_duplicates_follow_the_earlier_row() -> None:
    records = [record(n) for n in range(100)]
    before = places(hold_out(records, 10, 0).validation)
    near = [Record(f"near:{n}", messages=chat(f"question {n} x", record(n).messages[1]["content"])) for n in range(100)]
    after = places(hold_out(records + near, 20, 0).validation)
    assert [where for where in after if where.startswith("f:")] == before


def test_groups_stay_together_and_come_near_the_size() -> None:
    records = [record(n, group=f"shop={n % 12}") for n in range(720)]
    split = hold_out(records, 60, seed=0)
    assert {one.group for one in split.train} & {one.group for one in split.validation} == set()
    assert len(split.validation) == 60
    assert split.num_groups == 12
    assert len(hold_out(records, 100, seed=0).validation) == 120
    assert len(hold_out(records, 85, seed=0).validation) == 60


ALIKE = ["x2 is even", "X2 is even", "x2  is even", "x² is even", "x2 is even\n", "ｘ２ is even"]


@pytest.mark.parametrize("seed", range(5))
def test_rows_that_differ_in_case_blanks_or_unicode_form_are_all_kept_on_one_side(seed: int) -> None:
    alike = [Record("alike", messages=chat(text, "yes")) for text in ALIKE]
    alike += [Record("alike", messages=chat("x2 is even", "Yes")), Record("alike", messages=chat(ALIKE[0], "yes "))]
    split = hold_out([record(n) for n in range(4)] + alike, 2, seed=seed)
    assert split.num_exact_duplicates == 0
    assert [places(side).count("alike") for side in (split.train, split.validation)] in ([8, 0], [0, 8])
    assert split.num_near_duplicates == 7


def test_texts_that_differ_where_the_answer_begins_are_no_copies() -> None:
    texts = [Record("f:1", text="1 + 1 = 2", answer_start=start) for start in (0, 5, 7)]
    assert hold_out(texts, 0, seed=0).num_exact_duplicates == 0
    assert (
        hold_out([*texts, Record("f:2", text="1 + 1 = 2", answer_start=5, weight=3.0)], 0, 0).num_exact_duplicates == 1
    )


def test_copies_are_kept_if_asked_for_and_never_on_two_sides() -> None:
    records = [record(n % 7) for n in range(70)]
    for seed in range(5):
        split = hold_out(records, 10, seed=seed, keep_copies=True)
        assert (split.num_exact_duplicates, split.num_near_duplicates) == (63, 0)
        assert (len(split.train), len(split.validation), split.num_groups) == (60, 10, 7)
        assert not set(places(split.train)) & set(places(split.validation))


def test_copies_are_removed() -> None:
    records = [record(n) for n in range(10)]
    split = hold_out([*records, Record("copy", messages=records[3].messages)], 2, seed=0)
    assert split.num_exact_duplicates == 1
    assert places([*split.train, *split.validation]).count("copy") == 0
    # another role, another system prompt, other tools, other thoughts: another row
    question, answer = records[3].messages
    for other in (
        Record("other", messages=chat("q", answer["content"], system="s")),
        Record("other", messages=records[3].messages, tools=[{"type": "function", "function": {"name": "f"}}]),
        Record("other", messages=[question, {**answer, "reasoning_content": "hm"}]),
    ):
        assert hold_out([*records, other], 2, seed=0).num_exact_duplicates == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000))
def test_near_duplicates_stay_on_one_side(seed: int) -> None:
    records = []
    for n in range(0, 60, 2):
        one = record(n)
        words = one.messages[1]["content"].split()
        words[-1] = "changed"
        records += [one, Record(f"near:{n}", messages=chat(f"question {n}", " ".join(words), system=f"other {n}"))]
    split = hold_out(records, 0.2, seed)
    sides = [{where.split(":")[1] for where in places(side)} for side in (split.train, split.validation)]
    assert sides[0] & sides[1] == set()
    assert (split.num_near_duplicates, split.num_groups) == (30, 30)


def test_a_shared_system_prompt_does_not_make_rows_alike() -> None:
    records = [record(n, system=" ".join(f"rule{i}" for i in range(500))) for n in range(20)]
    assert hold_out(records, 2, 0).num_near_duplicates == 0


def test_near_duplicates_against_all_pairs() -> None:
    rng = random.Random(0)
    texts = []
    for _ in range(120):
        words = [f"w{rng.randrange(3000)}" for _ in range(rng.randrange(6, 80))]
        texts.append(" ".join(words))
        for _ in range(2):
            texts.append(" ".join(w if rng.random() > 0.06 else "x" for w in words))

    def triples(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}

    sets = [triples(text) for text in texts]
    wanted = {
        (i, j) for j in range(len(sets)) for i in range(j) if len(sets[i] & sets[j]) >= 0.7 * len(sets[i] | sets[j])
    }
    assert len(wanted) > 50
    assert set(near_duplicates(texts)) == wanted


def test_signatures_are_the_same_in_every_process_and_with_every_library() -> None:
    """Golden: if these change, rows change sides between two versions, and the manifest is worth less."""
    bands = _bands([_triples("the quick brown fox jumps over the lazy dog", {})])
    assert (bands.shape, bands.dtype) == ((1, 32), np.uint64)
    assert hashlib.sha256(bands.astype("<u8").tobytes()).hexdigest()[:16] == "f5e1626f17cd1482"


def test_a_crowd_is_one_group_in_bounded_time() -> None:
    """3,000 rows of one pattern have 4.5 million pairs."""
    crowd = [f"please translate the number that follows into french for me {n}" for n in range(3000)]
    pairs = list(near_duplicates(crowd))
    assert {later for _, later in pairs} == set(range(1, 3000))
    assert len(pairs) < 3000 * 100


def test_near_duplicates_of_text_without_blanks() -> None:
    text = "今天天气很好我们一起去公园散步然后回家吃饭看电视睡觉明天再去上班工作"
    assert list(near_duplicates([text, text[:-1] + "学", "完全不同的另外一句话没有任何相同的地方"])) == [(0, 1)]


@pytest.mark.parametrize("records", [[record(1)], [record(1), record(1)], [record(n, group="a") for n in range(5)]])
def test_nothing_to_hold_out(records: list[Record]) -> None:
    with pytest.raises(InputError, match=r"^validation_size: 0\.5: "):
        hold_out(records, 0.5, seed=0)


def test_nothing_to_hold_out_in_words() -> None:
    with pytest.raises(InputError) as caught:
        hold_out([record(1), record(1), record(2, group="a"), record(3, group="a")], 5, seed=0)
    assert stable(caught.value) == snapshot("""\
validation_size: 5: the rows cannot be split into training and validation
  seen:    3 distinct rows (and 1 copies, removed) in 2 groups, the largest with 2 rows; validation needs 5 rows
  allowed: fewer rows than there are, and at least two groups; rows that share a group or are near-duplicates stay on one side
  change:  use more varied rows, a smaller validation_size, an eval_dataset, or validation_size: 0\
""")


@pytest.mark.parametrize(
    ("validation", "what"),
    [
        (Record("v:1", messages=chat("question 4", record(4).messages[1]["content"])), "v:1 equals f:4"),
        (Record("v:1", messages=chat("QUESTION  4", record(4).messages[1]["content"])), "v:1 is nearly equal to f:4"),
        (Record("v:1", messages=[{"role": "assistant", "content": "Short"}]), "v:1 is nearly equal to f:0"),
        (record(99, group="g"), "f:99 is in the same group as f:0"),
    ],
)
def test_leaks_are_refused(validation: Record, what: str) -> None:
    train = [record(n, group="g" if n == 0 else None) for n in range(10)]
    if len(validation.messages) == 1:
        train[0] = Record("f:0", messages=[{"role": "assistant", "content": "short"}])
    with pytest.raises(CheckError) as caught:
        check_leaks(train, [record(50), validation], key="eval_dataset")
    assert stable(caught.value).replace(what, "<what>") == snapshot("""\
eval_dataset: 1 of 2 validation rows are equal or close to training rows
  seen:    <what>
  allowed: no row on both sides: the loss on rows seen in training says nothing about new rows
  change:  remove these rows from dataset or from eval_dataset, or remove eval_dataset to hold out rows of dataset instead\
""")


def test_no_leak() -> None:
    assert check_leaks([record(n) for n in range(10)], [record(n) for n in range(10, 20)], key="eval_dataset") == 0


def report(number: int) -> Record:
    """A formulaic weather report: all are near-duplicates by their words."""
    draw = random.Random(number)
    place, wind = draw.choice("Ayr Bath Cork Deal Ely".split()) + str(number), draw.randint(1, 90)
    text = (
        f"Forecast for the coming night: over {place} the sky stays cloudy with some rain from the west, and a light "
        f"wind of {wind} knots; tomorrow brings sunshine and clear air to the whole of the coast until late evening."
    )
    return Record(f"f:{number}", messages=chat(f"Report for station {number}", text))


def test_rows_of_a_templated_task_are_no_leak() -> None:
    train = [report(n) for n in range(60)]
    assert check_leaks(train, [report(n) for n in range(60, 80)], key="eval_dataset") == 8
    with pytest.raises(CheckError, match="1 of 21 validation rows"):  # a copy is one there too
        check_leaks(train, [*(report(n) for n in range(60, 80)), report(7)], key="eval_dataset")
    varied = [record(n) for n in range(240)]
    edited = [Record(f"v:{n}", messages=chat(f"question {n} x", record(n).messages[1]["content"])) for n in range(3)]
    with pytest.raises(CheckError, match="3 of 20 validation rows"):
        check_leaks(varied, [*edited, *(record(n) for n in range(300, 317))], key="eval_dataset")
    assert (
        check_leaks(varied, [edited[0], *(record(n) for n in range(300, 323))], key="eval_dataset") == 1
    )  # may be chance
