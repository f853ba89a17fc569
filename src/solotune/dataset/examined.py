"""Prepared rows whose report also tells what is wrong with them and how they fill sequences."""

from __future__ import annotations

from datetime import date

from transformers import PreTrainedTokenizerBase

from solotune.config import RunConfig
from solotune.dataset import findings, pack
from solotune.dataset.example import Prepared, lengths_of
from solotune.dataset.prepare import Progress, prepare


def examined(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress | None = None,
    rendered_on: date | None = None,
) -> Prepared:
    """See `prepare`."""
    prepared = prepare(config, tokenizer, progress=progress, rendered_on=rendered_on)
    if config.packing:
        prepared.report.packing = pack.account(lengths_of(prepared.train), config.max_length)
    prepared.report.findings = findings.known_or_found(config, tokenizer, prepared)
    return prepared
