"""bench.diagnose: its programs really are what they are called, and its scores count what they say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bench.diagnose import bases, programs, run, score
from bench.diagnose.loop import build, train
from bench.diagnose.registry import FAULTS, HEALTHY
from bench.diagnose.run_facts import run_facts_of
from solotune.diagnosis.catalogue import FAULTS as CATALOGUE

BASE = "llama-chatml"


@pytest.fixture(scope="module", autouse=True)
def quick_bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Bases that are pretrained for a few steps, in a cache of this module's own."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    patch.setattr(bases, "STEPS", 12)
    patch.setattr(bases, "TEXTS", 300)
    bases.load.cache_clear()
    yield
    patch.undo()
    bases.load.cache_clear()


def program(name: str, base: str = BASE) -> programs.Program:
    change = next(change for change in [*FAULTS, *HEALTHY] if change.name == name)
    return programs.Program(base, (change,), "fault" if change.code else "healthy")


def run_facts(name: str, steps: int = 3) -> Any:
    recipe = program(name).recipe()
    recipe.steps = steps
    return run_facts_of(recipe, train(recipe))


def test_faults_are_those_of_the_catalogue_and_70_of_81_are_injected() -> None:
    injected = {change.code for change in FAULTS}
    assert injected | set(programs.NOT_INJECTED) == set(CATALOGUE)
    assert len(injected) >= 70


def test_the_benchmark_is_as_large_as_it_says() -> None:
    every = programs.programs()
    assert len({one.name for one in every}) == len(every)
    kinds = [one.kind for one in every]
    assert len(HEALTHY) >= 20
    assert kinds.count("healthy") >= 60
    assert kinds.count("pair") >= 20
    assert kinds.count("foreign") >= 20
    own = [one for one in every if one.kind == "own"]
    assert len([one for one in own if one.codes]) >= 60 and len([one for one in own if not one.codes]) >= 30
    assert {one.base for one in every} == set(bases.KINDS)
    injected = {split: {code for one in every if one.split == split for code in one.codes} for split in
                ("fitted", "held-out")}  # fmt: skip
    assert len(injected["held-out"]) >= 70


def test_no_base_of_one_split_shares_world_template_or_architecture_with_the_other() -> None:
    fitted = [kind for kind in bases.KINDS.values() if not kind.held_out]
    held_out = [kind for kind in bases.KINDS.values() if kind.held_out]
    for part in ("world", "family", "format"):
        assert not {repr(getattr(kind, part)) for kind in fitted} & {repr(getattr(kind, part)) for kind in held_out}


def test_a_subject_says_nothing_of_its_fault() -> None:
    shown = run_facts("pads_learned")
    told = f"{shown.name} {shown.settings} {shown.missing} {shown.environment}"
    assert not any(word in told for word in ("F29", "pads_learned", "fault"))


def test_a_clean_run_learns_and_its_live_model_is_at_step_0() -> None:
    recipe = program("clean").recipe()
    recipe.steps = 12
    outcome = train(recipe)
    shown = run_facts_of(recipe, outcome)
    assert shown.trace is not None and shown.saved is not None and shown.live is not None
    assert shown.trace.loss_S[-1] < shown.trace.loss_S[0]
    assert any(float(t.abs().max()) > 0 for name, t in shown.saved.adapter.items() if "lora_B" in name)
    live = shown.live()
    parts = dict(live.model.named_parameters())
    assert all(float(t.abs().max()) == 0 for name, t in parts.items() if "lora_B" in name)
    assert np.isclose(float(live.loss_of(live.model, live.batches[0])), shown.trace.loss_S[0], rtol=1e-4)


def test_programs_are_deterministic() -> None:
    first, second = run_facts("clean"), run_facts("clean")
    assert np.array_equal(first.trace.loss_S, second.trace.loss_S)


def test_faulty_batches_are_faulty() -> None:
    rows = {}
    for name in ("clean", "pads_learned", "mask_inverted", "shifted_twice", "pad_masks_terminator", "pads_attended"):
        recipe = program(name).recipe()
        recipe.is_static = True
        rows[name] = train(recipe).batches[0]
    clean = rows["clean"]
    real = clean["attention_mask"].bool()
    learned = clean["labels"] != -100
    assert torch.equal(clean["labels"][learned], clean["input_ids"][learned])
    assert not (learned & ~real).any()
    pads = rows["pads_learned"]
    assert ((pads["labels"] != -100) & ~pads["attention_mask"].bool()).any()
    inverted = rows["mask_inverted"]
    assert (inverted["labels"] == -100)[inverted["attention_mask"].bool()].any()
    assert inverted["labels"][0, 0] != -100
    shifted = rows["shifted_twice"]
    wanted = shifted["labels"] != -100
    assert (shifted["labels"][wanted] != shifted["input_ids"][wanted]).any()
    terminator = program("pad_masks_terminator").recipe().tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert not (rows["pad_masks_terminator"]["labels"] == terminator).any()
    assert (clean["labels"] == terminator).any()
    assert "attention_mask" not in rows["pads_attended"]


def test_packs_that_are_apart_give_each_row_its_own_logits_and_plain_ones_do_not() -> None:
    gaps = {}
    for packing in ("apart", "blocks", "plain"):
        recipe = program("clean").recipe()
        recipe.packing, recipe.is_static, recipe.shuffles = packing, True, False
        outcome = train(recipe)
        model = build(recipe).eval()
        batch = outcome.batches[0]
        first, second = outcome.rows[:2]
        alone = model(input_ids=torch.tensor([second.ids]), use_cache=False).logits[0]
        together = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits[0]
        gaps[packing] = float((together[len(first.ids) :][: len(second.ids)] - alone).abs().max())
    assert gaps["apart"] < 1e-3
    assert gaps["blocks"] < 1e-3  # rotary positions are relative
    assert gaps["plain"] > 1e-2


def test_crashes_are_real_and_say_where() -> None:
    recipe = program("no_checkpointing").recipe()
    recipe.steps = 3
    shown = run_facts_of(recipe, train(recipe))
    assert "out of memory" in shown.trace.errors[-1] and "forward" in shown.trace.errors[-1]
    assert len(shown.trace.step_S) == 1 and not shown.trace.is_finished
    late = program("optimizer_fills_the_card").recipe()
    assert "step" in run_facts_of(late, train(late)).trace.errors[-1]


def test_two_changes_make_one_run() -> None:
    pair = next(one for one in programs.programs() if one.kind == "pair")
    recipe = pair.recipe()
    assert len(pair.codes) == 2 and recipe.chats


def test_scores_count_strictly_and_by_equivalence() -> None:
    def result(truth: list[str], named: list[str], verdict: str = "fault", kind: str = "fault") -> dict[str, Any]:
        return {"program": "x", "truth": truth, "named": named, "verdict": verdict, "kind": kind, "split": "fitted"}

    results = [
        result(["F64"], ["F64"]),
        result(["F64"], ["F61"]),  # equivalent, of another suspect
        result(["F17"], ["F19", "F17"]),  # same suspect
        result(["F22"], ["F22"], verdict="undecided"),  # no hit
        result([], ["F12"], kind="healthy"),
        result([], [], verdict="healthy", kind="healthy"),
        result(["F10", "F65"], ["F65"], kind="pair"),
    ]
    found = score.scores(results)
    assert found["fault top-1, strict"] == 0.25
    assert found["fault top-1, set-aware"] == 0.5
    assert found["fault top-3, set-aware"] == 0.75
    assert found["suspect top-1"] == 0.5
    assert found["faults undecided"] == 0.25
    assert found["false alarms"] == 0.5
    assert found["two faults: a true one first"] == 1.0
    assert found["two faults: both in the first three"] == 0.0
    assert [one["truth"] for one in score.mistakes(results)] == [[], ["F17"], ["F22"]]


def test_a_program_is_diagnosed_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "BUDGET", 0.0)  # the rules alone, which see these two
    chosen = [program("no_library_for_this_cuda"), program("quantised_twice")]
    results = run.run_all(chosen, jobs=1)
    assert [one["program"] for one in results] == [one.name for one in chosen]
    assert all("error" not in one for one in results), results
    assert [one["named"][:1] for one in results] == [["F01"], ["F49"]]
