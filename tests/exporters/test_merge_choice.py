"""Which base is merged into is measured; what is too far from the trained model is said."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import solotune
from solotune.errors import InputError
from solotune.evaluation.scores import score
from solotune.exporters import merge_choice
from solotune.exporters.artifact import Parity
from solotune.exporters.base_tensors import BaseTensors
from solotune.exporters.merge import DEQUANTIZED, ORIGINAL, REQUANTIZED
from solotune.exporters.merge_choice import MergeChoice, beyond, check_wanted, choose, measure_trained
from solotune.exporters.source import open_source


def silent(*_: Any) -> None:
    pass


def chosen(run: Path, wanted: str | None = None, *, without_rows: bool = False) -> MergeChoice:
    source = open_source(run)
    if without_rows:
        source.rows = []
    trained = measure_trained(source, silent)
    found = choose(source, BaseTensors.of(source.base, source.config), trained, "bf16", wanted, silent)
    assert trained.model is None  # its weights are gone
    return found


def test_a_run_in_4_bits_is_merged_into_the_codes_that_it_trained_on(run: Path) -> None:
    found = chosen(run)
    kl = {name: fit.mean_kl for name, fit in found.measured.items()}
    assert kl["trained"] == 0 and 100 * kl[DEQUANTIZED] < min(kl[ORIGINAL], kl[REQUANTIZED])
    assert found.into == DEQUANTIZED and found.must_be_exact
    assert found.choice.because.startswith("mean KL to the trained model on 8 held-out rows: dequantized")
    source = open_source(run)
    expected = score(source.load(), source.rows, 4)  # the loss and exact match that `evaluate` reports
    trained = found.measured["trained"]
    assert (trained.loss, trained.stderr) == pytest.approx((expected.loss, expected.stderr), rel=1e-4)
    assert (trained.exact_match, trained.positions) == (expected.exact_match, expected.tokens)
    assert found.to_json()["measured"][DEQUANTIZED]["loss"] == pytest.approx(expected.loss, rel=1e-3)


def test_a_streamed_base_is_measured_as_a_resident_one(run: Path) -> None:
    source = open_source(run)
    assert source.tuned_run is not None
    source.tuned_run.config = source.tuned_run.config.replaced("test", base_offload=True)
    trained = measure_trained(source, silent)
    assert trained.model is not None and trained.model.ring is not None
    found = choose(source, BaseTensors.of(source.base, source.config), trained, "bf16", None, silent)
    assert found.to_json() == chosen(run).to_json()


def test_the_user_s_choice_wins_and_is_judged_by_itself(run: Path) -> None:
    found = chosen(run, ORIGINAL)
    assert found.into == ORIGINAL and found.choice.because.startswith("--merge-into; ")
    assert not found.must_be_exact
    here = found.measured[ORIGINAL]
    same = Parity("transformers", mean_kl=here.mean_kl, top1_agreement=here.top1_agreement, positions=here.positions)
    assert found.problems(same) == []
    assert found.problems(replace(same, mean_kl=2 * max(1e-3, here.mean_kl)))


def test_without_rows_built_in_texts_decide_and_no_loss_is_reported(run: Path) -> None:
    found = chosen(run, without_rows=True)
    assert found.into == DEQUANTIZED and "8 built-in texts" in found.because
    assert {fit["loss"] for fit in found.to_json()["measured"].values()} == {None}


def test_an_adapter_on_16_bits_has_only_its_base(run: Path, export_base: Path) -> None:
    source = open_source(run / "adapter", base=str(export_base), base_precision="bf16")
    tensors = BaseTensors.of(source.base, source.config)
    found = choose(source, tensors, measure_trained(source, silent), "bf16", None, silent)
    assert found.into == ORIGINAL and DEQUANTIZED not in found.measured and found.must_be_exact
    assert found.measured[ORIGINAL].mean_kl < 1e-5 and "built-in texts" in found.because
    with pytest.raises(InputError, match="not trained on a quantised base"):
        check_wanted(source, tensors, DEQUANTIZED)


def test_on_a_cpu_large_models_are_compared_on_fewer_rows(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(run)
    per_row = len(source.rows[0].input_ids)
    model = source.load()
    monkeypatch.setattr(merge_choice, "MAX_CPU_PRODUCTS", 2.5 * per_row * model.num_parameters)
    assert len(measure_trained(source, silent).rows) == 2
    monkeypatch.setattr(merge_choice, "MAX_CPU_PRODUCTS", 0)
    assert len(measure_trained(source, silent).rows) == 1  # never none


@pytest.mark.parametrize(
    ("parity", "words"),
    [
        ({"mean_kl": 9e-4, "top1_agreement": 0.991}, []),
        ({"mean_kl": 2e-3, "top1_agreement": 1.0}, ["mean KL to the trained model 0.002, at most 0.001 is allowed"]),
        ({"mean_kl": 0.0, "top1_agreement": 0.98}, ["the trained model's for 98.0% of 1,000 tokens, not 99%"]),
        ({"mean_kl": torch.nan, "top1_agreement": 0.0}, ["mean KL to the trained model nan", "0.0% of 1,000"]),
        ({"mean_kl": 0.0, "top1_agreement": 49 / 50, "positions": 50}, []),  # one token of few
        ({"mean_kl": 1e-4, "top1_agreement": 126 / 128, "positions": 128}, []),  # two standard errors
        ({"mean_kl": 0.0, "top1_agreement": 48 / 50, "positions": 50}, ["96.0% of 50 tokens"]),
    ],
)
def test_bounds(parity: dict[str, Any], words: list[str]) -> None:
    found = beyond(Parity("peft", **{"positions": 1000, **parity}))
    assert len(found) == len(words) and all(word in line for word, line in zip(words, found, strict=True))


@pytest.mark.export
def test_a_run_in_fp8_is_merged_into_its_rounded_base(train: Callable[..., Path], tmp_path: Path) -> None:
    """On a CPU, which emulates fp8: no merged model rounds activations, so its bound is the same merge in memory."""
    shutil.copytree(train(base_precision="fp8"), tmp_path / "run")
    result = solotune.export(tmp_path / "run", "merged")
    assert result.ok and result.merge is not None and result.merge["into"] == DEQUANTIZED
    measured = result.merge["measured"]
    assert measured[DEQUANTIZED]["mean_kl"] < measured[ORIGINAL]["mean_kl"]
