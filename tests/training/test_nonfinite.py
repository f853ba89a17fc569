"""NaN, infinity and overflow at every place of a step: found before the update, named, and never written to a file."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import metrics_of, random_rows

from solotune.dataset.collate import collate_packs
from solotune.display.progress import SilentDisplay
from solotune.errors import NonFiniteError
from solotune.model import lora
from solotune.model.loading import load_model
from solotune.run.run_dir import RunDirectory
from solotune.training import checkpoint, loop, nonfinite

CPU = torch.device("cpu")
NAN = float("nan")
STEPS = 6


class At(SilentDisplay):
    """Does something once step `step - 1` is saved, so that step `step` meets it; before the run for step 1."""

    def __init__(self, step, do):
        self.when, self.do = step - 1, do
        if self.when == 0:
            do()

    def saved(self, event, path):
        if event.step == self.when:
            self.do()


def break_gradient(model, rows, config, monkeypatch):
    model.trainable[3].register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), NAN))


def break_adapter(model, rows, config, monkeypatch):
    with torch.no_grad():
        model.trainable[2][1, 1] = NAN


def break_frozen(model, rows, config, monkeypatch):
    frozen = next(iter(model.lora_layers.values())).base.storage.weight_OI  # q_proj's: attention on a CPU hides it
    frozen[0, 0] = NAN


def break_logits(model, rows, config, monkeypatch):
    head, model.head = model.head, lambda h_ND: head(h_ND).index_fill(1, torch.tensor([5]), float("inf"))


def break_moment(model, rows, config, monkeypatch):
    (optimizer,) = made
    optimizer.state[model.flat_params]["exp_avg_sq"][7] = NAN


def break_activation(model, rows, config, monkeypatch):
    layer = model.layers[1].mlp
    plain = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x: plain(x) * torch.where(x.new_ones(()) > 0, NAN, 1.0))


def break_labels(model, rows, config, monkeypatch):
    for row in rows:
        row.loss_mask[:] = False


def break_loss(model, rows, config, monkeypatch):
    plain = type(model).token_losses

    def huge(self, batch):
        losses_N, correct_N = plain(self, batch)
        return losses_N + 1e37, correct_N  # a finite number with a sound gradient, and an overflow on its way

    monkeypatch.setattr(type(model), "token_losses", huge)


SITES = {
    "gradient": (break_gradient, "gradient of model.layers.0.self_attn.k_proj.lora_B"),
    "adapter": (break_adapter, "adapter model.layers.0.self_attn.k_proj.lora_A"),
    "frozen": (break_frozen, "frozen model.layers.0.self_attn.q_proj.base.storage.weight_OI"),
    "logits": (break_logits, "the losses, although the hidden states are finite"),
    "moment": (break_moment, "optimizer's exp_avg_sq"),
    "activation": (break_activation, "output of model.layers.1"),
    "labels": (break_labels, "labels: this step trains on no token"),
    "loss": (break_loss, "the losses, although the hidden states are finite"),
}
made: list[torch.optim.Optimizer] = []


@pytest.fixture
def start(tiny_config, tmp_path, monkeypatch):
    """start(**keys) -> model, a new run, config; `made` holds the run's optimizer."""
    runs = []
    make = loop.make_optimizer

    def keep(*args):
        made[:] = [make(*args)]
        return made[0]

    monkeypatch.setattr(loop, "make_optimizer", keep)

    def start(**keys):
        config = tiny_config(
            max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2, save_steps=1, **keys
        )
        run = RunDirectory.create(str(tmp_path / f"run{len(runs)}"))
        runs.append(run)
        return load_model(config, CPU, torch.float32), run, config

    return start


def state_of(model):
    moments = {name: value.clone() for name, value in made[0].state.get(model.flat_params, {}).items()}
    return {"weights": model.flat_params.detach().clone(), **moments}


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name].nan_to_num(), second[name].nan_to_num()) for name in first)


