"""Keep the probes within their seconds, whatever the speed of the model.

    with TimeLimit.on(model, 60.0) as limit:
        needs = limit.seconds_of(forwards=6, steps=0)      None until a pass was timed
        ...                                                a pass that would end too late raises OutOfTime

The embedding is called once in every forward pass, so a hook on it sees each pass begin, and knows how long the last
one took, with its backward pass and its optimizer step. A pass that would end after the deadline does not start; a
forward pass that is slower than expected ends at its next layer. Two passes over a few tokens come first, so that
the first real one is not begun without an estimate.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from solotune.diagnosis.probes.skipped import Skipped

WITH_GRADIENT = 3.0
"""A forward and a backward pass take about as long as three forward passes."""
TRIAL_TOKENS, TRIAL = (8, 32), 0.02
"""Tokens of the first passes; share of the budget that the first may take for the second to follow."""
SLACK = 0.05
"""Share of the budget by which the last pass may be late."""


class OutOfTime(Skipped):
    """The next pass would end after the deadline."""


@dataclass
class TimeLimit:
    """Times of the passes so far, and the time at which the next ones have to end."""

    budget: float
    deadline: float
    passes: dict[bool, dict[int, float]] = field(default_factory=lambda: {False: {}, True: {}})
    """Whether with a gradient -> tokens -> seconds of the last such pass"""
    _model: Any = None
    _until: float = math.inf  # the end of the probe that runs
    _first: int | None = None  # tokens of the first pass
    _open: tuple[float, int, bool] | None = None  # start, tokens and gradient of the pass that runs

    @classmethod
    @contextmanager
    def on(cls, model: nn.Module, budget: float) -> Iterator[TimeLimit]:
        """Watch all passes of this model until the exit."""
        limit = cls(budget, time.perf_counter() + budget, _model=model)
        handles = [layer.register_forward_pre_hook(limit._at_layer) for layer in _layers(model)]
        embedding = _embedding(model)
        if embedding is not None:
            handles.append(embedding.register_forward_pre_hook(limit._at_start))
        try:
            yield limit
        finally:
            for handle in handles:
                handle.remove()

    @property
    def left(self) -> float:
        return self.deadline - time.perf_counter()

    def seconds_of(self, forwards: float, steps: float) -> float | None:
        """Seconds of so many passes as large as the first one, without and with gradient; None if none was timed."""
        if self._first is None:
            return None
        forward, step = self._expected(self._first, False), self._expected(self._first, True)
        return forwards * (forward or 0.0) + steps * (step or 0.0)

    def try_out(self, ids: torch.Tensor) -> None:
        """Time passes over a few of these ids without a gradient. A model that fails here fails in its first probe.

        Args:
            ids: (tokens,), on the device of the model.
        """
        for count in TRIAL_TOKENS:
            started = time.perf_counter()
            try:
                with torch.no_grad():
                    self._model(input_ids=ids[None, :count], use_cache=False)
            except (RuntimeError, ValueError, IndexError, KeyError, TypeError, Skipped):
                self._open = None
                return
            self._open = None
            self.passes[False][min(count, len(ids))] = time.perf_counter() - started
            if time.perf_counter() - started > TRIAL * self.budget:
                return

    def begin(self, seconds: float) -> None:
        """A probe begins, and has at most so many seconds."""
        self._until = min(self.deadline, time.perf_counter() + seconds)

    def close(self) -> None:
        """The pass that runs has ended: the next one belongs to another probe."""
        if self._open is not None:
            start, tokens, has_gradient = self._open
            self.passes[has_gradient][tokens] = time.perf_counter() - start
            self._first = self._first or tokens
            self._open = None

    def _at_start(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.close()
        tokens = inputs[0].numel() if inputs and isinstance(inputs[0], torch.Tensor) else 0
        has_gradient = torch.is_grad_enabled()
        expected = self._expected(tokens, has_gradient) or 0.0
        left = min(self.deadline, self._until) - time.perf_counter()
        if left + SLACK * self.budget < expected:
            raise OutOfTime(
                f"it was stopped: a pass takes about {expected:.1f} s, and it has {max(left, 0):.1f} s left"
            )
        self._open = (time.perf_counter(), tokens, has_gradient)

    def _at_layer(self, _module: nn.Module, _inputs: tuple[Any, ...]) -> None:
        if self.left < -SLACK * self.budget:
            self._open = None
            raise OutOfTime(f"it was stopped: the budget of {self.budget:.0f} s is used up")

    def _expected(self, tokens: int, has_gradient: bool) -> float | None:
        """Seconds of a pass: as long as the last one of at least as many tokens, else by the two largest.

        A pass over few tokens mostly reads the weights, so its seconds do not grow in proportion to the tokens.
        """
        known, factor = self.passes[has_gradient], 1.0
        if not known and has_gradient:
            known, factor = self.passes[False], WITH_GRADIENT
        if not known:
            return None
        as_large = [size for size in known if size >= tokens]
        if as_large:
            return factor * known[min(as_large)]
        largest = max(known)
        in_proportion = known[largest] * tokens / max(largest, 1)
        if len(known) < 2:
            return None if largest in TRIAL_TOKENS else factor * in_proportion
        second = max(size for size in known if size < largest)
        rise = (known[largest] - known[second]) / (largest - second)
        return factor * max(known[largest] + rise * (tokens - largest), in_proportion / 2)


def _embedding(model: nn.Module) -> nn.Module | None:
    get: Any = getattr(model, "get_input_embeddings", None)
    try:
        return get() if get is not None else None
    except (AttributeError, NotImplementedError):
        return None


def _layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers: members of the longest list of modules."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len)) if lists else []
