"""Is it better than before, and by more than chance? Base against tuned on held-out rows.

Loss per supervised token is a ratio of sums over rows, L = sum(l_i) / sum(n_i), where n_i is the weight of a row's
supervised tokens (their number, unless the data has weights) and l_i the sum of their losses, each times its weight:
what training minimises. Rows are independent, tokens within a row are not, so its standard error is the ratio
estimator's (Cochran, Sampling Techniques, 3rd ed., section 2.11):

    e_i = l_i - L n_i        stderr = sqrt(m / (m - 1) * sum(e_i^2)) / sum(n_i)        m rows

Treating tokens as independent instead would report an error several times too small on chat rows.

Exact match asks whether greedy decoding would give the reference answer, token for token, with its end-of-turn token.
That needs no generation: greedy decoding reproduces the reference exactly when every reference token is the argmax
given the ones before it, and one teacher-forced pass tells. Base and tuned are the same model with its adapters off
and on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from itertools import islice
from typing import Any

import numpy as np
import torch

from solotune.dataset import Example, render_prompt
from solotune.dataset.collate import collate, num_labels
from solotune.dataset.example import lengths_of
from solotune.hardware.gpu_errors import stage
from solotune.model.loading import TrainableModel
from solotune.model.lora import adapters_off
from solotune.runtime import signals


@dataclass(frozen=True)
class Score:
    """Held-out figures of one model; losses are nats per supervised token, by weight."""

    loss: float
    stderr: float
    tokens: int
    exact_match: float
    exact_match_stderr: float
    rows: int
    row_losses: tuple[float, ...] = ()  # weighted sums over each row, in the order of the rows given
    row_weights: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"loss": self.loss, "stderr": self.stderr, "tokens": self.tokens}


@dataclass(frozen=True)
class Sample:
    """One held-out prompt, answered by both."""

    where: str
    prompt: str
    reference: str
    base: str
    tuned: str


@dataclass(frozen=True)
class Evaluation:
    """evaluation.json."""

    base: Score
    tuned: Score
    samples: list[Sample]

    @property
    def difference(self) -> tuple[float, float]:
        """Tuned loss minus base loss and its standard error, paired by row."""
        return loss_difference(self.base, self.tuned)

    def to_json(self) -> dict[str, Any]:
        """The design's shape; `scores` may grow."""
        difference, stderr = self.difference
        exact = {
            "base": self.base.exact_match,
            "tuned": self.tuned.exact_match,
            "stderr": {"base": self.base.exact_match_stderr, "tuned": self.tuned.exact_match_stderr},
        }
        return {
            "rows": self.base.rows,
            "base": self.base.to_json(),
            "tuned": self.tuned.to_json(),
            "difference": {"loss": difference, "stderr": stderr},
            "scores": {"exact_match": exact},
            "samples": [asdict(sample) for sample in self.samples],
        }


