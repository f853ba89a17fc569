"""A subject out of what is ours: rows that are prepared, a config, a run directory."""

from __future__ import annotations

from typing import Any

from solotune.config import RunConfig
from solotune.dataset import Prepared
from solotune.dataset.findings_facts import Facts, Finding
from solotune.diagnosis.subject import Settings, Subject


def settings_of(config: RunConfig) -> Settings:
    """All keys of a config, each with where it was set."""
    return Settings(config.model_dump(), sources={key: config.source_of(key) for key in RunConfig.model_fields})


def from_prepared(config: RunConfig, tokenizer: Any, prepared: Prepared) -> Subject:
    """A training that is about to begin: its settings and its rows, of which nothing has run yet."""
    files = Facts(config, tokenizer, prepared.train, prepared.validation, prepared.report).model_files
    return Subject(
        name=config.name,
        settings=settings_of(config),
        tokenizer=tokenizer,
        model_config=files["config.json"],
        generation_config=files["generation_config.json"],
        train=prepared.train,
        validation=prepared.validation,
        findings=[Finding(**found) for found in prepared.report.findings],
    )
