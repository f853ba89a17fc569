"""The probes that run the model: each finds its fault on a plain PEFT model, confirms it, and leaves no trace."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from solotune.diagnosis import probes
from solotune.diagnosis.probes.adapter_gradients import gradients_and_steps, on_and_off
from solotune.diagnosis.probes.eval_determinism import evaluated_twice
from solotune.diagnosis.probes.generation import both_renderings
from solotune.diagnosis.probes.grad_accumulation import accumulated_against_whole
from solotune.diagnosis.probes.initial_loss import first_loss
from solotune.diagnosis.probes.lr_range_test import Tried, _judge, range_test
from solotune.diagnosis.probes.probed_model import adapters_of, training_loss
from solotune.diagnosis.probes.prompt_use import own_prompt_against_others
from solotune.diagnosis.probes.saved_adapter import reloaded
from solotune.diagnosis.run_facts import RunFacts, Saved, Settings
from tests.diagnosis.probed_models import Ward, chats, padded, render

END = 2


@pytest.fixture(scope="module")
def ward(tmp_path_factory):
    return Ward(tmp_path_factory.getbasetemp() / "ward")  # one for both files: it is pretrained for seconds


def run_facts_of(ward, live, **parts):
    return ward.run_facts(live.batches, **parts)


def spoken(signals) -> list[tuple[str, str]]:
    return [(s.code, s.kind) for s in signals if not s.against]


def cleared(signals) -> set[str]:
    return {s.code for s in signals if s.against}


def batches_of(rows):
    return [padded(rows[i : i + 4], pad=END) for i in range(0, len(rows), 4)]


def test_a_healthy_training_is_cleared_and_left_as_it_was(ward):
    model = ward.model()
    model.train()
    model.base_model.model.model.layers[0].eval()  # a mode of its own, which has to stay
    first = next(p for p in model.parameters() if p.requires_grad)
    first.grad = torch.full_like(first, 3.0)
    state = {name: (p, p.detach().clone(), p.requires_grad, p._version) for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    modes = [m.training for m in model.modules()]
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    live = ward.live(
        model,
        batches_of(ward.new_rows()),
        backward=lambda m, batches: _accumulate(m, batches, by_tokens=True),
        evaluate=lambda m: _evaluate(m.eval(), live),
    )
    found = probes.run_all(live, ward.run_facts(), 4.0)
    assert spoken(found.signals) == [], [s for s in found.signals if not s.against]
    assert {"F59", "F57", "F58", "F60", "F54", "F04", "F27", "F28", "F74", "F45"} <= cleared(found.signals)
    assert set(found.skipped) == {"P3", "P11", "P12", "P13", "P14"}
    for name, p in model.named_parameters():
        same, values, flag, _ = state[name]
        assert p is same and p.requires_grad == flag and torch.equal(p, values), name
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(first.grad, torch.full_like(first, 3.0))
    assert sum(p.grad is not None for p in model.parameters()) == 1
    assert torch.equal(torch.get_rng_state(), generators[0]) and random.getstate() == generators[1]
    assert (np.random.get_state()[1] == generators[2]).all()


def _evaluate(model, live):
    with torch.no_grad():
        return float(model(**live.batches[0]).loss)


def _accumulate(model, batches, by_tokens=False, divide=True):
    counts = [int((b["labels"][:, 1:] != -100).sum()) for b in batches]
    for batch, count in zip(batches, counts, strict=True):
        weight = count / sum(counts) if by_tokens else 1 / len(batches) if divide else 1.0
        (model(**batch).loss * weight).backward()


def test_probing_twice_measures_the_same(ward):
    live = ward.live()
    run_facts = run_facts_of(ward, live)
    for probe in (on_and_off, gradients_and_steps, first_loss):
        assert probe(live, run_facts, 5.0)[1] == probe(live, run_facts, 5.0)[1]


# --- P1


def test_labels_shifted_twice_are_put_right(ward):
    rows = [(ids, [*labels[1:], -100]) for ids, labels in ward.rows()]
    live = ward.live(batches=batches_of(rows))
    signals, found = first_loss(live, run_facts_of(ward, live), 5.0)
    assert ("F22", "counterfactual") in spoken(signals)
    assert found["as_trained"] > 3 * found["labels_right"]


def test_a_loss_that_does_not_shift_wants_shifted_labels(ward):
    rows = [(ids, [*labels[1:], -100]) for ids, labels in ward.rows()]

    def loss_of(model, batch):
        given = {k: v for k, v in batch.items() if k != "labels"}
        logits = model(**given, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)

    live = ward.live(batches=batches_of(rows), loss_of=loss_of)
    signals, _ = first_loss(live, run_facts_of(ward, live), 5.0)
    assert "F22" in cleared(signals)


def test_rows_outside_of_the_template(ward):
    rows = []
    for chat in chats(16, 100):
        text = f"# Human: {chat[0]['content']} # Bot: "
        prompt, whole = (ward.tokenizer.encode(t) for t in (text, text + chat[1]["content"] + "<|im_end|>"))
        rows.append((whole, [-100] * len(prompt) + whole[len(prompt) :]))
    live = ward.live(batches=batches_of(rows))
    signals, found = first_loss(live, run_facts_of(ward, live), 5.0)
    assert ("F12", "counterfactual") in spoken(signals) and "F04" in cleared(signals), found


def test_ids_of_another_tokenizer(ward):
    """The model's ids are permuted under the tokenizer's."""
    model = ward.model()
    order = torch.randperm(128, generator=torch.Generator().manual_seed(5))
    inner = model.base_model.model
    for weight in (inner.model.embed_tokens.weight, inner.lm_head.weight):
        weight.data = weight.data[order]
    live = ward.live(model)
    signals, found = first_loss(live, run_facts_of(ward, live), 5.0)
    assert ("F04", "measured") in spoken(signals), found


# --- P4, P5, P6


def test_an_adapter_that_changes_the_base_before_the_first_step(ward):
    live = ward.live(ward.model(init_lora_weights=False))
    assert spoken(on_and_off(live, run_facts_of(ward, live), 5.0)[0]) == [("F59", "invariant")]
    live = ward.live(ward.model(init_lora_weights="pissa"))
    settings = {"init_lora_weights": "pissa"}
    assert spoken(on_and_off(live, run_facts_of(ward, live, settings=settings), 5.0)[0]) == []


def test_frozen_adapters(ward):
    for part in ("lora_", "lora_B"):
        model = ward.model()
        for name, p in model.named_parameters():
            if part in name:
                p.requires_grad_(False)
        live = ward.live(model)
        signals, _ = gradients_and_steps(live, run_facts_of(ward, live), 5.0)
        assert spoken(signals) == [("F58", "invariant"), ("F58", "counterfactual")]
        assert not any(p.requires_grad for name, p in model.named_parameters() if part in name)


def test_some_adapters_frozen_before_they_learned(ward):
    """B of one layer is zero and frozen; a second adapter that is in use may be frozen."""
    for value, is_named in ((0.0, True), (0.1, False)):
        model = ward.model()
        for name, p in model.named_parameters():
            if "layers.0" in name and "lora_" in name:
                p.requires_grad_(False)
                p.data += value * ("lora_B" in name)
        live = ward.live(model)
        signals, found = gradients_and_steps(live, run_facts_of(ward, live), 5.0)
        assert (("F58", "invariant") in spoken(signals)) is is_named, found


def test_an_optimizer_that_lacks_the_adapters(ward):
    def blind(parameters):
        return torch.optim.AdamW([torch.nn.Parameter(p.detach().clone()) for p in parameters])

    live = ward.live(ward.model(), make_optimizer=blind)
    signals, found = gradients_and_steps(live, run_facts_of(ward, live), 5.0)
    assert spoken(signals) == [("F58", "invariant")] and found["never_changed"] == 1.0
    live = ward.live(ward.model(), make_optimizer=lambda parameters: torch.optim.SGD(parameters))
    assert spoken(gradients_and_steps(live, run_facts_of(ward, live), 5.0)[0]) == []


def test_a_loss_that_passes_the_adapter_of_the_head_by(ward):
    def fused(model, batch):
        inner = model.get_base_model()
        given = {key: value for key, value in batch.items() if key != "labels"}
        hidden = inner.model(**given, use_cache=False).last_hidden_state[:, :-1]
        logits = hidden @ inner.lm_head.base_layer.weight.T
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    model = ward.model(target_modules=["q_proj", "lm_head"])
    live = ward.live(model, loss_of=fused)
    assert spoken(gradients_and_steps(live, run_facts_of(ward, live), 5.0)[0]) == [("F63", "invariant")]
    assert spoken(gradients_and_steps(ward.live(model), run_facts_of(ward, live), 5.0)[0]) == []


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_the_scale_that_modules_apply(ward, options):
    model, told = ward.model(r=8, lora_alpha=16, **options), {"lora_r": 8, "lora_alpha": 16, **options}
    live = ward.live(model)
    assert spoken(on_and_off(live, run_facts_of(ward, live, settings=told), 5.0)[0]) == []
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 50
    expected = [] if "use_dora" in options else [("F61", "invariant")]
    assert spoken(on_and_off(live, run_facts_of(ward, live, settings=told), 5.0)[0]) == expected


def test_half_frozen_by_design_is_healthy(ward):
    model = ward.model()  # LoRA-FA: A stays as it was drawn
    for name, p in model.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)
    live = ward.live(model)
    assert spoken(gradients_and_steps(live, run_facts_of(ward, live), 5.0)[0]) == []


def test_adapters_that_are_zero_on_both_sides(ward):
    model = ward.model()
    for adapter in adapters_of(model):
        adapter.A.data.zero_()
    live = ward.live(model)
    assert spoken(gradients_and_steps(live, run_facts_of(ward, live), 5.0)[0]) == [
        ("F60", "invariant"),
        ("F60", "counterfactual"),
    ]


def test_reentrant_checkpointing_without_gradients_at_the_inputs(ward):
    model = ward.model()
    model.base_model.model.lm_head.requires_grad_(True)  # else nothing would be trained, and torch would say so
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.get_input_embeddings()._forward_hooks.clear()
    live = ward.live(model)
    signals, found = gradients_and_steps(live, run_facts_of(ward, live), 5.0)
    assert spoken(signals) == [("F57", "invariant"), ("F57", "counterfactual")], found
    assert found["other_gradients"]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert spoken(gradients_and_steps(live, run_facts_of(ward, live), 5.0)[0]) == []


def test_steps_that_bfloat16_swallows(ward):
    model = ward.model()
    for adapter in adapters_of(model):
        adapter.A.data, adapter.B.data = adapter.A.data.bfloat16(), adapter.B.data.bfloat16()
    live = ward.live(model)
    low, high = ({"learning_rate": rate} for rate in (1e-5, 5e-3))
    signals, found = gradients_and_steps(live, run_facts_of(ward, live, settings=low), 5.0)
    assert spoken(signals) == [("F54", "measured"), ("F54", "counterfactual")], found
    assert all(a.A.dtype == torch.bfloat16 for a in adapters_of(model))
    assert spoken(gradients_and_steps(live, run_facts_of(ward, live, settings=high), 5.0)[0]) == []


# --- P7


def test_rates_too_low_and_too_high(ward):
    live = ward.live(batches=batches_of(ward.new_rows()))
    for rate, code in ((1e-5, "F64"), (3.0, "F67")):
        signals, found = range_test(live, run_facts_of(ward, live, settings={"learning_rate": rate}), 8.0)
        assert (code, "counterfactual") in spoken(signals), found
        (first, *_) = signals
        assert first.code == code and first.fix.startswith("learning_rate") and first.expect


def test_a_step_that_is_clipped_away(ward):
    live = ward.live(ward.model(), batches_of(ward.new_rows()),
                     make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5))  # fmt: skip
    run_facts = run_facts_of(ward, live, settings={"learning_rate": 0.5, "max_grad_norm": 1e-4, "optim": "sgd"})
    assert spoken(range_test(live, run_facts, 10.0)[0]) == [("F68", "counterfactual")]
    run_facts = run_facts_of(ward, live, settings={"learning_rate": 0.5, "max_grad_norm": 1.0, "optim": "sgd"})
    assert ("F68", "counterfactual") not in spoken(range_test(live, run_facts, 10.0)[0])


def test_a_scale_with_which_a_short_run_learns_too_late(ward):
    """alpha 1 with rank 64 is named for 100 steps; for 10,000 it is no harm, and neither is 1/8."""
    for alpha, steps, is_named in ((0.25, 100, True), (0.25, 10_000, False), (8, 100, False)):
        live = ward.live(ward.model(r=64, lora_alpha=alpha), batches_of(ward.new_rows()))
        settings = {"learning_rate": 5e-3, "lora_r": 64, "lora_alpha": alpha, "max_steps": steps}
        signals, found = range_test(live, run_facts_of(ward, live, settings=settings), 8.0)
        assert (("F61", "counterfactual") in spoken(signals)) is is_named, (alpha, steps, found["gain"], signals)


def test_a_model_rebuilt_from_files_says_nothing_of_what_was_frozen(ward):
    live = replace(ward.live(), is_rebuilt=True)
    signals, _ = gradients_and_steps(live, run_facts_of(ward, live), 5.0)
    assert not {"F57", "F58", "F60"} & cleared(signals)


def test_too_little_capacity(ward):
    live = ward.live(ward.model(r=1, target_modules=r".*layers\.0.*k_proj"), batches_of(ward.new_rows()))
    signals, found = range_test(live, run_facts_of(ward, live, settings={"learning_rate": 2e-3}), 8.0)
    assert ("F62", "counterfactual") in spoken(signals), found


def test_a_capacity_for_two_rows_and_not_for_eight():
    known = Tried(2e-3, 40, 4.0, {0.1: 0.4, 1.0: 2.8, 10.0: 3.4}, 4.0, None, None, 0.25, (2.2, 5.1))
    assert spoken(_judge(RunFacts("test", Settings({})), known))[0] == ("F62", "counterfactual")
    for other in (replace(known, many=(3.9, 5.1)), replace(known, many=None)):
        assert "F62" in cleared(_judge(RunFacts("test", Settings({})), other))


# --- P8, P9


def test_an_evaluation_in_training_mode(ward):
    model = ward.model(lora_dropout=0.3)
    for adapter in adapters_of(model):
        torch.nn.init.normal_(adapter.B, std=0.3)
    live = replace(ward.live(model), evaluate=lambda m: _evaluate(m.train(), live))
    assert spoken(evaluated_twice(live, run_facts_of(ward, live), 5.0)[0]) == [
        ("F45", "measured"),
        ("F45", "counterfactual"),
    ]


def test_ways_to_accumulate(ward):
    rows = ward.rows()
    long = [render(ward.tokenizer, [*chat[:-1], {"role": "assistant", "content": "cat " * 8}]) for chat in chats(2)]
    batches = [padded(rows[:1], pad=END), padded(long[:1], pad=END)]
    for how, expected in (
        ({"by_tokens": True}, []),
        ({}, [("F74", "measured")]),
        ({"divide": False}, [("F74", "invariant")]),
    ):
        live = ward.live(batches=batches, backward=lambda m, b, how=how: _accumulate(m, b, **how))
        signals, found = accumulated_against_whole(live, run_facts_of(ward, live), 5.0)
        assert spoken(signals) == expected, found


# --- P10, P12, P13


def test_prompts_and_answers_that_slipped(ward):
    known = chats(60)
    slipped = [[one[0], other[1]] for one, other in zip(known, [*known[1:], known[0]], strict=True)]
    rows = [render(ward.tokenizer, chat) for chat in slipped]
    live = ward.live(batches=batches_of(rows[:16]))
    signals, found = own_prompt_against_others(live, run_facts_of(ward, live, conversations=slipped), 10.0)
    assert spoken(signals) == [("F38", "counterfactual")], found
    assert max(found["slipped"], key=lambda s: found["slipped"][s]["gain"]) == "+1"


def _with_answers_of(known, order):
    return [[one[0], known[other][1]] for one, other in zip(known, order, strict=True)]


def test_prompts_that_slipped_by_any_number_of_rows(ward):
    known = chats(60)
    slipped = _with_answers_of(known, [(i + 7) % 60 for i in range(60)])
    live = ward.live(batches=batches_of([render(ward.tokenizer, chat) for chat in slipped[:16]]))
    signals, found = own_prompt_against_others(live, run_facts_of(ward, live, conversations=slipped), 10.0)
    assert spoken(signals) == [("F38", "counterfactual")], found
    assert max(found["slipped"], key=lambda s: found["slipped"][s]["gain"]) in ("+7", "same words")


def test_whole_rows_speak_against_and_a_part_of_them_does_not(ward):
    known = chats(60)
    partly = _with_answers_of(known, [(i + 2) % 6 if i < 6 else i for i in range(60)])
    for rows, codes in ((known, {"F38"}), (partly, set())):
        live = ward.live(batches=batches_of([render(ward.tokenizer, chat) for chat in rows[:16]]))
        signals, found = own_prompt_against_others(live, run_facts_of(ward, live, conversations=rows), 10.0)
        assert not spoken(signals) and cleared(signals) == codes, found


def test_answers_that_no_prompt_decides_are_no_fault(ward):
    known = chats(60)
    free = [
        [one[0], {**one[1], "content": f"no {'abcdefghij'[i % 10]} {'klmnopqrst'[i * 7 % 10]} {i}"}]
        for i, one in enumerate(known)
    ]
    live = ward.live(batches=batches_of([render(ward.tokenizer, chat) for chat in free[:16]]))
    signals, found = own_prompt_against_others(live, run_facts_of(ward, live, conversations=free), 10.0)
    assert not [one for one in signals if one.weight >= 0.5 and not one.against], found


def _trained(ward, rows, steps=40):
    model = ward.model()
    live = ward.live(model, batches_of(rows))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for step in range(steps):
        training_loss(live, live.batches[step % 4]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_what_was_saved(ward):
    model = _trained(ward, ward.new_rows())
    saved = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    merged = copy.deepcopy(model).merge_and_unload()
    base = ward.model().unload()
    live = ward.live()
    good = Saved(saved, {}, merged=lambda: merged)
    cases = {
        (): good,
        ("F76",): Saved(saved, {}, merged=lambda: base),
        ("F75",): Saved({k: torch.zeros_like(v) if "lora_B" in k else v for k, v in saved.items()}, {}),
        ("F78",): Saved({k.replace("layers", "blocks"): v for k, v in saved.items()}, {}),
    }
    for codes, files in cases.items():
        signals, found = reloaded(live, run_facts_of(ward, live, saved=files), 5.0)
        assert tuple(code for code, _ in spoken(signals)) == codes, found
    assert cleared(reloaded(live, run_facts_of(ward, live, saved=good), 5.0)[0]) == {"F75", "F76", "F78"}


def test_the_deployment_asks_in_another_format(ward):
    model = _trained(ward, ward.rows())

    def answer(text: str, render) -> str:
        ids = list(render(text))
        begin = len(ids)
        while len(ids) < begin + 40 and ids[-1] != END:
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        return ward.tokenizer.decode(ids[begin:], skip_special_tokens=False)

    def as_trained(text):
        turns = [{"role": "user", "content": text}]
        return ward.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)

    def bare(text):
        return ward.tokenizer.encode(f"Q: {text}!! A= ")

    live = ward.live(model, generate=lambda text: answer(text, as_trained))
    assert "F11" in cleared(both_renderings(live, run_facts_of(ward, live), 10.0)[0])
    live = ward.live(model, generate=lambda text: answer(text, bare))
    signals, found = both_renderings(live, run_facts_of(ward, live), 10.0)
    assert spoken(signals) == [("F11", "counterfactual")], found

    def without_header(text):
        ids = as_trained(text)
        return ids[: len(ids) - 1 - ids[::-1].index(ward.tokenizer.convert_tokens_to_ids("<|im_start|>"))]

    live = ward.live(model, generate=lambda text: answer(text, without_header))
    signals, found = both_renderings(live, run_facts_of(ward, live), 10.0)
    assert spoken(signals) == [("F15", "counterfactual")], found


def test_the_range_test_of_a_run_that_has_trained_begins_where_the_run_began(ward):
    live = ward.live(batches=batches_of(ward.new_rows()))
    run_facts = run_facts_of(ward, live, settings={"learning_rate": 1e-2})
    fresh = range_test(live, run_facts, 20)[1]
    optimizer = torch.optim.AdamW([p for p in live.model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(40):
        training_loss(live, live.batches[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = {name: p.detach().clone() for name, p in live.model.named_parameters()}
    assert float(training_loss(live, live.batches[0]).detach()) < 0.8 * fresh["curves"]["1"][0]
    signals, again = range_test(live, run_facts, 20)
    assert again["curves"]["1"][0] == pytest.approx(fresh["curves"]["1"][0], abs=1e-3)
    assert not spoken(signals)
    assert all(torch.equal(p, trained[name]) for name, p in live.model.named_parameters())