def assert_no_file_is_broken(run):
    for path in run.path.rglob("*.safetensors"):
        tensors = [t for t in load_file(path).values() if t.is_floating_point()]
        assert all(t.isfinite().all() for t in tensors), path


@pytest.mark.parametrize("step", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("site", SITES)
def test_each_site_at_each_step_is_found_before_the_update(site, step, start, monkeypatch):
    breaks, named = SITES[site]
    if site == "moment" and step == 1:
        step = 4  # there are none before the first step
    model, run, config = start()
    rows = random_rows(24)
    before = {}

    def do():
        breaks(model, rows, config, monkeypatch)
        before.update(state_of(model) if made else {})

    with pytest.raises(NonFiniteError) as caught:
        loop.train(model, rows, [], config, run, At(step, do))
    assert caught.value.exit_code == 6
    assert str(caught.value).startswith(f"step {step}: ")
    assert named in str(caught.value), str(caught.value)
    if before:
        assert_same(before, state_of(model))
    assert not model.flat_params.grad.any()
    event = metrics_of(run)[-1]
    assert (event["event"], event["step"], event["verdict"]) == ("non_finite", step, "reproducible")
    assert len(event["rows"]) == 4 and event["tensors"][0].startswith(named)
    assert [e["step"] for e in metrics_of(run) if e["event"] == "step"] == list(range(1, step))
    assert len(list(run.checkpoints.glob("step-*"))) == step - 1
    assert_no_file_is_broken(run)


def test_what_is_sound_when_run_again_is_called_transient_and_changes_nothing(start):
    """One bad gradient, once: the weights are as before, and a run resumed from there is the undisturbed one."""
    model, run, config = start(lora_dropout=0.2)
    hits = []

    def once(gradient):
        hits.append(gradient)
        return gradient * NAN if len(hits) == 5 else gradient  # the first micro-batch of step 3

    model.trainable[3].register_hook(once)
    with pytest.raises(NonFiniteError, match="step 3") as caught:
        loop.train(model, random_rows(24), [], config, run, SilentDisplay())
    assert "--resume" in caught.value.change
    assert metrics_of(run)[-1]["verdict"] == "transient"
    point = checkpoint.load(checkpoint.newest(run.checkpoints))
    assert point.step == 2
    loop.train(model, random_rows(24), [], config, run, SilentDisplay(), resume_from=point)
    resumed = lora.state_dict(model.lora_layers)
    other, second, config = start(lora_dropout=0.2)
    loop.train(other, random_rows(24), [], config, second, SilentDisplay())
    whole = lora.state_dict(other.lora_layers)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_what_depends_on_chance_is_run_again_with_the_same_chance(start):
    """A fault of one dropout mask: another mask would be sound, and the data would be cleared of it."""
    model, run, config = start()
    layer, drawn = model.layers[1].mlp, []
    plain = layer.forward

    def unlucky(x):
        drawn.append(torch.rand(()).item())
        return plain(x) * (NAN if drawn[-1] == drawn[min(4, len(drawn) - 1)] and len(drawn) > 4 else 1.0)

    layer.forward = unlucky
    with pytest.raises(NonFiniteError, match="step 3: "):
        loop.train(model, random_rows(24), [], config, run, SilentDisplay())
    assert metrics_of(run)[-1]["verdict"] == "reproducible"


def test_weights_that_an_update_broke_are_not_saved(start, monkeypatch):
    """A learning rate so large that the update overflows: the step before it is the last that is saved."""
    model, run, config = start()
    plain = loop.learning_rate_at
    monkeypatch.setattr(loop, "learning_rate_at", lambda c, step, n: 1e38 if step == 3 else plain(c, step, n))
    made_step = torch.optim.AdamW.step

    def overflow(self, *args):
        made_step(self, *args)
        if self.param_groups[0]["lr"] > 1:
            model.flat_params.data[0] = float("inf")

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    with pytest.raises(NonFiniteError, match="step 4: "):
        loop.train(model, random_rows(24), [], config, run, SilentDisplay())
    assert checkpoint.newest(run.checkpoints).name == "step-000003"
    assert_no_file_is_broken(run)
    assert metrics_of(run)[-1]["event"] == "non_finite"


def test_one_row_without_labels_among_others_is_no_fault(start):
    model, run, config = start()
    rows = random_rows(24)
    rows[3].loss_mask[:] = False
    loop.train(model, rows, [], config, run, SilentDisplay())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral", "phi"])
def test_clean_runs_raise_no_alarm(family, start, tiny_config, model_folder):
    for seed in range(2):
        config = tiny_config(family, max_steps=4, per_device_train_batch_size=3, seed=seed, lora_dropout=0.1)
        model = load_model(config, CPU, torch.float32)
        optimizer = loop.make_optimizer(config.optimizer, [model.flat_params])
        model.module.train()
        for step in range(4):
            batches = [collate_packs([[row] for row in random_rows(3, seed=10 * seed + step)], CPU)]
            loop.train_step(model, batches, optimizer, 1.0, (seed, step))
        assert nonfinite.nonfinite_tensors(model, optimizer) == []


def test_the_scales_of_8_bit_moments_and_of_quantised_weights_are_looked_at(start):
    for keys in ({"base_precision": "nf4", "base_residency": "quantized"}, {"base_precision": "fp8"}):
        model, _, _ = start(optim="adamw_8bit", lora_r=64, **keys)
        optimizer = made_of(model)
        assert nonfinite.nonfinite_tensors(model, optimizer) == []
        optimizer.state[model.flat_params]["absmax2"][3] = NAN
        assert nonfinite.nonfinite_tensors(model, optimizer) == ["optimizer's absmax2"]
        assert not nonfinite.all_finite([norm.item() for norm in nonfinite.norms(model, optimizer)])
        optimizer.state[model.flat_params]["absmax2"][3] = 0.0
        storage = next(iter(model.lora_layers.values())).base.storage
        name, scales = next((n, t) for n, t in storage.named_buffers() if t.is_floating_point())
        if scales.dtype == torch.float8_e4m3fn:
            scales.view(torch.uint8).flatten()[0] = 0x7F
        else:
            scales.flatten()[0] = NAN
        (found,) = nonfinite.nonfinite_tensors(model, optimizer)
        assert found.startswith("frozen model.layers.0.") and found.endswith(name)


def made_of(model):
    """An 8-bit optimizer with state, as after a step: bitsandbytes' own steps need CUDA."""
    import bitsandbytes as bnb

    optimizer = bnb.optim.AdamW8bit([model.flat_params])
    optimizer.init_state(optimizer.param_groups[0], model.flat_params, 0, 0)
    return optimizer


def test_the_check_is_one_number_a_tensor_and_no_transfer(start):
    model, _, config = start()
    optimizer = loop.make_optimizer(config.optimizer, [model.flat_params])
    model.flat_params.grad.fill_(0.1)
    optimizer.step()
    assert [norm.shape for norm in nonfinite.norms(model, optimizer)] == [torch.Size([])] * 3
    assert json.dumps(nonfinite.all_finite([0.0, 1.0, 1e31])) == "false"


def test_no_single_row_is_blamed_if_all_rows_of_all_ranks_are_bad() -> None:
    """Each rank has one row here, and could not tell."""
    findings = [nonfinite.Finding(["the losses"], [where], "reproducible") for where in ("rows:1", "rows:2")]
    world = SimpleNamespace(size=2, all_gather=lambda own: [list(vars(one).values()) for one in findings])
    for rows, bad in ((2, []), (3, ["rows:1", "rows:2"])):
        share: Any = SimpleNamespace(world=world, rows=[None] * rows)
        assert nonfinite.examine_together(findings[0], share).rows == bad
