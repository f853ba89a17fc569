"""Who is kept together, and the split as a file: the hash of each row and the side it is on."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from inline_snapshot import snapshot

from solotune.dataset import Prepared, prepare
from solotune.dataset.readers.row import Row, RowError
from solotune.dataset.split.groups import Kinship, _link
from tests.dataset.conftest import Writer, chat, config_of, tiny_tokenizer
from tests.messages import stable


def prepared(path: Path, **keys: Any) -> Prepared:
    return prepare(config_of(path, **keys), tiny_tokenizer("chatml"))


def rows(numbers: range, **more: Any) -> list[dict[str, Any]]:
    found = []
    for number in numbers:
        words = random.Random(number).choices("abcdefghijklmnopqrstuvwxyz", k=40)
        text = " ".join(a + b for a, b in zip(words[::2], words[1::2], strict=True))
        found.append({"messages": chat(f"q {number}", text), **more})
    return found


def numbers_of(result: Prepared) -> tuple[set[int], set[int]]:
    train, validation = ({int(one.where.split(":")[1]) for one in side} for side in (result.train, result.validation))
    assert not train & validation
    return train, validation


# --- kin


def kin_of(*values: dict[str, Any], **keys: Any) -> tuple[list[str | None], list[list[str]]]:
    """For each row the group that it names, and of all names in these rows those that it is linked by."""
    kinship = Kinship(keys.pop("split_by", None))
    groups = []
    for number, one in enumerate(values, 1):
        row = Row(f"f:{number}", one)
        groups.append(kinship.add(row, row, is_sharegpt=keys.get("is_sharegpt", False)))
    told = {f"{kind}={value}" for one in values for value in one.values() for kind in ("conversation", "id")}
    names = {_link(name): name for name in (*told, *filter(None, groups))}
    return groups, [[names[int(link)] for link in links if link] for links in kinship.links()]


def test_pieces_of_a_conversation_are_a_group() -> None:
    identifiers = ("4Oz_a_43", "4Oz_a_44", "4Oz", "_3", "a_b", 17)
    groups, links = kin_of(*({"id": one} for one in identifiers), is_sharegpt=True)
    assert groups == ["conversation=4Oz_a", "conversation=4Oz_a", None, None, None, None]
    assert links == [["conversation=4Oz_a"], ["conversation=4Oz_a"], [], [], [], []]
    assert set(kin_of(*({"id": one} for one in identifiers))[0]) == {None}
    groups, links = kin_of(
        {"conversation_id": 7}, {"conversation id": "7"}, {"conversation_id": None}, {"conversation_id": True}
    )
    assert groups == ["conversation=7", "conversation=7", None, None]
    assert links == [["conversation=7"], ["conversation=7"], [], []]


def groups_of(*identifiers: str, is_sharegpt: bool = False) -> list[str | None]:
    """The group that each row is joined to others by."""
    _, links = kin_of(*({"id": one} for one in identifiers), is_sharegpt=is_sharegpt)
    return [names[0] if names else None for names in links]


@pytest.mark.parametrize("is_sharegpt", [True, False])
@pytest.mark.parametrize("stem", ["4OzeAoa", "QWJhYvA", "doc0042", "conv-3f2a", "0c9d8e7f-1b2a-4c3d", "XYzabcd"])
def test_numbered_codes_are_pieces_in_any_format(is_sharegpt: bool, stem: str) -> None:
    name = f"conversation={stem}"
    assert groups_of(f"{stem}_0", f"{stem}_11", "i6IyJda_0", is_sharegpt=is_sharegpt) == [
        name,
        name,
        "conversation=i6IyJda",
    ]


@pytest.mark.parametrize(
    "identifiers",
    [
        [f"row_{n}" for n in range(9)],
        [f"{name}_{n}" for n in range(5) for name in ("train", "test")],
        [f"{name}_{n}" for n in range(5) for name in ("gsm8k", "mmlu", "v2", "q17")],
        [f"{year}_{month:02}" for year in (2023, 2024) for month in range(1, 13)],
        [f"2024-0{month}_{day}" for month in (1, 2) for day in range(5)],
        [f"{name}_{n}" for n in range(40) for name in ("openhermes25", "magpie2024")],  # parts of a mixture
        [f"4OzeAoa_{n}" for n in range(5)],  # all rows: says nothing
        [f"{n}_{n}" for n in range(5)],
        ["4OzeAoa_1", "i6IyJda_1", "A5AbcES_2"],  # one row each
        ["4OzeAoa_a", "4OzeAoa_b", "4OzeAoa_", "4OzeAoa", "_3"],
        ["4OzeAoa_1"],
    ],
    ids=lambda identifiers: identifiers[0],
)
def test_ids_that_look_numbered_and_are_no_pieces(identifiers: list[str]) -> None:
    assert set(groups_of(*identifiers)) == {None}


def test_in_sharegpt_a_word_may_be_a_stem_but_no_number_and_no_part_of_a_mixture() -> None:
    assert groups_of("bvenifz_0", "bvenifz_1", "2024_01", "2024_02", is_sharegpt=True) == [
        "conversation=bvenifz", "conversation=bvenifz", None, None,
    ]  # fmt: skip
    mixture = [f"{name}_{n}" for n in range(40) for name in ("alpaca", "dolly")]
    assert set(groups_of(*mixture, is_sharegpt=True)) == {None}


def test_pieces_of_messages_stay_on_one_side(write: Writer) -> None:
    pieces = rows(range(60))
    for n, row in enumerate(pieces):
        row["id"] = f"c0DE{n // 3:02}_{n % 3}"
    result = prepared(write("a.jsonl", *pieces), validation_size=0.2)
    assert result.report.num_groups == 20
    for side in numbers_of(result):
        assert len({(number - 1) // 3 for number in side}) * 3 == len(side)


def test_parents_join_whether_they_are_there_or_not() -> None:
    _, links = kin_of(
        {"id": 1}, {"id": 2, "parent_id": 1}, {"id": 3, "parent_id": 2}, {"id": 4, "parent": "gone"}, {"id": 5}
    )
    assert links == [["id=1"], ["id=2", "id=1"], ["id=2"], ["id=gone"], []]
    assert kin_of({"id": 1}, {"id": 1}, {"id": 2, "parent": 3})[1] == [[], [], ["id=3"]]


def test_a_value_that_all_rows_share_says_nothing() -> None:
    assert kin_of(*({"id": f"identity_{n}"} for n in range(5)), is_sharegpt=True)[1] == [[]] * 5
    assert kin_of(*({"id": n, "parent": "root", "conversation": "c"} for n in range(5)))[1] == [[]] * 5
    assert kin_of({"conversation": "c"})[1] == [["conversation=c"]]
    assert kin_of(*({"shop": 1} for _ in range(5)), split_by="shop")[1] == [["shop=1"]] * 5  # was asked for


def test_split_by_is_the_group_and_the_conversation_a_link() -> None:
    groups, links = kin_of({"shop": 3, "conversation": "c", "id": 1}, {"shop": 4, "parent": 1}, split_by="shop")
    assert groups == ["shop=3", "shop=4"]
    assert links == [["shop=3", "conversation=c", "id=1"], ["shop=4", "id=1"]]
    with pytest.raises(RowError) as caught:
        kin_of({"shop": 3}, split_by="town")
    assert stable(caught.value) == snapshot("""\
