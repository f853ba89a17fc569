"""Which base the adapter is merged into, by measurement.

    trained model          once over the rows: hidden states that predict the labels
    for each candidate     its weights take the place of the layers' own, tensor by tensor; the same rows again
    choice                 the candidate with the least KL(trained || merged)

An adapter corrects the weights that it was trained on. Of a 4-bit base these are the dequantised codes, not the 16-bit
weights that they were made from, and the difference between both is several times the adapter's. What is nearest is
measured all the same, since it depends on the precision, the base and the rows. The model in memory is the only one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from solotune.config.run_config import Choice
from solotune.dataset import Example
from solotune.errors import InputError
from solotune.exporters import measure
from solotune.exporters.artifact import Parity
from solotune.exporters.base_tensors import BaseTensors
from solotune.exporters.measure import Fit
from solotune.exporters.merge import DEQUANTIZED, ORIGINAL, OUTPUT_DTYPES, REQUANTIZED, Merge, Progress, is_quantised
from solotune.exporters.probe_texts import probe_rows
from solotune.exporters.source import ExportSource
from solotune.model.frozen_linear import DenseWeight, FrozenLinear
from solotune.model.loading import TrainableModel
from solotune.model.lora import LoraLinear, adapters_off
from solotune.model.loss import Head

MAX_CPU_PRODUCTS = 2e13  # parameters x tokens of a pass on a CPU: SmolLM2 takes all rows, an 8B model 2,500 tokens
MEAN_KL, TOP1 = 1e-3, 0.99  # bounds of a merge into what was trained, in 16 bits


@dataclass
class Trained:
    """What the trained model predicts for the rows that an export is measured on."""

    rows: Sequence[Example]
    has_labels: bool
    """Whether the rows are the user's, so that losses and exact match say something."""
    what: str
    """What the rows are, in words."""
    hidden_ND: torch.Tensor
    head: Head
    device: torch.device
    dtype: torch.dtype
    """Of activations; other engines compute in it too."""
    model: TrainableModel | None
    """Until `choose` has taken its weights."""

    def compare(self, other_ND: torch.Tensor, head: Head) -> Fit:
        """How near another model's predictions are to these."""
        return measure.compare(self.hidden_ND, other_ND, self.rows, self.head, head, self.device)


@dataclass(frozen=True)
class MergeChoice:
    """The base that was chosen, and what was measured."""

    into: str
    because: str
    measured: dict[str, Fit]
    """By candidate; `trained` is the trained model itself."""
    has_labels: bool
    must_be_exact: bool
    """Whether the merged model is computed as the trained one was, so that only rounding may differ."""

    @property
    def choice(self) -> Choice:
        return Choice("merge_into", self.into, self.because)

    def problems(self, parity: Parity) -> list[str]:
        """What a merged model that was loaded again differs in by more than it may.

        A merge into what was trained must be that model. Where another base is merged into, or the training multiplied
        in 8 bits, which no merged model does, it must be as near as the same merge was in memory.
        """
        here = self.measured[self.into]
        most, least = MEAN_KL, TOP1
        if not self.must_be_exact:
            most, least = max(most, 1.5 * here.mean_kl), min(least, here.top1_agreement - 0.01)
        return beyond(parity, most, least)

    def to_json(self) -> dict[str, Any]:
        measured = {name: fit.to_json() for name, fit in self.measured.items()}
        if not self.has_labels:
            for fit in measured.values():
                fit |= {"loss": None, "stderr": None, "exact_match": None}
        return {"into": self.into, "because": self.because, "measured": measured}


def beyond(parity: Parity, most: float = MEAN_KL, least: float = TOP1) -> list[str]:
    """Which bounds a parity breaks, in words.

    Tokens are a sample: their share may lie two standard errors below the bound. Where two tokens are equally likely,
    rounding decides, and of 128 tokens of texts unlike the training's two differed at a mean KL of 1e-4.
    """
    assert parity.mean_kl is not None and parity.top1_agreement is not None
    found = []
    if not parity.mean_kl <= most:  # NaN too
        found.append(
            f"{parity.engine}: mean KL to the trained model {parity.mean_kl:.2g}, at most {most:.2g} is allowed"
        )
    allowed = (1 - least) * parity.positions
    if round((1 - parity.top1_agreement) * parity.positions) > allowed + 2 * math.sqrt(allowed):
        agreed = f"{parity.top1_agreement:.1%} of {parity.positions:,} tokens"
        found.append(f"{parity.engine}: the most likely token is the trained model's for {agreed}, not {least:.0%}")
    return found


