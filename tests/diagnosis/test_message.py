"""What a person and a machine read of a diagnosis."""

from __future__ import annotations

import importlib
import io
import json
import sys
from types import SimpleNamespace

import pytest
from inline_snapshot import snapshot

from solotune import cli
from solotune.cli.results import print_diagnosis
from solotune.diagnosis import catalogue, message
from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.explanation import explained, paragraphs
from solotune.diagnosis.verdict import decide
from solotune.display.progress import make_console
from tests.messages import error_in

RATE = [
    Signal("F64", "measured", "at 10 times the rate one batch falls to 1.21 in 30 steps, at yours to 4.93", 0.8,
           fix="learning_rate: 2e-4", expect="about 3.1 instead of 4.9 after 50 steps"),
    Signal("F64", "counterfactual", "with learning_rate: 2e-4 the same 30 steps end at 1.21", 0.9),
    Signal("F54", "measured", "every element moves", 0.9, against=True),
    Signal("F17", "invariant", "the end of turn is in 0 of 40 answers' labels", 0.95, fix="pad_token: <|pad|>"),
]  # fmt: skip


def printed(diagnosis) -> str:
    stream = io.StringIO()
    print_diagnosis(diagnosis, make_console(stream))
    return stream.getvalue()


def test_the_culprit_is_a_sentence_with_its_numbers_the_line_to_change_and_what_to_expect():
    text = printed(decide("run", RATE))
    assert text == snapshot("""\
✗ Masking the padding also masks the end of the answers: both are the same token.
  F17 pad-masks-terminator, loss mask (S4); 95% sure
  ·  the end of turn is in 0 of 40 answers' labels
  →  pad_token: <|pad|>
     then answers end where they should

✗ The learning rate is too low.
  F64 rate-too-low, optimizer and learning rate (S13); 98% sure
  ·  at 10 times the rate one batch falls to 1.21 in 30 steps, at yours to 4.93
  →  learning_rate: 2e-4
  the same evidence fits F61 scale-wrong

ruled out  1 fault (reasons: --json)
fault: F17 pad-masks-terminator, and F64 rate-too-low
""")
    assert printed(decide("run", RATE[:1])) == snapshot("""\
✗ The learning rate is too low.
  F64 rate-too-low, optimizer and learning rate (S13); 80% sure
  ·  at 10 times the rate one batch falls to 1.21 in 30 steps, at yours to 4.93
  →  learning_rate: 2e-4
     then about 3.1 instead of 4.9 after 50 steps
  the same evidence fits F61 scale-wrong

next  train 50 steps with lora_alpha equal to lora_r and the same learning rate: if it helps, the scale was too small, otherwise the learning rate
fault: F64 rate-too-low
""")
    rate = printed(decide("run", [RATE[0], Signal("F67", "measured", "a tenth of it is worse", 0.9, against=True)]))
    assert rate == snapshot("""\
✗ The learning rate is too low.
  F64 rate-too-low, optimizer and learning rate (S13); 80% sure
  ·  at 10 times the rate one batch falls to 1.21 in 30 steps, at yours to 4.93
  →  learning_rate: 2e-4
     then about 3.1 instead of 4.9 after 50 steps
  the same evidence fits F61 scale-wrong

ruled out  F67 rate-too-high (a tenth of it is worse)
next  train 50 steps with lora_alpha equal to lora_r and the same learning rate: if it helps, the scale was too small, otherwise the learning rate
fault: F64 rate-too-low
""")


def test_what_confirmed_it_is_said():
    assert printed(decide("run", RATE[:3])) == snapshot("""\
✗ The learning rate is too low.
  F64 rate-too-low, optimizer and learning rate (S13); 98% sure
  ·  at 10 times the rate one batch falls to 1.21 in 30 steps, at yours to 4.93
  ·  confirmed by experiment: with learning_rate: 2e-4 the same 30 steps end at 1.21
  →  learning_rate: 2e-4
     then about 3.1 instead of 4.9 after 50 steps
  the same evidence fits F61 scale-wrong

ruled out  1 fault (reasons: --json)
next  train 50 steps with lora_alpha equal to lora_r and the same learning rate: if it helps, the scale was too small, otherwise the learning rate
fault: F64 rate-too-low
""")


def test_healthy_and_undecided_are_said_with_what_was_not_looked_at():
    skipped = {"P1": "the base is not on this machine", "P7": "the base is not on this machine"}
    unasked = {"F57": "no live", "F58": "no live", "F75": "no saved"}
    assert printed(decide("run", [], unasked, skipped)) == snapshot("""\
not checked  probes P1, P7: the base is not on this machine
             2 faults in LoRA adapter (2): no live
             1 fault in save, resume, merge, serve (1): no saved
healthy: no fault found
""")
    doubt = printed(decide("run", [Signal("F64", "curve", "the loss is flat from step 40 on", 0.9)], {}, skipped))
    assert doubt == snapshot("""\
! perhaps: The learning rate is too low.
  F64 rate-too-low, optimizer and learning rate (S13); 40% sure
  ·  the loss is flat from step 40 on
  →  learning_rate: 2e-4
     then the loss leaves its plateau within the first tens of steps
  the same evidence fits F61 scale-wrong

not checked  probes P1, P7: the base is not on this machine
next  overfit one batch at 0.1, 1 and 10 times the learning rate (P7 was not run: the base is not on this machine)
undecided: possibly F64 rate-too-low
""")
    unseen = printed(decide("run", [], not_checked=["give the data (--dataset)"]))
    assert unseen == snapshot("""\
not checked  give the data (--dataset)
healthy as far as checked: no fault found
""")


