"""The second start is the first one's result, whatever changed makes it anew, and damage is never believed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from solotune.dataset import Prepared, cache, prepare
from solotune.dataset.render import Renderer
from tests.dataset.conftest import Writer, chat, config_of, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("kept")
CHATML = tiny_tokenizer("chatml")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one each time rows are rendered and not taken from the cache."""
    calls: list[int] = []
    init = Renderer.__init__

    def counting(self: Renderer, *args: Any) -> None:
        calls.append(1)
        init(self, *args)

    monkeypatch.setattr(Renderer, "__init__", counting)
    return calls


def rows(count: int) -> list[dict[str, Any]]:
    tool = {"type": "function", "function": {"name": "f"}}
    weights = [{}, {"weight": 0.1}, {"weight": 2}, {}]
    return [
        {"messages": chat(f"What is {n}?", f"It is {n * 7}."), "tools": [tool], **weights[n % 4]} for n in range(count)
    ]


def same(a: Prepared, b: Prepared) -> bool:
    for one, other in ((a.train, b.train), (a.validation, b.validation)):
        assert [(x.where, x.messages, x.tools) for x in one] == [(x.where, x.messages, x.tools) for x in other]
        for x, y in zip(one, other, strict=True):
            assert (y.input_ids.dtype, y.loss_mask.dtype) == (np.int32, bool)
            assert x.input_ids.tolist() == y.input_ids.tolist()
            assert x.loss_mask.tolist() == y.loss_mask.tolist()
            assert (x.weights is None) == (y.weights is None)
            if x.weights is not None and y.weights is not None:
                assert y.weights.dtype == np.float32
                assert x.weights.tolist() == y.weights.tolist()
    assert a.report == b.report
    assert [*a.manifest.json_lines()] == [*b.manifest.json_lines()]
    return a.report.to_json() == b.report.to_json()


@pytest.mark.parametrize(
    "keys",
    [{"validation_size": 3}, {"validation_size": 0}, {"max_length": 12, "overflow": "split"}, {"on_bad_row": "drop"}],
)
def test_the_second_start_is_the_first_one(write: Writer, made: list[int], keys: dict[str, Any]) -> None:
    path = write("a.jsonl", *rows(12), {"messages": chat("a", " ")})
    first = prepare(config_of(path, **keys), CHATML)
    second = prepare(config_of(path, **keys), CHATML)
    assert same(first, second)
    assert len(made) == 1
    assert same(first, prepare(config_of(path, **keys), CHATML, use_cache=False))
    assert len(made) == 2


def test_what_changes_makes_it_anew(write: Writer, made: list[int]) -> None:
    import copy

    path = write("a.jsonl", *rows(12))
    prepare(config_of(path), CHATML)
    other_template, other_vocabulary = copy.deepcopy(CHATML), copy.deepcopy(CHATML)
    other_template.chat_template = CHATML.chat_template.replace("<|im_end|>", "<|im_end|>\n", 1)
    other_vocabulary.add_tokens(["What"])
    changes: list[Callable[[], Any]] = [
        lambda: prepare(config_of(path, max_length=100), CHATML),
        lambda: prepare(config_of(path, seed=1), CHATML),
        lambda: prepare(config_of(path, train_on_last_turn=True), CHATML),
        lambda: prepare(config_of(path, dataset_split="train[:5]"), CHATML),
        lambda: prepare(config_of(path), other_template),
        lambda: prepare(config_of(path), other_vocabulary),
        lambda: prepare(config_of(write("b.jsonl", *rows(12))), CHATML),
        lambda: prepare(config_of(write("a.jsonl", *rows(13))), CHATML),
    ]
    for number, change in enumerate(changes, 2):
        change()
        assert len(made) == number
        change()
        assert len(made) == number
    prepare(config_of(path, learning_rate=1e-5, output_dir="elsewhere"), CHATML)
    assert len(made) == number  # of no concern to the rows


def test_one_byte_of_a_file_with_the_same_size_and_time(write: Writer, made: list[int]) -> None:
    path = write("a.jsonl", *rows(3))
    times = path.stat()
    prepare(config_of(path), CHATML)
    path.write_bytes(path.read_bytes().replace(b"It is 7", b"It is 8"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "It is 8." in [one.messages[1]["content"] for one in prepare(config_of(path), CHATML).train]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "junk", "no checksum", "folder"])
