"""The best evaluation of a run so far, for `load_best_model_at_end` and `early_stopping_patience`.

A held-out loss that is lower than the best one by less than its noise is no new best: the minimum of a flat, noisy
curve is where the noise was luckiest. So an evaluation is compared with the best one on the same rows, by the paired
test that compares tuned with base (`statistics`), and the earlier one stays unless the later is better. Comparing with
the best, not with the last one, lets slow progress add up until it is beyond noise.

Each checkpoint has the best one too (`best.safetensors`), so a resumed run decides as the uninterrupted one:

    row_losses, row_hits (rows,)    of the best evaluation
    adapter tensors                 if `load_best_model_at_end`, under PEFT's names
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from solotune.config.settings import EvaluationSettings
from solotune.dataset import Example
from solotune.evaluation.compare import loss_verdict
from solotune.evaluation.scores import Score, score_of
from solotune.model import lora
from solotune.model.loading import TrainableModel
from solotune.training.checkpoint import Checkpoint

LOSSES, HITS = "row_losses", "row_hits"


class BestModel:
    """Compares each evaluation with the best one, and keeps the adapter of that."""

    def __init__(self, model: TrainableModel, rows: Sequence[Example], settings: EvaluationSettings) -> None:
        self._model, self._rows, self._settings = model, rows, settings
        self._adapter: dict[str, torch.Tensor] = {}
        self.score: Score | None = None
        self.step = 0
        """The step of the best evaluation; 0 before the first."""
        self.evaluations_since = 0
        """Evaluations since then, in a row without a new best."""

    def add(self, step: int, score: Score) -> None:
        """Take the evaluation of a step."""
        if self.score is not None and loss_verdict(self.score, score) != "better":
            self.evaluations_since += 1
            return
        self.score, self.step, self.evaluations_since = score, step, 0
        if self._settings.load_best:
            self._adapter = {name: part.clone() for name, part in lora.state_dict(self._model.lora_layers).items()}

    @property
    def is_out_of_patience(self) -> bool:
        """Whether the run ends now."""
        patience = self._settings.patience
        return patience is not None and self.evaluations_since >= patience

    def put_back(self) -> Score | None:
        """Load the best adapter into the model; its score. None: nothing was evaluated, or the last adapter stays."""
        if not self._adapter:
            return None
        lora.load_state_dict(self._model.lora_layers, self._adapter, f"the best adapter, step {self.step}")
        return self.score

    # --- in a checkpoint

    def tensors(self) -> dict[str, torch.Tensor]:
        """For `checkpoint.save`; empty before the first evaluation."""
        if self.score is None:
            return {}
        losses = torch.tensor(self.score.row_losses, dtype=torch.float64)
        return {LOSSES: losses, HITS: torch.tensor(self.score.row_hits), **self._adapter}

    def state(self) -> dict[str, int]:
        return {"step": self.step, "evaluations_since": self.evaluations_since}

    def restore(self, point: Checkpoint, fingerprints: dict[str, Any]) -> None:
        """Go on from a checkpoint; from nothing if it has no best, or other rows are held out now."""
        state, recorded = point.state.get("best"), point.state.get("fingerprints")
        then, now = (found.get("validation_rows") if isinstance(found, dict) else None
                     for found in (recorded, fingerprints))  # fmt: skip
        adapter = {name: part for name, part in point.best.items() if name not in (LOSSES, HITS)}
        is_whole = {LOSSES, HITS} <= point.best.keys() and bool(adapter) >= self._settings.load_best
        if not isinstance(state, dict) or not is_whole or then != now:
            return
        losses, hits = point.best[LOSSES].tolist(), point.best[HITS].tolist()
        if len(losses) != len(self._rows):
            return
        self.step, self.evaluations_since = int(state.get("step", 0)), int(state.get("evaluations_since", 0))
        self.score = score_of(self._rows, losses, [bool(hit) for hit in hits])
        self._adapter = adapter if self._settings.load_best else {}
