"""A fault that is certain before the first step stops the run, unless `allow_faults` names it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import chat_rows

import solotune
from solotune import cli
from solotune.api.train import prepare_run
from solotune.config.load import load_config
from solotune.diagnosis import certain_faults
from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.run_facts import RunFacts, Settings
from solotune.diagnosis.sources import solotune_run
from solotune.display.progress import SilentDisplay
from solotune.errors import CheckError, InputError

EXAMPLES = Path(__file__).parents[2] / "examples"
TOO_HIGH = {"learning_rate": 1.0}


class Notes(SilentDisplay):
    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)

    def diagnosed(self, event, text):
        self.lines.append(text)


def test_a_run_with_a_certain_fault_stops_before_anything_is_written(chat_config, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    (tmp_path / "run.yaml").write_text(json.dumps({**chat_config, **TOO_HIGH}))
    assert cli.main(["train", "run.yaml"]) == 3
    said = capsys.readouterr().err
    assert (
        "stopped before the first step, and nothing is written: the learning rate is too high (F67 rate-too-high)"
        in said
    )
    assert "one step of Adam changes a weight by" in said
    assert "change:  learning_rate: 2e-4. To train all the same: allow_faults: [F67]" in said
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "run.yaml"])


def test_the_hint_of_the_error_works(chat_config):
    with pytest.raises(CheckError) as refused:
        solotune.train(chat_config, **TOO_HIGH)
    assert refused.value.fault == "F67"
    change, allowance = str(refused.value.change).split(". To train all the same: ")
    key, value = change.split(": ")
    assert prepare_run(load_config({**chat_config, key: float(value)}), False, SilentDisplay())
    key, value = allowance.split(": ")
    assert prepare_run(load_config({**chat_config, **TOO_HIGH}, [f"{key}={value}"]), False, SilentDisplay())


def test_an_allowed_fault_is_said_and_the_run_can_be_resumed(chat_config):
    told = Notes()
    keys = {**chat_config, **TOO_HIGH, "max_steps": 2, "save_steps": 1, "num_samples": 0}
    solotune.train({**keys, "allow_faults": "rate-too-high"}, display=told)
    assert "allow_faults: training in spite of F67 rate-too-high" in told.lines
    assert any(line.startswith("F67 rate-too-high: learning_rate 1:") for line in told.lines)
    codes = [culprit["fault"] for culprit in json.loads(Path("run/diagnosis.json").read_text())["culprits"]]
    assert "F67" in codes
    last = Path("run/checkpoints/step-000002")
    last.rename(last.with_name("taken-away"))
    Path("run/manifest.json").unlink()
    solotune.train("run/config.yaml", resume=True, output_dir="run")  # its own config has the allowance
    assert last.is_dir()


def test_a_run_that_goes_on_from_a_checkpoint_is_not_stopped(chat_config):
    """Who allowed the fault on the command line need not do so again."""
    keys = {**chat_config, **TOO_HIGH, "max_steps": 2, "save_steps": 1, "num_samples": 0}
    solotune.train(keys, allow_faults=["F67"])
    again = load_config({**keys, "resume_from_checkpoint": "run/checkpoints/step-000001", "output_dir": "other"})
    assert prepare_run(again, False, SilentDisplay())
    with pytest.raises(CheckError, match="F67"):
        prepare_run(load_config({**keys, "output_dir": "new"}), True, SilentDisplay())  # nothing to go on from


def test_data_and_plan_say_what_would_stop_the_run(chat_config, capsys):
    Path("run.yaml").write_text(json.dumps({**chat_config, **TOO_HIGH}))
    with pytest.raises(CheckError) as refused:
        solotune.train("run.yaml")
    for verb in ("data", "plan"):
        assert cli.main([verb, "run.yaml", "--json"]) == 3
        (found,) = json.loads(capsys.readouterr().out)["findings"]
        assert (found["code"], found["severity"], found["message"]) == ("F67", "error", refused.value.seen)
        assert cli.main([verb, "run.yaml"]) == 3
        said = capsys.readouterr().out
        assert "✗  fault F67 rate-too-high: learning_rate 1:" in said and "→ learning_rate: 2e-4" in said
        assert "train stops before step 1:" in said
        assert cli.main([verb, "run.yaml", "allow_faults=[F67]"]) == 0
        assert "fault F67 rate-too-high" in capsys.readouterr().out
        assert cli.main([verb, "run.yaml", "learning_rate=1e-3"]) == 0
        assert "F67" not in capsys.readouterr().out


def test_a_fault_of_the_rows_stops_the_run_and_a_statistic_does_not(chat_config):
    long = [{"messages": [{"role": "user", "content": f"twice {i}"}, {"role": "assistant", "content": "more " * 20}]}
            for i in range(40)]  # fmt: skip
    with pytest.raises(CheckError) as refused:
        solotune.train({**chat_config, "dataset": long, "dataset_exact_deduplication": False})
    assert refused.value.fault == "F24" and "truncated at max_length 64" in str(refused.value)
    assert not Path("run").exists()
    config = load_config({**chat_config}, keys={"validation_size": 3})
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat_rows(120)))
    told = Notes()
    assert prepare_run(config, False, told)  # three held-out rows: a fault, and a statistic
    assert any(line.startswith("fault F48 weak-validation") for line in told.lines)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["F99"], "python, allow_faults: there is no such fault"),
        ("rate-to-high", "did you mean rate-too-high"),
        (["S13"], "S13 is a suspect, not a fault"),
    ],
)
def test_an_unknown_fault_is_an_error_with_the_nearest_name(names, said, chat_config):
    for verb in (solotune.train, solotune.data, solotune.plan):
        with pytest.raises(InputError) as refused:
            verb(chat_config, allow_faults=names)
        assert said in str(refused.value)


# --- the line between what stops a run and what does not


@pytest.mark.parametrize(
    ("kind", "weight", "stops"),
    [
        ("invariant", 0.8, True),
        ("measured", 0.95, False),
        ("curve", 0.9, False),
        ("remark", 0.9, False),
        ("invariant", 0.3, False),
    ],
)
def test_only_a_violated_equation_that_is_named_stops(kind, weight, stops):
    found = certain_faults.of_run(RunFacts("run", Settings({})), [Signal("F39", kind, "rows are repeated", weight)])
    assert [finding.code for finding in found] == ["F39"] * stops
    assert (certain_faults.refusal(found, ()) is not None) == stops


def test_a_consequence_is_not_named_and_each_fault_is_allowed_by_its_own_name():
    signals = [Signal("F10", "invariant", "no end of turn", 0.95), Signal("F67", "invariant", "too high", 0.8)]
    facts = RunFacts("run", Settings({}))
    both = certain_faults.of_run(facts, [*signals, replace(signals[0], code="F19", weight=0.9)])
    assert [finding.code for finding in both] == ["F10", "F67"]
    error = certain_faults.refusal(both, {"F10"})
    assert error is not None and "(F67 rate-too-high)" in error.problem and "allow_faults: [F10, F67]" in str(error)
    assert certain_faults.refusal(both, {"F10", "F67"}) is None


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_example_configs_have_no_certain_fault(path):
    assert certain_faults.of_run(RunFacts(path.stem, solotune_run.settings_of(load_config(path)))) == []