def measure_trained(source: ExportSource, progress: Progress) -> Trained:
    """Load the trained model, and keep what it predicts for the rows of the export.

    Raises:
        SolotuneError: it cannot be loaded.
    """
    model = source.load(progress)
    rows = _affordable(model, source.rows or probe_rows(source))
    kind = "built-in texts" if not source.rows else "held-out rows" if source.run else "rows of --dataset"
    hidden_ND = measure.predictions(model.module, rows)
    what = f"{len(rows)} {kind}"
    return Trained(rows, bool(source.rows), what, hidden_ND, model.head, model.device, model.dtype, model)


def choose(
    source: ExportSource, tensors: BaseTensors, trained: Trained, dtype: str, wanted: str | None, progress: Progress
) -> MergeChoice:
    """Measure each candidate, and take the nearest, or the one that the user wants.

    The model in `trained` has given its weights away afterwards, and is dropped.
    """
    model, has_codes = trained.model, is_quantised(source.config.precision)
    assert model is not None
    merge = Merge.of(source, ORIGINAL, OUTPUT_DTYPES[dtype])
    candidates = [ORIGINAL, *([DEQUANTIZED] if has_codes and tensors.has_every_linear else [])]
    measured = {"trained": trained.compare(trained.hidden_ND, trained.head)}
    for candidate in [*candidates, REQUANTIZED]:
        _swap(model, tensors, replace(merge, into=candidate), progress)
        with adapters_off(model.module), _brought_to_device(model):
            measured[candidate] = trained.compare(measure.predictions(model.module, trained.rows), model.head)
    trained.model = None
    candidates.sort(key=lambda name: measured[name].mean_kl)
    words = "; ".join(f"{name} {measured[name].mean_kl:.1e}" for name in candidates)
    why = f"mean KL to the trained model on {trained.what}: {words}"
    into, because = wanted or candidates[0], f"--merge-into; {why}" if wanted else why
    is_what_was_trained = into == (DEQUANTIZED if has_codes else ORIGINAL)
    must_be_exact = is_what_was_trained and not source.config.precision.multiplies_in_fp8
    return MergeChoice(into, because, measured, trained.has_labels, must_be_exact)


@contextmanager
def _brought_to_device(model: TrainableModel) -> Iterator[None]:
    """Bring the merged weights of a streamed layer to the device while the layer runs: 16 bits need not fit there."""
    there: dict[DenseWeight, torch.Tensor] = {}

    def bring(layer: nn.Module, _: object) -> None:
        for part in layer.modules():
            if isinstance(part, DenseWeight):
                there[part], part.weight_OI = part.weight_OI, part.weight_OI.to(model.device)

    def drop(*_: object) -> None:
        for part, weight_OI in there.items():
            part.weight_OI = weight_OI
        there.clear()

    layers = model.ring.layers if model.ring is not None else []
    hooks = [layer.register_forward_pre_hook(bring) for layer in layers]
    hooks += [layer.register_forward_hook(drop, always_call=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_wanted(source: ExportSource, tensors: BaseTensors, wanted: str | None) -> None:
    """Raises:
    InputError: `wanted` cannot be merged into.
    """
    if wanted == DEQUANTIZED:
        tensors.check_quantised()
    if wanted == DEQUANTIZED and not is_quantised(source.config.precision):
        raise InputError(
            "--merge-into dequantized: this adapter was not trained on a quantised base",
            seen=f"base_precision: {source.config.base_precision}",
            change="--merge-into original; for an adapter that others trained with QLoRA also --base-precision nf4",
        )


def _affordable(model: TrainableModel, rows: Sequence[Example]) -> Sequence[Example]:
    """The rows, on a CPU as many as take a minute or two."""
    if model.device.type != "cpu":
        return rows
    tokens, kept = 0, []
    for row in rows:
        tokens += len(row.input_ids)
        if kept and tokens * model.num_parameters > MAX_CPU_PRODUCTS:
            break
        kept.append(row)
    return kept


def _swap(model: TrainableModel, tensors: BaseTensors, merge: Merge, progress: Progress) -> None:
    """Replace the weights of all linear layers by merged ones; those of streamed layers stay in host memory."""
    streamed = model.ring.layers if model.ring is not None else []
    on_host = {part for layer in streamed for part in layer.modules() if isinstance(part, FrozenLinear)}
    weights = [tensor for tensor in tensors.weights if tensor.layer is not None]
    for number, tensor in enumerate(weights, start=1):
        part = model.module.get_submodule(tensor.layer or "")
        linear = part.base if isinstance(part, LoraLinear) else part
        assert isinstance(linear, FrozenLinear)
        W = merge.weight(tensor)
        device = torch.device("cpu") if linear in on_host else model.device
        linear.storage = DenseWeight((W.T.contiguous() if tensor.is_transposed else W).to(device))
        progress(number, len(weights), f"layers, merged into {merge.into}")
