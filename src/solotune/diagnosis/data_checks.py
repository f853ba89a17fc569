"""Find faults of data, tokenizer and config in seconds, before any GPU is used.

    for finding in check_rows(config, tokenizer, prepared): ...

It runs the rules that need rows (`rules.judge`). On large data most of them judge a sample, and the evidence says so:
`rows_judged` of `training_rows`. The findings are cached with the rows, under a key of everything that a rule may read:
the rows, the config, the model's files, and the source of the rules.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache as once
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solotune.config.run_config import RunConfig
from solotune.dataset import Prepared, cache
from solotune.dataset.chat import tokenizer_files
from solotune.diagnosis.facts.row_facts import RowFacts, model_jsons
from solotune.diagnosis.findings import Finding
from solotune.diagnosis.rules import judge
from solotune.errors import InputError
from solotune.hub.model_files import ModelFiles, model_here

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_rows(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, prepared: Prepared, base: ModelFiles | None = None
) -> list[Finding]:
    """Problems of the rows as they would be trained on; worst first, empty if there are none.

    Args:
        base: files of the base model; None: they are looked for on this machine.
    """
    base = base or model_here(config.model_name_or_path, config.model_revision)
    key = _key(config.model_dump(), prepared, base)
    if key is not None and (known := cache.load_findings(key)) is not None:
        return [finding for one in known if (finding := Finding.from_json(one)) is not None]
    found = judge(RowFacts.of_config(config, tokenizer, prepared.train, prepared.validation, prepared.report, base))
    as_json = json.loads(json.dumps([finding.to_json() for finding in found]))
    if key is not None:
        cache.store_findings(key, as_json)
    return [Finding(**one) for one in as_json]


def _key(settings: dict[str, Any], prepared: Prepared, base: ModelFiles | None) -> str | None:
    """The cache key of the findings; None for rows that are not cached."""
    if prepared.key is None:
        return None
    parts = [prepared.key, settings, model_jsons(base), _own_template(settings, base), _rules_version()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _own_template(settings: dict[str, Any], base: ModelFiles | None) -> str | None:
    """What rules read of the model's own template, if a file of the user replaces it: the rows do not depend on it."""
    if base is None or settings["chat_template_path"] is None:
        return None
    try:
        return tokenizer_files.digest(base.folder)
    except InputError as error:
        return str(error)


@once
def _rules_version() -> str:
    return cache.source_digest(Path(__file__).parent)
