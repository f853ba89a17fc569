"""What signals make of one another: the five rules of `verdict`, each on its own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from solotune.diagnosis import catalogue, thresholds, verdict
from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.verdict import decide
from solotune.errors import InputError


def says(code, kind="measured", weight=0.8, **more):
    return Signal(code, kind, f"{code} by {kind}", weight, **more)


def named(diagnosis):
    return [culprit.fault for culprit in diagnosis.culprits]


def test_a_violated_equation_goes_before_a_surer_statistic():
    found = decide("run", [says("F64", weight=0.95), says("F22", "invariant", 0.6)])
    assert found.verdict == "fault" and named(found) == ["F22"]
    assert {"fault": "F64", "slug": "rate-too-low", "because": "follows from F22"} in found.ruled_out
    found = decide("run", [says("F38", weight=0.95), says("F57", "invariant", 0.6)])
    assert named(found) == ["F57", "F38"]


def test_a_curve_alone_names_nothing_and_chooses_the_probe():
    found = decide("run", [says("F64", "curve", 1.0)], skipped={"P7": "no model"})
    assert found.verdict == "undecided" and not found.is_fault
    assert "P7 was not run: no model" in str(found.next_experiment)
    assert found.culprits[0].confidence == thresholds.CURVE_ALONE
    assert decide("run", [says("F64", "curve", 0.4), says("F64", "measured", 0.4)]).verdict == "fault"


def test_kinds_add_up_and_numbers_of_one_kind_do_not():
    measured = decide("run", [says("F64", weight=0.45)] * 3)
    assert measured.verdict == "undecided" and measured.culprits[0].confidence == 0.45
    both = decide("run", [says("F64", weight=0.45), says("F64", "counterfactual", 0.5)])
    assert both.verdict == "fault" and both.culprits[0].confidence == pytest.approx(1 - 0.55 * 0.5)
    assert both.culprits[0].confirmed_by == "F64 by counterfactual"


def test_what_speaks_against_counts():
    found = decide("run", [says("F64", weight=0.8), says("F64", weight=0.9, against=True)])
    assert found.verdict == "healthy" and not found.culprits
    assert found.ruled_out == [{"fault": "F64", "slug": "rate-too-low", "because": "F64 by measured"}]


def test_consequences_do_not_hide_causes():
    found = decide("run", [says("F10", "invariant", 0.95), says("F07", "invariant", 0.8)])
    assert named(found) == ["F07"]
    weaker_cause = decide("run", [says("F10", "invariant", 0.95), says("F07", "measured", 0.8)])
    assert named(weaker_cause) == ["F10", "F07"]


def test_equivalents_are_named_together_with_what_separates_them():
    found = decide("run", [says("F64"), says("F61", weight=0.6)])
    assert found.culprits[0].same_evidence == ("F61",)
    assert "lora_alpha" in str(found.next_experiment)
    told_apart = decide("run", [says("F64"), says("F61", weight=0.9, against=True)])
    assert told_apart.culprits[0].same_evidence == () and told_apart.next_experiment is None
    exact = decide("run", [says("F57", "invariant")])
    assert exact.culprits[0].same_evidence == ()


def test_two_faults_are_two_culprits():
    assert set(named(decide("run", [says("F17", "invariant"), says("F64")]))) == {"F17", "F64"}


def test_healthy_needs_to_have_looked():
    assert decide("run", []).verdict == "healthy"
    damaged = decide("run", [], unreadable=["restore the adapter"])
    assert damaged.verdict == "undecided" and damaged.next_experiment == "restore the adapter"
    assert decide("run", [says("F17", "invariant")], unreadable=["the adapter"]).verdict == "fault"


def test_healthy_lists_what_was_not_given():
    alone = decide("run", [], not_checked=["rows and labels: give the training data with --dataset"])
    assert alone.verdict == "healthy" and alone.not_checked == [
        "rows and labels: give the training data with --dataset"
    ]


def test_a_small_fault_does_not_hide_a_large_one():
    small, large = (
        replace(says(code, "invariant", 0.9), affected=share) for code, share in (("F25", 0.01), ("F24", 0.44))
    )
    assert named(decide("run", [small, large])) == ["F24", "F25"]
    assert named(decide("run", [replace(small, affected=0.9), large])) == ["F25"]
    assert named(decide("run", [replace(small, affected=0.41), large])) == ["F25"]  # nearly the same, counted otherwise


def test_a_remark_is_listed_and_accuses_nobody():
    remark = replace(says("F24", "remark", 0.9), affected=0.1)
    alone = decide("run", [remark])
    assert (alone.verdict, alone.culprits, [r.fault for r in alone.remarks]) == ("healthy", [], ["F24"])
    assert alone.remarks[0].affected == 0.1
    beside = decide("run", [remark, says("F17", "invariant")])
    assert (beside.verdict, [r.fault for r in beside.remarks]) == ("fault", ["F24"])


def test_a_remark_on_a_named_fault_is_part_of_its_evidence():
    found = decide("run", [says("F24", "remark", 0.3), says("F24", "measured", 0.7)])
    assert (found.verdict, found.remarks, len(found.culprits[0].evidence)) == ("fault", [], 2)
    assert found.culprits[0].confidence == 0.7


def test_the_larger_of_two_certain_faults_is_named_first():
    small, large = (
        replace(says(code, "invariant", 0.9), affected=share) for code, share in (("F36", 0.02), ("F65", 0.44))
    )
    assert [c.fault for c in decide("run", [small, large]).culprits] == ["F65", "F36"]


def test_the_rule_knows_the_fix_better_than_the_catalogue():
    known = decide("run", [says("F64", fix="learning_rate: 1e-4", expect="loss 1.9 instead of 2.4")]).culprits[0]
    assert known.fix == "learning_rate: 1e-4" and known.expect == "loss 1.9 instead of 2.4"
    unknown = decide("run", [says("F64")]).culprits[0]
    assert unknown.fix == catalogue.FAULTS["F64"].fix and unknown.expect == catalogue.FAULTS["F64"].expect


def test_the_next_experiment_is_the_one_that_most_of_the_doubt_waits_for(monkeypatch):
    class Waiting:
        def __init__(self, *probes):
            self.probes = probes

    waiting = {"F38": (Waiting("P10"),), "F12": (Waiting("P1"),), "F04": (Waiting("P1"),)}
    monkeypatch.setattr(verdict, "rules", lambda: waiting)
    doubts = [says("F38", weight=0.4), says("F12", weight=0.3), says("F04", weight=0.3)]
    found = decide("run", doubts, skipped={"P1": "the model is too large", "P10": "the model is too large"})
    assert "P1 was not run: the model is too large" in str(found.next_experiment)
    found = decide("run", doubts, skipped={"P10": "the model is too large"})
    assert "P10 was not run" in str(found.next_experiment)
    assert str(decide("run", doubts).next_experiment).startswith("change only this")


# --- the catalogue


def test_the_catalogue_is_whole():
    assert list(catalogue.FAULTS) == [f"F{n:02}" for n in range(1, 82)]
    assert {fault.suspect for fault in catalogue.FAULTS.values()} == set(catalogue.SUSPECTS)
    slugs = [fault.slug for fault in catalogue.FAULTS.values()]
    assert len(set(slugs)) == len(slugs) and not set(slugs) & set(catalogue.ALIASES)
    for group in catalogue.EQUIVALENT:
        assert group <= set(catalogue.FAULTS)


def test_no_fault_follows_from_itself():
    def reached(code, seen=()):
        assert code not in seen, (code, seen)
        for effect in catalogue.EXPLAINS.get(code, ()):
            assert effect in catalogue.FAULTS
            reached(effect, (*seen, code))

    for code in catalogue.EXPLAINS:
        reached(code)


@pytest.mark.parametrize(
    ("word", "code"),
    [("F17", "F17"), ("f7", "F07"), ("pad-masks-terminator", "F17"), ("s4", "S4"), ("hidden_characters", "F37")],
)
def test_a_fault_is_found_by_code_and_name(word, code):
    assert catalogue.find(word) == code


@pytest.mark.parametrize(("word", "near"), [("rate-to-low", "rate-too-low"), ("F99", "F"), ("pad_terminator", "pad-")])
def test_an_unknown_fault_is_told_with_its_nearest(word, near):
    with pytest.raises(InputError) as refused:
        catalogue.find(word)
    assert near in str(refused.value.change)


def test_what_data_leaves_out_beside_its_cause_follows_from_it():
    for cause, effects in catalogue.UNLISTED.items():
        assert effects and effects <= catalogue.EXPLAINS[cause]
    assert catalogue.UNLISTED["F23"] == {"F10", "F15", "F17", "F19"}


def test_a_second_slug_of_a_finding_is_known_for_its_fault():
    import re
    from pathlib import Path

    from solotune.diagnosis import rules

    written = {}
    for path in Path(rules.__file__).parent.glob("*.py"):
        for call in path.read_text(encoding="utf-8").split("Finding.of(")[1:]:
            if slug := re.search(r'slug="([a-z-]+)"', call):
                written[slug[1]] = re.search(r'"(F\d\d)"', call)[1]
    assert written == catalogue.ALIASES
