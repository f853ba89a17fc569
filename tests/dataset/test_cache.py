"""The second start is the first one's result, whatever changed makes it anew, and damage is never believed."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from solotune.dataset import Prepared, cache, load_tokenizer, prepare
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


# --- all that a template can see of a tokenizer, and all that its ids depend on

SHOWS_ALL = (
    "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ sep_token }}{{ pad_token }}{{ cls_token }}{{ mask_token }}"
    "{{ image_token }}" + CHATML.chat_template
)
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def key(tokenizer: Any) -> str | None:
    return cache.key_of(config_of("unused.jsonl"), tokenizer, [], date(2031, 2, 3))


def changed_backend(**parts: Any) -> Callable[[Any], Any]:
    def change(tokenizer: Any) -> None:
        state = {**json.loads(tokenizer.backend_tokenizer.to_str()), **parts}
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))

    return change


LSTRIPS = AddedToken("<|im_end|>", special=True, normalized=False, lstrip=True)
CHANGES: dict[str, Callable[[Any], Any]] = {
    **{name: lambda t, name=name: setattr(t, name, "<|endoftext|>") for name in NAMED if name != "bos_token"},
    "bos_token": lambda t: setattr(t, "bos_token", "<|im_start|>"),
    "bos_token absent": lambda t: setattr(t, "bos_token", None),
    "extra special tokens": lambda t: t.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]}),
    "a named token of the model's own": lambda t: t._set_model_specific_special_tokens({"image_token": "<|im_end|>"}),
    "a special token": lambda t: t.add_tokens(["<new>"], special_tokens=True),
    "a token": lambda t: t.add_tokens(["new"]),
    "flags of a token": lambda t: t.add_tokens([LSTRIPS]),
    "template": lambda t: setattr(t, "chat_template", t.chat_template + " "),
    "named templates": lambda t: setattr(t, "chat_template", {"default": t.chat_template}),
    "a second template": lambda t: setattr(t, "chat_template", {"default": t.chat_template, "tool_use": "x"}),
    "normalizer": changed_backend(normalizer={"type": "Lowercase"}),
    "pre-tokenizer": changed_backend(pre_tokenizer={"type": "WhitespaceSplit"}),
    "post-processor": changed_backend(
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|im_end|>": {"id": "<|im_end|>", "ids": [1], "tokens": ["<|im_end|>"]}},
        }
    ),
}
OF_NO_CONCERN: dict[str, Callable[[Any], Any]] = {
    "its place": lambda t: setattr(t, "name_or_path", "/elsewhere"),
    "padding": lambda t: setattr(t, "padding_side", "left"),
    "truncation": lambda t: setattr(t, "truncation_side", "left"),
    "length": lambda t: setattr(t, "model_max_length", 12),
    "nothing": lambda t: None,
}


@pytest.mark.parametrize("name", [*CHANGES, *OF_NO_CONCERN])
def test_each_attribute_of_a_tokenizer_is_in_the_key(name: str) -> None:
    import copy

    tokenizer = copy.deepcopy(CHATML)
    before = key(tokenizer)
    ({**CHANGES, **OF_NO_CONCERN})[name](tokenizer)
    assert (key(tokenizer) != before) == (name in CHANGES)


def edited(name: str, **values: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **values}))

    return change


def written(name: str, content: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)

    return change


def without_names(folder: Path) -> None:
    """The special tokens named in special_tokens_map.json alone, as older files have them."""
    path = folder / "tokenizer_config.json"
    held = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in held.items() if name not in NAMED}))
    edited("special_tokens_map.json", eos_token="<|im_end|>", bos_token="<|im_start|>")(folder)


FILES: dict[str, Callable[[Path], Any]] = {
    **{
        f"tokenizer_config.json, {name}": edited("tokenizer_config.json", **{name: "<|im_start|>"})
        for name in (*NAMED, "image_token")
    },
    "tokenizer_config.json, extra": edited("tokenizer_config.json", extra_special_tokens={"image_token": "<|im_end|>"}),
    "tokenizer_config.json, listed": edited("tokenizer_config.json", additional_special_tokens=["<|im_end|>", "<|x|>"]),
    "special_tokens_map.json": edited("special_tokens_map.json", eos_token="<|im_start|>", unk_token="<|im_end|>"),
    "special_tokens_map.json, another end": edited("special_tokens_map.json", eos_token="<|im_start|>"),
    "added_tokens.json": edited("added_tokens.json", **{"<|new|>": 990}),
    "chat_template.jinja": written("chat_template.jinja", SHOWS_ALL + "x"),
    "chat_template.json": edited("chat_template.json", chat_template=SHOWS_ALL + "y"),
    "additional_chat_templates": written("additional_chat_templates/tool_use.jinja", SHOWS_ALL + "t"),
    "tokenizer.json": edited("tokenizer.json", normalizer={"type": "Lowercase"}),
    "config.json": edited("config.json", eos_token_id=7),
    "generation_config.json": edited("generation_config.json", eos_token_id=7),
    "README.md": written("README.md", "words"),
    "model_max_length": edited("tokenizer_config.json", model_max_length=77, padding_side="left"),
}
KEEP = {"config.json", "generation_config.json", "README.md", "model_max_length"}


@pytest.mark.parametrize("older", [False, True], ids=["as saved now", "as saved before"])
@pytest.mark.parametrize("name", FILES)
def test_each_file_of_a_tokenizer_is_in_the_key(
    name: str, older: bool, write: Writer, made: list[int], tmp_path: Path
) -> None:
    """Whatever a file changes in a row is seen; what it cannot change keeps the rows."""
    CHATML.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(SHOWS_ALL)
    if older:
        without_names(tmp_path / "model")
    config = config_of(write("a.jsonl", *rows(2)), model_name_or_path=str(tmp_path / "model"), on_bad_row="drop")
    before = prepare(config, load_tokenizer(config))
    shutil.copytree(tmp_path / "model", tmp_path / "copy")
    prepare(config, load_tokenizer(config.replaced("test", model_name_or_path=str(tmp_path / "copy"))))
    assert len(made) == 1, "a copy elsewhere has the same rows"
    FILES[name](tmp_path / "model")
    found = prepare(config, load_tokenizer(config))
    fresh = prepare(config, load_tokenizer(config), use_cache=False)
    assert same(found, fresh), "stale"
    is_seen = [one.input_ids.tolist() for one in fresh.train] != [one.input_ids.tolist() for one in before.train]
    if is_seen or name in KEEP:
        assert len(made) == (2 if name in KEEP else 3)
    assert not (is_seen and name in KEEP)


def test_each_library_that_reads_renders_or_tokenizes_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = cache.version, [key(CHATML)]
    try:
        for name in ("tokenizers", "transformers", "numpy", "jinja2", "markupsafe", "pyarrow", "datasets"):
            monkeypatch.setattr(cache, "version", lambda asked, name=name: real(asked) + "+x" * (asked == name))
            cache._code_version.cache_clear()
            seen.append(key(CHATML))
    finally:
        cache._code_version.cache_clear()
    assert len(set(seen)) == len(seen)