def test_damage_is_made_anew(write: Writer, made: list[int], kept: Path, damage: str) -> None:
    path = write("a.jsonl", *rows(12))
    first = prepare(config_of(path), CHATML)
    (entry,) = kept.glob("*.safetensors")
    whole = entry.read_bytes()
    places = range(8, len(whole), max(1, len(whole) // 40)) if damage == "flip" else [0]
    for place in places:
        flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        broken = {
            "flip": flipped,
            "cut": whole[: len(whole) // 2],
            "empty": b"",
            "junk": b"\x80\x04junk",
            "no checksum": whole[:-32],
            "folder": b"",
        }[damage]
        entry.unlink()
        if damage == "folder":
            entry.mkdir()
        else:
            entry.write_bytes(broken)
        made.clear()
        assert same(first, prepare(config_of(path), CHATML)), place
        assert made or damage == "flip"  # a flipped bit in a blank of the header changes nothing
        if damage == "folder":
            return
    assert len(list(kept.iterdir())) == 1


def test_entries_are_private_whole_and_no_pickle(write: Writer, kept: Path) -> None:
    prepare(config_of(write("a.jsonl", *rows(3))), CHATML)
    (entry,) = kept.iterdir()
    assert entry.stat().st_mode & 0o077 == 0
    length = int.from_bytes(entry.read_bytes()[:8], "little")
    assert set(json.loads(entry.read_bytes()[8 : 8 + length])) >= {"train.rows", "json", "sha256"}


def test_a_folder_that_cannot_be_written_is_no_error(write: Writer, kept: Path) -> None:
    kept.parent.mkdir(parents=True)
    kept.write_text("a file where the folder should be")
    assert len(prepare(config_of(write("a.jsonl", *rows(3))), CHATML).train) == 3


def test_the_oldest_go_and_what_is_used_stays(
    write: Writer, made: list[int], kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [write(f"{name}.jsonl", *rows(12)) for name in "abcd"]
    entries: list[Path] = []
    for path in paths[:3]:
        prepare(config_of(path), CHATML)
        entries += set(kept.iterdir()).difference(entries)  # not by their times, which may be equal
    for age, entry in zip((30, 20, 10), entries, strict=True):
        os.utime(entry, (time.time() - age, time.time() - age))
    prepare(config_of(paths[0]), CHATML)  # used: now the newest
    monkeypatch.setattr(cache, "MAX_BYTES", sum(entry.stat().st_size for entry in entries) + 10)
    left_over = kept / "x.tmp"
    left_over.write_text("")
    os.utime(left_over, (0, 0))
    prepare(config_of(paths[3]), CHATML)
    assert len(list(kept.iterdir())) == 3
    made.clear()
    prepare(config_of(paths[0]), CHATML)
    assert not made
    prepare(config_of(paths[1]), CHATML)
    assert made


def test_what_is_larger_than_all_may_be_is_not_kept(write: Writer, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MAX_BYTES", 100)
    prepare(config_of(write("a.jsonl", *rows(3))), CHATML)
    assert not kept.exists()


def test_a_template_with_the_date_in_it_is_rendered_anew_for_another_day(write: Writer) -> None:
    import copy

    config, dated = config_of(write("a.jsonl", *rows(1))), copy.deepcopy(CHATML)
    dated.chat_template = "{{ strftime_now('%d %b %Y') }}" + CHATML.chat_template
    before = [cache.key_of(config, tokenizer, [], date(2031, 2, 3)) for tokenizer in (CHATML, dated)]
    after = [cache.key_of(config, tokenizer, [], date(2031, 2, 4)) for tokenizer in (CHATML, dated)]
    assert (before[0] == after[0], before[1] == after[1]) == (True, False)


def test_hub_rows_are_told_apart_by_their_values(monkeypatch: pytest.MonkeyPatch, made: list[int]) -> None:
    import datasets

    held = rows(3)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: held)
    for change in (lambda: None, lambda: held[0]["messages"][1].update(content="other")):
        change()
        results = [prepare(config_of("owner/chats"), CHATML) for _ in range(2)]
        assert same(*results)
        assert results[0].train[0].messages == held[0]["messages"]
    assert len(made) == 2


def test_progress(write: Writer) -> None:
    calls: list[tuple[int, int, str]] = []
    path = write("a.jsonl", *rows(300))
    prepare(config_of(path, validation_size=20), CHATML, progress=lambda *call: calls.append(call))
    assert calls[0] == (0, 0, "reading rows")
    copies, tokens = (
        [done for done, total, what in calls if what == wanted and total == 300]
        for wanted in ("looking for duplicates", "tokenising rows")
    )
    assert copies == [300]
    assert tokens == [256, 280, 300]


def test_a_changed_source_file_in_any_folder_of_a_package_changes_the_key(
    write: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package"
    (package / "below").mkdir(parents=True)
    for name in ("cache.py", "below/deep.py"):
        (package / name).write_text("x = 1\n")
    monkeypatch.setattr(cache, "__file__", str(package / "cache.py"))
    config = config_of(write("a.jsonl", *rows(1)))

    def key() -> str | None:
        cache._code_version.cache_clear()
        return cache.key_of(config, CHATML, [], date(2031, 2, 3))

    try:
        first = key()
        assert key() == first
        (package / "below/notes.txt").write_text("no source")
        assert key() == first
        (package / "below/deep.py").write_text("x = 2\n")
        second = key()
        (package / "below/deep.py").rename(package / "below/other.py")
        assert len({first, second, key()}) == 3
    finally:
        cache._code_version.cache_clear()
