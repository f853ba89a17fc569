"""How far two models' next-token distributions are apart, over the same tokens.

    error = LogProbError()
    error.add(trained_logits_TV, exported_logits_TV)      # for each row
    error.mean_kl, error.max_kl, error.top1_agreement, error.max_logprob_diff, error.positions

    KL_t = sum_v p_t(v) (log p_t(v) - log q_t(v)),  p the trained model, q the exported one, in float64

Logits are shifted by their log-sum-exp first, so logits and log-probabilities may be given alike.

Shape legend: T positions, V vocabulary.
"""

from __future__ import annotations

import torch


class LogProbError:
    """Sums over positions; the figures are of all that was added."""

    def __init__(self) -> None:
        self.positions = 0
        self.max_kl = 0.0
        self.max_logprob_diff = 0.0
        self._kl_sum = 0.0
        self._same_top1 = 0

    def add(self, trained_TV: torch.Tensor, exported_TV: torch.Tensor) -> None:
        """Add the predictions of both models for the same T positions.

        Raises:
            ValueError: the shapes differ.
        """
        if trained_TV.shape != exported_TV.shape:
            raise ValueError(f"predictions of shapes {tuple(trained_TV.shape)} and {tuple(exported_TV.shape)}")
        log_p_TV = trained_TV.double().log_softmax(-1)
        log_q_TV = exported_TV.double().log_softmax(-1)
        kl_T = (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1)
        self.positions += len(kl_T)
        self._kl_sum += float(kl_T.sum())
        self.max_kl = max(self.max_kl, float(kl_T.max()))
        self.max_logprob_diff = max(self.max_logprob_diff, float((log_p_TV - log_q_TV).abs().max()))
        self._same_top1 += int((log_p_TV.argmax(-1) == log_q_TV.argmax(-1)).sum())

    @property
    def mean_kl(self) -> float:
        return self._kl_sum / max(1, self.positions)

    @property
    def top1_agreement(self) -> float:
        """Share of positions where both find the same token most likely."""
        return self._same_top1 / max(1, self.positions)