f:1: split_by: town is missing
  seen:    the keys shop
  allowed: a key that every row has, with a text or a number\
""")


@pytest.mark.parametrize("seed", range(5))
def test_chains_stay_on_one_side(write: Writer, seed: int) -> None:
    """30 chains of three: a row, its child, and a grandchild that knows only the child."""
    chains = rows(range(90))
    for n, row in enumerate(chains):
        row["id"] = f"r{n}"
        if n >= 30:
            row["parent_id"] = f"r{n - 30}"
    path = write("a.jsonl", *chains)
    result = prepared(path, validation_size=0.2, seed=seed)
    assert result.report.num_groups == 30
    for side in numbers_of(result):
        assert len({(number - 1) % 30 for number in side}) * 3 == len(side)


# --- the manifest


def test_manifest(write: Writer) -> None:
    path = write("a.jsonl", *rows(range(40)), *rows(range(3)))
    result = prepared(path, validation_size=8, seed=5)
    manifest = json.loads("".join(result.manifest.json_lines()))
    assert json.dumps(manifest, indent=2) + "\n" == "".join(result.manifest.json_lines())
    assert {key: value for key, value in manifest.items() if key not in ("rows", "hash")} == {
        "version": 1,
        "seed": 5,
        "validation_size": 8,
        "split_by": None,
    }
    assert len(manifest["rows"]) == 40
    sides = list(manifest["rows"].values())
    _, validation = numbers_of(result)
    assert {number for number, side in enumerate(sides, 1) if side == "validation"} == validation
    assert all(len(one) == 32 for one in manifest["rows"])


def test_a_row_is_in_the_manifest_though_nothing_of_it_is_kept(write: Writer) -> None:
    """The split does not depend on max_length, so neither does the manifest."""
    path = write("a.jsonl", *rows(range(20)), {"messages": chat("word " * 100, "a")})
    manifests = [prepared(path, validation_size=4, max_length=limit).manifest for limit in (100, 2000)]
    assert [*manifests[0].json_lines()] == [*manifests[1].json_lines()]
    assert len(manifests[0].hashes) == 21


def test_manifest_with_validation_rows_of_ones_own(write: Writer) -> None:
    own = write("own.jsonl", *rows(range(50, 53)))
    result = prepared(write("a.jsonl", *rows(range(10))), eval_dataset=str(own))
    assert [side for _, side in result.manifest.sides()] == ["train"] * 10 + ["validation"] * 3


@pytest.mark.parametrize("size", [0.1, 100])
def test_appending_rows_moves_almost_none(write: Writer, size: float) -> None:
    """Of 1,000 rows, with 100 more: by chance 180 would change sides."""
    before = dict(prepared(write("a.jsonl", *rows(range(1000))), validation_size=size).manifest.sides())
    after = dict(prepared(write("a.jsonl", *rows(range(1100))), validation_size=size).manifest.sides())
    moved = [one for one, side in before.items() if after[one] != side]
    assert len(moved) <= (10 if size == 0.1 else 20)
    if size == 100:
        assert {before[one] for one in moved} <= {"validation"}  # a fixed number: newcomers push some out, none in


def test_appended_kin_follow_the_row_that_was_there(write: Writer) -> None:
    old = rows(range(100))
    for number, row in enumerate(old):
        row["id"] = number
    children = [{**row, "id": 1000 + n, "parent_id": n} for n, row in enumerate(rows(range(100, 200)))]
    before = dict(prepared(write("a.jsonl", *old), validation_size=10).manifest.sides())
    after = dict(prepared(write("a.jsonl", *old, *children), validation_size=20).manifest.sides())
    assert {one: after[one] for one in before} == before


def test_the_hash_does_not_depend_on_the_file_or_on_case_and_blanks(write: Writer) -> None:
    first, second = write("a.jsonl", *rows(range(3))), write("b.jsonl", *reversed(rows(range(3))))
    text = second.read_text().replace("q 1", "Q   1 ")
    assert text != second.read_text()
    manifests = [dict(prepared(path).manifest.sides()) for path in (first, write("c.jsonl", text))]
    assert set(manifests[0]) == set(manifests[1])
