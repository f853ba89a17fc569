"""bench.diagnose.peers: a program's files are what its owner has, and a warning counts for the fault that it means."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from bench.diagnose import peers, peers_codes, peers_run
from bench.diagnose.exhibits import Exhibit, left_by
from bench.diagnose.peers_process import Environment, Output
from bench.diagnose.peers_run import PEERS, warnings_of
from solotune.diagnosis.catalogue import FAULTS


class Handmade:
    """A program of another source, which fills its folder itself."""

    kind = "handmade"

    def __init__(self, name: str, *codes: str, **settings: Any) -> None:
        self.name, self.codes, self.settings = name, codes, settings

    def exhibit(self, run: Path) -> dict[str, Any]:
        (run / "train.jsonl").write_text('{"messages": []}\n')
        state = {"log_history": [{"step": 1, "loss": 2.0, "learning_rate": 1e-4}, {"step": 2, "loss": 1.0}]}
        (run / "output" / "trainer_state.json").write_text(json.dumps(state))
        return self.settings


def row(truth: list[str], **said: list[tuple[str, str]]) -> dict[str, Any]:
    return {"program": "p", "truth": truth, "said": {name.replace("_", "-"): one for name, one in said.items()}}


def test_every_code_that_a_warning_may_mean_is_a_fault() -> None:
    for table in peers_codes.TABLES.values():
        assert {code for codes in table.values() for code in codes} <= set(FAULTS)
    assert set(peers_codes.TABLES) == set(PEERS)


@pytest.mark.parametrize(
    ("peer", "kind", "codes"),
    [
        ("peft-doctor", "leakage.exact", ("F43", "F44")),
        ("peft-doctor", "checkpoint.weights_missing", ("F75",)),
        ("peft-doctor", "checkpoint.optimizer_state", ("F77",)),
        ("peft-doctor", "training.save_total_limit_missing", ()),
        ("finetune-doctor", "lr_schedule/Training at zero learning rate", ("F65", "F66")),
        ("finetune-doctor", "no_eval/No evaluation", ()),
    ],
)
def test_the_most_exact_entry_of_the_table_counts(peer: str, kind: str, codes: tuple[str, ...]) -> None:
    assert peers_codes.codes_of(peer, kind) == codes


def test_any_warning_names_a_fault_and_notes_and_advice_do_not() -> None:
    known = row(["F46"], runmedic=[("slowdown", "warning"), ("overfitting", "warning")])
    assert peers.is_named(known, "runmedic") and not peers.is_named(known, "runmedic", first=True)
    assert not peers.is_named(row(["F46"], runmedic=[("overfitting", "note")]), "runmedic")
    assert peers.is_named(row(["F46"], runmedic=[("overfitting", "note")]), "runmedic", notes=True)
    assert peers.is_named(row(["F67"], finetune_doctor=[("gradients/Gradient spikes", "error")]), "finetune-doctor")
    assert not peers.is_named(row(["F46"]), "soup")


def test_an_alarm_is_a_warning_on_a_healthy_program_that_means_a_fault() -> None:
    said = {"runmedic": [("overfitting", "warning")], "finetune_doctor": [("no_eval/No evaluation", "warning")]}
    found = peers.result([row([], **said), row(["F46"], **said)], {"runmedic": "0", "finetune-doctor": "0"}, {})
    scores = found["scores"]
    assert scores["runmedic"] | {"named": 1, "faults": 1, "alarms": 1, "healthy": 1} == scores["runmedic"]
    assert (scores["finetune-doctor"]["named"], scores["finetune-doctor"]["alarms"]) == (0, 0)
    assert scores["finetune-doctor"]["healthy with any warning"] == 1
    assert (scores["all peers"]["named"], scores["all peers"]["alarms"]) == (1, 1)
    assert "solotune" not in scores


def test_ours_is_scored_by_its_first_answer_on_the_same_programs() -> None:
    rows = [{**row(["F46"]), "program": "a"}, {**row([]), "program": "b"}, {**row(["F46"]), "program": "not ours"}]
    ours = {
        "a": {"truth": ["F46"], "verdict": "fault", "named": ["F44", "F46"]},
        "b": {"truth": [], "verdict": "fault", "named": ["F04"]},
    }
    assert peers.result(rows, {}, ours)["scores"]["solotune"] == {"named": 0, "faults": 1, "alarms": 1, "healthy": 1}
    ours["a"]["named"] = ["F46"]
    assert peers.result(rows, {}, ours)["scores"]["solotune"]["named"] == 1


def test_a_sample_has_each_code_once_before_one_twice() -> None:
    def made(name: str, *codes: str) -> Any:
        one = Handmade(name, *codes)
        one.kind = "fault" if codes else "healthy"
        return one

    every = [*(made(f"F10/{n}", "F10") for n in range(4)), made("F20/0", "F20"), *(made(f"h{n}") for n in range(4))]
    chosen = peers._chosen(every, [], 3, {"F10/2", "h3"})
    assert sorted(one.codes for one in chosen[:2]) == [("F10",), ("F20",)]
    assert [one.codes for one in chosen[2:4]] == [(), ("F10",)] and len(chosen) == 5
    assert {"F10/2", "h3"} <= {one.name for one in chosen}
    assert peers._chosen(every, ["F20"], 3, set())[0].name == "F20/0"


def test_a_program_is_trained_once_and_what_it_leaves_is_read_again(tmp_path: Path) -> None:
    program = Handmade("F46/x", "F46", learning_rate=1e-4, lora_r=8, lora_alpha=16, max_length=64)
    left = left_by(program, tmp_path / "a")
    assert left == Exhibit.read(tmp_path / "a") == Exhibit(tmp_path / "a", "F46/x", ("F46",), program.settings)
    script = (left.run / "train.py").read_text()
    compile(script, "train.py", "exec")
    assert "    r=8,\n" in script and "learning_rate=0.0001" in script and "lora_r" not in script
    assert "F46" not in script and left.file("eval.jsonl") is None and left.file("train.jsonl") is not None
    program.exhibit = lambda run: pytest.fail("trained again")  # type: ignore[method-assign]
    assert left_by(program, tmp_path / "a") == left


def test_programs_come_from_wherever_they_are_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    source = types.ModuleType("unheard_of")
    source.every = lambda: [Handmade("F46/x", "F46")]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "unheard_of", source)
    assert [one.name for one in peers._programs("unheard_of:every")] == ["F46/x"]


class Answering:
    """An environment that answers as the peer would."""

    def __init__(self, **texts: str) -> None:
        self.texts, self.asked = texts, []

    def run(self, words: list[str], cwd: Path, limit: float, environment: Any = None) -> Output:
        self.asked.append(words)
        return Output(0, next((text for name, text in self.texts.items() if name in "_".join(words)), ""))


def test_warnings_are_read_out_of_what_a_peer_prints(tmp_path: Path) -> None:
    exhibit = left_by(Handmade("F46/x", "F46", max_length=64, learning_rate=1e-4), tmp_path / "a")
    finding = '{"check": "overfitting", "severity": "%s", "title": "Overfitting", "summary": "up"}'
    told = Answering(diagnose=f'[{{"findings": [{finding % "warning"}]}}]')
    assert warnings_of(PEERS["runmedic"], told, exhibit)[0] == [("overfitting", "warning", "Overfitting")]  # type: ignore[arg-type]
    told = Answering(output=f'{{"findings": [{finding % "CRITICAL"}]}}')
    found, failed = warnings_of(PEERS["finetune-doctor"], told, exhibit)  # type: ignore[arg-type]
    assert ([(one.kind, one.level) for one in found], failed) == ([("overfitting/Overfitting", "error")], [])
    table = "│ critical │ nan_loss     │ Loss became NaN │\n│ info │ too_few_steps │ Only 2 │"
    told = Answering(validate="Issues found:\n  ! 3 duplicate rows found\n", why=table)
    found = warnings_of(PEERS["soup"], told, exhibit)[0]  # type: ignore[arg-type]
    assert [(one.kind, one.level) for one in found] == [
        ("nan_loss", "error"), ("validate/duplicate rows", "warning"), ("too_few_steps", "note"),
    ]  # fmt: skip
    issues = '{"issues": [{"code": "%s", "severity": "%s", "message": "m"}]}'
    told = Answering(check=issues % ("training.lr_high", "warning"), investigate="Traceback (most recent call last)")
    found, failed = warnings_of(PEERS["peft-doctor"], told, exhibit)  # type: ignore[arg-type]
    assert [(one.kind, one.level) for one in found] == [("training.lr_high", "warning")]
    assert len(failed) == 1 and "investigate" in failed[0]
    assert any("--learning-rate" in words and "0.0001" in words for words in told.asked)


def test_a_command_runs_in_a_fork_of_the_peers_environment(tmp_path: Path) -> None:
    environment = Environment(Path(sys.executable).parents[1], ("json", "no_such_module"))
    code = "import os, sys, json; print('json' in sys.modules, os.getcwd(), os.environ['X']); sys.exit(3)"
    answer = environment.run(["python", code], tmp_path, 20, {"X": "given"})
    assert answer == Output(3, f"True {tmp_path} given\n")
    assert environment.run(["python", "import time; time.sleep(60)"], tmp_path, 0.5).code is None
    failed = environment.run(["python", "1 / 0"], tmp_path, 20)
    assert failed.code == 1 and "ZeroDivisionError" in failed.text
    environment.close()


def test_json_is_found_among_other_lines() -> None:
    assert peers_run._json_in('Loading...\n{"issues": [1]}\nRisk: LOW') == {"issues": [1]}
    assert peers_run._json_in("[warn] nothing") is None