def ratio_and_stderr(sums: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """sum(sums) / sum(weights) and its standard error over independent rows (infinite for a single row)."""
    total = sum(weights)
    ratio = sum(sums) / total
    squares = sum((s - ratio * n) ** 2 for s, n in zip(sums, weights, strict=True))
    rows = len(weights)
    return ratio, math.sqrt(rows / (rows - 1) * squares) / total if rows > 1 else math.inf


def loss_difference(base: Score, tuned: Score) -> tuple[float, float]:
    """Tuned minus base and its standard error, paired by row: much smaller than either error alone."""
    paired = [t - b for b, t in zip(base.row_losses, tuned.row_losses, strict=True)]
    return ratio_and_stderr(paired, base.row_weights)


@stage("evaluating")
@torch.no_grad()
def score(
    model: TrainableModel,
    rows: Sequence[Example],
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Score:
    """Loss (by weight) and exact match of the model as it stands, in evaluation mode; the mode is put back."""
    was_training = model.module.training
    model.module.eval()
    losses, counts, exact = [0.0] * len(rows), [num_labels(row) for row in rows], [False] * len(rows)
    by_length = np.argsort(lengths_of(rows), kind="stable").tolist()  # like lengths together: little padding
    for start in range(0, len(rows), batch_size):
        chosen = by_length[start : start + batch_size]
        batch = collate([rows[i] for i in chosen], model.device)
        losses_N, correct_N = model.token_losses(batch)
        weighted_N = batch.weighted(losses_N)
        sizes = [counts[i] for i in chosen]
        for i, row_losses, row_hits in zip(chosen, weighted_N.split(sizes), correct_N.split(sizes), strict=True):
            losses[i], exact[i] = row_losses.double().sum().item(), bool(row_hits.all())
        signals.check_stop()
        progress(min(start + batch_size, len(rows)), len(rows))
    model.module.train(was_training)
    weights = [row.total_weight for row in rows]
    loss, stderr = ratio_and_stderr(losses, weights)
    share = sum(exact) / len(rows)
    return Score(
        loss,
        stderr,
        sum(counts),
        share,
        math.sqrt(share * (1 - share) / len(rows)),
        len(rows),
        tuple(losses),
        tuple(weights),
    )


def stop_ids(model: TrainableModel, tokenizer: Any, rows: Iterable[Example]) -> list[int]:
    """Tokens that end an answer: the tokenizer's, the model's, and whatever ends the supervised answers."""
    configured = model.module.generation_config.eos_token_id
    ids = set(configured if isinstance(configured, list) else [configured]) | {tokenizer.eos_token_id}
    special = set(tokenizer.all_special_ids)
    ids |= {last for row in rows if (last := last_supervised(row)) in special}
    return sorted(int(i) for i in ids if i is not None)


def last_supervised(row: Example) -> int:
    """The id of a row's last supervised token."""
    return int(row.input_ids[row.loss_mask.nonzero()[0][-1]])


@torch.no_grad()
def generate(
    model: TrainableModel, prompt_ids: Sequence[int], max_new_tokens: int, stops: list[int], streamer: Any = None
) -> list[int]:
    """Greedy continuation of a prompt, without its end-of-turn token."""
    was_training = model.module.training
    model.module.eval()
    ids = torch.tensor([list(prompt_ids)], device=model.device)
    continued: Any = model.module.generate  # a mixin's method, which type checkers do not find
    out = continued(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=stops or None,
        pad_token_id=stops[0] if stops else 0,
        streamer=streamer,
    )
    model.module.train(was_training)
    new = out[0, ids.shape[1] :].tolist()
    return [token for token in new if token not in stops]


def samples(
    model: TrainableModel,
    tokenizer: Any,
    rows: Sequence[Example],
    count: int,
    max_new_tokens: int,
    rendered_on: date | None = None,
) -> list[Sample]:
    """Answers of base and tuned to the first `count` held-out prompts that end with an assistant turn."""
    chosen = list(islice((row for row in rows if row.messages and row.messages[-1]["role"] == "assistant"), count))
    stops = stop_ids(model, tokenizer, rows)
    shown = []
    for row in chosen:
        signals.check_stop()
        prompt = render_prompt(tokenizer, row.messages[:-1], row.tools, rendered_on=rendered_on)
        tuned = generate(model, prompt, max_new_tokens, stops)
        with adapters_off(model.module):
            base = generate(model, prompt, max_new_tokens, stops)
        users = [message["content"] for message in row.messages if message["role"] == "user"]
        texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in (base, tuned)]
        shown.append(Sample(row.where, users[-1] if users else "", row.messages[-1]["content"], *texts))
    return shown


def compare(
    model: TrainableModel,
    tokenizer: Any,
    rows: Sequence[Example],
    *,
    batch_size: int,
    num_samples: int,
    max_new_tokens: int,
    rendered_on: date | None = None,
    tuned: Score | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Base against tuned on `rows`; `tuned` is taken where it was just measured, `rendered_on` is the rows' date."""
    tuned = tuned or score(model, rows, batch_size, progress)
    with adapters_off(model.module):
        base = score(model, rows, batch_size, progress)
    return Evaluation(base, tuned, samples(model, tokenizer, rows, num_samples, max_new_tokens, rendered_on))