def test_text_out_of_foreign_files_cannot_steer_the_terminal():
    assert "\x1b" not in printed(decide("run", [Signal("F17", "invariant", "ends with \x1b[2J", 0.9, fix="\x1b]0;x")]))


def test_every_fault_has_a_sentence_a_fix_and_an_expectation():
    for code, fault in catalogue.FAULTS.items():
        assert fault.title.endswith(".") and not fault.fix.endswith(".") and not fault.expect.endswith(".")
        told = message.told(decide("run", [Signal(code, "invariant", "seen", 0.9)]).culprits[0])
        assert all([told.headline, told.where, told.evidence, told.change, told.expect])


def test_explain_reads_on_a_narrow_terminal():
    for word in (*catalogue.FAULTS, *catalogue.SUSPECTS):
        text = explained(word).text
        assert max(map(len, text.splitlines())) <= 80, text


def test_every_fault_is_explained():
    for code in catalogue.FAULTS:
        headings = {paragraph.split(":")[0] for paragraph in paragraphs(explained(code).doc)}
        assert {"Sees", "Why", "Not", "Fix", "Wrong when", "Source"} <= headings, (code, headings)


def test_explain_reads_in_order():
    assert explained("F65").text.split("\n")[0] == snapshot("F65 warmup-too-long (S13, optimizer and learning rate)")
    assert "F17  pad-masks-terminator" in explained("S4").text and "F24" not in explained("S4").text


# --- the command line


@pytest.fixture
def stub(monkeypatch) -> SimpleNamespace:
    module = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "solotune.api.diagnose", module)
    monkeypatch.setattr(importlib.import_module("solotune.cli.main"), "quieten", lambda: None)
    return module


def test_a_fault_is_exit_3_and_json_has_the_designs_shape(stub, capsys):
    stub.diagnose = lambda *_, **__: decide("run", RATE, {"F57": "no live"}, {"P1": "no model"})
    assert cli.main(["diagnose", "runs/a", "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert {"verdict", "culprits", "ruled_out", "next_experiment"} <= set(found)
    keys = {"suspect", "fault", "slug", "confidence", "evidence", "confirmed_by", "fix"}
    assert keys <= set(found["culprits"][0])
    assert found["verdict"] == "fault" and found["culprits"][1]["confirmed_by"]
    assert found["ruled_out"] == [{"fault": "F54", "slug": "updates-lost", "because": "every element moves"}]
    for signals, verdict in (([], "healthy"), ([Signal("F64", "curve", "flat", 0.9)], "undecided")):
        stub.diagnose = lambda *_, signals=signals, **__: decide("run", signals)
        assert cli.main(["diagnose", "runs/a", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["verdict"] == verdict


def test_options_reach_the_verb(stub):
    seen = {}

    def diagnose(target, deep, budget, dataset, config, overrides, display, base):
        seen.update(target=target, deep=deep, budget=budget, dataset=dataset, config=config, overrides=overrides)
        return SimpleNamespace(to_json=dict, is_fault=False)

    stub.diagnose = diagnose
    options = ["--deep", "--budget", "9", "--dataset", "d.jsonl", "--config", "sft.yaml", "--json"]
    assert cli.main(["diagnose", "out", "learning_rate=1", *options]) == 0
    assert seen == {
        "target": "out",
        "deep": True,
        "budget": 9.0,
        "dataset": "d.jsonl",
        "config": "sft.yaml",
        "overrides": ("learning_rate=1",),
    }
    assert cli.main(["diagnose", "out", "--budget", "-1"]) == 2


def test_explain_on_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(importlib.import_module("solotune.cli.main"), "quieten", lambda: None)
    assert cli.main(["explain", "pad-masks-terminator"]) == 0
    assert capsys.readouterr().out.split("\n")[0] == snapshot("F17 pad-masks-terminator (S4, loss mask)")
    assert cli.main(["explain", "f17", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["slug"] == "pad-masks-terminator"
    assert cli.main(["explain", "S4", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["faults"]) == 7
    assert cli.main(["explain", "pad-masks-terminatr"]) == 2
    assert error_in(capsys.readouterr().err) == snapshot("""\
there is no such fault
  seen:    pad-masks-terminatr
  allowed: F01 to F81, S1 to S15, or a fault's name
  change:  did you mean pad-masks-terminator, head-adapter-ignored, terminator-masked?\
""")
