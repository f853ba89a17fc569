"""Asking the rules on rows: once per input, and again when what they read or a rule has changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from solotune.dataset import cache, prepare
from solotune.diagnosis import data_checks, rules
from solotune.diagnosis.data_checks import check_rows
from solotune.diagnosis.findings import Finding
from solotune.diagnosis.run_facts import RunFacts, Settings
from tests.dataset.conftest import Writer, chat, config_of, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("kept")
CHATML = tiny_tokenizer("chatml")
CONSTANT = [{"messages": chat(f"What is {n}?", "always this")} for n in range(40)]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one each time the rules are asked."""
    calls: list[int] = []
    judge = data_checks.judge
    monkeypatch.setattr(data_checks, "judge", lambda facts: calls.append(1) or judge(facts))
    return calls


def checked(path: Path, **keys: Any) -> list[Finding]:
    config = config_of(path, **keys)
    return check_rows(config, CHATML, prepare(config, CHATML))


def test_findings_of_rows_out_of_the_cache_are_not_asked_again(
    write: Writer,
    kept: Path,
    tmp_path: Path,
    asked: list[int],
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    path = write("a.jsonl", *CONSTANT)
    first = checked(path, model_name_or_path=str(model))
    assert "F35" in [finding.code for finding in first]
    assert (checked(path, model_name_or_path=str(model)), len(asked)) == (first, 1)
    checked(path, model_name_or_path=str(model), learning_rate=1e-5)  # rules may read the whole config
    assert len(asked) == 2
    (model / "config.json").write_text('{"vocab_size": 3}')  # and the model's
    assert (checked(path, model_name_or_path=str(model)) != first, len(asked)) == (True, 3)
    for file in kept.glob("*.findings.json"):
        file.write_text('{"findings": []}')
    assert (checked(path, model_name_or_path=str(model)) != [], len(asked)) == (True, 4)


def test_the_models_own_template_is_read_by_rules_where_a_file_replaces_it(
    write: Writer, tmp_path: Path, asked: list[int]
) -> None:
    """F12 compares the two; the rows depend on the file alone."""
    CHATML.save_pretrained(tmp_path / "model")
    (tmp_path / "own.jinja").write_text(CHATML.chat_template)
    keys = {"model_name_or_path": str(tmp_path / "model"), "chat_template_path": str(tmp_path / "own.jinja")}
    path, own = write("a.jsonl", *CONSTANT), tmp_path / "model" / "chat_template.jinja"
    for number, (file, content) in enumerate(
        [
            (own, CHATML.chat_template),
            (own, CHATML.chat_template + " "),
            (tmp_path / "model/additional_chat_templates/tool_use.jinja", "x"),
            (tmp_path / "model/special_tokens_map.json", '{"unk_token": "<|im_end|>"}'),
        ],
        1,
    ):
        file.parent.mkdir(exist_ok=True)
        file.write_text(content)
        checked(path, **keys)
        assert checked(path, **keys) is not None and len(asked) == number
    (tmp_path / "model" / "README.md").write_text("words")
    checked(path, **keys)
    assert len(asked) == number


def test_a_changed_rule_is_asked_anew_of_the_same_rows(
    write: Writer,
    kept: Path,
    asked: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package = tmp_path / "package"
    (package / "rules").mkdir(parents=True)
    (package / "rules" / "a_rule.py").write_text("MOST = 0.5\n")
    monkeypatch.setattr(data_checks, "__file__", str(package / "data_checks.py"))
    path = write("a.jsonl", *CONSTANT)
    try:
        for number, source in enumerate(("MOST = 0.5\n", "MOST = 0.6\n"), 1):
            (package / "rules" / "a_rule.py").write_text(source)
            data_checks._rules_version.cache_clear()
            assert checked(path) == checked(path)
            assert len(asked) == number
    finally:
        data_checks._rules_version.cache_clear()
    assert len(list(kept.glob("*.safetensors"))) == 1  # the rows are not made again


def test_the_rules_lie_where_their_source_is_looked_for() -> None:
    from solotune.diagnosis.rules import rules

    package = Path(data_checks.__file__).parent
    sources = {Path(one.ask.__code__.co_filename) for known in rules().values() for one in known}
    assert len(sources) > 10 and all(source.is_relative_to(package) for source in sources)


def test_findings_of_rows_that_were_not_kept_are_not_kept(
    write: Writer,
    kept: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cache, "MIN_SECONDS", 1e9)
    kept.mkdir(parents=True)
    assert checked(write("a.jsonl", *CONSTANT))
    assert not list(kept.iterdir())


def test_an_account_says_whether_its_rows_were_checked(write: Writer) -> None:
    config = config_of(write("a.jsonl", *CONSTANT))
    prepared = prepare(config, CHATML)
    found = check_rows(config, CHATML, prepared)
    after = prepared.with_findings(finding.to_json() for finding in found)
    assert (prepared.report.to_json()["checked"], prepared.report.to_json()["findings"]) == (False, [])
    assert after.report.to_json()["checked"] and after.report.to_json()["findings"] == [f.to_json() for f in found]
    assert prepared.with_findings([]).report.to_json()["checked"]


def test_rows_are_judged_once_even_if_nothing_was_found(write: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[object] = []
    monkeypatch.setattr(rules, "judge", lambda facts: judged.append(facts) or [])
    config = config_of(write("a.jsonl", *CONSTANT))
    run_facts = RunFacts("run", Settings({}), tokenizer=CHATML, train=prepare(config, CHATML).train)
    assert list(rules.findings_of(replace(run_facts, findings=[]))) == [] and not judged
    assert list(rules.findings_of(run_facts)) == [] and len(judged) == 1, "None: the check did not run"
